"""NNI's wrapper and target space for a structured layer: a target without a tensor, a mask without storage."""

from __future__ import annotations

import inspect
import logging
import weakref
from types import MethodType
from typing import Any

import torch
from nni.compression.base.target_space import PruningTargetSpace, TargetType
from nni.compression.base.wrapper import ModuleWrapper
from nni.compression.utils import check_bias
from torch import Tensor

from ..errors import ConfigError, GBLRError
from ..layers import GBLRLayer
from ._compat import is_wrapped, wrapper_of

__all__ = ["GBLRTargetSpace", "GBLRWrapper", "layer_support"]

_logger = logging.getLogger(__name__)


@torch.no_grad()
def layer_support(layer: GBLRLayer) -> Tensor:
    """Where a layer's present intervals lie: 1 inside at least one block, else 0.

    Args:
        layer: Linear (m, n), or a convolution.

    Returns:
        Float tensor of the dense weight's shape: (m, n), or (c_out, c_in, *kernel) for convolutions.
    """
    rows, cols = layer.intervals()
    splits = layer.row_splits
    row_support = rows.support().float().view(splits, -1, rows.length)
    col_support = cols.support().float().view(splits, -1, cols.length)
    covered = (row_support.transpose(1, 2) @ col_support).flatten(0, 1) > 0
    kernel = getattr(layer, "kernel_size", None)
    shape = layer.matrix_shape if kernel is None else (layer.matrix_shape[0], layer.in_channels, *kernel)
    return covered.to(layer.U.dtype).view(shape)


class GBLRTargetSpace(PruningTargetSpace):
    """The weight of a structured layer, which is no parameter: NNI reads goals, shape and support here."""

    def _register_target(self) -> None:
        """The layer keeps its factors; there is nothing to hand to the wrapper."""

    def _register_mask(self) -> None:
        """The support is computed when it is asked for."""

    @property
    def target(self) -> None:
        """There is no dense tensor."""
        return None

    @property
    def shape(self) -> list[int]:
        """Shape of the dense weight."""
        layer = self._wrapper.module
        kernel = getattr(layer, "kernel_size", None)
        return list(layer.matrix_shape) if kernel is None else [layer.matrix_shape[0], layer.in_channels, *kernel]

    @property
    def mask(self) -> Tensor:
        """The support, see :func:`layer_support`."""
        return layer_support(self._wrapper.module)

    @mask.setter
    def mask(self, value: Any) -> None:
        raise GBLRError(
            f"layer {self._wrapper.name!r}: the mask of a structured layer follows from its intervals and cannot be "
            "set; load the layer's state_dict instead"
        )


