import io
import sys

import pytest

from gblr_plugin.utils.progress import shown_by, track


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_quiet_where_nobody_watches(capsys: pytest.CaptureFixture[str]) -> None:
    assert list(track(["a", "b"], "decomposing")) == ["a", "b"]
    assert capsys.readouterr() == ("", "")


def test_a_terminal_sees_each_layer_and_is_left_clean(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = _Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    assert list(track(["fc1", "fc2"], "decomposing")) == ["fc1", "fc2"]
    text = terminal.getvalue()
    assert "decomposing 1/2: fc1" in text
    assert "decomposing 2/2: fc2" in text
    assert "s left" in text
    assert text.endswith("\r")


def test_a_host_can_show_it_instead() -> None:
    seen: list[str] = []
    with shown_by(seen.append):
        list(track(["fc1", "fc2"], "decomposing"))
    assert [text.split(",")[0] for text in seen] == ["decomposing 1/2: fc1", "decomposing 2/2: fc2"]
