"""A peer that knows ``docs/protocol.md`` and no SDK, against a real daemon: what the page promises, word by word.

All of it in all versions of the protocol: a peer of version 1 gets on with everything but shared memory, and one below
version 4 with everything but what concerns tiers below DRAM.
"""

from __future__ import annotations

import fcntl
import itertools
import mmap
import os
import stat
import struct
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import msgspec
import pytest
import zmq
from daemon_process import DaemonProcess, wait_until
from golden_files import golden

from kvstore.errors import ErrorCode
from kvstore.format.constants import FIDELITY_EXACT
from kvstore.format.record import RecordHeader, decode_record, encode_header, raw_header
from kvstore.protocol.framing import decode_reply, encode
from kvstore.protocol.messages import (
    AnyReply,
    Attach,
    Attached,
    Bye,
    Clear,
    CountReply,
    Done,
    ErrorReply,
    Exists,
    ExistsReply,
    Flush,
    Get,
    GetReply,
    GetStatus,
    Hello,
    Hint,
    Invalidate,
    Match,
    MatchReply,
    Persist,
    Persisted,
    Ping,
    Prefetch,
    Put,
    PutReply,
    PutStatus,
    Reason,
    Release,
    Remove,
    Request,
    Reserve,
    Reserved,
    Stats,
    StatsReply,
    TierId,
    Verify,
    VerifyReply,
    Welcome,
)
from kvstore.protocol.namespace import Namespace
from kvstore.protocol.version import MAX_HEADER_FRAME_BYTES, PROTOCOL_OLDEST, PROTOCOL_VERSION

KEYS = [bytes([number]) * 32 for number in range(1, 40)]
ROOT = bytes(32)
LOCK = struct.Struct("@hhqqi")
_names = itertools.count()


def boot_id() -> str:
    with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
        return file.read().strip()


