from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstore.cli.block_bytes import BlockBytes
from kvstore.errors import InvalidArgument
from kvstore.simulator.trace import TRACE_BLOCK_TOKENS, TraceRequest, block_key, parse_trace, read_trace

GOOD = {"timestamp": 5, "input_length": 1100, "output_length": 7, "hash_ids": [3, 4, 5]}


def line(**changes: object) -> bytes:
    return json.dumps({**GOOD, **changes}).encode() + b"\n"


def write(path: Path, lines: Sequence[bytes]) -> Path:
    path.write_bytes(b"".join(lines))
    return path


def test_trace_good_lines_are_read_in_order(tmp_path: Path) -> None:
    path = write(tmp_path / "t.jsonl", [line(), line(timestamp=6, input_length=0, hash_ids=[]), line(chat_id="x")])
    requests = read_trace(path)
    assert requests[0] == TraceRequest(timestamp_ms=5, input_tokens=1100, output_tokens=7, hash_ids=(3, 4, 5))
    assert requests[0].full_blocks == (3, 4)
    assert requests[1].full_blocks == ()
    assert requests[2] == requests[0]


def test_trace_exact_multiple_keeps_its_last_block() -> None:
    (request,) = parse_trace([line(input_length=2 * TRACE_BLOCK_TOKENS, hash_ids=[3, 4])], "t")
    assert request.full_blocks == (3, 4)


def test_trace_limit_reads_no_line_beyond_it(tmp_path: Path) -> None:
    path = write(tmp_path / "t.jsonl", [line(), line(), b"broken\n"])
    assert len(read_trace(path, limit=2)) == 2
    with pytest.raises(InvalidArgument, match=r"t\.jsonl:3: "):
        read_trace(path, limit=3)


@pytest.mark.parametrize(
    ("bad", "what"),
    [
        (b"\n", "the line is empty"),
        (b"{\n", "truncated"),
        (b"[1]\n", "Expected `object`"),
        (line().rstrip() + b" {}\n", "trailing"),
        (b"\xff\xfe\n", "malformed"),
        (line()[:-2].rstrip(b"}") + b', "x": ' + b"[" * 100_000 + b"]" * 100_000 + b"}\n", "recursion"),
        (line(timestamp="5"), r"Expected `int`, got `str` - at `\$.timestamp`"),
        (line(timestamp=1.5), r"Expected `int`, got `float` - at `\$.timestamp`"),
        (line(timestamp=-1), "timestamp must be 0 or more"),
        (line(input_length=True), "Expected `int`, got `bool`"),
        (line(output_length=-3), "output_length must be 0 or more"),
        (line(output_length=1 << 70), r"output_length|out of range"),
        (line(input_length=-512, hash_ids=[]), "input_length must be 0 or more"),
        (line(hash_ids=[3, 4]), "is 3 blocks of 512 tokens, but hash_ids has 2"),
        (line(hash_ids=[3, 4, 5, 6]), "hash_ids has 4"),
        (line(input_length=1), "input_length 1 is 1 block of 512 tokens, but hash_ids has 3"),
        (line(hash_ids=[3, "4", 5]), r"at `\$.hash_ids\[1\]`"),
        (line(hash_ids=[3, -4, 5]), "hash_ids must be 0 or more"),
        (line(hash_ids=[3, 3, 5]), "hash id 3 stands for a whole prefix, but follows id 3 here and nothing earlier"),
        (line(hash_ids=[9, 4, 5]), "hash id 4 stands for a whole prefix, but follows id 9 here and id 3 earlier"),
        (json.dumps({k: v for k, v in GOOD.items() if k != "hash_ids"}).encode(), "missing required field `hash_ids`"),
    ],
)
def test_trace_bad_line_is_named_with_file_and_line(tmp_path: Path, bad: bytes, what: str) -> None:
    path = write(tmp_path / "t.jsonl", [line(), bad, line()])
    with pytest.raises(InvalidArgument, match=what) as raised:
        read_trace(path)
    assert str(raised.value).startswith(f"{path}:2: ")


def test_trace_partial_tail_may_follow_anything() -> None:
    lines = [line(hash_ids=[3, 4, 5]), line(input_length=600, hash_ids=[3, 5])]
    assert [request.full_blocks for request in parse_trace(lines, "t")] == [(3, 4), (3,)]


def test_trace_unreadable_file_says_why(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match=r"cannot read the trace .*none\.jsonl.*No such file"):
        read_trace(tmp_path / "none.jsonl")
    with pytest.raises(InvalidArgument, match="Is a directory"):
        read_trace(tmp_path)


def test_trace_empty_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match="holds no requests"):
        read_trace(write(tmp_path / "t.jsonl", []))


def test_trace_keys_are_distinct_and_fixed() -> None:
    assert len({block_key(hash_id) for hash_id in range(1000)}) == 1000
    assert block_key(0).hex() == "2042f8f8dc1b985f3a0babd890d3b74ac36625477b24cbd768b45d9b64bcc048"
    assert len(block_key((1 << 64) - 1)) == 32


