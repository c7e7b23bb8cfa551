import json
import shutil

import pytest
import torch

import gblr_plugin as gblr
from gblr_plugin import ConfigError

transformers = pytest.importorskip("transformers")
pretrained = pytest.importorskip("gblr_plugin.huggingface.pretrained")


@pytest.fixture
def folder(tmp_path):
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=20, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
    )
    transformers.BertModel(config).save_pretrained(tmp_path / "dense")
    return tmp_path / "dense"


def says(folder, **changes):
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(config))


def test_a_folder_is_found_by_its_path(folder):
    assert pretrained.find_folder(str(folder), "compress") == folder


def test_a_name_is_found_in_the_cache_without_a_network(folder, tmp_path, monkeypatch):
    snapshot = tmp_path / "cache" / "models--some--model" / "snapshots" / "0"
    snapshot.parent.mkdir(parents=True)
    shutil.copytree(folder, snapshot)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text(snapshot.name)

    def snapshot_download(name, **options):
        from huggingface_hub import snapshot_download

        return snapshot_download(name, cache_dir=tmp_path / "cache", **options)

    monkeypatch.setattr(pretrained, "snapshot_download", snapshot_download)
    assert pretrained.find_folder("some/model", "compress") == snapshot
    with pytest.raises(ConfigError, match="no folder at 'other/model', and no model of this name in the local cache"):
        pretrained.find_folder("other/model", "compress")


@pytest.mark.parametrize("name", ["nowhere", "no/such/folder", "../nowhere", ""])
def test_no_folder(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError) as caught:
        pretrained.find_folder(name, "compress")
    assert "\n" not in str(caught.value)


def test_what_is_no_folder_of_a_model(folder, tmp_path):
    with pytest.raises(ConfigError, match="is a file, need the folder of a model"):
        pretrained.find_folder(str(folder / "config.json"), "compress")
    with pytest.raises(ConfigError, match=r"holds no config\.json"):
        pretrained.find_folder(str(tmp_path), "compress")


def test_the_network_in_a_dtype(folder):
    model = pretrained.load_dense(folder, "compress", torch.bfloat16)
    assert type(model).__name__ == "BertModel"
    assert not model.training
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert pretrained.stored_dtype(folder, "compress") == torch.float32
    says(folder, dtype="bfloat16")
    assert pretrained.stored_dtype(folder, "compress") == torch.bfloat16
    assert {p.dtype for p in pretrained.load_dense(folder, "compress").parameters()} == {torch.float32}


def test_a_compressed_folder_is_refused(folder, tmp_path):
    model = transformers.BertModel.from_pretrained(folder)
    gblr.prepare(model, settings=gblr.LayerSettings("trapezoid", budget=0.5))
    gblr.convert(model).save_pretrained(tmp_path / "out")
    with pytest.raises(ConfigError, match="is of a model that is compressed already, by 'gblr'"):
        pretrained.load_dense(tmp_path / "out", "compress")


@pytest.mark.parametrize("change", ["deeper", "wider", "cut", "none", "pickle"])
def test_weights_that_do_not_fit(folder, change):
    weights = folder / "model.safetensors"
    if change == "deeper":
        says(folder, num_hidden_layers=2)
    elif change == "wider":
        says(folder, intermediate_size=64)
    elif change == "cut":
        weights.write_bytes(weights.read_bytes()[:-100])
    else:
        weights.unlink()
        if change == "pickle":
            torch.save({}, folder / "pytorch_model.bin")
    with pytest.raises(ConfigError, match="compress: ") as caught:
        pretrained.load_dense(folder, "compress")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("load", ["load_tokenizer", "load_image_processor"])
def test_a_folder_without_a_tokenizer_or_processor(folder, load):
    with pytest.raises(ConfigError, match=r"has no (tokenizer|image processor) that") as caught:
        getattr(pretrained, load)(folder, "compress")
    assert "\n" not in str(caught.value)
