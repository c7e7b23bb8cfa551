import io
import logging
import os
import sys
import time

from gblr_plugin.utils.console import Console, captured_output


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_everything_else_goes_to_the_log(tmp_path, capfd):
    log = tmp_path / "run.log"
    with captured_output() as captured:
        print("before the log is known")
        captured.send_to(log)
        print("python out")
        print("python err", file=sys.stderr)
        os.write(1, b"C out\n")
        os.write(2, b"C err\n")
        captured.terminal.write("ours\n")
    print("afterwards")
    shown = capfd.readouterr()
    assert shown.out == "ours\nafterwards\n"
    assert shown.err == ""
    assert sorted(log.read_text().split("\n")) == ["", "C err", "C out", "python err", "python out"]


def test_a_handler_that_keeps_the_stream_does_no_harm_afterwards(tmp_path, capfd):
    logger = logging.Logger("kept")
    with captured_output() as captured:
        logger.addHandler(logging.StreamHandler(sys.stderr))
        captured.send_to(tmp_path / "run.log")
        logger.warning("inside")
    logger.warning("outside")
    assert capfd.readouterr().err == ""
    assert (tmp_path / "run.log").read_text().startswith("inside\n")


def test_streams_come_back_after_an_error(tmp_path, capfd):
    try:
        with captured_output() as captured:
            captured.send_to(tmp_path / "run.log")
            raise ValueError
    except ValueError:
        print("seen")
    assert capfd.readouterr().out == "seen\n"


def test_the_log_is_appended_to(tmp_path):
    log = tmp_path / "run.log"
    for text in ("first", "second"):
        with captured_output() as captured:
            captured.send_to(log)
            print(text)
    assert log.read_text() == "first\nsecond\n"


def test_off_a_terminal_progress_is_a_line_now_and_then(monkeypatch):
    stream = io.StringIO()
    now = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    console = Console(stream)
    for minutes in (0.1, 1.1, 1.2, 2.2):
        now[0] = 1000 + 60 * minutes
        console.progress(f"after {minutes}")
    console.line("done")
    assert stream.getvalue() == "after 1.1\nafter 2.2\ndone\n"


def test_a_quiet_console_writes_results_alone():
    stream = Terminal()
    console = Console(stream, quiet=True)
    console.progress("half done")
    console.line("done")
    console.result("the result")
    assert stream.getvalue() == "the result\n"


def test_what_is_shown_goes_to_standard_error_and_to_no_log(tmp_path, capfd):
    with captured_output(shown=True) as captured:
        captured.send_to(tmp_path / "run.log")
        print("a host")
        captured.terminal.write("ours\n")
        captured.errors.write("ours too\n")
    shown = capfd.readouterr()
    assert shown.out == "ours\n"
    assert sorted(shown.err.splitlines()) == ["a host", "ours too"]
    assert not (tmp_path / "run.log").exists()


def test_progress_is_rewritten_in_place_and_cleared():
    stream = Terminal()
    console = Console(stream)
    console.progress("x" * 200)
    console.progress("too soon to be shown")
    console.line("done")
    assert stream.getvalue() == "\r" + "x" * 79 + "\r" + " " * 79 + "\r" + "done\n"
