"""GBLRTensor: a frozen structured weight that multiplies by its factors, a tensor subclass as torchao makes them."""

from __future__ import annotations

import hashlib
from math import prod
from typing import Any, ClassVar, NoReturn

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import ConfigError, GBLRError
from ..kernels import fit
from ..kernels.buffers import interval_facts, quantize, rows_as_components, to_dense, unpack
from ..kernels.compiled import available, missing
from ..kernels.costs import Costs
from ..kernels.layout import Block, Layout
from ..kernels.measure import is_stale, measured_plan
from ..kernels.packing import narrowed, pack, pack_for
from ..kernels.plan import Plan, candidates, fixed_plan, predicted_cost
from ..kernels.soundness import is_known, vouch
from ..matrix.structure import StructuredMatrix
from . import pieces
from ._compat import (
    Int8WeightOnlyConfig,
    PerRow,
    TorchAOBaseTensor,
    aten_functions,
    int8_handler,
    register_quantize_module_handler,
    return_and_correct_aliasing,
    skip,
)
from .frozen import ALWAYS
from .products import convolution, direct_linear, linear
from .weight import BUFFERS, STATE, Checked, check_state, checked, look, taps_of

__all__ = ["GBLRTensor"]

aten = torch.ops.aten
FACTOR_DTYPES = (None, "int8")


