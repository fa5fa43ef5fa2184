"""How fast the CUDA kernels encode and decode, beside the device's own copy, in the same run.

Each codec of ``kvstore_kernels.cuda`` on bfloat16 blocks of 64 tokens, 32 layers, 8 heads and 128 channels, 8 MiB each:
contiguous (a page is a block) and paged (pages of 16 tokens in random order); payloads in device memory. The baseline
is a copy from device to device that reads and writes as many bytes in all as the kernel does, so ``ratio`` is the share
of the device's measured copy bandwidth. Sets of blocks and payloads take turns, so that none is found in the level-2
cache. Times are between events of the stream, of one launch for all blocks. One block is compared with the reference
before anything is timed. Needs a GPU, and the extra ``cuda``; prints one JSON object.

Usage: ``python benchmarks/gpu_codecs.py [--sizes MIB,MIB] [--rounds N] [--codecs NAME,NAME]``
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Sequence
from typing import Any, Final

import msgspec
import numpy as np

from kvstore.cli.bench.machine import machine_facts
from kvstore.cli.bench.report import Row, percentile
from kvstore_kernels.codecs import CODECS, Codec, get_codec
from kvstore_kernels.cuda import CudaUnavailable, check
from kvstore_kernels.cuda.device import DeviceLaunch, cupy_module
from kvstore_kernels.cuda.launch import Launch
from kvstore_kernels.layout import KVLayout
from kvstore_kernels.paged import PagedKV, PagedPlanes

LAYOUT: Final = KVLayout(num_layers=32, num_kv_heads=8, head_dim=128, dtype="bfloat16", block_tokens=64)
PAGE_TOKENS: Final = 16
LIMIT: Final = 0.8
"""Share of the copy's bandwidth that is aimed at."""
CACHE_SETS: Final = 4
"""The sets that take turns are this many times the level-2 cache together."""
MIB: Final = 1 << 20


