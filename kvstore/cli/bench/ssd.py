"""The SSD tier beside fio: demotion with group commit, promotion, and what reads of DRAM lose meanwhile.

In each round, one after the other: fio writes, blocks are demoted, fio reads, blocks are promoted, DRAM is read
undisturbed, during demotion and during promotion. fio goes first in every second round, the daemon in the others. Each
figure is compared with its baseline in the same round, and what is reported is the median of these ratios: a disk whose
speed changes from minute to minute, as those of virtual machines do, then meets both sides.

Both sides have files of the same size in the same directory, written through before, and 8 requests at once. Bytes are
those that an engine holds: of a block that a codec made smaller, all of them.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Final

import msgspec

from kvstore.cli.bench.machine import machine_facts
from kvstore.cli.bench.process import ChildProcess
from kvstore.cli.bench.report import Report, Row
from kvstore.cli.bench.ssd_blocks import BLOCK_BYTES, CHAIN_BLOCKS, CODEC
from kvstore.cli.bench.ssd_fio import DEPTH, Fio, FioResult, Pattern
from kvstore.cli.bench.ssd_getter import LIMITS, Gets
from kvstore.cli.bench.ssd_place import DiskFacts, check_place
from kvstore.cli.bench.ssd_tier import ASKERS, Moved, SsdDaemon, ssd_daemon
from kvstore.cli.own_directory import fresh_path, own_directory
from kvstore.cli.private_daemon import PrivateDaemon
from kvstore.errors import InvalidArgument, KVStoreError
from kvstore.sizes import format_size

__all__ = ["BASELINE", "UNDISTURBED", "SsdExtent", "SsdReport", "aim", "measure_ssd", "rows_of"]

BASELINE: Final = (
    f"fio --ioengine=libaio --direct=1 --iodepth={DEPTH} --bs=1M --rw=randwrite|randread on a file of the same size in "
    "the same directory, in the same round; of the reads of DRAM: the same reads undisturbed"
)
UNDISTURBED: Final = "undisturbed"

_LIMITS: Final = {
    ("demotion", ""): 0.8,
    ("promotion", ""): 0.9,
    ("get_into during demotion", ""): 0.7,
    ("get_into during promotion", ""): 0.7,
}

_RESIDENT_BLOCKS: Final = 256
_GRANT_BYTES: Final = 128 << 20
_RESERVE_BYTES: Final = 1 << 30
_SMALLEST_ROUND_BYTES: Final = CHAIN_BLOCKS * BLOCK_BYTES
_LEAST_TIMES: Final = 4
"""The SSD holds so many times what comes and goes in DRAM: chains that are not in DRAM are needed for promotion."""

_START_S: Final = 120.0
_GETS_S: Final = 0.25
"""How long DRAM is read in a round, undisturbed, during demotion, and during promotion."""

_TRIES: Final = 40


@dataclass(frozen=True, slots=True)
class SsdExtent:
    """How much is measured.

    Attributes:
        size_bytes: of fio's file and of the SSD tier.
        round_bytes: that each side writes and reads in a round.
        rounds: turns of all.
        with_codec: whether records of a codec are measured, after plain blocks.

    Raises:
        InvalidArgument: too little of something.
    """

    size_bytes: int = 2 << 30
    round_bytes: int = 256 << 20
    rounds: int = 9
    with_codec: bool = True

    def __post_init__(self) -> None:
        if self.round_bytes < _SMALLEST_ROUND_BYTES or self.round_bytes % _SMALLEST_ROUND_BYTES:
            raise InvalidArgument(
                f"--mib: a round moves whole chains of {_SMALLEST_ROUND_BYTES >> 20} MiB, not "
                f"{self.round_bytes / (1 << 20):g} MiB"
            )
        if self.size_bytes % BLOCK_BYTES:
            raise InvalidArgument(f"--size: give whole MiB, not {self.size_bytes} bytes")
        least_bytes = _LEAST_TIMES * self.room_bytes
        if self.size_bytes < least_bytes:
            raise InvalidArgument(
                f"--size: with {self.round_bytes >> 20} MiB a round at least {format_size(least_bytes)} are needed, "
                f"{format_size(self.size_bytes)} were given"
            )

    @property
    def resident_blocks(self) -> int:
        """That stay in DRAM and are read there."""
        return min(_RESIDENT_BLOCKS, self.round_bytes // BLOCK_BYTES)

    @property
    def room_bytes(self) -> int:
        """Of the DRAM tier, for blocks that come and go."""
        return self.round_bytes + 2 * ASKERS * _SMALLEST_ROUND_BYTES

    @property
    def dram_bytes(self) -> int:
        """Capacity of the DRAM tier."""
        return self.room_bytes + self.resident_blocks * BLOCK_BYTES

    @property
    def codecs(self) -> tuple[str, ...]:
        """What blocks are made of; "" is plain bytes."""
        return ("", CODEC) if self.with_codec else ("",)

    @property
    def steps(self) -> int:
        """How often ``measure_ssd`` says that a round is done."""
        return len(self.codecs) * self.rounds

    @property
    def needed_bytes(self) -> int:
        """Free space that it takes: both sides' files, and what a daemon leaves alone."""
        return 2 * self.size_bytes + _RESERVE_BYTES


