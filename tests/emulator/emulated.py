"""Programs of the CUDA kernels built for the CPU, and launched as on a GPU.

The sources are those of the package, but for ``primitives.cuh``, whose functions ``primitives.h`` has for the host.
What a launch may read and write is told to the emulator, which reports everything else.
"""

from __future__ import annotations

import ctypes
import dataclasses
import hashlib
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt
import torch
from emulator.cases import BLOCKS, FILLER, Case, Paged, paged

from kvstore_kernels.codecs import get_codec
from kvstore_kernels.cuda.launch import Launch, Scalar

HERE: Final = Path(__file__).parent
FLAGS: Final = (
    *("-std=c++17", "-O1", "-shared", "-fPIC", "-x", "c++"),
    # Type-punned accesses are fine on a GPU; a context switch by longjmp is not what fortified longjmp allows.
    *("-fno-strict-aliasing", "-ffp-contract=off", "-U_FORTIFY_SOURCE", "-Wno-unknown-pragmas"),
)
SANITIZE: Final = ("-fsanitize=undefined", "-fno-sanitize-recover=undefined", "-fno-sanitize=vptr")

Bytes = npt.NDArray[np.uint8]


class KernelFault(Exception):
    """What the emulator found wrong in a launch."""


@dataclass(frozen=True)
class Memory:
    """Bytes that a launch may touch.

    Attributes:
        array: the bytes; contiguous.
        written: whether kernels write it; then each byte at most once.
    """

    array: npt.NDArray[np.generic]
    written: bool


class _Range(ctypes.Structure):
    _fields_ = [
        ("begin", ctypes.c_uint64),
        ("end", ctypes.c_uint64),
        ("writable", ctypes.c_uint32),
        ("once", ctypes.c_uint32),
    ]


EVERYWHERE: Final = _Range(0, (1 << 64) - 1, 1, 0)


def compiler() -> str | None:
    """The C++ compiler, None where there is none."""
    return shutil.which("g++")


def host_source(source: str) -> str:
    """A program's source with the host's primitives instead of the device's."""
    tables, _, rest = source.partition('#line 1 "primitives.cuh"\n')
    _, found, shared = rest.partition('#line 1 "arithmetic.cuh"\n')
    assert found
    return f'#include "primitives.h"\n{tables}{found}{shared}\n#include "entry.h"\n'


