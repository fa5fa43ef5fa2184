"""Where codecs can run on this machine: the kernels for the CPU, and those for a GPU or why there are none."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import Final

import msgspec

from kvstore.cli.bench.machine import cpu_model

__all__ = ["Backend", "Backends", "backends"]

_CUPY: Final = ("cupy-cuda13x", "cupy-cuda12x", "cupy")


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
    if find_spec("cupy") is None:
        return Backend(available=False, text="CuPy is not installed: pip install 'kvstored[cuda]'")
    try:
        import cupy

        runtime = cupy.cuda.runtime
        count = runtime.getDeviceCount()
        if count == 0:
            return Backend(available=False, text=f"CuPy {_cupy_version()} finds no CUDA device")
        properties = runtime.getDeviceProperties(0)
        name = properties["name"].decode()
        more = f" and {count - 1} more" if count > 1 else ""
        return Backend(available=True, text=f"CuPy {_cupy_version()} on {name}{more}")
    except Exception as error:  # a driver that is missing or too old is told by errors of many kinds
        reason = " ".join(str(error).split()) or type(error).__name__
        return Backend(available=False, text=f"no CUDA device can be used: {reason}")


def _cupy_version() -> str:
    for distribution in _CUPY:
        try:
            return version(distribution)
        except PackageNotFoundError:
            continue
    return ""
