"""Launches on a GPU through CuPy, which compiles the programs at first use and keeps them on disk.

CuPy is imported at the first launch. All programs are compiled for the device in use, by NVRTC, without headers.
"""

from __future__ import annotations

import functools
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from kvstore_kernels.cuda.cupy_cache import ensure_cache_directory
from kvstore_kernels.cuda.launch import Launch
from kvstore_kernels.cuda.program import COMPILER_OPTIONS, Program

__all__ = ["CudaUnavailable", "DeviceLaunch", "cupy_module"]

_OLDEST: Final = 80
"""Oldest compute capability, times ten: minima of bfloat16 need it."""
_DEFAULT_SHARED_BYTES: Final = 48 << 10
"""Dynamic shared memory of a block that a kernel need not ask for."""


class CudaUnavailable(RuntimeError):
    """CuPy, NVRTC, a driver or a device is missing, or the device is too old; the message says what to do."""


@functools.cache
def cupy_module() -> Any:
    """CuPy, with a device that the kernels run on.

    Raises:
        CudaUnavailable: there is none.
    """
    ensure_cache_directory()
    try:
        import cupy
    except ImportError as error:
        raise CudaUnavailable(
            f"the CUDA kernels need CuPy ({error}): pip install 'kvstored[cuda]', or keep the KV on the CPU"
        ) from error
    runtime = cupy.cuda.runtime
    try:
        count = runtime.getDeviceCount()
    except runtime.CUDARuntimeError as error:
        raise CudaUnavailable(
            f"CuPy finds no CUDA device ({error}): install NVIDIA's driver, or keep the KV on the CPU"
        ) from error
    if not count:
        raise CudaUnavailable("CuPy finds no CUDA device: look at CUDA_VISIBLE_DEVICES, or keep the KV on the CPU")
    return cupy


class DeviceLaunch:
    """A launch whose inputs are on a device, to be run on a stream.

    Args:
        launch: what to run.
        device: number of the device.
        stream: as ``cupy.cuda.Stream``, or its handle as an integer (``torch.cuda.current_stream().cuda_stream``); None
            for CuPy's current one.

    Raises:
        CudaUnavailable: there is no device that the kernels run on, or NVRTC is missing.
    """

    def __init__(self, launch: Launch, device: int, stream: Any = None) -> None:
        cupy = cupy_module()
        self._launch = launch
        self._cupy = cupy
        self._device = cupy.cuda.Device(device)
        with self._device:
            if isinstance(stream, int):
                stream = cupy.cuda.ExternalStream(stream)
            self._stream = cupy.cuda.get_current_stream() if stream is None else stream
            self._module = _compiled(launch.program, device)
            with self._stream:
                self._inputs = cupy.empty(launch.inputs.nbytes, cupy.uint8)
                self._inputs.set(launch.inputs)

    def run(self, kernel: str) -> None:
        """Enqueue a kernel: ``"kv_encode"``, which adds to the counts of void groups, or ``"kv_decode"``."""
        program = self._launch.program
        arguments = tuple(self._launch.arguments(self._inputs.data.ptr))
        function = self._module.get_function(kernel)
        shared_bytes = program.shared_bytes(kernel)
        with self._device, self._stream:
            if shared_bytes > _DEFAULT_SHARED_BYTES:
                function.max_dynamic_shared_size_bytes = shared_bytes
            function(self._launch.grid, (program.threads, 1, 1), arguments, shared_mem=shared_bytes)

    def finish(self) -> npt.NDArray[np.int64]:
        """Wait for the stream; counts of void groups ``[blocks]``."""
        with self._device, self._stream:
            self._stream.synchronize()
            return self._launch.void_groups(self._cupy.asnumpy(self._inputs))


def device_of(address: int) -> int:
    """Number of the device whose memory holds an address.

    Raises:
        ValueError: no device's memory does.
    """
    runtime = cupy_module().cuda.runtime
    try:
        attributes = runtime.pointerGetAttributes(address)
    except runtime.CUDARuntimeError as error:
        raise ValueError(f"the address {address:#x} is not known to CUDA: {error}") from error
    if attributes.devicePointer != address:
        raise ValueError(
            f"the address {address:#x} cannot be used on a device: pin the memory (cudaHostRegister) first"
        )
    return int(attributes.device)


@functools.lru_cache(maxsize=64)
def _compiled(program: Program, device: int) -> Any:
    """A program as a CuPy module for a device."""
    cupy = cupy_module()
    capability = int(cupy.cuda.Device(device).compute_capability)
    if capability < _OLDEST:
        raise CudaUnavailable(
            f"device {device} has compute capability {capability / 10}, the CUDA kernels need {_OLDEST / 10}: "
            "use another device, or keep the KV on the CPU"
        )
    try:
        module = cupy.RawModule(code=program.source, options=COMPILER_OPTIONS, backend="nvrtc")
        module.compile()
    except (ImportError, OSError, RuntimeError) as error:
        raise CudaUnavailable(
            f"the CUDA kernels cannot be compiled ({str(error).splitlines()[0]}): "
            "pip install 'kvstored[cuda]' brings NVRTC"
        ) from error
    return module
