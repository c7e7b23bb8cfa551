import json

import pytest

from gblr_plugin.commands.report import FILES, result_file
from gblr_plugin.compression.report import CompressionReport, LayerRow
from gblr_plugin.run.comparison_report import ComparisonReport, Row
from gblr_plugin.run.search_report import SearchReport, TrialResult
from gblr_plugin.run.summary import MethodResult, RunReport

JUDGED = ("digits_vit", "accuracy", True)
FIGURES = {"seed": 0, "accuracy": 97.0, "relative_flops": 0.5, "parameters": 100, "file_bytes": 1024}
RESULTS = {
    "report.json": RunReport(*JUDGED, [MethodResult("dense", [FIGURES], {"1": 0.1})]),
    "compress.json": CompressionReport({}, (LayerRow("fc", (4, 6), "gblr", 0.5, 2),)),
    "comparison.json": ComparisonReport(*JUDGED, [Row("gblr", 0.5, "fine_tuned", 0, 0.5, 97.0, 0.1, 98.0, 0.1, 3.0)]),
    "search.json": SearchReport(*JUDGED, [TrialResult(0, {"budget": 0.5}, "done", "gblr", 97.0, 0.5)]),
}


def test_all_results_are_tried():
    assert set(RESULTS) == set(FILES)


@pytest.mark.parametrize("name", FILES)
def test_every_result_as_a_table_and_as_json(call, tmp_path, name):
    result = RESULTS[name]
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / name).write_text(result.to_json())
    assert call("report", "out") == (0, f"{result}\n", "")
    (tmp_path / "renamed.json").write_text(result.to_json())
    assert call("report", "renamed.json") == (0, f"{result}\n", "")
    assert json.loads(call("report", f"out/{name}", "--json")[1]) == json.loads(result.to_json())


def test_the_file_of_a_folder(tmp_path):
    assert result_file(tmp_path) == tmp_path / "report.json"
    (tmp_path / "search.json").touch()
    assert result_file(tmp_path) == tmp_path / "search.json"
