"""Folders of tiny random models of every kind, with tokenizers made here, and data for them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")

WORDS = [f"w{number}" for number in range(60)]
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}


def tokenizer(*special: str):
    """A tokenizer of words; encoders put [CLS] and [SEP] around a text, decoders nothing."""
    table = {word: number for number, word in enumerate([*special, "[UNK]", *WORDS])}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(table, unk_token="[UNK]"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    names = {"unk_token": "[UNK]"}
    if special:
        around = [("[CLS]", table["[CLS]"]), ("[SEP]", table["[SEP]"])]
        made.post_processor = tokenizers.processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=around)
        names |= {"pad_token": "[PAD]", "mask_token": "[MASK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made, **names)


def network(kind: str):
    torch.manual_seed(0)
    if kind == "images":
        config = transformers.ViTConfig(**SIZES, image_size=16, patch_size=4, num_labels=5)
        return transformers.ViTForImageClassification(config)
    if kind == "decoder":
        sizes = {**SIZES, "num_key_value_heads": 1, "max_position_embeddings": 64}
        ids = {"bos_token_id": None, "eos_token_id": None}
        return transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=61, **sizes, **ids))
    config = transformers.BertConfig(vocab_size=65, **SIZES, max_position_embeddings=32, num_labels=4)
    kinds = {"masked": "BertForMaskedLM", "encoder": "BertModel", "classes": "BertForSequenceClassification"}
    return getattr(transformers, kinds[kind])(config)


@pytest.fixture(scope="session")
def dense_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a kind of model: encoder, masked, classes, decoder or images."""
    made: dict[str, Path] = {}

    def make(kind: str) -> Path:
        if kind not in made:
            folder = tmp_path_factory.mktemp("models") / kind
            network(kind).save_pretrained(folder)
            if kind == "images":
                size = {"height": 16, "width": 16}
                transformers.ViTImageProcessor(size=size).save_pretrained(folder)
            else:
                special = () if kind == "decoder" else ("[PAD]", "[CLS]", "[SEP]", "[MASK]")
                tokenizer(*special).save_pretrained(folder)
            made[kind] = folder
        return made[kind]

    return make


@pytest.fixture
def data(tmp_path: Path) -> Callable[..., Path]:
    """A file of texts, or a folder of images, for a kind of model."""

    def make(kind: str, name: str = "data", count: int = 12, seed: int = 0) -> Path:
        generator = torch.Generator().manual_seed(seed)
        if kind == "images":
            image = pytest.importorskip("PIL.Image")
            (tmp_path / name / "deeper").mkdir(parents=True)
            for number in range(count):
                pixels = torch.randint(0, 256, (20, 24, 3), generator=generator, dtype=torch.uint8)
                place = tmp_path / name / ("deeper" if number % 2 else ".") / f"{number}.png"
                image.frombytes("RGB", (24, 20), bytes(pixels.flatten().tolist())).save(place)
            return tmp_path / name
        lengths = torch.randint(3, 20, (count,), generator=generator).tolist()
        lines = [" ".join(WORDS[n] for n in torch.randint(0, 60, (k,), generator=generator).tolist()) for k in lengths]
        (tmp_path / f"{name}.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
        return tmp_path / f"{name}.txt"

    return make
