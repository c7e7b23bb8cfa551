import json

import pytest

from gblr_plugin import ConfigError
from gblr_plugin.compression.data_files import find_images, read_running_text, read_texts


def test_lines_that_are_not_blank(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes("\ufeff first \r\n\n\t\nsecond é\n".encode())
    assert read_texts(path, "--eval") == ["first", "second é"]
    assert read_running_text(path, "--eval") == " first \r\n\n\t\nsecond é\n"


def test_json_lines(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "one\\ntwo", "label": 3}\n\n{"text": ""}\n{"text": "three"}\n')
    assert read_texts(path, "--eval") == ["one\ntwo", "three"]
    assert read_running_text(path, "--eval") == "one\ntwo\n\n\n\nthree"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", None, "--eval: no file at "),
        ("a.txt", b"", "holds no text"),
        ("a.txt", b" \n\n", "holds no text"),
        ("a.txt", b"\x89PNG\r\n\xff\xfe", r"is not UTF-8 text \(byte 0\)"),
        ("a.txt", b"a\0b", "is not text: it holds zero bytes"),
        ("a.jsonl", b'{"text": "a"}\nb\n', "line 2 is no JSON: Expecting value"),
        ("a.jsonl", b'["a"]\n', 'line 1: need an object with a string as "text"'),
        ("a.jsonl", json.dumps({"txt": "a"}).encode(), 'line 1: need an object with a string as "text"'),
        ("a.ndjson", b'{"text": " "}', "holds no text"),
    ],
)
@pytest.mark.parametrize("read", [read_texts, read_running_text])
def test_files_that_cannot_be_read(tmp_path, name, content, message, read):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError, match=message) as caught:
        read(tmp_path / name, "--eval")
    assert "\n" not in str(caught.value)


def test_a_folder_where_text_is_read_and_the_contrary(tmp_path):
    (tmp_path / "a.txt").write_text("a")
    with pytest.raises(ConfigError, match="is a folder; this model reads text"):
        read_texts(tmp_path, "--eval")
    with pytest.raises(ConfigError, match="is a file; this model reads images"):
        find_images(tmp_path / "a.txt", "--eval")
    with pytest.raises(ConfigError, match="no image in"):
        find_images(tmp_path, "--eval")
    with pytest.raises(ConfigError, match="no folder at"):
        find_images(tmp_path / "b", "--eval")


def test_images_of_a_folder_and_those_in_it(data):
    folder = data("images", count=5)
    found = [str(path.relative_to(folder)) for path in find_images(folder, "--eval")]
    assert found == ["0.png", "2.png", "4.png", "deeper/1.png", "deeper/3.png"]
