from __future__ import annotations

import gc
import logging
import weakref
from typing import Any

import pytest
import torch
from nni.compression.pruning import AGPPruner, LinearPruner
from nni.compression.pruning.scheduled_pruner import ScheduledPruner
from torch import Tensor, nn

from gblr_plugin import ConfigError, GBLRConv2d, GBLRLinear, convert
from gblr_plugin.nni import GBLRPruner


def modules_of(model: nn.Module) -> dict[str, int]:
    return {name: id(module) for name, module in model.named_modules(remove_duplicate=False)}


# -- budgets under every clock -----------------------------------------------------------------------------------------


@pytest.mark.usefixtures("plans")
def test_own_schedule_meets_the_budget_of_each_layer(kit: Any) -> None:
    model = kit.MLP()
    config = [{"op_names": ["fc1"], "sparse_ratio": 0.6}, {"op_names": ["fc2"], "sparse_ratio": 0.7}]
    pruner = GBLRPruner(model, config, kit.evaluator(model), 3, 20)
    assert isinstance(pruner, ScheduledPruner)
    compressed, masks = pruner.compress(30, None)
    assert compressed is model
    assert 0.39 <= model.fc1.relative_flops <= 0.4
    assert 0.29 <= model.fc2.relative_flops <= 0.3
    assert type(model.fc3) is nn.Linear
    assert model.fc1.sigma is None
    assert set(masks) == {"fc1", "fc2"}
    assert masks["fc1"]["weight"].shape == (24, 16)
    pruner.unwrap_model()
    x = kit.make_batches(1)[0][0]
    expected = model(x)
    torch.testing.assert_close(convert(model)(x), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.usefixtures("plans")
def test_compaction_changes_no_result(kit: Any) -> None:
    outputs, sizes = [], []
    for own in ({}, {"gblr_compact": True}, {"gblr": {"compact": True}}):
        torch.manual_seed(0)
        model = kit.MLP()
        entry = {"op_names": ["fc1"], "sparse_ratio": 0.9, "gblr_initialiser": "svd", **own}
        if "gblr" in own:
            entry["gblr"] = {"initialiser": entry.pop("gblr_initialiser"), **own["gblr"]}
        pruner = GBLRPruner(model, [entry], kit.evaluator(model), 3, 20)
        pruner.compress(30, None)
        pruner.unwrap_model()
        sizes.append(model.fc1.U.shape[0])
        outputs.append(convert(model)(kit.make_batches(1)[0][0]))
    assert sizes[0] > sizes[1] == sizes[2]
    torch.testing.assert_close(outputs[1], outputs[0])
    torch.testing.assert_close(outputs[2], outputs[0])


def test_own_schedule_keeps_its_times(kit: Any, config: list[dict[str, Any]]) -> None:
    model = kit.MLP()
    seen: list[tuple[float | None, float, float, float]] = []

    def loop(net: nn.Module, optimizer: Any, step: Any, scheduler: Any, max_steps: int, max_epochs: Any) -> None:
        for _ in range(max_steps):
            kit.train(net, optimizer, step, None, 1)
            goal = pruner._target_spaces["fc1"]["weight"].sparse_ratio
            seen.append((net.fc1.sigma, net.fc1.relative_flops, pruner.learner.lambdas()["fc1"], goal))

    config[0]["gblr_initialiser"] = "svd"
    pruner = GBLRPruner(model, config, kit.evaluator(model, loop=loop), 4, 14)
    start = model.fc1.relative_flops
    pruner.compress(16, None)
    sigmas, costs, lambdas, goals = zip(*seen, strict=True)
    assert sigmas[:4] == (1.0,) * 4
    assert sigmas[4:14] == pytest.approx((*(1 + 9.9 * i for i in range(1, 10)), None))
    assert lambdas[:4] == (0.0,) * 4
    assert all(value > 0 for value in lambdas[4:13])
    for step in range(5, 15):
        share = 1 - (1 - (step - 4) / 10) ** 3
        assert costs[step - 1] <= start + (0.4 - start) * share + 1e-9
        assert goals[step - 1] == pytest.approx(0.6 * share)
    assert costs[13] == costs[-1] > 0.39


@pytest.mark.parametrize("driver", [AGPPruner, LinearPruner])
def test_other_schedules_drive_lambda_and_sigma(kit: Any, config: list[dict[str, Any]], driver: type) -> None:
    model = kit.MLP()
    seen: list[tuple[float | None, float]] = []

    def loop(net: nn.Module, optimizer: Any, step: Any, scheduler: Any, max_steps: int, max_epochs: Any) -> None:
        for _ in range(max_steps):
            kit.train(net, optimizer, step, None, 1)
            seen.append((net.fc1.sigma, pruner.learner.progress))

    config[0]["gblr"] = {"initialiser": "svd", "sigma_start": 2, "sigma_end": 50}
    pruner = GBLRPruner(model, config, kit.evaluator(model, loop=loop))
    outer = driver(pruner, 2, 5)
    _, masks = outer.compress(11, None)
    progress = [value for _, value in seen]
    share = [min(1.0, ((step + 1) // 2) / 5) for step in range(11)]
    ramp = [1 - (1 - s) ** 3 if driver is AGPPruner else s for s in share]
    assert progress == pytest.approx(ramp)
    assert [sigma for sigma, _ in seen[:9]] == pytest.approx([2 + 48 * r for r in ramp[:9]])
    assert seen[9][0] is None  # the goal is reached and the structure frozen
    assert pruner.learner.frozen
    assert 0.39 <= pruner.learner.relative_flops <= 0.4
    assert torch.equal(masks["fc1"]["weight"], pruner.get_masks()["fc1"]["weight"])
    outer.unwrap_model()
    assert not hasattr(model.fc1, "_nni_wrapper")


def test_training_that_ends_with_the_driver_is_final(kit: Any, config: list[dict[str, Any]]) -> None:
    model = kit.MLP()
    pruner = GBLRPruner(model, config, kit.evaluator(model))
    AGPPruner(pruner, 1, 8).compress(8, None)
    assert pruner.learner.frozen
    assert pruner.learner.relative_flops <= 0.4


def test_a_fixed_lambda_shrinks_widths_by_lambda_times_rate(kit: Any) -> None:
    model = kit.MLP()
    config = [{"op_names": ["fc2"], "sparse_threshold": 3.0, "gblr": {"structure_lr": 0.01}}]
    widths: list[Tensor] = []

    def loop(net: nn.Module, optimizer: Any, step: Any, scheduler: Any, max_steps: int, max_epochs: Any) -> None:
        for _ in range(max_steps):
            optimizer.zero_grad()
            net.fc3.weight.sum().backward()  # nothing pulls at the widths but lambda
            optimizer.step()
            widths.append(net.fc2.widths.detach().clone())

    pruner = GBLRPruner(model, config, kit.evaluator(model, torch.optim.SGD, lr=1e-3, loop=loop), 2, 12)
    pruner.compress(12, None)
    for step, now in enumerate(widths[:11], start=1):
        torch.testing.assert_close(now, torch.full_like(now, 1.0 - 0.03 * max(0, step - 2)))
    assert torch.equal(widths[11], torch.full_like(widths[11], round(24 * 0.7) / 24))


def test_a_group_shares_one_budget_within_bounds(kit: Any) -> None:
    model = kit.MLP()
    common = {"sparse_ratio": 0.6, "global_group_id": "all"}
    config = [
        {"op_names": ["fc1"], **common, "max_sparse_ratio": 0.55},
        {"op_names": ["fc2"], **common, "min_sparse_ratio": 0.5},
    ]
    pruner = GBLRPruner(model, config, kit.evaluator(model), 3, 25)
    pruner.compress(30, None)
    assert 0.39 <= pruner.learner.relative_flops <= 0.4
    assert model.fc1.relative_flops >= 0.45 - 0.01
    assert model.fc2.relative_flops <= 0.5
    assert model.fc1.relative_flops != pytest.approx(model.fc2.relative_flops, abs=0.01)


def test_granularity_and_row_splits_reach_the_layer(kit: Any) -> None:
    model = kit.MLP()
    config = [{"op_names": ["fc2"], "sparse_ratio": 0.5, "granularity": [4, 8], "gblr": {"row_splits": 2}}]
    pruner = GBLRPruner(model, config, kit.evaluator(model), 2, 15)
    pruner.compress(16, None)
    rows, cols = model.fc2.intervals()
    assert model.fc2.row_splits == 2
    assert int((rows.width % 4).sum() + (rows.start % 4).sum() + (cols.width % 8).sum() + (cols.start % 8).sum()) == 0
    assert model.fc2.relative_flops <= 0.5


def test_convolutions(kit: Any) -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.Flatten(), nn.Linear(64, 4)
    )

    def step(batch: tuple[Tensor, Tensor], net: nn.Module) -> Tensor:
        x, y = batch
        return nn.functional.cross_entropy(net(x.repeat(1, 3).view(-1, 3, 4, 4)), y)

    evaluator = kit.evaluator(model)
    evaluator._ori_training_step = evaluator._training_step = step
    pruner = GBLRPruner(model, [{"op_types": ["Conv2d"], "sparse_ratio": 0.5}], evaluator, 2, 12)
    _, masks = pruner.compress(14, None)
    assert isinstance(model[0], GBLRConv2d)
    assert masks["2"]["weight"].shape == (16, 16, 3, 3)
    assert all(0.49 <= layer.relative_flops <= 0.5 for layer in pruner.learner.layers.values())


def test_a_real_network_on_real_data() -> None:
    import nni
    from nni.compression.utils import TorchEvaluator
    from sklearn.datasets import load_digits

    digits = load_digits()
    x = torch.tensor(digits.data, dtype=torch.float32) / 16
    y = torch.tensor(digits.target)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))

    def loop(net: nn.Module, optimizer: Any, step: Any, scheduler: Any, max_steps: int, max_epochs: Any) -> None:
        for index in range(max_steps):
            rows = torch.arange(index * 64, (index + 1) * 64) % 1400
            optimizer.zero_grad()
            step((x[rows], y[rows]), net).backward()
            optimizer.step()

    def step(batch: tuple[Tensor, Tensor], net: nn.Module) -> Tensor:
        return nn.functional.cross_entropy(net(batch[0]), batch[1])

    made = nni.trace(torch.optim.AdamW)(model.parameters(), lr=5e-3)
    loop(model, torch.optim.AdamW(model.parameters(), lr=5e-3), step, None, 150, None)
    pruner = GBLRPruner(
        model,
        [{"op_names": ["0"], "sparse_ratio": 0.7}],
        TorchEvaluator(loop, made, step),
        warmup_step=10,
        cooldown_begin_step=120,
    )
    pruner.compress(200, None)
    assert 0.29 <= model[0].relative_flops <= 0.3
    with torch.no_grad():
        accuracy = float((model(x[1400:]).argmax(1) == y[1400:]).float().mean())
    assert accuracy > 0.8


# -- steps and states --------------------------------------------------------------------------------------------------


def test_one_prox_a_real_step_with_accumulation(kit: Any, config: list[dict[str, Any]]) -> None:
    model = kit.MLP()

    def loop(net: nn.Module, optimizer: Any, step: Any, scheduler: Any, max_steps: int, max_epochs: Any) -> None:
        batches = kit.make_batches()
        for index in range(max_steps * 3):
            step(batches[index % 4], net).backward()
            if index % 3 == 2:
                optimizer.step()
                optimizer.zero_grad()

    pruner = GBLRPruner(model, config, kit.evaluator(model, loop=loop), 2, 10)
    pruner.compress(12, None)
    assert pruner.learner.step_count == 12


def test_a_second_compress_goes_on(kit: Any, config: list[dict[str, Any]], caplog: pytest.LogCaptureFixture) -> None:
    model = kit.MLP()
    pruner = GBLRPruner(model, config, kit.evaluator(model), 2, 12)
    with caplog.at_level(logging.WARNING):
        pruner.compress(None, 2)  # eight steps
    assert "the structure is not final: training ended after 8 steps, before step 12" in caplog.text
    assert not pruner.learner.frozen
    pruner.compress(4, None)
    assert pruner.learner.frozen
    structure = model.fc1.widths.clone()
    factors = model.fc1.U.detach().clone()
    pruner.compress(3, None)
    assert torch.equal(model.fc1.widths, structure)
    assert not torch.equal(model.fc1.U, factors)


def test_an_interrupted_training_leaves_no_hook(kit: Any, config: list[dict[str, Any]]) -> None:
    model = kit.MLP()
    kept: list[Any] = []

    def loop(net: nn.Module, optimizer: Any, step: Any, *_: Any) -> None:
        kept.append(optimizer)
        if len(kept) == 1:
            raise KeyboardInterrupt
        kit.train(net, optimizer, step, None, 12)

    pruner = GBLRPruner(model, config, kit.evaluator(model, loop=loop), 2, 10)
    with pytest.raises(KeyboardInterrupt):
        pruner.compress(12, None)
    kept[0].step()
    assert pruner.learner.step_count == 0
    pruner.compress(12, None)
    assert pruner.learner.step_count == 12


def test_by_hand_without_an_evaluator(kit: Any, config: list[dict[str, Any]]) -> None:
    model = kit.MLP()
    pruner = GBLRPruner(model, config, warmup_step=2, cooldown_begin_step=10)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    pruner.learner.attach_all([optimizer])
    kit.train(model, optimizer, kit.training_step, None, 10)
    assert pruner.learner.frozen
    with pytest.raises(ConfigError, match="made without an evaluator"):
        pruner.compress(20, None)


def test_dense_weights_are_freed_when_the_callers_optimizer_is_dropped(kit: Any) -> None:
    import nni
    from nni.compression.utils import TorchEvaluator

    model = kit.MLP()
    dense = weakref.ref(model.fc2.weight)
    made = nni.trace(torch.optim.AdamW)(model.parameters(), lr=1e-2)
    pruner = GBLRPruner(
        model, [{"op_names": ["fc2"], "sparse_ratio": 0.5}], TorchEvaluator(kit.train, made, kit.training_step), 1, 5
    )
    gc.collect()
    assert dense() is not None
    del made
    gc.collect()
    assert dense() is None
    pruner.compress(6, None)


def test_nothing_of_it_outlives_the_pruner(kit: Any, config: list[dict[str, Any]]) -> None:
    from nni.compression.pruning import L1NormPruner
    from torch.optim import Optimizer

    step = Optimizer.__dict__.get("step")
    model = kit.MLP()
    evaluator = kit.evaluator(model)
    pruner = GBLRPruner(model, config, evaluator, 2, 10)
    pruner.compress(10, None)
    pruner.unwrap_model()
    gone = weakref.ref(pruner)
    del pruner
    gc.collect()
    assert gone() is None
    assert Optimizer.__dict__.get("step") is step
    cost = model.fc1.relative_flops
    evaluator.bind_model(model)  # the evaluator still trains the model that it has now
    assert "step" not in vars(evaluator._optimizers[0])
    evaluator.train(max_steps=3)
    evaluator.unbind_model()
    assert model.fc1.relative_flops == cost
    plain = kit.MLP()
    _, masks = L1NormPruner(plain, [{"op_names": ["fc1"], "sparse_ratio": 0.5}]).compress(None, None)
    assert float(masks["fc1"]["weight"].mean()) == 0.5


# -- which layers ------------------------------------------------------------------------------------------------------


def test_shared_modules_keep_their_identity(kit: Any) -> None:
    model = kit.MLP()
    model.again = model.fc2
    pruner = GBLRPruner(model, [{"op_names": ["again"], "sparse_ratio": 0.5}], kit.evaluator(model), 1, 5)
    assert model.again is model.fc2
    assert list(pruner.learner.layers) == ["fc2"]
    before = model.fc2.U.detach().clone()
    pruner.compress(6, None)
    assert not torch.equal(before, model.again.U)


def test_a_model_that_is_itself_the_layer_is_refused() -> None:
    with pytest.raises(ConfigError, match="put it into a container"):
        GBLRPruner(nn.Linear(8, 8), [{"op_types": ["Linear"], "sparse_ratio": 0.5}])


def test_tied_weights_are_refused(kit: Any) -> None:
    model = kit.MLP()
    model.twin = nn.Linear(24, 24)
    model.twin.weight = model.fc2.weight
    with pytest.raises(ConfigError, match="tied"):
        GBLRPruner(model, [{"op_names": ["fc2"], "sparse_ratio": 0.5}])


def test_layers_too_small_to_gain_stay_dense(kit: Any, caplog: pytest.LogCaptureFixture) -> None:
    model = nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 1), nn.Linear(1, 4))
    config = [{"op_types": ["Linear"], "sparse_ratio": 0.5}]
    with caplog.at_level(logging.WARNING):
        pruner = GBLRPruner(model, config, kit.evaluator(model), 1, 6)
    assert list(pruner.learner.layers) == ["0"]
    assert type(model[2]) is nn.Linear
    assert "'2' is too small to gain" in caplog.text
    pruner.compress(6, None)
    with pytest.raises(ConfigError, match="too small to gain"):
        GBLRPruner(model, [{"op_names": ["2", "3"], "sparse_ratio": 0.5}])


