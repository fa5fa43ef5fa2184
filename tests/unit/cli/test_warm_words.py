"""Why a warm-up had no room: what is said of the budget, and of what may leave."""

from __future__ import annotations

import pytest

from kvstore.cli.warm import no_room_words
from kvstore_client import WarmResult

FREE = "without free room, and nothing leaves for a list (see --evict)"
HALF = "without room though others may leave: one request fills half of memory at most, and what is in use stays"


@pytest.mark.parametrize(
    ("brought", "budget_bytes", "evict", "words"),
    [
        (0, 0, False, FREE),
        (5, 0, False, FREE),
        (5, 0, True, HALF),
        # The next block would not fit.
        (1, 100 << 10, True, "beyond the budget (--budget 100.0 KiB)"),
        (1, 100 << 10, False, "beyond the budget (--budget 100.0 KiB)"),
        (2, 120 << 10, True, "beyond the budget (--budget 120.0 KiB)"),
        # It would, if it is as large as the others: then it was the room.
        (1, 120 << 10, False, f"larger than what the budget leaves (60.0 KiB), or {FREE}"),
        (0, 10 << 10, True, f"larger than what the budget leaves (10.0 KiB), or {HALF}"),
    ],
)
def test_no_room_is_told_with_its_reason(brought: int, budget_bytes: int, evict: bool, words: str) -> None:
    result = WarmResult(brought=brought, brought_bytes=brought * (60 << 10), no_room=7)
    assert no_room_words(result, budget_bytes, evict=evict) == words
