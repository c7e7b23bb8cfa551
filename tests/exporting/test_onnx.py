"""Exported files run in onnxruntime, in standard operators, and give what torch gives."""

import os

import pytest
import torch
from torch import nn

import gblr_plugin as gblr
from gblr_plugin import ConfigError
from gblr_plugin.kernels.plan import dense_plan

onnx = pytest.importorskip("onnx")
runtime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")
export_onnx = pytest.importorskip("gblr_plugin.exporting.onnx").export_onnx


@pytest.fixture(scope="module", params=["plans as users get them", "structured"])
def model(request):
    """Convolution, packed rows, int8 factors, a layer stored dense, and another family."""
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(64, 48),
        nn.GELU(),
        nn.Linear(48, 30, bias=False),
        nn.Linear(30, 24),
        nn.Linear(24, 20),
    ).eval()
    half = gblr.LayerSettings("pursuit", budget=0.5)
    gblr.prepare(network, ["0", "5"], settings=half)
    gblr.prepare(network, ["3"], settings=gblr.LayerSettings("trapezoid", budget=0.5, row_splits=3))
    gblr.prepare(network, ["6"], settings=gblr.LayerSettings("svd", budget=0.5))
    gblr.prepare(network, ["7"], family="monarch", budget=0.5)
    gblr.convert(network)
    if request.param == "structured":  # none with the matrix beside its factors
        for number in (0, 3):
            network[number].weight = nn.Parameter(network[number].weight.replan("factors"), requires_grad=False)
    network[5].weight = nn.Parameter(network[5].weight.quantize(), requires_grad=False)
    network[6].weight = nn.Parameter(network[6].weight.replan(dense_plan()), requires_grad=False)
    return network


@pytest.fixture(scope="module")
def path(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("onnx") / "model.onnx"
    batch = torch.export.Dim("batch", min=2, max=64)
    export_onnx(model, (torch.randn(2, 3, 2, 2),), path, dynamic_shapes=({0: batch},))
    return path


def test_standard_operators_alone(path):
    written = onnx.load(path)
    onnx.checker.check_model(written, full_check=True)
    assert {node.domain for node in written.graph.node} == {""}
    assert [(opset.domain, opset.version) for opset in written.opset_import] == [("", 20)]
    assert len(written.functions) == 0
    assert os.listdir(path.parent) == ["model.onnx"]


@pytest.mark.parametrize("batch", [2, 7])
def test_onnxruntime_gives_what_torch_gives(path, model, batch):
    session = runtime.InferenceSession(path, providers=["CPUExecutionProvider"])
    x = torch.randn(batch, 3, 2, 2)
    (y,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    assert torch.allclose(torch.from_numpy(y), model(x), atol=1e-5)


def test_the_file_holds_factors_not_matrices(tmp_path):
    torch.manual_seed(0)
    dense = nn.Linear(256, 256).eval()
    matrix = gblr.decompose(dense.weight.detach(), 0.25, method="trapezoid")
    layer = nn.Linear(256, 256).eval()
    layer.weight = nn.Parameter(gblr.GBLRTensor.from_structured(matrix), requires_grad=False)
    export_onnx(layer, (torch.randn(1, 256),), tmp_path / "layer.onnx")
    assert (tmp_path / "layer.onnx").stat().st_size < 0.45 * dense.weight.nbytes
    assert isinstance(layer.weight, gblr.GBLRTensor)  # the model stays as it is


def test_what_onnx_cannot_express(tmp_path):
    class Odd(nn.Module):
        def forward(self, x):
            return torch.linalg.svdvals(x)

    with pytest.raises(ConfigError, match=r"^export_onnx: the model cannot be expressed"):
        export_onnx(Odd(), (torch.ones(3, 3),), tmp_path / "odd.onnx")
    assert os.listdir(tmp_path) == []