def bad_nan(model: Any) -> Any:
    with torch.no_grad():
        model.fc2.weight[0, 0] = torch.nan
    return [{"op_names": ["fc1", "fc2"], "sparse_ratio": 0.5}], {}


def bad_bounds(model: Any) -> Any:
    common = {"sparse_ratio": 0.6, "global_group_id": 0, "max_sparse_ratio": 0.5}
    return [{"op_names": ["fc1", "fc2"], **common}], {}


def bad_splits(model: Any) -> Any:
    return [
        {"op_names": ["fc1"], "sparse_ratio": 0.5},
        {"op_names": ["fc2"], "sparse_ratio": 0.5, "gblr_row_splits": 5},
    ], {}


def bad_times(model: Any) -> Any:
    return [{"op_names": ["fc1"], "sparse_ratio": 0.5}], {"warmup_step": 5, "cooldown_begin_step": 5}


def bad_sigmas(model: Any) -> Any:
    return [{"op_names": ["fc1"], "sparse_ratio": 0.5, "gblr": {"sigma_start": 200}}], {}


def bad_attention(model: Any) -> Any:
    model.attention = nn.MultiheadAttention(8, 2)
    return [{"op_names": ["attention.out_proj"], "sparse_ratio": 0.5}], {}


def bad_groups(model: Any) -> Any:
    model.conv = nn.Conv2d(8, 8, 3, groups=2)
    return [{"op_types": ["Conv2d"], "sparse_ratio": 0.5}], {}


