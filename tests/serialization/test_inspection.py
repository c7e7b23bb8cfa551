"""What is said of a file agrees with the model that was saved."""

import json

import pytest
import torch
from torch import nn

import gblr_plugin as gblr
from gblr_plugin import ConfigError, GBLRTensor
from gblr_plugin.serialization.inspection import inspect_files, read_weights
from gblr_plugin.surgery.layer_settings import FamilySettings


@pytest.fixture
def saved(tmp_path):
    """A GBLR layer, a convolution, a layer of another family, and a plain one."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(32, 48),
        nn.Unflatten(1, (3, 4, 4)),
        nn.Conv2d(3, 16, 3),
        nn.Flatten(),
        nn.Linear(64, 32),
        nn.Linear(32, 8),
    )
    gblr.prepare(model, ["0", "2"], settings=gblr.LayerSettings("trapezoid", budget=0.5))
    gblr.prepare(model, ["4"], settings=FamilySettings("monarch", 0.5))
    gblr.convert(model)
    path = tmp_path / "model.safetensors"
    gblr.save(model, path)
    return model, path


def test_weights_and_bytes(saved):
    model, path = saved
    contents = inspect_files([path])
    found = {weight.name: weight for weight in contents.weights}
    assert {name: weight.structure for name, weight in found.items()} == {"0": "gblr", "2": "gblr", "4": "monarch"}
    for name in ("0", "2"):
        weight = model[int(name)].weight.data
        assert isinstance(weight, GBLRTensor)
        assert found[name].entries == weight.stored
        assert found[name].shape == tuple(weight.shape)
        assert found[name].components == weight.packing.num_components
        assert found[name].relative_flops == pytest.approx(weight.stored / weight.shape.numel())
        assert found[name].kernels.endswith(weight.plan.kernels[-1][1])
    assert found["4"].relative_flops is None
    assert found["4"].entries == sum(p.numel() for n, p in model[4].named_parameters() if n != "bias")
    stored = sum(weight.nbytes for weight in contents.weights)
    assert stored + contents.dense_bytes < contents.file_bytes == path.stat().st_size
    assert contents.dense_bytes == 4 * (48 + 16 + 32 + 8 * 32 + 8)
    assert json.loads(contents.to_json())["weights"][0]["relative_flops"] == found["0"].relative_flops
    assert "3 compressed weights in" in str(contents)


def test_the_weights_themselves(saved):
    model, path = saved
    found = read_weights([path])
    assert list(found) == ["0", "2"]
    for name, weight in found.items():
        assert torch.equal(weight.to_dense(), model[int(name)].weight.to_dense())


def test_a_file_without_structure(tmp_path):
    gblr.save(nn.Linear(4, 4), tmp_path / "dense.safetensors")
    contents = inspect_files([tmp_path / "dense.safetensors"])
    assert contents.weights == ()
    assert str(contents).startswith("no compressed weight\n")
    assert read_weights([tmp_path / "dense.safetensors"]) == {}


def test_what_cannot_be_read(tmp_path):
    (tmp_path / "damaged.safetensors").write_bytes(b"nothing")
    for name, message in (("damaged", "is damaged, or not a file of weights"), ("missing", "no file at")):
        with pytest.raises(ConfigError, match=message):
            inspect_files([tmp_path / f"{name}.safetensors"])