class BlockSet:
    """Blocks in pages on the device, with room for their payloads, and a launch for each direction."""

    def __init__(self, cupy: Any, codec: Codec, blocks: int, memory: str, seed: int) -> None:
        rng = np.random.default_rng(seed)
        page = PAGE_TOKENS if memory == "paged" else LAYOUT.block_tokens
        count = blocks * LAYOUT.block_tokens // page
        shape = (2, count, page, LAYOUT.num_kv_heads, LAYOUT.head_dim)
        self.layers = [_normal(cupy, shape, seed * 1000 + layer) for layer in range(LAYOUT.num_layers)]
        self.kv = PagedKV.from_layers(LAYOUT, self.layers, "kv page token head dim")
        numbers = rng.permutation(count) if memory == "paged" else np.arange(count)
        self.pages = numbers.reshape(blocks, -1).astype(np.int32)
        self.payload_bytes = sum(codec.max_section_bytes(LAYOUT))
        pitch = -(-(256 + self.payload_bytes) // 4096) * 4096  # as in slots: a header, and whole pages
        self.payloads = cupy.zeros((blocks, pitch), np.uint8)
        addresses = np.uint64(self.payloads.data.ptr + 256) + np.arange(blocks, dtype=np.uint64) * np.uint64(pitch)
        self.launch = DeviceLaunch(Launch(codec, self.kv, self.pages, addresses), cupy.cuda.Device().id)

    @property
    def moved_bytes(self) -> int:
        """Bytes read and written by a launch."""
        return len(self.pages) * (LAYOUT.block_bytes + self.payload_bytes)


def measure(codec: Codec, size_bytes: int, memory: str, rounds: int) -> list[Row]:
    """Rows of both directions.

    Raises:
        RuntimeError: the kernels gave another result than the reference.
    """
    cupy = cupy_module()
    blocks = max(1, size_bytes // LAYOUT.block_bytes)
    first = BlockSet(cupy, codec, blocks, memory, 0)
    verify(cupy, codec, first)
    wanted = CACHE_SETS * cupy.cuda.Device().attributes["L2CacheSize"]
    sets = [first]
    sets += [BlockSet(cupy, codec, blocks, memory, seed) for seed in range(1, 1 + wanted // first.moved_bytes)]
    half = first.moved_bytes // 2
    copies = [(cupy.zeros(half, np.uint8), cupy.zeros(half, np.uint8)) for _ in sets]
    for each in sets:
        each.launch.run("kv_encode")

    def copy(turn: int) -> None:
        source, target = copies[turn % len(copies)]
        target.data.copy_from_device_async(source.data, half, cupy.cuda.get_current_stream())

    sides: dict[str, Callable[[int], None]] = {
        "copy": copy,
        "encode": lambda turn: sets[turn % len(sets)].launch.run("kv_encode"),
        "decode": lambda turn: sets[turn % len(sets)].launch.run("kv_decode"),
    }
    times: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(-3, rounds):
        for name, side in sides.items():
            elapsed = _timed(cupy, side, turn)
            if turn >= 0:
                times[name].append(elapsed)
    baseline = statistics.median(times["copy"])
    rows = []
    for name in ("encode", "decode"):
        median = statistics.median(times[name])
        rows.append(
            Row(
                op=name,
                codec=codec.name,
                size_bytes=LAYOUT.block_bytes,
                batch=blocks,
                cache="cold",
                memory=memory,
                samples=rounds,
                median_us=round(median, 2),
                p99_us=round(percentile(sorted(times[name]), 0.99), 2),
                gb_per_s=round(first.moved_bytes / median / 1e3, 1),
                baseline_median_us=round(baseline, 2),
                ratio=round(baseline / median, 4),
                limit=LIMIT,
            )
        )
    return rows


def verify(cupy: Any, codec: Codec, blocks: BlockSet) -> None:
    """Compare the first block's bytes with the reference's, and its decoded values with what that decodes to.

    Raises:
        RuntimeError: they differ.
    """
    import torch

    blocks.launch.run("kv_encode")
    blocks.launch.finish()
    pages = cupy.asarray(blocks.pages[0])

    def first_block() -> torch.Tensor:
        whole = cupy.stack([layer[:, pages] for layer in blocks.layers])
        return torch.from_numpy(cupy.asnumpy(whole).view(np.int16)).view(torch.bfloat16).reshape(LAYOUT.shape)

    sections = codec.encode(first_block(), LAYOUT).sections
    expected = np.frombuffer(b"".join(sections), np.uint8)
    if not (cupy.asnumpy(blocks.payloads[0, 256 : 256 + blocks.payload_bytes]) == expected).all():
        raise RuntimeError(f"codec {codec.name}: the kernels' bytes are not the reference's; run pytest -m gpu")
    blocks.launch.run("kv_decode")
    blocks.launch.finish()
    decoded = codec.decode(sections, LAYOUT)
    if not torch.equal(first_block().view(torch.int16), decoded.view(torch.int16)):
        raise RuntimeError(f"codec {codec.name}: the kernels' values are not the reference's; run pytest -m gpu")


def _normal(cupy: Any, shape: tuple[int, ...], seed: int) -> Any:
    """Normal numbers as the bits of bfloat16, which CuPy lacks."""
    numbers = cupy.random.default_rng(seed).standard_normal(shape, np.float32)
    return (numbers.view(np.uint32) >> 16).astype(np.uint16)


def _timed(cupy: Any, side: Callable[[int], None], turn: int) -> float:
    """Microseconds on the device."""
    begin, end = cupy.cuda.Event(), cupy.cuda.Event()
    begin.record()
    side(turn)
    end.record()
    end.synchronize()
    return float(cupy.cuda.get_elapsed_time(begin, end)) * 1000


def device_facts() -> dict[str, object]:
    """Facts of the device and of what compiles for it."""
    cupy = cupy_module()
    runtime, device = cupy.cuda.runtime, cupy.cuda.Device()
    properties = runtime.getDeviceProperties(device.id)
    return {
        "gpu": properties["name"].decode(),
        "compute_capability": device.compute_capability,
        "multiprocessors": properties["multiProcessorCount"],
        "gpu_memory_bytes": properties["totalGlobalMem"],
        "l2_bytes": properties["l2CacheSize"],
        "driver": runtime.driverGetVersion(),
        "cuda_runtime": runtime.runtimeGetVersion(),
        "nvrtc": ".".join(map(str, cupy.cuda.nvrtc.getVersion())),
        "cupy": cupy.__version__,
    }


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--sizes", default="64,256,1024", help="MiB of blocks a launch")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--codecs", help="names; all that have CUDA kernels if not given")
    options = parser.parse_args(arguments)
    try:
        facts = device_facts()
    except CudaUnavailable as error:
        print(f"gpu_codecs: {error}", file=sys.stderr)
        return 2
    names = options.codecs.split(",") if options.codecs else [name for name in CODECS if _has_kernels(name)]
    rows = [
        row
        for size in map(int, options.sizes.split(","))
        for memory in ("contiguous", "paged")
        for name in names
        for row in measure(get_codec(name), size * MIB, memory, options.rounds)
    ]
    report = {
        "machine": msgspec.to_builtins(machine_facts()) | facts,
        "baseline": "device copy of as many bytes, read and written",
        "rows": msgspec.to_builtins(rows),
    }
    print(json.dumps(report, indent=2))
    return 0


def _has_kernels(name: str) -> bool:
    row = LAYOUT.head_dim * LAYOUT.element_bytes
    token = LAYOUT.num_kv_heads * row
    planes = PagedPlanes(np.zeros(LAYOUT.num_layers, np.int64), PAGE_TOKENS * token, token, row, LAYOUT.element_bytes)
    try:
        check(get_codec(name), PagedKV(LAYOUT, PAGE_TOKENS, 1, (planes, planes), "cuda", None))
    except ValueError:
        return False
    return True


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
