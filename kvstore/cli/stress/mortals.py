"""Clients that are killed: with views open, slots in use and half-done work, stopped or running.

They are forked from a process that has everything loaded and no client, thread or socket of its own, because what a
death leaves behind is to be seen many times a second and not once in two.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import random
import select
import signal
import time
import traceback
from collections import Counter
from typing import Any, Final, NoReturn

import numpy as np

from kvstore.cli.stress.actor import Actor, Tally, Verbs
from kvstore.cli.stress.client_role import NAMESPACE, TIMEOUT_S
from kvstore.cli.stress.profile import PROFILES, Blocks, Buffer
from kvstore.cli.stress.worker import Post
from kvstore.errors import ConnectionLost, DaemonUnavailable, Throttled
from kvstore.mapped import context as fields
from kvstore.mapped.writes import begin_put, fill_slot
from kvstore_client import Client

__all__ = ["mortals"]

_BORN_S: Final = 10.0
_MOST_LIFE_S: Final = 0.15
_MOST_VIEWS: Final = 6
_MOST_GRANTS: Final = 4
_PR_SET_PDEATHSIG: Final = 1
_HOLDING: Final = b"h"
_NOBODY: Final = b"n"


def mortals(post: Post, *, endpoint: str, profile: str, seconds: float, seed: int, stopped_s: float) -> dict[str, Any]:
    """Role: let clients live and kill them, for so long; how many, and what they said."""
    rng = random.Random(seed)
    blocks = Blocks(PROFILES[profile])
    end = time.monotonic() + seconds
    counts: Counter[str] = Counter()
    problems: list[str] = []
    while time.monotonic() < end and not post.stopped():
        read_fd, write_fd = os.pipe()
        pid = os.fork()
        if not pid:
            os.close(read_fd)
            _live(endpoint, blocks, rng.randrange(1 << 30), write_fd)
        os.close(write_fd)
        try:
            said = _wait_until_born(read_fd)
            _end_it(pid, rng, counts, stopped_s, said)
            said += _rest(read_fd)
        finally:
            os.close(read_fd)
        if said[:1] == _NOBODY:
            counts["unborn"] += 1
            time.sleep(0.05)
        elif not said:
            counts["killed_early"] += 1
        elif said != _HOLDING:
            problems.append(said.removeprefix(_HOLDING).decode("utf-8", "replace"))
    return {"counts": dict(counts), "problems": problems[:10]}


def _wait_until_born(fd: int) -> bytes:
    ready, _, _ = select.select([fd], [], [], _BORN_S)
    return os.read(fd, 1) if ready else b""


def _rest(fd: int) -> bytes:
    rest = b""
    while part := os.read(fd, 1 << 16):
        rest += part
    return rest


def _end_it(pid: int, rng: random.Random, counts: Counter[str], stopped_s: float, said: bytes) -> None:
    """Kill a child after a moment, one in four while it is stopped; the child is reaped."""
    if said == _HOLDING:
        time.sleep(rng.uniform(0.0, _MOST_LIFE_S))
        if rng.random() < 0.25:
            os.kill(pid, signal.SIGSTOP)
            time.sleep(rng.uniform(0.0, stopped_s))
            counts["stopped"] += 1
            if rng.random() < 0.5:
                os.kill(pid, signal.SIGCONT)
                time.sleep(rng.uniform(0.0, _MOST_LIFE_S))
        counts["killed"] += 1
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


def _live(endpoint: str, blocks: Blocks, seed: int, say: int) -> NoReturn:
    """A child's life: hold views and slots, say so, then act until killed. Never returns."""
    try:
        # It dies with its parent, stopped or not.
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        signal.setitimer(signal.ITIMER_REAL, _BORN_S + TIMEOUT_S)
        rng = random.Random(seed)
        with contextlib.ExitStack() as held:
            try:
                client = Client(endpoint, namespace=NAMESPACE, timeout=TIMEOUT_S, mapped=True)
                for _ in range(rng.randint(0, _MOST_VIEWS)):
                    held.enter_context(client.view(blocks.key(rng.randrange(len(blocks)))))
                _use_grants(client, blocks, rng)
            except (DaemonUnavailable, ConnectionLost, Throttled):
                os.write(say, _NOBODY)
                os._exit(0)
            os.write(say, _HOLDING)
            tally = Tally()
            actor = Actor(Verbs(client), blocks, rng, tally)
            asyncio.run(actor.act(lambda: bool(tally.counts.get("wrong_blocks"))))
            os.write(say, f"a client that was to be killed read wrong bytes: {tally.counts}".encode())
    except BaseException:
        os.write(say, b"a client that was to be killed failed: " + traceback.format_exc().encode())
    finally:
        os._exit(0)


def _use_grants(client: Client, blocks: Blocks, rng: random.Random) -> None:
    """Take slots as a put does, write into some and commit none: what a put looks like that is killed in the middle."""
    mapped = client._mapped
    if mapped is None:
        return
    buffer = Buffer(blocks.max_length)
    for _ in range(rng.randint(0, _MOST_GRANTS)):
        number = rng.randrange(len(blocks))
        data = buffer.write(blocks, number)
        # With an answer, so that its lane is there; what it holds is not interesting.
        client.put(blocks.key(number), data, parent=blocks.parent(number))
        item = np.zeros(fields.ITEM_BYTES // 8, np.int64)
        at = int(item.ctypes.data)
        key = blocks.key(rng.randrange(len(blocks)))
        if begin_put(mapped.address, at, id(key), id(data)) == 0 and rng.random() < 0.5:
            fill_slot(mapped.address, at)
