"""Records of all fidelities at a live daemon, sent and written through shared memory: which stays, who may have it."""

from __future__ import annotations

import itertools
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest
from daemon_process import DaemonProcess, wait_until
from mapped_peer import MappedPeer
from raw_peer import RawPeer
from record_mutations import Mutator, is_record

from kvstore.errors import InvalidArgument
from kvstore.format.constants import CODEC_FIDELITY, PAGE_BYTES, CodecId
from kvstore.format.record import checksum, decode_record, encode_header, raw_header, record_header
from kvstore.mapped.client_file import RingKind
from kvstore.protocol.messages import Get, GetReply, PutStatus, Reason
from kvstore.protocol.namespace import Namespace
from kvstore.protocol.version import PROTOCOL_VERSION
from kvstore_client import AsyncClient

STORED = (PutStatus.STORED, Reason.NONE)
EXISTS = (PutStatus.EXISTS, Reason.NONE)
NOT_EXACT = (PutStatus.REJECTED, Reason.NOT_EXACT)
OTHER_CODEC = (PutStatus.REJECTED, Reason.OTHER_CODEC)
BAD_RECORD = (PutStatus.REJECTED, Reason.BAD_RECORD)
Answer = tuple[PutStatus, Reason]
_names = itertools.count()


def key(number: int) -> bytes:
    return (number + 1).to_bytes(4, "big") * 8


@pytest.fixture(scope="module")
def daemon() -> Iterator[DaemonProcess]:
    with DaemonProcess("--slab", "256KiB", "--verify", "always", capacity="8MiB", grant="4MiB") as daemon:
        yield daemon


class Writer:
    """Puts records of any header, over the socket or through shared memory."""

    def __init__(self, daemon: DaemonProcess, stack: ExitStack, way: str, namespace: Namespace) -> None:
        self.peer: RawPeer
        if way == "mapped":
            self.peer = stack.enter_context(MappedPeer(daemon.endpoint)).join(namespace)
        else:
            newest = PROTOCOL_VERSION if way == "sent" else 2
            self.peer = stack.enter_context(RawPeer(daemon.endpoint)).ready(namespace, newest)

    def put(self, header: bytes, payload: bytes) -> Answer:
        if not isinstance(self.peer, MappedPeer):
            reply = self.peer.put(header, payload)
            return PutStatus(reply.statuses[0]), Reason(reply.reasons[0])
        record_bytes = len(header) + len(payload)
        slot = self.peer.claim()
        while not slot or not record_bytes <= self.peer.claimed_bytes <= 2 * record_bytes + PAGE_BYTES:
            if slot:
                self.peer.push(RingKind.RETURN, slot=slot)
            reserved = self.peer.reserve(record_bytes)
            assert not reserved.reason, reserved
            slot = self.peer.claim()
        self.peer.fill(slot, self.peer.claimed_bytes, header, payload)
        number = self.peer.push(RingKind.COMMIT, slot=slot)
        self.peer.drained()
        return self.peer.answer(number)

    def raw(self, number: int, payload: bytes, lineage: int = 255, *, first: bool = False) -> Answer:
        """A raw record, computed on blocks of a fidelity; ``first``: it is the first block of its prompt."""
        header = raw_header(
            key=key(number),
            parent_key=bytes(32) if first or number == 0 else key(number - 1),
            namespace_digest=self.peer.digest,
            part=0,
            payload=payload,
            lineage=lineage,
        )
        return self.put(encode_header(header), payload)

    def encoded(self, number: int, codec: CodecId, lineage: int = 255) -> Answer:
        """A record of another codec; what is in it is nobody's business here."""
        sections = [4096] if CODEC_FIDELITY[codec] == 255 else [1024, 1024]
        payload = bytes([codec]) * sum(sections)
        header = record_header(
            key=key(number),
            parent_key=bytes(32) if number == 0 else key(number - 1),
            namespace_digest=self.peer.digest,
            part=0,
            codec=codec,
            codec_parameters=bytes(16) if codec is CodecId.RAW else b"p" * 16,
            fidelity=CODEC_FIDELITY[codec],
            dtype="bfloat16",
            shape=(2048,),
            section_bytes=sections,
            payload_checksum=checksum(payload),
            lineage=lineage,
        )
        return self.put(encode_header(header), payload)


