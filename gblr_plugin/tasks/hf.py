"""Networks of Hugging Face ``transformers`` as the tasks use them: from a configuration, or from pretrained weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ConfigError, first_line
from ..utils.optional_imports import quiet_import
from ..utils.validation import check_flag, did_you_mean

__all__ = ["HFNetwork", "Logits", "check_download", "load_tokenizer"]

_INSTALL = "pip install 'gblr-plugin[hf]'"


def _transformers(name: str) -> Any:
    """A class of ``transformers`` by its name."""
    try:
        with quiet_import("model", "transformers"):
            import transformers

            return getattr(transformers, name)
    except ImportError as error:
        raise ConfigError(f"model: {name} needs Hugging Face transformers: {_INSTALL}") from error


def check_download(place: object, download: object) -> None:
    """Refuse a place that is no text, and a download that is neither true nor false.

    Raises:
        ConfigError: If so.
    """
    if place is not None and (not isinstance(place, str) or not place):
        raise ConfigError(f"model: pretrained and tokenizer must be a folder or a name of the hub, got {place!r}")
    check_flag("model: download", download)


def _not_there(what: str, place: str, download: bool, error: Exception) -> ConfigError:
    first = first_line(error)
    if Path(place).is_dir():
        return ConfigError(f"model: {what}: the folder {place!r} cannot be used: {first}")
    if download:
        return ConfigError(f"model: {what}: {place!r} could not be fetched: {first}")
    return ConfigError(
        f"model: {what}: {place!r} is neither a folder nor in the hub's local cache; "
        "model.download: true fetches it from the hub"
    )


class Logits(nn.Module):
    """A Hugging Face model that takes one tensor and returns its logits.

    Args:
        model: Its forward takes pixels or token ids first.
        padding: Token that attention leaves out; ``None``: nothing is padded.
    """

    def __init__(self, model: nn.Module, padding: int | None = None) -> None:
        super().__init__()
        self.model, self.padding = model, padding

    def forward(self, x: Tensor) -> Tensor:
        """(batch, ...) inputs to (batch, ..., classes) logits."""
        if self.padding is None:
            logits: Tensor = self.model(x).logits
        else:
            logits = self.model(x, attention_mask=(x != self.padding).long()).logits
        return logits


class HFNetwork:
    """How to make one network of ``transformers``.

    Args:
        model: Name of its class.
        config: Name of its configuration class.
        pretrained: Local folder, or name on the hub; ``None``: random initialisation.
        download: Whether the hub may be asked; otherwise only folders and its local cache.
        heads: First parts of the names of parameters that may be new in a pretrained network.
        arguments: Of the configuration; each must be one that it knows, and fit the pretrained weights.

    Attributes:
        config: The configuration: that of the pretrained network, or where it is not there the arguments' alone, by
            which it can still be counted.

    Raises:
        ConfigError: If transformers is missing, or an argument is unknown.
    """

    def __init__(
        self,
        model: str,
        config: str,
        pretrained: str | None,
        download: bool,
        heads: tuple[str, ...],
        arguments: dict[str, Any],
    ) -> None:
        check_download(pretrained, download)
        self._model, self._pretrained, self._download, self._heads = model, pretrained, download, heads
        kind = _transformers(config)
        known = {*vars(kind()), *kind.attribute_map, "num_labels"}  # the last is a property
        for name in arguments:
            if name not in known:
                raise ConfigError(f"model: unknown argument {name!r} of {config}{did_you_mean(name, known)}")
        self._missing: ConfigError | None = None
        try:
            self.config = kind(**arguments)
            if pretrained is not None:
                self.config = kind.from_pretrained(pretrained, local_files_only=not download, **arguments)
        except OSError as error:
            self._missing = _not_there("pretrained", str(pretrained), download, error)
        except Exception as error:  # a configuration checks its values with errors of its own
            raise ConfigError(f"model: {' '.join(str(error).split())}") from error

    def architecture(self) -> nn.Module:
        """The network with random weights."""
        try:
            network: nn.Module = _transformers(self._model)(self.config)
        except (TypeError, ValueError, RuntimeError, ZeroDivisionError, AssertionError, KeyError) as error:
            raise ConfigError(f"model: {first_line(error)}") from error
        return network

    def __call__(self) -> nn.Module:
        """The network, with pretrained weights if there are any.

        Raises:
            ConfigError: If the weights are not there, or fit anything less than the whole network but its head.
        """
        if self._missing is not None:
            raise self._missing
        if self._pretrained is None:
            return self.architecture()
        try:
            network, found = _transformers(self._model).from_pretrained(
                self._pretrained,
                config=self.config,
                local_files_only=not self._download,
                ignore_mismatched_sizes=True,
                output_loading_info=True,
                dtype=torch.float32,
            )
        except (OSError, ValueError, RuntimeError) as error:
            raise _not_there("pretrained", self._pretrained, self._download, error) from error
        new = [*found["missing_keys"], *(key[0] for key in found["mismatched_keys"])]
        strange = [name for name in new if not name.startswith(self._heads)]
        if strange:
            raise ConfigError(
                f"model: pretrained {self._pretrained!r} has no fitting weights for {sorted(strange)[0]!r}"
            )
        result: nn.Module = network
        return result


def load_tokenizer(kind: str, place: str, download: bool) -> Any:
    """A tokenizer of a local folder (tokenizer.json, or vocab.json and merges.txt, or vocab.txt) or of the hub.

    Raises:
        ConfigError: If there is none.
    """
    check_download(place, download)
    try:
        tokenizer = _transformers(kind).from_pretrained(place, local_files_only=not download)
    except (OSError, ValueError, TypeError) as error:
        raise _not_there("tokenizer", place, download, error) from error
    if len(tokenizer) <= len(tokenizer.all_special_tokens):  # what transformers makes of a place without files
        raise _not_there("tokenizer", place, download, FileNotFoundError("no tokenizer files"))
    return tokenizer
