"""Register tiles of ``simd`` for bfloat16, on processors with AVX512-BF16; sums are float32.

The dot-product instruction takes pairs along the summed axis: columns in stage 1, components of a list in stage 2. A
word is such a pair, two bfloat16 in 32 bits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir

from .simd import LANES, Emitter, Tile

__all__ = ["dot_tile", "expand_tile", "pair_tile", "reduce_tile", "weave_tile"]

_I16, _I32 = ir.IntType(16), ir.IntType(32)
_SUMS = ir.VectorType(ir.FloatType(), LANES)
_WORDS = ir.VectorType(_I32, LANES)
_HALVES = ir.VectorType(_I16, LANES)
_ZERO = ir.Constant(_SUMS, [0.0] * LANES)
_NONE = ir.Constant(_HALVES, [0] * LANES)
_WEAVE = ir.Constant(ir.VectorType(_I32, 2 * LANES), [lane // 2 + LANES * (lane % 2) for lane in range(2 * LANES)])


class _BFloat(ir.Type):
    """LLVM's bfloat, which llvmlite does not have."""

    def _to_string(self) -> str:
        return "bfloat"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _BFloat)

    def __hash__(self) -> int:
        return hash(_BFloat)


_PAIRS = ir.VectorType(_BFloat(), 2 * LANES)
_SINGLES = ir.VectorType(_BFloat(), LANES)


class _PairEmitter(Emitter):
    def words(self, address: Any, mask: Any = None) -> Any:
        """16 pairs."""
        return self.b.bitcast(self.vector(address, mask, _WORDS, align=2), _PAIRS)

    def broadcast_word(self, address: Any) -> Any:
        """One pair in every lane."""
        return self.b.bitcast(self.broadcast(self.load(address, _I32, 2)), _PAIRS)

    def dot(self, sums: Any, a: Any, b: Any) -> Any:
        kind = ir.FunctionType(_SUMS, [_SUMS, _PAIRS, _PAIRS])
        return self.b.call(self.declare("llvm.x86.avx512bf16.dpbf16ps.512", kind), [sums, a, b])

    def halves(self, address: Any, mask: Any) -> Any:
        """16 bfloat16, as bits."""
        return self.vector(address, mask, _HALVES)

    def in_pairs(self, count: Any, initial: list[Any], step: Callable[[Any, list[Any], bool], list[Any]]) -> list[Any]:
        """``step(pair, values, complete)`` for every two of ``count`` rows, and for a last row without a partner."""
        full = self.b.sdiv(count, self.i(2))
        values = self.loop(full, initial, lambda p, values: step(p, values, True))
        return self.loop(self.b.srem(count, self.i(2)), values, lambda _, values: step(full, values, False))

    def weave(self, first: Any, second: Any) -> Any:
        """Pairs of the lanes of two vectors."""
        return self.b.bitcast(self.b.shuffle_vector(first, second, _WEAVE), _PAIRS)

    def widen(self, halves: Any) -> Any:
        shifted = self.b.shl(self.b.zext(halves, _WORDS), ir.Constant(_WORDS, [16] * LANES))
        return self.b.bitcast(shifted, _SUMS)

    def store_rounded(self, sums: Any, address: Any, mask: Any) -> None:
        kind = ir.FunctionType(_SINGLES, [_SUMS])
        rounded = self.b.call(self.declare("llvm.x86.avx512bf16.cvtneps2bf16.512", kind), [sums])
        self.store_vector(self.b.bitcast(rounded, _HALVES), address, mask)


def reduce_tile(components: int, tiles: int, narrow: bool = False) -> Tile:
    """Stage 1 of :func:`~gblr_plugin.kernels.cpu.simd.reduce_tile`.

    Arguments as there, but: V and its stride in bfloat16; columns in pairs; x packed as (pairs, 16) words. z is
    float32.
    """

    def emit(builder: ir.IRBuilder, a: Any) -> None:
        e = _PairEmitter(builder)
        v, v_stride, pairs, x, x_tile, z, z_tile, entries = a
        targets = []
        for r in range(components):
            row = e.entry(entries, e.i(r), narrow)
            base = e.at(z, e.b.mul(row, e.i(LANES)))
            targets += [e.at(base, e.b.mul(z_tile, e.i(t))) for t in range(tiles)]
        rows = [e.at(v, e.b.mul(v_stride, e.i(r)), 2) for r in range(components)]
        panels = [e.at(x, e.b.mul(x_tile, e.i(t))) for t in range(tiles)]

        def body(p: Any, sums: list[Any]) -> list[Any]:
            inputs = [e.words(e.at(panel, e.b.mul(p, e.i(LANES)))) for panel in panels]
            result = []
            for r in range(components):
                factor = e.broadcast_word(e.at(rows[r], p))
                result += [e.dot(sums[r * tiles + t], factor, inputs[t]) for t in range(tiles)]
            return result

        sums = e.loop(pairs, [e.vector(target) for target in targets], body)
        for value, target in zip(sums, targets, strict=True):
            e.store_vector(value, target)

    return Tile(8, emit)


def dot_tile(components: int, narrow: bool = False) -> Tile:
    """Stage 1 for one token: ``z[list[i], 0] += V[i, :] x`` for some components.

    Arguments: address of V[first, 0], its row stride; columns in pairs; address of x, bfloat16 side by side; address of
    z packed (K, 16) float32; address of the list entries.
    """

    def emit(builder: ir.IRBuilder, a: Any) -> None:
        e = _PairEmitter(builder)
        v, v_stride, pairs, x, z, entries = a
        rows = [e.at(v, e.b.mul(v_stride, e.i(r)), 2) for r in range(components)]

        def step(at: Any, sums: list[Any], mask: Any) -> list[Any]:
            inputs = e.words(e.at(x, at), mask)
            return [e.dot(sums[r], e.words(e.at(row, at), mask), inputs) for r, row in enumerate(rows)]

        sums = e.chunks(pairs, [_ZERO] * components, step)
        for r in range(components):
            target = e.at(z, e.b.mul(e.entry(entries, e.i(r), narrow), e.i(LANES)))
            e.store(e.b.fadd(e.load(target, ir.FloatType()), e.total(sums[r])), target)

    return Tile(6, emit)


