import json

import pytest
import torch

from gblr_plugin import load


def test_a_program_of_a_compressed_decoder(call, decoder, tmp_path):
    _, half = decoder
    code, out, err = call("export", half, "--output", "model.pt2", "--length", "8", "--json")
    assert (code, err) == (0, "")
    said = json.loads(out)
    assert (said["format"], said["inputs"]) == ("program", [[1, 8], [1, 8]])
    assert said["difference"] < 1e-4
    assert said["bytes"] == (tmp_path / "model.pt2").stat().st_size
    ids = torch.randint(61, (1, 8))
    program = torch.export.load("model.pt2").module()
    expected = load(half)(ids).logits
    torch.testing.assert_close(program(ids, torch.ones_like(ids)), expected, rtol=1e-4, atol=1e-4)


def test_onnx_with_any_number_of_texts(call, decoder, tmp_path):
    pytest.importorskip("onnxscript")
    session_of = pytest.importorskip("onnxruntime").InferenceSession
    dense, _ = decoder
    code, out, err = call("export", dense, "--output", "model.onnx", "--dynamic", "--length", "8")
    assert (code, err) == (0, "")
    assert "of the model's" in out
    session = session_of("model.onnx", providers=["CPUExecutionProvider"])
    ids = torch.randint(61, (5, 8)).numpy()
    given = {argument.name: value for argument, value in zip(session.get_inputs(), (ids, ids * 0 + 1), strict=True)}
    assert session.run(None, given)[0].shape == (5, 8, 61)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere", "--output", "model.bin"], "--output: 'model.bin' must end in .onnx or .pt2"),
        (["nowhere", "--output", "model.pt2"], "export: no folder at 'nowhere'"),
        (["run", "--output", "model.pt2"], "export: 'run/report.json' is no report of gblr run"),
    ],
)
def test_misuse(call, tmp_path, arguments, message):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/report.json").write_text("{}")
    code, out, err = call("export", *arguments)
    assert (code, out) == (2, "")
    assert err.startswith(f"gblr: {message}")
    assert not (tmp_path / "model.pt2").exists()
