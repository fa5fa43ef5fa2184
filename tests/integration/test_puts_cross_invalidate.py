"""Puts that another thread's ``invalidate()`` overtakes: stale over every path, never a bad record, nothing stored."""

from __future__ import annotations

import threading
import time
from typing import Any

import pytest
from client_adapter import CLIENTS, AnyClient, Connect
from daemon_process import DaemonProcess

from kvstore.protocol.messages import PutStatus
from kvstore_client import Client

PAYLOAD = bytes(64 << 10)


def keys_of(number: int, blocks: int = 3) -> list[bytes]:
    return [(4 * number + block + 1).to_bytes(4, "big") * 8 for block in range(blocks)]


@pytest.mark.parametrize("wait", [True, False])
@pytest.mark.parametrize("mapped", [None, False], ids=["mapped", "socket"])
def test_put_of_a_generation_that_its_client_left_is_stale(
    daemon: DaemonProcess, namespace: str, monkeypatch: pytest.MonkeyPatch, mapped: bool | None, wait: bool
):
    with Client(daemon.endpoint, namespace=namespace, mapped=mapped) as client:
        client.ping()
        check = client._operations.check_chain

        def overtaken(*arguments: Any) -> Any:
            chain = check(*arguments)
            client.invalidate()
            return chain

        with monkeypatch.context() as patch:
            patch.setattr(client._operations, "check_chain", overtaken)
            statuses = client.put_many(keys_of(0), [PAYLOAD] * 3, wait=wait)
        assert set(statuses) == {PutStatus.REJECTED if wait else PutStatus.PENDING}
        done = client.flush()
        assert (done.rejected, done.stored, done.lost) == (0 if wait else 3, 0, 0)
        assert done.reasons == ({} if wait else {"stale_namespace": 3})
        # The client moved on itself: it is not stale.
        assert not client.stale
        assert client.exists(keys_of(0)) == [False] * 3
        assert client.put_many(keys_of(0), [PAYLOAD] * 3) == [PutStatus.STORED] * 3
        assert not client.stale
        client.clear()


@pytest.mark.parametrize("kind", list(CLIENTS))
def test_puts_that_cross_invalidations_are_stored_or_stale(connect: Connect, kind: str):
    client: AnyClient = connect()
    client.ping()
    stop = threading.Event()

    def move_on() -> None:
        while not stop.is_set():
            client.invalidate()
            time.sleep(0.002)

    thread = threading.Thread(target=move_on)
    thread.start()
    waited: set[PutStatus] = set()
    try:
        until = time.monotonic() + 1.5
        number = 0
        while time.monotonic() < until:
            number += 1
            waited.update(client.put_many(keys_of(number), [PAYLOAD] * 3))
            client.put_many(keys_of(number + 100_000), [PAYLOAD] * 3, wait=False)
    finally:
        stop.set()
        thread.join()
    done = client.flush()
    assert waited <= {PutStatus.STORED, PutStatus.REJECTED}
    assert set(done.reasons) <= {"stale_namespace"}
    assert done.stored
    assert done.lost == 0
    assert not client.stale
    client.clear()
