"""What the SSD tier's benchmark makes of a tier's counters, with a daemon that does what a test says."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from kvstore.cli.bench import ssd_tier
from kvstore.cli.bench.ssd_blocks import CHAIN_BLOCKS, keys_of
from kvstore.cli.bench.ssd_putter import GO, STOP
from kvstore.cli.bench.ssd_tier import SsdDaemon
from kvstore.errors import DeadlineExceeded, KVStoreError, RemoteError
from kvstore.protocol.statistics import SsdStats

RECORD_BYTES = 1 << 20
CHAIN_BYTES = CHAIN_BLOCKS * RECORD_BYTES


def stats(**fields: Any) -> SsdStats:
    """Statistics of a tier in order, with nothing in it."""
    empty: dict[str, Any] = {field.name: 0 for field in msgspec.structs.fields(SsdStats)}
    return SsdStats(**{**empty, "directory": "/d", "state": "ok", "problem": "", "direct": True, **fields})


class Tier:
    """A daemon, its clients and the process that puts, all in one; each look at the statistics is a tick."""

    def __init__(self) -> None:
        self.now: SsdStats | None = stats()
        self.on_tick: Callable[[], None] = lambda: None
        self.below: dict[bytes, list[str]] = {}
        self.comes_up = CHAIN_BLOCKS
        self.told: list[str] = []
        self.answers: list[str] = []
        self.pid = os.getpid()

    # as a client

    def stats(self) -> Any:
        self.on_tick()
        return SimpleNamespace(ssd=self.now)

    def match(self, keys: list[bytes]) -> Any:
        tiers = self.below.get(keys[0], [])
        return SimpleNamespace(hits=len(tiers), tiers=tiers)

    def prefetch(self, keys: list[bytes], *, wait: bool) -> int:
        assert wait
        self.grow(promoted_blocks=self.comes_up)
        return CHAIN_BLOCKS

    def grow(self, **fields: int) -> None:
        assert self.now is not None
        for name, more in fields.items():
            setattr(self.now, name, getattr(self.now, name) + more)

    # as the process that puts

    def tell(self, line: str) -> None:
        self.told.append(line)

    def has_answer(self, timeout_s: float = 0.0) -> bool:
        return bool(self.answers)

    def answer(self, deadline: float) -> str:
        return self.answers.pop()


@pytest.fixture
def tier(monkeypatch: pytest.MonkeyPatch) -> Tier:
    monkeypatch.setattr(ssd_tier, "_POLL_S", 0.0)
    monkeypatch.setattr(ssd_tier, "_PATIENCE_S", 0.2)
    return Tier()


@pytest.fixture
def daemon(tier: Tier) -> Iterator[SsdDaemon]:
    blocks: Any = SimpleNamespace(client=tier, record_bytes=RECORD_BYTES, block_bytes=RECORD_BYTES, codec="")
    fake: Any = tier
    with ThreadPoolExecutor(1) as pool:
        yield SsdDaemon(tier.pid, blocks, fake, [fake], pool)


# ------------------------------------------------------------------ what the tier says


@pytest.mark.parametrize(
    ("found", "message"),
    [
        (None, "the daemon has no SSD tier"),
        (stats(state="read-only", problem="disk full"), r"the SSD tier is read-only \(disk full\)"),
        (stats(write_errors=2), "2 write errors, 0 read errors"),
        (stats(read_errors=1), "1 read errors"),
        (stats(corrupt_records=3), "3 corrupt records"),
        (stats(direct=False), "does not use direct I/O"),
    ],
)
def test_tier_that_is_not_in_order_ends_the_measurement(
    tier: Tier, daemon: SsdDaemon, found: SsdStats | None, message: str
) -> None:
    tier.now = found
    with pytest.raises(RemoteError, match=message):
        daemon.demoted(1)


@pytest.mark.parametrize("field", ["dropped_blocks", "not_admitted_blocks"])
def test_blocks_that_left_without_a_copy_are_found(tier: Tier, daemon: SsdDaemon, field: str) -> None:
    daemon.check_nothing_was_dropped()
    tier.grow(**{field: 4})
    with pytest.raises(RemoteError, match="4 blocks left DRAM without a copy"):
        daemon.check_nothing_was_dropped()


# ------------------------------------------------------------------ demotion


def test_demotion_is_counted_from_one_commit_to_another(tier: Tier, daemon: SsdDaemon) -> None:
    ticks = 0

    def tick() -> None:
        nonlocal ticks
        ticks += 1
        if ticks % 5 == 0:
            tier.grow(demoted_blocks=64)

    tier.on_tick = tick
    moved = daemon.demoted(100)
    # The first commit begins it, two more make at least 100 blocks.
    assert (moved.blocks, ticks) == (128, 15)
    assert moved.seconds > 0
    assert moved.cpu_ns >= 0


def test_demotion_that_does_not_come_ends_with_its_deadline(daemon: SsdDaemon) -> None:
    with pytest.raises(DeadlineExceeded, match=r"waited 0\.2 s for a commit of the SSD tier"):
        daemon.demoted(1)


def test_demotion_whose_puts_failed_says_why(tier: Tier, daemon: SsdDaemon) -> None:
    tier.answers = ["the daemon took 3 of 32 blocks of chain 7"]
    with pytest.raises(KVStoreError, match="the putting client: the daemon took 3 of 32"):
        daemon.demoted(1)


def test_putting_goes_on_until_the_tier_has_nothing_left_to_do(tier: Tier, daemon: SsdDaemon) -> None:
    tier.on_tick = lambda: tier.grow(demoted_blocks=32)
    daemon.start_putting()
    assert tier.told == [GO]
    tier.answers = ["12"]
    assert tier.now is not None
    tier.now.waiting_blocks = 1
    left = 5

    def tick() -> None:
        nonlocal left
        left -= 1
        assert tier.now is not None
        tier.now.waiting_blocks = int(left > 0)

    tier.on_tick = tick
    daemon.stop_putting()
    assert tier.told == [GO, STOP]
    assert left <= -ssd_tier._SETTLED_POLLS + 1


def test_putting_client_that_failed_at_the_end_says_why(tier: Tier, daemon: SsdDaemon) -> None:
    tier.answers = ["the daemon is gone"]
    with pytest.raises(KVStoreError, match="the putting client: the daemon is gone"):
        daemon.stop_putting()


# ------------------------------------------------------------------ promotion


def put(tier: Tier, daemon: SsdDaemon, tiers: list[list[str]]) -> None:
    """Have chains been put, of whose blocks each is where it is said."""
    for chain, places in enumerate(tiers):
        tier.below[keys_of(chain)[0]] = places
    tier.answers = [str(len(tiers))]
    daemon.stop_putting()


def test_chains_that_are_promoted_are_whole_and_on_the_ssd_only(tier: Tier, daemon: SsdDaemon) -> None:
    below, above = ["ssd"] * CHAIN_BLOCKS, ["dram"] * CHAIN_BLOCKS
    put(tier, daemon, [below, below, below[:-1], ["dram", *below[1:]], below, above])
    assert daemon.chains_below(3 * CHAIN_BYTES) == [4, 1, 0]
    assert daemon.chains_below(CHAIN_BYTES + 1) == [4, 1]
    with pytest.raises(RemoteError, match="of 6 chains 3 are whole on the SSD alone; 4 are needed"):
        daemon.chains_below(4 * CHAIN_BYTES)


def test_promotion_counts_blocks_that_came_from_the_ssd(tier: Tier, daemon: SsdDaemon) -> None:
    moved = daemon.promote([3, 4])
    assert moved.blocks == 2 * CHAIN_BLOCKS
    tier.comes_up = CHAIN_BLOCKS - 1
    with pytest.raises(RemoteError, match="only 62 of 64 blocks came up from the SSD"):
        daemon.promote([3, 4])


def test_promotion_goes_on_while_it_is_told_to(tier: Tier, daemon: SsdDaemon) -> None:
    left = 5

    def going() -> bool:
        nonlocal left
        left -= 1
        return left >= 0

    assert daemon.promote_while([1, 2], going) == 5 * CHAIN_BLOCKS
