"""What ``kvstore top`` draws with: bars, charts, tables, and places for panels."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstore.cli.top.arrangement import Need, arrange
from kvstore.cli.top.charts import Segment, bar, columns, nice_bucket_s, segment_cells, slim, sparkline, stacked
from kvstore.cli.top.frame import Order
from kvstore.cli.top.table import MOST_ROWS, Column, Table
from kvstore.cli.top.text import cut, plain

ABOVE = {"hits": Need("hits", 5, 22), "traffic": Need("traffic", 5, 9), "tiers": Need("tiers", 2, 4)}
DECK = [
    Need(f"panel-{number}", least, wanted) for number, (least, wanted) in enumerate([(3, 8), (4, 30), (5, 12), (3, 3)])
]


def test_bar_shows_what_is_there_and_is_full_only_when_full() -> None:
    assert bar([Segment(0.001, "a", "$x"), Segment(0.998, "b", "$y")], 10).plain == "abbbbbbbb░"
    assert bar([Segment(0.5, "a", "$x"), Segment(0.5, "b", "$y")], 10).plain == "aaaaabbbbb"
    assert bar([], 4).plain == "░░░░"
    assert bar([Segment(math.nan, "a", "$x")], 4).plain == "░░░░"


@given(st.lists(st.floats(0, 1), max_size=6), st.integers(6, 60))
def test_segment_cells_never_exceed_the_bar(shares: list[float], width: int) -> None:
    whole = sum(shares)
    scaled = [share / whole if whole > 1 else share for share in shares]
    cells = segment_cells(scaled, width)
    assert sum(cells) <= width
    assert all(count > 0 for count, share in zip(cells, scaled, strict=True) if share > 0)


def test_slim_bar_has_half_cells() -> None:
    assert slim(0.25, 10, "$x").plain == "━━╸───────"
    assert slim(0.0001, 4, "$x").plain == "╸───"
    assert slim(0.9999, 4, "$x").plain == "━━━╸"
    assert slim(1.0, 4, "$x").plain == "━━━━"


def test_sparkline_shows_the_smallest_value_and_leaves_unknown_blank() -> None:
    assert sparkline([None, 0.0, 1e-9, 7.0], style="$x").plain == "  ▁▇"
    assert sparkline([0.0, 0.0], style="$x").plain == "  "


def test_columns_of_two_rows_stand_on_each_other() -> None:
    assert [one.plain for one in columns([1.0, 0.5, 0.75], 2, style="$x")] == ["█ ▄", "███"]


def test_stacked_chart_tells_nothing_asked_from_nothing_known() -> None:
    lines = stacked([0.5, math.nan, None], [0.5, math.nan, None], 2, lower_style="$a", upper_style="$b")
    assert [one.plain for one in lines] == ["█  ", "█· "]


def test_stacked_cell_of_both_has_both_colours() -> None:
    (made,) = stacked([0.5], [0.5], 1, lower_style="$a", upper_style="$b")
    assert made.plain == "▄"
    assert [str(span.style) for span in made.spans] == ["$a on $b"]


def test_buckets_are_no_shorter_than_the_interval() -> None:
    assert nice_bucket_s(40, 120, 1.0) == 3.0
    assert nice_bucket_s(40, 120, 10.0) == 10.0
    assert nice_bucket_s(0, 120, 1.0) >= 1.0


# ------------------------------------------------------------------ tables

ROWS = [("long name of something", 5), ("b", 100), ("c", 7)]
TABLE: Table[tuple[str, int]] = Table(
    [
        Column("name", lambda one: one[0], lambda one: one[0], left=True, ascending=True),
        Column("value", lambda one: str(one[1]), lambda one: one[1]),
        Column("more", lambda one: "x" * 10, rank=1),
    ],
    Order("value"),
)


def test_table_is_sorted_largest_first_and_says_by_what() -> None:
    lines = [one.plain for one in TABLE.lines(ROWS, 60, None)]
    assert lines[0].split() == ["name", "▼value", "more"]
    assert [line.split()[0] for line in lines[1:]] == ["b", "c", "long"]


def test_table_reversed_or_by_another_column_follows() -> None:
    assert [one[1] for one in TABLE.sorted(ROWS, Order("value", reverse=True))] == [5, 7, 100]
    assert [one[0][0] for one in TABLE.sorted(ROWS, Order("name"))] == ["b", "c", "l"]
    assert TABLE.sortable == ["name", "value"]


def test_table_without_room_drops_columns_then_cuts_names() -> None:
    assert "more" not in TABLE.lines(ROWS, 32, None)[0].plain
    for width in range(1, 70):
        assert all(one.cell_length <= width for one in TABLE.lines(ROWS, width, None))
    assert "long name of some…" in TABLE.lines(ROWS, 26, None)[-1].plain


def test_table_of_very_many_rows_draws_the_first_and_says_so() -> None:
    lines = TABLE.lines([("name", number) for number in range(MOST_ROWS + 50)], 60, None)
    assert len(lines) == 1 + MOST_ROWS + 1
    assert lines[1].plain.split()[1] == str(MOST_ROWS + 49)
    assert lines[-1].plain == "50 more; / filters"


def test_text_from_elsewhere_loses_what_terminals_act_on() -> None:
    assert plain("a\x1b[31mb\n") == "a?[31mb?"
    assert cut("/very/long/path", 6, keep="end") == "…/path"
    assert cut("abcdef", 4) == "abc…"


# ------------------------------------------------------------------ places


@pytest.mark.parametrize("width", [40, 60, 80, 100, 120, 170, 200, 400])
@pytest.mark.parametrize("height", [6, 10, 17, 22, 38, 58, 120])
def test_arrangement_covers_the_screen_without_overlap(width: int, height: int) -> None:
    for name in ("", *(need.name for need in DECK)):
        made = arrange(width, height, above=ABOVE, deck=DECK, page_of=name)
        cells = {(width_at, made.tabs_y) for width_at in range(width)} if made.tabs_y is not None else set()
        for box in made.boxes.values():
            own = set(itertools.product(range(box.x, box.x + box.width), range(box.y, box.y + box.height)))
            assert not own & cells, "two panels overlap"
            cells |= own
        assert len(cells) == width * height
        assert all(0 <= x < width and 0 <= y < height for x, y in cells)
        if height >= 22 and width >= 80:
            assert name in made.boxes or not name


def test_arrangement_of_a_large_screen_shows_everything_on_one_page() -> None:
    made = arrange(200, 58, above=ABOVE, deck=DECK, page_of="")
    assert made.tabs_y is None
    assert set(made.boxes) == {*ABOVE, *(need.name for need in DECK)}


def test_arrangement_of_a_small_screen_has_pages() -> None:
    made = arrange(80, 22, above=ABOVE, deck=DECK, page_of="panel-2")
    assert made.tabs_y is not None
    assert "panel-2" in made.boxes
    assert "panel-0" not in made.boxes
    assert [name for page in made.pages for name in page] == [need.name for need in DECK]


def test_arrangement_zoomed_is_one_panel() -> None:
    made = arrange(80, 22, above=ABOVE, deck=DECK, page_of="panel-2", zoomed="hits")
    assert made.boxes == {"hits": (0, 0, 80, 22)}
