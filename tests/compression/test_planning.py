import pytest

from gblr_plugin import ConfigError, report
from gblr_plugin.compression.examples import example_inputs
from gblr_plugin.compression.planning import plan_folder
from gblr_plugin.huggingface.pretrained import load_dense


@pytest.mark.parametrize("kind", ["encoder", "masked", "classes", "decoder", "images"])
def test_every_kind_is_counted_as_with_its_weights(dense_folder, kind):
    folder = dense_folder(kind)
    found = plan_folder(str(folder), 0.5)
    network = load_dense(folder, "test")
    counted = report(network, example_inputs(network))
    assert found.dense_multiply_adds == counted.dense_multiply_adds
    assert found.relative_flops == pytest.approx(0.5, abs=0.01)
    assert all(bool(layer.left_dense) == (layer.structure == "dense") for layer in found.layers)


def test_layers_that_were_not_asked_for(dense_folder):
    found = plan_folder(str(dense_folder("encoder")), 0.3, ["*.intermediate.dense"], ["*.1.*"])
    assert [layer.name for layer in found.structured] == ["encoder.layer.0.intermediate.dense"]
    with pytest.raises(ConfigError, match="pattern 'nothing' matches no module"):
        plan_folder(str(dense_folder("encoder")), 0.3, ["nothing"])
