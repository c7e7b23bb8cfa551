import copy
import pickle

import pytest
import torch
from torch import nn

import gblr_plugin as gblr
from gblr_plugin.errors import ConfigError
from gblr_plugin.layers.full import FULL, as_full


@pytest.mark.parametrize("dense", [nn.Linear(6, 5), nn.Conv1d(3, 5, 2), nn.Conv2d(3, 5, 2)])
def test_a_layer_that_is_no_cheaper_than_dense_has_a_type_of_its_own(dense: nn.Module) -> None:
    model = nn.Sequential(copy.deepcopy(dense))
    shape = (2, 6) if isinstance(dense, nn.Linear) else (2, *(3, 4, 4)[: dense.weight.dim() - 1])
    x = torch.randn(shape)
    gblr.convert(gblr.prepare(model, ["0"]) and model)  # at full widths
    for found in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert isinstance(found[0], FULL)
        assert isinstance(found[0], type(dense))
        torch.testing.assert_close(found(x), dense(x), rtol=1e-4, atol=1e-5)
        layer = gblr.report(found, x).layers[0]
        assert (layer.structure, layer.note) == ("full", "not cheaper than dense, stored dense")
        with pytest.raises(ConfigError, match="layer '0': it is converted already, and stored dense"):
            gblr.prepare(found, ["0"])


def test_other_modules_keep_their_type() -> None:
    norm = nn.LayerNorm(4)
    assert as_full(norm) is norm
    assert type(norm) is nn.LayerNorm
