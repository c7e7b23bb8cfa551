from __future__ import annotations

import copy
from typing import Any

import pytest
import yaml
from nni.compression import pruning, quantization
from nni.compression.distillation import DynamicLayerwiseDistiller

from gblr_plugin import ConfigError
from gblr_plugin.nni import GBLRPruner, compressor_names, compressors, create_compressor, register_compressor

TEXT = """
compressor: gblr
options: {warmup_step: 2, cooldown_begin_step: 10}
config_list:
  - op_names: [fc1, fc2]
    sparse_ratio: 0.6
    granularity: [2, 2]
    gblr: {num_components: 12, initialiser: svd}
"""


def test_gblr_from_yaml(kit: Any) -> None:
    settings = yaml.safe_load(TEXT)
    model = kit.MLP()
    compressor = create_compressor(
        settings["compressor"], model, settings["config_list"], kit.evaluator(model), **settings["options"]
    )
    assert type(compressor) is GBLRPruner
    compressor.compress(12, None)
    assert compressor.learner.relative_flops <= 0.4
    assert model.fc1.U.shape[0] == 12


@pytest.mark.parametrize(
    ("name", "kind", "options"),
    [
        ("level", pruning.LevelPruner, {}),
        ("l1", pruning.L1NormPruner, {}),
        ("l2", pruning.L2NormPruner, {}),
        ("fpgm", pruning.FPGMPruner, {}),
        ("taylor", pruning.TaylorPruner, {"training_steps": 3}),
        ("movement", pruning.MovementPruner, {"warmup_step": 1, "cooldown_begin_step": 5}),
    ],
)
def test_nnis_pruners_from_the_same_config(kit: Any, name: str, kind: type, options: dict[str, Any]) -> None:
    config = yaml.safe_load(TEXT)["config_list"]
    config[0].pop("granularity")
    given = copy.deepcopy(config)
    model = kit.MLP()
    compressor = create_compressor(name, model, config, kit.evaluator(model), **options)
    assert type(compressor) is kind
    # NNI's other pruners choose their own duration.
    _, masks = compressor.compress(6 if name == "movement" else None, None)
    assert set(masks) == {"fc1", "fc2"}
    assert float(masks["fc2"]["weight"].mean()) == pytest.approx(0.4, abs=0.05)
    assert config == given


def test_slim_prunes_norms(kit: Any) -> None:
    from torch import nn

    model = nn.Sequential(nn.Linear(16, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 4))
    config = [{"op_types": ["BatchNorm1d"], "sparse_ratio": 0.5}]
    compressor = create_compressor("slim", model, config, kit.evaluator(model), training_steps=3)
    assert type(compressor) is pruning.SlimPruner
    _, masks = compressor.compress(None, None)
    assert float(masks["1"]["weight"].sum()) == 4


@pytest.mark.parametrize("inner", ["gblr", "l1"])
@pytest.mark.parametrize(("name", "kind"), [("agp", pruning.AGPPruner), ("linear", pruning.LinearPruner)])
def test_schedules_around_a_pruner(kit: Any, name: str, kind: type, inner: str) -> None:
    model = kit.MLP()
    config = [{"op_names": ["fc1", "fc2"], "sparse_ratio": 0.5}]
    compressor = create_compressor(
        name, model, config, kit.evaluator(model), pruner=inner, interval_steps=2, total_times=4
    )
    assert type(compressor) is kind
    _, masks = compressor.compress(9, None)
    if inner == "gblr":
        assert model.fc1.relative_flops <= 0.5
    else:
        assert float(masks["fc1"]["weight"].mean()) == pytest.approx(0.5, abs=0.05)


def test_quantizers_and_distillers(kit: Any) -> None:
    model = kit.MLP()
    config = [{"op_names": ["fc1"], "quant_dtype": "int8", "target_names": ["weight"]}]
    compressor = create_compressor("qat", model, config, kit.evaluator(model))
    assert type(compressor) is quantization.QATQuantizer
    student, teacher = kit.MLP(), kit.MLP()
    distiller = create_compressor(
        "dynamic_distiller",
        student,
        [{"op_names": ["fc1"], "lambda": 1.0, "apply_method": "mse"}],
        kit.evaluator(student),
        teacher_model=teacher,
        teacher_predict=lambda batch, net: net(batch[0]),
    )
    assert type(distiller) is DynamicLayerwiseDistiller
    distiller.compress(2, None)


@pytest.mark.parametrize(
    ("name", "config", "options", "says"),
    [
        ("gblrr", {}, {}, "unknown name 'gblrr'; did you mean 'gblr'.*allowed: gblr, level, l1"),
        (3, {}, {}, "unknown name 3"),
        ("gblr", {}, {"warm_up_step": 3}, "unknown argument 'warm_up_step'; did you mean 'warmup_step'"),
        ("movement", {}, {"warmup_step": 3}, "argument 'cooldown_begin_step' is missing"),
        ("movement", {}, {"warmup_step": 3, "cooldown": 5}, "unknown argument 'cooldown'"),
        ("agp", {}, {}, "argument 'interval_steps' is missing"),
        ("agp", {}, {"interval_steps": 1, "total_times": 3, "pruner": "linear"}, "cannot be driven"),
        ("agp", {}, {"interval_steps": 1, "total_times": 3, "pruner": "qat"}, "."),
        ("l1", {"op_names": ["fc9"]}, {}, "'fc9' matches no module"),
        ("l1", {"op_names": ["fc1"], "sparse_ratoi": 0.5}, {}, "'l1': config_list: .*sparse_ratoi"),
        ("l1", {"op_names": ["fc1"], "exclude_op_names": ["fc1"], "sparse_ratio": 0.5}, {}, "selection is empty"),
    ],
)
def test_what_does_not_fit_is_one_line(kit: Any, name: Any, config: Any, options: Any, says: str) -> None:
    model = kit.MLP()
    entry = config or {"op_names": ["fc1"], "sparse_ratio": 0.5}
    with pytest.raises(ConfigError, match=says) as caught:
        create_compressor(name, model, [entry], kit.evaluator(model), **options)
    assert "\n" not in str(caught.value)
    assert not hasattr(model.fc1, "_nni_wrapper")


def test_a_pruner_that_trains_needs_an_evaluator(kit: Any) -> None:
    with pytest.raises(ConfigError, match="'taylor': it needs an evaluator"):
        create_compressor("taylor", kit.MLP(), [{"op_names": ["fc1"], "sparse_ratio": 0.5}], training_steps=3)


def test_others_register_themselves(kit: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compressors, "_FACTORIES", dict(compressors._FACTORIES))

    def factory(model: Any, config_list: Any, evaluator: Any = None, *, rank: int = 1) -> Any:
        return model, config_list, evaluator, rank

    register_compressor("low_rank_test", factory)
    register_compressor("low_rank_test", factory)
    assert compressor_names()[0] == "gblr"
    assert "low_rank_test" in compressor_names()
    model = kit.MLP()
    assert create_compressor("low_rank_test", model, [], rank=3) == (model, [], None, 3)
    with pytest.raises(ConfigError, match="unknown argument 'rnk'; did you mean 'rank'"):
        create_compressor("low_rank_test", model, [], rnk=3)
    with pytest.raises(ConfigError, match="registered already"):
        register_compressor("low_rank_test", lambda model, config_list, evaluator: None)
