from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from kvstore.errors import ConnectionLost, InvalidArgument, Throttled
from kvstore.protocol.messages import PutStatus
from kvstore_client.integrations.l2_adapter import transfers
from kvstore_client.integrations.l2_adapter.keys import Chains
from kvstore_client.integrations.l2_adapter.places import PIECE_BYTES, Place, Places
from kvstore_client.integrations.l2_adapter.settings import AdapterSettings
from kvstore_client.integrations.l2_adapter.transfers import Loaded, Stored, Transfer


class Client:
    """A store in a dict, by key and part."""

    def __init__(self) -> None:
        self.records: dict[tuple[bytes, int], bytes] = {}
        self.parents: dict[bytes, bytes | None] = {}
        self.answers: dict[tuple[bytes, int], PutStatus] = {}
        self.puts = 0
        self.fails_after = 1 << 30

    def put_many(
        self, keys: Sequence[bytes], datas: Sequence[Any], *, parent: bytes | None, part: int
    ) -> list[PutStatus]:
        self.puts += 1
        if self.puts > self.fails_after:
            raise ConnectionLost("gone")
        statuses = []
        for key, data in zip(keys, datas, strict=True):
            status = self.answers.get((key, part))
            if status is None:
                status = PutStatus.EXISTS if (key, part) in self.records else PutStatus.STORED
                self.records.setdefault((key, part), bytes(data))
            statuses.append(status)
            self.parents[key], parent = parent, key
        return statuses

    def get_many_into(
        self, keys: Sequence[bytes], outs: Sequence[Any], *, part: int, request: int | None
    ) -> list[int | None]:
        for key, out in zip(keys, outs, strict=True):
            if len(self.records.get((key, part), b"")) > out.nbytes:
                raise InvalidArgument("too small")
        return [self.get_into(key, out, part=part, request=request) for key, out in zip(keys, outs, strict=True)]

    def get_into(self, key: bytes, out: Any, *, part: int, request: int | None) -> int | None:
        data = self.records.get((key, part))
        if data is None:
            return None
        if len(data) > out.nbytes:
            raise InvalidArgument("too small")
        out[: len(data)] = np.frombuffer(data, np.uint8)
        return len(data)


def place_of(*shape: int) -> Place:
    layout = ((shape, "uint8"),) if shape else ()
    return Places(AdapterSettings(), print).of("m", layout)


def objects(count: int, size: int, seed: int | None = 1) -> list[Transfer]:
    random = np.random.default_rng(seed)
    data = [
        np.zeros(size, np.uint8) if seed is None else random.integers(0, 256, size, dtype=np.uint8)
        for _ in range(count)
    ]
    return [Transfer(at, bytes([at + 1]) * 32, data[at]) for at in range(count)]


def session(client: Client) -> Any:
    return SimpleNamespace(client=client, tensors=None)


def never() -> bool:
    return False


@pytest.mark.parametrize("size", [100, PIECE_BYTES, PIECE_BYTES + 1, 2 * PIECE_BYTES + 12345])
def test_objects_come_back_from_their_parts(size: int) -> None:
    client, place, some = Client(), place_of(1, size), objects(3, size)
    done = Stored()
    transfers.store(session(client), place, some, Chains(), never, done)
    assert done.stored == [0, 1, 2]
    assert done.stored_bytes == 3 * size
    assert len(client.records) == 3 * place.parts
    targets = objects(3, size, None)
    loaded = Loaded()
    transfers.load(session(client), place, targets, 7, never, loaded)
    assert loaded.lengths == {0: size, 1: size, 2: size}
    assert all(np.array_equal(one.data, other.data) for one, other in zip(targets, some, strict=True))
    again = Stored()
    transfers.store(session(client), place, some, Chains(), never, again)
    assert (again.stored, again.exists, again.stored_bytes) == ([], [0, 1, 2], 0)


