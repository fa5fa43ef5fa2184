"""Single functions of the kernels' arithmetic, on the host: what ``gpu`` tests compare a device with, bit by bit."""

from __future__ import annotations

import ctypes
import subprocess
from importlib import resources
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt
from emulator.emulated import FLAGS, HERE

PROBES: Final = (
    *("float_to_half", "half_to_float", "floats_to_halves", "floats_to_bfloats"),
    *("least_bfloats", "greatest_bfloats", "least_halves", "greatest_halves", "least", "greatest"),
    *("reciprocal", "square_root", "divide", "add", "multiply", "pick_bytes"),
    *("e4m3_pair", "e4m3_in_steps", "e4m3_to_halves", "fused_unit", "fused_down", "int_to_float"),
    *("minimum", "maximum"),
)
"""Names of the functions in ``probes.cuh``, by their number there."""

Words = npt.NDArray[np.uint32]


def shared_source() -> str:
    """Arithmetic and probes, to be put behind either side's primitives."""
    arithmetic = (resources.files("kvstore_kernels.cuda") / "sources" / "arithmetic.cuh").read_text(encoding="ascii")
    return arithmetic + (HERE / "probes.cuh").read_text(encoding="ascii")


class HostProbes:
    """The functions on the host; built in a folder."""

    def __init__(self, folder: Path, *flags: str) -> None:
        file, library = folder / "probes.cpp", folder / f"probes{len(flags)}.so"
        loop = (
            'extern "C" void run(u32 which, const u32* a, const u32* b, u32* r, u64 n) {\n'
            "    for (u64 i = 0; i < n; i++) r[i] = probe(which, a[i], b[i]);\n}\n"
        )
        file.write_text(f'#include "primitives.h"\n{shared_source()}{loop}')
        command = ["g++", *FLAGS, "-O2", f"-I{HERE}", *flags, "-o", str(library), str(file)]
        subprocess.run(command, check=True, timeout=300)
        self._run = ctypes.CDLL(str(library)).run

    def __call__(self, name: str, a: Words, b: Words | None = None) -> Words:
        """Results for each pair of words."""
        a = np.ascontiguousarray(a, np.uint32)
        b = a if b is None else np.ascontiguousarray(b, np.uint32)
        result = np.empty(len(a), np.uint32)
        pointers = [ctypes.c_void_p(array.ctypes.data) for array in (a, b, result)]
        self._run(ctypes.c_uint32(PROBES.index(name)), *pointers, ctypes.c_uint64(len(a)))
        return result
