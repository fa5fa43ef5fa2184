"""What must happen to mappings without anybody calling: memory of a dead daemon goes, a forked child gets none.

One thread a process, only while a client of it maps. It looks often enough to unmap within a second: a system call of
about a microsecond for each mapping.
"""

from __future__ import annotations

import contextlib
import os
import queue
import threading
import weakref
from typing import Final, Protocol

__all__ = ["unwatch", "watch"]

_LOOK_S: Final = 0.8


class Owner(Protocol):
    """Who holds a mapping."""

    def daemon_lives(self) -> bool:
        """Whether the mapping is of a daemon that lives, or there is none."""

    def drop_mapping(self) -> None:
        """Refer to the mapping no more, whose daemon is gone."""

    def disown_mapping(self) -> None:
        """Refer to the mapping no more, which is the parent process's."""


_owners: weakref.WeakSet[Owner] = weakref.WeakSet()
_lock = threading.Lock()
_thread: threading.Thread | None = None
_wake: queue.SimpleQueue[None] = queue.SimpleQueue()
"""Each call is one of C: an exception from a signal handler leaves no lock in it taken, as it does in an Event."""


def watch(owner: Owner) -> None:
    """Look after an owner's mapping until the owner is gone or ``unwatch`` is called."""
    global _thread
    with _lock:
        _owners.add(owner)
        # One that is not alive an interrupt struck before it began.
        if _thread is None or not _thread.is_alive():
            _thread = threading.Thread(target=_run, name="kvstore-watch", daemon=True)
            _thread.start()


def unwatch(owner: Owner) -> None:
    """Look no more; the last one ends the thread."""
    with _lock:
        _owners.discard(owner)
        thread = _thread if not _owners else None
        if thread is not None:
            _wake.put(None)
    if thread is not None and thread is not threading.current_thread() and thread.is_alive():
        thread.join(1.0)


def _run() -> None:
    global _thread
    while True:
        with contextlib.suppress(queue.Empty):
            _wake.get(timeout=_LOOK_S)
        with _lock:
            owners = list(_owners)
            if not owners:
                _thread = None
                return
        for owner in owners:
            if not owner.daemon_lives():
                owner.drop_mapping()
        del owners


def _in_forked_child() -> None:
    """The mapping, its hazards and its ring are the parent's: a child that used them would speak in its name."""
    global _lock, _thread, _wake
    _lock, _wake, _thread = threading.Lock(), queue.SimpleQueue(), None
    owners = list(_owners)
    _owners.clear()
    for owner in owners:
        owner.disown_mapping()


os.register_at_fork(after_in_child=_in_forked_child)
