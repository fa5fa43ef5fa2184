"""Clients: who is connected, how much each asks, and what it holds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, NamedTuple

from textual.content import Content

from kvstore.cli import render
from kvstore.cli.top.frame import Frame, Order
from kvstore.cli.top.panel import Panel
from kvstore.cli.top.table import Column, Table, matching
from kvstore.cli.top.text import plain
from kvstore.protocol.statistics import SessionStats

__all__ = ["CLIENTS"]


class _Client(NamedTuple):
    session: SessionStats
    requests_per_s: float | None


def _rate(one: _Client) -> str | Content:
    if one.requests_per_s is None:
        return render.NOTHING
    return Content.styled(render.rate(one.requests_per_s, 1.0), "bold" if one.requests_per_s else "$faint")  # type: ignore[arg-type]


def _quiet(text: str, value: float) -> Content:
    """Nothing to see where there is nothing."""
    return Content.styled(text, "" if value else "$faint")


_TABLE: Final[Table[_Client]] = Table(
    [
        Column("pid", lambda one: str(one.session.pid), lambda one: one.session.pid, ascending=True, style="bold"),
        Column("requests", _rate, lambda one: one.requests_per_s or 0.0),
        Column(
            "granted",
            lambda one: _quiet(render.size(one.session.granted_bytes), one.session.granted_bytes),
            lambda one: one.session.granted_bytes,
            rank=1,
        ),
        Column(
            "leases",
            lambda one: _quiet(render.count(one.session.leases), one.session.leases),
            lambda one: one.session.leases,
            rank=2,
        ),
        Column("idle", lambda one: render.duration(one.session.idle_s), lambda one: one.session.idle_s, ascending=True),
        Column(
            "outbound",
            lambda one: _quiet(render.size(one.session.outbound_bytes), one.session.outbound_bytes),
            lambda one: one.session.outbound_bytes,
            rank=5,
        ),
        Column(
            "by",
            lambda one: Content.styled("mapped", "$dram") if one.session.mapped else "socket",
            lambda one: "mapped" if one.session.mapped else "socket",
            rank=3,
            left=True,
            ascending=True,
        ),
        Column("in all", lambda one: render.count(one.session.requests), lambda one: one.session.requests, rank=6),
        Column(
            "version",
            lambda one: plain(one.session.version),
            lambda one: one.session.version,
            rank=4,
            left=True,
            ascending=True,
            style="$faint",
        ),
    ],
    Order("requests"),
)


def _rows(frame: Frame) -> list[_Client]:
    return [
        _Client(one, frame.requests_per_s.get(one.session))
        for one in frame.clients
        if matching(frame.needle, str(one.pid), one.version, "mapped" if one.mapped else "socket")
    ]


def _draw(frame: Frame, width: int, rows: int) -> Sequence[Content]:
    if not frame.clients:
        return [Content.styled("No client is connected.", "$faint")]
    found = _rows(frame)
    if not found:
        return [Content.styled(f"None of {len(frame.clients)} clients matches the filter.", "$faint")]
    return _TABLE.lines(found, width, frame.orders.get("clients"))


def _note(frame: Frame) -> str:
    server = frame.stats.server
    parts = [f"{render.count(len(frame.clients))} connected"]
    if server.sessions_died:
        parts.append(f"{render.count(server.sessions_died)} died")
    if server.sessions_expired:
        parts.append(f"{render.count(server.sessions_expired)} expired")
    return ", ".join(parts)


CLIENTS: Final = Panel(
    "clients",
    "Clients",
    _draw,
    least=4,
    wanted=lambda frame: len(frame.clients) + 1,
    pinned=1,
    sorts=tuple(_TABLE.sortable),
    order=_TABLE.order,
    note=_note,
)
