"""Integer compressions of small networks."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import gblr_plugin as gblr
from gblr_plugin.compression import compress as engine
from gblr_plugin.compression.report import CompressionReport
from gblr_plugin.errors import ConfigError

WIDTH = 24


class Block(nn.Module):
    """A norm and two layers around a nonlinearity, beside the identity."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.gelu(self.up(self.norm(x))))


class Network(nn.Module):
    """Blocks between an embedding and a head that shares its weight."""

    def __init__(self, depth: int = 3, vocabulary: int = 40) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, WIDTH)
        self.first = nn.Linear(WIDTH, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(depth))
        self.lm_head = nn.Linear(WIDTH, vocabulary, bias=False)
        self.lm_head.weight = self.embed.weight

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
        h = self.first(self.embed(input_ids))
        for block in self.blocks:
            h = block(h)
        return {"logits": self.lm_head(h)}


@pytest.fixture
def network() -> Network:
    torch.manual_seed(0)
    return Network().eval()


@pytest.fixture
def batches() -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    mask = torch.ones(16, 8, dtype=torch.long)
    mask[3:6, 5:] = 0
    return [{"input_ids": torch.randint(40, (16, 8), generator=generator), "attention_mask": mask} for _ in range(6)]


def distance(model: nn.Module, dense: nn.Module, batches: list[dict[str, Tensor]]) -> float:
    """Kullback-Leibler divergence of the model's distributions from the dense network's, padding left out."""
    with torch.no_grad():
        pairs = [(model(**batch)["logits"], dense(**batch)["logits"]) for batch in batches]
        errors = [
            F.kl_div(found.log_softmax(-1), want.log_softmax(-1), log_target=True, reduction="none").sum(-1)
            for found, want in pairs
        ]
    return float(torch.cat([e[b["attention_mask"] != 0] for e, b in zip(errors, batches, strict=True)]).mean())


def test_calibration_refinement_and_recovery_each_bring_the_network_nearer(
    network: Network, batches: list[dict[str, Tensor]]
) -> None:
    errors = []
    for data, options in (
        (None, {}),
        (batches, {"refine": 0}),
        (batches, {"refine": 60}),
        (batches, {"refine": 60, "recover": 60}),
    ):
        model = copy.deepcopy(network)
        report = gblr.compress(model, 0.4, data, **options)
        errors.append(distance(model, network, batches))
        assert report.relative_flops <= 0.4
        assert {row.name for row in report.layers} == {"first"} | {
            f"blocks.{place}.{name}" for place in range(3) for name in ("up", "down")
        }
        assert [row.name for row in report.skipped] == ["lm_head"]
        assert all(isinstance(model.get_submodule(row.name).weight, gblr.GBLRTensor) for row in report.layers)
        assert len(report.blocks) == (0 if data is None else 3)
        assert all(row.after <= row.before for row in report.blocks)
        assert CompressionReport.from_dict(report.to_dict()) == report
        assert "blocks.0.up" in str(report)
    assert errors == sorted(errors, reverse=True)
    assert errors[3] < 0.7 * errors[1]


@pytest.mark.parametrize("family", ["low_rank", "monarch", "block_sparse", "blast"])
def test_every_family_is_refined_and_recovered(family: str, network: Network, batches: list[dict[str, Tensor]]) -> None:
    plain, model = copy.deepcopy(network), copy.deepcopy(network)
    gblr.compress(plain, 0.5, batches, family=family, refine=0)
    report = gblr.compress(model, 0.5, batches, family=family, refine=40, recover=20)
    assert distance(model, network, batches) < distance(plain, network, batches)
    assert {row.structure for row in report.layers} == {family}
    assert not any(row.relative_flops > 0.5 for row in report.layers)


def test_an_interrupted_call_goes_on_and_gives_the_same_network(
    network: Network, batches: list[dict[str, Tensor]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {"refine": 8, "factor_dtype": "int8"}
    want = copy.deepcopy(network)
    report = gblr.compress(want, 0.5, batches, resume=tmp_path / "straight", **options)
    calls = []

    def failing(*args: Any, **named: Any) -> Any:
        calls.append(args)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return refine(*args, **named)

    refine = engine.refine
    monkeypatch.setattr(engine, "refine", failing)
    with pytest.raises(KeyboardInterrupt):
        gblr.compress(copy.deepcopy(network), 0.5, batches, resume=tmp_path / "broken", **options)
    monkeypatch.undo()
    model = copy.deepcopy(network)
    again = gblr.compress(model, 0.5, batches, resume=tmp_path / "broken", **options)
    assert (again.layers, again.blocks) == (report.layers, report.blocks)
    assert distance(model, want, batches) == 0
    with pytest.raises(ConfigError, match="blocks of another model"):
        gblr.compress(copy.deepcopy(network), 0.25, batches, resume=tmp_path / "broken", **options)


def test_quality_is_measured_before_and_after(network: Network, batches: list[dict[str, Tensor]]) -> None:
    dense = copy.deepcopy(network)
    report = gblr.compress(
        network, 0.3, batches, refine=0, evaluate=lambda model: {"error": distance(model, dense, batches)}
    )
    assert report.quality is not None
    assert (report.quality["metric"], report.quality["before"]) == ("error", 0.0)
    assert report.quality["after"] > 0
    assert {"evaluation", "calibration", "decomposition", "refinement", "conversion"} <= {s.name for s in report.stages}
    assert report.seconds > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"budget": 1.5}, "compress: budget"),
        ({"budget": 0.5, "recover": 3}, "recover needs calibration batches"),
        ({"budget": 0.5, "factor_dtype": "int4"}, "factor_dtype must be 'int8'"),
        ({"budget": 0.5, "family": "low_rank", "align": 4}, "align is for intervals of gblr"),
        ({"budget": 0.5, "layers": ["nothing"]}, "nothing"),
        ({"budget": 0.5, "allocation": "output"}, "needs calibration batches"),
    ],
)
def test_what_cannot_be_used_is_refused_before_anything_changes(
    options: dict[str, Any], message: str, network: Network
) -> None:
    before = copy.deepcopy(network.state_dict())
    with pytest.raises(ConfigError, match=message):
        gblr.compress(network, **options)
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())


def test_a_sequence_of_layers_is_a_chain_of_them() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 32))
    dense, x = copy.deepcopy(model), [torch.randn(64, 32) for _ in range(4)]
    report = gblr.compress(model, 0.5, x, refine=20, layers=["Linear"])
    assert [row.name for row in report.blocks] == ["0", "2", "4"]
    errors = [(model(batch) - dense(batch)).square().mean() for batch in x]
    assert float(torch.stack(errors).mean()) < 0.1
