import pytest
import torch
from torch import nn

import gblr_plugin as gblr
from gblr_plugin import ConfigError
from gblr_plugin.exporting.files import FORMATS, Tensors, export_file


@pytest.fixture
def model():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 32), nn.Tanh(), nn.Linear(32, 4)).eval()
    gblr.prepare(model, ["0"], settings=gblr.LayerSettings("trapezoid", budget=0.5))
    return gblr.convert(model)


@pytest.mark.parametrize("kind", FORMATS)
def test_every_format_gives_what_the_model_gives(model, tmp_path, kind):
    if kind == "onnx":
        pytest.importorskip("onnxruntime")
    path = tmp_path / "deeper" / ("model.onnx" if kind == "onnx" else "model.pt2")
    apart = export_file(model, (torch.randn(3, 24),), path, kind)
    assert 0 <= apart < 1e-5
    assert [found.name for found in path.parent.iterdir()] == [path.name]


def test_a_batch_of_any_size(model, tmp_path):
    export_file(model, (torch.randn(2, 24),), tmp_path / "model.pt2", "program", dynamic=True)
    program = torch.export.load(tmp_path / "model.pt2").module()
    x = torch.randn(7, 24)
    torch.testing.assert_close(program(x), model(x), rtol=1e-4, atol=1e-5)


def test_outputs_of_transformers_become_tensors():
    class Said(dict):
        __getattr__ = dict.get

    class Network(nn.Module):
        def forward(self, input_ids, attention_mask):
            return Said({self.gives: input_ids * attention_mask})

    for gives in ("logits", "last_hidden_state"):
        network = Network()
        network.gives = gives
        assert Tensors(network, ["attention_mask", "input_ids"])(torch.tensor(2), torch.tensor(3)) == 6


def test_what_cannot_be_exported(tmp_path):
    class Branching(nn.Module):
        def forward(self, x):
            return x if x.sum() > 0 else -x

    with pytest.raises(ConfigError, match="export: the model cannot be exported: "):
        export_file(Branching(), (torch.randn(3),), tmp_path / "model.pt2", "program")
    assert not list(tmp_path.iterdir())
