"""Dense pretrained networks in folders of transformers: where they lie, how they and what prepares their data load.

Nothing is downloaded, and no code of a folder is run.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from ..errors import ConfigError, first_line
from ._compat import decode
from .folders import class_of, quiet_bar

import transformers  # isort: skip  # after folders, which says in one line what is missing
from huggingface_hub import snapshot_download  # isort: skip  # after folders, which says in one line what is missing

__all__ = ["decode", "find_folder", "load_dense", "load_image_processor", "load_tokenizer", "stored_dtype"]


def find_folder(name: str, who: str) -> Path:
    """The folder of a model: the path of one, or a model's name on the Hugging Face hub, of which the cache is read.

    Raises:
        ConfigError: If there is none, or it holds no ``config.json``.
    """
    folder = Path(name).expanduser()
    if not folder.exists():
        try:
            folder = Path(snapshot_download(name, local_files_only=True))
        except Exception as error:  # a name that cannot be one, or a model that is not in the cache
            raise ConfigError(
                f"{who}: no folder at {name!r}, and no model of this name in the local cache of the Hugging Face hub; "
                "nothing is downloaded"
            ) from error
    if not folder.is_dir():
        raise ConfigError(f"{who}: {str(folder)!r} is a file, need the folder of a model")
    if not (folder / "config.json").is_file():
        raise ConfigError(f"{who}: {str(folder)!r} holds no config.json; need the folder of a model of transformers")
    return folder


def stored_dtype(folder: Path, who: str) -> torch.dtype:
    """The floating-point dtype that the ``config.json`` of a folder names; float32 where it names none."""
    dtype = getattr(class_of(folder, who)[1], "dtype", None)
    return dtype if isinstance(dtype, torch.dtype) and dtype.is_floating_point else torch.float32


def load_dense(folder: Path, who: str, dtype: torch.dtype = torch.float32) -> Any:
    """The dense network of a folder, in evaluation mode.

    Args:
        folder: With ``config.json`` and safetensors files.
        who: The command, for messages.
        dtype: Of its parameters.

    Raises:
        ConfigError: If it is compressed or quantized, has weights in another kind of file, lacks some, or is damaged.
    """
    kind, config = class_of(folder, who)
    method = getattr(config, "quantization_config", None)
    if method is not None:
        name = method.get("quant_method") if isinstance(method, dict) else type(method).__name__
        raise ConfigError(f"{who}: {str(folder)!r} is of a model that is compressed already, by {str(name)!r}")
    try:
        with quiet():
            model, found = kind.from_pretrained(
                str(folder), local_files_only=True, use_safetensors=True, dtype=dtype, output_loading_info=True
            )
    except Exception as error:  # transformers raises many kinds
        raise ConfigError(f"{who}: {str(folder)!r} cannot be loaded: {first_line(error)}") from error
    if found["missing_keys"]:
        missing = min(found["missing_keys"])
        raise ConfigError(f"{who}: {str(folder)!r} has no tensor {missing!r}, which the network needs")
    return model.eval()


def load_tokenizer(folder: Path, who: str) -> Any:
    """The tokenizer of a folder, which can pad.

    Raises:
        ConfigError: If there is none.
    """
    tokenizer = _processor(transformers.AutoTokenizer, folder, who, "tokenizer")
    if len(tokenizer) <= len(set(tokenizer.all_special_ids)):  # what transformers makes where there are no files of one
        raise ConfigError(f"{who}: {str(folder)!r} has no tokenizer that knows any word")
    if tokenizer.pad_token is None and tokenizer.eos_token is not None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_image_processor(folder: Path, who: str) -> Any:
    """The image processor of a folder.

    Raises:
        ConfigError: If there is none.
    """
    return _processor(transformers.AutoImageProcessor, folder, who, "image processor")


def _processor(kind: Any, folder: Path, who: str, what: str) -> Any:
    try:
        with quiet():
            return kind.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    except Exception as error:  # transformers raises many kinds
        raise ConfigError(f"{who}: {str(folder)!r} has no {what} that can be used: {first_line(error)}") from error


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without transformers' progress bar and warnings."""
    logging = transformers.utils.logging
    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with quiet_bar():
            yield
    finally:
        logging.set_verbosity(level)