class Peer:
    """A DEALER socket and the state that the page asks of a client, which knows one version of the protocol."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], endpoint: str, version: int) -> None:
        self.version = version
        self.socket = context.socket(zmq.DEALER)
        self.socket.setsockopt(zmq.LINGER, 0)
        self.socket.setsockopt(zmq.RECONNECT_IVL, -1)
        self.socket.connect(endpoint)
        self.ids = itertools.count(1)
        self.session = self.namespace_id = self.generation = 0
        self.digest = b""
        self.max_record_bytes = 0
        self.session_file = ""
        self.same_host = False

    def envelope(self, **changes: int) -> tuple[int, ...]:
        fields = {
            "id": next(self.ids),
            "session": self.session,
            "namespace_id": self.namespace_id,
            "sent_ns": 0,
            "timeout_ms": 5000,
            "ring_head": 0,
            "access": 0,
        }
        return tuple((fields | changes).values())

    def send(self, *frames: bytes) -> None:
        self.socket.send_multipart(frames)

    def receive(self, timeout_ms: int = 10_000) -> tuple[AnyReply, list[bytes]]:
        assert self.socket.poll(timeout_ms), "no reply"
        header, *payloads = self.socket.recv_multipart()
        return decode_reply(header), payloads

    def ask(self, kind: type[Request], *fields: object, payloads: tuple[bytes, ...] = (), **changes: int) -> AnyReply:
        return self.ask_frames(kind, *fields, payloads=payloads, **changes)[0]

    def ask_frames(
        self, kind: type[Request], *fields: object, payloads: tuple[bytes, ...] = (), **changes: int
    ) -> tuple[AnyReply, list[bytes]]:
        request = kind(*self.envelope(**changes), *fields)
        self.send(encode(request), *payloads)
        reply, frames = self.receive()
        assert reply.id == request.id
        return reply, frames

    def silent(self) -> bool:
        """Whether nothing comes before the answer to a ping, sent now."""
        return isinstance(self.ask(Ping), Done)

    def greet(self, boot: str = "", layout: int = 0) -> Welcome:
        fields = [1, *self.envelope(session=0, namespace_id=0), 1, self.version, "test", os.getpid(), boot]
        # A peer of version 1 has never heard of what stands behind.
        self.send(msgspec.msgpack.encode(fields if self.version == 1 else [*fields, layout]))
        welcome, _ = self.receive()
        assert isinstance(welcome, Welcome)
        assert welcome.protocol == self.version
        self.session, self.max_record_bytes = welcome.session, welcome.max_record_bytes
        self.session_file, self.same_host = welcome.session_file, welcome.same_host
        return welcome

    def attach(self, namespace: Namespace, generation: int = -1, locked: bool = False) -> Attached:
        attached = self.ask(Attach, namespace, (), locked, generation, namespace_id=0)
        assert isinstance(attached, Attached)
        self.namespace_id, self.generation, self.digest = attached.namespace_id, attached.generation, attached.digest
        return attached

    def header(self, key: bytes, payload: bytes, parent: bytes = ROOT, part: int = 0) -> RecordHeader:
        return raw_header(key=key, parent_key=parent, namespace_digest=self.digest, part=part, payload=payload)

    def put(self, *records: tuple[RecordHeader, bytes], **changes: int) -> list[tuple[PutStatus, Reason]]:
        frames = [frame for header, payload in records for frame in (encode_header(header), payload)]
        return self.put_frames(*frames, **changes)

    def put_frames(self, *frames: bytes, **changes: int) -> list[tuple[PutStatus, Reason]]:
        reply = self.ask(Put, len(frames) // 2, payloads=frames, **changes)
        assert isinstance(reply, PutReply)
        answers = list(zip(map(PutStatus, reply.statuses), map(Reason, reply.reasons), strict=True))
        assert len(answers) == len(frames) // 2
        assert bool(reply.retry_after_ms) == any(status is PutStatus.THROTTLED for status, _ in answers)
        return answers

    def store(self, count: int) -> list[bytes]:
        """A chain of blocks; their payloads."""
        payloads = [bytes([number]) * 1000 for number in range(count)]
        records = [
            (self.header(KEYS[index], payload, KEYS[index - 1] if index else ROOT), payload)
            for index, payload in enumerate(payloads)
        ]
        assert self.put(*records) == [STORED] * count
        return payloads

    def hits(self, count: int = 3) -> int:
        reply = self.ask(Match, b"".join(KEYS[:count]))
        assert isinstance(reply, MatchReply)
        return reply.hits


STORED = (PutStatus.STORED, Reason.NONE)
EXISTS = (PutStatus.EXISTS, Reason.NONE)


def rejected(reason: Reason) -> tuple[PutStatus, Reason]:
    return PutStatus.REJECTED, reason


def error_code(reply: AnyReply) -> int:
    assert isinstance(reply, ErrorReply), reply
    assert reply.message
    return reply.code


@pytest.fixture(scope="module")
def daemon() -> Iterator[DaemonProcess]:
    with DaemonProcess(capacity="32MiB", grant="8MiB", expected_errors=("ring_refused",)) as daemon:
        yield daemon


@pytest.fixture(params=range(PROTOCOL_OLDEST, PROTOCOL_VERSION + 1), ids="version {}".format)
def version(request: pytest.FixtureRequest) -> int:
    """The protocol that a test's peers speak."""
    number: int = request.param
    return number


@pytest.fixture
def connect(daemon: DaemonProcess, version: int) -> Iterator[Callable[[], Peer]]:
    """Makes peers that have not said anything yet."""
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    peers: list[Peer] = []

    def make() -> Peer:
        peers.append(Peer(context, daemon.endpoint, version))
        return peers[-1]

    yield make
    for peer in peers:
        if peer.session:
            peer.send(encode(Bye(*peer.envelope(namespace_id=0))))
        peer.socket.close(linger=500)
    context.term()


@pytest.fixture
def namespace() -> Namespace:
    return Namespace(name=f"conformance-{next(_names)}", parts=1)


@pytest.fixture
def peer(connect: Callable[[], Peer], namespace: Namespace) -> Peer:
    """A peer in a namespace of its own."""
    peer = connect()
    peer.greet()
    peer.attach(namespace)
    return peer


# ------------------------------------------------------------ sessions


def test_conformance_golden_greeting_is_welcomed(connect: Callable[[], Peer], version: int):
    peer = connect()
    greeting = msgspec.msgpack.decode(golden(f"protocol-{min(version, 2)}/hello")[0])
    greeting[9] = version  # since version 2 a greeting has the same fields
    peer.send(msgspec.msgpack.encode(greeting))
    welcome, _ = peer.receive()
    assert isinstance(welcome, Welcome)
    assert welcome.id == 1
    assert welcome.protocol == version
    assert welcome.session
    assert welcome.incarnation
    assert (welcome.same_host, welcome.session_file) == (False, "")  # the golden boot id is another kernel's
    assert (welcome.arena_file, welcome.index_file, welcome.doorbell) == ("", "", "")
    assert welcome.unmapped == ("it was not asked for" if version == 1 else "the client is on another host")
    assert welcome.lower_tiers == 0
    peer.session = welcome.session
    assert isinstance(peer.ask(Ping, namespace_id=0), Done)


