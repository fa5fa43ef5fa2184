"""Records of every codec and what may become of them on the way: structured damage, most of it under right checksums.

``is_record`` is ``docs/record.md`` once more, written without the code under test.
"""

from __future__ import annotations

import functools
import math
import random
import struct
from collections import Counter
from collections.abc import Callable
from typing import Any, Final, NamedTuple

import xxhash

from kvstore_kernels.codecs import CODECS
from kvstore_kernels.layout import KVLayout, Layout, MLALayout

HEADER_BYTES: Final = 256
MOST: Final = 1 << 32

FIELDS: Final = {
    "magic": (0, "8s"),
    "version": (8, "H"),
    "header_bytes": (10, "H"),
    "part": (12, "H"),
    "codec": (14, "H"),
    "record_bytes": (16, "Q"),
    "key": (24, "32s"),
    "parent_key": (56, "32s"),
    "namespace_digest": (88, "32s"),
    "codec_parameters": (120, "16s"),
    "dtype": (136, "24s"),
    "shape": (160, "6I"),
    "token_count": (184, "I"),
    "dimensions": (188, "B"),
    "sections": (189, "B"),
    "fidelity": (190, "B"),
    "lineage_loss": (191, "B"),
    "section_bytes": (192, "4Q"),
    "payload_checksum": (224, "Q"),
    "reserved_tail": (232, "16s"),
}
"""Offsets and struct codes of a header's fields, all but its checksum."""

ELEMENT_BYTES: Final = {
    b"uint8": 1,
    b"int8": 1,
    b"float8_e4m3fn": 1,
    b"float8_e5m2": 1,
    b"bfloat16": 2,
    b"float16": 2,
    b"float32": 4,
}
LAYOUTS: Final[tuple[Layout, ...]] = (
    KVLayout(1, 1, 16, "bfloat16", 64),
    KVLayout(2, 1, 16, "float16", 64),
    MLALayout(1, 64, 16, "float32", 64),
    KVLayout(1, 1, 16, "uint8", 64),
)
_SMALL: Final = (0, 1, 2, 4, 6, 19, 20, 255, 256, 4096, 65_535, 65_536)
_INTERESTING: Final = (*_SMALL, 1 << 31, MOST - 1, MOST, 1 << 63, (1 << 64) - 1)
_WHOLE: Final = struct.Struct("<8sHHHHQ32s32s32s16s24s6IIBBBB4QQ16sQ")
_SHAPES: Final = ((1, 2, 64, 1, 16), (2, 2, 64, 1, 16), (1, 64, 80), (64, 1, 2, 1, 16), (2048,), (1, 2, 64, 1, 17))


class Base(NamedTuple):
    """A right record, and the layout of its block."""

    record: bytes
    layout: Layout
    codec: str


def is_record(record: bytes) -> bool:
    """Whether a reader may take these bytes for a record: rules 1 to 12 of ``docs/record.md``."""
    if len(record) < HEADER_BYTES:
        return False
    fields = _WHOLE.unpack_from(record)
    magic, version, header_bytes, _, codec, record_bytes, key, parent, _, parameters, dtype_text = fields[:11]
    shape, (_, dimensions, sections, fidelity, _) = fields[11:17], fields[17:22]
    lengths, payload_checksum, tail, header_checksum = fields[22:26], *fields[26:29]
    if (magic, version, header_bytes) != (b"KVRECORD", 1, 256) or any(tail) or not any(key) or key == parent:
        return False
    if header_checksum != xxhash.xxh3_64_intdigest(record[:248]):
        return False
    dtype = dtype_text.rstrip(b"\0")
    if dtype not in ELEMENT_BYTES or not 1 <= codec <= 19 or not 1 <= dimensions <= 6 or not 1 <= sections <= 4:
        return False
    if 0 in shape[:dimensions] or any(shape[dimensions:]) or 0 in lengths[:sections] or any(lengths[sections:]):
        return False
    if record_bytes != 256 + sum(lengths) or record_bytes > MOST or record_bytes != len(record):
        return False
    values, payload_bytes = math.prod(shape[:dimensions]), sum(lengths)
    logical_bytes = values * ELEMENT_BYTES[dtype]
    if codec == 1:
        possible = sections == 1 and payload_bytes == logical_bytes
    elif codec <= 3:
        planes = (values + 65_535) // 65_536 * ELEMENT_BYTES[dtype]
        possible = sections == 1 and 5 * planes <= payload_bytes <= 4 * planes + logical_bytes
    else:
        floats = dtype in (b"bfloat16", b"float16", b"float32")
        possible = sections == 2 and floats and payload_bytes <= logical_bytes <= 16 * payload_bytes
    if not possible or (codec != 1 and logical_bytes > MOST):
        return False
    if (fidelity == 255) != (codec <= 3) or any(parameters) != (codec != 1):
        return False
    return payload_checksum == xxhash.xxh3_64_intdigest(record[256:])


