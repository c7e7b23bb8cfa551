"""Costs measured on the machine: what becomes of times, and where they are kept."""

from __future__ import annotations

import json
import logging
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from gblr_plugin.bench.products import random_structure
from gblr_plugin.kernels import fit
from gblr_plugin.kernels.costs import CASES, FEATURES, Costs, Workload, recorded
from gblr_plugin.kernels.plan import Plan
from gblr_plugin.matrix.structure import StructuredMatrix
from gblr_plugin.surgery.conversion import frozen_like
from gblr_plugin.tensor.gblr_tensor import GBLRTensor

CPU = torch.device("cpu")
ANY = Costs(1, dict.fromkeys(CASES, ((100.0, 10.0),)), dict.fromkeys(CASES, (1.0,) * len(FEATURES)))


def make(matrix: StructuredMatrix, shape: tuple[int, ...], plan: Plan) -> GBLRTensor:
    return GBLRTensor.from_structured(matrix, shape=shape, plan=plan)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where costs are kept; nothing is known yet, and fitting is on."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("GBLR_FIT_COSTS")
    monkeypatch.setattr(fit, "_known", {})
    return tmp_path / "gblr_plugin"


@pytest.fixture
def fits(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The kernels that were measured; every measurement gives the same costs."""
    done: list[str] = []

    def fitted(dtype: torch.dtype, kernel: str, make: fit.Make) -> Costs:
        done.append(kernel)
        return ANY

    monkeypatch.setattr(fit, "_fitted", fitted)
    return done


def costs(dtype: torch.dtype = torch.float32) -> Costs:
    return fit.costs_here(CPU, dtype, "blocks", make)


def test_costs_are_measured_once_and_kept(folder: Path, fits: list[str]) -> None:
    assert costs() is costs()
    assert fits == ["blocks"]
    (path,) = folder.glob("*.json")
    kept = json.loads(path.read_text())
    assert (kept["dtype"], kept["kernel"], kept["threads"]) == ("float32", "blocks", torch.get_num_threads())
    fit._known.clear()  # as in another process
    assert costs() == ANY
    assert len(fits) == 1


def test_dtypes_threads_and_processors_are_measured_apart(
    folder: Path, fits: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    costs()
    costs(torch.bfloat16)
    for change in ({"threads": 99}, {"machine": "another"}):
        facts = {**fit._facts(CPU, torch.float32, "blocks"), **change}
        monkeypatch.setattr(fit, "_facts", lambda *_, facts=facts: facts)
        costs()
    assert len(fits) == len(list(folder.glob("*.json"))) == 4


def test_the_switch_goes_without(folder: Path, fits: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GBLR_FIT_COSTS", "0")
    assert costs() == recorded(CPU, torch.float32, "blocks")
    assert not fits
    assert not folder.exists()


def test_other_devices_take_the_recorded_costs(folder: Path, fits: list[str]) -> None:
    found = fit.costs_here(torch.device("xpu"), torch.float32, "blocks", make)
    assert found == recorded(CPU, torch.float32, "blocks")
    assert not fits


@pytest.mark.parametrize("content", ["", "{", "[]", '{"threads": 1}', '{"dense": 3, "ours": 4, "threads": 1}', "\0"])
def test_a_damaged_file_is_measured_anew_with_one_line(
    content: str, folder: Path, fits: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    costs()
    (path,) = folder.glob("*.json")
    path.write_text(content)
    fit._known.clear()
    with caplog.at_level(logging.WARNING):
        assert costs() == ANY
    (line,) = caplog.messages
    assert "damaged" in line
    assert str(path) in line
    assert len(fits) == 2
    fit._known.clear()
    assert costs() == ANY
    assert len(fits) == 2


def test_without_a_place_costs_are_measured_and_not_kept(
    folder: Path, fits: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    folder.write_text("a file where the folder would be")
    with caplog.at_level(logging.WARNING):
        assert costs() == ANY
    (line,) = caplog.messages
    assert "not kept" in line
    assert fits == ["blocks"]


def test_a_user_without_a_home_gets_costs_too(
    folder: Path, fits: list[str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def nowhere() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(fit, "_folder", nowhere)
    assert costs() == ANY
    assert "not kept: Could not determine home directory." in caplog.text


def test_a_disk_that_fills_up_loses_nothing(
    folder: Path, fits: list[str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(fit, "write_text", full)
    assert costs() == ANY
    assert fits == ["blocks"]
    assert "No space left" in caplog.text


def test_one_of_several_measures_and_the_others_wait(folder: Path) -> None:
    done: list[int] = []

    def slow() -> Costs:
        done.append(1)
        time.sleep(0.3)
        return ANY

    facts, found = fit._facts(CPU, torch.float32, "blocks"), []
    threads = [threading.Thread(target=lambda: found.append(fit._kept_or_fitted(facts, slow))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert done == [1]
    assert found == [ANY] * 4


def test_coefficients_are_found_again_and_never_negative() -> None:
    g = torch.Generator().manual_seed(0)
    rows = torch.rand(20, len(FEATURES), generator=g, dtype=torch.float64)
    rows[:, 1] = 0.0  # a feature that nothing was measured with
    true = torch.tensor([9.0, 0.0, 0.1, 0.4, 0.2, 0.0, 2.0, 3.0, 1.0], dtype=torch.float64)
    found = fit._coefficients([(tuple(row.tolist()), float(row @ true)) for row in rows])
    assert found == pytest.approx(true.tolist(), abs=1e-6)
    noisy = fit._coefficients([(tuple(row.tolist()), float(torch.rand(1, generator=g)) + 0.1) for row in rows])
    assert min(noisy) >= 0.0


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """A measurement of a few small weights, as short as can be."""
    monkeypatch.setattr(fit, "SHAPES", ((32, 32), (96, 64), (16, 16, 1, 1), (16, 16, 3, 3)))
    monkeypatch.setattr(fit, "SECONDS", 0.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_real_measurement_gives_costs_of_every_case(dtype: torch.dtype, few: None, folder: Path) -> None:
    before = torch.get_rng_state()
    with torch.device("meta"), torch.autocast("cpu", dtype=torch.bfloat16):  # of the caller's, and no matter here
        found = costs(dtype)
    assert torch.equal(torch.get_rng_state(), before)
    assert found.threads == torch.get_num_threads()
    assert [entries for entries, _ in found.dense["1"]] == [32 * 32, 96 * 64]
    assert [entries for entries, _ in found.dense["unfolded"]] == [16 * 16 * 9]
    stored = Workload((64, 64), [(32, 8)] * 2, [(32, 8)] * 2, dtype, "blocks")
    assert found.slowness(stored, 16) > 0


def test_times_decide_what_conversion_makes(few: None, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As users get it: where structured products take long weights keep the matrix, and elsewhere they do not."""
    matrix, kept = random_structure(96, 96, 0.25), []
    for slowness in (3.0, 0.3):

        def times(calls: list[Any], *_: object, slowness: float = slowness) -> list[float]:
            return [1e-5, *[slowness * 1e-5] * (len(calls) - 1)]

        monkeypatch.setattr(fit, "interleaved_medians", times)
        monkeypatch.setattr(fit, "_known", {})
        monkeypatch.setattr(fit, "_folder", lambda slowness=slowness: folder / str(slowness))
        layers = [frozen_like(nn.Linear(96, 96), matrix) for _ in range(2)]
        assert layers[0].weight.plan == layers[1].weight.plan
        kept.append(layers[0].weight.matrix is not None)
    assert kept == [True, False]


def test_the_folder_is_the_users_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    assert fit._folder() == tmp_path / ".cache" / "gblr_plugin"


def test_progress_is_shown(few: None, folder: Path) -> None:
    from gblr_plugin.utils.progress import shown_by

    shown: list[str] = []
    with shown_by(shown.append):
        costs()
    assert any("timing products on this machine 1/4" in line for line in shown)
