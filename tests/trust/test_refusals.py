"""What cannot be used is refused in one line, wherever it comes in."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("nni")

import gblr_plugin as gblr
from gblr_plugin import families
from gblr_plugin.calibration.allocation import allocate
from gblr_plugin.calibration.batches import CalibrationSettings, attention_mask, loss_of
from gblr_plugin.data.images import image_folders
from gblr_plugin.errors import ConfigError, GBLRError
from gblr_plugin.families.base import Stacked
from gblr_plugin.families.layers import layer_like
from gblr_plugin.matrix.metric import Metric
from gblr_plugin.nni import create_compressor
from gblr_plugin.nni.settings import read_config
from gblr_plugin.run.search_space import SearchSpace
from gblr_plugin.run.settings import Method, RunSettings
from gblr_plugin.run.yaml_config import load_yaml
from gblr_plugin.serialization import read_state
from gblr_plugin.surgery.layer_settings import LayerSettings
from gblr_plugin.tasks.hf import check_download
from gblr_plugin.tasks.language import LanguageTask
from gblr_plugin.tensor.gblr_tensor import GBLRTensor

WEIGHT = torch.randn(8, 6, generator=torch.Generator().manual_seed(0))
LOW = families.get("low_rank")


def frozen(*shape: int) -> GBLRTensor:
    m, n = shape[0], int(torch.tensor(shape[1:]).prod())
    matrix = gblr.decompose(torch.randn(m, n), 0.5, method="svd")
    return GBLRTensor.from_structured(matrix, shape=shape)


def structured() -> nn.Module:
    model = nn.Sequential(nn.Linear(16, 16))
    gblr.prepare(model, settings=LayerSettings(align=4))
    return model


class WithState(nn.Linear):
    def get_extra_state(self) -> Any:
        return {"a": 1}


def saved(make: Callable[[], nn.Module], tmp_path: Any) -> None:
    try:
        gblr.save(make(), tmp_path / "model.safetensors")
    finally:
        assert not list(tmp_path.iterdir())


def space(tmp_path: Any, text: str) -> None:
    (tmp_path / "search.yaml").write_text(f"run: {{}}\nspace:\n  {text}\n")
    SearchSpace.read(load_yaml(str(tmp_path / "search.yaml")))


def on_meta() -> nn.Module:
    with torch.device("meta"):
        return nn.Linear(4, 4)


def folders(tmp_path: Any) -> None:
    for name in ("train", "val"):
        (tmp_path / name).mkdir()
    image_folders(str(tmp_path), 8, imagenet=False)


REFUSED: dict[str, tuple[Callable[[Any], object], str]] = {
    # weights, budgets and calibration of families
    "no tensor": (lambda _: LOW.from_dense([1.0], 0.5), "weight must be a non-empty 2-d floating-point tensor"),
    "a vector": (lambda _: LOW.from_dense(torch.ones(3), 0.5), "weight must be a non-empty 2-d"),
    "whole numbers": (lambda _: LOW.from_dense(torch.ones(3, 3, dtype=torch.int64), 0.5), "floating-point tensor"),
    "an empty one": (lambda _: LOW.from_dense(torch.ones(0, 3), 0.5), "non-empty"),
    "no values": (lambda _: LOW.from_dense(WEIGHT.to("meta"), 0.5), "on the meta device, it has no values"),
    "NaN": (lambda _: LOW.from_dense(WEIGHT * torch.nan, 0.5), "weight holds NaN or infinite values"),
    "a true budget": (lambda _: LOW.from_dense(WEIGHT, True), r"budget must be a number in \(0, 1\], got True"),
    "inputs of another width": (
        lambda _: LOW.from_dense(WEIGHT, 0.5, calibration=torch.ones(4, 5)),
        r"\(N, 6\) inputs",
    ),
    "inputs without rows": (lambda _: LOW.from_dense(WEIGHT, 0.5, calibration=torch.ones(0, 6)), r"\(N, 6\) inputs"),
    "infinite inputs": (
        lambda _: LOW.from_dense(WEIGHT, 0.5, calibration=torch.full((4, 6), torch.inf)),
        "calibration holds NaN or infinite values",
    ),
    "parts of a row": (lambda _: LOW.from_dense(WEIGHT, 0.5, row_splits=3), "row_splits must be a positive divisor"),
    "a stack of nothing": (lambda _: Stacked._project(WEIGHT, 9), "project by a family's from_dense"),
    "parts that gain nothing": (
        lambda _: families.get("alds").from_dense(torch.randn(4, 4), 0.5, parts=4),
        "costs more than dense already at rank 1",
    ),
    "taps that do not fit": (
        lambda _: families.get("tucker2").from_dense(torch.randn(8, 10), 0.5, kernel_size=(3, 3)),
        "do not fit 10 columns",
    ),
    "a matrix of another layer": (
        lambda _: layer_like(nn.Conv2d(6, 9, 1), LOW.from_dense(WEIGHT, 0.9)),
        r"the convolution's weight matrix is \(9, 6\), got \(8, 6\)",
    ),
    "rows that do not divide": (
        lambda _: allocate(
            nn.Sequential(nn.Linear(16, 16)), {"0": nn.Linear(16, 16)}, 0.5, "weight", row_splits={"0": 3}
        ),
        "row_splits 3 does not divide 16 rows",
    ),
    # frozen weights
    "factors of whole numbers": (lambda _: frozen(16, 12).to(torch.int64), "must stay floating point"),
    "a transposed kernel": (lambda _: frozen(16, 4, 3).t(), "only 2-D weights can be transposed"),
    "one axis twice": (lambda _: frozen(16, 12).transpose(1, 1), "transpose needs the two axes"),
    "a structured input": (
        lambda _: nn.functional.linear(frozen(16, 12), torch.ones(5, 12)),
        "only the weight of a product can be a GBLRTensor",
    ),
    "a kernel of other axes": (
        lambda _: nn.functional.conv2d(torch.ones(1, 4, 5, 5), frozen(16, 4, 3)),
        "does not fit a convolution weight",
    ),
    "a kernel of other channels": (
        lambda _: nn.functional.conv1d(torch.ones(1, 5, 5), frozen(16, 4, 3)),
        "does not fit a convolution weight",
    ),
    "a bias of two axes": (
        lambda _: torch.addmm(torch.ones(5, 16), torch.ones(5, 12), frozen(16, 12).t()),
        "addmm takes a 1-D bias",
    ),
    # settings
    "another start": (lambda _: Method("gblr", start="best"), "start must be one of trained, initial, got 'best'"),
    "a rule without a budget": (
        lambda _: RunSettings("digits_vit", config_list=[{}], allocation="weight"),
        "allocation goes with budget",
    ),
    "a rule without a start": (
        lambda _: gblr.prepare(nn.Sequential(nn.Linear(16, 16)), allocation="weight"),
        "it splits a starting budget",
    ),
    "calibration of a number": (lambda _: CalibrationSettings.read(3), "need a table of batches"),
    "a switch of text": (lambda _: CalibrationSettings(sequential="yes"), "sequential must be true or false"),
    "no loss": (lambda _: loss_of({"logits": torch.ones(1)}), "a training step must return|loss"),
    "a data set that is none": (
        lambda _: LanguageTask("books", None, 8),
        "dataset must be one of .* got 'books'",
    ),
    "half a process": (
        lambda _: LanguageTask("text", None, 8, workers=0.5),
        "workers must be a whole number",
    ),
    "a place of no text": (lambda _: check_download(5, False), "must be a folder or a name of the hub, got 5"),
    "a place without a name": (lambda _: check_download("", False), "must be a folder or a name of the hub, got ''"),
    "a download of text": (lambda _: check_download("a", "no"), "download must be true or false, got 'no'"),
    "no classes": (folders, "train/<class>/"),
    "a space twice": (lambda at: space(at, "a.b: {choice: [1]}\n  a: {b: {choice: [2]}}"), "stands twice"),
    "a space of numbers": (lambda at: space(at, "a: 3"), r"need .*_value: .* got 3"),
    # config lists
    "structured already": (
        lambda _: read_config(structured(), [{"op_names": ["0"], "sparse_ratio": 0.5, "granularity": [2, 2]}]),
        r"granularity \[2, 2\] cannot be set any more",
    ),
    "one entry that excludes": (
        lambda _: read_config(
            structured(), [{"op_names": ["0"], "sparse_ratio": 0.5}, {"op_names": ["0"], "exclude": True, "x": 1}]
        ),
        "unknown key|exclude: write exclude_op_names",
    ),
    "nothing chosen": (
        lambda _: read_config(structured(), [{"op_names": [], "sparse_ratio": 0.5}]),
        "give op_names, op_types or op_names_re",
    ),
    "a pruner without a schedule": (
        lambda _: create_compressor(
            "agp",
            nn.Sequential(nn.Linear(16, 16)),
            [{"op_names": ["0"], "sparse_ratio": 0.5}],
            None,
            interval_steps=1,
            total_times=2,
            pruner="low_rank",
        ),
        "has no schedule to drive|evaluator",
    ),
    # files
    "a state of no tensors": (lambda at: saved(lambda: WithState(4, 4), at), "files hold tensors alone"),
    "a network without values": (lambda at: saved(on_meta, at), "is on the meta device, it has no values"),
}


@pytest.mark.parametrize("case", list(REFUSED))
def test_it_is_refused_in_one_line(tmp_path: Any, case: str) -> None:
    attempt, says = REFUSED[case]
    with pytest.raises(GBLRError, match=says) as caught:
        attempt(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_state_of_torch_save_is_read(tmp_path: Any) -> None:
    torch.save({"weight": torch.ones(2)}, tmp_path / "state.pt")
    assert read_state(tmp_path / "state.pt", "weights")["weight"].tolist() == [1.0, 1.0]
    for content in ([torch.ones(2)], {"weight": 3}, {"state": {"weight": frozen(16, 12)}}):
        torch.save(content, tmp_path / "other.pt")
        with pytest.raises(ConfigError, match=r"holds no state dict|is damaged, or not a file of weights"):
            read_state(tmp_path / "other.pt", "weights")


def test_masks_and_losses_of_batches_in_any_form() -> None:
    mask, loss = torch.ones(2), torch.ones((), requires_grad=True)
    assert attention_mask({"attention_mask": mask}) is mask
    assert attention_mask((torch.zeros(2), {"attention_mask": mask})) is mask
    assert attention_mask({"input_ids": mask}) is None
    assert attention_mask(mask) is None
    assert loss_of({"loss": loss}) is loss
    assert loss_of((loss, mask)) is loss


def test_a_stack_takes_its_part_of_a_metric() -> None:
    inputs = torch.randn(20, 6).double()
    metric = Metric.from_moment(inputs.T @ inputs / 20)
    stacked = LOW.from_dense(WEIGHT, 0.9, row_splits=2, calibration=metric)
    halves = [LOW.from_dense(WEIGHT[i : i + 4], 0.9, calibration=metric.for_rows(i, i + 4)) for i in (0, 4)]
    torch.testing.assert_close(stacked.to_dense(), torch.cat([half.to_dense() for half in halves]))


def test_what_a_calibration_by_another_evaluator_says() -> None:
    from gblr_plugin.nni.calibration import calibration_data

    with pytest.raises(ConfigError, match="need a TorchEvaluator or LightningEvaluator, got a SimpleNamespace"):
        calibration_data(SimpleNamespace(), nn.Linear(2, 2), CalibrationSettings())
