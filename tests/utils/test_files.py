import os
import stat

import pytest

from gblr_plugin.utils.files import write_atomic, write_text


def test_writes_and_replaces(tmp_path):
    path = tmp_path / "deep" / "er" / "text.txt"
    write_text(path, "first")
    write_text(path, "zweite Zeile: ü\n")
    assert path.read_text(encoding="utf-8") == "zweite Zeile: ü\n"
    assert os.listdir(path.parent) == ["text.txt"]


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
def test_failing_write_keeps_the_earlier_file_and_leaves_nothing_behind(tmp_path, error):
    path = tmp_path / "file.bin"
    path.write_bytes(b"earlier")

    def half_written(file):
        file.write(b"half")
        raise error

    with pytest.raises(type(error)):
        write_atomic(path, half_written)
    assert path.read_bytes() == b"earlier"
    assert os.listdir(tmp_path) == ["file.bin"]


def test_mode_follows_the_umask(tmp_path):
    before = os.umask(0o027)
    try:
        write_text(tmp_path / "file", "x")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o640


def test_a_file_in_place_of_the_folder_is_an_os_error(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(OSError):  # noqa: PT011  # NotADirectoryError or FileExistsError, by platform
        write_text(tmp_path / "file" / "inner", "x")


def test_file_then_folder_are_flushed_to_disk(tmp_path, monkeypatch):
    flushed = []
    monkeypatch.setattr(os, "fsync", lambda handle: flushed.append(stat.S_ISDIR(os.fstat(handle).st_mode)))
    write_text(tmp_path / "file", "x")
    assert flushed == [False, True]


def test_a_folder_is_no_file(tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    with pytest.raises(IsADirectoryError, match="folder is a folder; give the name of a file"):
        write_text(folder, "text")
    assert list(tmp_path.iterdir()) == [folder]
