"""The common flags of commands that write a folder, with a job that takes no time."""

import argparse
import json
from pathlib import Path

import pytest

from gblr_plugin import ConfigError, GBLRError
from gblr_plugin.commands.jobs import carry_out, output_of

FLAGS = {"dry_run": False, "fresh": False, "json": False, "verbose": False, "quiet": False}


class Result:
    def to_json(self):
        return json.dumps({"quality": 1})

    def __str__(self):
        return "a table"


class Counting:
    LEFT = (".unfinished", "rows.json")

    def __init__(self, error=None):
        self.error = error

    def forecast(self):
        return "would count to three"

    def run(self, output, console):
        print("a host speaks")
        console.line("counted to three")
        if self.error:
            raise self.error
        (output / "rows.json").touch()
        return Result()


def carry(output, *given, error=None):
    flags = argparse.Namespace(**{**FLAGS, **dict.fromkeys(given, True)})
    carry_out(flags, lambda: Counting(error), output, lambda folder: f"look into {folder}")


def test_the_terminal_shows_ours_and_the_log_the_hosts(tmp_path, capfd):
    carry(tmp_path / "out")
    shown = capfd.readouterr()
    assert (
        shown.out
        == f"counted to three\n\na table\n\neverything is in {tmp_path / 'out'}; look into {tmp_path / 'out'}\n"
    )
    assert shown.err == ""
    assert (tmp_path / "out/run.log").read_text() == "a host speaks\n"


def test_json_is_alone_on_standard_output(tmp_path, capfd):
    carry(tmp_path / "out", "json")
    shown = capfd.readouterr()
    assert json.loads(shown.out) == {"quality": 1}
    assert shown.err == "counted to three\n"


def test_quiet_and_verbose(tmp_path, capfd):
    carry(tmp_path / "out", "quiet", "verbose")
    shown = capfd.readouterr()
    assert shown.out == "\na table\n\n"
    assert shown.err == "a host speaks\n"


def test_a_dry_run_writes_nothing(tmp_path, capfd):
    carry(tmp_path / "out", "dry_run", "fresh")
    assert capfd.readouterr().out.startswith("would count to three\nwould write to ")
    assert not (tmp_path / "out").exists()


def test_fresh_forgets_what_an_earlier_job_left_and_nothing_else(tmp_path):
    out = tmp_path / "out"
    (out / ".unfinished").mkdir(parents=True)
    (out / ".unfinished/network").touch()
    (out / "notes.txt").touch()
    carry(out)
    assert (out / ".unfinished/network").exists()
    carry(out, "fresh")
    assert {path.name for path in out.iterdir()} == {"notes.txt", "rows.json", "run.log"}


def test_errors(tmp_path):
    with pytest.raises(GBLRError, match=r"the run failed: ZeroDivisionError: halfway \(details in .*run.log\)"):
        carry(tmp_path / "out", error=ZeroDivisionError("halfway"))
    assert "Traceback" in (tmp_path / "out/run.log").read_text()
    with pytest.raises(ConfigError, match="other settings"):
        carry(tmp_path / "out", error=ConfigError("other settings"))
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="is a file, need a folder"):
        carry(tmp_path / "file")
    with pytest.raises(ConfigError, match="cannot write to"):
        carry(tmp_path / "file" / "deeper")


def test_the_output_is_named_after_the_config():
    named = argparse.Namespace(output=None, config=Path("configs/digits.yaml"))
    assert output_of(named) == Path("outputs/digits")
    assert output_of(argparse.Namespace(output=Path("here"), config=named.config)) == Path("here")
