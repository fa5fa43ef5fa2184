"""Traces of several formats behind one reader."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
from collections.abc import Callable
from pathlib import Path

import pytest
from synthetic_trace import synthetic_requests, write_trace

from kvstore.errors import InvalidArgument
from kvstore.simulator.arrivals import full_block_arrivals
from kvstore.simulator.trace import read_trace
from kvstore.simulator.trace_files import read_requests

LINE = {
    "chat_id": 7,
    "parent_chat_id": -1,
    "timestamp": 61.114,
    "input_length": 53,
    "output_length": 132,
    "type": "text",
    "turn": 1,
    "hash_ids": [1089, 1090, 1091, 6326],
}


def bailian(path: Path, *lines: dict[str, object]) -> Path:
    path.write_text("".join(json.dumps({**LINE, **line}) + "\n" for line in lines))
    return path


def test_mooncake_is_read_as_the_simulator_takes_it(tmp_path: Path) -> None:
    requests = synthetic_requests(50)
    trace = read_requests(write_trace(tmp_path / "trace.jsonl", requests))
    assert (trace.format, trace.block_tokens, len(trace.requests)) == ("mooncake", 512, 50)
    assert trace.arrivals == full_block_arrivals(requests)
    assert [request.input_tokens for request in trace.requests] == [request.input_tokens for request in requests]
    assert len(read_requests(tmp_path / "trace.jsonl", limit=7).requests) == 7


def test_bailian_is_recognised_and_its_tail_left_out(tmp_path: Path) -> None:
    path = bailian(tmp_path / "b.jsonl", {}, {"timestamp": 62, "input_length": 64, "hash_ids": [1089, 1090, 1091, 9]})
    trace = read_requests(path)
    assert (trace.format, trace.block_tokens) == ("bailian", 16)
    assert [request.ids for request in trace.requests] == [(0, 1, 2), (0, 1, 2, 3)]
    assert [request.time_ns for request in trace.requests] == [61_114_000_000, 62_000_000_000]
    assert trace.requests[0].output_tokens == 132


def test_bailian_block_is_known_by_what_is_before_it(tmp_path: Path) -> None:
    path = bailian(
        tmp_path / "b.jsonl",
        {"input_length": 48, "hash_ids": [1, 2, 3]},
        {"input_length": 48, "hash_ids": [5, 2, 3]},
        {"input_length": 48, "hash_ids": [1, 2, 2]},
    )
    assert [request.ids for request in read_requests(path).requests] == [(0, 1, 2), (3, 4, 5), (0, 1, 6)]


def test_time_never_goes_back(tmp_path: Path) -> None:
    path = bailian(tmp_path / "b.jsonl", {"timestamp": 5}, {"timestamp": 4}, {"timestamp": 6})
    assert [arrival.time_ns for arrival in read_requests(path).arrivals] == [5 * 10**9, 5 * 10**9, 6 * 10**9]


def test_larger_blocks_are_those_of_several_and_tails_are_left_out(tmp_path: Path) -> None:
    path = bailian(tmp_path / "b.jsonl", {"input_length": 160, "hash_ids": list(range(20, 30))})
    trace = read_requests(path, block_tokens=64)
    assert (trace.block_tokens, trace.requests[0].ids) == (64, (3, 7))
    with pytest.raises(InvalidArgument, match="blocks can be a multiple of that, not 24"):
        read_requests(path, block_tokens=24)
    with pytest.raises(InvalidArgument, match="not 8"):
        read_requests(path, block_tokens=8)


@pytest.mark.parametrize(
    ("line", "what"),
    [
        ({"timestamp": -1}, "timestamp must be seconds"),
        ({"timestamp": 1e300}, "timestamp must be seconds"),
        ({"input_length": -1}, "input_length"),
        ({"input_length": "5"}, "input_length"),
        ({"input_length": 100}, "100 is 6 full blocks of 16 tokens, but hash_ids has 4"),
        ({"input_length": 16}, "16 is 1 full block of 16 tokens, but hash_ids has 4"),
        ({"hash_ids": [1, 2, 3, 4, 5, 6]}, "3 full blocks of 16 tokens, but hash_ids has 6"),
        ({"hash_ids": None}, "hash_ids"),
    ],
)
def test_wrong_line_is_named(tmp_path: Path, line: dict[str, object], what: str) -> None:
    with pytest.raises(InvalidArgument, match=rf"b\.jsonl:2: .*{what}"):
        read_requests(bailian(tmp_path / "b.jsonl", {}, line))


def test_files_that_are_no_traces_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match="No such file"):
        read_requests(tmp_path / "none")
    with pytest.raises(InvalidArgument, match="holds no recording"):
        read_requests(tmp_path)
    (tmp_path / "empty").touch()
    with pytest.raises(InvalidArgument, match="holds no requests"):
        read_requests(tmp_path / "empty")
    (tmp_path / "text").write_bytes(b"# no trace\n")
    with pytest.raises(InvalidArgument, match=r"text:1: "):
        read_requests(tmp_path / "text")
    path = bailian(tmp_path / "b.jsonl", {})
    path.write_text(path.read_text() + "\n")
    with pytest.raises(InvalidArgument, match=r"b\.jsonl:2: the line is empty"):
        read_requests(path)


@pytest.mark.parametrize(
    ("packed", "what"),
    [
        (gzip.compress, r"b\.jsonl' is packed with gzip: unpack it first \(gunzip\)"),
        (bz2.compress, "packed with bzip2"),
        (lzma.compress, "packed with xz"),
        (lambda content: content.decode().encode("utf-16"), "is text in UTF-16"),
        (
            lambda content: b"\x00\x01" + content,
            r"is no text: a trace is lines of JSON in UTF-8, or what",
        ),
        (lambda content: b"\x93" + content, "is no text"),
    ],
)
def test_packed_and_binary_files_are_told_by_their_beginning(
    tmp_path: Path, packed: Callable[[bytes], bytes], what: str
) -> None:
    path = bailian(tmp_path / "b.jsonl", {})
    path.write_bytes(packed(path.read_bytes()))
    for read in (read_requests, read_trace):
        with pytest.raises(InvalidArgument, match=what):
            read(path)


def test_byte_order_mark_of_utf_8_is_passed_over(tmp_path: Path) -> None:
    path = bailian(tmp_path / "b.jsonl", {}, {})
    whole = read_requests(path)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    marked = read_requests(path)
    assert (marked.format, marked.requests) == ("bailian", whole.requests)