def sealed(record: bytes | bytearray, *, payload: bool = False) -> bytes:
    """The record with its header's checksum made right, and its payload's if wanted."""
    made = bytearray(record)
    if payload:
        struct.pack_into("<Q", made, 224, xxhash.xxh3_64_intdigest(made[256:]))
    struct.pack_into("<Q", made, 248, xxhash.xxh3_64_intdigest(made[:248]))
    return bytes(made)


def record_of(codec_name: str, layout: Layout, sections: list[bytes], key: bytes, digest: bytes) -> bytes:
    """A record by hand, of a first block."""
    codec = CODECS[codec_name]
    shape = layout.shape
    lengths = [len(section) for section in sections]
    header = _WHOLE.pack(
        *(b"KVRECORD", 1, 256, 0, codec.id, 256 + sum(lengths), key, bytes(32), digest, codec.digest),
        *(layout.dtype.encode(), *shape, *(0,) * (6 - len(shape)), layout.block_tokens, len(shape), len(lengths)),
        *(codec.fidelity, 0, *lengths, *(0,) * (4 - len(lengths)), 0, bytes(16), 0),
    )
    return sealed(header + b"".join(sections), payload=True)


@functools.cache
def bases(digest: bytes = b"d" * 32) -> tuple[Base, ...]:
    """One record of each codec for each layout that it can store, of random numbers."""
    import torch

    made = []
    for layout in LAYOUTS:
        generator = torch.Generator().manual_seed(len(made))
        numbers = torch.randn(layout.shape, generator=generator)
        whole = layout.element_bytes == 1
        block = (numbers * 40).abs().to(torch.uint8) if whole else numbers.to(getattr(torch, layout.dtype))
        for name, codec in CODECS.items():
            try:
                codec.check(layout)
            except ValueError:
                continue
            sections = codec.encode(block, layout).sections
            key = bytes([len(made) + 1]) * 32
            made.append(Base(record_of(name, layout, sections, key, digest), layout, name))
    return tuple(made)


