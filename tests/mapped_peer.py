"""A peer that maps the daemon's memory and writes whatever it likes into what it may write."""

from __future__ import annotations

import fcntl
import mmap
import os
import struct
import subprocess
from pathlib import Path
from typing import Self

import numpy as np
from raw_peer import BOOT_ID, RawPeer

from kvstore.format.constants import PAGE_BYTES
from kvstore.mapped.client_file import (
    ANSWER_OFFSET,
    CLIENT_FILE_BYTES,
    CONSUMED_OFFSET,
    GRANT_OFFSET,
    HAZARD_OFFSET,
    HEAD_OFFSET,
    LANE_BYTES,
    LANE_GRANTS,
    LANE_OFFSET,
    LANE_TAIL,
    RING_OFFSET,
    RING_RECORD_BYTES,
    RING_RECORDS,
    STATE_OFFSET,
    ClientState,
)
from kvstore.mapped.grants import GRANT_PAGES_SHIFT, GRANT_SLOT_MASK
from kvstore.mapped.index_file import BUCKET_OFFSET, ENTRY_IDENTITY, ENTRY_KEY, ENTRY_PLACE, MAPPED_LAYOUT
from kvstore.mapped.index_writer import HAZARD_WORDS
from kvstore.mapped.session_file import lock_request
from kvstore.protocol.messages import Attach, Attached, Done, Hello, Ping, PutStatus, Reason, Reserve, Reserved, Welcome
from kvstore.protocol.namespace import Namespace
from kvstore.protocol.version import PROTOCOL_OLDEST, PROTOCOL_VERSION

RECORD = struct.Struct("<BBBxHHIIqqqqqq")
"""kind, continuations, named keys, part, namespace, asked or bytes, hits, slot, sequence, access, time, payload bytes,
whether it belongs to the report before it."""
assert RECORD.size == RING_RECORD_BYTES


def entry_of(directory: Path, key: bytes) -> tuple[int, int]:
    """Slot and sequence of a block that is there, by the index file of the daemon whose directory it is."""
    (path,) = directory.glob("index-*")
    memory = path.read_bytes()
    at = BUCKET_OFFSET
    while (at := memory.find(key, at)) >= 0:
        entry = at - ENTRY_KEY
        if int.from_bytes(memory[entry + ENTRY_IDENTITY : entry + ENTRY_IDENTITY + 8], "little"):
            place = int.from_bytes(memory[entry + ENTRY_PLACE : entry + ENTRY_PLACE + 4], "little")
            return place, int.from_bytes(memory[entry : entry + 8], "little")
        at += 1
    raise AssertionError(f"{key.hex()} is not in the index")


def hazards_of(directory: Path, session: int) -> int:
    """How many hazard words of a session are set.

    Another process looks: a record lock goes with the first descriptor of its file that its process closes.
    """
    file = directory / f"client-{session:016x}"
    memory = subprocess.run(["cat", file], capture_output=True, check=True).stdout
    return sum(any(memory[at : at + 8]) for at in range(HAZARD_OFFSET, HAZARD_OFFSET + 8 * HAZARD_WORDS, 8))


