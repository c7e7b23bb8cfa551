"""The bridge to transformers: folders, compression while a folder is loaded, and a callback for its ``Trainer``."""

from __future__ import annotations

from importlib import import_module
from typing import Any

# Resolved on first use: what compresses folders of safetensors runs without transformers.
_EXPORTS = {
    "GBLRHfConfig": "folders",
    "GBLRTrainerCallback": "trainer",
    "from_pretrained": "folders",
    "save_pretrained": "folders",
}

__all__ = ["GBLRHfConfig", "GBLRTrainerCallback", "from_pretrained", "save_pretrained"]


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_EXPORTS[name]}", __name__), name)
