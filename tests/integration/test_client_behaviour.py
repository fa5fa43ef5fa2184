"""What every client does, sync or async, mapped or over the socket: one suite against a live daemon."""

from __future__ import annotations

import array
import mmap
import random
import time
from collections.abc import Iterator

import numpy as np
import pytest
from client_adapter import MAPPING, AnyClient, Connect
from daemon_process import DaemonProcess, wait_until, wait_until_nothing_is_lent

from kvstore_client import InvalidArgument, Namespace, PutStatus, Throttled, chain_keys

STORED, EXISTS, REJECTED = PutStatus.STORED, PutStatus.EXISTS, PutStatus.REJECTED
SLOT = 64 * 1024
PAYLOAD = SLOT - 256
"""Exactly one 64 KiB slot with its header."""


def key(number: int) -> bytes:
    return number.to_bytes(4, "big") * 8


def data(number: int, length: int = 1000) -> bytes:
    return random.Random(number).randbytes(length)


def chain(count: int, salt: int = 0) -> list[bytes]:
    return chain_keys(range(count), 1, salt=b"%d" % salt)


@pytest.fixture
def client(connect: Connect) -> AnyClient:
    return connect()


def test_client_maps_unless_it_is_told_not_to(client: AnyClient, kind: str):
    """What the rest of the suite relies on."""
    assert client.mapped == (kind in MAPPING), client.unmapped
    assert client.unmapped == ("" if client.mapped else "mapped=False")
    (mine,) = [session for session in client.stats().sessions if session.session == client._session.number]
    assert mine.mapped == client.mapped


# ------------------------------------------------------------------ put and get


def test_get_of_stored_block_returns_its_bytes(client: AnyClient):
    for number, length in enumerate([1, 2, 255, 256, 4095, 3840, 3841, 4096, 65_535, 65_536, 65_537, 300_000], 1):
        assert client.put(key(number), data(number, length)) is STORED
    for number, length in enumerate([1, 2, 255, 256, 4095, 3840, 3841, 4096, 65_535, 65_536, 65_537, 300_000], 1):
        assert client.get(key(number)) == data(number, length)


def test_get_of_unknown_key_is_none(client: AnyClient):
    assert client.get(key(1)) is None
    with client.view(key(1)) as view:
        assert view is None
    assert client.get_into(key(1), bytearray(4)) is None


def test_put_of_present_key_keeps_the_first_record(client: AnyClient):
    assert client.put(key(1), b"first") is STORED
    assert client.put(key(1), b"second") is EXISTS
    assert client.get(key(1)) == b"first"
    assert client.put_many([key(1), key(2)], [b"third", b"new"]) == [EXISTS, STORED]
    assert client.get(key(1)) == b"first"


def test_put_many_with_one_key_twice_keeps_the_first_record(client: AnyClient):
    first, second = chain(2)
    client.put(first, b"a")
    assert client.put_many([second], [b"b"], parent=first) == [STORED]
    assert client.put_many([second], [b"c"], parent=first) == [EXISTS]
    assert client.get(second) == b"b"


def test_put_many_of_nothing_is_nothing(client: AnyClient):
    assert client.put_many([], []) == []
    assert client.put_many([], [], wait=False) == []
    assert client.get_many_into([], []) == []
    assert client.exists([]) == []
    assert client.remove([]) == 0
    assert len(client.match([])) == 0


def test_put_many_longer_than_one_request_stores_all(client: AnyClient):
    keys = chain(5000)
    assert set(client.put_many(keys, [b"%d" % at for at in range(5000)])) == {STORED}
    assert len(client.match(keys)) == 5000
    assert client.get(keys[4999]) == b"4999"
    assert client.clear() == 5000


def test_get_many_into_gives_lengths_and_misses_in_order(client: AnyClient):
    keys = chain(4)
    client.put_many(keys[:3], [data(at, 100 * (at + 1)) for at in range(3)])
    client.remove([keys[1]])
    outs = [bytearray(400) for _ in keys]
    assert client.get_many_into(keys, outs) == [100, None, 300, None]
    assert outs[0] == data(0, 100) + bytes(300)
    assert outs[1] == bytes(400)
    assert outs[2] == data(2, 300) + bytes(100)


