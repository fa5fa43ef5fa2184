"""Records of one codec for blocks of one layout: their sizes, their headers, and whether a header is one of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Final

import numpy as np
import numpy.typing as npt

from kvstore.errors import CorruptRecord
from kvstore.format.constants import FIDELITY_EXACT, RECORD_HEADER_BYTES, CodecId
from kvstore.format.record import RecordHeader, decode_header, encode_header, record_header
from kvstore_client.tensors.results import Failure
from kvstore_kernels.codecs import Codec, codec_of_id
from kvstore_kernels.layout import Layout

__all__ = ["BlockRecords", "Readable", "Run"]

Problem = tuple[Failure, str]
"""Why a record cannot be decoded, and the same for people."""
Words = npt.NDArray[np.int64]
Bytes = npt.NDArray[np.uint8]

# Offsets in a record's header (``docs/record.md``).
_CODEC: Final = slice(14, 16)
_KIND: Final = slice(120, 190)
"""Parameters, dtype, shape, tokens, dimensions and sections: equal in all records of one codec and layout."""
_FIDELITY: Final = 190
_LINEAGE_LOSS: Final = 191
_SECTIONS: Final = slice(192, 224)
_TAIL: Final = slice(232, 248)


class BlockRecords:
    """What records of a codec are for blocks of a layout.

    Args:
        codec: of the records.
        layout: of the blocks.

    Attributes:
        fixed: whether all blocks take the same bytes.
        max_payload_bytes: most bytes of all sections.
        max_record_bytes: the same with the header.
        sections: how many.

    Raises:
        ValueError: the codec cannot store such blocks; says what would do.
    """

    def __init__(self, codec: Codec, layout: Layout) -> None:
        codec.check(layout)
        self.codec = codec
        self.layout = layout
        self.section_bytes = codec.section_bytes(layout)
        self.max_section_bytes = codec.max_section_bytes(layout)
        self.fixed = self.section_bytes is not None
        self.sections = len(self.max_section_bytes)
        self.max_payload_bytes = sum(self.max_section_bytes)
        self.max_record_bytes = RECORD_HEADER_BYTES + self.max_payload_bytes
        self._digest = codec.digest
        self._sample = np.frombuffer(self.header(b"\1" * 32, bytes(32), bytes(32), 0), np.uint8)

    def header(
        self,
        key: bytes,
        parent_key: bytes,
        namespace_digest: bytes,
        part: int,
        *,
        lineage: int = FIDELITY_EXACT,
        section_bytes: Sequence[int] | None = None,
        payload_checksum: int = 0,
    ) -> bytes:
        """The 256 bytes of a record's header; with the most that sections may have where no lengths are given."""
        return encode_header(
            record_header(
                key=key,
                parent_key=parent_key,
                namespace_digest=namespace_digest,
                part=part,
                codec=CodecId(self.codec.id),
                codec_parameters=self._digest,
                fidelity=self.codec.fidelity,
                lineage=lineage,
                dtype=self.layout.dtype,
                shape=self.layout.shape,
                token_count=self.layout.block_tokens,
                section_bytes=self.max_section_bytes if section_bytes is None else tuple(section_bytes),
                payload_checksum=payload_checksum,
            )
        )

    def template(self, namespace_digest: bytes, part: int, lineage: int) -> Words:
        """A header into which compiled code fills what differs from block to block."""
        return np.frombuffer(
            self.header(b"\1" * 32, bytes(32), namespace_digest, part, lineage=lineage), np.int64
        ).copy()

    def alike(self, headers: Bytes) -> npt.NDArray[np.bool_]:
        """Which headers ``[count, 256]`` are, byte for byte, those of records of this kind; only where it is fixed."""
        sample = self._sample
        different = headers[:, _TAIL].any(axis=1)
        for field in (_CODEC, _KIND, _SECTIONS):
            different |= (headers[:, field] != sample[field]).any(axis=1)
        return np.logical_not(different)

    def problem(self, header: RecordHeader) -> Problem | None:
        """Why a record of this codec cannot be decoded to a block of this layout, None where it can."""
        layout = self.layout
        if header.dtype != layout.dtype or header.shape != layout.shape:
            return Failure.LAYOUT, (
                f"its record is {header.dtype} {list(header.shape)}, wanted is {layout.dtype} {list(layout.shape)}"
            )
        if header.codec_parameters != self._digest:
            return Failure.CODEC, f"codec {self.codec.name} with parameters that this version does not have"
        lengths = header.section_bytes
        right = len(lengths) == self.sections and all(
            length <= most for length, most in zip(lengths, self.max_section_bytes, strict=True)
        )
        if not right or (self.section_bytes is not None and lengths != self.section_bytes):
            return Failure.CORRUPT, f"sections of {lengths} bytes are none of codec {self.codec.name}"
        return None


