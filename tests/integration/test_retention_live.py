"""Quotas, leases with a limit, retention and hints of a real daemon, through every kind of client."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from client_adapter import CLIENTS, AnyClient
from daemon_process import DaemonProcess, wait_until
from forked_daemons import Nursery
from raw_peer import RawPeer
from ssd_daemon import SLOT_BYTES, SsdDaemon, found_blocks, key_of, put_durable

from kvstore.errors import ErrorCode
from kvstore.protocol.keys import ROOT_KEY
from kvstore.protocol.messages import Clear, PutStatus, Reason, Retain, Retained
from kvstore.protocol.statistics import RetentionStats, TenantStats
from kvstore.protocol.version import MAX_KEYS_PER_RETAIN
from kvstore_client import InvalidArgument, Throttled

DATA = bytes(65_000)
"""A block here; sixteen of them fill the tier, and four the quota of tenant ``chat``."""

Open = Callable[..., AnyClient]
every_kind = pytest.mark.parametrize("kind", ["sync", "uvloop-socket"])


@pytest.fixture(scope="module")
def daemon() -> Iterator[DaemonProcess]:
    """Room for sixteen blocks, eight of which may be leased and four retained."""
    environ = {"KVSTORE_QUOTA__TENANTS": "chat=256KiB", "KVSTORE_RETENTION__HINT_S": "0.5"}
    with DaemonProcess("--slab", "128KiB", capacity="1MiB", grant="512KiB", environ=environ) as daemon:
        yield daemon


@pytest.fixture
def connect(kind: str, namespace: str, stack: ExitStack, daemon: DaemonProcess) -> Open:
    """Makes clients, whose namespaces are empty afterwards."""

    def make(**options: Any) -> AnyClient:
        client = stack.enter_context(CLIENTS[kind](daemon.endpoint, **{"namespace": namespace, **options}))
        stack.callback(client.clear)
        return client

    return make


def keys_of(name: str, count: int) -> list[bytes]:
    return [f"{name} {number}".encode().ljust(32, b".") for number in range(count)]


def put_each(client: AnyClient, keys: list[bytes]) -> list[PutStatus]:
    """Each in a chain of its own."""
    return [client.put(key, DATA) for key in keys]


def retention(client: AnyClient) -> RetentionStats:
    stats: RetentionStats | None = client.stats().retention
    assert stats is not None
    return stats


def chat(client: AnyClient) -> TenantStats:
    (tenant,) = client.stats().tenants
    assert isinstance(tenant, TenantStats)
    assert tenant.name == "chat"
    return tenant


@every_kind
def test_tenant_over_its_quota_loses_its_own_blocks_and_nobody_elses(connect: Open):
    other, tenant = connect(), connect(namespace="chat")
    others, own = keys_of("other", 6), keys_of("own", 10)
    before = chat(tenant)
    assert put_each(other, others) == [PutStatus.STORED] * 6
    assert put_each(tenant, own) == [PutStatus.STORED] * 10
    assert sum(other.exists(others)) == 6
    assert tenant.exists(own) == [False] * 6 + [True] * 4
    after = chat(tenant)
    assert (after.used_bytes, after.limit_bytes) == (256 << 10, 256 << 10)
    assert after.evicted_blocks - before.evicted_blocks == 6


@every_kind
def test_chain_longer_than_the_quota_is_refused_from_there_on(connect: Open):
    tenant = connect(namespace="chat")
    statuses = tenant.put_many(keys_of("chain", 7), [DATA] * 7)
    assert statuses == [PutStatus.STORED] * 4 + [PutStatus.REJECTED] * 3
    assert len(tenant.match(keys_of("chain", 7))) == 4
    assert chat(tenant).refused_puts >= 3


@every_kind
def test_client_that_leases_and_retains_everything_cannot_stop_another(connect: Open):
    greedy, other = connect(), connect(namespace="other")
    held = keys_of("held", 16)
    assert put_each(greedy, held) == [PutStatus.STORED] * 16
    matches = [greedy.match([key], lease=30) for key in held[:8]]
    bad = greedy.stats().server.bad_requests
    for key in held[8:]:
        with pytest.raises(Throttled, match=r"limits\.lease_share"):
            greedy.match([key], lease=30)
    assert greedy.stats().server.bad_requests == bad, "a right request that is refused is no bad one"
    assert retention(greedy).leased_bytes == 512 << 10
    assert greedy.retain(held, priority=100) == 4
    others = keys_of("other", 24)
    assert put_each(other, others) == [PutStatus.STORED] * 24
    assert sum(greedy.exists(held)) >= 8, "the leases held"
    for match in matches:
        match.release()
    assert retention(greedy).leased_bytes == 0


@every_kind
def test_lease_on_a_longer_chain_is_answered_with_what_it_holds(connect: Open):
    client = connect()
    chain = keys_of("chain", 12)
    assert client.put_many(chain, [DATA] * 12) == [PutStatus.STORED] * 12
    assert len(client.match(chain)) == 12
    before = client.stats().lookups
    with client.match(chain, lease=30) as match:
        assert len(match) == 8
        lookups = client.stats().lookups
        # The others are there: no cause of a miss is found for them, so none is counted.
        assert lookups.match_hits - before.match_hits == lookups.match_keys - before.match_keys
        assert put_each(client, keys_of("more", 8)) == [PutStatus.STORED] * 8
        assert len(client.match(chain)) == 8


@every_kind
def test_retained_blocks_stay_and_end_with_their_time(connect: Open):
    client = connect()
    system, rest = keys_of("system", 3), keys_of("rest", 30)
    assert client.put_many(system, [DATA] * 3) == [PutStatus.STORED] * 3
    assert client.retain(system, priority=90, ttl_s=1.5) == 3
    assert retention(client).retained_blocks == 3
    assert put_each(client, rest) == [PutStatus.STORED] * 30
    assert len(client.match(system)) == 3
    wait_until(lambda: not retention(client).retained_blocks, 10.0, 0.1)
    assert put_each(client, keys_of("later", 16)) == [PutStatus.STORED] * 16
    assert len(client.match(system)) == 0


@every_kind
def test_more_keys_than_a_request_takes_are_told_in_several(connect: Open):
    client = connect()
    chain = keys_of("chain", 12)
    client.put_many(chain, [DATA] * 12)
    others = keys_of("nobody", MAX_KEYS_PER_RETAIN - 10)
    assert client.retain([*chain[:10], *others, *chain[10:]], priority=70) == 4
    assert client.retain([*chain[:2], *others, *chain[2:]], priority=60) == 4
    assert client.retain(chain, priority=50) == 0


@every_kind
def test_blocks_with_a_time_to_live_are_dropped(connect: Open):
    client = connect()
    keys = keys_of("short", 3)
    assert client.put_many(keys, [DATA] * 3) == [PutStatus.STORED] * 3
    assert client.retain(keys[1:], priority=50, ttl_s=0.2, drop=True) == 2
    wait_until(lambda: client.exists(keys) == [True, False, False], 10.0, 0.1)
    assert client.get(keys[2]) is None


@every_kind
def test_low_priority_leaves_first_and_normal_ends_it(connect: Open):
    client = connect()
    keys = keys_of("x", 16)
    assert put_each(client, keys) == [PutStatus.STORED] * 16
    assert client.retain(keys[12:], priority=0) == 4
    assert client.retain(keys[15:], priority=50) == 0
    assert client.get(keys[12]) == DATA
    assert put_each(client, keys_of("y", 3)) == [PutStatus.STORED] * 3
    assert client.exists(keys) == [True] * 12 + [False] * 3 + [True]


@every_kind
def test_session_that_is_over_leaves_first_and_one_that_comes_back_stays(connect: Open):
    client = connect()
    over, back, rest = keys_of("over", 3), keys_of("back", 3), keys_of("rest", 10)
    client.put_many(back, [DATA] * 3)
    client.put_many(over, [DATA] * 3)
    put_each(client, rest)
    assert client.hint(over, soon=False) == 3
    assert client.hint(back) == 3
    assert put_each(client, keys_of("new", 3)) == [PutStatus.STORED] * 3
    assert (sum(client.exists(over)), sum(client.exists(back)), sum(client.exists(rest))) == (0, 3, 10)
    assert put_each(client, keys_of("newer", 10)) == [PutStatus.STORED] * 10
    assert sum(client.exists(back)) == 3
    wait_until(lambda: not retention(client).retained_blocks, 10.0, 0.1)


@every_kind
@pytest.mark.parametrize(
    ("arguments", "cause"),
    [
        ({"priority": 101}, "priority must be a whole number from 0 to 100"),
        ({"priority": True}, "priority must be a whole number"),
        ({"ttl_s": 0}, "ttl_s must be more than 0"),
        ({"drop": True}, "it needs ttl_s"),
    ],
)
def test_impossible_retention_is_refused_by_name(connect: Open, arguments: dict[str, Any], cause: str):
    with pytest.raises(InvalidArgument, match=cause):
        connect().retain(keys_of("x", 1), **arguments)


def test_daemon_refuses_what_no_sdk_sends(daemon: DaemonProcess):
    with RawPeer(daemon.endpoint) as peer:
        peer.ready("raw", newest=5)
        many = bytes(32) * (MAX_KEYS_PER_RETAIN + 1)
        for fields in (
            (bytes(32), 101),
            (bytes(32), 50, 1 << 60),
            (bytes(32), 50, 0, True),
            (b"short", 60),
            (many, 60),
        ):
            assert peer.error(Retain, *fields).code == ErrorCode.BAD_REQUEST
        reply = peer.ask(Retain, bytes(32), 60)
        assert isinstance(reply, Retained)
        assert (reply.count, reply.waiting) == (0, 0)


def test_older_client_is_told_a_reason_that_it_knows(daemon: DaemonProcess):
    answers = {}
    for version in (4, 5):
        with RawPeer(daemon.endpoint) as peer:
            peer.ready("chat", newest=version)
            frames = []
            parent = ROOT_KEY
            for key in keys_of("old", 5):
                frames += peer.record(key, DATA, parent=parent)
                parent = key
            reply = peer.put(*frames)
            answers[version] = (reply.statuses[-1], reply.reasons[-1])
            peer.ask(Clear)
    assert answers == {4: (PutStatus.REJECTED, Reason.NO_ROOM), 5: (PutStatus.REJECTED, Reason.QUOTA)}


def test_quota_retention_and_hints_over_an_ssd(tmp_path: Path):
    quota_bytes = 40 * SLOT_BYTES
    settings = ("--set", f"quota.ssd_tenants=chat={quota_bytes}", "--set", "retention.hint_s=60")
    with Nursery() as nursery, SsdDaemon(nursery, tmp_path, *settings) as daemon:
        with daemon.client() as client, daemon.client(namespace="chat") as tenant:
            put_durable(client, range(32))
            put_durable(tenant, range(64))
            stats = chat(tenant)
            assert stats.ssd_used_bytes <= stats.ssd_limit_bytes == quota_bytes
            assert stats.ssd_evicted_blocks >= 24
            put_durable(client, range(100, 180))
            assert found_blocks(client, range(32)) == list(range(32)), "nobody else's blocks left the SSD"

            # A chain that memory does not hold any more is retained where it is, and when it comes up.
            put_durable(client, range(200, 280))
            chain = [key_of(number) for number in range(8)]
            assert client.retain(chain, priority=90, ttl_s=300) == 8
            waiting = retention(client).waiting_blocks
            assert waiting > 0, "some of it is on the SSD only"
            assert client.hint(chain) == 8
            assert client.prefetch(chain, wait=True) == 8
            assert (retention(client).retained_blocks, retention(client).waiting_blocks) == (8, 0)
            put_durable(client, range(300, 380))
            assert client.match(chain).tiers == ["dram"] * 8

            # A time to live counts in both tiers.
            short = [key_of(number) for number in range(16, 24)]
            assert client.retain(short, priority=50, ttl_s=0.5, drop=True) == 8
            wait_until(lambda: not any(client.exists(short)), 10.0, 0.1)
            assert retention(client).dropped_blocks == 8
            with daemon.client() as other:
                assert len(other.match(short)) == 0
            assert client.verify().problems == []
        daemon.restarted()
        with daemon.client() as client:
            assert len(client.match(chain)) == 8, "the blocks outlive the daemon, what was said of them does not"
            assert retention(client).retained_blocks + retention(client).waiting_blocks == 0
