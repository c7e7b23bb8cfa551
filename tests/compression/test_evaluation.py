import json

import pytest

from gblr_plugin import ConfigError
from gblr_plugin.compression.evaluation import evaluate_folder, load_model
from gblr_plugin.huggingface.compress_folder import CompressSettings, compress_folder


@pytest.fixture
def half(dense_folder, tmp_path):
    compress_folder(dense_folder("encoder"), tmp_path / "half", CompressSettings(0.5, method="trapezoid"))
    return str(tmp_path / "half")


def test_an_encoder_is_judged_beside_the_dense_one(dense_folder, data, half):
    dense, texts = str(dense_folder("encoder")), data("encoder")
    found = evaluate_folder(half, texts, dense, length=8)
    assert (found.metric, found.dense) == ("cosine", 1.0)
    assert 0 < found.value < 1
    same = evaluate_folder(dense, texts, dense, length=8)
    assert same.value == pytest.approx(1.0, abs=1e-6)
    assert same.others["nearest neighbours"] == {"before": 1.0, "after": 1.0}
    assert json.loads(found.to_json())["samples"] == 12
    assert str(found).splitlines()[0].split() == ["measure", "model", "dense"]
    with pytest.raises(ConfigError, match="is judged beside the dense model; give it with --against"):
        evaluate_folder(half, texts)


def test_models_of_both_kinds_load(dense_folder, half):
    from gblr_plugin import GBLRTensor

    for place, structured in ((str(dense_folder("encoder")), False), (half, True)):
        model, folder = load_model(place, "test")
        assert str(folder) == place
        assert any(isinstance(parameter.data, GBLRTensor) for parameter in model.parameters()) == structured
