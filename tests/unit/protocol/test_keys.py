from __future__ import annotations

import array
import hashlib
import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstore.errors import InvalidArgument
from kvstore.protocol.keys import (
    KEY_BYTES,
    ROOT_KEY,
    chain_keys,
    check_key,
    check_parent,
    join_keys,
    split_keys,
    token_bytes,
)

TOKENS = st.lists(st.integers(0, 2**32 - 1), max_size=200)
KEYS = st.binary(min_size=KEY_BYTES, max_size=KEY_BYTES).filter(any)


def model(tokens: list[int], block_tokens: int, parent: bytes, salt: bytes) -> list[bytes]:
    """The definition of a key, word by word."""
    keys = []
    for first in range(0, len(tokens) // block_tokens * block_tokens, block_tokens):
        block = tokens[first : first + block_tokens]
        extra = salt if parent == bytes(32) else b""
        parent = hashlib.sha256(parent + struct.pack(f"<{len(block)}I", *block) + extra).digest()
        keys.append(parent)
    return keys


@given(TOKENS, st.integers(1, 40), st.none() | KEYS, st.binary(max_size=20))
def test_chain_keys_any_tokens_match_plain_hashlib(tokens, block_tokens, parent, salt):
    keys = chain_keys(tokens, block_tokens, parent=parent, salt=salt)
    assert keys == model(tokens, block_tokens, parent or bytes(32), salt)
    assert len(keys) == len(tokens) // block_tokens


@given(TOKENS, st.integers(1, 16), st.integers(0, 12), st.binary(max_size=8))
def test_chain_keys_continued_from_parent_equals_one_chain(tokens, block_tokens, cut, salt):
    whole = chain_keys(tokens, block_tokens, salt=salt)
    at = min(cut, len(whole))
    head = chain_keys(tokens[: at * block_tokens], block_tokens, salt=salt)
    tail = chain_keys(tokens[at * block_tokens :], block_tokens, parent=head[-1] if head else None, salt=salt)
    assert head + tail == whole


@given(TOKENS, TOKENS, st.integers(1, 8))
def test_chain_keys_common_prefix_has_common_keys_and_no_others(one, two, block_tokens):
    first, second = chain_keys(one, block_tokens), chain_keys(two, block_tokens)
    for index, (left, right) in enumerate(zip(first, second, strict=False)):
        end = (index + 1) * block_tokens
        assert (left == right) == (one[:end] == two[:end])


def test_chain_keys_salt_enters_block_zero_only():
    tokens = list(range(8))
    plain, salted = chain_keys(tokens, 4), chain_keys(tokens, 4, salt=b"tenant")
    block0 = hashlib.sha256(bytes(32) + struct.pack("<4I", 0, 1, 2, 3) + b"tenant").digest()
    block1 = hashlib.sha256(block0 + struct.pack("<4I", 4, 5, 6, 7)).digest()
    assert salted == [block0, block1]
    assert plain[0] != salted[0]
    assert plain[1] != salted[1]


@pytest.mark.parametrize("root", [None, ROOT_KEY, bytearray(32), memoryview(bytes(32))])
def test_chain_keys_root_parent_in_any_form_is_a_first_block(root):
    assert chain_keys([1, 2], 2, parent=root, salt=b"s") == chain_keys([1, 2], 2, salt=b"s")


def test_chain_keys_released_values_never_change():
    """The values that clients of the first version computed: a change would make every stored block a miss."""
    keys = chain_keys(range(8), 4, salt=b"golden")
    assert [key.hex() for key in keys] == [
        "4c913196d04551661e6f26612c4d27f987cb24acd2d55fe2d3d16f47d2033096",
        "dc08597c6f667a1e8b4f44e1f25986d747b36c6c7bb9161abed9af5a476dfa56",
    ]


@given(st.lists(st.integers(0, 2**31 - 1), max_size=60), st.integers(1, 7))
def test_chain_keys_all_kinds_of_token_inputs_agree(tokens, block_tokens):
    expected = chain_keys(tokens, block_tokens)
    assert chain_keys(tuple(tokens), block_tokens) == expected
    assert chain_keys(iter(tokens), block_tokens) == expected
    assert chain_keys(array.array("q", tokens), block_tokens) == expected
    for dtype in ("<i4", ">i4", "<u4", "<i8", ">u8"):
        assert chain_keys(np.array(tokens, dtype=dtype), block_tokens) == expected
    strided = np.array([[token, 7] for token in tokens], dtype=np.int64).reshape(-1, 2)[:, 0]
    assert chain_keys(strided, block_tokens) == expected


def test_chain_keys_torch_tensors_agree_with_lists():
    torch = pytest.importorskip("torch")
    tokens = [0, 5, 2**31 - 1, 17]
    for dtype in (torch.int32, torch.int64):
        assert chain_keys(torch.tensor(tokens, dtype=dtype), 2) == chain_keys(tokens, 2)
    assert chain_keys(torch.arange(12).reshape(6, 2)[:, 0], 3) == chain_keys([0, 2, 4, 6, 8, 10], 3)
    for bad in (torch.zeros(4), torch.zeros(4, dtype=torch.bfloat16), torch.zeros(4, requires_grad=True)):
        with pytest.raises(InvalidArgument, match="tokens must be integers"):
            chain_keys(bad, 2)


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ([-1], "integers in"),
        ([2**32], "integers in"),
        ([1.0], "integers in"),
        (["1"], "integers in"),
        ([None], "integers in"),
        ([[1, 2], [3, 4]], "integers in"),
        (None, "integers in"),
        (7, "integers in"),
        ("abcd", "integers in"),
        (b"\1\0\0\0", "got bytes; view packed tokens with numpy.frombuffer"),
        (bytearray(4), "got bytearray"),
        (np.array([-1]), "must lie in"),
        (np.array([2**32]), "must lie in"),
        (np.array([2**64 - 1], dtype=np.uint64), "must lie in"),
        (np.array([1.0]), "got dtype float64"),
        (np.array([True]), "got dtype bool"),
        (np.array([1], dtype=object), "got dtype object"),
        (np.zeros((2, 2), dtype=np.int64), r"one dimension, got shape \(2, 2\)"),
        (np.int64(3), r"one dimension, got shape \(\)"),
    ],
)
def test_chain_keys_bad_tokens_refused_with_reason(tokens, message):
    with pytest.raises(InvalidArgument, match=message):
        chain_keys(tokens, 1)


