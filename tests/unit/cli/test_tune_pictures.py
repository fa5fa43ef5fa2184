"""What ``kvstore tune`` draws: in a terminal, with matplotlib, and as a page of its own."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from pathlib import Path

import msgspec
import pytest
from rich.console import Console
from synthetic_trace import synthetic_requests, write_trace

from kvstore.cli.plot_files import check_plot
from kvstore.cli.tune.html import check_html, html_report, write_html
from kvstore.cli.tune.options import Capacity
from kvstore.cli.tune.plot import draw_plot
from kvstore.cli.tune.report import TuneReport
from kvstore.cli.tune.series import groups_of, series_of, short_count
from kvstore.cli.tune.sizes import given_sizes
from kvstore.cli.tune.svg import Chart, Line
from kvstore.cli.tune.terminal_plot import Curve, Plot
from kvstore.cli.tune.tuning import Asked, tuned
from kvstore.errors import InvalidArgument
from kvstore.simulator.trace_files import read_requests


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> TuneReport:
    path = write_trace(tmp_path_factory.mktemp("tune") / "a <trace> & more.jsonl", synthetic_requests(600, seed=2))
    asked = Asked(
        policies=["opt", "clock", "lru"],
        capacities=[Capacity(20), Capacity(100), Capacity(400)],
        codecs=["raw", "kivi4"],
        ssd=[Capacity(), Capacity(200)],
        have=None,
        exact=True,
        prefill_tokens_per_s=8000.0,
        dram_gb_per_s=25.0,
        ssd_gb_per_s=6.0,
        decode_gb_per_s={"kivi4": 9.5},
    )
    return tuned(read_requests(path), given_sizes(1 << 20, ["raw", "kivi4"]), asked)


def printed(plot: Plot, width: int = 80) -> list[str]:
    console = Console(width=width, legacy_windows=False)
    with console.capture() as capture:
        console.print(plot)
    return capture.get().splitlines()


def test_terminal_plot_rises_where_its_curve_does_and_fits() -> None:
    curve = Curve("lru", "cyan", [(10.0, 1.0), (100.0, 20.0), (1000.0, 39.0)])
    lines = printed(Plot("title", [curve], [(10, "10"), (100, "100"), (1000, "1k")]))
    assert lines[0] == "title"
    assert max(map(len, lines)) <= 80
    assert lines[1].lstrip().startswith("40 %")
    body = lines[1:15]
    firsts = [next((at for at, cell in enumerate(line[8:]) if cell > "\u2800"), None) for line in body]
    seen = [at for at in firsts if at is not None]
    assert seen == sorted(seen, reverse=True)
    assert seen[-1] == 0
    assert lines[15].count("┴") == 3
    assert lines[16].split() == ["10", "100", "1k"]
    assert "lru" in lines[17]


def test_terminal_plot_of_one_point_or_of_zero_is_no_trouble() -> None:
    for points in ([(5.0, 0.0)], [(5.0, 100.0)], [(1.0, 0.0), (1e12, 0.0)]):
        assert len(printed(Plot("t", [Curve("a", "red", points)], [(points[0][0], "x")]), width=40)) == 18


def test_terminal_without_braille_gets_letters() -> None:
    console = Console(width=80, legacy_windows=False)
    curves = [Curve("opt", "", [(1.0, 9.0), (9.0, 9.0)]), Curve("lru", "", [(1.0, 1.0), (9.0, 9.0)])]
    options = console.options.copy()
    options.encoding = "ascii"
    text = "".join(segment.text for segment in console.render(Plot("t", curves, [(1.0, "1")]), options))
    assert text.isascii()
    assert "o" in text.splitlines()[2]
    assert "l opt" not in text


def test_series_have_lru_first_the_bound_last_and_the_fine_curve(report: TuneReport) -> None:
    groups = groups_of(report)
    assert list(groups) == [(codec, size) for size in (0, report.rows[-1].ssd_bytes) for codec in ("raw", "kivi4")]
    for (_, ssd_bytes), rows in groups.items():
        series = series_of(report, rows)
        assert [one.policy for one in series] == ["lru", "clock", "opt"]
        assert [one.bound for one in series] == [False, False, True]
        assert len({one.colour for one in series}) == 3
        lru = series[0]
        assert (len(lru.points) > 30) == (not ssd_bytes)
        assert [x for x, _ in lru.points] == sorted(x for x, _ in lru.points)
        assert {(float(row.capacity_bytes), 100 * row.hit_rate) for row in lru.rows} <= set(lru.points)


def test_short_counts() -> None:
    assert [short_count(count) for count in (7, 999, 1000, 17_776, 1_500_000)] == ["7", "999", "1k", "17.8k", "1.5M"]


class Page(HTMLParser):
    """Tags that are open, text, and what is loaded from elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text: list[str] = []
        self.references: list[str] = []
        self.classes: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in ("meta", "br"):
            self.open.append(tag)
        self.references += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href", "action")]
        self.classes.update(*[(value or "").split() for name, value in attrs if name == "class"])

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def test_page_is_whole_and_needs_nothing_from_elsewhere(report: TuneReport) -> None:
    html = html_report(report)
    page = Page()
    page.feed(html)
    page.close()
    assert page.open == []
    assert page.references == []
    assert "<script" not in html
    assert re.findall(r"https?://[^\"' ]+", html.replace("http://www.w3.org/2000/svg", "")) == []
    assert "@import" not in html
    assert "url(" not in html
    assert "prefers-color-scheme: dark" in html
    text = " ".join(page.text)
    assert "a <trace> & more.jsonl" in text
    assert report.recommendation is not None
    for reason in report.recommendation.reasons:
        assert reason in text
    for row in report.rows:
        assert f"{100 * row.hit_rate:.2f}" in text
    style = html[html.index("<style>") : html.index("</style>")]
    assert {name for name in page.classes if name.startswith("p-")} == {"p-lru", "p-clock", "p-opt"}
    for variable in set(re.findall(r"var\((--[\w-]+)\)", html)):
        assert style.count(f"{variable}:") == 2, f"{variable} has no light and dark value"


