"""What the LMCache adapter is made of, with a daemon and without LMCache."""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import pytest
from daemon_process import DaemonProcess

from kvstore_client.integrations.l2_adapter import lookups, transfers
from kvstore_client.integrations.l2_adapter.keys import Chains
from kvstore_client.integrations.l2_adapter.locks import Locks
from kvstore_client.integrations.l2_adapter.places import PIECE_BYTES, ObjectLayout, Places
from kvstore_client.integrations.l2_adapter.sessions import Sessions, StoreAway
from kvstore_client.integrations.l2_adapter.settings import AdapterSettings
from kvstore_client.integrations.l2_adapter.transfers import Loaded, Stored, Transfer

KV: ObjectLayout = (((2, 4, 64, 128), "float16"),)
KV_BYTES = 2 * 4 * 64 * 128 * 2


class Adapter:
    """The parts, put together as the adapter does."""

    def __init__(self, daemon: DaemonProcess, **params: Any) -> None:
        self.settings = AdapterSettings.parse(
            {"endpoint": daemon.endpoint, "unknown_revision": "ignore", "retry_s": 0.1, "timeout_s": 2.0} | params
        )
        self.places = Places(self.settings, print)
        self.sessions = Sessions(self.settings)
        self.chains, self.locks = Chains(), Locks()

    def __enter__(self) -> Adapter:
        return self

    def __exit__(self, *error: object) -> None:
        self.sessions.close()

    def store(self, objects: Sequence[Transfer], layout: ObjectLayout = KV) -> Stored:
        place, done = self.places.of("m", layout), Stored()
        work = partial(
            transfers.store, place=place, objects=objects, chains=self.chains, ended=lambda: False, done=done
        )
        self.sessions.use(place, work, writes=True)
        return done

    def find(self, keys: Sequence[bytes], layout: ObjectLayout = KV) -> list[bool]:
        found, _ = self.sessions.use(
            self.places.of("m", layout),
            lambda session: lookups.find(session.client, keys, self.settings.lease_s, self.locks.take),
        )
        return found

    def exist(self, keys: Sequence[bytes]) -> list[bool]:
        return self.sessions.use(self.places.of("m", KV), lambda session: session.client.exists(keys))

    def load(self, objects: Sequence[Transfer], layout: ObjectLayout = KV) -> Loaded:
        place, done = self.places.of("m", layout), Loaded()
        work = partial(transfers.load, place=place, objects=objects, request=None, ended=lambda: False, done=done)
        self.sessions.use(place, work)
        return done