def test_conformance_no_common_version_is_a_mismatch_that_names_both(connect: Callable[[], Peer]):
    for oldest, newest in ((PROTOCOL_VERSION + 1, 9), (0, 0), (9, 2)):
        reply = connect().ask(Hello, oldest, newest)
        assert error_code(reply) == ErrorCode.PROTOCOL_MISMATCH
        assert f"{oldest} to {newest}" in reply.message
        assert f"protocol {PROTOCOL_OLDEST} to {PROTOCOL_VERSION}, " in reply.message


def test_conformance_highest_common_version_is_agreed_on(connect: Callable[[], Peer]):
    for oldest, newest in ((0, 1), (1, 1), (1, 2), (2, 2), (1, 9), (2, 9)):
        welcome = connect().ask(Hello, oldest, newest)
        assert isinstance(welcome, Welcome)
        assert welcome.protocol == min(newest, PROTOCOL_VERSION)


def test_conformance_welcome_of_version_1_has_its_elements_where_they_were(connect: Callable[[], Peer]):
    peer = connect()
    peer.send(golden("protocol-1/hello")[0])
    assert peer.socket.poll(10_000)
    elements = msgspec.msgpack.decode(peer.socket.recv())
    assert (elements[0], elements[1], elements[3], elements[7:9]) == (102, 1, 1, ["", False])
    assert [type(element) for element in elements[:10]] == [int, int, int, int, int, str, int, str, bool, int]


def test_conformance_session_of_another_connection_is_unknown(connect: Callable[[], Peer], peer: Peer):
    thief = connect()
    assert error_code(thief.ask(Ping)) == ErrorCode.UNKNOWN_SESSION
    assert error_code(thief.ask(Ping, session=peer.session)) == ErrorCode.UNKNOWN_SESSION
    assert peer.silent()


def test_conformance_second_hello_ends_the_first_session(peer: Peer):
    before = peer.session
    peer.greet()
    assert error_code(peer.ask(Ping, session=before, namespace_id=0)) == ErrorCode.UNKNOWN_SESSION
    assert isinstance(peer.ask(Ping, namespace_id=0), Done)


def test_conformance_bye_has_no_reply_and_ends_the_session(peer: Peer):
    peer.send(encode(Bye(*peer.envelope())))
    assert error_code(peer.ask(Ping)) == ErrorCode.UNKNOWN_SESSION
    peer.session = 0


