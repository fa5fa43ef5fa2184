"""Which pairs there are, for which namespaces, how headers are marked, and what importing them loads."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from doc_tables import tables

from kvstore.errors import InvalidArgument
from kvstore.format.constants import CODECS_BY_NAME, EXACT_CODECS, CodecId
from kvstore.format.record import decode_header, encode_header, record_header
from kvstore.protocol.namespace import Namespace
from kvstore.transcode.pairs import PAIRS, VALUE_BYTES, mark_of, pair_of, restored_bytes
from kvstore_kernels.codecs import CODECS

ROOT = Path(__file__).parents[3]
EXACT = sorted(codec.text for codec in EXACT_CODECS)


def test_pairs_are_exact_and_named_by_their_codecs() -> None:
    for name, pair in PAIRS.items():
        assert name == pair.name == f"{pair.source.text}>{pair.target.text}"
        assert {pair.source, pair.target} <= EXACT_CODECS
        assert pair_of(name) is pair


@pytest.mark.parametrize("name", ["", "raw", "raw>kivi4", "kivi4>lossless", "lossless>raw"])
def test_unknown_pair_is_refused_with_those_there_are(name: str) -> None:
    with pytest.raises(InvalidArgument, match=f"{name!r} to transcode; there are {', '.join(PAIRS)}$"):
        pair_of(name)


@pytest.mark.parametrize("codec", CODECS_BY_NAME)
@pytest.mark.parametrize("fidelity", ["any", "exact"])
def test_pair_applies_where_source_is_and_readers_get_only_what_the_namespace_allows(codec: str, fidelity: str) -> None:
    if fidelity == "exact" and codec not in EXACT:
        return
    namespace = Namespace(codec=codec, fidelity=fidelity)
    applied = {name for name, pair in PAIRS.items() if pair.applies_to(namespace)}
    # A namespace of raw has nothing else; any other may have all that is exact.
    assert applied == ({"raw>lossless", "raw>lossless-zstd"} if codec == "raw" else set(PAIRS))
    for name in applied:
        seen = PAIRS[name].source if PAIRS[name].restored else PAIRS[name].target
        assert seen in namespace.codecs


def test_marks_are_no_codecs_parameters_and_differ() -> None:
    marks = [pair.parameters(width) for pair in PAIRS.values() for width in VALUE_BYTES]
    assert len({*marks, *(codec.digest for codec in CODECS.values())}) == len(marks) + len(CODECS)
    assert {len(mark) for mark in marks} == {16}


def header_bytes_of(codec: CodecId, parameters: bytes) -> bytes:
    return encode_header(
        record_header(
            key=b"k" * 32, parent_key=bytes(32), namespace_digest=bytes(32), part=0, codec=codec,
            codec_parameters=parameters, fidelity=255, dtype="float16", shape=(50, 100), section_bytes=(6_000,),
            payload_checksum=0,
        )
    )  # fmt: skip


def test_mark_counts_only_with_the_codec_of_its_pair() -> None:
    pair = pair_of("raw>lossless")
    marked = decode_header(header_bytes_of(CodecId.LOSSLESS, pair.parameters(2)))
    assert mark_of(marked) == (pair, 2)
    assert restored_bytes(marked) == 256 + 50 * 100 * 2
    for codec, parameters in (
        (CodecId.LOSSLESS_ZSTD, pair.parameters(2)),
        (CodecId.LOSSLESS, CODECS["lossless"].digest),
        (CodecId.LOSSLESS_ZSTD, pair_of("lossless>lossless-zstd").parameters(2)),
    ):
        header = decode_header(header_bytes_of(codec, parameters))
        assert mark_of(header) is None
        assert restored_bytes(header) == 6_256


def test_page_lists_the_pairs_and_their_digests() -> None:
    pages = {table.columns[0]: table for table in tables("transcoding.md")}
    assert pages["pair"].column("pair") == list(PAIRS)
    assert pages["pair"].column("restored") == ["yes" if pair.restored else "no" for pair in PAIRS.values()]
    rows = [(row["mark"].strip("`"), int(row["bytes a value"]), row["digest"]) for row in pages["mark"].rows]
    assert rows == [
        (name, width, pair.parameters(width).hex())
        for name, pair in PAIRS.items()
        if pair.restored
        for width in VALUE_BYTES
    ]


def loaded_after(statement: str) -> set[str]:
    done = subprocess.run(
        [sys.executable, "-c", f"import json, sys\n{statement}\nprint(json.dumps(sorted(sys.modules)))"],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(str(ROOT / folder) for folder in (".", "kernels", "client"))},
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    return set(json.loads(done.stdout))


HEAVY = {"torch", "lz4", "zstandard", "kvstore_kernels.codecs", "kvstore_kernels.cpu", "kvstore.transcode.records"}


def test_daemon_loads_no_codec_and_no_compressor() -> None:
    """The server compiles what it maps, by numba; what transcodes is loaded where a pair is configured."""
    assert not HEAVY & loaded_after("import kvstore.server.app, kvstore.settings, kvstore.transcode.pairs")
    assert "numba" not in loaded_after("import kvstore.settings, kvstore.transcode.pairs")
    assert loaded_after("import kvstore.transcode.records") >= HEAVY - {"torch", "lz4"}
    assert "torch" not in loaded_after("import kvstore.transcode.records")
