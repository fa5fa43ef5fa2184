"""How many instructions the CUDA kernels may have: recorded, and what they mean beside the bytes that they move.

``tests/unit/kernels/cuda/budgets.tsv`` has a line for each codec, kernel and architecture, in its fastest form:
bfloat16, 128 channels, 64 tokens a block, pages of 16. ``instructions`` are all of the kernel's; ``path`` those of one
thread's way through a tile of the first and of the second section, where no code needs a clamp and no group is void. A
loop counts once: centred keys have two, of 16 tokens a turn, and what only far and void vectors need counts too. 64
values a thread. ``python -c "import cuda_budgets; cuda_budgets.write()"`` inside ``tests`` records what there is.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
from emulator.cases import FAST
from nvrtc import KernelFacts, compile_kernels, compiler_version

from kvstore_kernels.codecs import get_codec
from kvstore_kernels.cuda.program import COMPILER_OPTIONS, Program, program_for
from kvstore_kernels.layout import KVLayout
from kvstore_kernels.paged import PagedKV, PagedPlanes

FILE: Final = Path(__file__).parent / "unit" / "kernels" / "cuda" / "budgets.tsv"
NAMES: Final = (*FAST, "centred4", "centred3", "centred2")
"""Codecs that lines are of. Other centred ones have the same kernels of keys and of values."""
ARCHITECTURES: Final = (80, 90, 100)
SLACK: Final = 1.03
"""What a count may be above the recorded one."""
VALUES: Final = 64
"""Values of a thread."""
_HEADER: Final = "codec\tkernel\tsm\tregisters\tinstructions\tpath of first\tpath of second\tbytes a thread"


@dataclass(frozen=True)
class Budget:
    """A line of the file."""

    codec: str
    kernel: str
    sm: int
    registers: int
    instructions: int
    first_path: int
    second_path: int
    thread_bytes: float

    def line(self) -> str:
        numbers = (self.sm, self.registers, self.instructions, self.first_path, self.second_path)
        return "\t".join((self.codec, self.kernel, *map(str, numbers), f"{self.thread_bytes:g}"))


def fast_kv(
    dtype: str = "bfloat16", dim: int = 128, tokens: int = 64, page: int = 16, layers: int = 32, heads: int = 8
) -> PagedKV:
    """Pages that are nowhere, of the form that the kernels are fastest with."""
    layout = KVLayout(layers, heads, dim, dtype, tokens)
    token = heads * dim * layout.element_bytes
    bases = np.arange(layers, dtype=np.int64) << 32
    planes = PagedPlanes(bases, page * token, token, dim * layout.element_bytes, layout.element_bytes)
    return PagedKV(layout, page, 1 << 10, (planes, planes), "cuda", None)


def fast_program(codec: str) -> Program:
    return program_for(get_codec(codec), fast_kv(), 256)[0]


def options(sm: int, *more: str) -> tuple[str, ...]:
    return (*COMPILER_OPTIONS, f"-arch=sm_{sm}", *more)


def paths(program: Program, sm: int) -> Iterator[dict[str, KernelFacts]]:
    """The kernels with one section for both, and without the branch for clamped codes."""
    source = program.source
    for name, instead in (("warp_any", "false"), ("block_barrier_any", "(__syncthreads(), false)")):
        if source.count(f"{name}(") == 1:
            continue  # Only defined: the whole kernel is the way.
        source, found = re.subn(rf"#define {name}\(condition\).*", f"#define {name}(condition) {instead}", source)
        assert found == 1
    types = re.findall(r"^using (?:First|Second) = (.*);$", source, re.MULTILINE)
    for only in types:
        one = re.sub(r"^(using (?:First|Second) =) .*;$", rf"\1 {only};", source, flags=re.MULTILINE)
        yield compile_kernels(one, options(sm))[0]


def measure(codec: str, sm: int) -> list[Budget]:
    """The lines of a codec."""
    program = fast_program(codec)
    facts, _ = compile_kernels(program.source, options(sm))
    first, second = paths(program, sm)
    layout = fast_kv().layout
    encoded = sum(get_codec(codec).max_section_bytes(layout))
    values = layout.block_bytes / layout.element_bytes
    moved = VALUES * (layout.element_bytes + encoded / values)
    return [
        Budget(
            codec,
            kernel,
            sm,
            facts[kernel].registers,
            len(facts[kernel].opcodes),
            first[kernel].path,
            second[kernel].path,
            moved,
        )
        for kernel in ("kv_encode", "kv_decode")
    ]


def recorded() -> tuple[str, dict[tuple[str, str, int], Budget]]:
    """Version of the compiler that the file is of, and its lines."""
    version, _, *lines = FILE.read_text(encoding="ascii").splitlines()
    budgets = {}
    for line in lines:
        codec, kernel, *numbers, moved = line.split("\t")
        sm, registers, instructions, first, second = map(int, numbers)
        budgets[codec, kernel, sm] = Budget(codec, kernel, sm, registers, instructions, first, second, float(moved))
    return version.removeprefix("# nvidia-cuda-nvrtc "), budgets


def write() -> None:
    """Record what there is now."""
    lines = [budget.line() for codec in NAMES for sm in ARCHITECTURES for budget in measure(codec, sm)]
    FILE.write_text("\n".join((f"# nvidia-cuda-nvrtc {compiler_version()}", _HEADER, *lines)) + "\n", encoding="ascii")
