"""Generalized block low-rank (GBLR) weights, learned by gradient descent, for NNI, Lightning, torchao and TensorBoard.

Only torch is imported here (and torchao with the tensor); NNI, Lightning and TensorBoard are imported when the bridge
to them is used: ``gblr_plugin.nni``, ``gblr_plugin.lightning``, ``gblr_plugin.tensorboard``. Where a program imports
torchao, transformers or torch's TensorBoard writer itself, this package is made known to them: torchao learns of the
config that its files may name, transformers of the folders that it is to read and write, and the writer's logs get the
snapshots of structures.
"""

from __future__ import annotations

import contextlib
import sys
from importlib import import_module
from typing import Any

from .utils.after_import import after_import

__version__ = "0.1.0"

# Public name -> module that defines it. Resolved on first use (PEP 562), so that importing the package stays light.
_EXPORTS = {
    "ConfigError": "errors",
    "GBLRConfig": "torchao.config",
    "GBLRConv1d": "layers",
    "GBLRConv2d": "layers",
    "GBLRError": "errors",
    "GBLRLayer": "layers",
    "GBLRLinear": "layers",
    "GBLRTensor": "tensor.gblr_tensor",
    "Intervals": "matrix.structure",
    "LayerGoal": "learning.goals",
    "LayerSettings": "surgery.layer_settings",
    "Schedule": "learning.schedule",
    "StructureLearner": "learning.learner",
    "StructuredMatrix": "matrix.structure",
    "compress": "compression.compress",
    "convert": "surgery.conversion",
    "decompose": "decomposition",
    "export": "exporting.program",
    "gaudi_mask": "layers.masks",
    "layer_filter": "surgery.selection",
    "load": "loading",
    "param_groups": "learning.optimizers",
    "prepare": "surgery.conversion",
    "reorder": "surgery.reorder",
    "report": "surgery.counting",
    "save": "serialization",
}
_BRIDGES = ("huggingface", "lightning", "nni", "plot", "tensorboard")

__all__ = ["__version__", *_EXPORTS, *_BRIDGES]


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        value = getattr(import_module(f".{_EXPORTS[name]}", __name__), name)
        globals()[name] = value
    elif name in _BRIDGES:
        value = import_module(f".{name}", __name__)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return value


def __dir__() -> list[str]:
    return sorted(__all__)


def _tell_torchao() -> None:
    """Files of torchao may name this package's config."""
    sys.modules["torchao.core.config"].ALLOWED_AO_MODULES.add(__name__)


def _tell_transformers() -> None:
    """Folders of transformers may hold structured weights."""
    # An older transformers, or no torchao: `gblr_plugin.huggingface.folders` says so when it is used.
    with contextlib.suppress(ImportError):
        import_module(".huggingface.folders", __name__)


def _tell_monitoring() -> None:
    """Snapshots of structures go to the tab of TensorBoard where a program writes logs for it."""
    from .monitoring.sinks import register_sink

    def log_snapshot(*args: Any, **about: Any) -> None:
        import_module(".tensorboard.summary", __name__).log_snapshot(*args, **about)

    register_sink("tensorboard", log_snapshot)


after_import("torchao.core.config", _tell_torchao)
after_import("transformers.modeling_utils", _tell_transformers)
after_import("torch.utils.tensorboard.writer", _tell_monitoring)
