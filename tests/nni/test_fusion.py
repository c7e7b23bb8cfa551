"""Other compressors of NNI beside, before and after gblr."""

from __future__ import annotations

import copy
import logging
from typing import Any

import pytest
import torch
from nni.compression.distillation import Adaptive1dLayerwiseDistiller, DynamicLayerwiseDistiller
from nni.compression.pruning import AGPPruner, L1NormPruner, TaylorPruner
from nni.compression.quantization import PtqQuantizer, QATQuantizer
from torch import Tensor, nn

from gblr_plugin import ConfigError, GBLRLinear
from gblr_plugin.nni import GBLRPruner, GBLRWrapper

ACTIVATIONS = [{"op_names": ["fc1", "fc3"], "target_names": ["_input_", "_output_"], "quant_dtype": "int8"}]
WEIGHTS = [{"op_names": ["fc1"], "target_names": ["weight"], "quant_dtype": "int8"}]
DISTIL = [{"op_names": ["fc1", "fc2"], "lambda": 0.5, "apply_method": "mse"}]
LEAVE_OUT = [{"op_names": ["fc3"], "sparse_ratio": 0.5}]


def predict(batch: tuple[Tensor, Tensor], teacher: nn.Module) -> Tensor:
    return teacher(batch[0])


def check_compressed(model: Any, cost: float = 0.4) -> None:
    for layer in (model.fc1, model.fc2):
        assert isinstance(layer, GBLRLinear)
        assert cost - 0.01 <= layer.relative_flops <= cost
        assert layer.sigma is None


@pytest.mark.parametrize("gblr_first", [True, False])
@pytest.mark.parametrize("kind", [DynamicLayerwiseDistiller, Adaptive1dLayerwiseDistiller])
def test_distillers(kit: Any, config: list[dict[str, Any]], gblr_first: bool, kind: type) -> None:
    model = kit.MLP()
    teacher = copy.deepcopy(model)
    evaluator = kit.evaluator(model)
    if gblr_first:
        pruner = GBLRPruner(model, config, evaluator, 2, 12)
        outer = distiller = kind.from_compressor(pruner, DISTIL, teacher_model=teacher, teacher_predict=predict)
        distiller.track_forward(kit.make_batches(1)[0][0])
    else:
        distiller = kind(model, DISTIL, evaluator, teacher, predict)
        distiller.track_forward(kit.make_batches(1)[0][0])
        outer = GBLRPruner.from_compressor(distiller, config, 2, 12)
    losses: list[float] = []
    plain = distiller.compute_distill_loss
    distiller.compute_distill_loss = lambda: losses.append(loss := plain()) or loss
    outer.compress(14, None)
    check_compressed(model)
    assert len(losses) == 14
    assert all(float(loss.detach()) > 0 for loss in losses[2:])
    assert losses[-1].requires_grad
    assert isinstance(model.fc1._nni_wrapper, GBLRWrapper)
    masks = (outer if not gblr_first else pruner).get_masks()
    assert masks["fc1"]["weight"].shape == (24, 16)
    outer.unwrap_model()
    assert not hasattr(model.fc1, "_nni_wrapper")


def test_a_distillers_own_parameters_train_beside_the_structure(kit: Any, config: list[dict[str, Any]]) -> None:
    model, teacher = kit.MLP(), kit.MLP(width=32)
    pruner = GBLRPruner(model, config, kit.evaluator(model), 2, 12)
    distiller = Adaptive1dLayerwiseDistiller.from_compressor(
        pruner, DISTIL, teacher_model=teacher, teacher_predict=predict
    )
    distiller.track_forward(kit.make_batches(1)[0][0])
    start: list[Tensor] = []
    plain = distiller.compute_distill_loss

    def spy() -> Tensor:
        if not start:
            start.append(distiller.trans_linears["fc1"]["_output_0"].weight.detach().clone())
        return plain()

    distiller.compute_distill_loss = spy
    distiller.compress(14, None)
    assert not torch.equal(distiller.trans_linears["fc1"]["_output_0"].weight, start[0])
    check_compressed(model)


@pytest.mark.parametrize("gblr_first", [True, False])
def test_activation_quantizers(kit: Any, config: list[dict[str, Any]], gblr_first: bool) -> None:
    model = kit.MLP()
    evaluator = kit.evaluator(model)
    if gblr_first:
        quantizer = outer = QATQuantizer.from_compressor(GBLRPruner(model, config, evaluator, 2, 12), ACTIVATIONS)
    else:
        quantizer = QATQuantizer(model, ACTIVATIONS, evaluator)
        outer = GBLRPruner.from_compressor(quantizer, config, 2, 12)
    outer.compress(14, None)
    check_compressed(model)
    scales = quantizer.get_calibration_config()
    assert float(scales["fc1"]["_input_0"]["scale"]) > 0
    x = kit.make_batches(1)[0][0]
    seen: list[Tensor] = []
    model.fc1.register_forward_hook(lambda module, inputs, output: seen.append(output))
    model.eval()
    model(x)
    assert seen[0].unique().numel() <= 256  # the structured layer's output is on the grid
    outer.unwrap_model()
    model(x)
    assert seen[1].unique().numel() > 256


