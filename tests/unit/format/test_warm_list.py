from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvstore.errors import InvalidArgument
from kvstore.format.warm_list import WarmChain, parse_warm_list, render_warm_list

KEYS = st.binary(min_size=32, max_size=32).filter(any)
CHAINS = st.lists(st.tuples(st.sampled_from([b"\1" * 32, b"\2" * 32]), st.lists(KEYS, min_size=1, max_size=4)))


@settings(max_examples=50)
@given(CHAINS)
def test_warm_list_that_was_written_is_read_as_it_was(chains: list[tuple[bytes, list[bytes]]]) -> None:
    lines = "".join(render_warm_list((digest, "a  name\nof two lines", keys) for digest, keys in chains))
    assert list(parse_warm_list(lines.splitlines(), "list")) == [WarmChain(*chain) for chain in chains]


def test_warm_list_without_namespaces_comments_and_empty_lines() -> None:
    key = "ab" * 32
    lines = ["# by hand", "", f"  {key} {key[::-1]}  ", f"namespace {'cd' * 4} chat", key.upper()]
    assert list(parse_warm_list(lines, "list")) == [
        WarmChain(b"", [b"\xab" * 32, b"\xba" * 32]),
        WarmChain(b"\xcd" * 4, [b"\xab" * 32]),
    ]


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("abc", "'abc' is no block key"),
        ("1 2 3", "token ids need --block-tokens"),
        ("00" * 32, "is no block key"),
        ("namespace", "needs 8 to 64 hexadecimal digits of its digest, got ''"),
        ("namespace ab chat", "got 'ab'"),
        (f"{'ab' * 32} x", "'x' is no block key"),
    ],
)
def test_warm_list_with_a_bad_line_names_it(line: str, why: str) -> None:
    with pytest.raises(InvalidArgument, match=r"file line 2: .*") as caught:
        list(parse_warm_list(["# first", line], "file"))
    assert why in str(caught.value)