class GBLRWrapper(ModuleWrapper):
    """NNI's module wrapper for a structured layer.

    The layer keeps its parameters, so that the keys of ``state_dict`` are the same wrapped and unwrapped, and is called
    directly unless activations are observed (distillers) or quantized.

    Args:
        module: Structured layer.
        module_name: Its name in the model.
    """

    module: GBLRLayer
    pruning_target_spaces: dict[str, GBLRTargetSpace]

    def __init__(self, module: GBLRLayer, module_name: str) -> None:
        super().__init__(module, module_name, {})
        self._owner: weakref.ref[Any] | None = None

    @classmethod
    def rebind(cls, wrapper: ModuleWrapper, module: GBLRLayer) -> GBLRWrapper:
        """Turn the wrapper of a dense layer, that other compressors hold, into that of the structured one, in place."""
        wrapper.__class__ = cls
        object.__setattr__(wrapper, "module", module)
        wrapper.__dict__.pop("module_forward", None)
        wrapper._owner = None
        wrapper._input_args_spec = inspect.getfullargspec(type(module).forward)
        rebound: GBLRWrapper = wrapper
        return rebound

    @staticmethod
    def check_rebindable(wrapper: ModuleWrapper) -> None:
        """Raise a ConfigError if another compressor has targets on the layer's parameters."""
        for mode, spaces in (
            ("pruner", wrapper.pruning_target_spaces),
            ("quantizer", wrapper.quantization_target_spaces),
        ):
            for target, space in spaces.items():
                if space.type is TargetType.PARAMETER:
                    raise ConfigError(
                        f"layer {wrapper.name!r}: its {target} belongs to a {mode} already; a structured layer works "
                        "beside activation quantizers and distillers only"
                    )

    @property
    def module_forward(self) -> MethodType:
        """The layer's own forward. Derived from its class, so that copies and pickles of a wrapped model are right."""
        return MethodType(type(self.module).forward, self.module)

    @module_forward.setter
    def module_forward(self, value: Any) -> None:
        """The base class stores it here."""

    @property
    def owner(self) -> Any:
        """The gblr pruner that made this wrapper, while it lives."""
        return None if self._owner is None else self._owner()

    @owner.setter
    def owner(self, pruner: Any) -> None:
        self._owner = weakref.ref(pruner)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_owner": None}  # weak references cannot be copied, nor should a copy have an owner

    def extend_target_spaces(self, sub_config: dict[str, Any], mode: str) -> dict[str, Any]:
        """As NNI's; refuses targets on parameters, which a structured layer has in another form.

        Raises:
            ConfigError: For a weight or bias quantizer, or a second pruner, on this layer.
        """
        targets = sub_config.get("target_names")
        if mode == "quantization":
            refused = [name for name in targets or () if not name.startswith(("_input_", "_output_"))]
            refused += [name for name in sub_config.get("target_settings") or () if not name.startswith("_")]
            if refused:
                self._refuse(
                    f"layer {self.name!r}: a {refused[0]} quantizer cannot work on a structured layer while it trains; "
                    "quantize its activations (target_names: ['_input_', '_output_']), or the factors after converting"
                )
            if not targets:
                _logger.warning("layer %r is structured: of its targets only activations are quantized", self.name)
        elif mode == "pruning" and self.pruning_target_spaces:
            self._refuse(
                f"layer {self.name!r} is compressed by gblr already; leave it out of the other pruner's config_list"
            )
        extended: dict[str, Any] = super().extend_target_spaces(sub_config, mode)
        return extended

    def _refuse(self, message: str) -> None:
        # A fusion unwraps the first compressor before the second is made: leave things as they were.
        if self.owner is not None and not is_wrapped(self.owner):
            self.owner.wrap_model()
        raise ConfigError(message)

    def _create_target_spaces(self, settings: dict[str, Any], target_space_cls: type) -> dict[str, Any]:
        kind = GBLRTargetSpace if target_space_cls is PruningTargetSpace else target_space_cls
        created: dict[str, Any] = super()._create_target_spaces(settings, kind)
        return created

    def register_fusion_info(self) -> None:
        """A quantizer's ``fuse_names`` fold nothing into factors: the layer keeps its bias."""
        self.is_bias, self.is_register_bias = check_bias(self.module), False

    def unwrap(self) -> None:
        """As NNI's, leaving no instance attribute behind; a no-op on an unwrapped layer."""
        if wrapper_of(self.module) is None:
            return
        super().unwrap()
        self.module.__dict__.pop("forward", None)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The layer itself, or between observed and quantized activations.

        Modules that a quantizer fuses with the layer run between it and its quantized output; their own wrappers pass
        it on.
        """
        if not self.quantization_target_spaces and not self.distillation_target_spaces:
            return self.module_forward(*args, **kwargs)
        if getattr(self, "is_bias_correction", False):
            if self.fused_modules:
                raise ConfigError(
                    f"layer {self.name!r}: is_bias_correction measures a structured layer without fuse_names only; "
                    "leave one of them out"
                )
            # NNI's own forward measures the correction; it must not see the target without a tensor.
            spaces, self.pruning_target_spaces = self.pruning_target_spaces, {}
            try:
                return super().forward(*args, **kwargs)
            finally:
                self.pruning_target_spaces = spaces
        args, kwargs = self.patch_inputs(*args, **kwargs)
        outputs = self.module_forward(*args, **kwargs)
        for module in self.fused_modules[1:]:
            wrapper: Any = wrapper_of(module)
            outputs = wrapper.module_forward(outputs)
        return self.patch_outputs(outputs)