def objects_of(numbers: Sequence[int], size: int = KV_BYTES, *, empty: bool = False) -> list[Transfer]:
    objects = []
    for at, number in enumerate(numbers):
        values = np.random.default_rng(number).standard_normal(size // 2).astype(np.float16)
        data = np.zeros(size, np.uint8) if empty else values.view(np.uint8)
        objects.append(Transfer(at, (number + 1).to_bytes(32, "big"), data))
    return objects


def keys_of(objects: Sequence[Transfer]) -> list[bytes]:
    return [each.key for each in objects]


@pytest.mark.parametrize("mapped", [None, False])
@pytest.mark.parametrize("size", [KV_BYTES, PIECE_BYTES + 4096])
def test_objects_of_one_adapter_are_another_ones(mapped: bool | None, size: int) -> None:
    layout = KV if size == KV_BYTES else (((2, size // 4), "float16"),)
    with DaemonProcess(capacity="512MiB", grant="64MiB") as daemon:
        some = objects_of(range(6), size)
        with Adapter(daemon, mapped=mapped) as first:
            assert first.store(some, layout).stored == list(range(6))
        with Adapter(daemon, mapped=mapped) as second:
            wanted = objects_of([0, 1, 99, 2, 3, 98, 4, 5], size, empty=True)
            there = [True, True, False, True, True, False, True, True]
            assert second.find(keys_of(wanted), layout) == there
            loaded = second.load(wanted, layout)
            assert sorted(loaded.lengths) == [at for at in range(8) if there[at]]
            right = [wanted[at] for at in range(8) if there[at]]
            assert all(np.array_equal(one.data, other.data) for one, other in zip(right, some, strict=True))


def test_leases_hold_what_does_not_lead_until_it_is_unlocked() -> None:
    with DaemonProcess(capacity="4MiB", grant="4MiB") as daemon, Adapter(daemon) as adapter:
        some = objects_of(range(8))
        there = [1, 2, 4, 7]
        adapter.store([some[at] for at in there])
        assert [at for at, found in enumerate(adapter.find(keys_of(some))) if found] == there
        for begin in range(100, 200, 10):
            adapter.store(objects_of(range(begin, begin + 10)))
        held = [some[at] for at in there]
        assert len(adapter.load(held).lengths) == 4
        for match in adapter.locks.unlock(keys_of(held)):
            match.release()
        # Nobody holds them now, and what is stored is newer.
        begin = 1000
        while any(adapter.exist(keys_of(held))):
            assert begin < 1200
            adapter.store(objects_of(range(begin, begin + 10)))
            begin += 10


def test_a_restarted_daemon_is_used_again_by_the_same_sessions() -> None:
    with DaemonProcess(capacity="64MiB") as daemon, Adapter(daemon) as adapter:
        some = objects_of(range(4))
        adapter.store(some)
        daemon.kill()
        for _ in range(3):
            with pytest.raises(StoreAway):
                adapter.find(keys_of(some))
            with pytest.raises(StoreAway):
                adapter.store(some)
        assert adapter.sessions.losses == 1
        daemon.start()
        end = time.monotonic() + 20.0
        while True:
            try:
                assert adapter.find(keys_of(some)) == [False] * 4
                break
            except StoreAway:
                assert time.monotonic() < end
                time.sleep(0.02)
        assert adapter.store(some).stored == [0, 1, 2, 3]
        assert adapter.find(keys_of(some)) == [True] * 4
        assert not adapter.sessions.away


@pytest.mark.parametrize(("codec", "loss", "size"), [("kivi4", 0.2, 0.4), ("lossless", 0.0, 1.01)])
def test_a_codec_encodes_chunks_from_their_own_memory(codec: str, loss: float, size: float) -> None:
    with DaemonProcess(capacity="64MiB") as daemon:
        some = objects_of(range(3))
        with Adapter(daemon, codec=codec, head_dim=64) as first:
            done = first.store(some)
            assert done.stored == [0, 1, 2]
            assert done.stored_bytes < size * 3 * KV_BYTES
            assert first.store(some).exists == [0, 1, 2]
        with Adapter(daemon, codec=codec, head_dim=64) as second:
            targets = objects_of(range(3), empty=True)
            assert second.find(keys_of(targets)) == [True] * 3
            assert second.load(targets).lengths == dict.fromkeys(range(3), KV_BYTES)
            for target, source in zip(targets, some, strict=True):
                one, other = (each.data.view(np.float16).astype(np.float64) for each in (target, source))
                assert np.linalg.norm(one - other) <= loss * np.linalg.norm(other)


def test_the_end_of_a_prompt_leaves_before_its_beginning() -> None:
    with DaemonProcess(capacity="4MiB", grant="4MiB") as daemon, Adapter(daemon, lease_s=0) as adapter:
        some = objects_of(range(12))
        keys = keys_of(some)
        named: Any = [type("Name", (), {"key": key, "row": "row"}) for key in keys]
        adapter.chains.learn(named, [False] * 12)
        adapter.store(some)
        other = 1000
        while all(adapter.find(keys)):
            adapter.store(objects_of([other]))
            other += 1
            assert other < 1100
        found = adapter.find(keys)
        assert found == sorted(found, reverse=True), "a chunk in the middle left before one behind it"
        assert found[0]
