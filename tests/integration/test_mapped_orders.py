"""What a client did before comes before what it does next, whichever way each of the two is carried."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from itertools import permutations, product

import pytest
from client_adapter import CLIENTS, AnyClient
from daemon_process import DaemonProcess

from kvstore_client import Client, Namespace, PutStatus

ORDERS = list(permutations(["put", "remove", "get"]))


def key(number: int) -> bytes:
    return (number + 1).to_bytes(4, "big") * 8


@pytest.mark.parametrize("order", ORDERS, ids=["-".join(order) for order in ORDERS])
@pytest.mark.parametrize("wait", [True, False], ids=["wait", "no wait"])
def test_put_remove_and_get_in_any_order_by_any_clients_answer_in_that_order(
    daemon: DaemonProcess, namespace: str, order: tuple[str, ...], wait: bool
):
    with (
        daemon.connect(namespace=namespace, mapped=True) as one,
        daemon.connect(namespace=namespace, mapped=True) as other,
        daemon.connect(namespace=namespace, mapped=False) as sent,
    ):
        for number, (before, clients) in enumerate(
            product([False, True], product([one, other, sent], repeat=len(order)))
        ):
            there = b"before %d" % number if before else None
            if there is not None:
                sent.put(key(number), there)
            for operation, client in zip(order, clients, strict=True):
                if operation == "put":
                    data = b"after %d" % number
                    told = client.put(key(number), data, wait=wait)
                    assert told is (
                        PutStatus.PENDING if not wait else PutStatus.STORED if there is None else PutStatus.EXISTS
                    )
                    there = there or data
                    if not wait and len(set(clients)) > 1:
                        # Order holds for one client; for another one it needs to be said.
                        done = client.flush()
                        assert (done.rejected, done.throttled, done.lost) == (0, 0, 0)
                elif operation == "remove":
                    assert client.remove([key(number)]) == (there is not None)
                    there = None
                else:
                    assert client.get(key(number)) == there
            clients[order.index("put")].flush()
            for client in (one, other, sent):
                assert client.get(key(number)) == there


def read_get(client: AnyClient, wanted: bytes, length: int) -> bytes | None:
    return client.get(wanted)


def read_into(client: AnyClient, wanted: bytes, length: int) -> bytes | None:
    out = bytearray(length)
    got = client.get_into(wanted, out)
    return None if got is None else bytes(out[:got])


def read_many(client: AnyClient, wanted: bytes, length: int) -> bytes | None:
    outs = [bytearray(length), bytearray(length)]
    lengths = client.get_many_into([key(10**6), wanted], outs)
    assert lengths[0] is None
    return None if lengths[1] is None else bytes(outs[1][: lengths[1]])


def read_view(client: AnyClient, wanted: bytes, length: int) -> bytes | None:
    with client.view(wanted) as found:
        return None if found is None else bytes(found)


READS = [read_get, read_into, read_many, read_view]


@pytest.fixture(params=["sync", "uvloop"])
def make(request: pytest.FixtureRequest, daemon: DaemonProcess, stack: ExitStack) -> Callable[..., AnyClient]:
    """Makes clients of the module's daemon."""
    return lambda **options: stack.enter_context(CLIENTS[request.param](daemon.endpoint, **options))


