"""GBLR as a compressor of NNI: NNI chooses it, schedules it, combines it with others, and its evaluators train.

Importing this package imports NNI 3.0 (quietly) and registers the structured layers in NNI's tables of module types.
"""

from __future__ import annotations

from ..utils.optional_imports import quiet_import

with quiet_import("gblr_plugin.nni", needs="nni (pip install 'nni>=3.0')", tested="nni>=3.0,<4"):
    from .compressors import compressor_names, create_compressor, register_compressor
    from .evaluators import LightningEvaluator
    from .pruner import GBLRPruner
    from .wrapper import GBLRWrapper

__all__ = [
    "GBLRPruner",
    "GBLRWrapper",
    "LightningEvaluator",
    "compressor_names",
    "create_compressor",
    "register_compressor",
]
