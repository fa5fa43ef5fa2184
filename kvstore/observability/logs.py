"""Structured logs on stderr: one event a line, as text for people or JSON for machines.

Covers: configuration (once, at the start), loggers, rate-limited repeats, and records of libraries that use
``logging``. Does not cover metrics. A log that cannot be written (closed pipe, full disk) is dropped: logging never
stops the daemon.
"""

from __future__ import annotations

import contextlib
import logging
import sys
import time
from collections import OrderedDict
from collections.abc import Callable, Hashable, MutableMapping
from pathlib import PurePath
from typing import Any, Final, Literal, Protocol, TextIO

import structlog
from structlog.typing import Processor

__all__ = ["Log", "LogFormat", "LogLevel", "RepeatedLog", "configure_logs", "get_log"]

LogLevel = Literal["debug", "info", "warning", "error"]
LogFormat = Literal["text", "json"]

_LEVELS: Final[dict[str, int]] = {
    "debug": logging.DEBUG,
    "info": logging.INFO,
    "warning": logging.WARNING,
    "error": logging.ERROR,
}
_EVENT_WIDTH: Final = 24


class Log(Protocol):
    """A logger: an event's name and its facts, ``log.info("ready", endpoint=...)``."""

    def debug(self, event: str, **facts: object) -> object:
        """Log what only somebody who debugs wants to know."""

    def info(self, event: str, **facts: object) -> object:
        """Log what an operator may want to know."""

    def warning(self, event: str, **facts: object) -> object:
        """Log what an operator should look at."""

    def error(self, event: str, **facts: object) -> object:
        """Log what is broken."""


class _Stream:
    """A text stream whose failures are dropped."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError, ValueError):
            return self._stream.write(text)
        return 0

    def flush(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            self._stream.flush()


class _LibraryHandler(logging.Handler):
    """Passes warnings of libraries (asyncio, aiohttp) on as events."""

    def emit(self, record: logging.LogRecord) -> None:
        facts: dict[str, object] = {"logger": record.name}
        if record.exc_info:
            facts["exc_info"] = record.exc_info
        log = get_log()
        say = log.error if record.levelno >= logging.ERROR else log.warning
        try:
            message = record.getMessage()
        except (TypeError, ValueError):
            message = str(record.msg)
        say(message, **facts)


def configure_logs(
    level: LogLevel = "info", format: LogFormat = "text", *, stream: TextIO | None = None, color: bool | None = None
) -> None:
    """Set up logging for this process; loggers made before follow.

    Args:
        level: events below it are dropped, almost for free.
        format: ``text`` or ``json`` (one object a line, RFC 3339 time in UTC).
        stream: stderr by default.
        color: for ``text``; by default only where the stream is a terminal.
    """
    target = sys.stderr if stream is None else stream
    text = format == "text"
    timestamp = structlog.processors.TimeStamper(fmt="%Y-%m-%d %H:%M:%S.%f" if text else "iso", utc=not text)
    processors: list[Processor] = [structlog.processors.add_log_level, timestamp, _readable]
    if text:
        colors = target.isatty() if color is None else color
        processors += [
            _milliseconds,
            structlog.processors.StackInfoRenderer(),
            structlog.dev.ConsoleRenderer(
                colors=colors,
                pad_event_to=_EVENT_WIDTH,
                exception_formatter=structlog.dev.plain_traceback,
                sort_keys=False,
            ),
        ]
    else:
        processors += [structlog.processors.format_exc_info, structlog.processors.JSONRenderer(default=str)]
    structlog.configure(
        processors=processors,
        wrapper_class=structlog.make_filtering_bound_logger(_LEVELS[level]),
        logger_factory=structlog.WriteLoggerFactory(file=_Stream(target)),  # type: ignore[arg-type]
        cache_logger_on_first_use=False,
    )
    root = logging.getLogger()
    for handler in [handler for handler in root.handlers if isinstance(handler, _LibraryHandler)]:
        root.removeHandler(handler)
    root.addHandler(_LibraryHandler(level=max(logging.WARNING, _LEVELS[level])))


def get_log(**facts: object) -> Log:
    """A logger whose events all carry ``facts``."""
    log: Log = structlog.get_logger(**facts)
    return log


class RepeatedLog:
    """Says the same thing at most once per interval, and then how often it was held back.

    Not thread-safe. Bounded: at most ``max_keys`` keys are remembered, the longest silent are forgotten.

    Args:
        log: where events go.
        clock: monotonic seconds.
        max_keys: how many different things are told apart.
    """

    def __init__(self, log: Log, *, clock: Callable[[], float] = time.monotonic, max_keys: int = 256) -> None:
        self._log = log
        self._clock = clock
        self._max_keys = max_keys
        self._said: OrderedDict[Hashable, tuple[float, int]] = OrderedDict()

    def log_every(self, seconds: float, key: Hashable, level: LogLevel, event: str, **facts: object) -> bool:
        """Log ``event`` unless one with this ``key`` was logged less than ``seconds`` ago.

        Returns:
            Whether it was logged; if it had been held back, with ``held_back`` as one more fact.
        """
        now = self._clock()
        said = self._said.get(key)
        if said is not None and now - said[0] < seconds:
            self._said[key] = (said[0], said[1] + 1)
            return False
        held_back = said[1] if said is not None else 0
        self._said[key] = (now, 0)
        self._said.move_to_end(key)
        if len(self._said) > self._max_keys:
            self._said.popitem(last=False)
        if held_back:
            facts["held_back"] = held_back
        getattr(self._log, level)(event, **facts)
        return True


def _milliseconds(log: Any, method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    event["timestamp"] = event["timestamp"][:-3]
    return event


def _readable(log: Any, method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """Time, level and event first; paths as they are written."""
    ordered = {name: event.pop(name) for name in ("timestamp", "level", "event")}
    facts = {name: str(fact) if isinstance(fact, PurePath) else fact for name, fact in event.items()}
    return ordered | facts
