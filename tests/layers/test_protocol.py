from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import gblr_plugin as gblr
from gblr_plugin.errors import ConfigError
from gblr_plugin.layers import StructuredLayer
from gblr_plugin.surgery.layer_settings import LayerSettings


@pytest.mark.parametrize("family", [None, "low_rank", "monarch", "block_diagonal"])
@pytest.mark.parametrize("dense", [nn.Linear(24, 16), nn.Conv2d(4, 16, 3)])
def test_every_structured_layer_answers(family: str | None, dense: Any) -> None:
    model = nn.Sequential(dense)
    weight = dense.weight.detach().flatten(1)
    if family is None:
        gblr.prepare(model, settings=LayerSettings("trapezoid", budget=0.5))
    else:
        gblr.prepare(model, family=family, budget=0.5)
    layer = model[0]
    assert isinstance(layer, StructuredLayer)
    assert layer.structure_name == (family or "gblr")
    assert layer.matrix_shape == tuple(weight.shape)
    assert layer.relative_flops == layer.multiply_adds / weight.numel() <= 0.5
    structure = layer.frozen_structure()
    assert (structure is None) == (family in ("monarch", "block_diagonal"))
    if structure is not None:
        torch.testing.assert_close(structure.to_dense(), layer.weight.detach().flatten(1), rtol=1e-4, atol=1e-5)
        assert structure.stored == layer.stored
    layer.freeze_factors()
    trained = {name for name, parameter in layer.named_parameters() if parameter.requires_grad}
    assert trained == {"bias"} | ({"widths", "locations"} if family is None else set())


def test_smooth_masks_are_not_frozen() -> None:
    model = nn.Sequential(nn.Linear(24, 16))
    layer = gblr.prepare(model)["0"]
    layer.set_sigma(3.0)
    with pytest.raises(ConfigError, match="its masks are still smooth"):
        layer.frozen_structure()
