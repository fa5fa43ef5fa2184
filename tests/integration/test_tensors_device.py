"""Tensor stores for caches on a CUDA device: pinning by a runtime that only remembers, and a device if there is one."""

from __future__ import annotations

import gc
from contextlib import ExitStack
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from daemon_process import DaemonProcess
from tensor_blocks import LAYOUT, block_of, decoded, filled, kv_of, same

from kvstore.errors import InvalidArgument
from kvstore.mapped.client_file import FLAGS_OFFSET, ClientFlag
from kvstore_client.tensors import TensorStore
from kvstore_client.tensors.device import _DeviceBackend
from kvstore_kernels import cpu
from kvstore_kernels.cuda import CudaUnavailable
from kvstore_kernels.cuda.device import cupy_module
from kvstore_kernels.paged import PagedKV

BLOCKS = 40


class RegisterError(Exception):
    """What a CUDA runtime raises."""


class FakeRuntime:
    """Remembers what is pinned, and pins no more than it is told to."""

    CUDARuntimeError = RegisterError

    def __init__(self, most: int) -> None:
        self.pinned: dict[int, int] = {}
        self.most = most

    def hostRegister(self, address: int, length: int, flags: int) -> None:
        if len(self.pinned) >= self.most:
            raise RegisterError("out of memory")
        assert address not in self.pinned
        self.pinned[address] = length

    def hostUnregister(self, address: int) -> None:
        del self.pinned[address]

    def getDevice(self) -> int:
        return 0

    def deviceGetAttribute(self, attribute: int, device: int) -> int:
        return int(attribute == 91)


class FakeKernels:
    """The CPU's kernels with the face of the device's, which notice payloads that the device would not reach."""

    def __init__(self, runtime: FakeRuntime, scratch: list[np.ndarray[Any, Any]]) -> None:
        self._runtime = runtime
        self._scratch = scratch
        self.in_slots = self.aside = 0

    def check(self, codec: Any, kv: Any) -> None:
        if codec.name == "lossless":
            raise ValueError("there are no kernels for lossless")

    def _look(self, payloads: Any) -> None:
        for address in payloads.tolist():
            slabs = self._runtime.pinned.items()
            in_slot = any(begin <= address < begin + length for begin, length in slabs)
            ours = any(0 <= address - memory.ctypes.data < memory.nbytes for memory in self._scratch)
            assert in_slot or ours, "the device does not reach this payload"
            self.in_slots += in_slot
            self.aside += not in_slot

    def encode(self, codec: Any, kv: Any, pages: Any, payloads: Any, *, threads: int, stream: Any) -> Any:
        self._look(payloads)
        return cpu.encode(codec, kv, pages, payloads, threads=threads)

    def decode(
        self, codec: Any, kv: Any, pages: Any, payloads: Any, section_bytes: Any, *, threads: int, stream: Any
    ) -> None:
        self._look(payloads)
        cpu.decode(codec, kv, pages, payloads, section_bytes, threads=threads)


def with_device(store: TensorStore, most_slabs: int) -> tuple[FakeRuntime, FakeKernels]:
    """Have a store take the CPU for a device."""
    runtime, scratch = FakeRuntime(most_slabs), list[np.ndarray[Any, Any]]()
    kernels = FakeKernels(runtime, scratch)

    def pinned_memory(length: int) -> np.ndarray[Any, Any]:
        scratch.append(np.empty(length, np.uint8))
        return scratch[-1]

    cupy = SimpleNamespace(cuda=SimpleNamespace(runtime=runtime, alloc_pinned_memory=pinned_memory))
    store._backends["cpu"] = _DeviceBackend(kernels, 1, cupy)
    return runtime, kernels


