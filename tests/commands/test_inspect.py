import json

import pytest
import torch
from torch import nn

import gblr_plugin as gblr


def test_a_folder_of_transformers(call, decoder, tmp_path):
    _, half = decoder
    code, out, err = call("inspect", half, "--figure", "blocks.png")
    assert (code, err) == (0, "")
    assert "transformer.h.0.attn.c_attn" in out
    assert "3 other tensors" not in out
    pytest.importorskip("matplotlib")
    assert (tmp_path / "blocks.png").read_bytes().startswith(b"\x89PNG")
    weights = json.loads(call("inspect", half, "--json")[1])["weights"]
    assert all(0 < weight["relative_flops"] <= 0.5 for weight in weights)


def test_what_is_no_file_of_ours(call, decoder, tmp_path):
    dense, _ = decoder
    for place, message in (
        (dense, "is not a gblr_plugin model file"),
        ("nothing", "no file at 'nothing'"),
        (tmp_path, "no model.safetensors"),
    ):
        code, out, err = call("inspect", place)
        assert (code, out) == (2, "")
        assert err.startswith("gblr: inspect: ")
        assert message in err


def test_a_figure_that_cannot_be_written(call, tmp_path):
    pytest.importorskip("matplotlib")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 32))
    gblr.prepare(model, settings=gblr.LayerSettings("trapezoid", budget=0.5))
    gblr.save(gblr.convert(model), tmp_path / "model.safetensors")
    (tmp_path / "file").touch()
    code, _, err = call("inspect", "model.safetensors", "--figure", "file/blocks.png")
    assert code == 2
    assert err.startswith("gblr: inspect: --figure: cannot write 'file/blocks.png'")