class SsdReport(Report, kw_only=True):
    """A report with the facts of the disk."""

    disk: DiskFacts


@dataclass(slots=True)
class Samples:
    """Of one operation: bytes a second in each round, and the baseline's.

    Attributes:
        op: what was measured.
        codec: of the blocks, "" for plain bytes.
        baseline: what it is compared with.
        block_bytes: as an engine holds a block.
        ours, theirs: bytes a second.
        cpu_us: of the daemon a block.
        others: cores that processes used which do not belong to the benchmark.
    """

    op: str
    codec: str
    baseline: str
    block_bytes: int
    ours: list[float] = field(default_factory=list)
    theirs: list[float] = field(default_factory=list)
    cpu_us: list[float] = field(default_factory=list)
    others: list[float] = field(default_factory=list)


def measure_ssd(directory: Path, extent: SsdExtent, on_round: Callable[[], None] = lambda: None) -> SsdReport:
    """Measure in a directory of our own in ``directory``, which is gone afterwards.

    Args:
        directory: on the file system that is measured.
        extent: how much.
        on_round: called ``extent.steps`` times.

    Raises:
        InvalidArgument: nothing can be measured there.
        KVStoreError: fio is not there or fails, the SSD tier fails, or a byte is wrong.
    """
    mount = check_place(directory, extent.needed_bytes)
    machine = machine_facts()
    samples: list[Samples] = []
    with own_directory(fresh_path("kvstore-bench-ssd-", directory)) as own:
        fio = Fio(own, extent.size_bytes)
        for codec in extent.codecs:
            samples += _measure(fio, own / f"tier-{codec or 'raw'}", codec, extent, on_round)
    disk = DiskFacts(
        filesystem=mount.kind, device=mount.source, size_bytes=extent.size_bytes, depth=DEPTH, fio=fio.version
    )
    return SsdReport(machine=machine, baseline=BASELINE, rows=rows_of(samples), disk=disk)


def _measure(fio: Fio, directory: Path, codec: str, extent: SsdExtent, on_round: Callable[[], None]) -> list[Samples]:
    arguments = ["--ssd", str(directory), "--ssd-capacity", str(extent.size_bytes)]
    arguments += ["--set", f"ssd.threads={DEPTH}", *LIMITS]
    with contextlib.ExitStack() as stack:
        directory = stack.enter_context(own_directory(directory))
        daemon = stack.enter_context(
            PrivateDaemon(capacity_bytes=extent.dram_bytes, grant_bytes=_GRANT_BYTES, arguments=arguments)
        )
        # The blocks that are read undisturbed come first: nothing needs their room yet.
        getter = None if codec else stack.enter_context(_getter(daemon.endpoint, extent.resident_blocks))
        tier = stack.enter_context(ssd_daemon(daemon.endpoint, daemon.pid, codec))
        if getter is not None:
            tier.measured_pids.append(getter.pid)
        tier.fill()
        rounds = _Rounds(fio, tier, getter, extent)
        for number in range(extent.rounds):
            rounds.round(fio_first=number % 2 == 0)
            on_round()
        tier.check_nothing_was_dropped()
        return rounds.samples


@contextlib.contextmanager
def _getter(endpoint: str, blocks: int) -> Iterator[ChildProcess]:
    with ChildProcess("the reading client", "kvstore.cli.bench.ssd_getter", endpoint, str(blocks)) as child:
        child.wait_until_ready(time.monotonic() + _START_S)
        yield child