def bad_frozen(model: Any) -> Any:
    model.fc1.weight.requires_grad_(False)
    return [{"op_names": ["fc1"], "sparse_ratio": 0.5}], {}


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (bad_nan, "'fc2'.*NaN"),
        (bad_bounds, "excludes the budget"),
        (bad_splits, "'fc2'.*5"),
        (bad_times, "warmup_step < cooldown_begin_step"),
        (bad_sigmas, "sigma_start <= sigma_end"),
        (bad_attention, "NonDynamicallyQuantizableLinear cannot be structured"),
        (bad_groups, "groups=2"),
        (bad_frozen, "'fc1': its weight does not require gradients"),
    ],
)
def test_a_refusal_is_one_line_and_leaves_the_model_as_it_was(kit: Any, make: Any, says: str) -> None:
    model = kit.MLP()
    config, options = make(model)
    before, keys = modules_of(model), list(model.state_dict())
    evaluator = kit.evaluator(model)
    with pytest.raises(ConfigError, match=says) as caught:
        GBLRPruner(model, config, evaluator, **options)
    assert "\n" not in str(caught.value)
    assert modules_of(model) == before
    assert list(model.state_dict()) == keys
    # The same evaluator serves a config that can be used.
    with torch.no_grad():
        model.fc2.weight.nan_to_num_()
    model.fc1.weight.requires_grad_(True)
    GBLRPruner(model, [{"op_names": ["fc1"], "sparse_ratio": 0.5}], evaluator, 1, 4).compress(5, None)


