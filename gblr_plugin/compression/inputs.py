"""Batches of a pretrained model, made of a user's data by the tokenizer or the image processor of its folder."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..data.images import read_image
from ..errors import ConfigError, first_line
from ..huggingface.pretrained import load_image_processor, load_tokenizer
from ..utils.validation import check_count
from .data_files import find_images, read_running_text, read_texts

__all__ = ["IGNORED", "DataReader", "Kind", "default_length", "kind_of"]

Kind = Literal["decoder", "masked", "encoder", "images"]
"""What a model reads: running text, texts with masked tokens, texts, or images."""

IGNORED = -100  # the label of a token that does not count, as in torch's losses

_WHO = "compress"
_IMAGES = 16  # of a batch
_TOKENS = 512  # of a batch of text: more steps of refinement with fewer tokens gain more than fewer with more
_SAMPLES = {"decoder": 256, "masked": 512, "encoder": 512, "images": 256}
_LENGTH = {"decoder": 256, "masked": 128, "encoder": 128, "images": 0}
_MASKED = 0.15  # share of the tokens that a masked language model has to find, as in BERT's training
_CHARACTERS = 16  # of a text that are looked at for each token that is wanted

Batch = dict[str, Tensor]


def kind_of(model: nn.Module) -> Kind:
    """What a model of transformers reads, by the name of its class and of its first input.

    Raises:
        ConfigError: If it reads anything else, or reads text and writes another.
    """
    name, read = type(model).__name__, getattr(model, "main_input_name", None)
    config: Any = getattr(model, "config", None)
    if read == "pixel_values":
        return "images"
    if read != "input_ids" or getattr(config, "is_encoder_decoder", False):
        raise ConfigError(
            f"{_WHO}: a {name} reads neither text nor images alone; give gblr_plugin.compress your own batches of it"
        )
    if name.endswith(("ForCausalLM", "LMHeadModel")):
        return "decoder"
    return "masked" if name.endswith("ForMaskedLM") else "encoder"


def default_length(kind: Kind, longest: int | None, length: int | None = None) -> int:
    """Tokens of a sequence, or most tokens of a text: the number that is given, or the default of the kind.

    Raises:
        ConfigError: If the number is out of range, or more than the model's longest.
    """
    if length is None:
        return min(_LENGTH[kind], longest or _LENGTH[kind])
    check_count("--length", length, 2)
    if length > (longest or length):
        raise ConfigError(f"{_WHO}: --length must be at most the model's {longest} tokens, got {length}")
    return length


@dataclass(frozen=True)
class DataReader:
    """Reads data as batches of keyword arguments of a model.

    Args:
        folder: Of the model, with its tokenizer or image processor.
        kind: What the model reads.
        longest: Most tokens that the model takes; ``None`` for no limit.
        samples: Texts, sequences or images that are read; ``None``: 512 texts, 256 of the others.
        length: Tokens of a sequence, or most tokens of a text; ``None``: 256 of a decoder's, 128 of other texts.

    Raises:
        ConfigError: If a number is out of range.
    """

    folder: Path
    kind: Kind
    longest: int | None = None
    samples: int | None = None
    length: int | None = None

    def __post_init__(self) -> None:
        if self.samples is not None:
            check_count("--samples", self.samples)
        if self.length is not None and self.kind == "images":
            raise ConfigError(f"{_WHO}: --length is for text, and this model reads images")
        default_length(self.kind, self.longest, self.length)

    @property
    def count(self) -> int:
        """Texts, sequences or images that are read."""
        return self.samples or _SAMPLES[self.kind]

    @property
    def tokens(self) -> int:
        """Tokens of a sequence, or most tokens of a text."""
        return default_length(self.kind, self.longest, self.length)

    def read(self, path: Path, who: str, seed: int = 0) -> list[Batch]:
        """Read data.

        Args:
            path: A text or JSON-lines file, or a folder of images.
            who: The option that names it, for messages.
            seed: Which samples are drawn, where there are more than are wanted, and which tokens are masked.

        Returns:
            Batches on the CPU; with ``"labels"`` for models of language.

        Raises:
            ConfigError: If the data cannot be used.
        """
        if self.kind == "images":
            return self._images(_drawn(find_images(path, who), self.count, seed), who)
        tokenizer = load_tokenizer(self.folder, _WHO)
        if self.kind == "decoder":
            return self._sequences(read_running_text(path, who), tokenizer, f"{who}: {str(path)!r}", seed)
        texts = _drawn(read_texts(path, who), self.count, seed)
        return self._texts(texts, tokenizer, seed)

    def _images(self, files: Sequence[Path], who: str) -> list[Batch]:
        processor = load_image_processor(self.folder, _WHO)
        batches = []
        for start in range(0, len(files), _IMAGES):
            some = files[start : start + _IMAGES]
            images = [read_image(file) for file in some]
            try:
                batches.append(dict(processor(images=images, return_tensors="pt")))
            except (ValueError, TypeError, RuntimeError) as error:
                said = first_line(error)
                raise ConfigError(f"{who}: the image processor refuses images like {str(some[0])!r}: {said}") from error
        return batches

    def _texts(self, texts: Sequence[str], tokenizer: Any, seed: int) -> list[Batch]:
        """Padded batches, of texts of similar length, so that little is padding; masked where the model fills masks."""
        generator = torch.Generator().manual_seed(seed)
        encoded = tokenizer(list(texts), truncation=True, max_length=self.tokens)
        lengths = [len(ids) for ids in encoded["input_ids"]]
        batches, some = [], list[int]()
        order = sorted(range(len(texts)), key=lengths.__getitem__)
        for place, text in enumerate(order):
            some.append(text)
            if place + 1 == len(order) or (len(some) + 1) * lengths[order[place + 1]] > _TOKENS:
                rows = {name: [values[row] for row in some] for name, values in encoded.items()}
                batch = dict(tokenizer.pad(rows, return_tensors="pt"))
                batches.append(_masked(batch, tokenizer, generator) if self.kind == "masked" else batch)
                some = []
        return batches

    def _sequences(self, text: str, tokenizer: Any, who: str, seed: int) -> list[Batch]:
        """Sequences of one length, cut from the running text; of a long text, from pieces all over it."""
        first = [token for token in tokenizer("")["input_ids"] if token == tokenizer.bos_token_id][:1]
        size, length = _CHARACTERS * self.tokens, self.tokens - len(first)
        pieces = _drawn([text[at : at + size] for at in range(0, len(text), size)], self.count, seed)
        stream = tokenizer("".join(pieces), add_special_tokens=False, verbose=False)["input_ids"]
        starts = range(0, len(stream) - length + 1, length)
        if not starts:
            raise ConfigError(
                f"{who} holds {len(stream)} tokens, fewer than one sequence of {self.tokens}; see --length"
            )
        sequences = [first + stream[start : start + length] for start in _drawn(starts, self.count, seed)]
        size = max(1, _TOKENS // self.tokens)
        return [{"input_ids": ids, "labels": ids.clone()} for ids in torch.tensor(sequences).split(size)]


def _drawn(samples: Sequence[Any], count: int, seed: int) -> list[Any]:
    """As many of the samples as are wanted, in their order."""
    if len(samples) <= count:
        return list(samples)
    return [samples[place] for place in sorted(random.Random(seed).sample(range(len(samples)), count))]


def _masked(batch: Batch, tokenizer: Any, generator: torch.Generator) -> Batch:
    """A batch with some tokens of each text replaced by the mask, and labels that say what they were."""
    ids = batch["input_ids"]
    special = torch.zeros_like(ids, dtype=torch.bool)
    for token in tokenizer.all_special_ids:
        special |= ids == token
    noise = torch.rand(ids.shape, generator=generator).masked_fill(special, 1.0)
    hidden = noise < _MASKED
    hidden[torch.arange(len(ids)), noise.argmin(1)] |= ~special.all(1)  # at least one token of each text
    return {
        **batch,
        "input_ids": ids.masked_fill(hidden, tokenizer.mask_token_id),
        "labels": ids.masked_fill(~hidden, IGNORED),
    }
