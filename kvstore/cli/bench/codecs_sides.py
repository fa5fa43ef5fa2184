"""What the codecs' benchmark compares: memmove, and encoding and decoding of so many blocks in a call.

An operation's number is the place of its blocks in the set, in calls. What a call needs is made before the clock runs,
and a part of what it has to write is spoiled.
"""

from __future__ import annotations

from collections.abc import Sequence
from ctypes import memmove
from time import perf_counter_ns

from kvstore.cli.bench.codecs_memory import Form, KVMemory
from kvstore.cli.bench.codecs_work import CodecWork
from kvstore.cli.bench.local_sides import Side
from kvstore_kernels import cpu

__all__ = ["Decode", "Encode", "Memmove", "MemmoveAll"]


class Memmove(Side):
    """The baseline in pieces: the bytes of a call's blocks, from the KV to where decoded KV goes."""

    def __init__(self, memory: KVMemory, call_blocks: int) -> None:
        super().__init__()
        self._memory = memory
        self.call_bytes = call_blocks * memory.layout.block_bytes

    def run(self, numbers: Sequence[int]) -> None:
        """Time them."""
        memory, size = self._memory, self.call_bytes
        for number in numbers:
            source, target = memory.source_address + number * size, memory.target_address + number * size
            started = perf_counter_ns()
            memmove(target, source, size)
            self.times_ns.append(perf_counter_ns() - started)

    def check(self) -> None:
        """Nothing: the C library's copy is what all else is measured by."""


class MemmoveAll(Memmove):
    """The baseline in one piece, which the C library copies past the caches; times are those of a call's share."""

    def __init__(self, memory: KVMemory, call_blocks: int) -> None:
        super().__init__(memory, memory.blocks)
        self._calls = memory.blocks // call_blocks

    def run(self, numbers: Sequence[int]) -> None:
        """Time it once, whatever the numbers."""
        super().run((0,))
        self.times_ns[-1] //= self._calls


class _Blocks(Side):
    """A side that works on ``call_blocks`` blocks in a call."""

    def __init__(self, work: CodecWork, form: Form, call_blocks: int, threads: int) -> None:
        super().__init__()
        self.form = form
        self.threads = threads
        self._work = work
        self._call_blocks = call_blocks

    def __str__(self) -> str:
        return f"{self._work.codec.name}, {type(self).__name__.lower()}, {self.form.name}, {self.threads} threads"


class Encode(_Blocks):
    """From one of the forms into payloads."""

    def run(self, numbers: Sequence[int]) -> None:
        """Time them."""
        work, source, clock = self._work, self.form.source, perf_counter_ns
        for number in numbers:
            begin, end = number * self._call_blocks, (number + 1) * self._call_blocks
            pages, addresses = self.form.pages[begin:end], work.payloads.addresses[begin:end]
            work.payloads.spoil(begin, end)
            started = clock()
            encoded = cpu.encode(work.codec, source, pages, addresses, threads=self.threads)
            self.times_ns.append(clock() - started)
            self._last = begin, encoded.section_bytes

    def check(self) -> None:
        """Compare blocks of the last call."""
        self._work.check_payloads(*self._last, str(self))


class Decode(_Blocks):
    """From payloads into one of the forms."""

    def run(self, numbers: Sequence[int]) -> None:
        """Time them."""
        work, target, clock = self._work, self.form.target, perf_counter_ns
        for number in numbers:
            begin, end = number * self._call_blocks, (number + 1) * self._call_blocks
            pages, addresses = self.form.pages[begin:end], work.payloads.addresses[begin:end]
            section_bytes = work.section_bytes[begin:end]
            self.form.spoil_target(begin, end)
            started = clock()
            cpu.decode(work.codec, target, pages, addresses, section_bytes, threads=self.threads)
            self.times_ns.append(clock() - started)
            self._last = begin, end

    def check(self) -> None:
        """Compare blocks of the last call."""
        self._work.check_decoded(self.form, *self._last, str(self))
