import pytest
import torch

from gblr_plugin import ConfigError
from gblr_plugin.compression.inputs import IGNORED, DataReader, kind_of
from gblr_plugin.huggingface.folders import empty_network

transformers = pytest.importorskip("transformers")
KINDS = {"encoder": "encoder", "masked": "masked", "classes": "encoder", "decoder": "decoder", "images": "images"}


def reader(folder, kind, **settings):
    return DataReader(folder, KINDS[kind], None if kind == "images" else 32, **settings)


@pytest.mark.parametrize(("name", "kind"), KINDS.items())
def test_the_kind_of_a_model(dense_folder, name, kind):
    assert kind_of(empty_network(dense_folder(name), "test")) == kind


def test_models_that_read_something_else():
    sizes = {"vocab_size": 8, "d_model": 8, "d_ff": 8, "num_layers": 1, "num_heads": 1, "decoder_start_token_id": 0}
    with torch.device("meta"):
        t5 = transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes))
    with pytest.raises(ConfigError, match="a T5ForConditionalGeneration reads neither text nor images alone"):
        kind_of(t5)


@pytest.mark.parametrize("name", KINDS)
def test_the_model_takes_its_batches(dense_folder, data, name):
    model = getattr(transformers, empty_network(dense_folder(name), "test").__class__.__name__)
    model = model.from_pretrained(dense_folder(name)).eval()
    length = None if name == "images" else 16
    batches = reader(dense_folder(name), name, length=length).read(data(name, count=40), "--eval")
    for batch in batches:
        assert torch.isfinite(model(**batch)[0]).all()


def test_texts_are_padded_cut_and_sorted(dense_folder, data):
    path = data("encoder", count=400)
    batches = reader(dense_folder("encoder"), "encoder", samples=400, length=10).read(path, "--eval")
    sizes = [tuple(batch["input_ids"].shape) for batch in batches]
    assert sum(size[0] for size in sizes) == 400
    assert max(size[1] for size in sizes) == 10
    assert all(size[0] * size[1] <= 512 for size in sizes)
    assert all(size[0] * size[1] > 256 for size in sizes[:-1])
    lengths = torch.cat([batch["attention_mask"].sum(1) for batch in batches])
    assert lengths.min() < 10
    assert "labels" not in batches[0]
    words = min((line.split() for line in path.read_text().splitlines()), key=len)
    expected = [*[1, *(int(word[1:]) + 5 for word in words)][:9], 2]  # [CLS] words [SEP]
    row, mask = batches[0]["input_ids"][0], batches[0]["attention_mask"][0]
    assert row[mask.bool()].tolist() == expected


def test_masked_tokens_are_labelled_and_none_else(dense_folder, data):
    path = data("masked", count=40)
    plain = reader(dense_folder("encoder"), "encoder").read(path, "--eval")
    masked = reader(dense_folder("masked"), "masked").read(path, "--eval")
    hidden = total = 0
    for before, after in zip(plain, masked, strict=True):
        chosen = after["labels"] != IGNORED
        assert torch.equal(torch.where(chosen, after["labels"], after["input_ids"]), before["input_ids"])
        assert (after["input_ids"][chosen] == 3).all()  # [MASK]
        assert chosen.any(1).all()
        assert not (chosen & (before["attention_mask"] == 0)).any()
        assert not (chosen & (before["input_ids"] < 3)).any()
        hidden, total = hidden + int(chosen.sum()), total + int((before["input_ids"] > 4).sum())
    assert 0.1 < hidden / total < 0.25
    again = reader(dense_folder("masked"), "masked").read(path, "--eval")
    other = reader(dense_folder("masked"), "masked").read(path, "--eval", seed=1)
    assert all(torch.equal(a["labels"], b["labels"]) for a, b in zip(masked, again, strict=True))
    assert any(not torch.equal(a["labels"], b["labels"]) for a, b in zip(masked, other, strict=True))


def test_running_text_is_cut_into_sequences(dense_folder, data):
    path = data("decoder", count=60)
    words = [int(word[1:]) + 1 for word in path.read_text().split()]
    batches = reader(dense_folder("decoder"), "decoder", length=8).read(path, "--eval")
    cut = torch.cat([batch["input_ids"] for batch in batches])
    assert cut.flatten().tolist() == words[: cut.numel()]
    assert len(words) - cut.numel() < 8
    assert all(torch.equal(batch["input_ids"], batch["labels"]) for batch in batches)


def test_of_a_long_text_sequences_are_drawn_all_over_it(dense_folder, tmp_path):
    path = tmp_path / "long.txt"
    path.write_text("".join(f"w{number % 60} " for number in range(60_000)))
    read = [
        reader(dense_folder("decoder"), "decoder", samples=20, length=16).read(path, "--eval", s) for s in (0, 0, 1)
    ]
    drawn = [torch.cat([batch["input_ids"] for batch in batches]) for batches in read]
    assert drawn[0].shape == (20, 16)
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
    assert (drawn[0].diff(dim=1).remainder(60) == 1).float().mean() > 0.9  # words that follow each other


def test_no_more_samples_than_are_wanted(dense_folder, data):
    for kind in ("encoder", "images"):
        batches = reader(dense_folder(kind), kind, samples=7).read(data(kind, count=20), "--eval")
        assert sum(len(next(iter(batch.values()))) for batch in batches) == 7


def test_what_is_refused(dense_folder, data, tmp_path):
    with pytest.raises(ConfigError, match="--samples must be a whole number of at least 1, got 0"):
        reader(dense_folder("encoder"), "encoder", samples=0)
    with pytest.raises(ConfigError, match="--length must be at most the model's 32 tokens, got 64"):
        reader(dense_folder("encoder"), "encoder", length=64)
    with pytest.raises(ConfigError, match="--length is for text, and this model reads images"):
        reader(dense_folder("images"), "images", length=8)
    with pytest.raises(ConfigError, match="tokens, fewer than one sequence of 32; see --length"):
        reader(dense_folder("decoder"), "decoder").read(data("decoder", count=1), "--eval")
    folder = data("images", count=2)
    (folder / "0.png").write_bytes(b"no image")
    with pytest.raises(ConfigError, match=r"0.png' is no image that can be read"):
        reader(dense_folder("images"), "images").read(folder, "--eval")
