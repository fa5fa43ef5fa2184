"""The control path beside a bare echo: round trips, a pipelined window, a long match, and what idling costs.

Each round asks the echo and then the daemon with the same frame through the same loop, so a change of the machine's
load meets both. Answers are checked before and after the timing, and decoded in neither loop.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Final

import zmq

from kvstore.cli.bench.echo import echo_server
from kvstore.cli.bench.machine import machine_facts
from kvstore.cli.bench.report import Report, Row, percentile
from kvstore.cli.bench.wire import DaemonSession, Wire
from kvstore.errors import ErrorCode, RemoteError, Throttled
from kvstore.protocol.framing import decode_reply, encode
from kvstore.protocol.keys import chain_keys, join_keys
from kvstore.protocol.messages import (
    AnyReply,
    AnyRequest,
    Done,
    Exists,
    ExistsReply,
    Match,
    MatchReply,
    Ping,
    PutStatus,
    TierId,
)
from kvstore.protocol.namespace import Namespace
from kvstore_client import Client

__all__ = ["BASELINE", "DEPTH", "LONG_MATCH_KEYS", "Samples", "measure_control"]

BASELINE: Final = "blocking pyzmq ROUTER in its own process that echoes the same frames, driven by the same client loop"
DEPTH: Final = 32
LONG_MATCH_KEYS: Final = 1024

ROUND_TRIP_LIMIT: Final = 1 / 1.5
PIPELINED_LIMIT: Final = 0.5
LONG_MATCH_LIMIT: Final = 1 / 3

_NAMESPACE: Final = Namespace(name="bench control")
_PAYLOAD: Final = bytes(range(64))
_WARM_UP: Final = 200


@dataclass(frozen=True, slots=True)
class Samples:
    """How much is measured on each side.

    Attributes:
        rounds: turns of echo and daemon.
        round_trips: short exchanges a round.
        long_matches: matches of 1,024 keys a round.
        pipelined: exchanges a round at depth 32.
    """

    rounds: int = 20
    round_trips: int = 200
    long_matches: int = 50
    pipelined: int = 2000


@dataclass(frozen=True, slots=True)
class _Operation:
    """One request, and what must be true of its answer."""

    name: str
    batch: int
    request: Callable[[], AnyRequest]
    correct: Callable[[AnyReply], bool]


@dataclass(frozen=True, slots=True)
class _Sides:
    echo: Wire
    daemon: DaemonSession


def measure_control(endpoint: str, samples: Samples, on_round: Callable[[], None] = lambda: None) -> Report:
    """Measure a running daemon beside the echo. Leaves no block behind.

    Args:
        endpoint: of the daemon.
        samples: how much.
        on_round: called after each of the ``samples.rounds`` rounds.

    Raises:
        KVStoreError: the daemon or the echo cannot be reached, or an answer is wrong.
    """
    machine = machine_facts()
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    try:
        with Client(endpoint, namespace=_NAMESPACE, timeout=30.0, payload_bytes=(len(_PAYLOAD),)) as client:
            keys = _store(client)
            try:
                with (
                    echo_server() as echo_endpoint,
                    Wire(context, echo_endpoint, "the echo server") as echo,
                    DaemonSession(context, endpoint, _NAMESPACE) as daemon,
                ):
                    rows = _rounds(_Sides(echo, daemon), keys, samples, on_round)
            finally:
                client.remove(keys)
    finally:
        context.term()
    return Report(machine=machine, baseline=BASELINE, rows=rows)


def _store(client: Client) -> list[bytes]:
    """A chain of blocks in the store, all of which a match then finds."""
    keys = chain_keys(range(LONG_MATCH_KEYS), 1)
    statuses = client.put_many(keys, [_PAYLOAD] * len(keys))
    client.flush()
    refused = [status for status in statuses if status not in (PutStatus.STORED, PutStatus.EXISTS)]
    if refused:
        raise Throttled(
            f"the daemon took only {len(keys) - len(refused)} of {len(keys)} small blocks "
            f"(first refusal: {refused[0].name.lower()}); it needs {len(keys) * 4096} free bytes"
        )
    return keys


def _operations(daemon: DaemonSession, keys: Sequence[bytes]) -> tuple[list[_Operation], _Operation]:
    """The short exchanges, and the long match."""
    one, many = join_keys(keys[:1]), join_keys(keys)
    short = [
        _Operation("ping", 0, lambda: Ping(*daemon.envelope()), lambda reply: isinstance(reply, Done)),
        _Operation(
            "match",
            1,
            lambda: Match(*daemon.envelope(), keys=one),
            lambda reply: isinstance(reply, MatchReply) and reply.hits == 1,
        ),
        _Operation(
            "exists",
            1,
            lambda: Exists(*daemon.envelope(), keys=one),
            lambda reply: isinstance(reply, ExistsReply) and reply.tiers == bytes([TierId.DRAM]),
        ),
    ]
    long = _Operation(
        "match",
        len(keys),
        lambda: Match(*daemon.envelope(), keys=many),
        lambda reply: isinstance(reply, MatchReply) and reply.hits == len(keys),
    )
    return short, long


def _rounds(sides: _Sides, keys: Sequence[bytes], samples: Samples, on_round: Callable[[], None]) -> list[Row]:
    short, long = _operations(sides.daemon, keys)
    singles = [(operation, encode(operation.request()), samples.round_trips) for operation in short]
    singles.append((long, encode(long.request()), samples.long_matches))
    windows = [(operation, [encode(operation.request()) for _ in range(DEPTH)]) for operation in short]
    times: list[tuple[list[int], list[int]]] = [([], []) for _ in singles]
    rates: list[tuple[list[float], list[float]]] = [([], []) for _ in windows]
    both: tuple[Wire, Wire] = (sides.echo, sides.daemon)

    for operation, frame, _ in singles:
        _check(sides, operation, frame)
        for wire in both:
            wire.round_trips(frame, min(_WARM_UP, samples.round_trips))
    for _ in range(samples.rounds):
        for (_, frame, count), collected in zip(singles, times, strict=True):
            for wire, into in zip(both, collected, strict=True):
                into.extend(wire.round_trips(frame, count))
        for (_, frames), measured in zip(windows, rates, strict=True):
            for wire, rate in zip(both, measured, strict=True):
                rate.append(wire.pipelined(frames, samples.pipelined))
        on_round()
    for operation, frame, _ in singles:
        _check(sides, operation, frame)

    rows = [
        _round_trip_row(operation, *collected, LONG_MATCH_LIMIT if operation is long else ROUND_TRIP_LIMIT)
        for (operation, _, _), collected in zip(singles, times, strict=True)
    ]
    long_row = rows.pop()
    rows.extend(
        _pipelined_row(operation, *measured, samples.pipelined)
        for (operation, _), measured in zip(windows, rates, strict=True)
    )
    return [*rows, long_row]


def _check(sides: _Sides, operation: _Operation, frame: bytes) -> None:
    """One exchange with each side whose answer is looked at."""
    if sides.echo.exchange(frame) != frame:
        raise RemoteError(ErrorCode.INTERNAL, "the echo server answered with other bytes than it got")
    reply = decode_reply(sides.daemon.exchange(frame))
    if not operation.correct(reply):
        raise RemoteError(ErrorCode.INTERNAL, f"the daemon answered {operation.name} of {operation.batch} with {reply}")


def _round_trip_row(operation: _Operation, echo_ns: list[int], daemon_ns: list[int], limit: float) -> Row:
    ours, echo = median(daemon_ns), median(echo_ns)
    return Row(
        op=operation.name,
        batch=operation.batch,
        samples=len(daemon_ns),
        median_us=round(ours / 1000, 2),
        p99_us=round(percentile(sorted(daemon_ns), 0.99) / 1000, 2),
        ops_per_s=round(1e9 / ours, 1),
        baseline_median_us=round(echo / 1000, 2),
        ratio=round(echo / ours, 4),
        limit=round(limit, 4),
    )


def _pipelined_row(operation: _Operation, echo: list[float], daemon: list[float], per_round: int) -> Row:
    ours, theirs = median(daemon), median(echo)
    return Row(
        op=operation.name,
        batch=operation.batch,
        depth=DEPTH,
        samples=len(daemon) * per_round,
        ops_per_s=round(ours, 1),
        baseline_ops_per_s=round(theirs, 1),
        ratio=round(ours / theirs, 4),
        limit=round(PIPELINED_LIMIT, 4),
    )
