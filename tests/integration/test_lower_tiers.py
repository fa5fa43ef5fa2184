"""Clients of a daemon that has a tier below DRAM: a real daemon behind a relay that keeps blocks for it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from client_adapter import CLIENTS, MAPPING, AnyClient
from daemon_process import DaemonProcess
from fakes.lower_tier import LowerTier, other_process

from kvstore.protocol.messages import PutStatus, Reason
from kvstore.protocol.namespace import Namespace
from kvstore_client import DeadlineExceeded, InvalidArgument, ProtocolMismatch

KEYS = [bytes([number]) * 32 for number in range(1, 17)]
DATA = [bytes([number]) * 3000 for number in range(16)]

mapping = pytest.mark.parametrize("kind", MAPPING)
every_kind = pytest.mark.parametrize("kind", list(CLIENTS))
Relay = Callable[..., LowerTier]
Open = Callable[..., AnyClient]


@pytest.fixture(autouse=True)
def _relay_is_no_daemon_of_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvstore_client.link.probe", other_process)


@pytest.fixture
def relay(daemon: DaemonProcess, namespace: str, tmp_path: Path, stack: ExitStack) -> Relay:
    """Makes the relay of a test."""

    def make(**options: Any) -> LowerTier:
        return stack.enter_context(
            LowerTier(daemon.endpoint, tmp_path / "relay.sock", Namespace(name=namespace), **options)
        )

    return make


@pytest.fixture
def connect(kind: str, namespace: str) -> Iterator[Open]:
    """Makes clients of a relay."""
    with ExitStack() as clients:

        def make(tier: LowerTier, **options: Any) -> AnyClient:
            client = clients.enter_context(
                CLIENTS[kind](tier.endpoint, **{"namespace": namespace, "timeout": 10.0, **options})
            )
            assert client.mapped == (kind in MAPPING)
            return client

        yield make


def stored(client: AnyClient, tier: LowerTier, *, below: int) -> None:
    """Eight blocks of a chain, of which the last ones are below."""
    assert client.put_many(KEYS[:8], DATA[:8]) == [PutStatus.STORED] * 8
    if below:
        tier.sink(KEYS[8 - below : 8])
    tier.asked.clear()


def view(client: AnyClient, key: bytes) -> bytes | None:
    with client.view(key) as payload:
        return None if payload is None else bytes(payload)


def get_into(client: AnyClient, key: bytes) -> bytes | None:
    out = bytearray(4000)
    length = client.get_into(key, out)
    return None if length is None else bytes(out[:length])


def get_many_into(client: AnyClient, key: bytes) -> bytes | None:
    out = bytearray(4000)
    (length,) = client.get_many_into([key], [out])
    return None if length is None else bytes(out[:length])


READS: dict[str, Callable[[AnyClient, bytes], bytes | None]] = {
    "get": lambda client, key: client.get(key),
    "view": view,
    "get_into": get_into,
    "get_many_into": get_many_into,
}
every_read = pytest.mark.parametrize("read", READS.values(), ids=list(READS))


# ------------------------------------------------------------ reads


@mapping
@every_read
def test_miss_in_mapped_memory_comes_up_by_one_request(relay: Relay, connect: Open, read: Any):
    tier = relay()
    client = connect(tier)
    stored(client, tier, below=2)
    assert read(client, KEYS[0]) == DATA[0]
    assert not tier.asked
    assert read(client, KEYS[6]) == DATA[6]
    assert tier.asked == {"Prefetch": 1}
    assert tier.brought_up == [[KEYS[6]]]
    assert read(client, KEYS[6]) == DATA[6]
    assert tier.asked == {"Prefetch": 1}
    # The daemon is to answer before the client gives up.
    assert all(0 < timeout_ms <= 9001 for timeout_ms in tier.timeouts_ms)


@mapping
@every_read
def test_block_that_is_nowhere_is_a_miss_after_one_request(relay: Relay, connect: Open, read: Any):
    tier = relay()
    client = connect(tier)
    stored(client, tier, below=0)
    assert read(client, KEYS[12]) is None
    assert tier.asked == {"Prefetch": 1}


@mapping
@every_read
def test_daemon_without_a_lower_tier_is_asked_nothing(relay: Relay, connect: Open, read: Any):
    tier = relay(lower_tiers=0)
    client = connect(tier)
    stored(client, tier, below=2)
    assert read(client, KEYS[6]) is None
    assert client.match(KEYS[:8]).hits == 6
    assert client.match(KEYS[:8], prefetch=True).hits == 6
    assert not tier.asked


@mapping
@every_read
def test_what_does_not_come_up_in_time_is_a_miss(relay: Relay, connect: Open, read: Any):
    tier = relay()
    client = connect(tier, timeout=0.4)
    stored(client, tier, below=2)
    tier.silent = True
    begin = time.monotonic()
    assert read(client, KEYS[6]) is None
    assert 0.3 < time.monotonic() - begin < 5.0
    assert tier.asked == {"Prefetch": 1}
    tier.silent = False
    assert read(client, KEYS[6]) == DATA[6]


@mapping
@every_read
def test_session_lost_while_blocks_come_up_is_made_anew_and_asked_once_more(relay: Relay, connect: Open, read: Any):
    tier = relay()
    client = connect(tier)
    stored(client, tier, below=2)
    tier.lose_prefetches = 1
    assert read(client, KEYS[6]) == DATA[6]
    assert tier.asked["Prefetch"] == 2
    assert client.mapped


@mapping
def test_many_misses_come_up_by_one_request(relay: Relay, connect: Open):
    tier = relay()
    client = connect(tier)
    stored(client, tier, below=5)
    outs = [bytearray(4000) for _ in range(9)]
    wanted = [*KEYS[:8], KEYS[12]]
    before = client.stats().lookups
    tier.asked.clear()
    lengths = client.get_many_into(wanted, outs)
    assert lengths == [3000] * 8 + [None]
    assert [bytes(out[:3000]) for out in outs[:8]] == DATA[:8]
    assert tier.asked == {"Prefetch": 1}
    assert tier.brought_up == [[*KEYS[3:8], KEYS[12]]]
    # Each key is looked up once, whether it had to come up or not.
    after = client.stats().lookups
    assert (after.get_keys - before.get_keys, after.get_hits - before.get_hits) == (9, 8)


@mapping
def test_views_beyond_the_hazards_of_a_client_ask_for_nothing_to_come_up(relay: Relay, connect: Open):
    tier = relay()
    client = connect(tier)
    stored(client, tier, below=0)
    with ExitStack() as held:
        for _ in range(70):
            assert held.enter_context(client.view(KEYS[0])) == DATA[0]
    assert "Prefetch" not in tier.asked
    assert tier.asked["Get"]


@mapping
def test_too_small_buffer_is_an_error_and_asks_for_nothing_to_come_up(relay: Relay, connect: Open):
    tier = relay()
    client = connect(tier)
    stored(client, tier, below=0)
    with pytest.raises(InvalidArgument, match="has 10 bytes, its block has 3000"):
        client.get_into(KEYS[0], bytearray(10))
    with pytest.raises(InvalidArgument, match="has 10 bytes, its block has 3000"):
        client.get_many_into(KEYS[:2], [bytearray(4000), bytearray(10)])
    assert "Prefetch" not in tier.asked


# ------------------------------------------------------------ matches


@mapping
def test_match_is_answered_from_mapped_memory_where_all_keys_hit_there(relay: Relay, connect: Open):
    tier = relay()
    client = connect(tier)
    stored(client, tier, below=2)
    before = client.stats().lookups
    tier.asked.clear()
    found = client.match(KEYS[:6], prefetch=True)
    assert (found.hits, found.tiers) == (6, ["dram"] * 6)
    assert client.match([]).hits == 0
    assert not tier.asked
    found = client.match(KEYS[:9])
    assert (found.hits, found.tiers) == (8, ["dram"] * 6 + ["ssd"] * 2)
    assert tier.asked == {"Match": 1}
    assert client.match(KEYS[:8]).tiers[-1] == "ssd"
    assert client.match(KEYS[:8], prefetch=True).hits == 8
    # They are in mapped memory now.
    tier.asked.clear()
    assert client.match(KEYS[:8]).tiers == ["dram"] * 8
    assert client.get(KEYS[7]) == DATA[7]
    assert not tier.asked
    # The relay does not count, and mapped memory reports no match that it did not answer.
    assert client.stats().lookups.matches - before.matches == 3


@every_kind
def test_prefetch_that_waits_and_hints_reach_the_daemon(relay: Relay, connect: Open):
    tier = relay()
    client = connect(tier)
    stored(client, tier, below=3)
    assert client.hint(KEYS[:8]) == 3
    assert client.hint(KEYS[:8], soon=False) == 3
    assert client.prefetch(KEYS[:8], wait=True) == 8
    assert tier.brought_up == [KEYS[:8]]
    assert client.get(KEYS[7]) == DATA[7]


# ------------------------------------------------------------ puts


@every_kind
def test_put_waits_until_blocks_were_written_below(relay: Relay, connect: Open):
    tier = relay()
    client = connect(tier)
    tier.refuse_puts = tier.refuse_slots = 3
    assert client.put_many(KEYS[:4], DATA[:4]) == [PutStatus.STORED] * 4
    assert (tier.refuse_puts, tier.refuse_slots) == ((3, 0) if client.mapped else (0, 3))
    tier.refuse_puts = tier.refuse_slots = 1
    assert client.put(KEYS[4], DATA[4], parent=KEYS[3]) in (PutStatus.STORED, PutStatus.EXISTS)
    tier.refuse_puts = tier.refuse_slots = 0
    assert client.match(KEYS[:5]).hits == 5
    assert [client.get(key) for key in KEYS[:5]] == DATA[:5]


@every_kind
def test_put_that_finds_no_room_by_its_deadline_is_throttled(relay: Relay, connect: Open, caplog: Any):
    tier = relay()
    client = connect(tier, timeout=0.5)
    tier.refuse_puts = tier.refuse_slots = 1_000_000
    begin = time.monotonic()
    assert client.put_many(KEYS[:3], DATA[:3]) == [PutStatus.THROTTLED] * 3
    assert 0.2 < time.monotonic() - begin < 5.0
    assert "3 records were not stored: demoting" in caplog.text
    # With growing pauses: not as often as it could be asked.
    assert 3 <= tier.asked["Ping"] <= 40
    tier.refuse_puts = tier.refuse_slots = 0


@every_kind
def test_put_that_nobody_waits_for_is_not_tried_again(relay: Relay, connect: Open):
    tier = relay()
    client = connect(tier)
    tier.refuse_puts = tier.refuse_slots = 1
    assert client.put_many(KEYS[:1], DATA[:1], wait=False) == [PutStatus.PENDING]
    flushed = client.flush()
    assert (flushed.throttled, flushed.reasons) == (1, {"demoting": 1})


@every_kind
def test_durable_puts_say_whether_blocks_are_durable(relay: Relay, connect: Open, caplog: Any):
    tier = relay()
    client = connect(tier)
    assert client.put(KEYS[0], DATA[0], durable=True) is PutStatus.STORED
    assert client.put_many(KEYS[:2], DATA[:2], durable=True) == [PutStatus.STORED] * 2
    assert tier.asked["Persist"] == 2
    # What takes longer than the daemon waits is asked again.
    tier.persists.extend([(PutStatus.THROTTLED, Reason.DEMOTING)] * 3)
    assert client.put(KEYS[2], DATA[2], parent=KEYS[1], durable=True) is PutStatus.STORED
    assert tier.asked["Persist"] == 6
    tier.persists.append((PutStatus.REJECTED, Reason.NOT_DURABLE))
    assert client.put(KEYS[3], DATA[3], parent=KEYS[2], durable=True) is PutStatus.REJECTED
    assert "1 records are stored but not known to be durable: not_durable" in caplog.text
    assert client.get(KEYS[3]) == DATA[3]
    # What was not stored is not asked to be durable.
    tier.asked.clear()
    assert client.put(KEYS[4], DATA[4], part=1, durable=True) is PutStatus.REJECTED
    assert not tier.asked["Persist"]


@every_kind
def test_durable_put_whose_blocks_are_not_durable_in_time_is_throttled(relay: Relay, connect: Open):
    tier = relay()
    client = connect(tier, timeout=0.5)
    tier.persists.extend([(PutStatus.THROTTLED, Reason.DEMOTING)] * 10_000)
    begin = time.monotonic()
    assert client.put(KEYS[0], DATA[0], durable=True) is PutStatus.THROTTLED
    assert 0.2 < time.monotonic() - begin < 5.0
    assert client.get(KEYS[0]) == DATA[0]


@every_kind
def test_durable_put_must_wait(relay: Relay, connect: Open):
    client = connect(relay())
    for put in (
        lambda: client.put(KEYS[0], DATA[0], durable=True, wait=False),
        lambda: client.put_many(KEYS[:1], DATA[:1], durable=True, wait=False),
    ):
        with pytest.raises(InvalidArgument, match="does not go with wait=False"):
            put()
    assert client.match(KEYS[:1]).hits == 0


# ------------------------------------------------------------ older daemons


@every_kind
@pytest.mark.parametrize("protocol", [2, 3])
def test_daemon_that_is_too_old_is_named_before_anything_is_stored(relay: Relay, connect: Open, protocol: int):
    tier = relay(protocol=protocol, lower_tiers=0)
    client = connect(tier)
    too_old = rf"too old for Persist, which needs protocol 4: it speaks {protocol}; upgrade the daemon"
    with pytest.raises(ProtocolMismatch, match=too_old):
        client.put(KEYS[0], DATA[0], durable=True)
    with pytest.raises(ProtocolMismatch, match="too old for Hint"):
        client.hint(KEYS[:1])
    assert not tier.asked.keys() & {"Persist", "Hint", "Put"}
    # All the rest works as ever, also with what an older daemon does not look at.
    assert client.match(KEYS[:1], prefetch=True).hits == 0
    assert client.put(KEYS[0], DATA[0]) is PutStatus.STORED
    assert client.get(KEYS[0]) == DATA[0]
    assert client.prefetch(KEYS[:2], wait=True) == 1


@every_kind
def test_daemon_with_one_tier_makes_nothing_durable(kind: str, daemon: DaemonProcess, namespace: str):
    with CLIENTS[kind](daemon.endpoint, namespace=namespace) as client:
        assert client.put(KEYS[0], DATA[0], durable=True) is PutStatus.REJECTED
        assert client.get(KEYS[0]) == DATA[0]
        assert (client.hint(KEYS[:2]), client.prefetch(KEYS[:2], wait=True)) == (1, 1)
        assert client.stats().ssd is None


@mapping
def test_other_operations_still_end_with_an_error_at_their_deadline(relay: Relay, connect: Open):
    tier = relay()
    client = connect(tier, timeout=0.3)
    stored(client, tier, below=1)
    tier.silent = True
    with pytest.raises(DeadlineExceeded):
        client.prefetch(KEYS[:8], wait=True)
