"""Requests and replies: one struct each, a tagged union in each direction.

A message is one header frame (a MessagePack array whose first element is the tag) and payload frames.
Evolution: fields are only appended, with defaults; types and tags never change; tags are never reused. Bounds
in the types are checked when a message is decoded, not when it is made.
"""

from __future__ import annotations

from enum import IntEnum
from typing import Annotated, Literal

import msgspec

from kvstore.format.constants import FIDELITY_EXACT
from kvstore.protocol.keys import KEY_BYTES
from kvstore.protocol.namespace import Namespace
from kvstore.protocol.statistics import DaemonStats, RecordStats, Unsigned
from kvstore.protocol.stories import KeyStory
from kvstore.protocol.version import (
    MAX_DECLARED_SIZES,
    MAX_GENERATION,
    MAX_IDENT_CHARACTERS,
    MAX_KEYS_PER_REQUEST,
    MAX_PREFIXES,
)

Keys = Annotated[bytes, msgspec.Meta(max_length=KEY_BYTES * MAX_KEYS_PER_REQUEST)]
"""Block keys, 32 bytes each, without anything between them."""

Ident = Annotated[str, msgspec.Meta(max_length=MAX_IDENT_CHARACTERS)]
"""A version or an id in a greeting."""


class PutStatus(IntEnum):
    """Answer to one put, or to one key of a persist. Persisted on the wire.

    ``STORED``: it is published, perhaps in the place of a worse record. ``EXISTS``: the key was present and its
    record, as good or better, was kept. ``THROTTLED``: not now, try again. ``REJECTED``: never like this. ``PENDING``:
    given by ``put(wait=False)`` only, ``flush()`` knows more. Of a persist, ``STORED`` says that the block is durable.
    """

    STORED = 1
    EXISTS = 2
    THROTTLED = 3
    REJECTED = 4
    PENDING = 5


class Reason(IntEnum):
    """Why a put or a persist was throttled or rejected. Persisted on the wire."""

    NONE = 0
    TOO_LARGE = 1
    """The record is larger than the largest slot, or than the tier."""
    NO_ROOM = 2
    """The blocks before it in its own chain fill the tier."""
    ALL_HELD = 3
    """Everything that could leave is leased."""
    POPULATING = 4
    """Memory is still being populated after the start."""
    OVERLOADED = 5
    """The request waited too long, or too many bytes are in flight."""
    STALE_NAMESPACE = 6
    """The namespace was invalidated after this client joined it."""
    BAD_RECORD = 7
    """The record's header or checksum is wrong, or it is of another namespace."""
    BAD_PARENT = 8
    """Parts disagree about the parent, or the parents form a circle."""
    BAD_PART = 9
    """The part is not one of the namespace's."""
    GRANT_LIMIT = 10
    """This client holds as many granted bytes as it may."""
    MEMORY_LIMIT = 11
    """The memory file system is full; the tier stays smaller than configured."""
    NOT_EXACT = 12
    """The namespace is exact; the record is lossy, or was computed on lossy blocks. Since version 3."""
    OTHER_CODEC = 13
    """The record's codec is not one that the namespace allows. Since version 3."""
    DEMOTING = 14
    """Blocks are being written to a tier below, for their room or to be durable; try again. Since version 4."""
    NOT_DURABLE = 15
    """No tier of this daemon outlives it, or the one that does cannot be written. Since version 4."""
    MISSING = 16
    """The block is in no tier. Since version 4."""
    QUOTA = 17
    """The blocks before it in its own chain fill its tenant's quota, or it is larger than that. Since version 5."""

    def known_in(self, version: int) -> Reason:
        """The reason that a peer of a protocol version is told."""
        if version < 5 and self is Reason.QUOTA:
            return Reason.NO_ROOM
        if version < 4 and self >= Reason.DEMOTING:
            return Reason.ALL_HELD if self is Reason.DEMOTING else Reason.BAD_RECORD
        return Reason.BAD_RECORD if version < 3 and self >= Reason.NOT_EXACT else self