def test_get_many_into_with_one_key_several_times_fills_every_buffer(client: AnyClient):
    client.put(key(1), data(1, 70_000))
    outs = [bytearray(70_000) for _ in range(20)]
    assert client.get_many_into([key(1)] * 20, outs) == [70_000] * 20
    assert all(out == data(1, 70_000) for out in outs)


def test_get_into_too_small_buffer_says_both_sizes_and_writes_nothing(client: AnyClient):
    client.put_many(chain(2), [b"x" * 10, b"y" * 100])
    outs = [bytearray(10), bytearray(99)]
    with pytest.raises(InvalidArgument, match=r"outs\[1\] has 99 bytes, its block has 100"):
        client.get_many_into(chain(2), outs)
    assert outs == [bytes(10), bytes(99)]
    assert client.get_into(chain(2)[1], bytearray(100)) == 100


def test_view_is_read_only_and_over_after_the_with(client: AnyClient):
    client.put(key(1), data(1))
    with client.view(key(1)) as view:
        assert view is not None
        assert view.readonly
        assert view == data(1)
        assert client.remove([key(1)]) == 1
        client.put(key(1), data(2))
        assert view == data(1)
    with pytest.raises(ValueError, match="released"):
        bytes(view)


def test_many_sizes_at_once_arrive_whole(client: AnyClient):
    lengths = [1, 70_000, 5, 200_000, 65_536, 3, 65_280, 100]
    keys = chain(len(lengths))
    client.put_many(keys, [data(at, length) for at, length in enumerate(lengths)])
    outs = [bytearray(length) for length in lengths]
    assert client.get_many_into(keys, outs) == lengths
    assert outs == [data(at, length) for at, length in enumerate(lengths)]


# ------------------------------------------------------------------ buffers