class MappedPeer(RawPeer):
    """A session with a ring, grants and hazards, all written by hand."""

    def join(self, namespace: str | Namespace) -> Self:
        """Greet as one that maps, lock and map the session's file and the arena, join a namespace."""
        layout = (PROTOCOL_OLDEST, PROTOCOL_VERSION, "raw", os.getpid(), BOOT_ID, MAPPED_LAYOUT)
        welcome = self.ask(Hello, *layout, session=0)
        assert isinstance(welcome, Welcome), welcome
        assert welcome.index_file, welcome.unmapped
        self.session = welcome.session
        self.doorbell = welcome.doorbell
        self._fd = os.open(welcome.session_file, os.O_RDWR | os.O_CLOEXEC)
        fcntl.fcntl(self._fd, fcntl.F_SETLK, lock_request(fcntl.F_WRLCK))
        self.file = mmap.mmap(self._fd, CLIENT_FILE_BYTES)
        self.words = np.frombuffer(self.file, np.int64)
        arena = os.open(welcome.arena_file, os.O_RDWR | os.O_CLOEXEC)
        self.arena_bytes = os.fstat(arena).st_size
        self.arena = mmap.mmap(arena, self.arena_bytes)
        os.close(arena)
        attached = self.ask(Attach, Namespace.parse(namespace), (), True, -1)
        assert isinstance(attached, Attached), attached
        self.namespace_id, self.digest = attached.namespace_id, attached.digest
        return self

    # -------------------------------------------------------------- the client's file

    @property
    def head(self) -> int:
        """Records written."""
        return int(self.words[HEAD_OFFSET // 8])

    @head.setter
    def head(self, value: int) -> None:
        self.words[HEAD_OFFSET // 8] = value

    @property
    def consumed(self) -> int:
        """Records that the daemon says it dealt with."""
        return int(self.words[CONSUMED_OFFSET // 8])

    @property
    def over(self) -> bool:
        """Whether the daemon ended the session."""
        return int(self.words[STATE_OFFSET // 8]) == ClientState.OVER

    def write(self, number: int, record: bytes) -> None:
        """Write a ring record without publishing it."""
        at = RING_OFFSET + number % RING_RECORDS * RING_RECORD_BYTES
        self.file[at : at + RING_RECORD_BYTES] = record.ljust(RING_RECORD_BYTES, b"\0")

    def push(
        self,
        kind: int,
        *,
        following: int = 0,
        named: int = 0,
        part: int = 0,
        namespace: int | None = None,
        asked: int = 0,
        hits: int = 0,
        slot: int = 0,
        sequence: int = 0,
        access: int = 0,
        nbytes: int = 0,
        later: int = 0,
        keys: bytes = b"",
    ) -> int:
        """Publish one record, and the keys behind it; its number."""
        number = self.head
        namespace = self.namespace_id if namespace is None else namespace
        fields = (kind, following, named, part, namespace, asked, hits, slot, sequence, access, 0, nbytes, later)
        self.write(number, RECORD.pack(*fields))
        count = 1
        for at in range(0, len(keys), RING_RECORD_BYTES):
            self.write(number + count, keys[at : at + RING_RECORD_BYTES])
            count += 1
        self.head = number + count
        return number

    def ring(self) -> None:
        """Wake the daemon."""
        fd = os.open(self.doorbell, os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        os.write(fd, b"!")
        os.close(fd)

    def drained(self) -> None:
        """Have the daemon deal with everything published; the session goes on."""
        assert isinstance(self.ask(Ping), Done)
        assert self.consumed == self.head

    def answer(self, number: int) -> tuple[PutStatus, Reason]:
        """What became of a commit."""
        at = ANSWER_OFFSET + 2 * (number % RING_RECORDS)
        return PutStatus(self.file[at]), Reason(self.file[at + 1])

    # -------------------------------------------------------------- slots

    def reserve(self, record_bytes: int, lane: int = 0) -> Reserved:
        """Ask for slots ahead."""
        reserved = self.ask(Reserve, record_bytes, lane)
        assert isinstance(reserved, Reserved), reserved
        return reserved

    def claim(self, lane: int = 0) -> int:
        """Take a granted slot out of a lane, 0 where there is none; its size is ``claimed_bytes``."""
        at = LANE_OFFSET + lane * LANE_BYTES
        head, tail = int(self.words[at // 8]), int(self.words[(at + LANE_TAIL) // 8])
        grant = 0
        for _ in range(LANE_GRANTS):  # not up to ``head``, into which tests write anything
            if grant or tail >= head:
                break
            place = GRANT_OFFSET // 8 + lane * LANE_GRANTS + tail % LANE_GRANTS
            grant = int(self.words[place])
            self.words[place] = 0
            tail += 1
        self.words[(at + LANE_TAIL) // 8] = tail
        self.claimed_bytes = (grant >> GRANT_PAGES_SHIFT) * PAGE_BYTES
        return grant & GRANT_SLOT_MASK

    def fill(self, slot: int, slot_bytes: int, header: bytes, payload: bytes) -> None:
        """Write a record into a slot."""
        at = slot * PAGE_BYTES
        self.arena[at : at + slot_bytes] = (header + payload)[:slot_bytes].ljust(slot_bytes, b"\0")

    def close(self) -> None:
        """Drop everything without a word."""
        if hasattr(self, "file"):
            # The mappings go with the last array of them.
            del self.words, self.file, self.arena
            os.close(self._fd)
        super().close()