class GetStatus(IntEnum):
    """Answer to one key of a get. Persisted on the wire."""

    MISS = 0
    HIT = 1
    THROTTLED = 2


class TierId(IntEnum):
    """Tiers by id, nearest first; 0 is none. Persisted on the wire."""

    NONE = 0
    HBM = 1
    DRAM = 2
    SSD = 3
    REMOTE = 4


# ------------------------------------------------------------------ requests


class Request(msgspec.Struct, array_like=True):
    """Fields of every request.

    Attributes:
        id: correlates the reply; unique among a client's outstanding requests.
        session: from ``Welcome``; 0 in ``Hello`` only.
        namespace_id: from ``Attached``; 0 where the request concerns no namespace.
        sent_ns: the client's CLOCK_MONOTONIC when it sent, 0 if it is not on the daemon's host.
        timeout_ms: how long the client will wait.
        ring_head: head of the client's ring, which the daemon drains to first; 0 without a ring.
        access: id of the engine request this belongs to, 0 for none: one id is one access a key, however many
            requests carry it.
    """

    id: Unsigned
    session: Unsigned
    namespace_id: Unsigned
    sent_ns: Unsigned
    timeout_ms: Unsigned
    ring_head: Unsigned
    access: Unsigned


class Hello(Request, tag=1):
    """Opens a session. Its place and the meaning of its fields never change."""

    protocol_oldest: Unsigned
    protocol_newest: Unsigned
    client_version: Ident = ""
    pid: Unsigned = 0
    boot_id: Ident = ""
    mapped_layout: Unsigned = 0
    """Layout of shared memory that the client would map, 0 for none."""


class Attach(Request, tag=2):
    """Joins a namespace.

    Attributes:
        namespace: its description.
        payload_bytes: payload sizes the client is going to put, which get slots of their exact size.
        locked: the client holds the lock on its session file.
        generation: -1 joins the current generation. A client that comes back (the daemon restarted, its
            session expired) names the generation it was in: a later one here makes it stale, an earlier one
            here moves on to the client's.
    """

    namespace: Namespace
    payload_bytes: Annotated[tuple[Unsigned, ...], msgspec.Meta(max_length=MAX_DECLARED_SIZES)] = ()
    locked: bool = False
    generation: Annotated[int, msgspec.Meta(ge=-1, le=MAX_GENERATION)] = -1


class Put(Request, tag=3):
    """Stores records; two payload frames each: 256 bytes of header, then the sections."""

    count: Unsigned


class Get(Request, tag=4):
    """Fetches records of one part; ``keys`` is 32 bytes a key."""

    keys: Keys
    part: Unsigned = 0


class Match(Request, tag=5):
    """Counts leading complete blocks; takes a lease on them when ``lease_ms`` is not 0.

    ``prefetch``: those of them that are below DRAM begin to come up; what did not begin to within ``prefetch_ms`` is
    dropped (0: as the daemon has it).
    """

    keys: Keys
    lease_ms: Unsigned = 0
    prefetch: bool = False
    prefetch_ms: Unsigned = 0


class Exists(Request, tag=6):
    """Asks for each block whether it is complete, and where. Counts as no access."""

    keys: Keys


class Remove(Request, tag=7):
    """Removes blocks; descendants stay and are evicted first."""

    keys: Keys


class Clear(Request, tag=8):
    """Removes all blocks of the namespace."""


class Flush(Request, tag=9):
    """Answered when this session's earlier puts are published or refused."""


class Invalidate(Request, tag=10):
    """What this client computes from now differs from what it computed in ``generation``."""

    generation: Unsigned


