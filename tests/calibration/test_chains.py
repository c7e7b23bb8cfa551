"""Which lists of modules are found to be chains of blocks."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor, nn

from gblr_plugin.calibration.chains import bypassed, find_chains, recorded, without_cache
from gblr_plugin.calibration.inputs import shared_inputs

WIDTH = 8


class Block(nn.Module):
    """A block with two layers that share an input, which may return more than its hidden state."""

    def __init__(self, *, more: bool = False) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.more = more

    def forward(self, x: Tensor, scale: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        y = x + torch.tanh(self.a(x)) * self.b(x)
        y = y if scale is None else y * scale
        return (y, y.mean()) if self.more else y


class Network(nn.Module):
    """Blocks in a list, in one of several ways of running them."""

    def __init__(self, kind: str = "plain") -> None:
        super().__init__()
        self.kind = kind
        self.embed, self.head = nn.Linear(4, WIDTH), nn.Linear(WIDTH, 3)
        self.blocks = nn.ModuleList(Block(more=kind == "more") for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x)
        scale, seen = torch.full((WIDTH,), 1.1), []
        for block in self.blocks:
            if self.kind == "named":
                h = block(x=h, scale=scale) if seen else block(h, scale=scale)
            elif self.kind == "more":
                h, _ = block(h, scale=scale)
            elif self.kind == "between":
                h = block(h) * 1.5
            elif self.kind == "scaled":
                h = block(h, scale=h.mean() if seen else scale)
            else:
                h = block(h, scale=scale)
            seen.append(h)
        return self.head(seen[0] + h if self.kind == "skip" else h)


def chains_of(model: nn.Module, x: Tensor) -> tuple[dict[str, list[str]], str]:
    layers = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    run = partial(model, x)
    chains, reason = find_chains(model, layers, shared_inputs(model, layers, run)[0], run)
    return {chain.name: list(chain.names) for chain in chains}, reason


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("plain", ""),
        ("named", ""),
        ("more", "the blocks of 'blocks' hand on more than one hidden state"),
        ("between", "no list of its modules runs as a chain"),
        ("scaled", "the blocks of 'blocks' hand on more than one hidden state"),
        ("skip", "the blocks of 'blocks' are looked at by later layers one by one"),
    ],
)
def test_a_list_is_a_chain_if_its_hidden_states_alone_connect_it(kind: str, reason: str) -> None:
    torch.manual_seed(0)
    model = Network(kind)
    found, why = chains_of(model, torch.randn(5, 4))
    assert why == reason
    assert found == ({} if reason else {"blocks": ["blocks.0", "blocks.1", "blocks.2"]})
    assert all(not m._forward_hooks and not m._forward_pre_hooks and "forward" not in vars(m) for m in model.modules())


def test_of_nested_lists_the_finest_chain_is_taken_and_two_in_a_row_are_found() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(4, WIDTH),
        nn.Sequential(*(Block() for _ in range(8))),
        nn.Sequential(nn.ReLU(inplace=True), *(Block() for _ in range(8))),
        nn.Linear(WIDTH, 3),
    )
    found, _ = chains_of(model, torch.randn(5, 4))
    assert found == {"1": [f"1.{place}" for place in range(8)], "2": [f"2.{place}" for place in range(9)]}


def test_a_block_that_runs_twice_is_no_chain() -> None:
    block = Block()
    assert chains_of(nn.Sequential(nn.Linear(4, WIDTH), block, block), torch.randn(5, 4))[0] == {}


def test_a_bypassed_chain_is_not_run() -> None:
    torch.manual_seed(0)
    model = Network()
    x = torch.randn(5, 4)
    layers = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    (chain,), _ = find_chains(model, layers, [[name] for name in layers], partial(model, x))
    blocks = chain.blocks
    _, calls, _ = recorded(blocks, partial(model, x), alone=True)
    hidden = torch.randn(5, WIDTH)
    with bypassed(chain, [calls[id(block)][0] for block in blocks], hidden):
        assert torch.equal(model(x), model.head(hidden))
    assert not torch.equal(model(x), model.head(hidden))


def test_models_of_transformers_are_chains_with_masks_and_without_caches() -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    small = {"hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 3, "intermediate_size": 24}
    llama = transformers.LlamaForCausalLM(transformers.LlamaConfig(**small, num_key_value_heads=2, vocab_size=40))
    bert = transformers.BertModel(transformers.BertConfig(**small, vocab_size=40))
    t5 = transformers.T5Model(
        transformers.T5Config(d_model=16, d_kv=8, d_ff=24, num_layers=6, num_heads=2, vocab_size=40)
    )
    ids = torch.randint(40, (2, 7))
    mask = torch.ones(2, 7, dtype=torch.long)
    mask[1, 4:] = 0
    for model, expected, more in (
        (llama, ["model.layers"], {}),
        (bert, ["encoder.layer"], {}),
        (t5, ["encoder.block", "decoder.block"], {"decoder_input_ids": ids}),
    ):
        layers = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and n != "lm_head"}
        run = partial(model, input_ids=ids, attention_mask=mask, **more)
        chains, _ = find_chains(model, layers, shared_inputs(model, layers, run)[0], run)
        assert [chain.name for chain in chains] == expected
        assert model.config.use_cache
        with without_cache(model):
            assert not model.config.use_cache