@pytest.fixture(params=["sent", "mapped"])
def way(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture
def writer_in(daemon: DaemonProcess, stack: ExitStack, way: str) -> Callable[[Namespace], Writer]:
    return lambda namespace: Writer(daemon, stack, way, namespace)


@pytest.fixture
def any_space() -> Namespace:
    return Namespace(name=f"fidelity-{next(_names)}", codec="kivi4")


def test_better_record_replaces_a_worse_one_for_every_reader(
    daemon: DaemonProcess, stack: ExitStack, writer_in: Callable[[Namespace], Writer], any_space: Namespace
):
    writer = writer_in(any_space)
    readers = [stack.enter_context(daemon.connect(namespace=any_space, mapped=mapped)) for mapped in (True, False)]
    before = readers[0].stats().puts.replaced
    assert writer.raw(0, b"exact") == STORED
    assert writer.raw(1, b"worst", lineage=34) == STORED
    for payload, lineage, answer in [(b"better", 85, STORED), (b"as good", 85, EXISTS), (b"worse again", 84, EXISTS)]:
        assert writer.raw(1, payload, lineage) == answer
    for reader in readers:
        assert reader.get(key(1)) == b"better"
        found = reader.match([key(0), key(1), key(2)])
        assert (len(found), found.fidelity) == (2, 85)
        assert reader.match([key(0)]).fidelity == 255
        assert reader.match([key(7)]).fidelity == 255
        with reader.view(key(1)) as payload, reader.view(key(0)) as other:
            assert (bytes(payload), bytes(other)) == (b"better", b"exact")
        for number, fidelity in [(0, 255), (1, 85), (2, 0)]:
            view = reader.view(key(number))
            with view:
                assert view.fidelity == fidelity
            assert view.fidelity == 0
    assert writer.raw(1, b"the best of all") == STORED
    assert writer.raw(1, b"late", lineage=254) == EXISTS
    for reader in readers:
        assert reader.get(key(1)) == b"the best of all"
        assert reader.match([key(0), key(1)]).fidelity == 255
    assert readers[0].stats().puts.replaced - before == 2
    assert readers[0].verify().problems == []


async def test_better_record_is_what_an_async_client_finds(
    daemon: DaemonProcess, stack: ExitStack, any_space: Namespace
):
    writer = Writer(daemon, stack, "sent", any_space)
    assert writer.raw(0, b"worse", lineage=34) == STORED
    async with AsyncClient(daemon.endpoint, namespace=any_space) as client:
        assert (await client.match([key(0)])).fidelity == 34
        assert (await client.match([key(0)], lease=1.0)).fidelity == 34
        assert writer.raw(0, b"better") == STORED
        view = client.view(key(0))
        async with view as payload:
            assert (bytes(payload), view.fidelity) == (b"better", 255)


def test_leased_record_is_replaced_and_the_lease_holds(
    daemon: DaemonProcess, stack: ExitStack, writer_in: Callable[[Namespace], Writer], any_space: Namespace
):
    writer = writer_in(any_space)
    reader = stack.enter_context(daemon.connect(namespace=any_space))
    assert writer.raw(0, b"worse" * 1000, lineage=34) == STORED
    with reader.match([key(0)], lease=20.0) as found:
        assert found.fidelity == 34
        assert writer.raw(0, b"better" * 2000) == STORED
        for number in range(1, 200):
            assert writer.raw(number, bytes([number]) * 60_000, first=True) == STORED
        assert reader.stats().eviction.evicted_blocks
        assert reader.get(key(0)) == b"better" * 2000
    reader.clear()


def test_record_read_in_place_while_it_is_replaced_stays_what_it_was(
    daemon: DaemonProcess, stack: ExitStack, writer_in: Callable[[Namespace], Writer], any_space: Namespace
):
    writer = writer_in(any_space)
    reader = stack.enter_context(daemon.connect(namespace=any_space, mapped=True))
    assert writer.raw(0, b"w" * 20_000, lineage=34) == STORED
    view = reader.view(key(0))
    with view as payload:
        assert writer.raw(0, b"b" * 20_000) == STORED
        for number in range(1, 20):
            assert writer.raw(number, bytes([number]) * 20_000) == STORED
        assert (bytes(payload), view.fidelity) == (b"w" * 20_000, 34)
        assert reader.get(key(0)) == b"b" * 20_000
        assert reader.stats().dram.limbo_bytes == 5 * PAGE_BYTES
    wait_until(lambda: not reader.stats().dram.limbo_bytes, 5.0)


def test_reader_never_misses_a_record_that_is_replaced_all_the_time(
    daemon: DaemonProcess, stack: ExitStack, writer_in: Callable[[Namespace], Writer], any_space: Namespace
):
    """Each version is of one byte that is its fidelity: what is read is one version, never an older one than before."""
    writer = writer_in(any_space)
    client = stack.enter_context(daemon.connect(namespace=any_space, mapped=True))
    size = 6000
    wanted = [key(0)]
    assert writer.raw(0, bytes(size), lineage=0) == STORED
    over = threading.Event()
    problems: list[str] = []
    reads = 0

    def read() -> None:
        nonlocal reads
        out = bytearray(size)
        newest = 0
        while not over.is_set() and not problems:
            reads += 1
            length = client.get_into(wanted[0], out)
            if length != size or out.count(out[0]) != size:
                problems.append(f"read {length} bytes: {Counter(out).most_common(3)}")
            elif out[0] < newest:
                problems.append(f"version {out[0]} after {newest}")
            newest = out[0]

    thread = threading.Thread(target=read)
    thread.start()
    try:
        for lineage in range(1, 256):
            assert writer.raw(0, bytes([lineage]) * size, lineage) == STORED
    finally:
        over.set()
        thread.join()
    assert problems == []
    assert reads > 100
    assert client.get(key(0)) == b"\xff" * size
    assert client.verify().problems == []


# ---------------------------------------------------------------- what a namespace allows


def test_exact_namespace_refuses_lossy_records_and_never_serves_them(
    daemon: DaemonProcess, stack: ExitStack, writer_in: Callable[[Namespace], Writer]
):
    space = Namespace(name=f"fidelity-{next(_names)}", codec="lossless", fidelity="exact")
    writer = writer_in(space)
    assert writer.raw(0, b"x", lineage=254) == NOT_EXACT
    assert writer.encoded(0, CodecId.LOSSLESS, lineage=85) == NOT_EXACT
    assert writer.encoded(0, CodecId.KIVI4) == OTHER_CODEC
    for mapped in (True, False):
        client = stack.enter_context(daemon.connect(namespace=space, mapped=mapped))
        assert client.get(key(0)) is None
        assert len(client.match([key(0)])) == 0
        assert client.exists([key(0)]) == [False]
    assert writer.encoded(1, CodecId.LOSSLESS_ZSTD) == STORED
    assert writer.raw(0, b"x") == STORED
    assert client.get(key(0)) == b"x"
    reasons = client.stats().puts.reasons
    assert reasons["not_exact"] >= 2
    assert reasons["other_codec"] >= 1


@pytest.mark.parametrize(
    ("policy", "refused"),
    [("raw", set(CodecId) - {CodecId.RAW}), ("kivi2", set()), ("int8", set(CodecId) - {1, 2, 3, CodecId.INT8})],
)
def test_namespace_takes_its_codec_and_better_ones(
    writer_in: Callable[[Namespace], Writer], policy: str, refused: set[CodecId]
):
    writer = writer_in(Namespace(name=f"fidelity-{next(_names)}", codec=policy))
    for codec in CodecId:
        assert writer.encoded(int(codec), codec) == (OTHER_CODEC if codec in refused else STORED), codec.text


def test_peer_of_an_older_version_is_told_a_reason_that_it_knows(daemon: DaemonProcess, stack: ExitStack):
    exact = Namespace(name=f"fidelity-{next(_names)}", fidelity="exact")
    writer = Writer(daemon, stack, "of version 2", exact)
    assert writer.raw(0, b"x", lineage=254) == BAD_RECORD
    assert writer.encoded(0, CodecId.LOSSLESS) == BAD_RECORD
    assert writer.raw(0, b"x") == STORED


@pytest.mark.parametrize("mapped", [True, False])
def test_encoded_record_is_not_taken_for_data(
    daemon: DaemonProcess, stack: ExitStack, any_space: Namespace, mapped: bool
):
    writer = Writer(daemon, stack, "sent", any_space)
    assert writer.encoded(0, CodecId.KIVI4) == STORED
    assert writer.raw(1, b"data") == STORED
    client = stack.enter_context(daemon.connect(namespace=any_space, mapped=mapped))
    out = bytearray(4096)
    for read in (
        lambda: client.get(key(0)),
        lambda: client.get_into(key(0), out),
        lambda: client.get_many_into([key(1), key(0)], [out, bytearray(4096)]),
    ):
        with pytest.raises(InvalidArgument, match=f"block {key(0).hex()} is stored as kivi4"):
            read()
    assert client.get(key(1)) == b"data"
    assert client.match([key(0), key(1)]).fidelity == 85


# ---------------------------------------------------------------- mutated records

SENT = 6000
AT_ONCE = 40


@pytest.mark.timeout(120)
def test_mutated_records_sent_to_a_daemon_are_refused_or_served_as_they_were(daemon: DaemonProcess, stack: ExitStack):
    """What is stored is a record by the page; what is read is what was stored, byte for byte; the daemon goes on."""
    peer = stack.enter_context(RawPeer(daemon.endpoint)).ready(
        Namespace(name="mutants", codec="kivi2"), PROTOCOL_VERSION
    )
    client = stack.enter_context(daemon.connect(namespace=Namespace(name="mutants", codec="kivi2")))
    mutator, rng = Mutator(8, peer.digest), random.Random(8)
    outcomes: Counter[str] = Counter()
    held: dict[bytes, bytes] = {}
    begin = time.monotonic()
    while outcomes.total() < SENT:
        records = [mutator.one() for _ in range(AT_ONCE)]
        reply = peer.put(*(frame for record in records for frame in (record[:256], record[256:])))
        for record, status, reason in zip(records, reply.statuses, reply.reasons, strict=True):
            outcomes[PutStatus(status).name] += 1
            if status in (PutStatus.STORED, PutStatus.EXISTS):
                assert is_record(record), f"stored: {record[:256].hex()}"
                header, _ = decode_record(record)
                assert header.namespace_digest == peer.digest
                worse = held.get(header.key)
                level = -1 if worse is None else decode_record(worse)[0].effective_fidelity
                assert (status == PutStatus.STORED) == (header.effective_fidelity > level)
                if status == PutStatus.STORED:
                    held[header.key] = record
            elif is_record(record):
                header, _ = decode_record(record)
                foreign = header.namespace_digest != peer.digest
                assert (reason == Reason.BAD_RECORD) == foreign, f"{Reason(reason).name}: {record[:256].hex()}"
                assert foreign or header.part or header.parent_key != bytes(32), Reason(reason).name
            else:
                assert (status, reason) == BAD_RECORD
        for asked in rng.sample(list(held), min(len(held), 3)):
            request = peer.request(Get, asked, 0)
            peer.send(request)
            answer, frames = peer.receive()
            assert isinstance(answer, GetReply)
            assert frames == [held[asked]]
    print(f"{outcomes} in {time.monotonic() - begin:.1f} s")
    assert outcomes["STORED"] > 30
    assert outcomes["EXISTS"] > SENT / 50
    assert outcomes["REJECTED"] > SENT / 2
    assert client.verify().problems == []
    client.clear()