class Prefetch(Request, tag=11):
    """Asks to have blocks in a tier soon; ``wait``: to be answered when they are there, or cannot be.

    ``within_ms``: without ``wait``, what did not begin to come up by then is dropped (0: as the daemon has it).
    """

    keys: Keys
    tier: TierId = TierId.DRAM
    wait: bool = False
    within_ms: Unsigned = 0


class Release(Request, tag=12):
    """Gives a lease back early."""

    lease: Unsigned


class Stats(Request, tag=13):
    """Asks for the daemon's statistics."""


class Verify(Request, tag=14):
    """Asks the daemon to check its invariants and the checksum of every resident record."""


class Reserve(Request, tag=17):
    """Asks for slots for records of a size to be kept in one of the client's lanes.

    Attributes:
        record_bytes: header included.
        lane: 0 to 7.
        parent: key of the block before the one that is written first, 32 zero bytes where there is none; empty: the
            client does not say.
    """

    record_bytes: Unsigned
    lane: Unsigned
    parent: bytes = b""


class Persist(Request, tag=18):
    """Asks to have blocks, and what is stored of the blocks before them, in a tier that outlives the daemon.

    All parts of a block that are there are meant. Answered when that is so, or cannot be.
    """

    keys: Keys


class Hint(Request, tag=19):
    """Says of a chain of blocks that a session which uses it is about to come back, or is over. Counts as no access.

    Attributes:
        keys: the chain's, parents first.
        soon: True: it comes back soon. False: it is over.
        within_ms: how soon, at the latest; 0: the client does not say.
    """

    keys: Keys
    soon: bool = True
    within_ms: Unsigned = 0


class ReportPrefill(Request, tag=30):
    """Says how fast the engine of this namespace computes prompts, which decides what is worth loading.

    Answered by ``Done``.

    Attributes:
        tokens: that were computed, without those that were loaded.
        micros: how long that took.
    """

    tokens: Unsigned
    micros: Unsigned


class Warm(Request, tag=31):
    """Asks to have a chain, or a part of one, in DRAM because it is likely to be used. Counts as no access.

    Answered by ``Warmed``, when that is done or cannot be.

    Attributes:
        keys: parents first.
        digest: of the namespace's generation, or its first bytes, four at least; empty: the session's own.
        evict: others may leave for it, as for a use; else it takes free room only, and is the first to leave.
        budget_bytes: most bytes of slots to bring up; 0: as there is room.
    """

    keys: Keys
    digest: bytes = b""
    evict: bool = False
    budget_bytes: Unsigned = 0


class Chains(Request, tag=32):
    """Asks which chains a tier holds, those first that were used last. Counts as no access.

    Answered by ``ChainsReply``.

    Attributes:
        tier: DRAM or SSD.
        budget_bytes: blocks that take so many bytes in DRAM together; 0: all.
    """

    tier: TierId = TierId.DRAM
    budget_bytes: Unsigned = 0


class Configure(Request, tag=20):
    """Changes what the running daemon does, until it ends. An empty name leaves things as they are.

    Attributes:
        policy: eviction policy of DRAM.
        ssd_policy: eviction policy of the SSD.
        admission: what is written when it leaves DRAM.
    """

    policy: Ident = ""
    ssd_policy: Ident = ""
    admission: Ident = ""


class Record(Request, tag=23):
    """Begins or ends the recording of lookups; ``action`` is "start", "stop", or empty to ask how it goes."""

    action: Ident = ""


class Retain(Request, tag=22):
    """Asks to have blocks leave later than others, or earlier. Counts as no access. Since version 5.

    Attributes:
        keys: of the blocks. Those before them in DRAM are retained as well, where the priority is above the normal one.
        priority: 0 to 100, 50 is normal: blocks of a lower one leave before all others, of a higher one after them.
        ttl_ms: after which they are normal blocks again, 0 for no end.
        drop: they are removed then.
    """

    keys: Keys
    priority: Unsigned = 50
    ttl_ms: Unsigned = 0
    drop: bool = False


