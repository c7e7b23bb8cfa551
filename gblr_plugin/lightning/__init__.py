"""The bridge to Lightning: one callback that learns, watches and pictures structures under any Trainer."""

from __future__ import annotations

from .callback import GBLRCallback

__all__ = ["GBLRCallback"]
