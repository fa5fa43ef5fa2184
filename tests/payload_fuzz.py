"""Mutated payloads against the kernels of the CPU, where a wrong access ends the process: run as a program.

Each payload ends at a page that must not be touched, and is decoded between two pages of a cache that must stay as they
are. Prints one JSON object: what became of how many.
"""

from __future__ import annotations

import ctypes
import json
import mmap
import random
import resource
import sys
from collections import Counter
from typing import Final

import numpy as np
import torch
from record_mutations import HEADER_BYTES, LAYOUTS, Base, Mutator, bases

from kvstore.format.record import decode_record
from kvstore_kernels import cpu
from kvstore_kernels.codecs import get_codec
from kvstore_kernels.layout import Layout
from kvstore_kernels.paged import PagedKV

_ROOM: Final = 64 * mmap.PAGESIZE
_CANARY: Final = 0x5A
_REFERENCE_EVERY: Final = 8


class Guarded:
    """Memory whose end cannot be passed."""

    def __init__(self) -> None:
        self._map = mmap.mmap(-1, _ROOM + mmap.PAGESIZE)
        begin = ctypes.addressof(ctypes.c_char.from_buffer(self._map))
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.mprotect(ctypes.c_void_p(begin + _ROOM), mmap.PAGESIZE, 0):
            raise OSError(ctypes.get_errno(), "mprotect")
        self._end = begin + _ROOM

    def hold(self, payload: bytes) -> int:
        """Address of a copy."""
        self._map[_ROOM - len(payload) : _ROOM] = payload
        return self._end - len(payload)


class Cache:
    """Three blocks of a layout, of which the middle one is decoded into."""

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        axis = layout.shape.index(layout.block_tokens)
        shape = list(layout.shape)
        shape[axis] *= 3
        self.whole = torch.zeros(shape, dtype=getattr(torch, layout.dtype))
        self._bytes = self.whole.view(torch.uint8)
        self.kv = PagedKV.from_tensor(layout, self.whole)
        self._axis = axis

    def block(self, number: int) -> torch.Tensor:
        tokens = self.layout.block_tokens
        return self.whole.narrow(self._axis, number * tokens, tokens)

    def fill(self) -> None:
        self._bytes.fill_(_CANARY)

    def untouched(self) -> bool:
        return all(bool((self.block(number).contiguous().view(torch.uint8) == _CANARY).all()) for number in (0, 2))


def sections_of(base: Base, payload: bytes) -> list[bytes]:
    header, _ = decode_record(base.record)
    sections, at = [], 0
    for length in header.section_bytes:
        sections.append(payload[at : at + length])
        at += length
    return sections


def same(made: torch.Tensor, reference: torch.Tensor) -> bool:
    """Equal to the bit, but where the reference gives no number.

    No encoder writes a scale or a code that is none; what becomes of those is open.
    """
    if not made.dtype.is_floating_point:
        return torch.equal(made, reference)
    bits = {2: torch.int16, 4: torch.int32}[made.element_size()]
    numbers = reference.isfinite()
    return torch.equal(made.contiguous().view(bits)[numbers], reference.contiguous().view(bits)[numbers])


def main(count: int, seed: int) -> None:
    mutator, rng = Mutator(seed), random.Random(seed)
    memory = Guarded()
    caches = {layout: Cache(layout) for layout in LAYOUTS}
    pages = np.ones((1, 1), np.int32)
    outcomes: Counter[str] = Counter()

    def decode(base: Base, payload: bytes, lengths: list[int]) -> str:
        """``right size``, or ``refused``."""
        cache = caches[base.layout]
        cache.fill()
        where = np.array([memory.hold(payload)], np.uint64)
        try:
            cpu.decode(get_codec(base.codec), cache.kv, pages, where, np.array([lengths], np.int64))
        except ValueError:
            return "refused"
        finally:
            assert cache.untouched(), f"{base.codec} of {base.layout.text} wrote outside of its block"
        return "right size"

    for base in bases():
        lengths = [len(section) for section in sections_of(base, base.record[HEADER_BYTES:])]
        assert decode(base, base.record[HEADER_BYTES:], lengths) == "right size"
        reference = get_codec(base.codec).decode(sections_of(base, base.record[HEADER_BYTES:]), base.layout)
        assert same(caches[base.layout].block(1), reference), base.codec
    warm_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for number in range(count):
        base, record = mutator.pair()
        payload = record[HEADER_BYTES:]
        sections = sections_of(base, payload)
        lengths = [len(section) for section in sections]
        codec = get_codec(base.codec)
        if rng.randrange(5) == 0:
            # Lengths that the record's header would not say of this codec: nothing is read behind them.
            at = rng.randrange(len(lengths))
            lengths[at] = rng.choice(
                (0, -1, 1, lengths[at] - 1, lengths[at] + 1, lengths[at] // 2, 1 << 62, -(1 << 62))
            )
            payload = payload[: max(sum(lengths), 0)]
            if sum(lengths) > len(payload):
                payload = payload.ljust(min(sum(lengths), _ROOM), b"\0")
            outcome = decode(base, payload, lengths)
            assert outcome == "refused" or codec.section_bytes(base.layout) is None, f"{base.codec} took {lengths}"
            outcomes[f"other lengths {outcome}"] += 1
            continue
        outcome = decode(base, payload, lengths)
        variable = codec.section_bytes(base.layout) is None
        assert outcome == "right size" or variable, f"{base.codec} refused {payload.hex()}"
        if variable or number % _REFERENCE_EVERY == 0:
            try:
                reference = codec.decode(sections, base.layout)
            except ValueError:
                assert outcome == "refused", f"{base.codec}: only the reference refuses {payload.hex()}"
            else:
                assert outcome == "right size", f"{base.codec}: only the kernels refuse {payload.hex()}"
                assert tuple(reference.shape) == base.layout.shape
                assert same(caches[base.layout].block(1), reference), f"{base.codec}: {payload.hex()}"
            outcomes["compared"] += 1
        outcomes[f"{'lossless' if variable else 'fixed'} {outcome}"] += 1
    grown_mib = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - warm_kib) / 1024
    print(json.dumps({**outcomes, "grown_mib": grown_mib}))


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