def build_source(source: str, folder: Path, flags: Sequence[str] = ()) -> Emulated:
    """A program's source as a shared library.

    Args:
        source: the device's.
        folder: where libraries are kept; the same one is not built twice.
        flags: for the compiler, besides the usual.
    """
    text = host_source(source)
    digest = hashlib.sha256("\0".join((text, *flags)).encode()).hexdigest()[:16]
    library = folder / f"{digest}.so"
    if not library.exists():
        file = folder / f"{digest}.cpp"
        file.write_text(text)
        made = library.with_suffix(".made")
        command = ["g++", *FLAGS, f"-I{HERE}", *flags, "-o", str(made), str(file)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        if done.returncode:
            raise AssertionError(f"g++ failed:\n{done.stderr[:4000]}")
        made.rename(library)
    return Emulated(ctypes.CDLL(str(library)))


class Emulated:
    """A program's kernels on the CPU."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._kernels = {name: getattr(library, f"emulate_{name}") for name in ("kv_encode", "kv_decode")}
        for kernel in self._kernels.values():
            kernel.restype = ctypes.c_char_p

    def launch(
        self, kernel: str, launch: Launch, memory: Sequence[Memory], *, seed: int = 0, flush_denormals: bool = False
    ) -> npt.NDArray[np.int64]:
        """Run a kernel; counts of void groups.

        Args:
            kernel: ``"kv_encode"`` or ``"kv_decode"``.
            launch: what to run.
            memory: what it may touch, besides the launch's own inputs.
            seed: order of threads: 0 forward, 1 backward, else random.
            flush_denormals: as CuPy's compiler option ``-ftz=true`` does.

        Raises:
            KernelFault: the emulator found something wrong.
        """
        inputs = launch.inputs.copy()
        begin, middle, end = (inputs.ctypes.data + at for at in (0, launch.void_groups_at, inputs.nbytes))
        ranges = [_Range(begin, middle, 0, 0), _Range(middle, end, 1, 0)]
        for each in memory:
            address = each.array.ctypes.data
            ranges.append(_Range(address, address + each.array.nbytes, each.written, each.written))
        arguments = launch.arguments(begin)
        shape = (launch.grid, launch.program.threads, launch.program.shared_bytes(kernel))
        self.run(kernel, *shape, arguments, ranges, seed=seed, flush_denormals=flush_denormals)
        return launch.void_groups(inputs)

    def run(
        self,
        kernel: str,
        grid: Sequence[int],
        threads: int,
        shared_bytes: int,
        arguments: Sequence[Scalar],
        ranges: Sequence[_Range] = (EVERYWHERE,),
        *,
        seed: int = 0,
        flush_denormals: bool = False,
    ) -> None:
        """As a launch of the CUDA driver; without ranges all memory may be touched.

        Raises:
            KernelFault: the emulator found something wrong.
        """
        values = [_C_TYPES[type(value)](int(value)) for value in arguments]
        report = self._kernels[kernel](
            (ctypes.c_uint * 3)(*grid),
            ctypes.c_uint(threads),
            ctypes.c_uint(shared_bytes),
            (ctypes.c_void_p * len(values))(*(ctypes.addressof(value) for value in values)),
            (_Range * len(ranges))(*ranges),
            ctypes.c_uint(len(ranges)),
            ctypes.c_uint(seed),
            ctypes.c_uint(flush_denormals),
        )
        if report:
            raise KernelFault(report.decode())


_C_TYPES: Final = {
    np.int32: ctypes.c_int32,
    np.uint32: ctypes.c_uint32,
    np.int64: ctypes.c_int64,
    np.uint64: ctypes.c_uint64,
}


class EmulatedRunner:
    """Cases on the emulator.

    Args:
        folder: where libraries are kept.
        flags: for the compiler.
        seed: order of threads.
        flush_denormals: as for ``Emulated.launch``.
        change: old and new text of the source, for faulty twins.
    """

    def __init__(
        self,
        folder: Path,
        *,
        flags: Sequence[str] = (),
        seed: int = 0,
        flush_denormals: bool = False,
        change: tuple[str, str] | None = None,
    ) -> None:
        self._folder = folder
        self._flags = flags
        self._launch = {"seed": seed, "flush_denormals": flush_denormals}
        self._change = change

    def prepare(self, case: Case) -> None:
        """Build what the case needs."""
        self._library(self._prepared(case, paged(case, "zeros"), self._payloads(case)[1]))

    def encode(self, case: Case, pages: Paged) -> tuple[list[bytes], list[int]]:
        payloads, addresses = self._payloads(case)
        launch = self._prepared(case, pages, addresses)
        memory = [Memory(_bytes_of(layer), written=False) for layer in pages.layers]
        memory += [self._memory(payload, True) for payload in payloads]
        void_groups = self._library(launch).launch("kv_encode", launch, memory, **self._launch)
        return [payload.tobytes() for payload in payloads], void_groups.tolist()

    def decode(self, case: Case, pages: Paged, payloads: Sequence[bytes]) -> None:
        copies, addresses = self._payloads(case)
        for copy, payload in zip(copies, payloads, strict=True):
            copy[:] = np.frombuffer(payload, np.uint8)
        launch = self._prepared(case, pages, addresses)
        memory = [Memory(_bytes_of(layer), written=True) for layer in pages.layers]
        memory += [self._memory(copy, False) for copy in copies]
        self._library(launch).launch("kv_decode", launch, memory, **self._launch)

    def _memory(self, payload: Bytes, written: bool) -> Memory:
        """What the kernels may touch of a payload."""
        return Memory(payload, written)

    def _payloads(self, case: Case) -> tuple[list[Bytes], npt.NDArray[np.uint64]]:
        size = sum(get_codec(case.codec).max_section_bytes(case.layout))
        payloads = []
        for _ in range(BLOCKS):
            memory = np.full(size + 32, FILLER, np.uint8)
            begin = -memory.ctypes.data % 16 + case.offset
            payloads.append(memory[begin : begin + size])
        return payloads, np.array([payload.ctypes.data for payload in payloads], np.uint64)

    def _prepared(self, case: Case, pages: Paged, addresses: npt.NDArray[np.uint64]) -> Launch:
        kv = dataclasses.replace(pages.kv, device="cuda")
        return Launch(get_codec(case.codec), kv, pages.pages, addresses)

    def _library(self, launch: Launch) -> Emulated:
        source = launch.program.source
        if self._change is not None:
            old, new = self._change
            if old not in source:
                raise AssertionError(f"the source has no {old!r}")
            source = source.replace(old, new)
        return build_source(source, self._folder, self._flags)


def _bytes_of(tensor: torch.Tensor) -> Bytes:
    array: Bytes = tensor.view(torch.uint8).numpy()
    return array
