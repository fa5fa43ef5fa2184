"""One frame as text, for logs and pipes: two looks at the daemon, then every panel that has something to show."""

from __future__ import annotations

import os
import shutil
import time

from kvstore.cli.top.frame import Frame
from kvstore.cli.top.history import History
from kvstore.cli.top.panel import Panel
from kvstore.cli.top.registry import ABOVE, DECK

__all__ = ["frame_text", "print_once"]

_USUAL_WIDTH = 100
_LEAST_WIDTH = 60
_MOST_ROWS = 40


def print_once(endpoint: str | None, interval_s: float, timeout_s: float) -> None:
    """Look, wait, look again, print.

    Raises:
        KVStoreError: the daemon does not answer.
    """
    from kvstore_client import Client

    history = History()
    with Client(endpoint, mapped=False, timeout=timeout_s) as client:
        history.add(client.stats(), time.monotonic())
        time.sleep(interval_s)
        asked_s = time.monotonic()
        stats = client.stats()
        now_s = time.monotonic()
    history.add(stats, now_s)
    frame = Frame(stats, history, interval_s=interval_s, took_s=now_s - asked_s, own_pid=os.getpid(), charts=False)
    width = max(shutil.get_terminal_size((_USUAL_WIDTH, 24)).columns, _LEAST_WIDTH)
    print(frame_text(frame, width))


def frame_text(frame: Frame, width: int) -> str:
    """All panels below each other, without colours."""
    from kvstore.cli.top.bars import heading

    parts = [heading(frame, width).plain.rstrip()]
    parts += [_panel_text(panel, frame, width) for panel in (*ABOVE, *DECK) if panel.there(frame)]
    return "\n\n".join(parts)


def _panel_text(panel: Panel, frame: Frame, width: int) -> str:
    rows = min(max(panel.wanted(frame), panel.least), _MOST_ROWS)
    lines = list(panel.draw(frame, width, rows))
    note = panel.note(frame) if panel.note is not None else ""
    title = f"{panel.title} ({note})" if note else panel.title
    if len(lines) > _MOST_ROWS:
        left = len(lines) - _MOST_ROWS
        return "\n".join([title, *(one.plain.rstrip() for one in lines[:_MOST_ROWS]), f"... {left} more"])
    return "\n".join([title, *(one.plain.rstrip() for one in lines)])