def test_post_training_quantizer_corrects_the_bias(kit: Any, config: list[dict[str, Any]]) -> None:
    model = kit.MLP()
    pruner = GBLRPruner(model, config, kit.evaluator(model), 2, 8)
    pruner.compress(10, None)
    bias = model.fc1.bias.detach().clone()
    pruner.unwrap_model()
    quantizer = PtqQuantizer(
        model, ACTIVATIONS, kit.evaluator(model), existed_wrappers=pruner._module_wrappers, is_bias_correction=True
    )
    quantizer._fusion_compress(1, None)
    assert not torch.equal(model.fc1.bias, bias)
    assert bool(torch.isfinite(model.fc1.bias).all())


def test_a_quantizer_by_name_takes_activations_and_says_so(
    kit: Any, config: list[dict[str, Any]], caplog: pytest.LogCaptureFixture
) -> None:
    model = kit.MLP()
    pruner = GBLRPruner(model, config, kit.evaluator(model), 2, 12)
    with caplog.at_level(logging.WARNING):
        quantizer = QATQuantizer.from_compressor(pruner, [{"op_names": ["fc1"], "quant_dtype": "int8"}])
    assert "layer 'fc1' is structured: of its targets only activations are quantized" in caplog.text
    assert set(quantizer._target_spaces["fc1"]) == {"_input_0", "_output_0"}


