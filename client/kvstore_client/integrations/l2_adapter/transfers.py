"""Objects into the store and out of it, from and into their own memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt

from kvstore.errors import InvalidArgument, Throttled
from kvstore.protocol.keys import BlockKey
from kvstore.protocol.messages import PutStatus
from kvstore_client.integrations.l2_adapter.keys import Chains
from kvstore_client.integrations.l2_adapter.places import Place
from kvstore_client.integrations.l2_adapter.sessions import Session

__all__ = ["Loaded", "Stored", "Transfer", "load", "store"]

_BATCH_BYTES: Final = 32 << 20
"""Bytes between two looks at the clock."""


class Transfer(NamedTuple):
    """One object of a task.

    Attributes:
        position: in the task.
        key: of its block.
        data: its memory, contiguous bytes.
    """

    position: int
    key: BlockKey
    data: npt.NDArray[np.uint8]


@dataclass(slots=True)
class Stored:
    """What became of objects.

    Attributes:
        stored: positions of those that were not there before.
        exists: of those that were.
        failed: of others: why.
        stored_bytes: payloads of ``stored``, encoded where a codec did.
    """

    stored: list[int] = field(default_factory=list)
    exists: list[int] = field(default_factory=list)
    failed: dict[int, str] = field(default_factory=dict)
    stored_bytes: int = 0


@dataclass(slots=True)
class Loaded:
    """What became of objects: positions and lengths of those that are right now, and why others were not loaded."""

    lengths: dict[int, int] = field(default_factory=dict)
    failed: dict[int, str] = field(default_factory=dict)
    stored_bytes: int = 0


def store(
    session: Session, place: Place, objects: Sequence[Transfer], chains: Chains, ended: Callable[[], bool], done: Stored
) -> None:
    """Store objects of one place; ``done`` says what became of them, also where this raises.

    Args:
        session: of the place, for writing.
        place: of all of them.
        objects: what is stored.
        chains: which chunk comes before which.
        ended: whether the rest is to be left.
        done: added to.
    """
    for parent, run in chains.runs([each.key for each in objects]):
        for some in _batches(objects[run]):
            if ended():
                done.failed.update((each.position, "late") for each in some)
                continue
            if session.tensors is None:
                _put(session, place, some, parent, done)
            else:
                _encode(session, place, some, parent, done)
            parent = some[-1].key


def _put(session: Session, place: Place, objects: Sequence[Transfer], parent: BlockKey | None, done: Stored) -> None:
    keys = [each.key for each in objects]
    worst = [PutStatus.EXISTS] * len(objects)
    for part in range(place.parts):
        piece = place.piece(part)
        statuses = session.client.put_many(keys, [each.data[piece] for each in objects], parent=parent, part=part)
        for index, status in enumerate(statuses):
            if worst[index] in (PutStatus.STORED, PutStatus.EXISTS) and status is not PutStatus.EXISTS:
                worst[index] = status
    for each, status in zip(objects, worst, strict=True):
        _note(each, status, "", done)
        if status is PutStatus.STORED:
            done.stored_bytes += each.data.nbytes


def _encode(session: Session, place: Place, objects: Sequence[Transfer], parent: BlockKey | None, done: Stored) -> None:
    assert session.tensors is not None
    for each in objects:
        report = session.tensors.save_blocks([each.key], place.tensor(each.data), parent=parent)
        _note(each, report.statuses[0], report.reasons.get(0, ""), done)
        done.stored_bytes += report.stored_bytes
        parent = each.key


def _note(each: Transfer, status: PutStatus, reason: str, done: Stored) -> None:
    if status is PutStatus.STORED:
        done.stored.append(each.position)
    elif status is PutStatus.EXISTS:
        done.exists.append(each.position)
    else:
        done.failed[each.position] = reason or status.name.lower()


def load(
    session: Session,
    place: Place,
    objects: Sequence[Transfer],
    request: int | None,
    ended: Callable[[], bool],
    done: Loaded,
) -> None:
    """Load objects of one place into their memory; ``done`` says what became of them, also where this raises.

    What stands in the memory of an object that was not loaded is unspecified.

    Args:
        session: of the place.
        place: of all of them.
        objects: what is loaded.
        request: the engine request in which they were found.
        ended: whether the rest is to be left.
        done: added to.
    """
    for some in _batches(objects):
        if ended():
            done.failed.update((each.position, "late") for each in some)
        elif session.tensors is None:
            _get(session, place, some, request, done)
        else:
            _decode(session, place, some, request, done)


def _get(session: Session, place: Place, objects: Sequence[Transfer], request: int | None, done: Loaded) -> None:
    left = list(objects)
    sizes = dict.fromkeys((each.position for each in objects), 0)
    for part in range(place.parts):
        piece = place.piece(part)
        outs = [each.data[piece] for each in left]
        try:
            lengths = _read(session, [each.key for each in left], outs, part, request)
        except Throttled:
            done.failed.update((each.position, "throttled") for each in left)
            return
        good = []
        for each, out, length in zip(left, outs, lengths, strict=True):
            if length is None:
                done.failed[each.position] = "miss"
            elif length > out.nbytes or (place.object_bytes and length != out.nbytes):
                done.failed[each.position] = "size"
            else:
                sizes[each.position] += length
                good.append(each)
        left = good
        if not left:
            return
    for each in left:
        done.lengths[each.position] = sizes[each.position]
        done.stored_bytes += sizes[each.position]


def _read(session: Session, keys: list[BlockKey], outs: list[Any], part: int, request: int | None) -> list[int | None]:
    """Lengths, None for a miss; more than the buffer's where it is too small."""
    try:
        return session.client.get_many_into(keys, outs, part=part, request=request)
    except InvalidArgument:
        # One of them does not fit its buffer: find out which.
        lengths: list[int | None] = []
        for key, out in zip(keys, outs, strict=True):
            try:
                lengths.append(session.client.get_into(key, out, part=part, request=request))
            except InvalidArgument:
                lengths.append(out.nbytes + 1)
        return lengths


def _decode(session: Session, place: Place, objects: Sequence[Transfer], request: int | None, done: Loaded) -> None:
    assert session.tensors is not None
    for each in objects:
        report = session.tensors.load_blocks([each.key], place.tensor(each.data), request=request)
        if report.loaded:
            done.lengths[each.position] = each.data.nbytes
            done.stored_bytes += report.stored_bytes
        else:
            done.failed[each.position] = "" if report.failure is None else report.failure.value


def _batches(objects: Sequence[Transfer]) -> list[Sequence[Transfer]]:
    batches: list[Sequence[Transfer]] = []
    begin = total = 0
    for index, each in enumerate(objects):
        if index > begin and total + each.data.nbytes > _BATCH_BYTES:
            batches.append(objects[begin:index])
            begin, total = index, 0
        total += each.data.nbytes
    if begin < len(objects):
        batches.append(objects[begin:])
    return batches