@dataclass(frozen=True, slots=True)
class Run:
    """Blocks of one codec, one behind the other: positions, and the section lengths ``[stop - start, sections]``."""

    records: BlockRecords
    start: int
    stop: int
    section_bytes: Words


class Readable:
    """Says which records can be decoded to blocks of a layout, and how.

    Args:
        written: records of the codec that this client writes.
        exact: the namespace is: nothing else is served.
    """

    def __init__(self, written: BlockRecords, exact: bool) -> None:
        self._written = written
        self._exact = exact
        self._known = {written.codec.id: written}

    def runs(self, headers: Bytes) -> tuple[list[Run], list[int], Problem | None]:
        """What leading headers ``[count, 256]`` say, each copied out and whole.

        Returns:
            Runs of blocks of one codec; the effective fidelity of each block in them; why the next one is in none.
        """
        count = len(headers)
        written = self._written
        fidelities = np.minimum(headers[:, _FIDELITY], FIDELITY_EXACT - headers[:, _LINEAGE_LOSS])
        if written.fixed and not self._exact and count and written.alike(headers).all():
            lengths = np.tile(np.array(written.section_bytes, np.int64), (count, 1))
            return [Run(written, 0, count, lengths)], fidelities.tolist(), None
        decoded: list[RecordHeader] = []
        problem: Problem | None = None
        for row in headers:
            try:
                decoded.append(decode_header(row.tobytes()))
            except CorruptRecord as error:
                problem = Failure.CORRUPT, str(error)
                break
        runs, levels, other = self.runs_of(decoded)
        return runs, levels, other or problem

    def runs_of(self, headers: Sequence[RecordHeader]) -> tuple[list[Run], list[int], Problem | None]:
        """As ``runs``, of decoded headers."""
        kinds: list[BlockRecords] = []
        problem: Problem | None = None
        for header in headers:
            kind = self._kind(header)
            if isinstance(kind, tuple):
                problem = kind
                break
            kinds.append(kind)
        runs: list[Run] = []
        start = 0
        for _, group in groupby(kinds, key=id):
            alike = list(group)
            stop = start + len(alike)
            lengths = np.array([header.section_bytes for header in headers[start:stop]], np.int64)
            runs.append(Run(alike[0], start, stop, lengths))
            start = stop
        return runs, [header.effective_fidelity for header in headers[: len(kinds)]], problem

    def _kind(self, header: RecordHeader) -> BlockRecords | Problem:
        """What decodes a record, or why nothing does."""
        if self._exact and header.effective_fidelity < FIDELITY_EXACT:
            return Failure.LOSSY, f"its fidelity is {header.effective_fidelity} and the namespace is exact"
        codec = int(header.codec)
        if codec not in self._known:
            try:
                self._known[codec] = BlockRecords(codec_of_id(codec), self._written.layout)
            except ValueError as error:
                return Failure.CODEC, str(error)
        kind = self._known[codec]
        return kind.problem(header) or kind
