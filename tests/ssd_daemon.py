"""Daemons with a small SSD tier for tests of faults: forked, under control, with blocks that say what they are."""

from __future__ import annotations

import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from daemon_process import MIB, wait_until
from forked_daemons import ForkedDaemon, Nursery
from killed_daemon import Control

from kvstore.format.constants import PAGE_BYTES, RECORD_HEADER_BYTES, RECORD_MAGIC
from kvstore.format.record import decode_header
from kvstore.protocol.messages import PutStatus
from kvstore.protocol.namespace import Namespace, namespace_digest
from kvstore.protocol.statistics import SsdStats
from kvstore_client import Client

SLAB_BYTES = 128 << 10
PAYLOAD_BYTES = 13_000
"""Of a block here: its record takes four pages, and the last one has some padding."""

SLOT_BYTES = 16 << 10


def key_of(number: int) -> bytes:
    """A block's key."""
    return b"a block of tests" + number.to_bytes(16, "big")


def payload_of(number: int, version: int = 0, length_bytes: int = PAYLOAD_BYTES) -> bytes:
    """What a block holds; no two of them are equal."""
    return random.Random(number << 8 | version).randbytes(length_bytes)


class SsdDaemon(ForkedDaemon):
    """A daemon with 1 MiB of DRAM for blocks over an SSD tier.

    Attributes:
        ssd: the tier's directory.
        control: of its files.
    """

    def __init__(
        self, nursery: Nursery, where: Path, *arguments: str, ssd_capacity: str = "8MiB", **options: Any
    ) -> None:
        self.ssd = where / "ssd"
        self.control = Control(where / "control.json")
        fixed = ["--ssd", str(self.ssd), "--ssd-capacity", ssd_capacity, "--slab", "128KiB"]
        given = {argument.partition("=")[0] for argument in arguments}
        for name, value in ({"reserve_bytes": 0, "slab_bytes": SLAB_BYTES, "threads": 4}).items():
            if f"ssd.{name}" not in given:
                fixed += ["--set", f"ssd.{name}={value}"]
        options = {"capacity": "1MiB", "grant": "512KiB", **options}
        super().__init__(nursery, self.control, *fixed, *arguments, **options)

    def client(self, **options: Any) -> Client:
        """A client in the tests' namespace."""
        return self.connect(**{"namespace": "ssd", "timeout": 10.0, **options})

    def restarted(self) -> SsdDaemon:
        """SIGTERM, then a new one: what it has, it has from the files."""
        assert self.terminate() == 0
        self.start()
        return self

    def logged(self, event: str) -> list[dict[str, Any]]:
        """The log's lines of one kind."""
        return [line for line in self.events() if line["event"] == event]


def ssd_stats(client: Client) -> SsdStats:
    """Statistics of the tier."""
    found = client.stats().ssd
    assert found is not None
    return found


def put_durable(client: Client, numbers: Iterable[int], version: int = 0) -> None:
    """Store blocks, durably, in chains of eight."""
    left = list(numbers)
    while left:
        some, left = left[:8], left[8:]
        payloads = [payload_of(number, version) for number in some]
        results = client.put_many([key_of(number) for number in some], payloads, durable=True)
        assert results == [PutStatus.STORED] * len(some), f"blocks {some}: {results}"


def found_blocks(client: Client, numbers: Iterable[int], version: int = 0) -> list[int]:
    """Which blocks are there; none has other bytes than it was stored with."""
    found: list[int] = []
    for number in numbers:
        data = client.get(key_of(number))
        assert data is None or data == payload_of(number, version), f"wrong bytes of block {number}"
        if data is not None:
            found.append(number)
    return found


def wait_for_state(client: Client, state: str, timeout_s: float = 20.0) -> SsdStats:
    """Wait until the tier is in a state."""
    wait_until(lambda: ssd_stats(client).state == state, timeout_s, 0.05)
    return ssd_stats(client)


def slots_of(slabs: bytes, name: str = "ssd") -> dict[bytes, list[int]]:
    """Offsets of the slots that have a whole header of a namespace's block, by its key; old ones too."""
    digest = namespace_digest(Namespace(name=name).canonical(), 0)
    found: dict[bytes, list[int]] = {}
    for at in range(PAGE_BYTES, len(slabs), PAGE_BYTES):
        if slabs.startswith(RECORD_MAGIC, at):
            header = decode_header(slabs[at : at + RECORD_HEADER_BYTES])
            if header.namespace_digest == digest:
                found.setdefault(header.key, []).append(at)
    return found


def durable_is(client: Client, number: int, *, version: int = 0) -> PutStatus:
    """What a durable put ends with."""
    return client.put(key_of(number), payload_of(number, version), durable=True)


__all__ = [
    "MIB",
    "PAYLOAD_BYTES",
    "SLAB_BYTES",
    "SLOT_BYTES",
    "SsdDaemon",
    "durable_is",
    "found_blocks",
    "key_of",
    "payload_of",
    "put_durable",
    "slots_of",
    "ssd_stats",
    "wait_for_state",
]
