"""Folders of Hugging Face models that lie: refused in one line, before anything is made of what they claim."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import gblr_plugin as gblr
from gblr_plugin.serialization.container import INDEX
from gblr_plugin.surgery.layer_settings import LayerSettings

transformers = pytest.importorskip("transformers")
X = torch.linspace(-1, 1, 2 * 3 * 16 * 16).reshape(2, 3, 16, 16)
SIZES = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
Change = Callable[[Path], object]


@pytest.fixture(scope="module")
def sound(tmp_path_factory: Any) -> tuple[Path, torch.Tensor]:
    """A folder of three shards, and what the network in it computes."""
    from gblr_plugin.huggingface import folders as hf

    torch.manual_seed(0)
    config = transformers.ViTConfig(**SIZES, image_size=16, patch_size=4, num_labels=5)
    model = transformers.ViTForImageClassification(config).eval()
    gblr.prepare(model, settings=LayerSettings("trapezoid", budget=0.5))
    model = gblr.convert(model)
    folder = tmp_path_factory.mktemp("vit") / "sound"
    hf.save_pretrained(model, folder, max_shard_bytes=10_000)
    assert len(list(folder.glob("*.safetensors"))) == 3
    return folder, model(X).logits.detach()


def changed(sound: tuple[Path, torch.Tensor], change: Change) -> Path:
    folder = sound[0].with_name("changed")
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(sound[0], folder)
    change(folder)
    return folder


def config(**values: Any) -> Change:
    def change(folder: Path) -> None:
        said = json.loads((folder / "config.json").read_text())
        said = {key: value for key, value in (said | values).items() if value is not ...}
        (folder / "config.json").write_text(json.dumps(said))

    return change


def index(edit: Callable[[dict[str, Any]], object]) -> Change:
    def change(folder: Path) -> None:
        said = json.loads((folder / INDEX).read_text())
        edit(said)
        (folder / INDEX).write_text(json.dumps(said))

    return change


def shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("model-*.safetensors"))


def header(number: int, edit: Callable[[dict[str, Any]], object]) -> Change:
    """Change the header of a shard, and take its checksum away: what is left to notice is what it says."""

    def change(folder: Path) -> None:
        path = shards(folder)[number]
        data = path.read_bytes()
        size = int.from_bytes(data[:8], "little")
        said = json.loads(data[8 : 8 + size])
        edit(said)
        said["__metadata__"].pop("gblr_crc32")
        text = json.dumps(said).encode()
        path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + size :])

    return change


def structure(edit: Callable[[dict[str, Any]], object]) -> Change:
    def change(said: dict[str, Any]) -> None:
        ours = json.loads(said["__metadata__"]["gblr"])
        edit(ours)
        said["__metadata__"]["gblr"] = json.dumps(ours)

    return header(0, change)


def first(said: dict[str, Any]) -> str:
    return next(name for name in said if name != "__metadata__")


def flattened(said: dict[str, Any]) -> None:
    for name, entry in said.items():
        if name != "__metadata__":
            entry["shape"] = [math.prod(entry["shape"])]


def swapped(folder: Path) -> None:
    one, two, *_ = shards(folder)
    one.write_bytes(two.read_bytes())


LIES: dict[str, Change] = {
    "another method": config(quantization_config={"quant_method": "gptq", "bits": 4}),
    "no method": config(quantization_config=...),
    "a method that is no table": config(quantization_config=["gblr"]),
    "wider": config(hidden_size=64),
    "huge": config(hidden_size=10**9),
    "of text": config(hidden_size="32"),
    "negative": config(hidden_size=-32),
    "deeper": config(num_hidden_layers=2),
    "shallower": config(num_hidden_layers=0),
    "other labels": config(num_labels=7),
    "many pixels": config(image_size=10**6),
    "another class": config(architectures=["ViTModel"]),
    "a class that is none": config(architectures=["os.system"]),
    "a dtype that is none": config(dtype="os"),
    "a file outside": index(lambda said: said["weight_map"].update(more="../sound/model-00001-of-00003.safetensors")),
    "a file that is missing": index(lambda said: said["weight_map"].update(more="more.safetensors")),
    "all in one file": index(
        lambda said: said.update(weight_map=dict.fromkeys(said["weight_map"], "model-00001-of-00003.safetensors"))
    ),
    "an index without metadata": index(lambda said: said.pop("metadata")),
    "a shard removed": lambda folder: shards(folder)[1].unlink(),
    "a shard twice": swapped,
    "a shard cut short": lambda folder: shards(folder)[1].write_bytes(shards(folder)[1].read_bytes()[:-50]),
    "a shard that goes on": lambda folder: shards(folder)[1].write_bytes(shards(folder)[1].read_bytes() + b"0000"),
    "a shard that is a folder": lambda folder: (shards(folder)[1].unlink(), shards(folder)[1].with_suffix("").mkdir()),
    "torchao beside ours": structure(lambda said: said.update(torchao={"vit.x": "{}"})),
    "a weight of nothing": structure(lambda said: said["weights"].update({"9.weight": {"shape": [2, 2], "plan": 0}})),
    "a family of nothing": structure(lambda said: said.update(families={"9": {"family": "low_rank"}})),
    "a weight forgotten": structure(lambda said: said["weights"].pop(next(iter(said["weights"])))),
    "no structure": header(0, lambda said: said["__metadata__"].pop("gblr")),
}
for _number in range(3):
    LIES |= {
        f"another name in {_number}": header(_number, lambda said: said.update(other=said.pop(first(said)))),
        f"another dtype in {_number}": header(_number, lambda said: said[first(said)].update(dtype="I32")),
        f"one more axis in {_number}": header(_number, lambda said: said[first(said)]["shape"].append(1)),
        f"flat in {_number}": header(_number, flattened),
        f"sizes in {_number}": header(_number, lambda said: said[first(said)].update(shape=[1 << 40])),
        f"places in {_number}": header(_number, lambda said: said[first(said)].update(data_offsets=[0, 1 << 50])),
    }


@pytest.mark.parametrize("lie", list(LIES))
def test_folders_that_lie(sound: Any, lie: str) -> None:
    folder = changed(sound, LIES[lie])
    with pytest.raises(gblr.ConfigError) as caught:
        gblr.load(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "change",
    [
        lambda folder: None,
        config(auto_map={"AutoModelForImageClassification": "evil.Evil"}),  # never read
        index(lambda said: said["metadata"].update(total_size=10**15)),  # nor is this
        index(lambda said: said["weight_map"].popitem()),
    ],
)
def test_folders_that_say_too_much_or_too_little(sound: Any, change: Change) -> None:
    assert torch.equal(gblr.load(changed(sound, change))(X).logits, sound[1])


NAMES = ["config.json", INDEX, *(f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3))]


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sampled_from(NAMES), st.floats(0, 1), st.integers(0, 40), st.binary(max_size=12))
def test_any_file_with_other_bytes_somewhere(sound: Any, name: str, place: float, cut: int, put: bytes) -> None:
    def change(folder: Path) -> None:
        data = (folder / name).read_bytes()
        at = int(place * len(data))
        (folder / name).write_bytes(data[:at] + put + data[at + cut :])

    folder, said = changed(sound, change), ""
    try:
        loaded = gblr.load(folder)
    except gblr.ConfigError as error:
        said = str(error)
    assert "\n" not in said
    if said:
        return
    if name == "config.json":  # another network may be meant: as large a one
        assert sum(p.numel() for p in loaded.parameters()) < 200_000
    else:
        assert torch.equal(loaded(X).logits, sound[1])
