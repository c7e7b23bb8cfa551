import copy
import dataclasses
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from gblr_plugin import ConfigError, GBLRTensor, load

FIXTURES = Path(__file__).parent / "fixtures"


def network():
    """What the fixture was saved from: packed rows, another plan, a layer stored dense, int8 factors."""
    return nn.Sequential(
        nn.Conv2d(3, 16, 3),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(64, 24, bias=False),
        nn.GELU(),
        nn.Linear(24, 24),
        nn.Linear(24, 20),
    )


@pytest.fixture
def content():
    return torch.load(FIXTURES / "version1.pt", weights_only=True)


def test_a_file_of_version_1_gives_the_network_that_was_saved():
    expected = load_file(FIXTURES / "version1_expected.safetensors")
    model = load(FIXTURES / "version1.pt", network)
    assert torch.equal(model[4].weight.to_dense(), expected["weight4"])
    assert torch.equal(model[7].weight.to_dense(), expected["weight7"])
    assert model[7].weight.factor_dtype == "int8"
    assert torch.allclose(model(expected["input"]), expected["output"], atol=1e-6)


def refused(path):
    with pytest.raises(ConfigError) as caught:
        load(path, network)
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith("load: ")
    assert str(path) in message
    return message


@pytest.mark.parametrize("share", [0.1, 0.5, 0.99])
def test_truncated(tmp_path, share):
    data = (FIXTURES / "version1.pt").read_bytes()
    (tmp_path / "cut.pt").write_bytes(data[: int(share * len(data))])
    assert "damaged" in refused(tmp_path / "cut.pt")


@pytest.mark.parametrize(
    "foreign",
    [
        {"weight": torch.ones(3)},
        [1, 2],
        {"format": "gblr-plugin", "version": 1},
        {"format": "gblr-plugin", "version": 1, "state": [], "linear": [], "notes": {}},
        {"format": "gblr-plugin", "version": 1, "state": {}, "linear": [], "notes": {"0": {"forward": "x"}}},
    ],
)
def test_foreign_file(tmp_path, foreign):
    torch.save(foreign, tmp_path / "other.pt")
    assert "gblr_plugin model file" in refused(tmp_path / "other.pt")


def test_later_format(tmp_path):
    torch.save({"format": "gblr-plugin", "version": 3}, tmp_path / "later.pt")
    assert "format version 3, allowed are 1 and 2" in refused(tmp_path / "later.pt")


@pytest.mark.parametrize("change", [lambda lists: lists + 1000, lambda lists: lists - 1, lambda lists: lists[:20]])
def test_indices_that_do_not_fit_together(tmp_path, content, change):
    weight = content["state"]["4.weight"]
    content["state"]["4.weight"] = GBLRTensor(
        weight.factors, change(weight.lists), weight.packing, weight.plan, weight.outer_shape
    )
    torch.save(content, tmp_path / "altered.pt")
    assert "is damaged" in refused(tmp_path / "altered.pt")


@pytest.mark.parametrize("rows", [3 << 20, 3 << 40])
@pytest.mark.parametrize("outer", [True, False])
@pytest.mark.parametrize("kernel", ["blocks", "dense"])
def test_shapes_that_lie_are_refused_before_anything_is_allocated(tmp_path, content, monkeypatch, rows, outer, kernel):
    weight = content["state"]["4.weight"]
    weight.packing = copy.copy(weight.packing)
    vars(weight.packing)["shape"] = (rows, 64)
    weight.plan = dataclasses.replace(weight.plan, kernels=((1024, kernel),))
    if outer:
        weight.outer_shape = (rows, 64)
    torch.save({**content, "state": {"4.weight": weight}}, tmp_path / "lies.pt")

    def allocated(*args):
        raise AssertionError("unpacked")

    monkeypatch.setattr("gblr_plugin.tensor.to_dense", allocated)
    monkeypatch.setattr("gblr_plugin.serialization.weights.unpack", allocated)
    assert "is damaged" in refused(tmp_path / "lies.pt")