@pytest.mark.parametrize("read", READS)
@pytest.mark.parametrize("mapped", [True, False], ids=["mapped", "sent"])
def test_put_that_nobody_waited_for_is_read_by_its_client(
    make: Callable[..., AnyClient],
    namespace: str,
    read: Callable[[AnyClient, bytes, int], bytes | None],
    mapped: bool,
):
    client = make(namespace=namespace, mapped=mapped)
    sizes = [100] * 60 + [70_000] * 20 + [1_500_000] * 3
    for number, length in enumerate(sizes):
        first, second = (bytes([number, turn]) * (length // 2) for turn in (0, 1))
        assert client.put(key(0), first, wait=False) is PutStatus.PENDING
        assert client.put(key(0), second, wait=False) is PutStatus.PENDING
        assert read(client, key(0), length) == first
        assert client.remove([key(0)]) == 1
        assert read(client, key(0), length) is None
        assert client.put(key(0), second, wait=False) is PutStatus.PENDING
        assert client.exists([key(0)]) == [True]
        assert read(client, key(0), length) == second
        assert client.clear() == 1
    done = client.flush()
    rounds = len(sizes)
    assert (done.stored, done.exists, done.rejected, done.throttled, done.lost) == (2 * rounds, rounds, 0, 0, 0)


@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize("mapped", [True, False], ids=["mapped", "sent"])
def test_puts_that_nobody_waited_for_are_matched_by_their_client(
    make: Callable[..., AnyClient], namespace: str, parts: int, mapped: bool
):
    client = make(mapped=mapped, namespace=Namespace(name=namespace, parts=parts))
    for number in range(40):
        keys = [key(10 * number + block) for block in range(10)]
        for part in range(parts):
            assert len(client.match(keys)) == 0
            datas = [bytes([part, block]) * 50 for block in range(10)]
            told = client.put_many(keys, datas, part=part, wait=False)
            assert told == [PutStatus.PENDING] * 10
        found = client.match(keys)
        assert (len(found), found.tiers) == (10, ["dram"] * 10)
    assert client.flush().stored == 400 * parts
    client.clear()


def test_answers_of_puts_are_theirs_when_the_ring_has_gone_around(daemon: DaemonProcess, namespace: str):
    """An answer's place in the ring is used again; whoever did not look in time would take another one's."""
    with daemon.connect(namespace=namespace, mapped=True, timeout=20.0) as client:
        keys = [key(number) for number in range(3000)]
        assert set(client.put_many(keys, [b"x" * 100] * len(keys))) == {PutStatus.STORED}
        assert client.put(key(5000), b"new", wait=False) is PutStatus.PENDING
        assert client.put_many(keys, [b"x" * 100] * len(keys)) == [PutStatus.EXISTS] * len(keys)
        done = client.flush()
        assert (done.stored, done.exists) == (1, 0)
        assert client.put_many([key(5001), *keys], [b"x" * 100] * 3001, wait=False)[0] is PutStatus.PENDING
        done = client.flush()
        assert (done.stored, done.exists) == (1, 3000)
        client.clear()


def test_removal_by_another_client_is_seen_by_the_next_mapped_read(daemon: DaemonProcess, namespace: str):
    with (
        daemon.connect(namespace=namespace, mapped=True) as reader,
        daemon.connect(namespace=namespace, mapped=False) as writer,
    ):
        for number in range(300):
            data = b"%d" % number
            assert writer.put(key(1), data) is PutStatus.STORED
            assert reader.get(key(1)) == data
            assert len(reader.match([key(1)])) == 1
            assert writer.remove([key(1)]) == 1
            assert reader.get(key(1)) is None
            assert len(reader.match([key(1)])) == 0


def test_parts_of_different_clients_complete_a_block_for_all(daemon: DaemonProcess, namespace: str):
    described = Namespace(name=namespace, parts=2)
    clients: list[Client] = []
    with (
        daemon.connect(namespace=described, mapped=True) as one,
        daemon.connect(namespace=described, mapped=True) as other,
        daemon.connect(namespace=described, mapped=False) as sent,
    ):
        clients += (one, other, sent)
        for number, (first, second) in enumerate(product(clients, repeat=2)):
            assert first.put(key(number), b"first", part=1) is PutStatus.STORED
            assert [len(client.match([key(number)])) for client in clients] == [0, 0, 0]
            assert second.put(key(number), b"second", part=0) is PutStatus.STORED
            for client in clients:
                assert len(client.match([key(number)])) == 1
                assert [client.get(key(number), part=part) for part in (0, 1)] == [b"second", b"first"]
        one.clear()


def test_answers_to_puts_from_before_an_invalidation_do_not_make_the_client_that_moved_on_stale(
    daemon: DaemonProcess, namespace: str
):
    with (
        daemon.connect(namespace=namespace, mapped=True) as one,
        daemon.connect(namespace=namespace, mapped=True) as other,
    ):
        refused = 0
        for turn in range(200):
            for number in range(20):
                other.put(key(100 * turn + number), b"old", wait=False)
            one.invalidate()
            other.invalidate()
            reasons = other.flush().reasons
            assert reasons.keys() <= {"stale_namespace"}
            refused += sum(reasons.values())
            assert (other.stale, other.generation) == (False, one.generation)
            one.put(key(0), b"new")
            assert other.get(key(0)) == b"new"
        if not refused:
            pytest.skip("the daemon took every put before the invalidation that followed it")
