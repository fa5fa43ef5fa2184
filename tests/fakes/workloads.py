"""Small request streams of many kinds, drawn from a seed: each request a time in seconds and its path of block ids."""

from __future__ import annotations

import heapq
import random
from collections.abc import Callable, Iterator
from itertools import accumulate, count
from typing import Final

Request = tuple[float, tuple[int, ...]]
Session = Iterator[tuple[float, list[int]]]
"""Seconds since the request before, and the path; again and again."""
Begin = Callable[[], Session]


class _Draw:
    """Random numbers and new block ids."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self._ids = count(1)

    def blocks(self, number: int) -> list[int]:
        return [next(self._ids) for _ in range(number)]

    def about(self, median: float, sigma: float = 1.0) -> float:
        return median * self.rng.lognormvariate(0.0, sigma)

    def length(self, median: float, most: int = 120) -> int:
        return max(1, min(most, round(self.about(median))))


def _stream(draw: _Draw, requests: int, sessions_a_second: Callable[[float], float], begin: Begin) -> list[Request]:
    """Sessions begin at random, and each goes on by itself."""
    order = count()
    due: list[tuple[float, int, list[int], Session]] = []
    out: list[Request] = []
    next_session = 0.0

    def go_on(session: Session, now: float) -> None:
        step = next(session, None)
        if step is not None:
            heapq.heappush(due, (now + step[0], next(order), step[1], session))

    while len(out) < requests:
        while not due or next_session <= due[0][0]:
            go_on(begin(), next_session)
            next_session += draw.rng.expovariate(sessions_a_second(next_session))
        now, _, path, session = heapq.heappop(due)
        out.append((now, tuple(path)))
        go_on(session, now)
    return out


def _steady(per_second: float) -> Callable[[float], float]:
    return lambda _: per_second


def _chat(draw: _Draw, system: list[int], think_s: float, go_on: float = 0.6, first: float = 6.0) -> Session:
    path = [*system, *draw.blocks(draw.length(first))]
    yield 0.0, path
    while draw.rng.random() < go_on:
        path = [*path, *draw.blocks(draw.length(2.0))]
        yield draw.about(think_s), path


def chat(seed: int, requests: int, think_s: float = 60.0) -> list[Request]:
    """Chats of some turns with a short common prompt."""
    draw = _Draw(seed)
    system = draw.blocks(2)
    return _stream(draw, requests, _steady(1.5), lambda: _chat(draw, system, think_s))


def chat_fast(seed: int, requests: int) -> list[Request]:
    """People who answer within seconds."""
    return chat(seed, requests, think_s=8.0)


def chat_slow(seed: int, requests: int) -> list[Request]:
    """People who come back after minutes."""
    return chat(seed, requests, think_s=400.0)


def chat_bursts(seed: int, requests: int) -> list[Request]:
    """Ten times the load for a minute out of ten."""
    draw = _Draw(seed)
    system = draw.blocks(2)
    return _stream(draw, requests, lambda now: 5.0 if now % 600 < 60 else 0.5, lambda: _chat(draw, system, 60.0))


def agents(seed: int, requests: int) -> list[Request]:
    """Loops of tool calls on long common prompts; most tools return in seconds, some in a minute."""
    draw = _Draw(seed)
    prompts = [draw.blocks(20), draw.blocks(35), draw.blocks(10)]

    def loop() -> Session:
        path = [*draw.rng.choice(prompts), *draw.blocks(draw.length(3.0))]
        wait_s = 0.0
        for _ in range(draw.length(10.0, 50)):
            yield wait_s, path
            path = [*path, *draw.blocks(draw.length(1.5, 12))]
            wait_s = draw.about(3.0) if draw.rng.random() < 0.85 else draw.about(60.0)

    return _stream(draw, requests, _steady(0.2), loop)


def _zipf(draw: _Draw, number: int, exponent: float) -> Callable[[], int]:
    weights = list(accumulate((1 + place) ** -exponent for place in range(number)))
    return lambda: draw.rng.choices(range(number), cum_weights=weights)[0]


def documents(seed: int, requests: int) -> list[Request]:
    """Questions to documents, of which some are asked for often."""
    draw = _Draw(seed)
    system = draw.blocks(3)
    papers = [draw.blocks(draw.length(20.0, 60)) for _ in range(400)]
    pick = _zipf(draw, len(papers), 0.9)

    def ask() -> Session:
        yield 0.0, [*system, *papers[pick()], *draw.blocks(2)]

    return _stream(draw, requests, _steady(3.0), ask)


def prompts(seed: int, requests: int) -> list[Request]:
    """Prompts of very different popularity, each with a question of its own behind it."""
    draw = _Draw(seed)
    heads = [draw.blocks(draw.length(8.0, 30)) for _ in range(1500)]
    pick = _zipf(draw, len(heads), 1.1)

    def ask() -> Session:
        yield 0.0, [*heads[pick()], *draw.blocks(1)]

    return _stream(draw, requests, _steady(4.0), ask)


def scans(seed: int, requests: int) -> list[Request]:
    """Chats, and batches of long prompts that never come again."""
    draw = _Draw(seed)
    system = draw.blocks(2)

    def begin() -> Session:
        if draw.rng.random() < 0.4:
            return iter([(0.0, draw.blocks(draw.length(25.0)))])
        return _chat(draw, system, 60.0)

    return _stream(draw, requests, _steady(1.5), begin)


def circles(seed: int, requests: int) -> list[Request]:
    """The same list of prompts from the beginning to the end, over and over, among chats."""
    draw = _Draw(seed)
    system = draw.blocks(2)
    fixed = [draw.blocks(8) for _ in range(250)]
    turn = count()

    def begin() -> Session:
        if draw.rng.random() < 0.5:
            return iter([(0.0, fixed[next(turn) % len(fixed)])])
        return _chat(draw, system, 60.0)

    return _stream(draw, requests, _steady(1.5), begin)


def shifts(seed: int, requests: int) -> list[Request]:
    """Chats, then agents, then documents, then scans."""
    parts = (chat, agents, documents, scans)
    out: list[Request] = []
    for number, part in enumerate(parts):
        begin_s = out[-1][0] if out else 0.0
        offset = number << 40
        for at_s, path in part(seed + number, requests // len(parts)):
            out.append((begin_s + at_s, tuple(offset + block for block in path)))
    return out


def reversals(seed: int, requests: int) -> list[Request]:
    """What was a sign of a return is a sign of none some time later: short first prompts, then long ones come back."""
    draw = _Draw(seed)
    begun = count()

    def begin() -> Session:
        long = draw.rng.random() < 0.5
        path = draw.blocks(20 if long else 4)
        yield 0.0, path
        if long == bool(next(begun) // 300 % 2):
            for _ in range(3):
                path = [*path, *draw.blocks(1)]
                yield draw.about(60.0, 0.5), path

    return _stream(draw, requests, _steady(1.2), begin)


def branches(seed: int, requests: int) -> list[Request]:
    """Each prompt is tried in several ways at once, and one of them goes on."""
    draw = _Draw(seed)
    system = draw.blocks(4)

    def tree() -> Session:
        path = [*system, *draw.blocks(draw.length(8.0))]
        wait_s = 0.0
        while True:
            for _ in range(draw.rng.randint(1, 4)):
                tried = [*path, *draw.blocks(draw.length(2.0))]
                yield wait_s, tried
                wait_s = draw.about(1.0)
            path = tried
            wait_s = draw.about(40.0)
            if draw.rng.random() < 0.4:
                return

    return _stream(draw, requests, _steady(0.6), tree)


def untimed(seed: int, requests: int) -> list[Request]:
    """Chats of which no time is known."""
    return [(0.0, path) for _, path in chat(seed, requests)]


WORKLOADS: Final[dict[str, Callable[[int, int], list[Request]]]] = {
    workload.__name__: workload
    for workload in (
        chat,
        chat_fast,
        chat_slow,
        chat_bursts,
        agents,
        documents,
        prompts,
        scans,
        circles,
        shifts,
        reversals,
        branches,
        untimed,
    )
}