# ------------------------------------------------------------------ bytes that derive from keys

_MASK = (1 << 64) - 1


def slow_bytes(key: bytes, payload_bytes: int) -> bytes:
    """The definition, word by word."""
    made = bytearray()
    for index in range(-(-payload_bytes // 8)):
        at = 8 * (index % 4)
        word = (int.from_bytes(key[at : at + 8], "little") + index * 0x9E3779B97F4A7C15) & _MASK
        word = ((word ^ (word >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        word = ((word ^ (word >> 27)) * 0x94D049BB133111EB) & _MASK
        made += (word ^ (word >> 31)).to_bytes(8, "little")
    return bytes(made[:payload_bytes])


def receive(blocks: BlockBytes, keys: Sequence[bytes]) -> list[memoryview]:
    """Receivers that hold what a correct daemon would put there."""
    receivers = blocks.receivers(len(keys))
    for receiver, key in zip(receivers, keys, strict=True):
        receiver[:] = slow_bytes(key, blocks.payload_bytes)
    return receivers


@given(
    payload_bytes=st.integers(1, 200),
    keys=st.lists(st.binary(min_size=32, max_size=32), min_size=0, max_size=5),
)
def test_block_bytes_derived_match_the_definition(payload_bytes: int, keys: list[bytes]) -> None:
    blocks = BlockBytes(payload_bytes, 5)
    assert [bytes(view) for view in blocks.derive(keys)] == [slow_bytes(key, payload_bytes) for key in keys]


@pytest.mark.parametrize("payload_bytes", [33, 4096, 300 * 1024])
def test_block_bytes_several_passes_agree_with_one_block_alone(payload_bytes: int) -> None:
    keys = [block_key(hash_id) for hash_id in range(150 if payload_bytes < 5000 else 3)]
    together = [bytes(view) for view in BlockBytes(payload_bytes, len(keys)).derive(keys)]
    alone = BlockBytes(payload_bytes, 1)
    assert together == [bytes(alone.derive([key])[0]) for key in keys]
    assert len(set(together)) == len(keys)


def test_block_bytes_payloads_are_read_only() -> None:
    (payload,) = BlockBytes(64, 1).derive([block_key(1)])
    assert payload.readonly
    assert payload.nbytes == 64


def test_block_bytes_right_bytes_count_none() -> None:
    blocks = BlockBytes(100, 4)
    keys = [block_key(hash_id) for hash_id in range(4)]
    receive(blocks, keys)
    assert blocks.wrong_bytes(keys, [100] * 4) == 0


@pytest.mark.parametrize("at", [0, 31, 32, 99])
@pytest.mark.parametrize("block", [0, 3])
def test_block_bytes_one_flipped_bit_counts_one(block: int, at: int) -> None:
    blocks = BlockBytes(100, 4)
    keys = [block_key(hash_id) for hash_id in range(4)]
    receive(blocks, keys)[block][at] ^= 1
    assert blocks.wrong_bytes(keys, [100] * 4) == 1


def test_block_bytes_swapped_blocks_are_wrong() -> None:
    blocks = BlockBytes(4096, 2)
    keys = [block_key(0), block_key(1)]
    receive(blocks, keys)
    assert blocks.wrong_bytes(keys[::-1], [4096] * 2) > 8000


def test_block_bytes_nothing_received_is_wrong_even_after_the_right_bytes() -> None:
    blocks = BlockBytes(4096, 1)
    keys = [block_key(0)]
    receive(blocks, keys)
    blocks.receivers(1)
    assert blocks.wrong_bytes(keys, [4096]) > 4000


def test_block_bytes_other_length_makes_the_whole_block_wrong() -> None:
    blocks = BlockBytes(100, 2)
    keys = [block_key(0), block_key(1)]
    receive(blocks, keys)
    assert blocks.wrong_bytes(keys, [100, 99]) == 100
    assert blocks.wrong_bytes(keys, [100, 300]) == 300


def test_block_bytes_miss_is_not_looked_at() -> None:
    blocks = BlockBytes(100, 2)
    keys = [block_key(0), block_key(1)]
    receive(blocks, keys)[1][0] ^= 1
    assert blocks.wrong_bytes(keys, [100, None]) == 0


def test_block_bytes_more_blocks_than_prepared_are_refused() -> None:
    blocks = BlockBytes(100, 2)
    with pytest.raises(InvalidArgument, match="3 blocks at once, over the 2"):
        blocks.derive([block_key(1)] * 3)
    with pytest.raises(InvalidArgument, match="3 blocks at once"):
        blocks.receivers(3)
    with pytest.raises(InvalidArgument, match="1 keys but 2 lengths"):
        blocks.wrong_bytes([block_key(1)], [1, 2])


@pytest.mark.parametrize(("payload_bytes", "max_blocks"), [(0, 1), (1, 0), (-1, 1)])
def test_block_bytes_impossible_size_is_refused(payload_bytes: int, max_blocks: int) -> None:
    with pytest.raises(InvalidArgument, match="both must be 1 or more"):
        BlockBytes(payload_bytes, max_blocks)
