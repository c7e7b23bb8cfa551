"""The routes of the GBLR tab, over real event files and through TensorBoard's own application."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.tensorboard import SummaryWriter
from werkzeug.test import Client

import gblr_plugin.tensorboard
from gblr_plugin.matrix.structure import StructuredMatrix
from gblr_plugin.monitoring.records import LayerRecord, LayerShape, encode_layer
from gblr_plugin.tensorboard import write_structure
from gblr_plugin.tensorboard.plugin import GBLRPluginLoader

ROOT = "/data/plugin/gblr/"
HOSTILE = '"><script>window.hacked=1</script>'


def get(client: Client, route: str, status: int = 200, **params: Any) -> Any:
    answer = client.get(ROOT + route, query_string=params)
    assert answer.status_code == status, answer.get_data(as_text=True)
    assert answer.headers["Content-Type"].startswith("application/json")
    assert answer.headers["X-Content-Type-Options"] == "nosniff"

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    return json.loads(answer.get_data(), parse_constant=refuse)


def low_rank(rank: int = 2) -> StructuredMatrix:
    return StructuredMatrix.from_factors(torch.ones(rank, 6), torch.ones(rank, 4))


@pytest.fixture(scope="module")
def client(trained: Any, client_of: Callable[..., Client]) -> Client:
    return client_of(trained.folder)


def test_runs(client: Client, trained: Any) -> None:
    (run,) = get(client, "runs")["runs"]
    assert (run["run"], run["steps"], run["notes"]) == ("trained", trained.steps, [])
    assert [layer["name"] for layer in run["layers"]] == list(trained.structures)
    assert run["layers"][0] == {"name": "0.0", "rows": 48, "cols": 24, "splits": 1, "components": 24}


def test_overview_counts_what_the_learner_counted(client: Client, trained: Any) -> None:
    for step, expected in zip(trained.steps, trained.relative_flops, strict=True):
        answer = get(client, "overview", run="trained", step=step)
        layers = answer["layers"]
        stored = sum(layer["stored"] for layer in layers)
        assert answer["step"] == step
        assert stored / sum(layer["rows"] * layer["cols"] for layer in layers) == pytest.approx(expected)
        assert all(layer["budget"] == 0.4 for layer in layers)
    assert get(client, "overview", run="trained")["step"] == trained.steps[-1]
    assert get(client, "overview", run="trained", step=19)["step"] == 10
    assert get(client, "overview", run="trained", step=-5)["step"] == 0


def test_time(client: Client, trained: Any) -> None:
    curves = get(client, "time", run="trained")
    assert curves["steps"] == trained.steps
    assert curves["relative_flops"] == pytest.approx(trained.relative_flops, rel=1e-5)
    assert curves["boxcar"] == [False] * 5 + [True] * 2
    assert curves["sigma"][0] == 1.0
    assert curves["sigma"][-1] is None
    assert curves["budget"] == [0.4] * 7
    assert all(loss > 0 for loss in curves["loss"])
    layer = get(client, "time", run="trained", layer="1.2")
    assert layer["relative_flops"] == pytest.approx(trained.shares("1.2"), rel=1e-5)
    assert layer["live"] == [matrix.num_components for matrix in trained.structures["1.2"]]


def test_layer(client: Client, trained: Any) -> None:
    for step, matrix in zip(trained.steps, trained.structures["0.0"], strict=True):
        answer = get(client, "layer", run="trained", layer="0.0", step=step)
        shown = answer["structure"]
        assert (answer["step"], answer["notes"]) == (step, [])
        assert (shown["rows"], shown["cols"], shown["split_sizes"]) == (48, 24, [24])
        live = [k for k in range(24) if shown["row_width"][k] and shown["col_width"][k]]
        assert [shown["row_width"][k] for k in live] == matrix.rows.width.tolist()
        assert [shown["row_start"][k] for k in live] == matrix.rows.start.tolist()
        assert [shown["col_width"][k] for k in live] == matrix.cols.width.tolist()
        assert [shown["col_start"][k] for k in live] == matrix.cols.start.tolist()
        assert sum(shown["energy"]) == pytest.approx(1.0, abs=0.02)


def test_sampled_logs_show_what_was_kept(trained: Any, client_of: Callable[..., Client]) -> None:
    client = client_of(trained.folder, samples=3)
    (run,) = get(client, "runs")["runs"]
    assert len(run["steps"]) == 3
    assert run["steps"][-1] == trained.steps[-1]
    for step in trained.steps:
        answer = get(client, "layer", run="trained", layer="0.2", step=step)
        assert answer["structure"] is not None
        assert answer["step"] in trained.steps
        assert answer["step"] <= max(step, run["steps"][0])


def test_merged_folders(trained: Any, tmp_path: Path, client_of: Callable[..., Client]) -> None:
    """Logs of several trainings below one folder, or linked into it from elsewhere, are runs of one tab."""
    (tmp_path / "elsewhere").symlink_to(trained.folder, target_is_directory=True)
    with SummaryWriter(str(tmp_path / "here" / "seed 1")) as writer:
        write_structure(writer, {"a": low_rank()}, 3)
    client = client_of(tmp_path)
    found = {run["run"]: run["steps"] for run in get(client, "runs")["runs"]}
    assert found == {"elsewhere/trained": trained.steps, "here/seed 1": [3]}
    for run, layer in (("elsewhere/trained", "0.0"), ("here/seed 1", "a")):
        assert get(client, "layer", run=run, layer=layer)["structure"] is not None
    assert get(client, "layer", 400, run="here/seed 1", layer="0.0")["error"]


@pytest.mark.parametrize(
    ("route", "params", "message"),
    [
        ("overview", {"run": "no such run"}, "run 'no such run'"),
        ("overview", {}, "run ''"),
        ("time", {"run": "trained", "layer": HOSTILE}, "no layer"),
        ("layer", {"run": "trained"}, "no layer None"),
        ("layer", {"run": "trained", "layer": "0.0", "step": "ten"}, "step must be a whole number"),
    ],
)
def test_bad_parameters_are_answered_in_one_line(client: Client, route: str, params: Any, message: str) -> None:
    error = get(client, route, 400, **params)["error"]
    assert message in error
    assert "\n" not in error


def test_only_get(client: Client) -> None:
    assert client.post(ROOT + "runs").status_code == 405


def test_broken_and_foreign_records_are_passed_over_with_a_note(
    tmp_path: Path, client_of: Callable[..., Client], log_bytes: Callable[..., None]
) -> None:
    writer = SummaryWriter(str(tmp_path / "run"))
    for step in (0, 10, 20):
        write_structure(writer, {"a": low_rank()}, step)
    log_bytes(writer, "gblr/summary", b"GBLR\x01\x01garbage", 25)
    log_bytes(writer, "gblr/summary", b"\x89PNG", 27)
    log_bytes(writer, "gblr/structure/a", b"GBLR\x01\x02" + bytes(40), 25, blob=True)
    log_bytes(writer, "somebody/else", b"x", 3)
    writer.close()
    client = client_of(tmp_path)
    (run,) = get(client, "runs")["runs"]
    assert run["steps"] == [0, 10, 20]
    notes = " ".join(run["notes"])
    assert "step 25" in notes
    assert "step 27: not a GBLR record" in notes
    assert "somebody/else" in notes
    answer = get(client, "layer", run="run", layer="a", step=30)
    assert answer["step"] == 20
    assert answer["structure"]["split_sizes"] == [2]
    assert "step 25, layer 'a'" in answer["notes"][0]


def test_nothing_but_broken_records(
    tmp_path: Path, client_of: Callable[..., Client], log_bytes: Callable[..., None]
) -> None:
    writer = SummaryWriter(str(tmp_path / "run"))
    log_bytes(writer, "gblr/structure/a", b"foreign", 1, blob=True)
    writer.close()
    client = client_of(tmp_path)
    (run,) = get(client, "runs")["runs"]
    assert (run["steps"], run["layers"]) == ([], [])
    assert "gblr/structure/a" in run["notes"][0]
    assert get(client, "overview", 400, run="run")["error"]


def test_a_step_written_twice_counts_once(tmp_path: Path, client_of: Callable[..., Client]) -> None:
    writer = SummaryWriter(str(tmp_path))
    for rank in (1, 3):
        write_structure(writer, {"a": low_rank(rank)}, 7)
    writer.close()
    client = client_of(tmp_path)
    (run,) = get(client, "runs")["runs"]
    assert run["steps"] == [7]
    assert get(client, "overview", run=".")["layers"][0]["live"] == 1
    assert get(client, "layer", run=".", layer="a")["structure"]["split_sizes"] == [1]


def test_layers_may_come_and_go(tmp_path: Path, client_of: Callable[..., Client]) -> None:
    writer = SummaryWriter(str(tmp_path))
    write_structure(writer, {"a": low_rank(), "b": low_rank()}, 0)
    write_structure(writer, {"b": low_rank(1)}, 1)
    writer.close()
    client = client_of(tmp_path)
    assert get(client, "time", run=".", layer="a")["live"] == [2, None]
    assert get(client, "time", run=".", layer="b")["live"] == [2, 1]
    assert get(client, "layer", run=".", layer="a", step=1)["step"] == 0


def test_hostile_names_come_back_as_they_are(tmp_path: Path, client_of: Callable[..., Client]) -> None:
    run = "<img src=x onerror=alert(1)>"
    writer = SummaryWriter(str(tmp_path / run))
    write_structure(writer, {HOSTILE: low_rank()}, 0)
    writer.close()
    client = client_of(tmp_path)
    (listed,) = get(client, "runs")["runs"]
    assert listed["run"] == run
    assert get(client, "layer", run=run, layer=HOSTILE)["layer"] == HOSTILE


def test_tab_is_active_with_data_only(tmp_path: Path, client: Client, client_of: Callable[..., Client]) -> None:
    assert client.get("/data/plugins_listing").get_json()["gblr"]["enabled"] is True
    empty = client_of(tmp_path).get("/data/plugins_listing").get_json()["gblr"]
    assert (empty["enabled"], empty["tab_name"]) == (False, "GBLR")


def test_static_files_are_whole_and_nothing_else_is_served(client: Client) -> None:
    page = client.get("/data/plugin_entry.html?name=gblr")
    assert "./static/index.js" in page.get_data(as_text=True)
    seen, waiting = set(), ["index.js", "style.css"]
    while waiting:
        name = waiting.pop()
        seen.add(name)
        answer = client.get(f"{ROOT}static/{name}")
        assert answer.status_code == 200
        kind = "text/css" if name.endswith(".css") else "text/javascript"
        assert answer.headers["Content-Type"].startswith(kind)
        text = answer.get_data(as_text=True)
        assert "innerHTML" not in text
        assert not re.findall(r"https?://(?!www\.w3\.org/)", text)
        waiting += set(re.findall(r"from '\./([\w.]+)'", text)) - seen
    assert len(seen) > 10
    for path in ("static/../plugin.py", "static/%2e%2e/plugin.py", "static/nothing.js"):
        assert client.get(ROOT + path).status_code == 404


def test_loader_keeps_enough_samples_unless_told_otherwise() -> None:
    for given, expected in (({}, 500), ({"gblr": 7}, 7)):
        flags = argparse.Namespace(samples_per_plugin=dict(given))
        GBLRPluginLoader().fix_flags(flags)
        assert flags.samples_per_plugin["gblr"] == expected


def test_notes_on_broken_records_come_to_an_end(
    tmp_path: Path, client_of: Callable[..., Client], log_bytes: Callable[..., None]
) -> None:
    writer = SummaryWriter(str(tmp_path / "run"))
    write_structure(writer, {"a": low_rank()}, 0)
    for step in range(1, 40):
        log_bytes(writer, "gblr/summary", b"foreign", step)
        log_bytes(writer, "gblr/structure/a", b"foreign", step, blob=True)
    writer.close()
    client = client_of(tmp_path)
    (run,) = get(client, "runs")["runs"]
    assert run["steps"] == [0]
    assert len(run["notes"]) < 39
    assert run["notes"][-1].endswith("more records skipped")
    assert get(client, "layer", run="run", layer="a", step=30)["structure"] is None


def test_a_structure_under_another_layers_name(
    tmp_path: Path, client_of: Callable[..., Client], log_bytes: Callable[..., None]
) -> None:
    writer = SummaryWriter(str(tmp_path / "run"))
    write_structure(writer, {"a": low_rank()}, 0)
    log_bytes(writer, "gblr/structure/a", encode_layer(make_record("b")), 5, blob=True)
    writer.close()
    answer = get(client_of(tmp_path), "layer", run="run", layer="a", step=9)
    assert answer["step"] == 0
    assert "holds layer 'b' instead" in answer["notes"][0]


def make_record(name: str) -> LayerRecord:
    one = np.ones(1, dtype=np.int64)
    return LayerRecord(LayerShape(name, 8, 8, (1,)), one, one, one, one, np.ones(1))


def test_names_that_the_package_lacks() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        gblr_plugin.tensorboard.nothing  # noqa: B018
    assert set(gblr_plugin.tensorboard.__all__) == {"structure_image", "write_structure"}
