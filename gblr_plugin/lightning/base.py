"""The callback base class of whichever Lightning is installed."""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING

from ..utils.optional_imports import check_version

if TYPE_CHECKING:
    from pytorch_lightning import Callback
else:
    # `lightning.pytorch` is the same code under another name, with classes of its own: be a Callback of both.
    for _name in ("pytorch-lightning", "lightning"):
        check_version("gblr_plugin.lightning", f"{_name}>=2.6,<2.7")
    _bases = []
    if find_spec("pytorch_lightning") is not None:
        import pytorch_lightning

        _bases.append(pytorch_lightning.Callback)
    if find_spec("lightning") is not None:
        import lightning.pytorch

        _bases.append(lightning.pytorch.Callback)
    if not _bases:
        raise ImportError("gblr_plugin.lightning needs pytorch-lightning or lightning: pip install pytorch-lightning")
    Callback = _bases[0] if len(_bases) == 1 else type("Callback", tuple(_bases), {})

__all__ = ["Callback"]