def pair_tile(narrow: bool = False) -> Tile:
    """Rounds the rows of z that a list names and weaves them into pairs.

    Arguments: address of z packed (K, 16) float32; address of the list, its length; address of the (pairs, 16) words.
    """

    def emit(builder: ir.IRBuilder, a: Any) -> None:
        e = _PairEmitter(builder)
        z, entries, count, out = a

        def row(at: Any) -> Any:
            return e.vector(e.at(z, e.b.mul(e.entry(entries, at, narrow), e.i(LANES))))

        def put(p: Any, first: Any, second: Any) -> None:
            kind = ir.FunctionType(_PAIRS, [_SUMS, _SUMS])
            both = e.b.call(e.declare("llvm.x86.avx512bf16.cvtne2ps2bf16.512", kind), [second, first])
            both = e.b.bitcast(both, ir.VectorType(_I16, 2 * LANES))
            woven = e.b.shuffle_vector(both, both, _WEAVE)
            e.store(e.b.bitcast(woven, _WORDS), e.at(out, e.b.mul(p, e.i(LANES))))

        def step(p: Any, nothing: list[Any], complete: bool) -> list[Any]:
            at = e.b.mul(p, e.i(2))
            put(p, row(at), row(e.b.add(at, e.i(1))) if complete else _ZERO)
            return nothing

        e.in_pairs(count, [], step)

    return Tile(4, emit)


def weave_tile() -> Tile:
    """Rows of U two by two into words, the last with zeros where there is an odd number, for many tokens.

    Arguments: address of U; number of rows; their length, a multiple of 16; address of the words, (pairs, length).
    """

    def emit(builder: ir.IRBuilder, a: Any) -> None:
        e = _PairEmitter(builder)
        u, count, width, out = a
        vectors = e.b.sdiv(width, e.i(LANES))

        def weave_rows(p: Any, nothing: list[Any], complete: bool) -> list[Any]:
            first_row = e.at(u, e.b.mul(e.b.mul(p, e.i(2)), width), 2)
            words = e.at(out, e.b.mul(p, width))

            def step(j: Any, _: list[Any]) -> list[Any]:
                at = e.b.mul(j, e.i(LANES))
                top = e.halves(e.at(first_row, at, 2), None)
                bottom = e.halves(e.at(first_row, e.b.add(at, width), 2), None) if complete else _NONE
                e.store(e.b.bitcast(e.weave(top, bottom), _WORDS), e.at(words, at))
                return []

            e.loop(vectors, [], step)
            return nothing

        e.in_pairs(count, [], weave_rows)

    return Tile(4, emit)


def expand_tile(tokens: int, vectors: int, masked: bool, woven: bool = False) -> Tile:
    """Stage 2 of :func:`~gblr_plugin.kernels.cpu.simd.expand_tile`.

    Arguments: address of the words of the first token; number of components; address of U[0, first row], its row
    stride; address of y[first token, first row], its row stride; address of bias[first row] or 0; lanes used (if
    masked). U, y and bias are bfloat16; or, if ``woven``, U is given as the words of :func:`weave_tile`.
    """

    def emit(builder: ir.IRBuilder, a: Any) -> None:
        e = _PairEmitter(builder)
        z, count, u, u_stride, y, y_stride, bias, lanes = a
        mask = e.first_lanes(lanes) if masked else None
        halves = [e.at(bias, e.i(j * LANES), 2) for j in range(vectors)]
        initial = e.with_bias([_ZERO] * vectors, bias, lambda j: e.widen(e.halves(halves[j], mask)))

        def products(p: Any, sums: list[Any], factors: list[Any]) -> list[Any]:
            inputs = e.at(z, e.b.mul(p, e.i(LANES)))
            result = []
            for t in range(tokens):
                pair = e.broadcast_word(e.at(inputs, e.i(t)))
                result += [e.dot(sums[t * vectors + j], pair, factors[j]) for j in range(vectors)]
            return result

        def woven_step(p: Any, sums: list[Any]) -> list[Any]:
            row = e.at(u, e.b.mul(p, u_stride))
            return products(p, sums, [e.words(e.at(row, e.i(j * LANES))) for j in range(vectors)])

        def step(p: Any, sums: list[Any], complete: bool) -> list[Any]:
            first_row = e.at(u, e.b.mul(e.b.mul(p, e.i(2)), u_stride), 2)
            second_row = e.at(first_row, u_stride, 2)
            factors = []
            for j in range(vectors):
                offset = e.i(j * LANES)
                top = e.halves(e.at(first_row, offset, 2), mask)
                factors.append(e.weave(top, e.halves(e.at(second_row, offset, 2), mask) if complete else _NONE))
            return products(p, sums, factors)

        if woven:
            pairs = e.b.sdiv(e.b.add(count, e.i(1)), e.i(2))
            sums = e.loop(pairs, initial * tokens, woven_step)
        else:
            sums = e.in_pairs(count, initial * tokens, step)
        for t in range(tokens):
            target = e.at(y, e.b.mul(y_stride, e.i(t)), 2)
            for j in range(vectors):
                e.store_rounded(sums[t * vectors + j], e.at(target, e.i(j * LANES), 2), mask)

    return Tile(8, emit)
