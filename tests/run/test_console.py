import io
import logging
import os
import sys

from gblr_plugin.run.console import Console, captured_output


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


def test_progress_is_silent_off_a_terminal():
    stream = io.StringIO()
    console = Console(stream)
    console.progress("half done")
    console.line("done")
    assert stream.getvalue() == "done\n"


def test_progress_is_rewritten_in_place_and_cleared():
    stream = Terminal()
    console = Console(stream)
    console.progress("x" * 200)
    console.progress("too soon to be shown")
    console.line("done")
    assert stream.getvalue() == "\r" + "x" * 79 + "\r" + " " * 79 + "\r" + "done\n"
