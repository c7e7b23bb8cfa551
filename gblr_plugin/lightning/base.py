"""The base classes of whichever Lightning is installed."""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING

from ..utils.optional_imports import check_version

if TYPE_CHECKING:
    from pytorch_lightning import Callback, LightningModule, Trainer
else:
    # `lightning.pytorch` is the same code under another name, with classes of its own: be a Callback of both.
    for _name in ("pytorch-lightning", "lightning"):
        check_version("gblr_plugin.lightning", f"{_name}>=2.6,<2.7")
    _found = []
    if find_spec("pytorch_lightning") is not None:
        import pytorch_lightning

        _found.append(pytorch_lightning)
    if find_spec("lightning") is not None:
        import lightning.pytorch

        _found.append(lightning.pytorch)
    if not _found:
        raise ImportError("gblr_plugin.lightning needs pytorch-lightning or lightning: pip install pytorch-lightning")
    LightningModule, Trainer = _found[0].LightningModule, _found[0].Trainer
    Callback = _found[0].Callback if len(_found) == 1 else type("Callback", tuple(h.Callback for h in _found), {})

__all__ = ["Callback", "LightningModule", "Trainer"]
