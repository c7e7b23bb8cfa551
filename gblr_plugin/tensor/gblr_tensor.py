"""GBLRTensor: a frozen structured weight that multiplies by its factors, a tensor subclass as torchao makes them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import accumulate
from math import prod
from typing import Any, ClassVar, NoReturn

import torch
from torch import Tensor, nn
from torch._dynamo.decorators import skip
from torch.nn import functional as F
from torch.utils._python_dispatch import is_in_torch_dispatch_mode, return_and_correct_aliasing

from ..errors import ConfigError, GBLRError
from ..kernels import fit, product
from ..kernels.compiled import available, missing
from ..kernels.costs import Costs
from ..kernels.direct import Launcher, launcher
from ..kernels.layout import Block, Layout, interval_facts, narrowed, pack, pack_for, quantize, to_dense, unpack
from ..kernels.measure import is_stale, measured_plan
from ..kernels.plan import BUCKETS, Plan, candidates, fixed_plan, predicted_cost
from ..kernels.soundness import check_index, check_sizes, is_known, vouch
from ..matrix.structure import Intervals, StructuredMatrix
from ..utils.optional_imports import quiet_import
from .frozen import ALWAYS

with quiet_import(
    "gblr_plugin.GBLRTensor", "torchao 0.18", "torchao>=0.18,<0.19"
):  # it lists the libraries that it cannot load
    from torchao.quantization import Int8WeightOnlyConfig, PerRow
    from torchao.quantization.transform_module import _QUANTIZE_CONFIG_HANDLER, register_quantize_module_handler
    from torchao.utils import TorchAOBaseTensor

__all__ = ["GBLRTensor"]

aten = torch.ops.aten
FACTOR_DTYPES = (None, "int8")
_MOST_UNPACKED = 64  # times the factors: what the matrix made of a file may take


_STATE = {"factors", "lists", "packing", "plan", "outer_shape"}  # what files must hold
_PARTS = _STATE | {"scales", "matrix"}


class _Ready:
    """The buffers of a weight that were checked, and the short way to its kernels; no file can hold one."""

    __slots__ = (
        *("call", "packing", "plan", "version"),
        *("factors", "factors_at", "lists", "lists_at", "scales", "scales_at"),
    )

    def __init__(self, weight: GBLRTensor) -> None:
        self.packing, self.plan = weight.packing, weight.plan
        self.factors, self.lists, self.scales = weight.factors, weight.lists, weight.scales
        self.factors_at, self.lists_at = self.factors.data_ptr(), self.lists.data_ptr()
        self.scales_at = 0 if self.scales is None else self.scales.data_ptr()
        self.version = self.lists._version
        self.call: Launcher | None = self._first

    def _first(self, x: Tensor, bias: Tensor | None) -> Tensor | None:
        """Make the short way where it is taken first; a weight that is only on the way to another does not need it."""
        self.call = launcher(self.packing, self.plan, self.factors, self.lists, self.scales)
        return None if self.call is None else self.call(x, bias)

    @skip
    def holds(self) -> bool:
        """Are the buffers in their places, and the lists as they were: asked before every product."""
        lists, scales = self.lists, self.scales
        return (
            lists._version == self.version
            and lists.data_ptr() == self.lists_at
            and self.factors.data_ptr() == self.factors_at
            and (scales is None or scales.data_ptr() == self.scales_at)
        )

    def __deepcopy__(self, memo: Any) -> None:
        """A copy of a weight is checked itself."""


class GBLRTensor(TorchAOBaseTensor):
    """A frozen (m, n) GBLR matrix held as integer intervals and factors, in the storage of a plan of kernels.

    ``F.linear`` and ``F.conv1d`` / ``F.conv2d`` (``groups=1``) multiply by the factors and never form the matrix.
    Gradients reach the input and the bias, not the weight. Build it with :meth:`from_structured`.

    Tensor Attributes:
        factors: (entries,) floating point or int8, the factors block by block, or the dense matrix where the plan says
            so.
        lists: int32, the component list of each block, then row widths, row starts, column widths and column starts.
        scales: Of int8 factors only: (components,), or (rows,) of a dense matrix, in the dtype of the tensor.
        matrix: The matrix itself in the outer shape, beside the factors, where the plan multiplies some or all numbers
            of tokens by it: in small weights structure saves less than it takes to start. Files do not hold it.

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
    _ready: _Ready | None = None

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
        """Wrap buffers packed by :func:`~gblr_plugin.kernels.layout.pack`."""
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
        self.__dict__.update(  # there is nothing to check anew
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
        """What copies and files carry: all but what is made anew."""
        left_out = ("_ready", "matrix", "dense_elements")
        return {key: value for key, value in self.__dict__.items() if key not in left_out}

    def _dense_elements(self) -> tuple[tuple[float, float], ...]:
        """(above, up to) the elements of inputs that meet the matrix, where there is one beside the factors."""
        n, spans = prod(self.outer_shape[1:]), self.plan.dense_tokens
        if spans == ((-1, None),):
            return ALWAYS
        return tuple((float(above * n), float("inf") if to is None else float(to * n)) for above, to in spans)

    def _own_matrix(self) -> Tensor | None:
        """The matrix, where the plan multiplies by it beside factors that can be multiplied out."""
        if not self.plan.keeps_matrix or self.scales is not None or self.packing.dense:
            return None
        return to_dense(self.packing, self.factors, self.lists).reshape(self.outer_shape).contiguous()

    def with_matrix(self) -> GBLRTensor:
        """The weight with the matrix beside its factors where its plan multiplies by it, else itself."""
        matrix = self._own_matrix() if self.matrix is None else None
        if matrix is None:
            return self
        return GBLRTensor(self.factors, self.lists, self.packing, self.plan, self.outer_shape, self.scales, matrix)

    def check(self) -> None:
        """Look whether the buffers hold what the layout says; every use of the weight does so first.

        A weight may come from anywhere: a file, ``__tensor_unflatten__``, an assignment. Buffers that were found
        sound, and were not written to since, are not read again. Tensors without memory, and those under traces, are
        not read at all.

        Raises:
            ConfigError: If they do not.
        """
        _checked(self)

    def _vouched(self, source: GBLRTensor | None = None) -> GBLRTensor:
        """Itself, packed here or (where a source is given) copied from one that was found sound."""
        if source is None or is_known(source.lists, source.packing):
            vouch(self.lists, self.packing)
        return self

    @skip
    def __tensor_flatten__(self) -> Any:
        """As the base's, after a check: compilers take the buffers from here."""
        ready = self._ready
        if type(ready) is not _Ready or not ready.holds():
            _look(self)
        return super().__tensor_flatten__()

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """As the base's, but plain inference by ``F.linear`` goes straight to the compiled kernel."""
        if func is F.linear and not kwargs and not torch.compiler.is_compiling():
            result = _direct_linear(*args)
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
        """Key of compiled programs: all that a trace depends on, as what this machine can run."""
        kinds = self.dtype, self.factors.dtype, self.device.type, available(self.device, self.dtype)
        facts = repr((self.packing, self.plan, self.outer_shape, *kinds))
        return hashlib.sha256(facts.encode()).hexdigest()

    def __setattr__(self, name: str, value: Any) -> None:
        """Set an attribute; another buffer, layout or plan is checked before it is used."""
        if name in _PARTS:
            self.__dict__["_ready"] = None
        elif name in _OWN_NAMES:
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
                number of threads (``gblr_plugin.kernels.fit``). ``"factors"``: the same, but never the matrix
                beside the factors, so less memory. ``"auto"``: measured here and now (with factors as they are, also
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
        taps, int8 = prod(shape[2:]) if len(shape) > 2 else None, factor_dtype == "int8"
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

        ``dtype`` stays what it is: that of inputs, outputs and scales. An int8 weight comes back itself.
        """
        _checked(self)
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

    def settled(self) -> GBLRTensor:
        """The weight with a plan for where it is: itself, or measured anew if its plan was measured elsewhere.

        Elsewhere is another device, processor, dtype or number of threads. Plans that were not measured, or are
        :meth:`~gblr_plugin.kernels.plan.Plan.pinned`, stay as they are, unless they name the compiled kernel where it
        is missing: torch would take their blocks one by one, and a fixed plan is made anew. Files are loaded, and
        weights move between kinds of devices, by way of this.
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
        """Are there real factors in blocks, which can be taken apart."""
        splits = self.packing.transposed and len(self.packing.split_sizes) > 1
        return type(self.factors) is Tensor and not self.factors.is_meta and not splits and not self.packing.dense

    def _lacks_kernel(self, plan: Plan) -> bool:
        """Does a plan name the compiled kernel where it is missing."""
        return "compiled" in dict(plan.kernels).values() and missing(self.device, self.dtype)

    def to_structured(self) -> StructuredMatrix:
        """The components stored, in their order; dense storage comes back as one component per row.

        Factors are floating point, those of int8 as rounded.

        Raises:
            ConfigError: For the transpose of a matrix with row splits.
        """
        _checked(self)
        return unpack(self.packing, self.factors, self.lists, self.scales)

    def _stored_components(self) -> tuple[StructuredMatrix, Any]:
        """The components with factors as they are stored, int8 too, and their scales; without the transposition."""
        _checked(self)
        if self.packing.transposed:
            return self.t()._stored_components()  # type: ignore[no-any-return]  # a GBLRTensor
        if not self.packing.dense:
            matrix = unpack(self.packing, self.factors, self.lists)
            order = interval_facts(self.packing, self.lists)[4].argsort()
            return matrix, None if self.scales is None else self.scales[order]
        (m, n), device = self.packing.shape, self.device
        each = Intervals.of_known(torch.ones(m, dtype=torch.int64, device=device), torch.arange(m, device=device), m)
        rows = torch.eye(m, dtype=self.factors.dtype, device=device)
        whole = Intervals.full(m, n, device)
        return StructuredMatrix(rows, self.factors.view(m, n), each, whole, (m,)), self.scales

    @classmethod
    def _from_int8(cls, matrix: StructuredMatrix, scales: Tensor, shape: tuple[int, ...]) -> GBLRTensor:
        """Pack int8 factors, which are kept as they are, and a scale per component; no component is without cost."""
        real = matrix.to(scales.dtype)
        plan = candidates(real, prod(shape[2:]) if len(shape) > 2 else None, int8=True)[0]
        layout, values, lists = pack(matrix, plan.block_rows, plan.block_cols, plan.even and len(shape) == 2)
        scales = scales[interval_facts(layout, lists)[4]]
        layout, lists = narrowed(layout, lists)
        return cls(values, lists, layout, plan, shape, scales)._vouched()

    def to_dense(self) -> Tensor:
        """The matrix in the outer shape, dtype as stored."""
        _checked(self)
        return to_dense(self.packing, self.factors, self.lists, self.scales).reshape(self.outer_shape)

    def dequantize(self) -> Tensor:
        """Alias of :meth:`to_dense`, the name that torchao and PEFT call."""
        return self.to_dense()

    @property
    def factor_dtype(self) -> str | None:
        """``"int8"`` where factors are narrower than the tensor's dtype, else ``None``."""
        return None if self.scales is None else "int8"

    @property
    def nbytes_stored(self) -> int:
        """Bytes of all buffers: factors, lists, scales and the matrix beside them."""
        parts = (self.factors, self.lists, self.scales, self.matrix)
        return sum(part.nbytes for part in parts if part is not None)

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
        """Number of components stored, K."""
        return self.packing.num_components

    def share_memory_(self) -> NoReturn:
        """Refused: sharing a wrapper without storage of its own crashes the process.

        Raises:
            GBLRError: Always.
        """
        raise GBLRError(
            "GBLR tensor: share_memory_() is not possible; share the state_dict by file (torch.save) instead"
        )


def _checked(weight: GBLRTensor) -> _Ready | None:
    """What :meth:`check` found sound, None where it did not look: what a compiler traces, it looked at before."""
    if torch.compiler.is_compiling():
        return None
    ready = weight._ready
    return ready if type(ready) is _Ready and ready.holds() else _look(weight)


@torch.compiler.disable
def _look(weight: GBLRTensor) -> _Ready | None:
    """Check the parts of a weight that are not known to be sound, and make the matrix that its plan asks for."""
    if not weight.__dict__.keys() >= _PARTS:
        raise ConfigError("GBLR tensor: it has no state, as if a file had named its class alone")
    _check_parts(weight)
    buffers = (weight.factors, weight.lists, *(() if weight.scales is None else (weight.scales,)))
    if weight.lists.is_meta or not product.is_plain(*buffers):
        return None
    if not is_known(weight.lists, weight.packing):
        # A copy: others may hold a file's memory, and tensors of inference mode do not count their changes.
        with torch.inference_mode(False), torch.no_grad():
            lists = weight.lists.detach().clone()
            check_index(weight.packing, lists)
            vouch(lists, weight.packing)
            weight.lists = lists
    if weight.matrix is None and _is_believable(weight):
        weight.matrix = weight._own_matrix()
    weight._ready = ready = _Ready(weight)
    return ready


def _set_state(weight: GBLRTensor, state: Any) -> None:
    """Take what ``__getstate__`` gave; a file may claim anything.

    Its buffers are not read: files of torch's old format fill them later. The first use checks them.
    """
    if not isinstance(state, dict) or not state.keys() >= _STATE:
        raise ConfigError("GBLR tensor: its state is damaged")
    hidden = [key for key in state if not isinstance(key, str) or hasattr(GBLRTensor, key)]
    if hidden:
        raise ConfigError(f"GBLR tensor: its state is damaged, it names {hidden[0]!r}")
    weight.__dict__.update({**state, "scales": state.get("scales"), "matrix": None, "_ready": None})
    _check_parts(weight)
    weight.dense_elements = weight._dense_elements()


def _check_parts(weight: GBLRTensor) -> None:
    """Raise unless layout, plan, shapes and sizes fit together; no value of a buffer is read."""
    layout, plan, shape = weight.packing, weight.plan, weight.outer_shape
    check_sizes(layout, weight.factors, weight.lists, weight.scales)
    if type(plan) is not Plan or not vars(plan):
        raise ConfigError("GBLR tensor: it has no plan")
    m, n = layout.shape
    sizes = shape if type(shape) is tuple and all(type(size) is int for size in shape) else ()
    if len(sizes) not in (2, 3, 4) or min(sizes) < 1 or sizes[0] != m or prod(sizes[1:]) != n:
        raise ConfigError(f"GBLR tensor: its shape {shape!r} does not fit its {m} x {n} layout")
    if len(sizes) > 2 and (layout.transposed or any(b.stop % prod(sizes[2:]) for b in layout.col_blocks)):
        raise ConfigError("GBLR tensor: its blocks of columns do not hold whole channels")
    own = weight.factors if weight.scales is None else weight.scales
    if tuple(weight.shape) != sizes or weight.dtype != own.dtype or weight.device != own.device:
        raise ConfigError(
            f"GBLR tensor: it claims {tuple(weight.shape)}, {weight.dtype} on {weight.device}, "
            f"its buffers are {sizes}, {own.dtype} on {own.device}"
        )
    matrix = weight.matrix
    if matrix is not None and (
        not isinstance(matrix, Tensor) or (matrix.shape, matrix.dtype, matrix.device) != (sizes, own.dtype, own.device)
    ):
        raise ConfigError("GBLR tensor: the matrix beside its factors is of another shape, dtype or device")


def _is_believable(weight: GBLRTensor) -> bool:
    """A file may claim any shape; where dense is faster, the factors are a good part of the matrix."""
    return prod(weight.packing.shape) <= _MOST_UNPACKED * max(weight.factors.numel(), 4096)


def _costs_here(device: torch.device, dtype: torch.dtype, kernel: str) -> Costs:
    def make(matrix: StructuredMatrix, shape: tuple[int, ...], plan: Plan) -> GBLRTensor:
        weight: GBLRTensor = GBLRTensor.from_structured(matrix, shape=shape, plan=plan)
        return weight

    return fit.costs_here(device, dtype, kernel, make)


GBLRTensor.__setstate__ = _set_state  # torchao puts its own in place of a class's
_OWN_NAMES = set(vars(GBLRTensor)) - {"_ready"}
implements = GBLRTensor.implements
implements_torch_function = GBLRTensor.implements_torch_function


def _autocast_dtype(x: Tensor) -> torch.dtype | None:
    """Dtype in which autocast would run a dense product of x; None where it would leave it alone."""
    kind = x.device.type
    if not torch.amp.is_autocast_available(kind) or not torch.is_autocast_enabled(kind):
        return None
    return torch.get_autocast_dtype(kind) if x.is_floating_point() and x.dtype != torch.float64 else None


def _operands(
    x: Tensor, weight: GBLRTensor, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Input, factors, scales and bias in one dtype, autocast's where it is on; int8 factors stay so."""
    factors, scales, dtype = weight.factors, weight.scales, _autocast_dtype(x)
    if dtype is not None:
        x, bias = x.to(dtype), None if bias is None else bias.to(dtype)
        factors, scales = (factors.to(dtype), None) if scales is None else (factors, scales.to(dtype))
    own = factors.dtype if scales is None else scales.dtype
    if x.dtype != own or (bias is not None and bias.dtype != x.dtype):
        raise GBLRError(
            f"GBLR tensor: input, weight and bias must share one dtype, got {x.dtype}, {own}"
            + ("" if bias is None else f" and {bias.dtype}")
        )
    return x, factors, scales, bias


def _no_autocast(x: Tensor) -> AbstractContextManager[Any]:
    return nullcontext() if _autocast_dtype(x) is None else torch.autocast(x.device.type, enabled=False)


def _linear(x: Tensor, weight: GBLRTensor, bias: Tensor | None) -> Tensor:
    _checked(weight)
    m, n = weight.packing.shape
    if x.shape[-1] != n:
        raise GBLRError(f"GBLR tensor: input of shape {tuple(x.shape)} does not fit a {m} x {n} weight")
    if bias is not None and bias.shape != (m,):
        raise GBLRError(f"GBLR tensor: bias of shape {tuple(bias.shape)} does not fit a {m} x {n} weight")
    rows, factors, scales, bias = _operands(x.reshape(-1, n), weight, bias)
    # A trace with a dynamic batch must not ask how many tokens there are.
    tokens = BUCKETS[-1] if torch.compiler.is_compiling() else rows.shape[0]
    kernel = weight.plan.kernel(tokens)
    if kernel == "dense" and weight.matrix is not None and not is_in_torch_dispatch_mode():
        return F.linear(x, weight.matrix, bias)
    with _no_autocast(x):
        y = product.linear(rows, factors, weight.lists, weight.packing, bias, kernel, scales)
    return y.view(*x.shape[:-1], m)


def _direct_linear(x: Tensor, weight: Any, bias: Tensor | None = None) -> Tensor | None:
    """The product without the dispatcher, where nothing but the result is wanted; None where it may not be had so."""
    if type(weight) is not GBLRTensor:
        return None
    ready = weight._ready
    if type(ready) is not _Ready or not ready.holds():
        ready = _checked(weight)
        if ready is None:
            return None
    if ready.call is not None:
        return ready.call(x, bias)
    if ready.scales is None and weight.packing.dense and type(x) is Tensor and x.dtype is ready.factors.dtype:
        return F.linear(x, to_dense(weight.packing, ready.factors, ready.lists), bias)
    return None


@implements(aten.linear.default)
@implements_torch_function(F.linear)
def _(func: Any, types: Any, args: Any, kwargs: Any) -> Tensor:
    def call(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        if not isinstance(weight, GBLRTensor) or isinstance(input, GBLRTensor):
            raise GBLRError("GBLR tensor: only the weight of a product can be a GBLRTensor")
        return _linear(input, weight, bias)

    return call(*args, **kwargs)


def _sizes(value: int | tuple[int, ...], dims: int) -> tuple[int, ...]:
    return (value,) * dims if isinstance(value, int) else tuple(value) * (dims if len(value) == 1 else 1)


@implements_torch_function([F.conv1d, F.conv2d])
def _(func: Any, types: Any, args: Any, kwargs: Any) -> Tensor:
    dims = 1 if func is F.conv1d else 2

    def call(
        input: Tensor,
        weight: GBLRTensor,
        bias: Tensor | None = None,
        stride: int | tuple[int, ...] = 1,
        padding: int | tuple[int, ...] | str = 0,
        dilation: int | tuple[int, ...] = 1,
        groups: int = 1,
    ) -> Tensor:
        if groups != 1:
            raise ConfigError(f"GBLR tensor: convolutions need groups=1, got {groups}")
        if len(weight.outer_shape) != dims + 2 or input.shape[-dims - 1] != weight.outer_shape[1]:
            raise GBLRError(
                f"GBLR tensor: input {tuple(input.shape)} does not fit a convolution weight {weight.outer_shape}"
            )
        _checked(weight)
        x, factors, scales, bias = _operands(input, weight, bias)
        options = (
            _sizes(stride, dims),
            padding if isinstance(padding, str) else _sizes(padding, dims),
            _sizes(dilation, dims),
        )
        batched = x.dim() == dims + 2
        x = x if batched else x.unsqueeze(0)
        with _no_autocast(input):
            kernel = weight.plan.kernels[-1][1]
            if weight.packing.dense:
                dense = to_dense(weight.packing, factors, weight.lists, scales).reshape(weight.outer_shape)
                y = func(x, dense, bias, *options)
            elif kernel == "dense" and weight.matrix is not None and not is_in_torch_dispatch_mode():
                y = func(x, weight.matrix.to(x.dtype), bias, *options)
            else:
                sizes = weight.outer_shape[2:]
                y = product.convolution(x, factors, weight.lists, weight.packing, bias, sizes, *options, kernel, scales)
        result: Tensor = y if batched else y.squeeze(0)
        return result

    return call(*args, **kwargs)


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
            moved.matrix = moved._own_matrix()  # the old one was rounded to the narrow dtype
        if moved.device.type != self.device.type:
            moved = moved.settled()
    return return_and_correct_aliasing(func, args, kwargs, moved)  # type: ignore[no-any-return]  # untyped in torch


def _mode_of(weight: GBLRTensor) -> torch.inference_mode:
    """Whether in inference mode, as the weight was made: torch wants so of what it takes for a view of the weight."""
    return torch.inference_mode(weight.is_inference())


@implements([aten.alias.default, aten.detach.default])
def _(func: Any, types: Any, args: Any, kwargs: Any) -> GBLRTensor:
    self = args[0]
    with _mode_of(self):
        result = self._apply_fn_to_data(func)
    if type(self.lists) is Tensor:
        result.lists = self.lists  # a view made below autograd would count its changes apart
    return return_and_correct_aliasing(func, args, kwargs, result)  # type: ignore[no-any-return]  # untyped in torch


def _transposed(func: Any, args: Any, kwargs: Any) -> GBLRTensor:
    self = args[0]
    ready = _checked(self)
    if len(self.outer_shape) != 2:
        raise GBLRError(f"GBLR tensor: only 2-D weights can be transposed, this one is {self.outer_shape}")
    with _mode_of(self):
        matrix = None if self.matrix is None else self.matrix.t()
        result = GBLRTensor(
            self.factors, self.lists, self.packing.t(), self.plan, self.outer_shape[::-1], self.scales, matrix
        )
    if ready is not None:
        result._ready = _Ready(result)
    return return_and_correct_aliasing(func, args, kwargs, result)  # type: ignore[no-any-return]  # untyped in torch


@implements(aten.t.default)
def _(func: Any, types: Any, args: Any, kwargs: Any) -> GBLRTensor:
    return _transposed(func, args, kwargs)


@implements(aten.transpose.int)
def _(func: Any, types: Any, args: Any, kwargs: Any) -> GBLRTensor:
    if {dim % 2 for dim in args[1:3]} != {0, 1}:
        raise GBLRError(f"GBLR tensor: transpose needs the two axes, got {args[1:3]}")
    return _transposed(func, args, kwargs)


_copy_of_torchao = GBLRTensor._ATEN_OP_TABLE[GBLRTensor][aten.copy_.default]
_clone_of_torchao = GBLRTensor._ATEN_OP_TABLE[GBLRTensor][aten.clone.default]


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
    _checked(source)
    _checked(target)
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


# -- parts of a weight, and weights above or beside each other -------------------------------------------------------

_Change = Callable[[list[StructuredMatrix]], StructuredMatrix]


def _rebuilt(weights: Sequence[GBLRTensor], change: _Change, outer: tuple[int, ...]) -> GBLRTensor:
    """The weight whose matrix is made of those of others by taking and joining components; int8 factors stay as is.

    Args:
        weights: Of one dtype, on one device, all with int8 factors or none.
        change: What to do, by nothing but the intervals of the matrices that it is given.
        outer: Shape of the result.
    """
    if any(type(weight.factors) is not Tensor or weight.factors.is_meta for weight in weights):
        raise GBLRError(
            "GBLR tensor: a weight without values, on the meta device or in a program that is being traced, cannot be "
            "cut or concatenated; do it before"
        )

    def apply(matrices: list[StructuredMatrix]) -> StructuredMatrix:
        pairs = zip(matrices, weights, strict=True)
        return change([matrix.t() if weight.packing.transposed else matrix for matrix, weight in pairs]).live()

    stored = [weight._stored_components() for weight in weights]
    matrix = apply([own for own, _ in stored])
    if weights[0].scales is None:
        return GBLRTensor.from_structured(matrix, shape=outer)  # type: ignore[no-any-return]  # a GBLRTensor
    marked = []  # on the same intervals, matrices that have each component's scale for factors
    for own, scales in stored:
        u, v = (axis.support() * scales[:, None] for axis in (own.rows, own.cols))
        marked.append(StructuredMatrix(u, v, own.rows, own.cols, own.split_sizes))
    return GBLRTensor._from_int8(matrix, apply(marked).u.amax(1), outer)


def _cut(weight: GBLRTensor, dim: int, start: int, length: int) -> Tensor:
    """Indices ``start : start + length`` of one axis, exact: a copy, which torch takes for a view.

    The whole axis is the same buffers again, and no index at all a plain tensor.
    """
    with _mode_of(weight):
        return _cut_in_mode(weight, dim, start, length)


def _cut_in_mode(weight: GBLRTensor, dim: int, start: int, length: int) -> Tensor:
    shape = weight.outer_shape
    if length == shape[dim]:
        return weight._apply_fn_to_data(lambda part: part)  # type: ignore[no-any-return]  # a GBLRTensor
    outer = (*shape[:dim], length, *shape[dim + 1 :])
    if not length:
        return torch.empty(outer, dtype=weight.dtype, device=weight.device)
    taps = prod(shape[2:]) if dim == 1 else 1
    if dim > 1:
        raise GBLRError(f"GBLR tensor: only channels of a convolution can be cut, not axis {dim} of {shape}")
    return _rebuilt([weight], lambda own: own[0].narrow(dim, start * taps, length * taps), outer)


def _axis(weight: GBLRTensor, dim: int) -> int:
    dims = len(weight.outer_shape)
    if not -dims <= dim < dims:
        raise IndexError(f"GBLR tensor: axis {dim} is out of range for a weight of shape {weight.outer_shape}")
    return dim % dims


@implements(aten.slice.Tensor)
def _(func: Any, types: Any, args: Any, kwargs: Any) -> Tensor:
    def call(self: GBLRTensor, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1) -> Tensor:
        if step != 1:
            raise GBLRError(f"GBLR tensor: every {step}th index of an axis has no GBLR structure; slices need step 1")
        dim = _axis(self, dim)
        begin, stop, _ = slice(start, end).indices(self.outer_shape[dim])
        return _cut(self, dim, begin, max(stop - begin, 0))

    return call(*args, **kwargs)


@implements(aten.select.int)
def _(func: Any, types: Any, args: Any, kwargs: Any) -> Tensor:
    """One row or column, or the part of a convolution that belongs to one channel: a plain tensor."""

    def call(self: GBLRTensor, dim: int, index: int) -> Tensor:
        dim = _axis(self, dim)
        size = self.outer_shape[dim]
        if not -size <= index < size:
            raise IndexError(f"GBLR tensor: index {index} is out of range for axis {dim} of length {size}")
        with _mode_of(self):
            piece: Any = _cut(self, dim, index % size, 1)
            row: Tensor = piece.to_dense().select(dim, 0)
            return row

    return call(*args, **kwargs)


@implements([aten.split.Tensor, aten.split_with_sizes.default])
def _(func: Any, types: Any, args: Any, kwargs: Any) -> list[Tensor]:
    def call(self: GBLRTensor, each: int | list[int], dim: int = 0) -> list[Tensor]:
        dim = _axis(self, dim)
        size = self.outer_shape[dim]
        sizes = [min(each, size - at) for at in range(0, size, each)] if isinstance(each, int) else each
        return [_cut(self, dim, end - length, length) for length, end in zip(sizes, accumulate(sizes), strict=True)]

    return call(*args, **kwargs)


@implements([aten.narrow.default, aten.chunk.default])
def _(func: Any, types: Any, args: Any, kwargs: Any) -> Any:
    return func.decompose(*args, **kwargs)  # in inference mode torch does not take them apart itself


@implements(aten.cat.default)
def _(func: Any, types: Any, args: Any, kwargs: Any) -> Tensor:
    """Weights above (``dim=0``) or beside (``dim=1``) each other; exact."""

    def call(tensors: Sequence[Tensor], dim: int = 0) -> Tensor:
        weights = [part for part in tensors if isinstance(part, GBLRTensor) or part.numel()]
        first = next(part for part in weights if isinstance(part, GBLRTensor))
        dim = _axis(first, dim)
        kinds = [(type(part), part.dtype, part.device, getattr(part, "factor_dtype", None)) for part in weights]
        if len(set(kinds)) > 1:
            raise GBLRError(
                "GBLR tensor: only GBLR tensors of one dtype, device and dtype of factors are concatenated, got "
                + ", ".join(f"{kind.__name__} {dtype} {device} {stored}" for kind, dtype, device, stored in kinds)
                + "; to_dense() gives the plain tensor"
            )
        shapes = [tuple(part.shape) for part in weights]
        if dim > 1 or len({(*shape[:dim], *shape[dim + 1 :]) for shape in shapes}) > 1:
            raise GBLRError(f"GBLR tensor: weights of shapes {shapes} are not concatenated along axis {dim}")
        outer = (*shapes[0][:dim], sum(shape[dim] for shape in shapes), *shapes[0][dim + 1 :])
        return _rebuilt(weights, lambda own: StructuredMatrix.cat(own, dim), outer)  # type: ignore[arg-type]  # one type

    return call(*args, **kwargs)


@implements(aten.mm.default)
def _(func: Any, types: Any, args: Any, kwargs: Any) -> Tensor:
    x, weight = args
    if isinstance(x, GBLRTensor):
        return _linear(weight.t(), x, None).t()
    return _linear(x, weight.t(), None)


@implements(aten.addmm.default)
def _(func: Any, types: Any, args: Any, kwargs: Any) -> Tensor:
    bias, x, weight = args
    if kwargs or isinstance(x, GBLRTensor) or bias.dim() != 1:
        raise GBLRError("GBLR tensor: addmm takes a 1-D bias, a plain input and a GBLRTensor, without scaling")
    return _linear(x, weight.t(), bias)


# torchao knows one handler per config: ours takes converted layers and hands everything else on.
_int8_of_torchao = _QUANTIZE_CONFIG_HANDLER[Int8WeightOnlyConfig]


@register_quantize_module_handler(Int8WeightOnlyConfig)
def _int8_transform(module: nn.Module, config: Int8WeightOnlyConfig, *, parameter_name: str = "weight") -> nn.Module:
    """Int8WeightOnlyConfig on a converted layer: int8 factors with a scale per component.

    torchao's FqnToConfig hands parameters only to handlers whose signature has ``parameter_name``.
    """
    weight = getattr(module, parameter_name, None)
    if not isinstance(weight, GBLRTensor):
        handled: nn.Module = _int8_of_torchao(module, config, parameter_name=parameter_name)
        return handled
    if config.granularity != PerRow():
        raise ConfigError(
            f"Int8WeightOnlyConfig: a GBLR layer has one scale per component (PerRow()), got {config.granularity}"
        )
    setattr(module, parameter_name, nn.Parameter(weight.quantize(), requires_grad=False))
    return module


torch.serialization.add_safe_globals([GBLRTensor, Layout, Block, Plan])
