"""Chains of blocks of many sizes over an SSD with room for all of them: what was stored is never lost."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from hashlib import sha256

import pytest
from daemon_process import DaemonProcess

from kvstore.protocol.messages import PutStatus
from kvstore_client import Client

PAYLOAD_BYTES = [3_200, 16_000, 28_800]
SECONDS = 2.0


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DaemonProcess]:
    below = ["--ssd", str(tmp_path_factory.mktemp("chains") / "ssd"), "--ssd-capacity", "256MiB"]
    with DaemonProcess(*below, "--set", "ssd.reserve_bytes=0", capacity="4MiB", grant="4MiB") as started:
        yield started


@pytest.mark.parametrize("mapped", [True, False], ids=["mapped", "socket"])
def test_nothing_stored_is_lost_while_writes_are_throttled(daemon: DaemonProcess, mapped: bool):
    draw = random.Random(1)

    def key(chain: int, index: int) -> bytes:
        return sha256(f"{mapped} {chain} {index}".encode()).digest()

    stored: set[bytes] = set()
    with Client(daemon.endpoint, namespace=f"chains mapped {mapped}", mapped=mapped, timeout=10.0) as client:
        before = client.stats()
        end = time.monotonic() + SECONDS
        while time.monotonic() < end:
            chain = draw.randrange(40)
            keys = [key(chain, index) for index in range(draw.randrange(1, 20))]
            match = client.match(keys)
            hits = len(match)
            assert hits == len(keys) or keys[hits] not in stored, client.why(keys).text
            if hits < len(keys):
                datas = [one[:1] * draw.choice(PAYLOAD_BYTES) for one in keys[hits:]]
                parent = keys[hits - 1] if hits else None
                statuses = client.put_many(keys[hits:], datas, parent=parent, request=match.request)
                stored.update(
                    one for one, status in zip(keys[hits:], statuses, strict=True) if status is PutStatus.STORED
                )
        after = client.stats()
    assert before.ssd is not None
    assert after.ssd is not None
    assert after.ssd.demoted_blocks > before.ssd.demoted_blocks + 50, "memory was never short"
    assert after.ssd.dropped_blocks == before.ssd.dropped_blocks
    assert len(stored) > 100
