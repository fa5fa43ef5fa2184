"""Bytes of stored records that change on the disk: a miss each, said in the log, and never data."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from daemon_process import wait_until
from forked_daemons import Nursery
from killed_daemon import Orders
from ssd_daemon import PAYLOAD_BYTES, SLOT_BYTES, SsdDaemon, found_blocks, key_of, put_durable, slots_of, ssd_stats

from kvstore.format.constants import PAGE_BYTES, RECORD_HEADER_BYTES
from kvstore_client import Client

BORDERS = [
    0,
    RECORD_HEADER_BYTES - 1,
    RECORD_HEADER_BYTES,
    PAGE_BYTES - 1,
    PAGE_BYTES,
    RECORD_HEADER_BYTES + PAYLOAD_BYTES - 1,
    RECORD_HEADER_BYTES + PAYLOAD_BYTES,
    SLOT_BYTES - 1,
]
POSITIONS = sorted(
    {
        *BORDERS,
        *random.Random(1).sample(range(RECORD_HEADER_BYTES), 30),
        *random.Random(2).sample(range(RECORD_HEADER_BYTES, RECORD_HEADER_BYTES + PAYLOAD_BYTES), 30),
        *random.Random(3).sample(range(RECORD_HEADER_BYTES + PAYLOAD_BYTES, SLOT_BYTES), 20),
    }
)
"""In a slot; with a block for each."""

HURT = range(len(POSITIONS))
WHOLE = range(1000, 1016)


@pytest.fixture(scope="module")
def nursery() -> Iterator[Nursery]:
    with Nursery() as nursery:
        yield nursery


def flip(slabs: Path, hurt: dict[int, int]) -> None:
    """Flip a bit of one byte of each block's slot, by the block's number."""
    data = bytearray(slabs.read_bytes())
    slots = slots_of(bytes(data))
    for number, position in hurt.items():
        (slot,) = slots[key_of(number)]
        data[slot + position] ^= 1 << (number % 8)
    slabs.write_bytes(data)


def told(daemon: SsdDaemon) -> int:
    """How often the log said, or held back, that a record is damaged."""
    lines = daemon.logged("corrupt_ssd_record")
    return len(lines) + sum(line.get("held_back", 0) for line in lines)


@pytest.mark.parametrize(("mapped", "direct"), [(True, True), (False, False)], ids=["mapped-direct", "socket-buffered"])
def test_a_flipped_byte_is_a_miss(nursery: Nursery, tmp_path: Path, *, mapped: bool, direct: bool) -> None:
    daemon = SsdDaemon(nursery, tmp_path, "--verify", "off", expected_errors=("corrupt_ssd_record",))
    daemon.control.order(Orders(buffered=not direct))
    with daemon, daemon.client(mapped=mapped) as client:
        put_durable(client, [*HURT, *WHOLE])
        assert ssd_stats(client).direct == direct
        assert ("buffered" in daemon.logged("ready")[0]["ssd_io"]) != direct
        daemon.terminate()
        last = HURT[-1]
        flip(daemon.ssd / "slabs", dict(zip(HURT, POSITIONS, strict=True)))
        daemon.start()
        before = ssd_stats(client)
        assert before.records == len(HURT) + len(WHOLE)
        # The first is one line by itself; lines of a second are counted in the next.
        assert found_blocks(client, HURT[:1]) == []
        wait_until(lambda: len(daemon.logged("corrupt_ssd_record")) == 1)
        for number in (*HURT[1:-1], *WHOLE):
            found = found_blocks(client, [number])
            assert found == ([number] if number in WHOLE else []), f"byte {POSITIONS[number]} of the slot"
        time.sleep(1.05)
        assert found_blocks(client, [last]) == []
        after = ssd_stats(client)
        assert after.corrupt_records == len(HURT)
        assert after.records == len(WHOLE)
        wait_until(lambda: told(daemon) == len(HURT))
        assert found_blocks(client, HURT) == []
        # Their slots come back, and their keys can be put again.
        wait_until(lambda: ssd_stats(client).leaving_bytes == 0)
        assert ssd_stats(client).resident_bytes == before.resident_bytes - len(HURT) * SLOT_BYTES
        rewritten(client)
        daemon.restarted()
        assert found_blocks(client, HURT[:40], version=1) == list(HURT[:40])
        assert found_blocks(client, WHOLE) == list(WHOLE)
        assert client.verify().problems == []
        assert told(daemon) == len(HURT)


def rewritten(client: Client) -> None:
    put_durable(client, HURT, version=1)
    assert found_blocks(client, HURT, version=1) == list(HURT)


def test_a_record_in_the_place_of_another_is_a_miss(nursery: Nursery, tmp_path: Path) -> None:
    """Whole records, whose checksums are right: of other blocks, of another namespace, of an earlier time."""
    with SsdDaemon(nursery, tmp_path, expected_errors=("corrupt_ssd_record",)) as daemon, daemon.client() as client:
        with daemon.client(namespace="other") as other:
            put_durable(other, [2])
        put_durable(client, range(6))
        before = (daemon.ssd / "slabs").read_bytes()
        assert client.remove([key_of(5)]) == 1
        put_durable(client, [5], version=1)
        daemon.terminate()
        data = bytearray((daemon.ssd / "slabs").read_bytes())
        slots = slots_of(bytes(data))

        def move(source: bytes, begin: int, target: int) -> None:
            data[target : target + SLOT_BYTES] = source[begin : begin + SLOT_BYTES]

        whole, own = bytes(data), {number: slots[key_of(number)][-1] for number in range(5)}
        move(whole, own[0], own[1])
        move(whole, own[1], own[0])
        move(whole, slots_of(whole, "other")[key_of(2)][0], own[2])
        (old,) = slots_of(before)[key_of(5)]
        for slot in slots[key_of(5)]:
            move(before, old, slot)
        (daemon.ssd / "slabs").write_bytes(data)
        daemon.start()
        assert found_blocks(client, [0, 1, 2, 3, 4]) == [3, 4]
        assert found_blocks(client, [5], version=1) == []
        assert ssd_stats(client).corrupt_records == 4
        assert client.verify().problems == []