class Why(Request, tag=21):
    """Asks for the story of keys: where their blocks are, what became of them, why they miss. Counts as no access.

    Attributes:
        keys: of blocks.
        chained: they are a prompt's, from its first block on: each is of use only with all before it.
        prefixes: first hexadecimal digits of further keys, at least 8 each, that begin only one that is known.
        namespace: first hexadecimal digits, at least 8, of the digest of the namespace that is meant; empty: its own.
    """

    keys: Keys
    chained: bool = True
    prefixes: Annotated[tuple[Ident, ...], msgspec.Meta(max_length=MAX_PREFIXES)] = ()
    namespace: Ident = ""


class Ping(Request, tag=15):
    """Asks for nothing."""


class Bye(Request, tag=16):
    """Ends the session; there is no reply."""


AnyRequest = (
    Hello
    | Attach
    | Put
    | Get
    | Match
    | Exists
    | Remove
    | Clear
    | Flush
    | Invalidate
    | Prefetch
    | Release
    | Stats
    | Verify
    | Ping
    | Bye
    | Reserve
    | Persist
    | Hint
    | Configure
    | Record
    | Retain
    | Why
    | ReportPrefill
    | Warm
    | Chains
)

# ------------------------------------------------------------------ replies


class Reply(msgspec.Struct, array_like=True):
    """Fields of every reply: the request's id, and which life of the daemon answers."""

    id: Unsigned
    incarnation: Unsigned


class ErrorReply(Reply, tag=101):
    """The request was not carried out; ``code`` is an ``ErrorCode``."""

    code: Unsigned
    message: str


class Welcome(Reply, tag=102):
    """Answer to ``Hello``.

    Attributes:
        protocol: the version agreed on.
        session: to be put into every request.
        daemon_version: of the distribution.
        max_record_bytes: largest record, header included.
        session_file: path that the client locks to show that it lives, "" where there is none.
        same_host: whether client and daemon share a kernel, so that ``sent_ns`` means something.
        pid: the daemon's; a client of the same process does not lock (its lock would not show its death).
        arena_file, index_file, doorbell: what the client may map and ring, "" where it may not.
        unmapped: why it may not, for people.
        lower_tiers: the tiers below DRAM that blocks are read from, a bit ``1 << TierId`` each; 0 where there are none.
    """

    protocol: Unsigned
    session: Unsigned
    daemon_version: str
    max_record_bytes: Unsigned
    session_file: str = ""
    same_host: bool = False
    pid: Unsigned = 0
    arena_file: str = ""
    index_file: str = ""
    doorbell: str = ""
    unmapped: str = ""
    lower_tiers: Unsigned = 0


class Attached(Reply, tag=103):
    """The namespace's id and digest in this incarnation and generation; id 0: the client is stale.

    A stale client reads misses and its puts are rejected until it invalidates or is made anew.
    """

    namespace_id: Unsigned
    generation: Unsigned
    digest: bytes


class PutReply(Reply, tag=104):
    """One ``PutStatus`` and one ``Reason`` byte a record."""

    statuses: bytes
    reasons: bytes
    retry_after_ms: Unsigned = 0


class GetReply(Reply, tag=105):
    """One ``GetStatus`` byte a key; one payload frame (the whole record) for each hit, in order."""

    statuses: bytes


class MatchReply(Reply, tag=106):
    """``hits`` leading blocks; their tiers as (TierId, count) runs; the lease, 0 for none.

    ``fidelity`` is the lowest effective fidelity among their records, 255 where all are exact. ``recompute``: how many
    blocks behind the hits are in tiers below, and are computed sooner than they are loaded.
    """

    hits: Unsigned
    tiers: tuple[tuple[Unsigned, Unsigned], ...] = ()
    lease: Unsigned = 0
    fidelity: Unsigned = FIDELITY_EXACT
    recompute: Unsigned = 0


