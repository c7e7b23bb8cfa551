"""What the processor for which numba compiles can do, as LLVM knows it. Needs numba.

It is this machine's, unless ``NUMBA_CPU_NAME``, ``NUMBA_CPU_FEATURES`` or ``NUMBA_ENABLE_AVX`` say otherwise.
Only LLVM knows the features that a name stands for. So a few lines are compiled to assembly, which is never run, and
the instructions that LLVM chose show the features.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import llvmlite.binding as llvm

__all__ = ["Abilities", "abilities", "abilities_of"]

_PROGRAM = """
target triple = "{triple}"
define void @add(ptr %from, ptr %to) {{
  %x = load <16 x float>, ptr %from, align 4
  %y = fadd <16 x float> %x, %x
  store <16 x float> %y, ptr %to, align 4
  ret void
}}
define void @round(ptr %from, ptr %to) {{
  %x = load <16 x float>, ptr %from, align 4
  %y = fptrunc <16 x float> %x to <16 x bfloat>
  store <16 x bfloat> %y, ptr %to, align 2
  ret void
}}
"""


class Abilities(NamedTuple):
    """The features of a processor on which the compiled kernels depend.

    Attributes:
        wide: Vectors of 16 float32 in one of 32 registers (AVX-512).
        bfloat16: Dot products of as many pairs of bfloat16 (AVX512-BF16).
    """

    wide: bool
    bfloat16: bool


def abilities_of(triple: str, name: str, features: str) -> Abilities:
    """The features of a processor.

    Args:
        triple: Platform, as ``"x86_64-unknown-linux-gnu"``; its target must be initialised.
        name: Processor, as LLVM names it.
        features: Switches such as ``"+avx2,-avx512f"``, on top of what the name stands for.

    Raises:
        RuntimeError: If this LLVM has no such platform.
    """
    machine = llvm.Target.from_triple(triple).create_target_machine(cpu=name, features=features)
    assembly = machine.emit_assembly(llvm.parse_assembly(_PROGRAM.format(triple=triple)))
    wide = "%zmm" in assembly
    # Some processors without AVX-512 round to bfloat16 too, in shorter registers.
    return Abilities(wide, wide and "vcvtneps2bf16" in assembly)


@cache
def abilities() -> Abilities:
    """The features of the processor for which numba compiles in this process."""
    from numba.core.registry import cpu_target  # here, so that asking about another processor needs llvmlite alone

    return abilities_of(*cpu_target.target_context.codegen().magic_tuple())