def test_conformance_lock_shows_life_and_its_loss_ends_the_session(connect: Callable[[], Peer], namespace: Namespace):
    peer = connect()
    welcome = peer.greet(boot_id())
    assert welcome.same_host
    assert welcome.pid != os.getpid()
    fd = os.open(welcome.session_file, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        assert os.fstat(fd).st_size == 4096
        assert struct.unpack("<8sIIQQ", os.pread(fd, 32, 0)) == (
            b"KVCLIENT",
            1,
            0,
            welcome.incarnation,
            welcome.session,
        )
        fcntl.fcntl(fd, fcntl.F_SETLK, LOCK.pack(fcntl.F_WRLCK, 0, 0, 0, 0))
        peer.attach(namespace, locked=True)
        time.sleep(1.5)
        assert peer.silent()
    finally:
        os.close(fd)
    wait_until(lambda: not os.path.exists(welcome.session_file), timeout_s=5.0)
    assert error_code(peer.ask(Ping)) == ErrorCode.UNKNOWN_SESSION
    peer.session = 0


# ------------------------------------------------------------ messages


def test_conformance_what_does_not_decode_is_answered_by_its_id_or_dropped(peer: Peer):
    bad = [
        (b"", None),
        (b"\xc1", None),
        (encode({"id": 5}), None),
        (encode([15]), None),
        (encode([15, -1]), None),
        (encode([15, 4711, "not a session"]), 4711),
        (encode([99, 4712, 0, 0, 0, 0, 0, 0]), 4712),
        (encode([4, 4713, *peer.envelope()[1:], bytes(33), "no part"]), 4713),
        (encode([15, 4714, *peer.envelope()[1:]]) + bytes(MAX_HEADER_FRAME_BYTES), None),
    ]
    for frame, number in bad:
        peer.send(frame)
        if number is not None:
            reply, _ = peer.receive()
            assert reply.id == number
            assert error_code(reply) == ErrorCode.BAD_REQUEST
        assert peer.silent(), frame[:40].hex()


def test_conformance_elements_of_a_later_version_are_ignored(peer: Peer):
    peer.send(encode([15, 77, *peer.envelope()[1:], "later", {"x": [1]}]))
    reply, _ = peer.receive()
    assert isinstance(reply, Done)
    assert reply.id == 77


def test_conformance_payload_frames_where_none_belong_are_refused(peer: Peer):
    assert error_code(peer.ask(Ping, payloads=(b"x",))) == ErrorCode.BAD_REQUEST
    assert error_code(peer.ask(Get, KEYS[0], 0, payloads=(b"x",))) == ErrorCode.BAD_REQUEST
    assert error_code(peer.ask(Put, 1)) == ErrorCode.BAD_REQUEST
    assert error_code(peer.ask(Put, 0)) == ErrorCode.BAD_REQUEST
    assert error_code(peer.ask(Put, 1, payloads=(b"x",) * 3)) == ErrorCode.BAD_REQUEST
    assert error_code(peer.ask(Put, (1 << 64) - 1, payloads=(b"x",) * 2)) == ErrorCode.BAD_REQUEST


@pytest.mark.parametrize("kind", [Get, Match, Exists, Remove, Prefetch, Persist, Hint])
def test_conformance_ragged_keys_are_refused(peer: Peer, kind: type[Request]):
    assert error_code(peer.ask(kind, bytes(33))) == ErrorCode.BAD_REQUEST


def test_conformance_ids_never_given_out_are_unknown(peer: Peer):
    for kind, fields in ((Match, (KEYS[0],)), (Put, (0,)), (Clear, ()), (Ping, ()), (Reserve, (4096, 0))):
        assert error_code(peer.ask(kind, *fields, namespace_id=65_000)) == ErrorCode.UNKNOWN_NAMESPACE
    assert error_code(peer.ask(Invalidate, 0, namespace_id=0)) == ErrorCode.UNKNOWN_NAMESPACE


# ------------------------------------------------------------ records


def test_conformance_records_put_come_back_whole(peer: Peer):
    payloads = peer.store(3)
    reply, frames = peer.ask_frames(Get, KEYS[0] + KEYS[9] + KEYS[2], 0)
    assert isinstance(reply, GetReply)
    assert list(reply.statuses) == [GetStatus.HIT, GetStatus.MISS, GetStatus.HIT]
    for frame, index in zip(frames, (0, 2), strict=True):
        header, payload = decode_record(frame)
        assert (header.key, header.namespace_digest, header.part) == (KEYS[index], peer.digest, 0)
        assert header.parent_key == (KEYS[index - 1] if index else ROOT)
        assert header.fidelity == FIDELITY_EXACT
        assert payload == payloads[index]
    assert peer.ask(Match, b"".join(KEYS[:5])) == MatchReply(
        reply.id + 1, reply.incarnation, 3, ((int(TierId.DRAM), 3),), 0
    )
    exists = peer.ask(Exists, KEYS[9] + KEYS[1])
    assert isinstance(exists, ExistsReply)
    assert list(exists.tiers) == [TierId.NONE, TierId.DRAM]


def test_conformance_a_put_is_answered_record_by_record_with_its_reason(peer: Peer):
    good = b"g" * 500
    good_header = encode_header(peer.header(KEYS[0], good))
    other = b"o" * 500
    damaged = bytearray(encode_header(peer.header(KEYS[3], good)))
    damaged[100] ^= 1
    strange = raw_header(key=KEYS[4], parent_key=ROOT, namespace_digest=bytes(32), part=0, payload=good)
    large = bytes(peer.max_record_bytes)
    answers = peer.put_frames(
        *(good_header, good),
        *(encode_header(peer.header(KEYS[0], other)), other),
        *(encode_header(peer.header(KEYS[1], other)), good),
        *(good_header[:255], good),
        *(good_header, good + b"!"),
        *(bytes(damaged), good),
        *(encode_header(strange), good),
        *(encode_header(peer.header(KEYS[5], good, part=1)), good),
        *(encode_header(peer.header(KEYS[0], good, parent=KEYS[7])), good),
        *(encode_header(peer.header(KEYS[6], large)), large),
        *(encode_header(peer.header(KEYS[8], good, parent=KEYS[30])), good),
    )
    assert answers == [
        STORED,
        EXISTS,
        *[rejected(Reason.BAD_RECORD)] * 5,
        rejected(Reason.BAD_PART),
        EXISTS,
        rejected(Reason.TOO_LARGE),
        STORED,  # an orphan: its parent need not be there
    ]
    assert peer.hits(1) == 1
    _, (frame,) = peer.ask_frames(Get, KEYS[0], 0)
    assert decode_record(frame)[1] == good


def test_conformance_parents_must_agree_between_parts_and_form_no_circle(connect: Callable[[], Peer]):
    peer = connect()
    peer.greet()
    peer.attach(Namespace(name=f"conformance-{next(_names)}", parts=2))
    data = b"d" * 100
    assert peer.put((peer.header(KEYS[0], data, KEYS[1]), data)) == [STORED]
    assert peer.hits(1) == 0  # one of two parts
    assert peer.put((peer.header(KEYS[0], data, KEYS[2], part=1), data)) == [rejected(Reason.BAD_PARENT)]
    assert peer.put((peer.header(KEYS[1], data, KEYS[0]), data)) == [rejected(Reason.BAD_PARENT)]
    assert peer.put((peer.header(KEYS[0], data, KEYS[1], part=1), data)) == [STORED]
    assert peer.hits(1) == 1


# ------------------------------------------------------------ generations


def test_conformance_invalidate_moves_on_once_for_all_who_ask(
    connect: Callable[[], Peer], peer: Peer, namespace: Namespace
):
    other = connect()
    other.greet()
    assert other.attach(namespace).namespace_id == peer.namespace_id
    peer.store(3)
    assert other.hits() == 3

    moved = peer.ask(Invalidate, 0)
    assert isinstance(moved, Attached)
    assert moved.generation == 1
    assert moved.namespace_id not in (0, peer.namespace_id)
    assert moved.digest == namespace.digest(1)
    assert peer.hits() == 0
    assert other.hits() == 0

    data = b"d" * 10
    assert other.put((other.header(KEYS[0], data), data)) == [rejected(Reason.STALE_NAMESPACE)]
    assert other.put((other.header(KEYS[0], data), data), namespace_id=0) == [rejected(Reason.STALE_NAMESPACE)]
    joined = other.ask(Invalidate, 0)
    assert isinstance(joined, Attached)
    assert (joined.namespace_id, joined.generation, joined.digest) == (moved.namespace_id, 1, moved.digest)
    again = other.ask(Invalidate, 0)
    assert isinstance(again, Attached)
    assert again.generation == 1


def test_conformance_attach_in_an_old_generation_is_stale_and_in_a_later_one_moves_on(
    connect: Callable[[], Peer], peer: Peer, namespace: Namespace
):
    peer.store(2)
    late = connect()
    late.greet()
    ahead = late.attach(namespace, generation=7)
    assert (ahead.generation, ahead.digest) == (7, namespace.digest(7))
    assert ahead.namespace_id
    assert peer.hits() == 0

    stale = connect()
    stale.greet()
    answer = stale.attach(namespace, generation=3)
    assert (answer.namespace_id, answer.generation, answer.digest) == (0, 7, namespace.digest(7))
    assert stale.hits() == 0
    assert stale.attach(namespace, generation=-1).namespace_id == ahead.namespace_id
    assert stale.attach(namespace, generation=7).namespace_id == ahead.namespace_id


# ------------------------------------------------------------ the rest


def test_conformance_replies_come_in_the_order_of_requests(peer: Peer):
    data = b"d" * 100
    frames = (encode_header(peer.header(KEYS[0], data)), data)
    asked = [
        (Put(*peer.envelope(), 1), frames),
        (Match(*peer.envelope(), KEYS[0]), ()),
        (Remove(*peer.envelope(), KEYS[0] + KEYS[1]), ()),
        (Match(*peer.envelope(), KEYS[0]), ()),
        (Put(*peer.envelope(), 1), frames),
        (Flush(*peer.envelope()), ()),
        (Clear(*peer.envelope()), ()),
        (Prefetch(*peer.envelope(), KEYS[0], TierId.DRAM), ()),
    ]
    for request, payloads in asked:
        peer.send(encode(request), *payloads)
    replies = [peer.receive()[0] for _ in asked]
    assert [reply.id for reply in replies] == [request.id for request, _ in asked]
    life = replies[0].incarnation
    assert replies == [
        PutReply(replies[0].id, life, b"\1", b"\0"),
        MatchReply(replies[1].id, life, 1, ((2, 1),), 0),
        CountReply(replies[2].id, life, 1),
        MatchReply(replies[3].id, life, 0),
        PutReply(replies[4].id, life, b"\1", b"\0"),
        Done(replies[5].id, life),
        CountReply(replies[6].id, life, 1),
        CountReply(replies[7].id, life, 0),
    ]


def test_conformance_leases_are_bounded_and_belong_to_their_session(connect: Callable[[], Peer], peer: Peer):
    peer.store(2)
    leased = peer.ask(Match, b"".join(KEYS[:3]), 1000)
    assert isinstance(leased, MatchReply)
    assert leased.lease
    other = connect()
    other.greet()
    for asker, count in ((other, 0), (peer, 1), (peer, 0)):
        released = asker.ask(Release, leased.lease, namespace_id=0)
        assert isinstance(released, CountReply)
        assert released.count == count
    assert error_code(peer.ask(Match, KEYS[0], 60_001)) == ErrorCode.BAD_REQUEST
    nothing = peer.ask(Match, KEYS[9], 1000)
    assert isinstance(nothing, MatchReply)
    assert (nothing.hits, nothing.lease) == (0, 0)


def test_conformance_old_requests_with_payload_are_throttled_and_others_answered(
    connect: Callable[[], Peer], namespace: Namespace
):
    peer = connect()
    peer.greet(boot_id())
    assert peer.same_host
    peer.attach(namespace)
    peer.store(1)
    data = b"d" * 100
    for age_ms, timeout_ms in ((1500, 0), (300, 200)):
        sent_ns = time.monotonic_ns() - age_ms * 1_000_000
        old = {"sent_ns": sent_ns, "timeout_ms": timeout_ms}
        assert peer.put((peer.header(KEYS[1], data), data), **old) == [(PutStatus.THROTTLED, Reason.OVERLOADED)]
        reply, frames = peer.ask_frames(Get, KEYS[0], 0, **old)
        assert isinstance(reply, GetReply)
        assert (list(reply.statuses), frames) == ([GetStatus.THROTTLED], [])
        assert isinstance(peer.ask(Match, KEYS[0], **old), MatchReply)
    assert peer.put((peer.header(KEYS[1], data), data), sent_ns=time.monotonic_ns()) == [STORED]


def test_conformance_tiers_that_are_not_there_cannot_be_prefetched_into(peer: Peer):
    for tier in (TierId.NONE, TierId.HBM, TierId.SSD, TierId.REMOTE):
        assert error_code(peer.ask(Prefetch, KEYS[0], tier)) == ErrorCode.BAD_REQUEST


def test_conformance_one_tier_brings_nothing_up_and_makes_nothing_durable(peer: Peer, version: int):
    peer.store(3)
    keys = b"".join(KEYS[:4])
    for wait in (False, True):
        there = peer.ask(Prefetch, keys, TierId.DRAM, wait)
        assert isinstance(there, CountReply)
        assert there.count == 3
    matched = peer.ask(Match, keys, 0, True)
    assert isinstance(matched, MatchReply)
    assert (matched.hits, matched.tiers) == (3, ((TierId.DRAM, 3),))
    if version < 4:
        return
    persisted = peer.ask(Persist, keys)
    assert isinstance(persisted, Persisted)
    assert list(persisted.statuses) == [PutStatus.REJECTED] * 4
    assert list(persisted.reasons) == [Reason.NOT_DURABLE] * 3 + [Reason.MISSING]
    nothing = peer.ask(Persist, b"")
    assert isinstance(nothing, Persisted)
    assert (nothing.statuses, nothing.reasons) == (b"", b"")
    for soon in (True, False):
        hinted = peer.ask(Hint, keys, soon)
        assert isinstance(hinted, CountReply)
        assert hinted.count == 3
    assert peer.hits() == 3
    stale = peer.ask(Persist, keys, namespace_id=0)
    assert isinstance(stale, Persisted)
    assert list(stale.reasons) == [Reason.MISSING] * 4


def test_conformance_statistics_and_verification_are_answered(peer: Peer):
    peer.store(2)
    statistics = peer.ask(Stats, namespace_id=0)
    assert isinstance(statistics, StatsReply)
    assert statistics.stats.dram.records >= 2
    assert statistics.stats.incarnation == f"{statistics.incarnation:016x}"
    verified = peer.ask(Verify, namespace_id=0)
    assert isinstance(verified, VerifyReply)
    assert verified.records >= 2
    assert verified.problems == []


def test_conformance_part_above_65535_is_refused(peer: Peer):
    assert error_code(peer.ask(Get, KEYS[0], 65_536)) == ErrorCode.BAD_REQUEST


# ------------------------------------------------------------ shared memory


def test_conformance_memory_is_not_offered_to_who_did_not_ask(connect: Callable[[], Peer], namespace: Namespace):
    peer = connect()
    welcome = peer.greet(boot_id())
    assert welcome.same_host
    assert os.stat(welcome.session_file).st_size == 4096
    assert (welcome.arena_file, welcome.index_file, welcome.doorbell) == ("", "", "")
    assert welcome.unmapped == "it was not asked for"
    peer.attach(namespace)
    assert error_code(peer.ask(Reserve, 1000, 0)) == ErrorCode.BAD_REQUEST
    # A head without a ring means nothing.
    assert isinstance(peer.ask(Ping, ring_head=7), Done)
    peer.store(2)
    assert peer.hits() == 2


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    """Closes what a test opens."""
    with ExitStack() as stack:
        yield stack


@pytest.fixture
def second(daemon: DaemonProcess) -> Iterator[Peer]:
    """A peer of version 2 that has not said anything yet."""
    with ExitStack() as end:
        context: zmq.Context[zmq.Socket[bytes]] = end.enter_context(zmq.Context())
        peer = Peer(context, daemon.endpoint, 2)
        end.callback(peer.socket.close, 500)
        yield peer
        if peer.session:
            peer.send(encode(Bye(*peer.envelope(namespace_id=0))))


def test_conformance_memory_is_offered_for_its_layout_and_refused_for_another(second: Peer):
    welcome = second.greet(boot_id(), layout=1)
    assert welcome.unmapped == ""
    directory = os.path.dirname(welcome.session_file)
    for path, name in ((welcome.arena_file, "arena"), (welcome.index_file, "index"), (welcome.doorbell, "doorbell")):
        assert path == f"{directory}/{name}-{welcome.incarnation:016x}"
        assert stat.S_ISFIFO(os.stat(path).st_mode) == (name == "doorbell")
    with open(welcome.session_file, "rb") as file:
        assert struct.unpack("<8sIIQQ", file.read(32)) == (
            b"KVCLIENT",
            2,
            0,
            welcome.incarnation,
            welcome.session,
        )
    assert os.stat(welcome.session_file).st_size == 155_648

    for layout, boot, why in ((2, boot_id(), "mapped layout is 1, the client's 2"), (1, "other", "on another host")):
        welcome = second.greet(boot, layout)
        assert why in welcome.unmapped
        assert (welcome.arena_file, welcome.index_file, welcome.doorbell) == ("", "", "")
    assert error_code(second.ask(Reserve, 1000, 0, namespace_id=0)) == ErrorCode.BAD_REQUEST


def test_conformance_reserve_lends_slots_of_a_size_and_says_why_not(
    second: Peer, namespace: Namespace, stack: ExitStack
):
    welcome = second.greet(boot_id(), layout=1)
    second.attach(namespace)
    # Nobody would notice the end of one that holds no lock.
    assert error_code(second.ask(Reserve, 5000, 7)) == ErrorCode.BAD_REQUEST
    MappedFile(welcome, stack)
    second.attach(namespace, locked=True)
    reserved = second.ask(Reserve, 5000, 7)
    assert isinstance(reserved, Reserved)
    assert (reserved.slot_bytes, reserved.reason) == (8192, Reason.NONE)
    assert reserved.slots > 0
    for record_bytes, lane in ((5000, 8), (256, 0), (0, 0), ((1 << 32) + 1, 0)):
        assert error_code(second.ask(Reserve, record_bytes, lane)) == ErrorCode.BAD_REQUEST
    refused = second.ask(Reserve, second.max_record_bytes + 1, 0)
    assert isinstance(refused, Reserved)
    assert (refused.slot_bytes, refused.slots, refused.reason) == (0, 0, Reason.TOO_LARGE)

    def granted() -> int:
        statistics = second.ask(Stats)
        assert isinstance(statistics, StatsReply)
        (mine,) = [session for session in statistics.stats.sessions if session.session == second.session]
        assert mine.mapped
        return mine.granted_bytes

    assert granted() >= 8192
    # A lane that is not used gives its slots back.
    wait_until(lambda: granted() == 0, timeout_s=5.0)


# Offsets of docs/mapped.md.
HEAD, CONSUMED, ANSWERS, GRANTS, RING = 320, 256, 4096, 8192, 24_576


class MappedFile:
    """A client's file, locked, and the arena, written by hand."""

    def __init__(self, welcome: Welcome, end: ExitStack) -> None:
        self.arena, _ = self._map(welcome.arena_file, end)
        self.file, fd = self._map(welcome.session_file, end)
        fcntl.fcntl(fd, fcntl.F_SETLK, LOCK.pack(fcntl.F_WRLCK, 0, 0, 0, 0))

    @staticmethod
    def _map(path: str, end: ExitStack) -> tuple[mmap.mmap, int]:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
        end.callback(os.close, fd)
        return end.enter_context(mmap.mmap(fd, 0)), fd

    def word(self, offset: int) -> int:
        number: int = struct.unpack_from("<q", self.file, offset)[0]
        return number

    def commit(self, record: bytes, lane: int, namespace_id: int) -> int:
        """Write a record into the lane's first grant and its ring record; the ring's head, not stored yet."""
        grant = next(at for at in range(GRANTS + 2048 * lane, GRANTS + 2048 * (lane + 1), 8) if self.word(at))
        slot, pages = self.word(grant) & 0xFFFF_FFFF, self.word(grant) >> 32
        struct.pack_into("<q", self.file, grant, 0)
        self.arena[slot * 4096 : (slot + pages) * 4096] = record.ljust(pages * 4096, b"\0")
        head = self.word(HEAD)
        entry = struct.pack("<BBBxHHIIqqQqqq", 1, 0, 0, 0, namespace_id, len(record), 0, slot, 0, 0, 0, 0, 0)
        at = RING + 64 * (head % 2048)
        self.file[at : at + 64] = entry
        return head + 1

    def publish(self, head: int) -> None:
        struct.pack_into("<q", self.file, HEAD, head)


def test_conformance_what_stands_in_the_ring_comes_before_the_request(
    second: Peer, namespace: Namespace, stack: ExitStack
):
    memory = MappedFile(second.greet(boot_id(), layout=1), stack)
    second.attach(namespace, locked=True)
    payload = b"p" * 1000
    answers = []
    for number in range(3):
        assert isinstance(second.ask(Reserve, 1256, 0, ring_head=number), Reserved)
        header = second.header(KEYS[0], payload) if number != 1 else second.header(KEYS[1], payload, KEYS[0])
        head = memory.commit(encode_header(header) + payload, 0, second.namespace_id)
        memory.publish(head)
        assert head == number + 1
        # Nobody rang: it is this request that brings the daemon to look.
        reply = second.ask(Match, KEYS[0] + KEYS[1], ring_head=head)
        assert isinstance(reply, MatchReply)
        assert reply.hits == min(number + 1, 2)
        assert memory.word(CONSUMED) == head
        answers.append(struct.unpack_from("<BB", memory.file, ANSWERS + 2 * number))
    assert answers == [STORED, STORED, EXISTS]
    assert second.put((second.header(KEYS[0], payload), payload), ring_head=3) == [EXISTS]
    removed = second.ask(Remove, KEYS[0], ring_head=3)
    assert isinstance(removed, CountReply)
    assert removed.count == 1
    verified = second.ask(Verify)
    assert isinstance(verified, VerifyReply)
    assert verified.problems == []


@pytest.mark.parametrize("head", [-1, 2049, 1 << 62])
def test_conformance_ring_that_cannot_be_one_ends_its_session_and_no_other(
    second: Peer, connect: Callable[[], Peer], namespace: Namespace, stack: ExitStack, head: int
):
    other = connect()
    other.greet()
    memory = MappedFile(second.greet(boot_id(), layout=1), stack)
    second.attach(namespace, locked=True)
    second.store(1)
    memory.publish(head)
    assert error_code(second.ask(Match, KEYS[0], 1000)) == ErrorCode.UNKNOWN_SESSION
    assert memory.word(128) == 2  # over
    second.session = 0
    assert isinstance(other.ask(Ping, namespace_id=0), Done)
    statistics = other.ask(Stats, namespace_id=0)
    assert isinstance(statistics, StatsReply)
    assert statistics.stats.leases == 0
