"""A process of the stress: waits for commands on standard input, plays a role, says what came of it.

One line of JSON a message, both ways: ``{"role": ..., "limit_s": ..., "arguments": {...}}`` begins a role,
``{"stop": true}`` ends it early. Answers are ``{"ready": ...}``, ``{"progress": ...}``, and at last ``{"done": ...}``
or ``{"failed": traceback}``.

It cannot be left behind: it ends with its standard input, and a role that takes longer than its limit is ended by an
alarm that needs nothing of Python.
"""

from __future__ import annotations

import importlib
import os
import select
import signal
import time
import traceback
from collections.abc import Callable
from typing import Any, Final

import msgspec

__all__ = ["Post", "Role", "load_roles", "main"]

ROLES: Final = {
    "churn": ("kvstore.cli.stress.churn", "churn"),
    "read": ("kvstore.cli.stress.readers", "read"),
    "client": ("kvstore.cli.stress.client_role", "client"),
    "mortals": ("kvstore.cli.stress.mortals", "mortals"),
}
"""Modules and functions."""

_STDIN: Final = 0
_STDOUT: Final = 1
_LOOK_S: Final = 0.01


class Post:
    """Messages from and to the process that started this one."""

    def __init__(self) -> None:
        self._input = b""
        self._stopped = False
        self._ended = False
        self._next_look = 0.0
        self._commands: list[dict[str, Any]] = []

    def send(self, kind: str, content: object) -> None:
        """Say something; a starter that is gone hears it no more."""
        left = memoryview(msgspec.json.encode({kind: content}) + b"\n")
        try:
            while left:
                left = left[os.write(_STDOUT, left) :]
        except BrokenPipeError:
            self._ended = self._stopped = True

    def stopped(self) -> bool:
        """Whether the role is to end now. Looks every 10 ms, in between it costs nothing."""
        now = time.monotonic()
        if not self._stopped and now >= self._next_look:
            self._next_look = now + _LOOK_S
            self._receive(0.0)
        return self._stopped

    def next_command(self) -> dict[str, Any] | None:
        """Wait for a command; None: the starter is gone."""
        self._stopped = False
        while not self._commands and not self._ended:
            self._receive(None)
            self._stopped = False
        return None if self._ended else self._commands.pop(0)

    def _receive(self, timeout_s: float | None) -> None:
        if not select.select([_STDIN], [], [], timeout_s)[0]:
            return
        data = os.read(_STDIN, 1 << 16)
        if not data:
            self._ended = self._stopped = True
        *lines, self._input = (self._input + data).split(b"\n")
        for line in lines:
            command: dict[str, Any] = msgspec.json.decode(line)
            if "stop" in command:
                self._stopped = True
            else:
                self._commands.append(command)


Role = Callable[..., dict[str, Any]]
"""Takes a ``Post`` and its arguments by name; what it returns is sent as ``done``."""


def load_roles() -> None:
    """Load everything that roles need, and compile it where that was not done on this machine yet."""
    for module, _ in ROLES.values():
        importlib.import_module(module)


def _role(name: str) -> Role:
    module, function = ROLES[name]
    role: Role = getattr(importlib.import_module(module), function)
    return role


def main() -> None:
    """Play roles until standard input ends."""
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    post = Post()
    load_roles()
    post.send("ready", os.getpid())
    while (command := post.next_command()) is not None:
        signal.setitimer(signal.ITIMER_REAL, command["limit_s"])
        try:
            post.send("done", _role(command["role"])(post, **command["arguments"]))
        except Exception:
            post.send("failed", traceback.format_exc())
        signal.setitimer(signal.ITIMER_REAL, 0)


if __name__ == "__main__":
    main()