@pytest.mark.parametrize(("most_slabs", "mapped"), [(1000, True), (2, True), (0, True), (1000, False)])
def test_slabs_are_pinned_when_they_are_used_and_copied_where_they_cannot_be(
    daemon: DaemonProcess, namespace: str, stack: ExitStack, most_slabs: int, mapped: bool
) -> None:
    store = stack.enter_context(TensorStore(LAYOUT, "kivi4", endpoint=daemon.endpoint, name=namespace, mapped=mapped))
    runtime, kernels = with_device(store, most_slabs)
    kv = kv_of(LAYOUT, BLOCKS)
    kv[0, 0, 700] = float("nan")
    keys = store.chain_keys(np.arange(BLOCKS * 64))
    saved = store.save_blocks(keys, kv)
    assert saved.stored == BLOCKS
    target = filled(kv)
    assert store.load_blocks(keys, target).loaded == BLOCKS
    for index in range(BLOCKS):
        block = block_of(kv, LAYOUT, index)
        assert same(block_of(target, LAYOUT, index), block if index in saved.void else decoded(block, LAYOUT, "kivi4"))
    if most_slabs == 1000 and mapped:
        assert kernels.in_slots
        assert not kernels.aside
        assert set(runtime.pinned.values()) == {store.client._session.mapped.slab_bytes}  # type: ignore[union-attr]
    elif most_slabs != 2:
        assert kernels.aside
        assert not kernels.in_slots
    session = store.client._session.mapped
    if session is not None:
        # The daemon waits for transfers that outlive a process which had a device.
        assert int(session._words[FLAGS_OFFSET // 8]) & ClientFlag.DEVICE
    del session
    store.close()
    gc.collect()
    assert runtime.pinned == {}, "memory is unpinned before it is unmapped"


def test_codecs_without_kernels_are_refused_before_anything_is_done(
    daemon: DaemonProcess, namespace: str, stack: ExitStack
) -> None:
    store = stack.enter_context(TensorStore(LAYOUT, "lossless", endpoint=daemon.endpoint, name=namespace))
    kv, keys = kv_of(LAYOUT, 2), store.chain_keys(np.arange(128))
    assert store.save_blocks(keys, kv).stored == 2
    with_device(store, 1000)
    for call in (store.save_blocks, store.load_blocks):
        with pytest.raises(InvalidArgument, match="no kernels for lossless"):
            call(keys, kv)


def test_a_stream_is_for_devices(daemon: DaemonProcess, namespace: str, stack: ExitStack) -> None:
    store = stack.enter_context(TensorStore(LAYOUT, "kivi4", endpoint=daemon.endpoint, name=namespace))
    with pytest.raises(InvalidArgument, match="stream"):
        store.save_blocks(store.chain_keys(np.arange(64)), kv_of(LAYOUT, 1), stream=1)


def _device() -> str:
    """Why there is no device, "" where there is one."""
    try:
        cupy_module()
    except CudaUnavailable as error:
        return str(error)
    return ""


def test_without_a_device_its_caches_are_refused(daemon: DaemonProcess, namespace: str, stack: ExitStack) -> None:
    if not _device():
        pytest.skip("there is a CUDA device")
    store = stack.enter_context(TensorStore(LAYOUT, "kivi4", endpoint=daemon.endpoint, name=namespace))
    host = PagedKV.from_tensor(LAYOUT, kv_of(LAYOUT, 1))
    cache = PagedKV(LAYOUT, host.page_tokens, host.num_pages, host.sections, "cuda", host.owner)
    with pytest.raises(InvalidArgument, match="CUDA"):
        store.save_blocks(store.chain_keys(np.arange(64)), cache, pages=[[0]])


@pytest.mark.gpu
@pytest.mark.parametrize("codec", ["raw", "int8", "kivi4", "turbo3"])
def test_from_and_to_a_device(daemon: DaemonProcess, namespace: str, stack: ExitStack, codec: str) -> None:
    why = _device()
    if why:
        pytest.skip(why)
    store = stack.enter_context(TensorStore(LAYOUT, codec, endpoint=daemon.endpoint, name=namespace))
    kv, keys = kv_of(LAYOUT, BLOCKS), store.chain_keys(np.arange(BLOCKS * 64))
    stream = torch.cuda.current_stream().cuda_stream
    assert store.save_blocks(keys, kv.cuda(), stream=stream).stored == BLOCKS
    target = filled(kv)
    assert store.load_blocks(keys, target).loaded == BLOCKS
    expected = decoded(kv, LAYOUT, codec)
    assert same(target, expected)
    on_device = filled(kv).cuda()
    assert store.load_blocks(keys, on_device, stream=stream).loaded == BLOCKS
    assert same(on_device.cpu(), expected)