def writable_buffers(length: int) -> Iterator[tuple[str, object]]:
    yield "bytearray", bytearray(length)
    yield "memoryview", memoryview(bytearray(length))
    yield "slice", memoryview(bytearray(length + 20))[10 : length + 10]
    yield "matrix", memoryview(bytearray(length)).cast("B", [length // 8, 8])
    yield "array", array.array("d", bytes(length))
    yield "mmap", mmap.mmap(-1, length)
    for dtype in ("uint8", "int8", "uint16", "int32", "int64", "float16", "float32", "float64", "complex64"):
        yield dtype, np.zeros(length // np.dtype(dtype).itemsize, dtype)
    yield "numpy matrix", np.zeros((4, length // 16), "float32")
    yield "numpy rows", np.zeros((8, length // 4), "uint8")[2:6]
    yield "numpy bool", np.zeros(length, "bool")


def raw(buffer: object) -> bytes:
    return memoryview(buffer).cast("B").tobytes() if not isinstance(buffer, np.ndarray) else buffer.tobytes()


def test_buffers_of_all_kinds_are_put_and_filled(client: AnyClient):
    for number, (name, source) in enumerate(writable_buffers(4096), 1):
        content = b"\0\1" * 2048 if name == "numpy bool" else data(number, 4096)
        if isinstance(source, np.ndarray):
            source.reshape(-1).view("uint8")[:] = np.frombuffer(content, "uint8")
        else:
            memoryview(source).cast("B")[:] = content
        assert raw(source) == content
        assert client.put(key(number), source) is STORED, name
        assert client.get(key(number)) == content, name
    for number, (name, target) in enumerate(writable_buffers(4096), 1):
        assert client.get_into(key(number), target) == 4096, name
        assert raw(target) == client.get(key(number)), name


def test_zero_dimensional_array_is_put_and_filled(client: AnyClient):
    assert client.put(key(1), np.array(3.5)) is STORED
    out = np.array(0.0)
    assert client.get_into(key(1), out) == 8
    assert out == 3.5


def test_torch_tensors_of_all_dtypes_are_put_and_filled(client: AnyClient):
    torch = pytest.importorskip("torch")
    for number, dtype in enumerate((torch.bfloat16, torch.float16, torch.float32, torch.int8, torch.bool), 1):
        tensor = (torch.arange(512).reshape(4, 128) % 7 - 3).to(dtype)
        assert client.put(key(number), tensor) is STORED
        out = torch.empty(4, 128, dtype=dtype)
        assert client.get_into(key(number), out) == tensor.numel() * tensor.element_size()
        assert torch.equal(out, tensor)
        assert client.get(key(number)) == tensor.view(torch.uint8).numpy().tobytes()
    with pytest.raises(InvalidArgument, match=r"contiguous; call \.contiguous\(\)"):
        client.put(key(9), torch.zeros(4, 4).T[:, 1:])
    grown = torch.ones(16, requires_grad=True)
    assert client.put(key(9), grown) is STORED


REFUSED_DATA = [
    (b"", "is empty"),
    (bytearray(), "is empty"),
    (np.zeros((0, 4)), "is empty"),
    ("text", "must be bytes, a memoryview, a numpy array or a CPU torch tensor, got str"),
    (None, "got NoneType"),
    (17, "got int"),
    ([1, 2], "got list"),
    (np.zeros((4, 4), "float32").T, "contiguous"),
    (np.zeros(10, "uint8")[::2], "contiguous"),
    (memoryview(bytes(10))[::2], "contiguous"),
    (np.array(["a", object()], dtype=object), "data of keys"),
]


@pytest.mark.parametrize(("buffer", "message"), REFUSED_DATA, ids=lambda value: str(type(value).__name__))
def test_put_of_what_is_no_block_says_why_and_stores_nothing(client: AnyClient, buffer: object, message: str):
    with pytest.raises(InvalidArgument, match=message):
        client.put(key(1), buffer)
    with pytest.raises(InvalidArgument, match=r"keys\[1\]"):
        client.put_many([key(1), key(2)], [b"good", buffer])
    assert client.exists([key(1), key(2)]) == [False, False]


@pytest.mark.parametrize(
    ("buffer", "message"),
    [(b"1234", "read-only"), (memoryview(b"1234"), "read-only"), (np.zeros(8)[::2], "contiguous"), (None, "NoneType")],
    ids=["bytes", "view", "strided", "none"],
)
def test_get_into_what_cannot_be_filled_says_why(client: AnyClient, buffer: object, message: str):
    client.put(key(1), b"1234")
    with pytest.raises(InvalidArgument, match=message):
        client.get_into(key(1), buffer)


def test_bytearray_can_be_changed_and_resized_after_put(client: AnyClient):
    """A put that was answered holds the caller's buffer no longer."""
    for number in range(1, 60):
        buffer = bytearray(data(number, 500_000))
        assert client.put(key(number), buffer) is STORED
        buffer.extend(b"more")
        assert client.get(key(number)) == data(number, 500_000)
        assert client.remove([key(number)]) == 1


def test_buffer_changed_after_put_without_wait_is_stored_as_it_was(client: AnyClient):
    buffer = bytearray(data(1, 300_000))
    for number in range(1, 20):
        buffer[:] = data(number, 300_000)
        assert client.put(key(number), buffer, wait=False) is PutStatus.PENDING
    buffer[:] = bytes(300_000)
    assert client.flush().stored == 19
    assert all(client.get(key(number)) == data(number, 300_000) for number in range(1, 20))


# ------------------------------------------------------------------ match, exists, remove, clear


def test_match_counts_leading_blocks_and_names_their_tiers(client: AnyClient):
    keys = chain(10)
    client.put_many(keys[:6], [b"x"] * 6)
    found = client.match(keys)
    assert (len(found), found.hits, found.tiers) == (6, 6, ["dram"] * 6)
    assert (found.lease, found.lease_s) == (0, 0.0)
    client.remove([keys[3]])
    assert len(client.match(keys)) == 3
    assert len(client.match(keys[4:])) == 2
    assert len(client.match(keys[6:])) == 0


def test_exists_tells_for_each_key(client: AnyClient):
    keys = chain(5)
    client.put(keys[1], b"x", parent=keys[0])
    assert client.exists(keys) == [False, True, False, False, False]
    assert client.exists(keys * 20_000) == [False, True, False, False, False] * 20_000


def test_block_without_its_parent_is_an_orphan_until_the_parent_comes(client: AnyClient):
    keys = chain(3)
    assert client.put(keys[2], b"c", parent=keys[1]) is STORED
    assert client.put(keys[1], b"b", parent=keys[0]) is STORED
    assert client.get(keys[2]) == b"c"
    assert len(client.match(keys)) == 0
    assert client.put(keys[0], b"a") is STORED
    assert len(client.match(keys)) == 3


def test_remove_keeps_descendants(client: AnyClient):
    keys = chain(4)
    client.put_many(keys, [b"a", b"b", b"c", b"d"])
    assert client.remove([keys[1], keys[1], key(77)]) == 1
    assert client.exists(keys) == [True, False, True, True]
    assert client.get(keys[3]) == b"d"
    assert client.put(keys[1], b"B", parent=keys[0]) is STORED
    assert len(client.match(keys)) == 4


def test_clear_empties_this_namespace_only(connect: Connect):
    one, other = connect(), connect(namespace="somebody else's")
    one.put_many(chain(3), [b"x"] * 3)
    other.put(chain(3)[0], b"y")
    assert one.clear() == 3
    assert one.clear() == 0
    assert other.get(chain(3)[0]) == b"y"
    assert other.clear() == 1


def test_namespaces_do_not_see_each_other(connect: Connect):
    described = [
        {"name": "a"},
        {"name": "b"},
        {"name": "a", "model": "m", "revision": "1"},
        {"name": "a", "model": "m", "revision": "2"},
        {"name": "a", "tenant_salt": b"t"},
        {"name": "a", "parts": 2},
        {"name": "a", "fidelity": "exact"},
    ]
    clients = [connect(namespace=Namespace(**fields)) for fields in described]
    for number, client in enumerate(clients):
        assert client.put(key(1), b"%d" % number) is STORED
    for number, client in enumerate(clients):
        assert client.get(key(1)) == b"%d" % number
    assert clients[0].remove([key(1)]) == 1
    assert [client.get(key(1)) is None for client in clients] == [True] + [False] * 6
    for client in clients:
        client.clear()


def test_clients_of_one_namespace_share_blocks(connect: Connect):
    one, other = connect(), connect()
    one.put(key(1), data(1))
    assert other.get(key(1)) == data(1)
    assert other.remove([key(1)]) == 1
    assert one.get(key(1)) is None


# ------------------------------------------------------------------ parts


def test_block_is_complete_when_all_its_parts_are_there(connect: Connect, namespace: str):
    client = connect(namespace=Namespace(name=namespace, parts=3))
    keys = chain(2)
    for part in (2, 0):
        assert client.put_many(keys, [b"%d" % part] * 2, part=part) == [STORED] * 2
    assert client.exists(keys) == [False, False]
    assert len(client.match(keys)) == 0
    assert client.get(keys[0], part=2) == b"2"
    assert client.get(keys[0], part=1) is None
    assert client.put(keys[0], b"1", part=1) is STORED
    assert client.exists(keys) == [True, False]
    assert len(client.match(keys)) == 1
    assert client.put(keys[1], b"1", part=1, parent=keys[0]) is STORED
    assert len(client.match(keys)) == 2
    assert client.get_many_into(keys, [bytearray(1), bytearray(1)], part=1) == [1, 1]
    assert client.remove([keys[0]]) == 1
    assert [client.get(keys[0], part=part) for part in range(3)] == [None] * 3


def test_part_that_the_namespace_has_not_is_rejected(connect: Connect, namespace: str):
    client = connect(namespace=Namespace(name=namespace, parts=2))
    assert client.put(key(1), b"x", part=2) is REJECTED
    assert client.put(key(1), b"x", part=65_535) is REJECTED
    assert client.get(key(1), part=65_535) is None
    for part in (-1, 65_536, "0", True, 1.0):
        with pytest.raises(InvalidArgument, match="part must be a whole number from 0 to 65535"):
            client.put(key(1), b"x", part=part)
        with pytest.raises(InvalidArgument, match="part must be a whole number from 0 to 65535"):
            client.get(key(1), part=part)


def test_parts_that_disagree_about_the_parent_are_rejected(connect: Connect, namespace: str):
    client = connect(namespace=Namespace(name=namespace, parts=2))
    assert client.put(key(2), b"x", parent=key(1), part=0) is STORED
    assert client.put(key(2), b"x", parent=key(3), part=1) is REJECTED
    assert client.put(key(2), b"x", parent=key(1), part=1) is STORED


def test_chain_that_closes_a_circle_is_rejected(client: AnyClient):
    assert client.put(key(2), b"x", parent=key(1)) is STORED
    assert client.put(key(3), b"x", parent=key(2)) is STORED
    assert client.put(key(1), b"x", parent=key(3)) is REJECTED
    with pytest.raises(InvalidArgument, match="is its own parent"):
        client.put(key(4), b"x", parent=key(4))
    assert client.verify().problems == []


# ------------------------------------------------------------------ wait=False and flush


def test_puts_without_wait_are_counted_by_the_next_flush(client: AnyClient):
    assert client.put(key(1), b"x", wait=False) is PutStatus.PENDING
    assert client.put_many([key(2), key(3)], [b"y", b"z"], wait=False) == [PutStatus.PENDING] * 2
    assert client.put(key(1), b"again", wait=False) is PutStatus.PENDING
    assert client.put(key(9), b"x", part=1, wait=False) is PutStatus.PENDING
    done = client.flush()
    assert (done.stored, done.exists, done.rejected, done.throttled, done.lost) == (3, 1, 1, 0, 0)
    assert done.reasons == {"bad_part": 1}
    assert client.flush() == type(done)()


def test_client_reads_its_own_puts_without_flush(client: AnyClient):
    for number in range(1, 200):
        client.put(key(number), data(number, 20_000), wait=False)
        assert client.get(key(number)) == data(number, 20_000)


def test_close_publishes_puts_that_nobody_flushed(connect: Connect):
    one, other = connect(), connect()
    for number in range(1, 100):
        one.put(key(number), data(number, 100_000), wait=False)
    one.close()
    assert all(other.get(key(number)) == data(number, 100_000) for number in range(1, 100))


def test_more_puts_without_wait_than_may_be_unanswered_are_all_stored(client: AnyClient):
    keys = chain(2000)
    for number, block in enumerate(keys):
        client.put(block, b"%d" % number, wait=False)
    assert client.flush().stored == 2000
    assert len(client.match(keys)) == 2000


# ------------------------------------------------------------------ invalidate


def test_invalidate_ends_the_generation_for_those_who_did_not_say_so(connect: Connect):
    one, other = connect(), connect()
    one.put(key(1), b"old")
    assert other.get(key(1)) == b"old"
    one.invalidate()
    assert (one.generation, other.generation) == (1, 0)
    for client in (one, other):
        assert client.get(key(1)) is None
        assert client.exists([key(1)]) == [False]
        assert len(client.match([key(1)])) == 0
    assert other.put(key(1), b"computed with old weights") is REJECTED
    assert other.put(key(2), b"old", wait=False) is PutStatus.PENDING
    assert other.flush().reasons == {"stale_namespace": 1}
    assert one.put(key(1), b"new") is STORED
    assert other.get(key(1)) is None
    assert other.remove([key(1)]) == 0
    assert other.clear() == 0
    other.invalidate()
    assert other.generation == 1
    assert other.get(key(1)) == b"new"
    assert other.put(key(2), b"new too") is STORED
    assert one.get(key(2)) == b"new too"


def test_stale_client_knows_that_it_is_stale(connect: Connect):
    one, other = connect(), connect()
    assert not other.stale
    one.invalidate()
    other.put(key(1), b"x")
    assert other.stale
    other.invalidate()
    assert not other.stale


def test_new_client_joins_the_current_generation(connect: Connect):
    one = connect()
    for _ in range(3):
        one.invalidate()
    assert connect().generation == 3


# ------------------------------------------------------------------ prefetch, statistics, verify


def test_prefetch_counts_what_is_there(client: AnyClient):
    keys = chain(3)
    client.put_many(keys[:2], [b"x"] * 2)
    assert client.prefetch(keys) == 2
    with pytest.raises(InvalidArgument, match="unknown tier 'tape'; there are: hbm, dram, ssd, remote"):
        client.prefetch(keys, "tape")
    with pytest.raises(InvalidArgument, match="no ssd tier"):
        client.prefetch(keys, "ssd")


def test_stats_count_what_was_done(client: AnyClient, daemon: DaemonProcess):
    before = client.stats()
    assert (before.pid, before.endpoint) == (daemon.pid, daemon.endpoint)
    client.put(key(1), data(1, 5000))
    client.put(key(1), data(1, 5000))
    client.put(key(2), b"x", part=1)
    client.get(key(1))
    client.get(key(3))
    client.match([key(1), key(3)])
    after = client.stats()
    assert after.puts.stored - before.puts.stored == 1
    assert after.puts.exists - before.puts.exists == 1
    assert after.puts.rejected - before.puts.rejected == 1
    assert after.puts.bytes_in - before.puts.bytes_in == 5000
    assert after.lookups.get_keys - before.lookups.get_keys == 2
    assert after.lookups.get_hits - before.lookups.get_hits == 1
    assert after.lookups.match_keys - before.lookups.match_keys == 2
    assert after.lookups.match_hits - before.lookups.match_hits == 1
    assert after.dram.records - before.dram.records == 1
    assert after.dram.record_bytes - before.dram.record_bytes == 5256
    if not client.mapped:
        assert after.dram.granted_bytes == after.dram.limbo_bytes == 0
    wait_until_nothing_is_lent(client.stats)
    assert [space.blocks for space in after.namespaces if space.name == client.namespace.name] == [1]


def test_verify_reads_every_record(client: AnyClient):
    before = client.verify()
    client.put_many(chain(10), [data(at, 10_000) for at in range(10)])
    after = client.verify()
    assert after.problems == []
    assert after.records - before.records == 10
    assert after.bytes - before.bytes == 10 * 10_256


def test_ping_takes_a_moment(client: AnyClient):
    assert 0 < client.ping() < 5


# ------------------------------------------------------------------ a full tier


def put_slots(client: AnyClient, keys: list[bytes], **options: object) -> list[PutStatus]:
    return client.put_many(keys, [data(at, PAYLOAD) for at in range(len(keys))], **options)


def test_full_tier_evicts_the_least_recently_used_and_stays_in_its_capacity(connect_small: Connect):
    client = connect_small(payload_bytes=[PAYLOAD])
    for number in range(1, 41):
        assert client.put(key(number), data(number, PAYLOAD)) is STORED
        assert client.get(key(1)) == data(1, PAYLOAD)
    assert client.exists([key(number) for number in range(1, 41)]) == [True] + [False] * 24 + [True] * 15
    stats = client.stats()
    assert stats.dram.resident_bytes <= stats.dram.capacity_bytes == 16 * SLOT
    assert client.verify().problems == []


def test_chain_longer_than_the_capacity_keeps_its_head(connect_small: Connect):
    client = connect_small(payload_bytes=[PAYLOAD])
    keys = chain(25)
    assert put_slots(client, keys) == [STORED] * 16 + [REJECTED] * 9
    assert len(client.match(keys)) == 16
    client.clear()
    parents = [None, *keys]
    # One engine request: what is refused of its tail must not come back as orphans that push its head out.
    request = client.match(keys).request
    statuses = [client.put(keys[at], data(at, PAYLOAD), parent=parents[at], request=request) for at in range(25)]
    assert statuses == [STORED] * 16 + [REJECTED] * 9
    assert len(client.match(keys)) == 16
    assert [client.get(block) for block in keys[:16]] == [data(at, PAYLOAD) for at in range(16)]


def test_evicted_tail_can_be_put_again(connect_small: Connect):
    client = connect_small(payload_bytes=[PAYLOAD])
    one, other = chain(10, 1), chain(10, 2)
    put_slots(client, one)
    put_slots(client, other)
    assert len(client.match(one)) == 6
    assert len(client.match(other)) == 10
    assert put_slots(client, one) == [EXISTS] * 6 + [STORED] * 4
    assert len(client.match(one)) == 10
    assert len(client.match(other)) == 6


def test_descendants_of_a_removed_block_leave_first(connect_small: Connect):
    client = connect_small(payload_bytes=[PAYLOAD])
    old, recent = chain(8, 1), chain(8, 2)
    put_slots(client, old)
    put_slots(client, recent)
    assert client.remove([recent[2]]) == 1
    assert [client.put(key(at), data(at, PAYLOAD)) for at in range(1, 7)] == [STORED] * 6
    assert client.exists(recent) == [True, True] + [False] * 6
    assert client.exists(old) == [True] * 8


def test_sizes_that_change_get_the_memory_of_those_before(connect_small: Connect):
    client = connect_small()
    for round_, length in enumerate((PAYLOAD, 4000, 100_000, 20_000, 1, PAYLOAD)):
        keys = chain(60, round_)
        statuses = [client.put(block, data(at, length)) for at, block in enumerate(keys)]
        assert set(statuses) == {STORED}
        present = client.exists(keys)
        assert any(present)
        for at, block in enumerate(keys):
            assert client.get(block) == (data(at, length) if present[at] else None)
    assert client.verify().problems == []


def test_block_whose_parts_never_fit_together_is_rejected_and_others_stay(connect_small: Connect, namespace: str):
    client = connect_small(namespace=Namespace(name=namespace, parts=20), payload_bytes=[PAYLOAD])
    statuses = [client.put(key(1), data(part, PAYLOAD), part=part) for part in range(20)]
    assert statuses[:16] == [STORED] * 16
    assert STORED not in statuses[16:17]
    assert client.verify().problems == []


# ------------------------------------------------------------------ leases


def test_lease_keeps_its_blocks_until_released(connect_small: Connect):
    client = connect_small(payload_bytes=[PAYLOAD])
    keys = chain(8)
    put_slots(client, keys)
    lease = client.match(keys, lease=30)
    assert (len(lease), lease.lease_s) == (8, 30.0)
    assert lease.lease > 0
    for number in range(1, 30):
        assert client.put(key(number), data(number, PAYLOAD)) is STORED
    assert len(client.match(keys)) == 8
    assert client.stats().leases == 1
    lease.release()
    lease.release()
    assert client.stats().leases == 0
    for number in range(101, 130):
        client.put(key(number), data(number, PAYLOAD))
    assert len(client.match(keys)) == 0


def test_lease_as_context_manager_ends_with_it(connect_small: Connect):
    client = connect_small()
    client.put(key(1), b"x")
    with client.match([key(1)], lease=30) as lease:
        assert lease.lease
        assert client.stats().leases == 1
    assert client.stats().leases == 0
    with client.match([key(2)], lease=30) as nothing:
        assert nothing.lease == 0


def test_leases_hold_half_of_the_tier_and_puts_go_on(connect_small: Connect):
    client = connect_small(payload_bytes=[PAYLOAD])
    keys = chain(16)
    put_slots(client, keys)
    with client.match(keys, lease=30) as lease:
        assert len(lease) == 8
        with pytest.raises(Throttled, match=r"limits\.lease_share"):
            client.match(keys[8:], lease=30)
        for number in range(1, 30):
            assert client.put(key(number), data(number, PAYLOAD)) is STORED
        assert client.put_many([key(101), key(102)], [b"x" * PAYLOAD] * 2) == [STORED] * 2
        assert len(client.match(keys)) == 8
    if not client.mapped:
        assert client.stats().dram.granted_bytes == 0
    wait_until_nothing_is_lent(client.stats)


def test_lease_expires_by_itself(connect_small: Connect):
    client = connect_small(payload_bytes=[PAYLOAD])
    keys = chain(8)
    put_slots(client, keys)
    begin = time.monotonic()
    assert client.match(keys, lease=1.5).lease
    for number in range(1, 30):
        assert client.put(key(number), data(number, PAYLOAD)) is STORED
    assert client.stats().leases == 0 or len(client.match(keys)) == 8
    wait_until(lambda: client.stats().leases == 0, 5)
    assert time.monotonic() - begin >= 1.4
    for number in range(101, 130):
        assert client.put(key(number), data(number, PAYLOAD)) is STORED
    assert len(client.match(keys)) == 0


def test_leased_block_can_be_removed(connect_small: Connect):
    client = connect_small()
    keys = chain(3)
    client.put_many(keys, [b"x"] * 3)
    with client.match(keys, lease=30):
        assert client.remove([keys[2]]) == 1
        assert client.clear() == 2
    assert client.verify().problems == []


def test_lease_over_the_daemons_limit_is_refused_with_the_limit(connect_small: Connect):
    client = connect_small()
    client.put(key(1), b"x")
    with pytest.raises(InvalidArgument, match=r"at most 60 s .*61 s were asked for"):
        client.match([key(1)], lease=61)
    for seconds in (0, -1, 601, float("nan")):
        with pytest.raises(InvalidArgument, match="lease must be more than 0 and at most 600 seconds"):
            client.match([key(1)], lease=seconds)


def test_request_joins_match_gets_and_puts_into_one_access(connect_small: Connect):
    """Blocks of one engine request leave tail first, whatever the order in which they were put."""
    client = connect_small(payload_bytes=[PAYLOAD])
    keys = chain(8)
    found = client.match(keys)
    assert found.request > 0
    for at in range(8):
        client.put(keys[at], data(at, PAYLOAD), parent=keys[at - 1] if at else None, request=found.request)
    for number in range(1, 13):
        client.put(key(number), data(number, PAYLOAD))
    assert client.exists(keys) == [True] * 4 + [False] * 4