class Mutator:
    """Makes mutated records, the same ones from the same seed.

    Attributes:
        made: how many of each kind.
    """

    def __init__(self, seed: int, digest: bytes = b"d" * 32) -> None:
        self._rng = random.Random(seed)
        self._bases = bases(digest)
        self.made: Counter[str] = Counter()
        kinds: dict[Callable[[bytearray], bytes], int] = {
            self._fields: 30,
            self._lengths: 14,
            self._codec: 14,
            self._block: 14,
            self._cut: 5,
            self._extended: 5,
            self._flipped: 6,
            self._payload: 10,
            self._spliced: 6,
            self._garbage: 2,
        }
        self._kinds, self._weights = list(kinds), list(kinds.values())

    def one(self) -> bytes:
        """A mutated record; some are still right."""
        base = self._rng.choice(self._bases).record
        (kind,) = self._rng.choices(self._kinds, self._weights)
        self.made[kind.__name__] += 1
        return kind(bytearray(base))

    def pair(self) -> tuple[Base, bytes]:
        """A right record and a mutated one of it whose payload alone is another, under right checksums."""
        base = self._rng.choice(self._bases)
        return base, self._payload(bytearray(base.record), seal=True)

    def _value(self, code: str) -> tuple[Any, ...]:
        rng = self._rng
        if code.endswith("s"):
            size = int(code[:-1])
            return (rng.choice((bytes(size), rng.randbytes(size), b"\1".ljust(size, b"\0"))),)
        bits = 8 * struct.calcsize(f"<{code[-1]}")
        known = [number for number in _INTERESTING if number < 1 << bits]
        count = int(code[:-1] or 1)
        return tuple(rng.choice((rng.choice(known), rng.getrandbits(bits), rng.randrange(16))) for _ in range(count))

    def _fields(self, record: bytearray) -> bytes:
        """Fields with values of their own, those of another record, or a little more or less."""
        rng = self._rng
        for name in rng.sample(list(FIELDS), rng.choice((1, 1, 1, 2, 3))):
            at, code = FIELDS[name]
            what = rng.randrange(3)
            if what == 0:
                value = self._value(code)
            elif what == 1 or code.endswith("s"):
                value = struct.unpack_from(f"<{code}", rng.choice(self._bases).record, at)
            else:
                bits = 8 * struct.calcsize(f"<{code[-1]}")
                before = struct.unpack_from(f"<{code}", record, at)
                value = tuple((number + rng.choice((-1, 0, 1))) % (1 << bits) for number in before)
            struct.pack_into(f"<{code}", record, at, *value)
        return sealed(record)

    def _lengths(self, record: bytearray) -> bytes:
        """Sections of other lengths and number that agree with the record's length, whether or not it has them."""
        rng = self._rng
        payload_bytes = len(record) - HEADER_BYTES
        sections = rng.randint(1, 4)
        lengths = [rng.choice((1, payload_bytes // 2, payload_bytes, rng.randrange(1 << 16))) for _ in range(sections)]
        if rng.randrange(2):
            lengths[-1] = max(payload_bytes - sum(lengths[:-1]), 0)
        struct.pack_into("<4Q", record, 192, *lengths, *(0,) * (4 - sections))
        struct.pack_into("<B", record, 189, sections if rng.randrange(8) else rng.randrange(6))
        struct.pack_into("<Q", record, 16, HEADER_BYTES + sum(lengths))
        if rng.randrange(3) and sum(lengths) < 1 << 17:
            del record[HEADER_BYTES + sum(lengths) :]
            record += rng.randbytes(HEADER_BYTES + sum(lengths) - len(record))
        return sealed(record, payload=bool(rng.randrange(4)))

    def _codec(self, record: bytearray) -> bytes:
        """Another codec's id, alone or with all that belongs to it."""
        rng = self._rng
        codec = rng.choice(list(CODECS.values()))
        struct.pack_into("<H", record, 14, codec.id)
        if rng.randrange(2):
            record[120:136] = codec.digest
        if rng.randrange(2):
            record[190] = codec.fidelity
        if rng.randrange(4) == 0:
            record[120:136] = rng.choice((bytes(16), rng.randbytes(16)))
        if rng.randrange(3) == 0:
            record[191] = rng.randrange(256)
        return sealed(record)

    def _block(self, record: bytearray) -> bytes:
        """Another dtype or shape of the block."""
        rng = self._rng
        if rng.randrange(2):
            record[136:160] = rng.choice(list(ELEMENT_BYTES)).ljust(24, b"\0")
        if rng.randrange(2):
            shape = list(rng.choice(_SHAPES))
            what = rng.randrange(4)
            if what == 0:
                rng.shuffle(shape)
            elif what == 1:
                shape[rng.randrange(len(shape))] *= rng.choice((0, 2, 16, 65_536, MOST // 65_536))
            shape = [extent % MOST for extent in shape]
            struct.pack_into("<6I", record, 160, *shape, *(0,) * (6 - len(shape)))
            record[188] = len(shape) if rng.randrange(8) else rng.randrange(8)
        return sealed(record)

    def _cut(self, record: bytearray) -> bytes:
        del record[self._rng.randrange(len(record)) :]
        return sealed(record, payload=True) if len(record) >= HEADER_BYTES and self._rng.randrange(2) else bytes(record)

    def _extended(self, record: bytearray) -> bytes:
        more = self._rng.choice((1, 8, 64, 256, 4096))
        record += self._rng.choice((bytes(more), self._rng.randbytes(more)))
        return sealed(record, payload=True) if self._rng.randrange(2) else bytes(record)

    def _flipped(self, record: bytearray) -> bytes:
        for _ in range(self._rng.choice((1, 1, 2, 8))):
            record[self._rng.randrange(len(record))] ^= 1 << self._rng.randrange(8)
        return bytes(record)

    def _payload(self, record: bytearray, *, seal: bool | None = None) -> bytes:
        """Other bytes in the payload: single ones, runs, or all of them."""
        rng = self._rng
        size = len(record) - HEADER_BYTES
        what = rng.randrange(4)
        for _ in range(rng.choice((1, 1, 3))):
            # Tables and parameters lie at a section's ends: there more often.
            at = HEADER_BYTES + rng.choice((rng.randrange(size), rng.randrange(min(size, 32)), size - 1))
            if what == 0:
                record[at] ^= 1 << rng.randrange(8)
            elif what == 1:
                record[at : at + 4] = rng.choice((bytes(4), b"\xff" * 4, rng.randbytes(4)))[: len(record) - at]
            elif what == 2:
                run = rng.randint(1, min(64, len(record) - at))
                record[at : at + run] = rng.randbytes(run)
        if what == 3:
            record[HEADER_BYTES:] = rng.choice((bytes(size), b"\xff" * size, rng.randbytes(size)))
        if seal is None:
            seal = bool(rng.randrange(2))
        return sealed(record, payload=True) if seal else bytes(record)

    def _spliced(self, record: bytearray) -> bytes:
        """The payload of another record."""
        other = self._rng.choice(self._bases).record
        what = self._rng.randrange(3)
        if what == 0:
            record[HEADER_BYTES:] = other[HEADER_BYTES:]
            return sealed(record, payload=True)
        if what == 1:
            record[HEADER_BYTES:] = other[HEADER_BYTES:]
            return bytes(record)
        middle = (len(record) - HEADER_BYTES) // 2 + HEADER_BYTES
        record[middle:] = other[middle:]
        return sealed(record, payload=True)

    def _garbage(self, record: bytearray) -> bytes:
        record[:HEADER_BYTES] = self._rng.randbytes(HEADER_BYTES)
        return sealed(record)
