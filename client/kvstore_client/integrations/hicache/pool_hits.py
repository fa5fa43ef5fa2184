"""Which prefixes of a request the pools of a hybrid model can serve."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from kvstore.errors import InvalidArgument

__all__ = ["PoolHits", "leading", "pool_hits"]


@dataclass(frozen=True, slots=True)
class PoolHits:
    """What a pool has of the first pages of a request.

    Attributes:
        pages: the longest prefix that it serves.
        restorable: all prefixes that it serves, in pages; None where it does not say which may be used.
    """

    pages: int
    restorable: frozenset[int] | None


def leading(present: Sequence[bool]) -> int:
    """How many at the beginning are there."""
    return next((index for index, there in enumerate(present) if not there), len(present))


def pool_hits(
    policy: str,
    kv_pages: int,
    page_keys: Sequence[str],
    pool_keys: Sequence[str] | None,
    exists: Callable[[Sequence[str]], list[bool]],
    *,
    block_pages: int = 0,
    group_pages: int = 0,
) -> PoolHits:
    """What a pool has, by its hit policy.

    Args:
        policy: ``all_pages``: every page of a prefix has to be there; ``trailing_pages``: its last ones;
            ``block_groups``: the pool has ``group_pages`` keys for each ``block_pages`` pages, and says how far its
            leading whole groups reach.
        kv_pages: leading pages that the KV pool has.
        page_keys: of the request's pages.
        pool_keys: SGLang's for the pool: their number is that of the trailing pages, or they are those of the groups.
        exists: which of some keys the pool has.
        block_pages: pages of a block, of ``block_groups``.
        group_pages: keys of a block's group.

    Raises:
        InvalidArgument: another policy, or groups without sizes.
    """
    if policy == "all_pages":
        pages = leading(exists(page_keys[:kv_pages])) if kv_pages else 0
        return PoolHits(pages, frozenset(range(1, pages + 1)))
    if policy == "trailing_pages":
        window = max(len(pool_keys or ()), 1)
        present = exists(page_keys[:kv_pages]) if kv_pages else []
        run, good = 0, []
        for page, there in enumerate(present, 1):
            run = run + 1 if there else 0
            if run >= min(window, page):
                good.append(page)
        return PoolHits(good[-1] if good else 0, frozenset(good))
    if policy == "block_groups":
        if block_pages < 1 or group_pages < 1:
            raise InvalidArgument(
                f"a pool of block groups needs block_pages and group_pages of at least 1, got {block_pages} and "
                f"{group_pages}"
            )
        blocks = min(len(page_keys), kv_pages) // block_pages
        if pool_keys is None:
            keys = [
                key
                for block in range(blocks)
                for key in page_keys[max((block + 1) * block_pages - group_pages, 0) : (block + 1) * block_pages]
            ]
            group = min(group_pages, block_pages)
        else:
            keys, group = list(pool_keys[: blocks * group_pages]), group_pages
        whole = leading(exists(keys)) // group if keys else 0
        return PoolHits(whole * block_pages, None)
    raise InvalidArgument(f"unknown pool hit policy {policy!r}; there are all_pages, trailing_pages, block_groups")
