"""Gives the arena its memory in the background, slab by slab, while the daemon already serves from the first."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable

from kvstore.errors import InsufficientMemory
from kvstore.tiers.dram import Arena


class Population:
    """A thread that populates slabs 1, 2, ...; slab 0 is the caller's business before it serves.

    Args:
        arena: its memory.
        loop: where the callbacks run.
        on_slab: called with each slab's index once it may be used.
        on_end: called once, with "" or with what stopped it.
    """

    def __init__(
        self,
        arena: Arena,
        loop: asyncio.AbstractEventLoop,
        on_slab: Callable[[int], None],
        on_end: Callable[[str], None],
    ) -> None:
        self._arena = arena
        self._loop = loop
        self._on_slab = on_slab
        self._on_end = on_end
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="kvstore-populate", daemon=True)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def stop(self) -> None:
        """End early and wait for the step that is under way."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()

    def _run(self) -> None:
        problem = ""
        try:
            for slab in range(1, self._arena.header.slab_count):
                step = 0
                while not self._stop.is_set() and not self._arena.populate_step(slab, step):
                    step += 1
                if self._stop.is_set():
                    return
                self._loop.call_soon_threadsafe(self._on_slab, slab)
        except InsufficientMemory as error:
            problem = str(error)
        self._loop.call_soon_threadsafe(self._on_end, problem)


def populate_first(arena: Arena) -> None:
    """Populate slab 0.

    Raises:
        InsufficientMemory: there is no room for even one.
    """
    step = 0
    while not arena.populate_step(0, step):
        step += 1
