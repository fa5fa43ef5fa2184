"""What a daemon recorded, as a trace.

Covers: one file, and a directory of which the newest recording is taken; damage, which costs what is behind it in its
file and no more. A request's blocks are of whole prefixes. Of clients that map, a request whose puts were not seen has
blocks that nobody named: they were misses, and are left out.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Final

from kvstore.errors import CorruptRecord, InvalidArgument
from kvstore.format.lookup_trace import (
    FILE_HEADER_BYTES,
    LookupDecoder,
    LookupFileHeader,
    NamespaceFacts,
    RecordedLookup,
    decode_header,
)
from kvstore.simulator.requests import Request, Trace

__all__ = ["RECORDING", "is_recording", "read_recording"]

RECORDING: Final = "recording"
_SUFFIX: Final = ".lookups"
_NS_PER_MS: Final = 1_000_000
_UNKNOWN_BLOCK_TOKENS: Final = 64
"""Tokens a block where clients did not say."""


def is_recording(path: Path) -> bool:
    """Whether a path is a directory, or a file that begins as a recording does.

    Raises:
        OSError: it cannot be read.
    """
    if path.is_dir():
        return True
    with path.open("rb") as file:
        return file.read(8) == b"KVLOOKUP"


def read_recording(path: Path, limit: int | None = None) -> Trace:
    """The requests of a file, or of all files of the newest recording with requests in a directory.

    Args:
        path: of the file or directory.
        limit: most requests.

    Raises:
        InvalidArgument: there is no recording, or a file's header is damaged.
        OSError: it cannot be read.
    """
    files, notes = _files(path)
    dram_bytes = 0
    decoder = LookupDecoder()
    lookups: list[RecordedLookup] = []
    for file in files:
        data = file.read_bytes()
        try:
            dram_bytes = decode_header(data).dram_bytes
            lookups += decoder.lookups(data)
        except CorruptRecord as why:
            raise InvalidArgument(f"{file}: {why}") from None
        if decoder.damage:
            notes.append(f"{file.name} is read up to where {decoder.damage}")
    lookups = lookups[:limit]
    if not lookups:
        raise InvalidArgument(f"the recording {str(path)!r} holds no requests" + "".join(f"; {note}" for note in notes))
    return replace(_trace(str(path), lookups, decoder.namespaces, notes), dram_bytes=dram_bytes)


def _files(path: Path) -> tuple[list[Path], list[str]]:
    if not path.is_dir():
        return [path], []
    headers: dict[Path, LookupFileHeader] = {}
    for file in sorted(path.glob(f"*{_SUFFIX}")):
        try:
            with file.open("rb") as begin:
                header = decode_header(begin.read(FILE_HEADER_BYTES))
                # One that has just begun is none yet.
                if begin.read(1):
                    headers[file] = header
        except CorruptRecord:
            continue
    if not headers:
        raise InvalidArgument(f"the directory {str(path)!r} holds no recording with requests (*{_SUFFIX})")
    newest = max(headers.values(), key=lambda header: (header.started_unix_ns, header.recording))
    own = [file for file, header in headers.items() if header.recording == newest.recording]
    own.sort(key=lambda file: headers[file].sequence)
    notes = []
    others = len({header.recording for header in headers.values()}) - 1
    if others:
        notes.append(f"the newest of {others + 1} recordings in the directory")
    first = headers[own[0]].sequence
    if first:
        notes.append(f"its first {first} files were removed to stay within its bytes")
    return own, notes


def _trace(
    name: str, lookups: Sequence[RecordedLookup], namespaces: dict[int, NamespaceFacts], notes: list[str]
) -> Trace:
    tokens_of = {number: facts.block_tokens or _UNKNOWN_BLOCK_TOKENS for number, facts in namespaces.items()}
    asked: Counter[int] = Counter()
    for lookup in lookups:
        asked[tokens_of[lookup.namespace]] += len(lookup.blocks)
    block_tokens = max(asked, key=lambda tokens: (asked[tokens], tokens))
    own = {number for number, tokens in tokens_of.items() if tokens == block_tokens}
    kept = [lookup for lookup in lookups if lookup.namespace in own]
    if len(kept) < len(lookups):
        others = ", ".join(str(tokens) for tokens in sorted(asked) if tokens != block_tokens)
        notes.append(
            f"{len(lookups) - len(kept)} requests are left out: their namespaces have blocks of {others} tokens, not "
            f"{block_tokens}"
        )
    if any(not namespaces[number].block_tokens for number in own):
        notes.append(f"clients did not say how many tokens a block has: taken as {_UNKNOWN_BLOCK_TOKENS}")
    unnamed = sum(lookup.asked - len(lookup.blocks) for lookup in kept)
    if unnamed:
        notes.append(f"{unnamed} blocks that were asked for were named by nobody, misses all, and are left out")
    uses = sum(len(lookup.blocks) for lookup in kept)
    hits = sum(min(lookup.hits, len(lookup.blocks)) for lookup in kept)
    if uses:
        notes.append(f"the daemon itself hit {100 * hits / uses:.1f} % of these blocks while it recorded")
    return Trace(
        name,
        RECORDING,
        block_tokens,
        [Request(lookup.time_ms * _NS_PER_MS, len(lookup.blocks) * block_tokens, 0, lookup.blocks) for lookup in kept],
        slot_bytes=_mean_slot_bytes(kept, namespaces),
        codec=_codec([namespaces[number] for number in own]),
        notes=tuple(notes),
    )


def _mean_slot_bytes(lookups: Sequence[RecordedLookup], namespaces: dict[int, NamespaceFacts]) -> int:
    """Of blocks, by how often they were asked for; 0 where it is not known of all."""
    weighted = uses = 0
    for lookup in lookups:
        slot_bytes = namespaces[lookup.namespace].slot_bytes
        if lookup.blocks and not slot_bytes:
            return 0
        weighted += slot_bytes * len(lookup.blocks)
        uses += len(lookup.blocks)
    return weighted // uses if uses else 0


def _codec(namespaces: Sequence[NamespaceFacts]) -> str:
    codecs = {facts.codec for facts in namespaces}
    return codecs.pop() if len(codecs) == 1 else ""
