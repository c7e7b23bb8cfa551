"""Language models of Hugging Face on WikiText-103 or own text, and BERT as a classifier of labelled lines."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset

from ..data.text import STRETCH, TokenFile, Windows, encode, labelled_lines, text_parts
from ..errors import ConfigError
from ..utils.validation import check_choice
from .base import IGNORED, BuiltInTask, PairsDataModule, check_sizes
from .hf import HFNetwork, Logits, load_tokenizer

__all__ = ["BertTask", "GPT2Task", "MaskedWindows"]


class LanguageTask(BuiltInTask):
    """What the language models share: text, tokenizer and windows.

    Args:
        dataset: ``"wikitext103"``, or ``"text"`` for own text; BERT also takes ``"labelled"`` lines.
        folder: Where it is.
        tokenizer: Local folder, or name on the hub; default ``pretrained``.
        cache: Folder of the encoded tokens; default ``folder``.
        context: Tokens of an example.
        pretrained: Local folder, or name on the hub, of weights to start from.
        download: Whether the hub may be asked.
        workers: Processes that load.
    """

    metric = "perplexity"
    higher_is_better = False
    datasets: tuple[str, ...] = ("wikitext103", "text")
    """Allowed names."""
    tokenizer_class: str
    """In ``transformers``."""

    def __init__(
        self,
        dataset: str,
        folder: str | None,
        context: int,
        tokenizer: str | None = None,
        cache: str | None = None,
        pretrained: str | None = None,
        download: bool = False,
        workers: int = 0,
    ) -> None:
        check_choice("model: dataset", dataset, self.datasets)
        check_sizes(context=context)
        check_sizes(0, workers=workers)
        if cache is not None and not isinstance(cache, str):
            raise ConfigError(f"model: cache must be a path, got {cache!r}")
        self.dataset, self.folder, self.cache, self.context, self.workers = dataset, folder, cache, context, workers
        self._tokenizer = tokenizer or pretrained
        self._pretrained, self._download = pretrained, download
        self._hf: HFNetwork

    def tokenizer(self) -> Any:
        """The tokenizer.

        Raises:
            ConfigError: If there is none, or it knows more tokens than the network.
        """
        if self._tokenizer is None:
            raise ConfigError(
                "model: tokenizer is missing: a folder with tokenizer files, or a name of the hub and download: true"
            )
        tokenizer = load_tokenizer(self.tokenizer_class, self._tokenizer, self._download)
        if len(tokenizer) > self._hf.config.vocab_size:
            raise ConfigError(
                f"model: tokenizer {self._tokenizer!r} has {len(tokenizer)} tokens, the network vocab_size "
                f"{self._hf.config.vocab_size}"
            )
        return tokenizer

    def _load(self, model: str, config: str, longest: str, arguments: dict[str, Any], heads: tuple[str, ...]) -> None:
        """Describe the network; ``longest`` is the configuration's name for the number of its positions."""
        self._hf = HFNetwork(model, config, self._pretrained, self._download, heads, arguments)
        positions = getattr(self._hf.config, longest)
        if self.context > positions:
            raise ConfigError(f"model: context {self.context} is above {longest} {positions}")

    def _tokens(self, tokenizer: Any) -> list[TokenFile]:
        texts = text_parts(self.folder, wikitext=self.dataset == "wikitext103")
        return [encode(files, tokenizer, Path(self.cache or str(self.folder)).expanduser()) for files in texts]

    def _loaders(self, train: Dataset[Any], held_out: Dataset[Any], batch_size: int, seed: int) -> PairsDataModule:
        # Logits over a whole vocabulary are large: evaluation takes no more examples at once than training.
        return PairsDataModule(train, held_out, batch_size, seed, workers=self.workers, evaluation=1, stretch=STRETCH)

    def example_input(self, batch: int = 1) -> Tensor:
        """Random tokens."""
        return torch.randint(1, self._hf.config.vocab_size, (batch, self.context))


class GPT2Task(LanguageTask):
    """Predict the next token (``transformers.GPT2LMHeadModel``); the defaults are GPT-2 small.

    Arguments are those of :class:`~gblr_plugin.tasks.language.LanguageTask`, with a context of 1024, and those of
    ``GPT2Config``.
    """

    layers = ["network.model.transformer.h.*.attn.c_attn", "network.model.transformer.h.*.mlp.*"]
    tokenizer_class = "GPT2TokenizerFast"

    def __init__(
        self,
        dataset: str = "wikitext103",
        folder: str | None = None,
        tokenizer: str | None = None,
        cache: str | None = None,
        context: int = 1024,
        pretrained: str | None = None,
        download: bool = False,
        workers: int = 0,
        **config: Any,
    ) -> None:
        super().__init__(dataset, folder, context, tokenizer, cache, pretrained, download, workers)
        self._load("GPT2LMHeadModel", "GPT2Config", "n_positions", {**config, "use_cache": False}, ())

    def network(self) -> nn.Module:
        """A new GPT-2, or the pretrained one."""
        return Logits(self._hf())

    def architecture(self) -> nn.Module:
        """The network with random weights, such that it runs on the meta device."""
        model: Any = self._hf.architecture()
        model.config.use_cache = True  # without a cache its forward looks into the values of its position ids
        return Logits(model)

    def data(self, seed: int, batch_size: int) -> PairsDataModule:
        """Windows side by side; the seed shuffles them.

        Raises:
            ConfigError: If the text or the tokenizer is not there.
        """
        train, held_out = (Windows(tokens, self.context, self.context) for tokens in self._tokens(self.tokenizer()))
        return self._loaders(train, held_out, batch_size, seed)