class Normed(nn.Module):
    """A layer with a norm and an activation behind it, and one with an activation alone."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.norm, self.relu1 = nn.Linear(16, 24), nn.BatchNorm1d(24), nn.ReLU()
        self.fc2, self.relu2 = nn.Linear(24, 24), nn.ReLU()
        self.fc3 = nn.Linear(24, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc3(self.relu2(self.fc2(self.relu1(self.norm(self.fc1(x))))))


FUSED = [
    {
        "op_names": ["fc1", "fc2"],
        "target_names": ["_input_", "_output_"],
        "quant_dtype": "int8",
        "fuse_names": [("fc1", "norm", "relu1"), ("fc2", "relu2")],
    }
]


def test_a_quantizer_fuses_norms_and_activations_with_a_structured_layer(
    kit: Any, config: list[dict[str, Any]]
) -> None:
    model = Normed()
    config[0]["gblr_initialiser"] = "svd"
    pruner = GBLRPruner(model, config, kit.evaluator(model), 2, 12)
    keys = list(pruner.bound_model.state_dict())
    quantizer = QATQuantizer.from_compressor(pruner, FUSED)
    seen: list[Tensor] = []
    model.fc1.register_forward_hook(lambda module, inputs, output: seen.append(output))
    quantizer.compress(14, None)
    check_compressed(model)
    assert not torch.equal(model.norm.running_mean, torch.zeros(24))  # the norm ran, and trained
    model.eval()
    x = kit.make_batches(1)[0][0]
    model(x)
    assert float(seen[-1].min()) == 0.0  # the activation is in it
    assert 1 < seen[-1].unique().numel() <= 128
    quantizer.unwrap_model()
    assert list(model.state_dict()) == keys
    plain = model.relu1(model.norm(model.fc1(x)))
    torch.testing.assert_close(seen[-2], plain, rtol=0, atol=float(plain.max()) / 50)


def test_a_bias_cannot_be_corrected_through_fused_modules(kit: Any, config: list[dict[str, Any]]) -> None:
    model = Normed()
    pruner = GBLRPruner(model, config, kit.evaluator(model), 2, 8)
    pruner.compress(10, None)
    pruner.unwrap_model()
    quantizer = PtqQuantizer(
        model, FUSED, kit.evaluator(model), existed_wrappers=pruner._module_wrappers, is_bias_correction=True
    )
    with pytest.raises(ConfigError, match="layer 'fc1': is_bias_correction measures a structured layer without fuse_n"):
        quantizer._fusion_compress(1, None)


@pytest.mark.parametrize(
    "wrong",
    [
        WEIGHTS,
        [{"op_names": ["fc1"], "target_names": ["bias", "_output_"], "quant_dtype": "int8"}],
        [{"op_names": ["fc1"], "target_settings": {"weight": {"quant_dtype": "int8"}}, "quant_dtype": "int8"}],
    ],
)
def test_a_weight_quantizer_after_gblr_is_refused(kit: Any, config: list[dict[str, Any]], wrong: Any) -> None:
    model = kit.MLP()
    pruner = GBLRPruner(model, config, kit.evaluator(model), 2, 12)
    with pytest.raises(ConfigError, match=r"layer 'fc1': a (weight|bias) quantizer cannot work on a structured layer"):
        QATQuantizer.from_compressor(pruner, wrong)
    pruner.compress(14, None)  # still wrapped and able to go on
    check_compressed(model)


def test_a_weight_quantizer_before_gblr_is_refused(kit: Any, config: list[dict[str, Any]]) -> None:
    model = kit.MLP()
    quantizer = QATQuantizer(model, WEIGHTS, kit.evaluator(model))
    with pytest.raises(ConfigError, match="layer 'fc1': its weight belongs to a quantizer already"):
        GBLRPruner.from_compressor(quantizer, config, 2, 12)
    assert type(model.fc1) is nn.Linear
    quantizer.compress(3, None)  # wrapped again
    assert float(quantizer.get_calibration_config()["fc1"]["weight"]["scale"]) > 0


@pytest.mark.parametrize("gblr_first", [True, False])
@pytest.mark.parametrize("kind", [L1NormPruner, TaylorPruner])
def test_pruners_of_other_layers(kit: Any, config: list[dict[str, Any]], gblr_first: bool, kind: Any) -> None:
    model = kit.MLP()
    evaluator = kit.evaluator(model)
    more = {"training_steps": 4} if kind is TaylorPruner else {}
    config[0]["gblr_initialiser"] = "svd"  # the supports of intervals that shrink have zeros
    if gblr_first:
        pruner = GBLRPruner(model, config, evaluator, 2, 12)
        outer = other = kind.from_compressor(pruner, LEAVE_OUT, **more)
    else:
        other = kind(model, LEAVE_OUT, evaluator, **more)
        outer = pruner = GBLRPruner.from_compressor(other, config, 2, 12)
    if kind is L1NormPruner:
        other.interval_steps = 4  # in a fusion NNI's one-shot pruners wait for this step
    _, masks = outer.compress(14, None)
    check_compressed(model)
    assert set(masks) == {"fc1", "fc2", "fc3"}
    assert float(masks["fc3"]["weight"].mean()) == 0.5
    assert 0 < float(masks["fc1"]["weight"].mean()) < 1


def test_another_pruner_on_the_same_layer_is_refused(kit: Any, config: list[dict[str, Any]]) -> None:
    model = kit.MLP()
    pruner = GBLRPruner(model, config, kit.evaluator(model), 2, 12)
    with pytest.raises(ConfigError, match="layer 'fc2' is compressed by gblr already"):
        L1NormPruner.from_compressor(pruner, [{"op_names": ["fc2"], "sparse_ratio": 0.5}])
    other = kit.MLP()
    with pytest.raises(ConfigError, match="layer 'fc1': its weight belongs to a pruner already"):
        GBLRPruner.from_compressor(L1NormPruner(other, [{"op_names": ["fc1"], "sparse_ratio": 0.5}]), config)
    pruner.compress(14, None)
    check_compressed(model)


def test_two_gblr_pruners_of_different_layers(kit: Any) -> None:
    model = kit.MLP()
    first = GBLRPruner(model, [{"op_names": ["fc1"], "sparse_ratio": 0.6}], kit.evaluator(model), 2, 12)
    second = GBLRPruner.from_compressor(first, [{"op_names": ["fc2"], "sparse_ratio": 0.6}], 4, 10)
    second.compress(14, None)
    check_compressed(model)
    assert (first.learner.step_count, second.learner.step_count) == (14, 14)


def test_agp_drives_gblr_fused_with_a_distiller(kit: Any, config: list[dict[str, Any]]) -> None:
    model = kit.MLP()
    teacher = copy.deepcopy(model)
    distiller = DynamicLayerwiseDistiller(model, DISTIL, kit.evaluator(model), teacher, predict)
    pruner = GBLRPruner.from_compressor(distiller, config)
    outer = AGPPruner(pruner, 1, 10)
    _, masks = outer.compress(12, None)
    check_compressed(model)
    assert torch.equal(masks["fc2"]["weight"], pruner.get_masks()["fc2"]["weight"])
    assert not pruner._is_wrapped  # the model belongs to the outer pruner
    outer.unwrap_model()
    assert not hasattr(model.fc1, "_nni_wrapper")


def test_a_teacher_copied_before_is_dense_and_one_copied_after_is_structured(
    kit: Any, config: list[dict[str, Any]]
) -> None:
    model = kit.MLP()
    before = copy.deepcopy(model)
    GBLRPruner(model, config, kit.evaluator(model), 2, 12)
    assert type(before.fc1) is nn.Linear
    assert type(copy.deepcopy(model).fc1) is GBLRLinear