def test_a_second_round_on_structured_layers(kit: Any, config: list[dict[str, Any]]) -> None:
    model = kit.MLP()
    first = GBLRPruner(model, config, kit.evaluator(model), 2, 10)
    with pytest.raises(ConfigError, match="layer 'fc1' is wrapped by another compressor"):
        GBLRPruner(model, config)
    first.compress(10, None)
    first.unwrap_model()
    layer = model.fc1
    tighter = [{"op_names": ["fc1", "fc2"], "sparse_ratio": 0.8}]
    with pytest.raises(ConfigError, match="'fc1' is structured already: initialiser cannot be set"):
        GBLRPruner(model, [{**tighter[0], "gblr": {"initialiser": "svd"}}])
    assert layer.structure_frozen
    # An optimizer made after the first round holds widths among everything else.
    second = GBLRPruner(model, tighter, kit.evaluator(model, weight_decay=0.5), 2, 12)
    assert model.fc1 is layer
    assert not layer.structure_frozen
    second.compress(12, None)
    assert 0.19 <= second.learner.relative_flops <= 0.2
    # And one that holds only what trained while the structure was frozen.
    second.unwrap_model()
    import nni
    from nni.compression.utils import TorchEvaluator

    made = nni.trace(torch.optim.AdamW)([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    third = GBLRPruner(
        model, [{"op_names": ["fc2"], "sparse_ratio": 0.9}], TorchEvaluator(kit.train, made, kit.training_step), 1, 8
    )
    third.compress(9, None)
    assert 0.09 <= model.fc2.relative_flops <= 0.1
    assert isinstance(model.fc2, GBLRLinear)


# -- wrong use ---------------------------------------------------------------------------------------------------------


def test_an_evaluator_given_only_to_the_outer_pruner_is_refused(kit: Any, config: list[dict[str, Any]]) -> None:
    model = kit.MLP()
    evaluator = kit.evaluator(model)
    outer = AGPPruner(GBLRPruner(model, config), 1, 5, evaluator)
    with pytest.raises(ConfigError, match="give it to GBLRPruner itself"):
        outer.compress(6, None)


def test_clocks_that_contradict_each_other_are_refused(kit: Any, config: list[dict[str, Any]]) -> None:
    model = kit.MLP()
    outer = AGPPruner(GBLRPruner(model, config, kit.evaluator(model), 1, 5), 2, 5)
    with pytest.raises(ConfigError, match=r"ends at step 10 .* after cooldown_begin_step 5"):
        outer.compress(12, None)
    model = kit.MLP()
    nothing = GBLRPruner(model, [{"op_names": ["fc1"], "sparse_ratio": 0.0}], kit.evaluator(model))
    with pytest.raises(ConfigError, match="nothing to drive"):
        LinearPruner(nothing, 1, 5).compress(6, None)


def test_durations_that_cannot_work_are_refused(kit: Any, config: list[dict[str, Any]]) -> None:
    model = kit.MLP()
    pruner = GBLRPruner(model, config, kit.evaluator(model), 1, 5)
    with pytest.raises(ConfigError, match="max_steps 4 ends before the structure is final, 5 steps from now"):
        pruner.compress(4, None)
    with pytest.raises(ConfigError, match="give max_steps or max_epochs"):
        pruner.compress(None, None)
    model = kit.MLP()
    with pytest.raises(ConfigError, match="cooldown_begin_step is missing"):
        GBLRPruner(model, config, kit.evaluator(model)).compress(10, None)


@pytest.mark.parametrize("driver", [None, AGPPruner, LinearPruner])
def test_by_default_layers_are_dense_until_the_budget_is_met(
    kit: Any, config: list[dict[str, Any]], driver: Any
) -> None:
    model = kit.MLP()
    costs: list[float] = []

    def loop(net: nn.Module, optimizer: Any, step: Any, scheduler: Any, max_steps: int, max_epochs: Any) -> None:
        for _ in range(max_steps):
            kit.train(net, optimizer, step, None, 1)
            costs.append(net.fc1.relative_flops)

    times = (2, 10) if driver is None else ()
    pruner = GBLRPruner(model, config, kit.evaluator(model, loop=loop), *times)
    outer = pruner if driver is None else driver(pruner, 2, 5)
    outer.compress(14, None)
    assert costs[:9] == [1.0] * 9
    assert pruner.learner.frozen
    assert max(costs[-3:]) <= 0.4
    outer.unwrap_model()
    x = kit.make_batches(1)[0][0]
    expected = model(x)
    torch.testing.assert_close(convert(model)(x), expected, rtol=1e-4, atol=1e-5)
