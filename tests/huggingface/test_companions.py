import json

import pytest

from gblr_plugin.huggingface.companions import copy_companions


@pytest.fixture
def source(tmp_path):
    source = tmp_path / "source"
    (source / "1_Pooling").mkdir(parents=True)
    (source / "2_Normalize").mkdir()
    (source / "extra").mkdir()
    (tmp_path / "outside").mkdir()
    names = ["config.json", "tokenizer.json", "vocab.txt", "spiece.model", "chat_template.jinja", "LICENSE"]
    names += ["NOTICE.md", "README.md", "model.safetensors", "model.safetensors.index.json", "run.py", "model.bin"]
    for place in (source, source / "1_Pooling", source / "extra", tmp_path / "outside"):
        for name in names:
            (place / name).write_text(f"{place.name}/{name}")
    return source


def files(folder):
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*")}


def test_what_lies_beside_the_weights(source, tmp_path):
    copy_companions(source, tmp_path / "output")
    kept = {"tokenizer.json", "vocab.txt", "spiece.model", "chat_template.jinja", "LICENSE", "NOTICE.md"}
    assert files(tmp_path / "output") == kept
    assert (tmp_path / "output" / "vocab.txt").read_text() == "source/vocab.txt"


def test_modules_of_a_sentence_transformer(source, tmp_path):
    named = ["", "1_Pooling", "2_Normalize", "3_missing", "../outside", str(tmp_path / "outside")]
    (source / "modules.json").write_text(json.dumps([{"path": path} for path in named]))
    copy_companions(source, tmp_path / "output")
    found = files(tmp_path / "output")
    assert {"modules.json", "1_Pooling/config.json", "1_Pooling/model.safetensors", "2_Normalize"} <= found
    assert not any("extra" in name or "outside" in name or "3_" in name for name in found)
    assert (tmp_path / "outside").is_dir()


@pytest.mark.parametrize("text", ["", "{", "{}", "3", '[{"name": "a"}]', "[3]"])
def test_a_list_of_modules_that_is_none(source, tmp_path, text):
    (source / "modules.json").write_text(text)
    copy_companions(source, tmp_path / "output")
    assert "modules.json" in files(tmp_path / "output")