def test_drawings_of_the_page_are_xml_with_numbers_inside_their_box(report: TuneReport) -> None:
    drawings = re.findall(r"<svg.*?</svg>", html_report(report), re.DOTALL)
    assert len(drawings) == 8
    for drawing in drawings:
        root = ElementTree.fromstring(drawing)
        _, _, width, height = map(float, root.attrib["viewBox"].split())
        for mark in root.iter("{http://www.w3.org/2000/svg}circle"):
            assert 0 <= float(mark.attrib["cx"]) <= width
            assert 0 <= float(mark.attrib["cy"]) <= height
            assert mark[0].text


def test_chart_of_zeros_is_no_trouble() -> None:
    svg = Chart("c", [Line("p-a", [(1.0, 0.0)], [(1.0, 0.0, "x < y")])], [(1.0, "1", "2")], str).svg()
    assert "nan" not in svg
    assert ElementTree.fromstring(svg).attrib["aria-label"] == "c"


def test_pictures_are_written(report: TuneReport, tmp_path: Path) -> None:
    for name, magic in (("a.png", b"\x89PNG"), ("a.svg", b"<?xml"), ("a.pdf", b"%PDF")):
        check_plot(tmp_path / name, "plot")
        draw_plot(report, tmp_path / name)
        assert (tmp_path / name).read_bytes().startswith(magic)
    one = [row for row in report.rows if row.capacity_blocks == report.rows[0].capacity_blocks]
    draw_plot(msgspec.structs.replace(report, rows=one), tmp_path / "one.png")
    check_html(tmp_path / "a.html")
    write_html(report, tmp_path / "a.html")
    assert (tmp_path / "a.html").read_text(encoding="utf-8") == html_report(report)


def test_places_that_will_not_do_are_refused_before_and_after(report: TuneReport, tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match="--plot: the file must end in"):
        check_plot(tmp_path / "a.gif", "plot")
    with pytest.raises(InvalidArgument, match="--plot: there is no directory"):
        check_plot(tmp_path / "none" / "a.png", "plot")
    with pytest.raises(InvalidArgument, match="--html: there is no directory"):
        check_html(tmp_path / "none" / "a.html")
    with pytest.raises(InvalidArgument, match="--html: cannot write"):
        write_html(report, tmp_path)
    (tmp_path / "d.png").mkdir()
    with pytest.raises(InvalidArgument, match="--plot: cannot write"):
        draw_plot(report, tmp_path / "d.png")
