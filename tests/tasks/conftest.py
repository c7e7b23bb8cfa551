"""Data and weights of every recipe, as small as they can be, in the formats of the real ones."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a test that asked the hub would wait for it

import io
import pickle
import tarfile

import pytest
import torch

SENTENCES = ["a fine film of rare warmth\n", "a dull film without wit\n", " = Head = \n", " the end \n"]


def _images(folder):
    from PIL import Image

    for part, count in (("train", 6), ("val", 2)):
        for name, colour in (("cold", (0, 40, 250)), ("warm", (250, 90, 0))):
            (folder / part / name).mkdir(parents=True)
            for index in range(count):
                Image.new("RGB", (40, 36), colour).save(folder / part / name / f"{index}.jpg")


def _cifar(folder):
    import numpy as np

    generator = np.random.default_rng(0)
    folder.mkdir()
    with tarfile.open(folder / "cifar-10-python.tar.gz", "w:gz") as tar:
        for name in [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]:
            values = {b"data": generator.integers(0, 256, (4, 3072), np.uint8), b"labels": [0, 1, 2, 3]}
            content = pickle.dumps(values, 2)
            member = tarfile.TarInfo(f"cifar-10-batches-py/{name}")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


def _texts(folder):
    (folder / "wikitext").mkdir()
    (folder / "wikitext" / "wiki.train.raw").write_text("".join(SENTENCES) * 16, encoding="utf-8")
    (folder / "wikitext" / "wiki.valid.raw").write_text("".join(SENTENCES) * 4, encoding="utf-8")
    (folder / "sst").mkdir()
    for name, count in (("train.tsv", 6), ("dev.tsv", 3)):
        lines = ["sentence\tlabel", *["a fine film\t1", "a dull film without wit\t0"] * count]
        (folder / "sst" / name).write_text("\n".join(lines) + "\n", encoding="utf-8")


def _tokenizers(folder):
    from tokenizers import ByteLevelBPETokenizer

    trained = ByteLevelBPETokenizer()
    trained.train_from_iterator(SENTENCES * 20, vocab_size=280, min_frequency=1, special_tokens=["<|endoftext|>"])
    for name in ("gpt2-tokens", "gpt2"):
        (folder / name).mkdir()
        trained.save_model(str(folder / name))
    words = sorted({word for sentence in SENTENCES for word in sentence.split()})
    for name in ("bert-tokens", "bert"):
        (folder / name).mkdir()
        (folder / name / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]))


@pytest.fixture(scope="session")
def place(tmp_path_factory):
    """A folder with everything in it."""
    pytest.importorskip("PIL")
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    _images(folder / "images")
    _cifar(folder / "cifar")
    _texts(folder)
    _tokenizers(folder)
    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    vit = transformers.ViTConfig(**small, image_size=32, patch_size=16, num_labels=3)
    transformers.ViTForImageClassification(vit).save_pretrained(folder / "vit")
    gpt2 = transformers.GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=280, n_positions=32)
    transformers.GPT2LMHeadModel(gpt2).save_pretrained(folder / "gpt2")
    bert = transformers.BertConfig(**small, vocab_size=30)
    transformers.BertForMaskedLM(bert).save_pretrained(folder / "bert")
    return folder
