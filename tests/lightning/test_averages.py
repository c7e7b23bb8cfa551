"""Lightning's callbacks that put an average of the weights in their place."""

from __future__ import annotations

import pytest
import torch
from pytorch_lightning.callbacks import EMAWeightAveraging, StochasticWeightAveraging
from torch import nn

import gblr_plugin as gblr
from gblr_plugin.errors import ConfigError
from gblr_plugin.lightning import GBLRCallback

AVERAGES = {
    "none": lambda: [],
    "moving": lambda: [EMAWeightAveraging(decay=0.9)],
    "of the second half": lambda: [StochasticWeightAveraging(swa_lrs=0.01, swa_epoch_start=0.5)],
    "from the beginning": lambda: [StochasticWeightAveraging(swa_lrs=0.01, swa_epoch_start=1)],
}


def driver(**options):
    options = {"initialiser": "svd", **options}
    return GBLRCallback(budget=0.4, warmup=2, cooldown=12, picture_every_n_epochs=0, **options)


def fit(make_trainer, module, callbacks):
    make_trainer(callbacks, max_epochs=8, max_steps=-1).fit(module)
    return module


def loss(module):
    x, y = module.train_dataloader().dataset.tensors
    return nn.functional.cross_entropy(module(x), y).item()


@pytest.mark.usefixtures("plans")
@pytest.mark.parametrize("kind", AVERAGES)
def test_an_average_has_the_frozen_structure_and_predicts(make_trainer, make_module, kind):
    plain = fit(make_trainer, make_module(), [driver()])
    callback = driver()
    module = fit(make_trainer, make_module(), [callback, *AVERAGES[kind]()])
    whole = [layer.widths * layer.U.shape[1] for layer in callback.learner.layers.values()]
    assert all(torch.equal(part[0], part[0].round()) for part in whole)
    assert callback.learner.relative_flops <= 0.4
    assert loss(module) == pytest.approx(loss(plain), rel=0.2)
    assert torch.equal(module.net[4].bias, plain.net[4].bias) == (kind == "none")
    converted = gblr.convert(module)
    assert gblr.report(converted, torch.zeros(1, 16)).relative_flops <= 0.4


def test_a_model_that_is_copied_before_it_is_structured(make_trainer, make_module):
    with pytest.raises(ConfigError, match="put GBLRCallback before"):
        fit(make_trainer, make_module(), [*AVERAGES["moving"](), driver()])
    module = make_module()
    gblr.prepare(module)
    fit(make_trainer, module, [*AVERAGES["moving"](), callback := driver()])
    assert callback.learner.relative_flops <= 0.4


def test_an_average_of_parameters_that_are_sliced(make_trainer, make_module):
    with pytest.raises(ConfigError, match="choose another initialiser than 'dense'"):
        fit(make_trainer, make_module(), [driver(initialiser="dense"), *AVERAGES["from the beginning"]()])
    with pytest.raises(ConfigError, match="leave compact off"):
        fit(make_trainer, make_module(), [driver(compact=True), *AVERAGES["from the beginning"]()])