def test_one_part_that_is_refused_or_missing_is_the_object() -> None:
    size = 3 * PIECE_BYTES
    client, place, some = Client(), place_of(1, size), objects(3, size)
    client.answers[some[1].key, 1] = PutStatus.THROTTLED
    done = Stored()
    transfers.store(session(client), place, some, Chains(), never, done)
    assert done.stored == [0, 2]
    assert done.failed == {1: "throttled"}
    del client.records[some[2].key, 2]
    loaded = Loaded()
    transfers.load(session(client), place, objects(3, size, None), None, never, loaded)
    assert loaded.lengths == {0: size}
    assert loaded.failed == {1: "miss", 2: "miss"}


def test_parts_of_which_some_are_there_make_an_object_that_was_stored() -> None:
    size = 2 * PIECE_BYTES
    client, place, some = Client(), place_of(1, size), objects(1, size)
    client.records[some[0].key, 0] = bytes(some[0].data[:PIECE_BYTES])
    done = Stored()
    transfers.store(session(client), place, some, Chains(), never, done)
    assert done.stored == [0]


def test_a_record_of_another_size_is_no_answer() -> None:
    client, place, some = Client(), place_of(1, 100), objects(4, 100)
    for each, size in zip(some, (100, 99, 101, 100), strict=True):
        client.records[each.key, 0] = bytes(size)
    loaded = Loaded()
    transfers.load(session(client), place, objects(4, 100, None), None, never, loaded)
    assert sorted(loaded.lengths) == [0, 3]
    assert loaded.failed == {1: "size", 2: "size"}


def test_flat_objects_may_be_shorter_than_their_buffer() -> None:
    client, place = Client(), place_of()
    (source,) = objects(1, 70)
    transfers.store(session(client), place, [source], Chains(), never, Stored())
    loaded, (target,) = Loaded(), objects(1, 100, None)
    transfers.load(session(client), place, [target], None, never, loaded)
    assert loaded.lengths == {0: 70}
    assert np.array_equal(target.data[:70], source.data)
    assert not target.data[70:].any()


def test_a_failure_in_the_middle_leaves_what_was_done() -> None:
    size = 20 << 20
    client, place, some = Client(), place_of(), objects(5, size)
    client.fails_after = 2
    done = Stored()
    with pytest.raises(ConnectionLost):
        transfers.store(session(client), place, some, Chains(), never, done)
    assert done.stored == [0, 1]
    assert done.failed == {}


def test_what_is_late_is_left() -> None:
    size, asked = 20 << 20, 0

    def ended() -> bool:
        nonlocal asked
        asked += 1
        return asked > 2

    client, place, some = Client(), place_of(), objects(4, size)
    done = Stored()
    transfers.store(session(client), place, some, Chains(), ended, done)
    assert done.stored == [0, 1]
    assert done.failed == {2: "late", 3: "late"}
    loaded = Loaded()
    transfers.load(session(client), place, some, None, ended, loaded)
    assert loaded.failed == dict.fromkeys(range(4), "late")


def test_a_busy_daemon_fails_a_batch_and_not_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    size = 20 << 20
    client, place, some = Client(), place_of(), objects(3, size)
    transfers.store(session(client), place, some, Chains(), never, Stored())
    plain, calls = client.get_many_into, 0

    def busy(*args: Any, **options: Any) -> list[int | None]:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise Throttled("busy")
        return plain(*args, **options)

    monkeypatch.setattr(client, "get_many_into", busy)
    loaded = Loaded()
    transfers.load(session(client), place, some, None, never, loaded)
    assert sorted(loaded.lengths) == [0, 2]
    assert loaded.failed == {1: "throttled"}


def test_parents_are_those_of_lookups() -> None:
    chains, client, place, some = Chains(), Client(), place_of(), objects(4, 10)
    names: Any = [SimpleNamespace(key=each.key, row="row") for each in some]
    chains.learn(names, [False] * 4)
    transfers.store(session(client), place, [some[2], some[3], some[1]], chains, never, Stored())
    assert client.parents == {some[2].key: some[1].key, some[3].key: some[2].key, some[1].key: some[0].key}