class _Rounds:
    """All operations on blocks of one kind, and what they took.

    Args:
        fio: on the same file system.
        tier: full.
        getter: reads DRAM; None: that is not measured.
        extent: how much.
    """

    def __init__(self, fio: Fio, tier: SsdDaemon, getter: ChildProcess | None, extent: SsdExtent) -> None:
        self._fio = fio
        self._tier = tier
        self._getter = getter
        self._extent = extent
        codec, size = tier.blocks.codec, tier.blocks.block_bytes
        self._demotion = Samples("demotion", codec, "fio randwrite", size)
        self._promotion = Samples("promotion", codec, "fio randread", size)
        self._gets = {
            during: (
                Samples(f"get_into during {during}", codec, UNDISTURBED, size),
                Samples(f"get_into sustained during {during}", codec, UNDISTURBED, size),
            )
            for during in ("demotion", "promotion")
        }

    @property
    def samples(self) -> list[Samples]:
        """Of what was measured."""
        gets = [each for both in self._gets.values() for each in both] if self._getter is not None else []
        return [self._demotion, self._promotion, *gets]

    def round(self, *, fio_first: bool) -> None:
        """Measure each operation once."""
        self._beside("randwrite", self._demotion, self._demote, fio_first=fio_first)
        if self._getter is not None:
            self._gets_during_demotion(self._getter)
        chains = self._tier.chains_below(self._extent.room_bytes + self._extent.round_bytes)
        timed = max(1, self._extent.round_bytes // (CHAIN_BLOCKS * self._tier.blocks.record_bytes))
        self._tier.promote(chains[timed:])  # all of DRAM has a copy below then: room is had without writing
        self._tier.settle()
        self._beside("randread", self._promotion, lambda: self._promote(chains[:timed]), fio_first=fio_first)
        if self._getter is not None:
            # From where the promotions before began: those are out of DRAM again by now.
            self._gets_during_promotion(self._getter, [*chains[timed:], *chains[:timed]])

    def _beside(self, pattern: Pattern, samples: Samples, operation: Callable[[], Moved], *, fio_first: bool) -> None:
        def theirs() -> FioResult:
            return self._fio.run(pattern, self._extent.round_bytes)

        if fio_first:
            other = theirs()
            moved = operation()
        else:
            moved = operation()
            other = theirs()
        samples.ours.append(moved.blocks * samples.block_bytes / moved.seconds)
        samples.theirs.append(other.bytes_per_s)
        samples.cpu_us.append(moved.cpu_ns / moved.blocks / 1e3)
        samples.others.append(moved.others_share)

    def _demote(self) -> Moved:
        self._tier.start_putting()
        moved = self._tier.demoted(-(-self._extent.round_bytes // self._tier.blocks.record_bytes))
        self._tier.stop_putting()
        return moved

    def _promote(self, chains: list[int]) -> Moved:
        moved = self._tier.promote(chains)
        for chain in chains:
            self._tier.blocks.check(chain)
        self._tier.settle()
        return moved

    def _gets_during_demotion(self, getter: ChildProcess) -> None:
        undisturbed = self._get(getter)
        self._tier.start_putting()
        before = self._tier.demoted_blocks()
        for _ in range(_TRIES):  # a slow disk commits nothing in a short time
            disturbed = self._get(getter)
            if self._tier.demoted_blocks() != before:
                break
        else:
            raise KVStoreError("no block was demoted while DRAM was read: is the disk in order?")
        self._tier.stop_putting()
        self._compare("demotion", undisturbed, disturbed)

    def _gets_during_promotion(self, getter: ChildProcess, chains: list[int]) -> None:
        undisturbed = self._get(getter)
        for _ in range(_TRIES):
            getter.tell(str(_GETS_S))
            read = self._tier.promote_while(chains, lambda: not getter.has_answer())
            disturbed = self._answer(getter)
            if read:
                break
        else:
            raise KVStoreError("no block was promoted while DRAM was read: is the disk in order?")
        self._tier.settle()
        self._compare("promotion", undisturbed, disturbed)

    def _compare(self, during: str, undisturbed: Gets, disturbed: Gets) -> None:
        single, sustained = self._gets[during]
        for gets, rates in ((disturbed, single.ours), (undisturbed, single.theirs)):
            rates.append(single.block_bytes / gets.median_us * 1e6)
        for gets, rates in ((disturbed, sustained.ours), (undisturbed, sustained.theirs)):
            rates.append(gets.count * sustained.block_bytes / gets.seconds)

    def _get(self, getter: ChildProcess) -> Gets:
        getter.tell(str(_GETS_S))
        return self._answer(getter)

    def _answer(self, getter: ChildProcess) -> Gets:
        line = getter.answer(time.monotonic() + _START_S)
        try:
            return msgspec.json.decode(line, type=Gets)
        except msgspec.DecodeError:
            raise KVStoreError(f"the reading client: {line}") from None


def aim(op: str, codec: str) -> float | None:
    """The least ratio that is aimed at, None where nothing is."""
    return _LIMITS.get((op, codec))


def rows_of(samples: list[Samples]) -> list[Row]:
    """A row for each operation: medians, and each round's ratio."""
    rows: list[Row] = []
    for each in samples:
        ratios = [ours / theirs for ours, theirs in zip(each.ours, each.theirs, strict=True)]
        rows.append(
            Row(
                op=each.op,
                codec=each.codec or None,
                size_bytes=each.block_bytes,
                batch=1 if each.baseline == UNDISTURBED else CHAIN_BLOCKS,
                depth=None if each.baseline == UNDISTURBED else DEPTH,
                samples=len(ratios),
                gb_per_s=round(median(each.ours) / 1e9, 3),
                baseline=each.baseline,
                baseline_gb_per_s=round(median(each.theirs) / 1e9, 3),
                ratio=round(median(ratios), 4),
                ratios=[round(ratio, 4) for ratio in ratios],
                limit=aim(each.op, each.codec),
                daemon_cpu_us=round(median(each.cpu_us), 2) if each.cpu_us else None,
                others_share=round(median(each.others), 2) if each.others else None,
            )
        )
    return rows
