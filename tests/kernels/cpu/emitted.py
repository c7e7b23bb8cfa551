"""What tests/kernels/cpu/test_processor.py runs: every tile, compiled for processors of many kinds and never run.

A process of its own, which LLVM ends where it has no instruction for what a tile asks. Prints a processor's name after
its tiles were compiled and looked at.
"""

from __future__ import annotations

import llvmlite.binding as llvm
from llvmlite import ir

from gblr_plugin.kernels.cpu import simd, simd_bfloat16
from gblr_plugin.kernels.cpu.processor import abilities_of

X86, ARM, APPLE = "x86_64-unknown-linux-gnu", "aarch64-unknown-linux-gnu", "arm64-apple-darwin"
# Instructions that must be there, and those that must not: "fmaf" is a call of the C library for each number.
PROCESSORS = [
    (X86, "x86-64", ("mulps", "addps"), ("fmaf", "ymm", "zmm")),
    (X86, "x86-64-v2", ("mulps", "addps"), ("fmaf", "ymm", "zmm")),
    (X86, "sandybridge", ("ymm", "vmulps"), ("fmaf", "vfmadd", "zmm")),
    (X86, "x86-64-v3", ("ymm", "vfmadd"), ("fmaf", "zmm")),
    (X86, "x86-64-v4", ("zmm", "vfmadd"), ("fmaf", "bf16")),
    (X86, "skylake-avx512", ("zmm", "vfmadd"), ("fmaf", "bf16")),
    (X86, "znver4", ("zmm", "vfmadd", "vdpbf16ps"), ("fmaf",)),
    (X86, "sapphirerapids", ("zmm", "vfmadd", "vdpbf16ps"), ("fmaf",)),
    (ARM, "generic", ("fmla",), ("fmaf",)),
    (ARM, "neoverse-v1", ("fmla",), ("fmaf",)),
    (APPLE, "apple-m1", ("fmla",), ("fmaf",)),
]


def tiles(bfloat16: bool) -> list[simd.Tile]:
    """Every tile that the kernels choose from."""
    found = [simd.widen_tile()]
    for narrow in (False, True):
        found += [simd.reduce_tile(r, t, narrow) for r in (1, 2, 4, 8) for t in (1, 2)]
        for int8 in (False, True):
            found += [simd.expand_tile(t, v, False, int8, narrow) for t in (1, 2, 4, 8) for v in (1, 2)]
            found += [simd.expand_tile(t, 1, True, int8, narrow) for t in (1, 2, 4, 8)]
            found += [simd.dot_tile(r, int8, narrow) for r in (1, 4)]
        if bfloat16:
            found += [simd_bfloat16.reduce_tile(r, t, narrow) for r in (1, 2, 4, 8) for t in (1, 2)]
            found += [simd_bfloat16.dot_tile(4, narrow), simd_bfloat16.pair_tile(narrow)]
    if bfloat16:
        found += [simd_bfloat16.expand_tile(t, 2, False, woven) for t in (1, 2, 4, 8) for woven in (False, True)]
        found += [simd_bfloat16.expand_tile(8, 1, True), simd_bfloat16.weave_tile()]
    return found


def assembly(triple: str, name: str) -> str:
    """Of all tiles that the kernels would use on a processor."""
    module = ir.Module()
    module.triple = triple
    for number, (arguments, emit) in enumerate(tiles(abilities_of(triple, name, "").bfloat16)):
        kind = ir.FunctionType(ir.VoidType(), [ir.IntType(64)] * arguments)
        function = ir.Function(module, kind, f"tile_{number}")
        builder = ir.IRBuilder(function.append_basic_block())
        emit(builder, function.args)
        builder.ret_void()
    parsed = llvm.parse_assembly(str(module))
    parsed.verify()
    machine = llvm.Target.from_triple(triple).create_target_machine(cpu=name)
    return machine.emit_assembly(parsed)


if __name__ == "__main__":
    llvm.initialize_all_targets()
    llvm.initialize_all_asmprinters()
    for triple, name, there, absent in PROCESSORS:
        text = assembly(triple, name)
        for instruction in there:
            assert instruction in text, (name, instruction)
        for instruction in absent:
            assert instruction not in text, (name, instruction)
        print(name)
