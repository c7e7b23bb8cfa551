"""Small random instances of the classes that people compress, each from `prepare` without arguments to the file.

A new class is one line of ``MODELS``.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gblr_plugin as gblr
from gblr_plugin.layers.dense import stored_weight

transformers = pytest.importorskip("transformers")

IDS = torch.tensor([[3, 14, 15, 9, 26, 5], [35, 8, 9, 7, 9, 3]])
TEXT = {"input_ids": IDS}
SPECIAL = {"bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0}
SIZES = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
LLAMA = {**SIZES, "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 32, **SPECIAL}
BERT = {**SIZES, "num_attention_heads": 4, "max_position_embeddings": 32}
PIXELS = {"pixel_values": torch.linspace(-1, 1, 2 * 3 * 16 * 16).reshape(2, 3, 16, 16)}
IMAGES = {"image_size": 16, "patch_size": 4, "num_labels": 5}
WHISPER = {
    **{f"{side}_{what}": 2 for side in ("encoder", "decoder") for what in ("layers", "attention_heads")},
    **{"encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "vocab_size": 64, "d_model": 32, "num_mel_bins": 8},
    **{"max_source_positions": 8, "max_target_positions": 32, "decoder_start_token_id": 2, **SPECIAL},
}


def hugging(kind: str, config: str, **sizes: Any) -> Callable[[], Any]:
    return lambda: getattr(transformers, kind)(getattr(transformers, config)(**sizes))


class Sentences(nn.Module):
    """An encoder of sentences as sentence-transformers builds it: a transformer, the mean of its tokens, a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.transformer = hugging("BertModel", "BertConfig", **BERT)()
        self.dense = nn.Linear(32, 24)

    def forward(self, input_ids: Tensor) -> Tensor:
        """(batch, 24) embeddings."""
        return self.dense(self.transformer(input_ids=input_ids).last_hidden_state.mean(1))


class Attending(nn.Module):
    """torch's own encoder and decoder layers, with packed projections of attention."""

    def __init__(self) -> None:
        super().__init__()
        sizes = {"d_model": 32, "nhead": 4, "dim_feedforward": 48, "batch_first": True, "dropout": 0.0}
        self.embedding = nn.Embedding(64, 32)
        self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(**sizes), 2)
        self.decoder = nn.TransformerDecoder(nn.TransformerDecoderLayer(**sizes), 1)
        self.head = nn.Linear(32, 5)

    def forward(self, input_ids: Tensor) -> Tensor:
        """(batch, 5)."""
        hidden = self.embedding(input_ids)
        return self.head(self.decoder(hidden, self.encoder(hidden)).mean(1))


@dataclass(frozen=True)
class Case:
    """A network: how it is made, its input, the layers that must stay dense, what it can and what is tried with it."""

    make: Callable[[], Any]
    inputs: dict[str, Tensor]
    dense: tuple[str, ...] = ()
    generates: bool = False
    compiled: bool = False


