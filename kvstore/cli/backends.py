"""Where codecs can run on this machine: the kernels for the CPU, and those for a GPU or why there are none."""

from __future__ import annotations

import platform
from dataclasses import replace
from importlib.metadata import version
from importlib.util import find_spec
from typing import Final

import msgspec
import numpy as np

from kvstore.cli.bench.machine import cpu_model
from kvstore_kernels.codecs import Codec
from kvstore_kernels.layout import Layout
from kvstore_kernels.paged import PagedKV

__all__ = ["Backend", "Backends", "backends", "cuda_problem"]

_ALIGNED: Final = 256
_STAND_INS: Final = {"bfloat16": "uint16", "float8_e4m3fn": "uint8", "float8_e5m2": "uint8"}
"""Dtypes of numpy for those that it lacks."""


class Backend(msgspec.Struct, frozen=True, kw_only=True):
    """Kernels for one kind of device.

    Attributes:
        available: whether they run here.
        text: on what they run, or why they do not and what would help.
    """

    available: bool
    text: str


class Backends(msgspec.Struct, frozen=True, kw_only=True):
    """Both kinds."""

    cpu: Backend
    cuda: Backend


def backends() -> Backends:
    """What this machine has. Compiles nothing; where CuPy is installed it is loaded."""
    return Backends(cpu=_cpu(), cuda=_cuda())


def _cpu() -> Backend:
    if find_spec("numba") is None:
        return Backend(available=False, text="numba is not installed: pip install numba")
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as lines:
            model = cpu_model(lines)
    except OSError:
        model = ""
    return Backend(available=True, text=f"numba {version('numba')} on {model or platform.machine()}")


def _cuda() -> Backend:
    from kvstore_kernels.cuda import CudaUnavailable
    from kvstore_kernels.cuda.device import cupy_module

    try:
        cupy = cupy_module()
    except CudaUnavailable as error:
        return Backend(available=False, text=" ".join(str(error).split()))
    properties = cupy.cuda.runtime.getDeviceProperties(0)
    name, capability = properties["name"].decode(), f"{properties['major']}.{properties['minor']}"
    others = cupy.cuda.runtime.getDeviceCount() - 1
    more = f" and {others} more" if others else ""
    return Backend(available=True, text=f"CuPy {cupy.__version__} on {name}{more}, compute capability {capability}")


def cuda_problem(codec: Codec, layout: Layout) -> str:
    """Why the CUDA kernels do not take contiguous blocks of a layout with a codec, "" where they do. Needs no GPU."""
    from kvstore_kernels.cuda import check

    # Shape, strides and addresses are all that is looked at; device memory is aligned like this, or more.
    memory = np.empty(layout.block_bytes + _ALIGNED, np.uint8)
    begin = -int(memory.ctypes.data) % _ALIGNED
    block = memory[begin : begin + layout.block_bytes].view(_STAND_INS.get(layout.dtype, layout.dtype))
    try:
        check(codec, replace(PagedKV.from_tensor(layout, block.reshape(layout.shape)), device="cuda"))
    except ValueError as problem:
        return str(problem)
    return ""