class GBLRTensor(TorchAOBaseTensor):
    """A frozen (m, n) GBLR matrix held as integer intervals and factors, laid out by a kernel plan.

    ``F.linear`` and ``F.conv1d`` / ``F.conv2d`` (``groups=1``) multiply by the factors and never form the matrix.
    Gradients reach the input and the bias, not the weight. Build it with :meth:`from_structured`.

    Tensor Attributes:
        factors: (entries,) floating point or int8: the factors block by block, or the dense matrix if the plan says so.
        lists: int32: the component list of each block, then row widths, row starts, column widths and column starts.
        scales: With int8 factors only: (components,), or (rows,) of a dense matrix, in the dtype of the tensor.
        matrix: The dense matrix in the outer shape, beside the factors, where the plan uses it for some or all numbers
            of tokens, since the product of a small weight is not faster by its factors. Files do not hold it.

    Non-Tensor Attributes:
        packing: Static offsets into both buffers (:class:`~gblr_plugin.kernels.layout.Layout`).
        plan: Block sizes and the kernel per number of tokens (:class:`~gblr_plugin.kernels.plan.Plan`).
        outer_shape: Shape that modules see: (m, n), or (c_out, c_in, ...) of a convolution.
    """

    tensor_data_names: ClassVar[list[str]] = ["factors", "lists"]
    tensor_attribute_names: ClassVar[list[str]] = ["packing", "plan", "outer_shape"]
    optional_tensor_data_names: ClassVar[list[str]] = ["scales", "matrix"]

    factors: Tensor
    lists: Tensor
    packing: Layout
    plan: Plan
    outer_shape: tuple[int, ...]
    scales: Tensor | None
    matrix: Tensor | None
    dense_elements: tuple[tuple[float, float], ...]
    _checks: Checked | None = None

    def __new__(
        cls,
        factors: Tensor,
        lists: Tensor,
        packing: Layout,
        plan: Plan,
        outer_shape: tuple[int, ...],
        scales: Tensor | None = None,
        matrix: Tensor | None = None,
    ) -> GBLRTensor:
        """Wrap buffers packed by :func:`~gblr_plugin.kernels.packing.pack`."""
        return torch.Tensor._make_wrapper_subclass(
            cls,
            outer_shape,
            dtype=factors.dtype if scales is None else scales.dtype,
            device=factors.device,
            requires_grad=False,
        )

    def __init__(
        self,
        factors: Tensor,
        lists: Tensor,
        packing: Layout,
        plan: Plan,
        outer_shape: tuple[int, ...],
        scales: Tensor | None = None,
        matrix: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.__dict__.update(  # without the checks of __setattr__
            factors=factors,
            lists=lists,
            packing=packing,
            plan=plan,
            outer_shape=tuple(outer_shape),
            scales=scales,
            matrix=matrix,
        )
        self.dense_elements = self._dense_elements()

    def __getstate__(self) -> dict[str, Any]:
        """What copies and files hold: all but what can be made from the rest."""
        left_out = ("_checks", "matrix", "dense_elements")
        return {key: value for key, value in self.__dict__.items() if key not in left_out}

    def _dense_elements(self) -> tuple[tuple[float, float], ...]:
        """(above, up to) the numbers of elements of the inputs that are multiplied by the matrix beside the factors."""
        n, spans = prod(self.outer_shape[1:]), self.plan.dense_tokens
        if spans == ((-1, None),):
            return ALWAYS
        return tuple((float(above * n), float("inf") if to is None else float(to * n)) for above, to in spans)

    def dense_beside(self) -> Tensor | None:
        """The matrix in the outer shape, where the plan multiplies by it beside floating-point factors, or ``None``."""
        if not self.plan.keeps_matrix or self.scales is not None or self.packing.dense:
            return None
        return to_dense(self.packing, self.factors, self.lists).reshape(self.outer_shape).contiguous()

    def with_matrix(self) -> GBLRTensor:
        """The weight with the dense matrix beside its factors, where its plan uses that, else itself."""
        matrix = self.dense_beside() if self.matrix is None else None
        if matrix is None:
            return self
        return GBLRTensor(self.factors, self.lists, self.packing, self.plan, self.outer_shape, self.scales, matrix)

    def check(self) -> None:
        """Raise unless the buffers hold what the layout says; every use of the weight asks this first.

        Buffers that were found sound, and were not written to since, are not read again. Tensors without memory, and
        those under traces, are not read at all.

        Raises:
            ConfigError: If they do not hold it.
        """
        checked(self)

    def _vouched(self, source: GBLRTensor | None = None) -> GBLRTensor:
        """The weight itself, known to be sound: it was packed here, or copied from a sound ``source``."""
        if source is None or is_known(source.lists, source.packing):
            vouch(self.lists, self.packing)
        return self

    @skip
    def __tensor_flatten__(self) -> Any:
        """As in torchao's class, after a check, since compilers take the buffers from here."""
        checks = self._checks
        if type(checks) is not Checked or not checks.holds():
            look(self)
        return super().__tensor_flatten__()

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """As in torchao's class, but for plain inference ``F.linear`` calls the compiled kernel directly."""
        if func is F.linear and not kwargs and not torch.compiler.is_compiling():
            weight = args[1] if len(args) > 1 else None
            result = direct_linear(*args) if type(weight) is GBLRTensor else None
            if result is not None:
                return result
        return super().__torch_function__(func, types, args, kwargs)

    def __repr__(self) -> str:
        return (
            f"GBLRTensor(shape={tuple(self.outer_shape)}, components={self.num_components}, "
            f"relative_flops={self.relative_flops:.4f}, padding={self.packing.padding:.3f}, "
            f"blocks=({self.plan.block_rows}, {self.plan.block_cols}), dtype={self.dtype}, "
            f"factor_dtype={self.factors.dtype}, device={self.device})"
        )

    def _stable_hash_for_caching(self) -> str:
        """Key of compiled programs: all that a trace depends on, the kernels of this machine among it."""
        kinds = self.dtype, self.factors.dtype, self.device.type, available(self.device, self.dtype)
        facts = repr((self.packing, self.plan, self.outer_shape, *kinds))
        return hashlib.sha256(facts.encode()).hexdigest()

    def __setattr__(self, name: str, value: Any) -> None:
        """Set an attribute; another buffer, layout or plan is checked before it is used."""
        if name in BUFFERS:
            self.__dict__["_checks"] = None
        elif name in _CLASS_NAMES:
            raise ConfigError(f"GBLR tensor: {name} is part of its class and cannot be set")
        super().__setattr__(name, value)

    @classmethod
    @torch.compiler.disable
    def from_structured(
        cls,
        matrix: StructuredMatrix,
        *,
        shape: tuple[int, ...] | None = None,
        plan: Plan | str | None = None,
        factor_dtype: str | None = None,
    ) -> GBLRTensor:
        """Pack a structured matrix.

        Args:
            matrix: The (m, n) weight; its dtype and device are kept, components without cost are dropped.
            shape: Outer shape; (m, n) by default, (c_out, c_in, k...) with c_in * prod(k) = n for a convolution.
            plan: ``None`` or ``"fixed"``: by the cost model, whose numbers are measured once per machine, dtype and
                number of threads (``gblr_plugin.kernels.fit``). ``"factors"``: the same, but without the dense matrix
                beside the factors, which takes less memory. ``"auto"``: measured now (with the factors as given, also
                if they become int8). Or a plan.
            factor_dtype: ``None`` keeps the factors; ``"int8"`` rounds them, see :meth:`quantize`.

        Raises:
            ConfigError: If the shape does not fit, the factors are not floating point, or the plan or the dtype of
                the factors is unknown.
        """
        if factor_dtype not in FACTOR_DTYPES:
            raise ConfigError(f"GBLR tensor: factor_dtype must be None or 'int8', got {factor_dtype!r}")
        m, n = matrix.shape
        shape = (m, n) if shape is None else tuple(int(size) for size in shape)
        if len(shape) not in (2, 3, 4) or shape[0] != m or prod(shape[1:]) != n:
            raise ConfigError(
                f"GBLR tensor: shape {shape} does not fit a {m} x {n} matrix; allowed are 2 to 4 sizes (m, ...) "
                "whose product after the first is n"
            )
        if not matrix.u.is_floating_point() or matrix.v.dtype != matrix.u.dtype:
            raise ConfigError(
                f"GBLR tensor: factors must share one floating-point dtype, got {matrix.u.dtype} and {matrix.v.dtype}"
            )
        matrix = StructuredMatrix(matrix.u.detach(), matrix.v.detach(), matrix.rows, matrix.cols, matrix.split_sizes)
        taps, int8 = taps_of(shape), factor_dtype == "int8"
        if plan == "auto" and len(shape) == 2:
            plan = measured_plan(matrix, int8=int8)
        elif plan is None or plan in ("fixed", "auto"):
            # The time of a convolution depends on the size of its input: its plan follows from the cost model.
            plan = fixed_plan(matrix, taps, int8, costs=_costs_here)
        elif plan == "factors":
            plan = fixed_plan(matrix, taps, int8, beside=False)
        if not isinstance(plan, Plan):
            raise ConfigError(f"GBLR tensor: plan must be 'fixed', 'factors', 'auto' or a Plan, got {plan!r}")
        if plan.block_cols % (taps or 1):
            raise ConfigError(
                f"GBLR tensor: block_cols of a convolution must be a multiple of its {taps} taps, got {plan.block_cols}"
            )
        layout, values, index = pack_for(matrix, plan.block_rows, plan.block_cols, plan.even and len(shape) == 2)
        weight = cls(values, index, layout, plan, shape)._vouched()
        return weight.with_matrix() if factor_dtype is None else weight.quantize()

    @torch.compiler.disable
    def quantize(self) -> GBLRTensor:
        """The weight with int8 factors (weight-only, symmetric) and a scale per component.

        ``dtype`` remains the dtype of inputs, outputs and scales. A weight that is int8 already is returned itself.
        """
        checked(self)
        if self.scales is not None:
            return self
        plan = self.plan.by_factors()
        if self._can_be_replanned() and self._lacks_kernel(plan):
            replanned: GBLRTensor = self.replan("factors").quantize()
            return replanned
        factors, scales = quantize(self.packing, self.factors, self.lists)
        packing, lists = narrowed(self.packing, self.lists)
        return GBLRTensor(factors, lists, packing, plan, self.outer_shape, scales)._vouched()

    def replan(self, plan: Plan | str = "auto") -> GBLRTensor:
        """The same weight under another plan, for example measured anew on the device it now lies on."""
        result: GBLRTensor = self.from_structured(
            self.to_structured(), shape=self.outer_shape, plan=plan, factor_dtype=self.factor_dtype
        )
        return result

    def replanned_here(self) -> GBLRTensor:
        """The weight with a plan for this machine: itself, or measured anew if its plan was measured elsewhere.

        Elsewhere means another device, processor, dtype or number of threads. Plans that were not measured, or are
        :meth:`~gblr_plugin.kernels.plan.Plan.unmeasured`, are kept, unless they name the compiled kernel and it is
        missing here: torch would then multiply by their blocks one by one, so a fixed plan replaces them. This method
        is called for weights that are loaded from files, or moved to another kind of device.
        """
        if not self._can_be_replanned():
            return self
        if is_stale(self.plan, self.device, self.dtype):
            return self.replan("auto")
        if self._lacks_kernel(self.plan):
            return self.replan("fixed")
        if self.packing.narrow and self.scales is None and not self.factors.is_cpu:
            return self.replan(self.plan)  # kernels there take wide lists
        return self

    def _can_be_replanned(self) -> bool:
        """Whether the weight has factors with memory, in blocks, of which a structured matrix can be made again."""
        splits = self.packing.transposed and len(self.packing.split_sizes) > 1
        return type(self.factors) is Tensor and not self.factors.is_meta and not splits and not self.packing.dense

    def _lacks_kernel(self, plan: Plan) -> bool:
        """Whether a plan names the compiled kernel where it is missing."""
        return "compiled" in dict(plan.kernels).values() and missing(self.device, self.dtype)

    def to_structured(self) -> StructuredMatrix:
        """The components in their original order; a dense weight is returned as one component per row.

        Factors are floating point; int8 factors are returned with their rounding.

        Raises:
            ConfigError: For the transpose of a matrix with row splits.
        """
        checked(self)
        return unpack(self.packing, self.factors, self.lists, self.scales)

    def components(self) -> tuple[StructuredMatrix, Tensor | None]:
        """The components with factors as they are kept, int8 too, and their scales; of the matrix that was packed."""
        checked(self)
        if self.packing.transposed:
            return self.t().components()  # type: ignore[no-any-return]  # a GBLRTensor
        if not self.packing.dense:
            order = interval_facts(self.packing, self.lists)[4].argsort()
            scales = None if self.scales is None else self.scales[order]
            return unpack(self.packing, self.factors, self.lists), scales
        return rows_as_components(self.factors.view(self.packing.shape)), self.scales

    @classmethod
    def from_int8(cls, matrix: StructuredMatrix, scales: Tensor, shape: tuple[int, ...]) -> GBLRTensor:
        """Pack int8 factors, which are kept as they are, and a scale per component.

        Args:
            matrix: Components with int8 factors; each of them costs something.
            scales: (components,) floating point, of the dtype that inputs will have.
            shape: Outer shape.
        """
        plan = candidates(matrix.to(scales.dtype), taps_of(shape), int8=True)[0]
        layout, values, lists = pack(matrix, plan.block_rows, plan.block_cols, plan.even and len(shape) == 2)
        scales = scales[interval_facts(layout, lists)[4]]
        layout, lists = narrowed(layout, lists)
        return cls(values, lists, layout, plan, shape, scales)._vouched()

    def to_dense(self) -> Tensor:
        """The matrix in the outer shape, in the dtype of the weight."""
        checked(self)
        return to_dense(self.packing, self.factors, self.lists, self.scales).reshape(self.outer_shape)

    def dequantize(self) -> Tensor:
        """:meth:`to_dense` by the name that torchao and PEFT call."""
        return self.to_dense()

    @property
    def factor_dtype(self) -> str | None:
        """``"int8"`` where factors are narrower than the tensor's dtype, else ``None``."""
        return None if self.scales is None else "int8"

    @property
    def nbytes_stored(self) -> int:
        """Bytes of all buffers: factors, lists, scales and the matrix beside them."""
        buffers = (self.factors, self.lists, self.scales, self.matrix)
        return sum(buffer.nbytes for buffer in buffers if buffer is not None)

    @property
    def stored(self) -> int:
        """Factor entries inside the intervals = multiply-adds of one product, without padding."""
        return self.packing.stored

    @property
    def relative_flops(self) -> float:
        """:attr:`stored` over m * n."""
        m, n = self.packing.shape
        return self.packing.stored / (m * n)

    @property
    def predicted_cost(self) -> float:
        """Cost of one token by the cost model, padding and overheads included, over that of the dense matrix."""
        return predicted_cost(self.packing, self.plan.kernels[-1][1], self.dtype.itemsize)

    @property
    def num_components(self) -> int:
        """Number of components, K."""
        return self.packing.num_components

    def share_memory_(self) -> NoReturn:
        """Refuse to share the memory, since sharing a wrapper without storage of its own crashes the process.

        Raises:
            GBLRError: Always.
        """
        raise GBLRError(
            "GBLR tensor: share_memory_() is not possible; share the state_dict by file (torch.save) instead"
        )


def _set_state(weight: GBLRTensor, state: Any) -> None:
    """Restore the state that ``__getstate__`` gave, after a check, since a file may hold any values.

    The values of the buffers are not read here: files of torch's old format fill them later. The first use checks them.
    """
    if not isinstance(state, dict) or not state.keys() >= STATE:
        raise ConfigError("GBLR tensor: its state is damaged")
    hidden = [key for key in state if not isinstance(key, str) or hasattr(GBLRTensor, key)]
    if hidden:
        raise ConfigError(f"GBLR tensor: its state is damaged, it names {hidden[0]!r}")
    weight.__dict__.update({**state, "scales": state.get("scales"), "matrix": None, "_checks": None})
    check_state(weight)
    weight.dense_elements = weight._dense_elements()


def _costs_here(device: torch.device, dtype: torch.dtype, kernel: str) -> Costs:
    def make(matrix: StructuredMatrix, shape: tuple[int, ...], plan: Plan) -> GBLRTensor:
        weight: GBLRTensor = GBLRTensor.from_structured(matrix, shape=shape, plan=plan)
        return weight

    return fit.costs_here(device, dtype, kernel, make)


GBLRTensor.__setstate__ = _set_state  # torchao puts its own in place of a class's
_CLASS_NAMES = set(vars(GBLRTensor)) - {"_checks"}
implements = GBLRTensor.implements
implements_torch_function = GBLRTensor.implements_torch_function


@implements(aten.linear.default)
@implements_torch_function(F.linear)
def _(func: Any, types: Any, args: Any, kwargs: Any) -> Tensor:
    def call(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        if not isinstance(weight, GBLRTensor) or isinstance(input, GBLRTensor):
            raise GBLRError("GBLR tensor: only the weight of a product can be a GBLRTensor")
        return linear(input, weight, bias)

    return call(*args, **kwargs)


@implements_torch_function([F.conv1d, F.conv2d])
def _(func: Any, types: Any, args: Any, kwargs: Any) -> Tensor:
    return convolution(func, *args, **kwargs)


@implements(aten._to_copy.default)
def _(func: Any, types: Any, args: Any, kwargs: Any) -> GBLRTensor:
    self = args[0]
    options = self._get_to_kwargs(*args[1:], **{k: v for k, v in kwargs.items() if k != "memory_format"})
    dtype = options.pop("dtype")
    if not dtype.is_floating_point:
        raise GBLRError(f"GBLR tensor: factors must stay floating point, got {dtype}")
    int8 = self.scales is not None
    moved = GBLRTensor(
        self.factors.to(**options) if int8 else self.factors.to(dtype=dtype, **options),
        self.lists.to(**options),  # indices move, they are never cast
        self.packing,
        self.plan,
        self.outer_shape,
        self.scales.to(dtype=dtype, **options) if int8 else None,
        None if self.matrix is None else self.matrix.to(dtype=dtype, **options),
    )
    if not torch.compiler.is_compiling():
        moved._vouched(self)
        if moved.matrix is not None and moved.dtype.itemsize > self.dtype.itemsize:
            moved.matrix = moved.dense_beside()  # the old one was rounded to the narrow dtype
        if moved.device.type != self.device.type:
            moved = moved.replanned_here()
    return return_and_correct_aliasing(func, args, kwargs, moved)  # type: ignore[no-any-return]  # untyped in torch


@implements([aten.alias.default, aten.detach.default])
def _(func: Any, types: Any, args: Any, kwargs: Any) -> GBLRTensor:
    self = args[0]
    with pieces.mode_of(self):
        result = self._apply_fn_to_data(func)
    if type(self.lists) is Tensor:
        result.lists = self.lists  # a view made below autograd would count its changes apart
    return return_and_correct_aliasing(func, args, kwargs, result)  # type: ignore[no-any-return]  # untyped in torch


def _transposed(func: Any, args: Any, kwargs: Any) -> GBLRTensor:
    self = args[0]
    checks = checked(self)
    if len(self.outer_shape) != 2:
        raise GBLRError(f"GBLR tensor: only 2-D weights can be transposed, this one is {self.outer_shape}")
    with pieces.mode_of(self):
        matrix = None if self.matrix is None else self.matrix.t()
        result = GBLRTensor(
            self.factors, self.lists, self.packing.t(), self.plan, self.outer_shape[::-1], self.scales, matrix
        )
    if checks is not None:
        result._checks = Checked(result)
    return return_and_correct_aliasing(func, args, kwargs, result)  # type: ignore[no-any-return]  # untyped in torch


@implements(aten.t.default)
def _(func: Any, types: Any, args: Any, kwargs: Any) -> GBLRTensor:
    return _transposed(func, args, kwargs)


@implements(aten.transpose.int)
def _(func: Any, types: Any, args: Any, kwargs: Any) -> GBLRTensor:
    if {dim % 2 for dim in args[1:3]} != {0, 1}:
        raise GBLRError(f"GBLR tensor: transpose needs the two axes, got {args[1:3]}")
    return _transposed(func, args, kwargs)


_copy_of_torchao = aten_functions(GBLRTensor)[aten.copy_.default]
_clone_of_torchao = aten_functions(GBLRTensor)[aten.clone.default]


@implements(aten.clone.default)
def _(func: Any, types: Any, args: Any, kwargs: Any) -> GBLRTensor:
    return _clone_of_torchao(func, types, args, kwargs)._vouched(args[0])  # type: ignore[no-any-return]  # as above


@implements(aten.copy_.default)
def _(func: Any, types: Any, args: Any, kwargs: Any) -> Any:
    target, source = args[:2]
    if not isinstance(source, GBLRTensor):
        raise GBLRError(
            "GBLR tensor: a dense weight cannot be copied into a converted one; load it before convert(), or with "
            "assign=True"
        )
    if not isinstance(target, GBLRTensor):
        raise GBLRError(
            "GBLR tensor: a converted weight cannot be copied into a dense one; load it with assign=True, or a file of "
            "save() with load()"
        )
    checked(source)
    checked(target)
    try:
        return _copy_of_torchao(func, types, args, kwargs)
    except ValueError:
        raise GBLRError(
            "GBLR tensor: only a weight of the same structure and plan can be copied; load with assign=True"
        ) from None


@implements([aten.view.default, aten.new_zeros.default])
def _(func: Any, types: Any, args: Any, kwargs: Any) -> NoReturn:
    raise GBLRError(
        "GBLR tensor: it is not flattened, and no tensor of zeros is like it; of torchao's configs it takes "
        "Int8WeightOnlyConfig; for DistributedDataParallel and fully_shard see keep_frozen_local and frozen_weights of "
        "gblr_plugin.tensor.distributed"
    )


@implements(aten.slice.Tensor)
def _(func: Any, types: Any, args: Any, kwargs: Any) -> Tensor:
    return pieces.slice_of(*args, **kwargs)


@implements(aten.select.int)
def _(func: Any, types: Any, args: Any, kwargs: Any) -> Tensor:
    return pieces.select(*args, **kwargs)


@implements([aten.split.Tensor, aten.split_with_sizes.default])
def _(func: Any, types: Any, args: Any, kwargs: Any) -> list[Tensor]:
    return pieces.split(*args, **kwargs)


@implements(aten.cat.default)
def _(func: Any, types: Any, args: Any, kwargs: Any) -> Tensor:
    return pieces.cat(GBLRTensor, *args, **kwargs)


@implements([aten.narrow.default, aten.chunk.default])
def _(func: Any, types: Any, args: Any, kwargs: Any) -> Any:
    return func.decompose(*args, **kwargs)  # in inference mode torch does not take them apart itself


@implements(aten.mm.default)
def _(func: Any, types: Any, args: Any, kwargs: Any) -> Tensor:
    x, weight = args
    if isinstance(x, GBLRTensor):
        return linear(weight.t(), x, None).t()
    return linear(x, weight.t(), None)


@implements(aten.addmm.default)
def _(func: Any, types: Any, args: Any, kwargs: Any) -> Tensor:
    bias, x, weight = args
    if kwargs or isinstance(x, GBLRTensor) or bias.dim() != 1:
        raise GBLRError("GBLR tensor: addmm takes a 1-D bias, a plain input and a GBLRTensor, without scaling")
    return linear(x, weight.t(), bias)


@register_quantize_module_handler(Int8WeightOnlyConfig)
def _int8_transform(module: nn.Module, config: Int8WeightOnlyConfig, *, parameter_name: str = "weight") -> nn.Module:
    """Int8WeightOnlyConfig on a converted layer: int8 factors with a scale per component; other layers as in torchao.

    torchao's FqnToConfig hands parameters only to handlers whose signature has ``parameter_name``.
    """
    weight = getattr(module, parameter_name, None)
    if not isinstance(weight, GBLRTensor):
        handled: nn.Module = int8_handler(module, config, parameter_name=parameter_name)
        return handled
    if config.granularity != PerRow():
        raise ConfigError(
            f"Int8WeightOnlyConfig: a GBLR layer has one scale per component (PerRow()), got {config.granularity}"
        )
    setattr(module, parameter_name, nn.Parameter(weight.quantize(), requires_grad=False))
    return module


torch.serialization.add_safe_globals([GBLRTensor, Layout, Block, Plan])
