from __future__ import annotations

import io
import json
import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
import structlog

from kvstore.observability.logs import RepeatedLog, configure_logs, get_log


@pytest.fixture(autouse=True)
def _restored() -> Iterator[None]:
    root = logging.getLogger()
    handlers = root.handlers[:]
    yield
    root.handlers[:] = handlers
    structlog.reset_defaults()


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Broken(io.StringIO):
    def write(self, text: str) -> int:
        raise BrokenPipeError


class Notes:
    def __init__(self) -> None:
        self.lines: list[tuple[str, dict[str, object]]] = []

    def debug(self, event: str, **facts: object) -> None:
        self.lines.append((event, facts))

    info = warning = error = debug


def test_text_log_is_one_line_of_event_and_facts() -> None:
    out = io.StringIO()
    configure_logs("info", "text", stream=out)
    get_log().info("ready", endpoint="ipc:///x", arena=Path("/dev/shm/a"), note="two words")
    (line,) = out.getvalue().splitlines()
    assert "ready" in line
    assert line.endswith("endpoint=ipc:///x arena=/dev/shm/a note='two words'")
    assert "\x1b" not in line


def test_text_log_on_a_terminal_has_color() -> None:
    out = Terminal()
    configure_logs("info", "text", stream=out)
    get_log().info("ready")
    assert "\x1b[" in out.getvalue()


def test_json_log_is_one_object_a_line() -> None:
    out = io.StringIO()
    configure_logs("info", "json", stream=out)
    get_log(session=3).warning("session died", arena=Path("/a"), text="a\nb")
    (line,) = out.getvalue().splitlines()
    event = json.loads(line)
    assert list(event) == ["timestamp", "level", "event", "session", "arena", "text"]
    assert (event["level"], event["event"], event["session"], event["text"]) == ("warning", "session died", 3, "a\nb")
    assert event["timestamp"].endswith("Z")


def test_log_below_the_level_is_dropped() -> None:
    out = io.StringIO()
    configure_logs("warning", "text", stream=out)
    get_log().info("quiet")
    assert not out.getvalue()


def test_log_of_an_exception_has_its_traceback() -> None:
    out = io.StringIO()
    configure_logs("info", "json", stream=out)
    try:
        raise ValueError("boom")
    except ValueError:
        get_log().error("bug", exc_info=True)
    assert "ValueError: boom" in json.loads(out.getvalue())["exception"]


def test_log_to_a_broken_stream_is_dropped() -> None:
    configure_logs("info", "text", stream=Broken())
    get_log().info("nobody listens")


def test_library_warnings_become_events_once() -> None:
    out = io.StringIO()
    configure_logs("info", "json", stream=out)
    configure_logs("info", "json", stream=out)
    logging.getLogger("asyncio").warning("slow callback %d", 7)
    logging.getLogger("asyncio").info("unwanted")
    (line,) = out.getvalue().splitlines()
    assert json.loads(line)["event"] == "slow callback 7"
    assert json.loads(line)["logger"] == "asyncio"


def test_repeated_log_within_the_interval_is_held_back_and_counted() -> None:
    notes, now = Notes(), [100.0]
    repeated = RepeatedLog(notes, clock=lambda: now[0])
    said = [repeated.log_every(10, "full", "warning", "tier full", tier="dram") for _ in range(4)]
    now[0] = 110.0
    assert repeated.log_every(10, "full", "warning", "tier full", tier="dram")
    now[0] = 121.0
    assert repeated.log_every(10, "full", "warning", "tier full", tier="dram")
    assert said == [True, False, False, False]
    assert notes.lines == [
        ("tier full", {"tier": "dram"}),
        ("tier full", {"tier": "dram", "held_back": 3}),
        ("tier full", {"tier": "dram"}),
    ]


def test_repeated_log_tells_keys_apart_and_forgets_the_oldest() -> None:
    notes = Notes()
    repeated = RepeatedLog(notes, clock=lambda: 0.0, max_keys=2)
    for key in ("a", "b", "a", "c", "a"):
        repeated.log_every(10, key, "info", key)
    assert [event for event, _ in notes.lines] == ["a", "b", "c", "a"]
