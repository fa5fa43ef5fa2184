from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstore.errors import InvalidArgument
from kvstore_client.integrations.hicache.pool_hits import leading, pool_hits

presence = st.lists(st.booleans(), max_size=9)


class Pool:
    """Pages that are there, and how often somebody asked."""

    def __init__(self, present: Sequence[bool]) -> None:
        self.names = [f"page {at}" for at in range(len(present))]
        self.there = {name for name, there in zip(self.names, present, strict=True) if there}
        self.asked = 0

    def exists(self, names: Sequence[str]) -> list[bool]:
        self.asked += 1
        return [name in self.there for name in names]


def test_leading_counts_up_to_the_first_that_is_not_there() -> None:
    assert [leading(given) for given in ([], [True], [False, True], [True, True, False, True])] == [0, 1, 0, 2]


@given(presence, st.integers(0, 9))
def test_all_pages_serves_every_prefix_without_a_gap(present: list[bool], most: int) -> None:
    pool, kv_pages = Pool(present), min(most, len(present))
    found = pool_hits("all_pages", kv_pages, pool.names, None, pool.exists)
    good = {pages for pages in range(1, kv_pages + 1) if all(present[:pages])}
    assert found.restorable == good
    assert found.pages == max(good, default=0)
    assert pool.asked <= 1


@given(presence, st.integers(0, 9), st.integers(0, 4))
def test_trailing_pages_serves_prefixes_whose_last_pages_are_there(present: list[bool], most: int, window: int) -> None:
    pool, kv_pages = Pool(present), min(most, len(present))
    found = pool_hits("trailing_pages", kv_pages, pool.names, ["key"] * window, pool.exists)
    good = {pages for pages in range(1, kv_pages + 1) if all(present[max(0, pages - max(window, 1)) : pages])}
    assert found.restorable == good
    assert found.pages == max(good, default=0)
    assert pool.asked <= 1


@given(st.lists(st.booleans(), min_size=12, max_size=12), st.integers(0, 12), st.integers(1, 4), st.integers(1, 3))
def test_block_groups_reach_as_far_as_their_leading_whole_groups(
    present: list[bool], kv_pages: int, block_pages: int, group_pages: int
) -> None:
    groups = Pool(present)
    pages = [f"kv {at}" for at in range(12)]
    found = pool_hits(
        "block_groups",
        kv_pages,
        pages,
        groups.names,
        groups.exists,
        block_pages=block_pages,
        group_pages=group_pages,
    )
    blocks = 0
    while (blocks + 1) * block_pages <= kv_pages:
        group = present[blocks * group_pages : (blocks + 1) * group_pages]
        if len(group) < group_pages or not all(group):
            break
        blocks += 1
    assert (found.pages, found.restorable) == (blocks * block_pages, None)


def test_block_groups_without_keys_are_the_last_pages_of_each_block() -> None:
    pool = Pool([False, True, True, False, True, True, False, False, True])
    found = pool_hits("block_groups", 9, pool.names, None, pool.exists, block_pages=3, group_pages=2)
    assert found.pages == 6


def test_a_policy_that_is_unknown_or_lacks_sizes_is_refused() -> None:
    for policy in ("block_groups", "some_pages"):
        with pytest.raises(InvalidArgument, match="block"):
            pool_hits(policy, 1, ["a"], None, lambda names: [True])
