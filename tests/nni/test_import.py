from __future__ import annotations

import subprocess
import sys

import pytest

from gblr_plugin.utils.optional_imports import quiet_import


def run(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)


def test_import_prints_nothing_and_leaves_logging_alone() -> None:
    code = (
        "import logging\n"
        "logging.disable(7)\n"
        "import gblr_plugin\n"
        "assert gblr_plugin.nni.GBLRPruner\n"
        "assert logging.root.manager.disable == 7\n"
    )
    done = run(code)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_without_nni_there_is_one_clear_line() -> None:
    code = "import sys\nsys.modules['nni'] = None\nimport gblr_plugin\nimport gblr_plugin.nni\n"
    done = run(code)
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError: gblr_plugin.nni needs nni (pip install 'nni>=3.0')")
    assert "During handling" not in done.stderr


def test_own_import_errors_are_not_taken_for_a_missing_host() -> None:
    with pytest.raises(ImportError, match=r"^broken$"), quiet_import("gblr_plugin.nni", needs="nni"):
        raise ImportError("broken", name="gblr_plugin.nni.pruner")
