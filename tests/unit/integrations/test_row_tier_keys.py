from __future__ import annotations

import random
from hashlib import sha256

from hypothesis import given
from hypothesis import strategies as st

from kvstore_client.integrations.row_tier.keys import Chain, Positions, block_key, chains, group_of

TOKENS = {0: 16, 1: 32}


def key_of(number: int, group: int = 0, size: int = 32) -> bytes:
    return sha256(number.to_bytes(8, "big")).digest()[:size] + group.to_bytes(4, "big")


def test_block_key_of_a_plain_hash_is_the_hash() -> None:
    assert block_key(key_of(1)) == key_of(1)[:32]
    assert group_of(key_of(1, 258)) == 258


def test_block_key_differs_by_group_and_takes_other_hashes() -> None:
    hashes = [block_key(key_of(1, group)) for group in range(3)] + [
        block_key(key_of(1, group, size)) for group in range(3) for size in (8, 16)
    ]
    assert len(set(hashes)) == len(hashes)
    assert {len(each) for each in hashes} == {32}


def test_chains_of_a_set_are_in_the_prompts_order() -> None:
    keys = [key_of(number) for number in range(6)]
    ends = {key: 16 * (number + 1) for number, key in enumerate(keys)}
    order = [4, 1, 5, 2]
    found = chains([keys[at] for at in order], order, ends.get, TOKENS, lambda group, end: keys[end // 16 - 1])
    assert found == [
        Chain(keys[0][:32], [keys[at][:32] for at in (1, 2)], [1, 2], [keys[1], keys[2]]),
        Chain(keys[3][:32], [keys[at][:32] for at in (4, 5)], [4, 5], [keys[4], keys[5]]),
    ]


def test_chain_without_a_known_position_stands_alone() -> None:
    keys = [key_of(number) for number in range(2)]
    found = chains(keys, [7, 8], lambda key: None, TOKENS, lambda group, end: None)
    assert found == [Chain(None, [key[:32]], [row], [key]) for key, row in zip(keys, [7, 8], strict=True)]


def test_chain_of_a_first_block_has_no_parent_and_one_unknown_neither() -> None:
    key = key_of(0)
    for end in (16, 320):
        (chain,) = chains([key], [0], lambda _, end=end: end, TOKENS, lambda group, end: None)  # type: ignore[misc]
        assert chain.parent is None


@given(st.sets(st.tuples(st.integers(0, 1), st.integers(1, 12)), min_size=1), st.randoms())
def test_chains_hold_every_block_once_behind_its_own_parent(blocks: set[tuple[int, int]], rng: random.Random) -> None:
    names = {(group, place): key_of(100 * group + place, group) for group in (0, 1) for place in range(1, 13)}
    end_of = {key: place * TOKENS[group] for (group, place), key in names.items()}
    positions = Positions()
    positions.note_all(end_of)
    wanted = [names[block] for block in blocks]
    rng.shuffle(wanted)
    rows = list(range(len(wanted)))
    found = chains(wanted, rows, end_of.get, TOKENS, positions.at)
    assert sorted(key for chain in found for key in chain.offload_keys) == sorted(wanted)
    of_row = dict(zip(wanted, rows, strict=True))
    place_of = {key: place for place, key in names.items()}
    for chain in found:
        assert [of_row[key] for key in chain.offload_keys] == chain.rows
        assert [block_key(key) for key in chain.offload_keys] == chain.keys
        parent = chain.parent
        for key in chain.offload_keys:
            group, place = place_of[key]
            before = names.get((group, place - 1))
            assert parent == (None if before is None else block_key(before))
            parent = block_key(key)


def test_positions_say_what_ends_where() -> None:
    positions = Positions()
    positions.note(key_of(1), 16)
    positions.note(key_of(2), None)
    positions.note(key_of(3, 1), 16)
    assert positions.at(0, 16) == key_of(1)
    assert positions.at(1, 16) == key_of(3, 1)
    assert positions.at(0, 32) is None
