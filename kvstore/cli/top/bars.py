"""The lines at the edges of the screen: header, banner, list of panels, keys. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from textual.content import Content

from kvstore.cli import render
from kvstore.cli.top.frame import Frame
from kvstore.cli.top.text import cut, ends, line, plain, spread

__all__ = ["KEYS", "footer", "header", "heading", "lost_banner", "tabs", "waiting"]

_LEAST_ENDPOINT_CELLS: Final = 16

KEYS: Final = (
    ("q", "quit"),
    ("p", "pause"),
    ("tab", "panel"),
    ("d", "details"),
    ("s", "sort"),
    ("/", "filter"),
    ("e", "policy"),
    ("+/-", "interval"),
    ("t", "theme"),
    ("?", "help"),
)


def header(frame: Frame | None, endpoint: str, *, state: str, interval_s: float, clock: str, width: int) -> Content:
    """Who this is, and on the right whether it lives.

    Args:
        frame: None before the first one.
        endpoint: where the daemon is asked.
        state: "live", "late" (an answer is overdue), "paused" or "lost".
        interval_s: between polls.
        clock: the time of day.
        width: cells.
    """
    mark, style = {"live": ("●", "$good"), "late": ("○", "$warn"), "paused": ("▌▌", "$warn"), "lost": ("✗", "$bad")}[
        state
    ]
    right = line((f"{mark} {state}", f"{style} bold"), (f"  {interval_s:g} s", "$faint"))
    if width >= 100 and frame is not None and state == "live":
        right = right + line((f"  answer {render.latency(frame.took_s)}", "$faint"))
    if width >= 70:
        right = right + line((f"  {clock}", ""))
    name = line((" kvstore ", "$accent bold"))
    if frame is None:
        return ends(name + line((cut(endpoint, max(width - 40, 10), keep="end"), "$faint")), right, width)
    stats = frame.stats
    facts = [
        line((plain(stats.version), "bold")),
        line(("up ", "$faint"), render.duration(stats.uptime_s)),
        line(("policy ", "$faint"), (plain(stats.eviction.policy), "$accent bold")),
        line(("pid ", "$faint"), str(stats.pid)),
    ]
    if width < 120:
        facts.pop()
    room = width - right.cell_length - 2 - name.cell_length
    left = name + spread(facts, room)
    room = width - left.cell_length - right.cell_length - 7
    if room >= _LEAST_ENDPOINT_CELLS:
        left = left + line(("   " + cut(plain(stats.endpoint), room, keep="end"), "$faint"))
    return ends(left, right + Content(" "), width)


def heading(frame: Frame, width: int) -> Content:
    """Who this is, for a frame that is printed."""
    stats = frame.stats
    facts = [
        line(f"kvstore {plain(stats.version)}"),
        line(f"up {render.duration(stats.uptime_s)}"),
        line(f"policy {plain(stats.eviction.policy)}"),
        line(f"pid {stats.pid}"),
        line(plain(stats.endpoint)),
    ]
    return spread(facts, width)


def lost_banner(reason: str, for_s: float, width: int) -> Content:
    """What is said of a daemon that does not answer."""
    text = f" ✗ no answer for {render.duration(max(for_s, 0.0))}, trying again: {plain(reason)}"
    return line((cut(text, width).ljust(width), "bold"))


def tabs(pages: Sequence[Sequence[tuple[int, str, str]]], selected: str, page_of: str, width: int) -> Content:
    """The panels below: those of the page that is shown bright, that which has the focus marked.

    Args:
        pages: number, name and title of each panel, by page.
        selected: name of the panel with the focus.
        page_of: name of a panel of the page that is shown.
        width: cells.
    """
    shown = next((page for page in pages if any(name == page_of for _, name, _ in page)), pages[0])
    made = Content("")
    for form, gap in ((" {number} {title} ", 0), ("{number} {title}", 1), ("{title}", 1)):
        parts = []
        for page in pages:
            for number, name, title in page:
                style = "$accent bold reverse" if name == selected else "$text bold" if page is shown else "$faint"
                parts.append(line((form.format(number=number, title=title), style)))
        made = Content(" ") + Content(" " * gap).join(parts)
        if made.cell_length <= width:
            break
    return made.truncate(width)


def footer(message: str, needle: str, width: int) -> Content:
    """What was just done, if anything; otherwise keys, and the filter."""
    if message:
        return line((f" {cut(message, max(width - 2, 1))} ", "bold reverse"))
    parts = [line((f" {key} ", "$accent bold"), (what, "$faint")) for key, what in KEYS]
    if needle:
        parts.insert(0, line((f" filter: {needle} ", "$warn bold"), ("esc clears", "$faint")))
    help_key = parts.pop()
    return spread([*parts], width - help_key.cell_length - 1, gap=1) + Content(" ") + help_key


def waiting(endpoint: str, reason: str) -> list[Content]:
    """What stands there before a daemon was ever seen."""
    return [
        line(("waiting for the daemon", "bold")),
        line((endpoint, "$faint")),
        Content(""),
        line((reason, "$faint")),
    ]
