"""The part of CuPy that ``kvstore_kernels.cuda`` uses, on the CPU: memory is numpy's, kernels run on the emulator.

It notes what was done with it (``log``), and refuses what a device would: a launch on another device or stream than the
one that is current, or more shared memory than a kernel has asked for.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from emulator.emulated import Emulated, build_source

DEFAULT_SHARED_BYTES = 48 << 10


class FakeStream:
    """A stream that has done everything at once."""

    def __init__(self, cupy: FakeCupy, handle: int) -> None:
        self._cupy = cupy
        self.ptr = handle

    def __enter__(self) -> FakeStream:
        self._cupy.streams.append(self)
        return self

    def __exit__(self, *_: object) -> None:
        self._cupy.streams.pop()

    def synchronize(self) -> None:
        self._cupy.log.append(f"synchronize {self.ptr}")


class FakeArray:
    """Memory of the device."""

    def __init__(self, array: np.ndarray) -> None:
        self.array = array
        self.data = SimpleNamespace(ptr=array.ctypes.data)

    def set(self, source: np.ndarray) -> None:
        self.array[...] = source


class FakeFunction:
    """A kernel of a module."""

    max_dynamic_shared_size_bytes = DEFAULT_SHARED_BYTES

    def __init__(self, cupy: FakeCupy, name: str, library: Emulated) -> None:
        self._cupy = cupy
        self._name = name
        self._library = library

    def __call__(
        self, grid: tuple[int, ...], block: tuple[int, ...], arguments: tuple[Any, ...], shared_mem: int
    ) -> None:
        assert shared_mem <= self.max_dynamic_shared_size_bytes, "more shared memory than the kernel was allowed"
        assert block[1:] == (1, 1)
        stream = self._cupy.streams[-1]
        self._cupy.log.append(f"{self._name} device {self._cupy.devices[-1]} stream {stream.ptr}")
        self._library.run(self._name, grid, block[0], shared_mem, arguments)


class FakeCupy:
    """To stand in for the module.

    Args:
        folder: where libraries of the emulator are built.
        capability: of the device, as CuPy gives it.
    """

    uint8 = np.uint8

    class CUDARuntimeError(RuntimeError):
        """As CuPy's."""

    def __init__(self, folder: Path, capability: str = "90") -> None:
        self.log: list[str] = []
        self.devices = [0]
        self.streams = [FakeStream(self, 0)]
        self.unknown: set[int] = set()
        self.cuda = SimpleNamespace(
            Device=self._device,
            ExternalStream=lambda handle: FakeStream(self, handle),
            get_current_stream=lambda: self.streams[-1],
            runtime=SimpleNamespace(
                CUDARuntimeError=self.CUDARuntimeError, pointerGetAttributes=self._attributes, getDeviceCount=lambda: 2
            ),
        )
        self._folder = folder
        self._capability = capability

    def empty(self, size: int, dtype: type[np.generic]) -> FakeArray:
        return FakeArray(np.empty(size, dtype))

    def asnumpy(self, array: FakeArray) -> np.ndarray:
        return array.array.copy()

    def RawModule(self, code: str, options: tuple[str, ...], backend: str) -> Any:
        assert backend == "nvrtc"
        assert "-fmad=false" in options
        self.log.append("RawModule")
        library = build_source(code, self._folder)
        return SimpleNamespace(compile=lambda: None, get_function=lambda name: FakeFunction(self, name, library))

    def _device(self, number: int = 0) -> Any:
        cupy, capability = self, self._capability

        class Device:
            compute_capability = capability

            def __enter__(self) -> None:
                cupy.devices.append(number)

            def __exit__(self, *_: object) -> None:
                cupy.devices.pop()

        return Device()

    def _attributes(self, address: int) -> Any:
        if address in self.unknown:
            return SimpleNamespace(device=0, devicePointer=0, type=0)
        return SimpleNamespace(device=1, devicePointer=address, type=2)
