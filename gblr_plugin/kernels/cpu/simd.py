"""Register tiles for the compiled CPU kernels: LLVM vector code behind numba intrinsics. Needs numba.

All tiles take raw addresses (int64) and element strides, and compute in float32 on vectors of 16 lanes. A tile keeps
its sums in registers over its loop, which numba's own loops do not (docs/notes/emitted-kernels.md). Its sizes fit 32
registers of 512 bits, or 16 of 256. int8 factors are widened as they are read, and scaled by the caller. Lists are
int32, or int16 if ``narrow``.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from ...utils.optional_imports import check_version

__all__ = [
    "LANES",
    "Emitter",
    "Tile",
    "choice",
    "dot_tile",
    "expand_tile",
    "function",
    "load_float32",
    "load_int32",
    "load_int64",
    "reduce_tile",
    "take_ticket",
    "widen_tile",
]

check_version("gblr_plugin.kernels", "numba>=0.62,<1")  # older ones know no dot products of bfloat16

LANES = 16
_F32, _I8, _I16, _I32, _I64 = ir.FloatType(), *(ir.IntType(bits) for bits in (8, 16, 32, 64))
_BYTES = ir.VectorType(_I8, LANES)
_VECTOR = ir.VectorType(_F32, LANES)
_MASK = ir.VectorType(ir.IntType(1), LANES)
_ZERO = ir.Constant(_VECTOR, [0.0] * LANES)


def _suffix(kind: ir.VectorType) -> str:
    """How LLVM names its functions of a vector type."""
    name = f"v{kind.count}{'f32' if kind.element == _F32 else kind.element}"
    return f"{name}.p0{name}"


def _bytes(kind: ir.VectorType) -> int:
    """Size of an element, which is all that addresses are aligned to."""
    return 4 if kind.element == _F32 else int(kind.element.width) // 8


class Emitter:
    """The few instructions that the tiles are written in."""

    def __init__(self, builder: ir.IRBuilder) -> None:
        self.b = builder

    def i(self, value: int) -> ir.Constant:
        """An int64 constant."""
        return ir.Constant(_I64, value)

    def at(self, base: Any, offset: Any, size: int = 4) -> Any:
        """Address of element ``offset``."""
        return self.b.add(base, self.b.mul(offset, self.i(size)))

    def load(self, address: Any, kind: Any, align: int = 4) -> Any:
        """A value of an LLVM type at an address."""
        value = self.b.load(self.b.inttoptr(address, kind.as_pointer()))
        value.align = align
        return value

    def entry(self, entries: Any, at: Any, narrow: bool) -> Any:
        """A component of a list of int32, or of int16, as int64."""
        kind, size = (_I16, 2) if narrow else (_I32, 4)
        return self.b.zext(self.load(self.at(entries, at, size), kind, size), _I64)

    def store(self, value: Any, address: Any, align: int = 4) -> None:
        """Write a value to an address."""
        self.b.store(value, self.b.inttoptr(address, value.type.as_pointer())).align = align

    def vector(self, address: Any, mask: Any = None, kind: Any = _VECTOR, align: int | None = None) -> Any:
        """16 numbers side by side, zero where masked out; float32 unless ``kind`` is another vector type."""
        align = align or _bytes(kind)
        if mask is None:
            return self.load(address, kind, align)
        name = f"llvm.masked.load.{_suffix(kind)}"
        function = self.declare(name, ir.FunctionType(kind, [kind.as_pointer(), _I32, _MASK, kind]))
        pointer = self.b.inttoptr(address, kind.as_pointer())
        return self.b.call(function, [pointer, ir.Constant(_I32, align), mask, ir.Constant(kind, None)])

    def store_vector(self, value: Any, address: Any, mask: Any = None) -> None:
        """Write the lanes of a vector that the mask lets through."""
        kind = value.type
        if mask is None:
            self.store(value, address, _bytes(kind))
            return
        name = f"llvm.masked.store.{_suffix(kind)}"
        function = self.declare(name, ir.FunctionType(ir.VoidType(), [kind, kind.as_pointer(), _I32, _MASK]))
        pointer = self.b.inttoptr(address, kind.as_pointer())
        self.b.call(function, [value, pointer, ir.Constant(_I32, _bytes(kind)), mask])

    def bytes(self, address: Any, mask: Any = None) -> Any:
        """16 int8 as float32, zero where masked out."""
        values = self.vector(address, mask, _BYTES)
        return self.b.sitofp(self.b.sext(values, ir.VectorType(_I32, LANES)), _VECTOR)

    def chunks(self, count: Any, initial: list[Any], step: Callable[[Any, list[Any], Any], list[Any]]) -> list[Any]:
        """``step(first index, values, mask)`` for every 16 of ``count`` numbers, masked for those that are left."""
        full = self.b.sdiv(count, self.i(LANES))
        values = self.loop(full, initial, lambda c, values: step(self.b.mul(c, self.i(LANES)), values, None))
        done = self.b.mul(full, self.i(LANES))
        rest = self.b.sub(count, done)
        mask = self.first_lanes(rest)
        some = self.b.zext(self.b.icmp_signed(">", rest, self.i(0)), _I64)
        return self.loop(some, values, lambda _, values: step(done, values, mask))

    def declare(self, name: str, kind: ir.FunctionType) -> Any:
        """An LLVM intrinsic function, declared once per module."""
        module = self.b.module
        return module.globals[name] if name in module.globals else ir.Function(module, kind, name)

    def broadcast(self, scalar: Any) -> Any:
        """A scalar in every lane."""
        nothing = ir.Constant(ir.VectorType(scalar.type, LANES), ir.Undefined)
        single = self.b.insert_element(nothing, scalar, ir.Constant(_I32, 0))
        return self.b.shuffle_vector(single, nothing, ir.Constant(ir.VectorType(_I32, LANES), [0] * LANES))

    def fma(self, a: Any, b: Any, c: Any) -> Any:
        """``a * b + c`` per lane: one instruction where the processor has it, else a product and a sum."""
        kind = ir.FunctionType(_VECTOR, [_VECTOR] * 3)
        return self.b.call(self.declare("llvm.fmuladd.v16f32", kind), [a, b, c])

    def total(self, vector: Any) -> Any:
        """Sum of the lanes, in halves."""
        half = LANES // 2
        while half:
            order = [*range(half, 2 * half)] + [0] * (LANES - half)
            moved = self.b.shuffle_vector(vector, vector, ir.Constant(ir.VectorType(_I32, LANES), order))
            vector = self.b.fadd(vector, moved)
            half //= 2
        return self.b.extract_element(vector, ir.Constant(_I32, 0))

    def with_bias(self, sums: list[Any], bias: Any, read: Callable[[int], Any]) -> list[Any]:
        """Sums plus ``read(j)`` where the address of the bias is not 0."""
        start = self.b.block
        some, ready = self.b.append_basic_block("bias"), self.b.append_basic_block("ready")
        self.b.cbranch(self.b.icmp_signed("!=", bias, self.i(0)), some, ready)
        self.b.position_at_end(some)
        added = [self.b.fadd(value, read(j)) for j, value in enumerate(sums)]
        self.b.branch(ready)
        self.b.position_at_end(ready)
        result = []
        for before, after in zip(sums, added, strict=True):
            phi = self.b.phi(before.type)
            phi.add_incoming(before, start)
            phi.add_incoming(after, some)
            result.append(phi)
        return result

    def first_lanes(self, count: Any) -> Any:
        """Mask of the lanes below ``count``."""
        lanes = ir.Constant(ir.VectorType(_I32, LANES), list(range(LANES)))
        return self.b.icmp_signed("<", lanes, self.broadcast(self.b.trunc(count, _I32)))

    def loop(self, count: Any, initial: list[Any], body: Callable[[Any, list[Any]], list[Any]]) -> list[Any]:
        """``for p in range(count)`` with the values carried in registers; count may be 0."""
        entry, head = self.b.block, self.b.append_basic_block("head")
        inner, done = self.b.append_basic_block("body"), self.b.append_basic_block("done")
        self.b.branch(head)
        self.b.position_at_end(head)
        counter = self.b.phi(_I64)
        counter.add_incoming(self.i(0), entry)
        carried = [self.b.phi(value.type) for value in initial]
        for phi, value in zip(carried, initial, strict=True):
            phi.add_incoming(value, entry)
        self.b.cbranch(self.b.icmp_signed("<", counter, count), inner, done)
        self.b.position_at_end(inner)
        results = body(counter, list(carried))
        end = self.b.block
        counter.add_incoming(self.b.add(counter, self.i(1)), end)
        for phi, value in zip(carried, results, strict=True):
            phi.add_incoming(value, end)
        self.b.branch(head)
        self.b.position_at_end(done)
        return list(carried)


class Tile(NamedTuple):
    """A piece of LLVM code with int64 arguments and no result.

    Attributes:
        arguments: Number of arguments.
        emit: Writes the code at the place of a builder, given the values of the arguments.
    """

    arguments: int
    emit: Callable[[ir.IRBuilder, Any], None]


def choice(tiles: dict[int, Tile]) -> Any:
    """A numba function ``f(key, *arguments)`` that runs the tile of a key; no other key may be given."""
    count = 1 + next(iter(tiles.values())).arguments

    def codegen(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        key, *arguments = values
        done = builder.append_basic_block("done")
        blocks = {number: builder.append_basic_block(f"tile_{number}") for number in tiles}
        switch = builder.switch(key, next(iter(blocks.values())))
        for number, block in blocks.items():
            switch.add_case(ir.Constant(_I64, number), block)
            builder.position_at_end(block)
            tiles[number].emit(builder, arguments)
            builder.branch(done)
        builder.position_at_end(done)
        return context.get_dummy_value()

    return _intrinsic(count, codegen)


def function(tile: Tile) -> Any:
    """A numba function that runs one tile."""

    def codegen(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        tile.emit(builder, values)
        return context.get_dummy_value()

    return _intrinsic(tile.arguments, codegen)


def _intrinsic(arguments: int, codegen: Callable[..., Any]) -> Any:
    def typed(typing_context: Any, *kinds: Any) -> Any:
        return types.none(*([types.int64] * arguments)), codegen

    # numba reads the number of arguments off the signature.
    kind = inspect.Parameter.POSITIONAL_ONLY
    names = ["context", *(f"a{i}" for i in range(arguments))]
    typed.__signature__ = inspect.Signature([inspect.Parameter(name, kind) for name in names])  # type: ignore[attr-defined]  # functions take one
    return intrinsic(typed)


@intrinsic
def load_int32(typing_context: Any, address: Any) -> Any:
    """int32 at an address, as int64."""

    def codegen(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        e = Emitter(builder)
        return builder.sext(e.load(values[0], _I32), _I64)

    return types.int64(types.int64), codegen


@intrinsic
def load_int64(typing_context: Any, address: Any) -> Any:
    """int64 at an address."""

    def codegen(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        return Emitter(builder).load(values[0], _I64, 8)

    return types.int64(types.int64), codegen


@intrinsic
def take_ticket(typing_context: Any, address: Any) -> Any:
    """Counts the int64 at an address up by one, whichever threads do so at once; its value before."""

    def codegen(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        pointer = builder.inttoptr(values[0], _I64.as_pointer())
        return builder.atomic_rmw("add", pointer, ir.Constant(_I64, 1), "seq_cst")

    return types.int64(types.int64), codegen


@intrinsic
def load_float32(typing_context: Any, address: Any) -> Any:
    """float32 at an address."""

    def codegen(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        return Emitter(builder).load(values[0], _F32)

    return types.float32(types.int64), codegen


def reduce_tile(components: int, tiles: int, narrow: bool = False) -> Tile:
    """Stage 1: ``z[list[i], :] += sum_c V[i, c] x[c, :]`` for some components and 16 * tiles tokens.

    Arguments: address of V[first, 0], its row stride; columns; address of x packed (columns, 16), its tile stride;
    address of z packed (K, 16), its tile stride; address of the int32 list entries.
    """

    def emit(builder: ir.IRBuilder, a: Any) -> None:
        e = Emitter(builder)
        v, v_stride, columns, x, x_tile, z, z_tile, entries = a
        targets = []
        for r in range(components):
            row = e.entry(entries, e.i(r), narrow)
            base = e.at(z, e.b.mul(row, e.i(LANES)))
            targets += [e.at(base, e.b.mul(z_tile, e.i(t))) for t in range(tiles)]
        rows = [e.at(v, e.b.mul(v_stride, e.i(r))) for r in range(components)]
        panels = [e.at(x, e.b.mul(x_tile, e.i(t))) for t in range(tiles)]

        def body(c: Any, sums: list[Any]) -> list[Any]:
            inputs = [e.vector(e.at(panel, e.b.mul(c, e.i(LANES)))) for panel in panels]
            result = []
            for r in range(components):
                factor = e.broadcast(e.load(e.at(rows[r], c), _F32))
                result += [e.fma(factor, inputs[t], sums[r * tiles + t]) for t in range(tiles)]
            return result

        sums = e.loop(columns, [e.vector(target) for target in targets], body)
        for value, target in zip(sums, targets, strict=True):
            e.store_vector(value, target)

    return Tile(8, emit)


def expand_tile(tokens: int, vectors: int, masked: bool, int8: bool = False, narrow: bool = False) -> Tile:
    """Stage 2: ``y[t, :] = bias + sum_k z[list[k], t] U[k, :]`` for some tokens and 16 * vectors rows.

    Arguments: address of z[0, first token], its row stride; address of the int32 list, its length; address of
    U[0, first row], its row stride; address of y[first token, first row], its row stride; address of bias[first row] or
    0; lanes used (of the single vector, if masked).
    """

    def emit(builder: ir.IRBuilder, a: Any) -> None:
        e = Emitter(builder)
        z, z_stride, entries, count, u, u_stride, y, y_stride, bias, lanes = a
        mask = e.first_lanes(lanes) if masked else None
        read, size = (e.bytes, 1) if int8 else (e.vector, 4)
        initial = e.with_bias([_ZERO] * vectors, bias, lambda j: e.vector(e.at(bias, e.i(j * LANES)), mask))

        def body(k: Any, sums: list[Any]) -> list[Any]:
            row = e.entry(entries, k, narrow)
            inputs = e.at(z, e.b.mul(row, z_stride))
            places = [e.b.add(e.b.mul(k, u_stride), e.i(j * LANES)) for j in range(vectors)]
            factors = [read(e.at(u, place, size), mask) for place in places]
            result = []
            for t in range(tokens):
                scalar = e.broadcast(e.load(e.at(inputs, e.i(t)), _F32))
                result += [e.fma(scalar, factors[j], sums[t * vectors + j]) for j in range(vectors)]
            return result

        sums = e.loop(count, initial * tokens, body)
        for t in range(tokens):
            target = e.at(y, e.b.mul(y_stride, e.i(t)))
            for j in range(vectors):
                e.store_vector(sums[t * vectors + j], e.at(target, e.i(j * LANES)), mask)

    return Tile(10, emit)


def dot_tile(components: int, int8: bool = False, narrow: bool = False) -> Tile:
    """Stage 1 for one token: ``z[list[i]] += V[i, :] x`` for some components.

    Arguments: address of V[first, 0], its row stride; columns; addresses of x, of z and of the int32 list entries.
    """

    def emit(builder: ir.IRBuilder, a: Any) -> None:
        e = Emitter(builder)
        v, v_stride, columns, x, z, entries = a
        read, size = (e.bytes, 1) if int8 else (e.vector, 4)
        rows = [e.at(v, e.b.mul(v_stride, e.i(r)), size) for r in range(components)]

        def step(at: Any, sums: list[Any], mask: Any) -> list[Any]:
            inputs = e.vector(e.at(x, at), mask)
            return [e.fma(read(e.at(row, at, size), mask), inputs, sums[r]) for r, row in enumerate(rows)]

        sums = e.chunks(columns, [_ZERO] * components, step)
        for r in range(components):
            target = e.at(z, e.entry(entries, e.i(r), narrow))
            e.store(e.b.fadd(e.load(target, _F32), e.total(sums[r])), target)

    return Tile(6, emit)


def widen_tile() -> Tile:
    """int8 to float32.

    Arguments: address of the int8, their number, address of the float32.
    """

    def emit(builder: ir.IRBuilder, a: Any) -> None:
        e = Emitter(builder)
        source, count, target = a

        def step(at: Any, nothing: list[Any], mask: Any) -> list[Any]:
            e.store_vector(e.bytes(e.at(source, at, 1), mask), e.at(target, at), mask)
            return nothing

        e.chunks(count, [], step)

    return Tile(3, emit)
