"""Compressors by name: gblr, NNI's own, and whatever registers itself here."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from nni.compression.utils import Evaluator
from schema import SchemaError
from torch import nn

from .. import families
from ..errors import ConfigError
from ..utils.validation import did_you_mean
from .evaluators import cure
from .families import family_factory
from .pruner import GBLRPruner
from .selection import for_nni, without_gblr_keys

__all__ = ["compressor_names", "create_compressor", "register_compressor"]

Factory = Callable[..., Any]

_NNI = {
    "level": "pruning.LevelPruner",
    "l1": "pruning.L1NormPruner",
    "l2": "pruning.L2NormPruner",
    "fpgm": "pruning.FPGMPruner",
    "slim": "pruning.SlimPruner",
    "taylor": "pruning.TaylorPruner",
    "movement": "pruning.MovementPruner",
    "qat": "quantization.QATQuantizer",
    "ptq": "quantization.PtqQuantizer",
    "lsq": "quantization.LsqQuantizer",
    "lsq_plus": "quantization.LsqPlusQuantizer",
    "dorefa": "quantization.DoReFaQuantizer",
    "bnn": "quantization.BNNQuantizer",
    "dynamic_distiller": "distillation.DynamicLayerwiseDistiller",
    "adaptive_distiller": "distillation.Adaptive1dLayerwiseDistiller",
}
_DRIVERS = {"agp": "pruning.AGPPruner", "linear": "pruning.LinearPruner"}


def _nni_class(path: str) -> type:
    package, _, name = path.partition(".")
    found: type = getattr(importlib.import_module(f"nni.compression.{package}"), name)
    return found


def _call(name: str, factory: Factory, *args: Any, **kwargs: Any) -> Any:
    """Call a factory; arguments that do not fit are an error in one line."""
    parameters = {
        key: parameter
        for key, parameter in inspect.signature(factory).parameters.items()
        if parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
    }
    taken = {key: parameter for key, parameter in list(parameters.items())[len(args) :] if key != "existed_wrappers"}
    open_ended = any(p.kind is p.VAR_KEYWORD for p in inspect.signature(factory).parameters.values())
    for key in kwargs:
        if key not in taken and not open_ended:
            hint = did_you_mean(key, taken)
            raise ConfigError(f"compressor {name!r}: unknown argument {key!r}{hint} (allowed: {', '.join(taken)})")
    missing = [key for key, parameter in taken.items() if parameter.default is parameter.empty and key not in kwargs]
    if missing:
        raise ConfigError(f"compressor {name!r}: argument {missing[0]!r} is missing")
    return factory(*args, **kwargs)


def _of_nni(name: str, path: str) -> Factory:
    def create(
        model: nn.Module, config_list: Sequence[Mapping[str, Any]], evaluator: Evaluator | None = None, **kwargs: Any
    ) -> Any:
        plain = without_gblr_keys(config_list)
        plain = [for_nni(model, entry, f"config_list[{index}]") for index, entry in enumerate(plain)]
        factory = _nni_class(path)
        if evaluator is None and inspect.signature(factory).parameters["evaluator"].default is inspect.Parameter.empty:
            raise ConfigError(f"compressor {name!r}: it needs an evaluator")
        cure(evaluator)
        try:
            return _call(name, factory, model, plain, evaluator, **kwargs)
        except SchemaError as error:
            reason = " ".join(str(error).split())
            raise ConfigError(f"compressor {name!r}: config_list: {reason}") from None

    return create


def _driver(name: str, path: str) -> Factory:
    def create(
        model: nn.Module,
        config_list: Sequence[Mapping[str, Any]],
        evaluator: Evaluator | None = None,
        *,
        interval_steps: int,
        total_times: int,
        pruner: str = "gblr",
        **kwargs: Any,
    ) -> Any:
        if pruner in _DRIVERS:
            raise ConfigError(f"compressor {name!r}: pruner: {pruner!r} cannot be driven by another schedule")
        inner = create_compressor(pruner, model, config_list, evaluator, **kwargs)
        if not hasattr(inner, "total_times"):
            raise ConfigError(f"compressor {name!r}: pruner: {pruner!r} has no schedule to drive")
        return _nni_class(path)(inner, interval_steps, total_times)

    return create


_FACTORIES: dict[str, Factory] = {"gblr": GBLRPruner}
"""Name to ``factory(model, config_list, evaluator, **kwargs)``, of all compressors but the families."""
_FACTORIES.update({name: _of_nni(name, path) for name, path in _NNI.items()})
_FACTORIES.update({name: _driver(name, path) for name, path in _DRIVERS.items()})
_FACTORIES["gblr_fixed"] = family_factory("gblr")  # one-shot decomposition, its structure not learned further


def _factories() -> dict[str, Factory]:
    """All compressors: families may be registered at any time."""
    return {**_FACTORIES, **{name: family_factory(name) for name in families.names() if name not in _FACTORIES}}


def register_compressor(name: str, factory: Factory) -> None:
    """Make a compressor known by name.

    Args:
        name: As in a config.
        factory: Called with ``(model, config_list, evaluator, **kwargs)``; returns what has NNI's ``compress`` and
            ``unwrap_model``.

    Raises:
        ConfigError: If the name is taken by another factory.
    """
    if _factories().get(name, factory) is not factory:
        raise ConfigError(f"compressor {name!r} is registered already")
    _FACTORIES[name] = factory


def compressor_names() -> list[str]:
    """Names that :func:`create_compressor` knows."""
    return list(_factories())


def create_compressor(
    name: str,
    model: nn.Module,
    config_list: Sequence[Mapping[str, Any]],
    evaluator: Evaluator | None = None,
    **kwargs: Any,
) -> Any:
    """Make a compressor chosen by a string, from one config for all of them.

    Args:
        name: ``"gblr"``, one of NNI's pruners (``level``, ``l1``, ``l2``, ``fpgm``, ``slim``, ``taylor``,
            ``movement``), its quantizers and distillers, or ``agp`` and ``linear``, which drive the pruner named by
            ``pruner`` (default gblr).
        model: The model; see the compressor for what is done to it.
        config_list: NNI's. gblr's own keys are left out for other compressors.
        evaluator: TorchEvaluator or LightningEvaluator, where the compressor trains.
        **kwargs: Further arguments of the compressor.

    Returns:
        The compressor.

    Raises:
        ConfigError: If the name is unknown, an argument does not fit, or the config cannot be used.
    """
    known = _factories()
    factory = known.get(name) if isinstance(name, str) else None
    if factory is None:
        hint = did_you_mean(name, known)
        raise ConfigError(f"compressor: unknown name {name!r}{hint} (allowed: {', '.join(known)})")
    return _call(name, factory, model, config_list, evaluator, **kwargs)
