import shutil

import pytest

from gblr_plugin import ConfigError
from gblr_plugin.utils.unfinished import WORK, begin_work, end_work


def test_the_same_task_goes_on_and_another_is_refused(tmp_path):
    output = tmp_path / "a" / "output"
    work = begin_work(output, {"budget": 0.5, "names": ("a", "b")}, "test")
    assert work == output / WORK
    (work / "part").write_text("done")
    (output / ".half.safetensors.x1y2").write_text("half")
    assert begin_work(output, {"budget": 0.5, "names": ["a", "b"]}, "test") == work
    assert (work / "part").exists()
    assert [path.name for path in output.iterdir()] == [WORK]
    with pytest.raises(ConfigError, match=r"test: .* holds unfinished work on another source or with other settings"):
        begin_work(output, {"budget": 0.25, "names": ["a", "b"]}, "test")
    (work / "task.json").write_text("{")
    with pytest.raises(ConfigError, match="holds unfinished work on another source or with other settings"):
        begin_work(output, {"budget": 0.5, "names": ["a", "b"]}, "test")


def test_an_output_that_holds_something_else(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match="is not empty; give a new folder"):
        begin_work(tmp_path, {}, "test")
    with pytest.raises(ConfigError, match=r"notes.txt' is a file; give a new folder"):
        begin_work(tmp_path / "notes.txt", {}, "test")
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_the_note_goes_last(tmp_path, monkeypatch):
    work = begin_work(tmp_path, {}, "test")
    (work / "folder" / "deeper").mkdir(parents=True)
    (work / "file").write_text("a")
    remove = shutil.rmtree

    def killed(path):
        if path == work:
            raise KeyboardInterrupt
        remove(path)

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            end_work(work)
    assert [path.name for path in work.iterdir()] == ["task.json"]
    end_work(begin_work(tmp_path, {}, "test"))
    assert list(tmp_path.iterdir()) == []
