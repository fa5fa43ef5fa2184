"""Facts of the machine that a benchmark ran on: without them its figures mean nothing."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version

import msgspec
import psutil
import zmq

__all__ = ["MachineFacts", "cpu_model", "machine_facts"]


class MachineFacts(msgspec.Struct, kw_only=True):
    """Hardware and software of one run.

    Attributes:
        cpu: model name, the architecture where the system gives none.
        cores: cores this process may run on.
        memory_bytes: of the machine.
        kernel: name and release.
        python: version.
        pyzmq: version.
        libzmq: version.
        msgspec: version.
        uvloop: version, "" where it is not installed.
        numba: version of what compiles the mapped path, "" where it is not installed.
        load_average: of 1, 5 and 15 minutes, before the run.
    """

    cpu: str
    cores: int
    memory_bytes: int
    kernel: str
    python: str
    pyzmq: str
    libzmq: str
    msgspec: str
    uvloop: str
    load_average: tuple[float, float, float]
    numba: str = ""


def machine_facts() -> MachineFacts:
    """The facts of this machine now."""
    one, five, fifteen = os.getloadavg()
    return MachineFacts(
        cpu=_cpu_of_this_machine(),
        cores=len(os.sched_getaffinity(0)),
        memory_bytes=psutil.virtual_memory().total,
        kernel=f"{platform.system()} {platform.release()}",
        python=platform.python_version(),
        pyzmq=zmq.pyzmq_version(),
        libzmq=zmq.zmq_version(),
        msgspec=_version("msgspec"),
        uvloop=_version("uvloop"),
        load_average=(round(one, 2), round(five, 2), round(fifteen, 2)),
        numba=_version("numba"),
    )


def cpu_model(cpuinfo: Iterable[str]) -> str:
    """Model name from the lines of ``/proc/cpuinfo``, "" where they give none (many arm64 machines)."""
    for line in cpuinfo:
        name, _, value = line.partition(":")
        if name.strip() == "model name" and value.strip():
            return value.strip()
    return ""


def _cpu_of_this_machine() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as lines:
            model = cpu_model(lines)
    except OSError:
        model = ""
    return model or platform.machine()


def _version(distribution: str) -> str:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return ""