class MaskedWindows(Dataset[tuple[Tensor, Tensor]]):
    """Windows of which 15% of the tokens are to be guessed, as in BERT (Devlin et al. 2019, Sec. 3.1).

    Of those, 80% are shown as the mask, 10% as any other token, and 10% as they are.

    Args:
        tokens: A file of tokens.
        context: Length of a window.
        mask: The token that hides another.
        vocabulary: Number of tokens.
        seed: Masks are the same each time an index is asked for; ``None``: drawn anew.
    """

    def __init__(self, tokens: TokenFile, context: int, mask: int, vocabulary: int, seed: int | None) -> None:
        self.tokens, self.context, self.mask, self.vocabulary, self.seed = tokens, context, mask, vocabulary, seed

    def __len__(self) -> int:
        return self.tokens.numel() // self.context

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """(context,) int64 tokens, and (context,) int64 targets, -100 where nothing is to be guessed."""
        window = self.tokens[index * self.context : (index + 1) * self.context]
        drawn = None if self.seed is None else torch.Generator().manual_seed(self.seed + index)
        chance = torch.rand(self.context, generator=drawn)
        other = torch.randint(self.vocabulary, (self.context,), generator=drawn)
        if not bool((chance < 0.15).any()):
            chance[index % self.context] = 0.0  # or a batch of one short window could have no loss
        target = torch.where(chance < 0.15, window, IGNORED)
        shown = torch.where(chance < 0.12, self.mask, window)
        return torch.where((chance >= 0.12) & (chance < 0.135), other, shown), target


class BertTask(LanguageTask):
    """BERT (``transformers.BertForMaskedLM``, ``BertForSequenceClassification``); the defaults are BERT-base.

    With the dataset ``"labelled"`` it classifies the lines of train.tsv and dev.tsv into ``classes``; with
    ``"wikitext103"`` or ``"text"`` it guesses masked tokens, and is judged by their perplexity. Lines longer than
    ``context`` are cut, shorter ones padded. The other arguments are those of
    :class:`~gblr_plugin.tasks.language.LanguageTask`, and those of ``BertConfig``.
    """

    layers = ["network.model.bert.encoder.*"]
    datasets = ("labelled", *LanguageTask.datasets)
    tokenizer_class = "BertTokenizerFast"

    def __init__(
        self,
        dataset: str = "labelled",
        folder: str | None = None,
        tokenizer: str | None = None,
        cache: str | None = None,
        context: int = 128,
        classes: int = 2,
        pretrained: str | None = None,
        download: bool = False,
        workers: int = 0,
        **config: Any,
    ) -> None:
        super().__init__(dataset, folder, context, tokenizer, cache, pretrained, download, workers)
        check_sizes(classes=classes)
        self.classifies, self.classes = dataset == "labelled", classes
        if self.classifies:
            self.metric, self.higher_is_better = "accuracy", True
            config["num_labels"] = classes
        model = "BertForSequenceClassification" if self.classifies else "BertForMaskedLM"
        heads = ("classifier.", "bert.pooler.") if self.classifies else ("cls.",)
        self._load(model, "BertConfig", "max_position_embeddings", config, heads)

    def network(self) -> nn.Module:
        """A new BERT, or the pretrained one."""
        return Logits(self._hf(), self._hf.config.pad_token_id if self.classifies else None)

    def architecture(self) -> nn.Module:
        """The network with random weights, such that it runs on the meta device: no token is taken as padding."""
        return Logits(self._hf.architecture())

    def data(self, seed: int, batch_size: int) -> PairsDataModule:
        """Labelled lines, or windows of text; the seed shuffles them.

        Raises:
            ConfigError: If the text or the tokenizer is not there, or there are other labels than classes.
        """
        tokenizer = self.tokenizer()
        train: Dataset[Any]
        held_out: Dataset[Any]
        if self.classifies:
            train, held_out = self._labelled(tokenizer)
        else:
            tokens = self._tokens(tokenizer)
            mask, size = int(tokenizer.mask_token_id), len(tokenizer)
            train = MaskedWindows(tokens[0], self.context, mask, size, None)
            held_out = MaskedWindows(tokens[1], self.context, mask, size, 0)
        return self._loaders(train, held_out, batch_size, seed)

    def _labelled(self, tokenizer: Any) -> tuple[Dataset[Any], Dataset[Any]]:
        sets_of_lines = labelled_lines(self.folder)
        labels = sorted({label for _, label in sets_of_lines[0]})
        if len(labels) != self.classes or not {label for _, label in sets_of_lines[1]} <= set(labels):
            raise ConfigError(
                f"data: the labels of {self.folder!r} are {', '.join(labels)}; model.classes is {self.classes}"
            )
        encoded_sets = []
        for lines in sets_of_lines:
            texts = [text for text, _ in lines]
            encoded = tokenizer(texts, truncation=True, max_length=self.context, padding="max_length")
            targets = torch.tensor([labels.index(label) for _, label in lines])
            encoded_sets.append(TensorDataset(torch.tensor(encoded["input_ids"]), targets))
        return encoded_sets[0], encoded_sets[1]