@pytest.mark.parametrize("block_tokens", [0, -1, 1.0, "16", None, True])
def test_chain_keys_bad_block_tokens_refused(block_tokens):
    with pytest.raises(InvalidArgument, match="block_tokens must be a whole number of at least 1"):
        chain_keys([1], block_tokens)


@pytest.mark.parametrize("salt", ["text", None, 5])
def test_chain_keys_bad_salt_refused(salt):
    with pytest.raises(InvalidArgument, match="salt must be bytes"):
        chain_keys([1], 1, salt=salt)


@pytest.mark.parametrize("empty", [[], (), np.array([], dtype=np.int64), np.array([])])
def test_token_bytes_nothing_is_nothing(empty):
    assert token_bytes(empty) == b""


@pytest.mark.parametrize("length", [0, 1, 31, 33, 64])
def test_check_key_wrong_length_names_it(length):
    with pytest.raises(InvalidArgument, match=f"key must be 32 bytes, got {length}"):
        check_key(b"x" * length)


@pytest.mark.parametrize("key", [None, 5, "x" * 32, [0] * 32, np.ones(32, np.uint8)])
def test_check_key_not_bytes_names_the_type(key):
    with pytest.raises(InvalidArgument, match=f"key must be 32 bytes, got {type(key).__name__}"):
        check_key(key)


def test_check_key_root_refused_as_key_and_accepted_as_parent():
    with pytest.raises(InvalidArgument, match="all-zero root"):
        check_key(ROOT_KEY)
    assert check_parent(None) == check_parent(ROOT_KEY) == ROOT_KEY
    with pytest.raises(InvalidArgument, match="parent must be 32 bytes, got 5"):
        check_parent(b"short")


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
def test_check_key_bytes_like_returns_bytes(kind):
    key = check_key(kind(b"k" * 32))
    assert type(key) is bytes
    assert key == b"k" * 32


@given(st.lists(KEYS, max_size=20), st.sampled_from([bytes, bytearray, memoryview]))
def test_join_keys_split_again_gives_the_same(keys, kind):
    assert split_keys(join_keys([kind(key) for key in keys])) == keys
    assert join_keys(iter(keys)) == b"".join(keys)


@pytest.mark.parametrize("keys", [b"k" * 32, bytearray(32), memoryview(b"k" * 32), "k" * 32, 5, None])
def test_join_keys_no_sequence_of_keys_refused(keys):
    with pytest.raises(InvalidArgument, match="must be a sequence of 32-byte keys"):
        join_keys(keys)


@pytest.mark.parametrize("bad", [b"short", ROOT_KEY, "k" * 32, None, 7])
def test_join_keys_bad_key_named_by_index(bad):
    with pytest.raises(InvalidArgument, match=r"^keys\[1\]"):
        join_keys([b"a" * 32, bad])


@pytest.mark.parametrize("length", [1, 31, 33])
def test_split_keys_ragged_length_refused(length):
    with pytest.raises(InvalidArgument, match="not a multiple of 32"):
        split_keys(bytes(length))