LM = {"inputs": TEXT, "dense": ("lm_head",), "generates": True}
MODELS: dict[str, Case] = {
    "llama": Case(hugging("LlamaForCausalLM", "LlamaConfig", **LLAMA), **LM, compiled=True),
    "llama, tied": Case(hugging("LlamaForCausalLM", "LlamaConfig", **LLAMA, tie_word_embeddings=True), **LM),
    "mistral": Case(hugging("MistralForCausalLM", "MistralConfig", **LLAMA, head_dim=8), **LM),
    "qwen 2": Case(hugging("Qwen2ForCausalLM", "Qwen2Config", **LLAMA), **LM),
    "qwen 3": Case(hugging("Qwen3ForCausalLM", "Qwen3Config", **LLAMA, head_dim=8), **LM),
    "gemma 3": Case(hugging("Gemma3ForCausalLM", "Gemma3TextConfig", **LLAMA, head_dim=8), **LM),
    "phi 3": Case(hugging("Phi3ForCausalLM", "Phi3Config", **LLAMA), **LM),
    "gpt-neox": Case(hugging("GPTNeoXForCausalLM", "GPTNeoXConfig", **BERT, **SPECIAL), **LM),
    "gpt-2": Case(
        hugging(
            *("GPT2LMHeadModel", "GPT2Config"),
            **{"n_layer": 2, "n_embd": 32, "n_head": 4, "vocab_size": 64, "n_positions": 32, **SPECIAL},
        ),
        **LM,
        compiled=True,
    ),
    "mixtral": Case(
        hugging("MixtralForCausalLM", "MixtralConfig", **LLAMA, num_local_experts=4),
        TEXT,
        (
            *(
                f"model.layers.{layer}.mlp.{name}"
                for layer in range(2)
                for name in ("gate", "experts.gate_up_proj", "experts.down_proj")
            ),
            "lm_head",
        ),
        generates=True,
    ),
    "t5": Case(
        hugging(
            *("T5ForConditionalGeneration", "T5Config"),
            **{"vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4},
            **{"decoder_start_token_id": 0, **SPECIAL},
        ),
        {**TEXT, "decoder_input_ids": IDS[:, :4]},
        ("lm_head",),
        generates=True,
    ),
    "whisper": Case(
        hugging("WhisperForConditionalGeneration", "WhisperConfig", **WHISPER),
        {"input_features": torch.linspace(-1, 1, 256).reshape(2, 8, 16), "decoder_input_ids": IDS[:, :4]},
        ("proj_out",),
        generates=True,
    ),
    "bert": Case(hugging("BertForSequenceClassification", "BertConfig", **BERT, num_labels=12), TEXT, ("classifier",)),
    "distilbert": Case(
        hugging(
            *("DistilBertForSequenceClassification", "DistilBertConfig"),
            **{"vocab_size": 64, "dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 4, "num_labels": 12},
        ),
        TEXT,
        ("classifier",),
    ),
    "sentences": Case(Sentences, TEXT),
    "vit": Case(
        hugging("ViTForImageClassification", "ViTConfig", **BERT, **IMAGES), PIXELS, ("classifier",), compiled=True
    ),
    "siglip": Case(  # its pooling head is torch's attention
        hugging("SiglipVisionModel", "SiglipVisionConfig", **BERT, **IMAGES), PIXELS, ("head.mlp.fc2",)
    ),
    "swin": Case(
        hugging(
            *("SwinForImageClassification", "SwinConfig"),
            **{**IMAGES, "patch_size": 2, "embed_dim": 16, "depths": [1, 1], "num_heads": [2, 4], "window_size": 4},
        ),
        PIXELS,
        ("classifier",),
    ),
    "resnet": Case(
        hugging(
            *("ResNetForImageClassification", "ResNetConfig"),
            **{"embedding_size": 8, "hidden_sizes": [16, 24], "depths": [1, 1], "num_labels": 5},
        ),
        PIXELS,
        ("classifier.1",),
    ),
    "nn.MultiheadAttention": Case(Attending, TEXT, ("head",), compiled=True),
}


@dataclass
class Made:
    """A network on its way: as it was, structured and trained, with its weights made dense, and converted."""

    case: Case
    first: Any
    trained: Any
    layers: dict[str, Any]
    reference: Any
    converted: Any


def run(model: Any, case: Case) -> Tensor:
    with torch.no_grad():
        output = model.eval()(**case.inputs)
    return output if isinstance(output, Tensor) else output[0]


def with_dense_weights(dense: Any, trained: Any, layers: dict[str, Any]) -> Any:
    """The dense network with the parameters of the trained one, and the formula of each layer as its weight."""
    state = dense.state_dict()
    dense.load_state_dict({key: value for key, value in trained.state_dict().items() if key in state}, strict=False)
    with torch.no_grad():
        for name, layer in layers.items():
            parent, _, last = name.rpartition(".")
            attention = dense.get_submodule(parent)
            if isinstance(attention, nn.MultiheadAttention) and last != "out_proj":
                rows = slice(32 * "qkv".index(last[0]), 32 * "qkv".index(last[0]) + 32)
                attention.in_proj_weight[rows] = layer.to_dense()
                attention.in_proj_bias[rows] = layer.bias
            else:
                module = dense.get_submodule(name)
                module.weight.copy_(stored_weight(module, layer.to_dense()))
    return dense


@pytest.fixture(scope="module", params=MODELS)
def made(request: Any) -> Made:
    case = MODELS[request.param]
    torch.manual_seed(0)
    first = case.make().eval()
    trained = copy.deepcopy(first)
    layers = gblr.prepare(trained)
    torch.testing.assert_close(run(trained, case), run(first, case), rtol=1e-3, atol=1e-4)
    optimizer = torch.optim.AdamW(gblr.param_groups(trained, lr=1e-3))
    goals = {name: gblr.LayerGoal(budget=0.5, group="all") for name in layers}
    learner = gblr.StructureLearner(layers, goals, gblr.Schedule(1, 6))
    learner.attach_all([optimizer])
    trained.train()
    for _ in range(8):
        output = trained(**case.inputs)
        (output if isinstance(output, Tensor) else output[0]).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert learner.frozen
    assert learner.relative_flops <= 0.5
    learner.detach()
    reference = with_dense_weights(copy.deepcopy(first), trained, layers)
    converted = gblr.convert(copy.deepcopy(trained).eval())
    return Made(case, first, trained, layers, reference, converted)


def generated(model: Any, case: Case, **options: Any) -> Tensor:
    inputs = {name: value for name, value in case.inputs.items() if name != "decoder_input_ids"}
    return model.eval().generate(**inputs, max_new_tokens=4, min_new_tokens=4, do_sample=False, **options)


def test_every_layer_but_the_named_ones_is_structured_and_the_output_is_that_of_the_dense_formula(made: Made) -> None:
    report = gblr.report(made.converted, made.case.inputs)
    assert [layer.name for layer in report.layers if layer.structure == "dense"] == list(made.case.dense)
    assert all(layer.left_dense for layer in report.layers if layer.structure == "dense")
    assert {layer.name for layer in report.structured} == set(made.layers)
    assert report.relative_flops < 0.55  # layers may be used more often than others
    expected = run(made.reference, made.case)
    torch.testing.assert_close(run(made.trained, made.case), expected, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(run(made.converted, made.case), expected, rtol=1e-3, atol=1e-4)
    assert not torch.allclose(expected, run(made.first, made.case), rtol=1e-3, atol=1e-4)


def test_generation_with_a_cache(made: Made) -> None:
    if not made.case.generates:
        pytest.skip("generates no text")
    expected = generated(made.reference, made.case, use_cache=False)
    for model in (made.trained, made.converted):
        assert torch.equal(generated(model, made.case), expected)
    assert torch.equal(generated(made.first, made.case), generated(made.first, made.case, use_cache=False))


def test_files_and_folders(made: Made, tmp_path: Path) -> None:
    expected = run(made.converted, made.case)
    gblr.save(made.converted, tmp_path / "model.safetensors")
    assert torch.equal(run(gblr.load(tmp_path / "model.safetensors", made.case.make), made.case), expected)
    if isinstance(made.converted, transformers.PreTrainedModel):
        made.converted.save_pretrained(tmp_path / "folder")
        again = type(made.converted).from_pretrained(tmp_path / "folder")
        assert torch.equal(run(again, made.case), expected)


def test_compiled(made: Made) -> None:
    if not made.case.compiled:
        pytest.skip("for the time it takes")
    compiled = torch.compile(made.converted, backend="aot_eager")
    torch.testing.assert_close(run(compiled, made.case), run(made.converted, made.case), rtol=1e-4, atol=1e-5)
    torch._dynamo.reset()
