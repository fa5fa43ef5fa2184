"""Valid messages, and endless malformed ones made from them: the same frames for the same seed."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator

import msgspec

from kvstore.protocol.framing import encode
from kvstore.protocol.messages import (
    Attach,
    Attached,
    Bye,
    Chains,
    ChainsReply,
    Clear,
    Configure,
    Configured,
    CountReply,
    Done,
    ErrorReply,
    Exists,
    ExistsReply,
    Flush,
    Get,
    GetReply,
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
    Record,
    Recorded,
    Release,
    Remove,
    ReportPrefill,
    Reserve,
    Reserved,
    Retain,
    Retained,
    Stats,
    TierId,
    Verify,
    VerifyReply,
    Warm,
    Warmed,
    Welcome,
    Why,
    WhyReply,
)
from kvstore.protocol.namespace import Namespace
from kvstore.protocol.statistics import RecordStats
from kvstore.protocol.stories import KeyStory

HEAD = (7, 3, 1, 123_456_789, 5000, 0, 42)
KEYS = bytes(range(1, 97))
REQUESTS = [
    Hello(1, 0, 0, 0, 5000, 0, 0, 1, 2, "0.1.0", 4711, "5a3c0c39-86ff-4f7c-8fd5-8f7d0f8a9a54", 1),
    Attach(*HEAD, Namespace(name="chat", model="m", parts=2, tenant_salt=b"s"), (4096, 65_536), True, 4),
    Attach(*HEAD, Namespace()),
    Put(*HEAD, 2),
    Get(*HEAD, KEYS, 1),
    Match(*HEAD, KEYS, 1500, True),
    Exists(*HEAD, KEYS),
    Remove(*HEAD, KEYS[:32]),
    Clear(*HEAD),
    Flush(*HEAD),
    Invalidate(*HEAD, 4),
    Prefetch(*HEAD, KEYS, TierId.DRAM, True),
    Persist(*HEAD, KEYS),
    Hint(*HEAD, KEYS, False),
    Configure(*HEAD, "adaptive", "lru", "all"),
    Why(*HEAD, bytes(range(64)), True, ("0f1e2d3c",), "aabbccdd"),
    Record(*HEAD, "start"),
    ReportPrefill(*HEAD, 48_000, 6_500_000),
    Warm(*HEAD, KEYS, bytes(range(32)), True, 1 << 30),
    Chains(*HEAD, TierId.SSD, 1 << 30),
    Retain(*HEAD, KEYS, 80, 60_000, True),
    Release(*HEAD, 99),
    Stats(*HEAD),
    Verify(*HEAD),
    Reserve(*HEAD, 65_792, 3),
    Ping(*HEAD),
    Bye(*HEAD),
]
REPLIES = [
    ErrorReply(7, 5, 3, "greet again"),
    Welcome(7, 5, 1, 3, "0.1.0", 1 << 20, "/dev/shm/kvstore-0-abc/session-3", True),
    Welcome(7, 5, 2, 3, "0.1.0", 1 << 20, "/k/client-3", True, 42, "/k/arena-5", "/k/index-5", "/k/doorbell-5", "", 8),
    Attached(7, 5, 1, 0, bytes(32)),
    PutReply(7, 5, b"\1\2", b"\0\0", 0),
    GetReply(7, 5, b"\1\0"),
    MatchReply(7, 5, 3, ((2, 2), (3, 1)), 9),
    ExistsReply(7, 5, b"\2\0"),
    CountReply(7, 5, 3),
    Done(7, 5),
    Reserved(7, 5, 69_632, 60),
    Persisted(7, 5, b"\1\4", b"\0\x10"),
    Configured(7, 5, "adaptive", "lru", "all"),
    WhyReply(7, 5, "chat", "aa" * 32, 0, 64, 1, [KeyStory(key=bytes(range(32)), state="unknown", cause="never_seen")]),
    Recorded(7, 5, RecordStats(state="on", directory="/recordings", max_bytes=1 << 28, file="a.lookups", requests=3)),
    Retained(7, 5, 2, 1),
    Warmed(7, 5, 2, 8192, 1, 3, 4, 5),
    ChainsReply(7, 5, (bytes(range(32)),), ("chat",), 8192),
    VerifyReply(7, 5, 10, 4096, 0.25, ["slot 3: wrong checksum"]),
]
LEAD_BYTES = bytes([0x00, 0x7F, 0x80, 0x90, 0x9F, 0xA0, 0xC0, 0xC1, *range(0xC2, 0xE0), 0xE0, 0xFF])
EXTREMES = [0, 1, 127, 128, 255, 1 << 16, 1 << 31, (1 << 32) - 1, 1 << 63, (1 << 64) - 1]


def mutated(rng: random.Random, frame: bytes) -> bytes:
    """One to four random wounds: flipped bits, other types, lengths, cuts, doubled and foreign pieces."""
    wounded = bytearray(frame)
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(wounded)) if wounded else 0
        match rng.randrange(7):
            case 0 if wounded:
                wounded[at] ^= 1 << rng.randrange(8)
            case 1 if wounded:
                wounded[at] = rng.choice(LEAD_BYTES)
            case 2:
                wounded[at:at] = rng.randbytes(rng.randint(1, 9))
            case 3:
                del wounded[at : at + rng.randint(1, 9)]
            case 4:
                wounded[at:at] = wounded[at : at + rng.randint(1, 40)]
            case 5:
                lead, size = rng.choice([(0xC6, 4), (0xDB, 4), (0xDD, 4), (0xDF, 4), (0xCF, 8), (0xD3, 8), (0xC9, 4)])
                wounded[at:at] = bytes([lead]) + rng.choice(EXTREMES).to_bytes(8, "big")[-size:]
            case _:
                wounded[at:at] = encode(value(rng, 2))
    return bytes(wounded)


def value(rng: random.Random, depth: int) -> object:
    """Any MessagePack value."""
    match rng.randrange(9 if depth else 7):
        case 0:
            return rng.choice([None, True, False])
        case 1:
            return rng.choice(EXTREMES) - rng.choice([0, 0, 0, 1])
        case 2:
            return -rng.choice([1, 32, 33, 128, 1 << 31, 1 << 63])
        case 3:
            return rng.choice([0.0, 1.0, -1.5, float("inf"), float("nan")])
        case 4:
            return rng.choice(["", "default", "name", "\x00", "é" * 40])
        case 5:
            return rng.randbytes(rng.choice([0, 1, 31, 32, 64]))
        case 6:
            return msgspec.msgpack.Ext(rng.randint(-128, 127), rng.randbytes(rng.choice([0, 1, 4, 8, 12])))
        case 7:
            return [value(rng, depth - 1) for _ in range(rng.randrange(10))]
        case _:
            keys = ["name", "parts", "tenant_salt", "codec", "x"]
            return {rng.choice(keys): value(rng, depth - 1) for _ in range(rng.randrange(4))}


def ill_typed(rng: random.Random, tags: list[int]) -> bytes:
    """A message of the right shape whose elements may be anything."""
    envelope = [value(rng, 1) if rng.random() < 0.1 else rng.choice(EXTREMES) for _ in range(7)]
    listed = [rng.choice(tags), *envelope, *(value(rng, 3) for _ in range(rng.randrange(5)))]
    return encode(listed[: rng.randint(0, len(listed))] if rng.random() < 0.2 else listed)


def nested(rng: random.Random, tags: list[int]) -> bytes:
    """Arrays and maps inside each other up to far beyond any recursion limit, open or closed."""
    depth = rng.choice([1, 10, 100, 1000, 5000, 20_000])
    inner, closing = rng.choice(
        [(b"\x91", b"\xc0"), (b"\x81\xa1k", b"\xc0"), (b"\xdc\x00\x01", b"\x90"), (b"\x92\x01", b"")]
    )
    head = rng.choice([b"", bytes([0x9C, rng.choice(tags)]) + bytes([1] * rng.randint(0, 7))])
    return head + inner * depth + closing


def frames(seed: int, samples: list[bytes], tags: list[int], count: int) -> Iterator[tuple[str, bytes]]:
    """``count`` malformed frames and their kinds; the same ones for the same seed."""
    rng = random.Random(seed)
    makers: list[tuple[str, float, Callable[[], bytes]]] = [
        ("mutated", 0.45, lambda: mutated(rng, rng.choice(samples))),
        ("ill-typed", 0.19, lambda: ill_typed(rng, tags)),
        ("random", 0.19, lambda: rng.randbytes(rng.randrange(200))),
        ("nested", 0.02, lambda: nested(rng, tags)),
    ]
    for frame in samples:
        yield from (("truncated", frame[:end]) for end in range(len(frame)))
        yield from (("flipped", frame[:at] + bytes([frame[at] ^ 1 << bit]) + frame[at + 1 :])
                    for at in range(len(frame)) for bit in range(8))  # fmt: skip
        yield from (("lead byte", frame[:at] + bytes([lead]) + frame[at + 1 :])
                    for at in range(len(frame)) for lead in LEAD_BYTES)  # fmt: skip
    for kind, share, make in makers:
        for _ in range(int(count * share)):
            yield kind, make()