class ExistsReply(Reply, tag=107):
    """One ``TierId`` byte a key, 0 where the block is not complete.

    ``fidelities`` has the lowest effective fidelity of the block's records, a byte a key, 0 where it is not complete.
    """

    tiers: bytes
    fidelities: bytes = b""


class CountReply(Reply, tag=108):
    """Answer to remove, clear, prefetch and hint: how many blocks; to release: 1 where the lease still held, else 0.

    ``below``: to a prefetch that waited, how many are complete only in tiers below still.
    """

    count: Unsigned
    below: Unsigned = 0


class Done(Reply, tag=109):
    """Answer to flush and ping."""


class Reserved(Reply, tag=112):
    """The lane's slots: their size, how many are kept lent, or why there are none (``reason`` not 0)."""

    slot_bytes: Unsigned
    slots: Unsigned
    reason: Unsigned = 0


class Persisted(Reply, tag=113):
    """One ``PutStatus`` and one ``Reason`` byte a key: whether its block is durable, and why not."""

    statuses: bytes
    reasons: bytes


class Configured(Reply, tag=114):
    """What the daemon does now; "" for a tier that there is not."""

    policy: str
    ssd_policy: str = ""
    admission: str = ""


class Recorded(Reply, tag=117):
    """How the recording of lookups goes."""

    recording: RecordStats


class Retained(Reply, tag=116):
    """Answer to retain: how many of the blocks have now what was asked for; ``waiting``: those that will, once back."""

    count: Unsigned
    waiting: Unsigned = 0


class WhyReply(Reply, tag=115):
    """The story of each key, and then of each prefix.

    Attributes:
        namespace, digest, generation: of the namespace: its label, and its digest as hexadecimal digits.
        block_tokens: tokens a block, 0 where the namespace does not say.
        parts: that make a block complete.
        stories: one a key.
    """

    namespace: str
    digest: str
    generation: Unsigned
    block_tokens: Unsigned
    parts: Unsigned
    stories: list[KeyStory]


class Warmed(Reply, tag=130):
    """Answer to ``Warm``, in blocks.

    Attributes:
        brought, brought_bytes: that were read, and their slots.
        there: that were in DRAM already.
        unknown: that no tier has.
        no_room: for which there was no room within what was allowed, or no time.
        failed: that could not be read.
    """

    brought: Unsigned
    brought_bytes: Unsigned
    there: Unsigned
    unknown: Unsigned
    no_room: Unsigned
    failed: Unsigned


class ChainsReply(Reply, tag=131):
    """Answer to ``Chains``: segments of chains, the first of which was used last; three payload frames.

    The first has their keys, 32 bytes each, parents first: a segment goes on behind a block of one before it, or behind
    nothing. The second has the number of keys of each segment, u32 little-endian, the third the index in ``digests`` of
    its namespace, u32 too.

    Attributes:
        digests: of the namespaces' generations, 32 bytes each.
        names: what people call them.
        slot_bytes: what all the blocks take in DRAM.
    """

    digests: tuple[bytes, ...] = ()
    names: tuple[str, ...] = ()
    slot_bytes: Unsigned = 0


class StatsReply(Reply, tag=110):
    """Statistics at one moment."""

    stats: DaemonStats


class VerifyReply(Reply, tag=111):
    """Outcome of a verification; ``problems`` is empty when all is well."""

    records: Unsigned
    bytes: Unsigned
    seconds: float
    problems: list[str]


AnyReply = (
    ErrorReply
    | Welcome
    | Attached
    | PutReply
    | GetReply
    | MatchReply
    | ExistsReply
    | CountReply
    | Done
    | StatsReply
    | VerifyReply
    | Reserved
    | Persisted
    | Configured
    | Recorded
    | Retained
    | WhyReply
    | Warmed
    | ChainsReply
)

TierName = Literal["hbm", "dram", "ssd", "remote"]
"""Tiers by name, as the SDK and the CLI say them."""
