"""Encodes and writes lookups in a thread, so that neither costs the event loop anything.

Covers: files of bounded size, of which the oldest go, and the end where the device is full or fails, or where somebody
removes the file that is written. Does not cover: which lookups there were, see ``kvstore.server.recorder``.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Sequence
from typing import Final

from kvstore.format.lookup_trace import SALT_BYTES, Lookup, LookupEncoder, LookupFileHeader, encode_header
from kvstore.tiers.recordings import RECORDING_SUFFIX, RecordingDirectory, RecordingFile

__all__ = ["RecordingWriter"]

_FRAME_BYTES: Final = 64 << 10
"""A frame is closed when it has so many bytes, and when nothing more waits."""

_MOST_WAITING_BLOCKS: Final = 1 << 18
_END: Final = None

_LOOK_S: Final = 5.0
"""While nothing is written, the file is looked for so often."""


class _FileGone(Exception):
    """What is written is lost: its name leads to another file, or to none."""


class RecordingWriter:
    """One recording, from its first file to its end.

    Args:
        directory: for its files; others in there count for ``max_bytes``, and the oldest of them go first.
        recording: 16 bytes that name it.
        salt: see ``LookupEncoder``.
        started_unix_ns: when it begins.
        max_bytes: of all recordings in the directory.
        dram_bytes: capacity of the daemon's memory, for the header.
        files: of which so many share ``max_bytes`` evenly; each must hold a request of as many blocks as there may be.

    Attributes:
        written_bytes, written_lookups, written_blocks: so far.
        failure: why it ended by itself, "" while it did not.
        file: name of the current file; of one that is gone the last one that is left, "" where none is.
    """

    def __init__(
        self,
        directory: RecordingDirectory,
        *,
        recording: bytes,
        salt: bytes,
        started_unix_ns: int,
        max_bytes: int,
        files: int,
        dram_bytes: int = 0,
    ) -> None:
        assert len(salt) == SALT_BYTES
        self.written_bytes = 0
        self.written_lookups = 0
        self.written_blocks = 0
        self.failure = ""
        self.file = ""
        self._directory = directory
        self._recording = recording
        self._salt = salt
        self._started_unix_ns = started_unix_ns
        self._max_bytes = max_bytes
        self._file_bytes = max_bytes // files
        self._dram_bytes = dram_bytes
        self._sequence = 0
        self._open: RecordingFile | None = None
        self._encoder = LookupEncoder(salt)
        self._framed: list[Lookup] = []
        self._queue: queue.SimpleQueue[Sequence[Lookup] | None] = queue.SimpleQueue()
        # Blocks that were put in, by the loop alone, and taken out, by the thread alone.
        self._put_blocks = 0
        self._taken_blocks = 0
        self._thread = threading.Thread(target=self._run, name="kvstore-recording", daemon=True)

    def start(self) -> None:
        """Make the first file and begin.

        Raises:
            OSError: it cannot be made.
        """
        self._next_file()
        self._thread.start()

    def put(self, lookups: Sequence[Lookup]) -> bool:
        """Hand over lookups; never waits. False: too much waits already, or it failed; they are not written."""
        blocks = sum(len(lookup.keys) for lookup in lookups)
        if self.failure or self._put_blocks - self._taken_blocks + blocks > _MOST_WAITING_BLOCKS:
            return False
        self._put_blocks += blocks
        self._queue.put(lookups)
        return True

    def end(self) -> None:
        """Have everything written that was put, and then no more; does not wait."""
        self._queue.put(_END)

    def join(self, timeout_s: float) -> bool:
        """Wait for the end; False where it did not come in time."""
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _run(self) -> None:
        try:
            while self._write_next():
                pass
        except _FileGone as error:
            self.failure = str(error)
        except OSError as error:
            self.failure = f"cannot write {self.file}: {error.strerror or error}"
        except Exception as error:  # A defect of ours must not look like a recording that goes on.
            self.failure = f"internal error: {error!r}"
        finally:
            if self._open is not None:
                self._open.close()

    def _write_next(self) -> bool:
        """Write what was put; False at the end."""
        try:
            lookups = self._queue.get(timeout=_LOOK_S)
        except queue.Empty:
            self._look()
            return True
        if lookups is _END:
            self._write_frame()
            self._look()
            return False
        for lookup in lookups:
            self._encoder.add(lookup)
            self._framed.append(lookup)
            if self._encoder.waiting_bytes >= _FRAME_BYTES:
                self._write_frame()
        self._taken_blocks += sum(len(lookup.keys) for lookup in lookups)
        if self._queue.empty():
            self._write_frame()
        return True

    def _write_frame(self) -> None:
        if not self._framed:
            return
        assert self._open is not None
        self._look()
        frame = self._encoder.frame()
        if self._open.size_bytes + len(frame) > self._file_bytes:
            # The next file knows nothing of this one, so it is encoded anew.
            self._open.close()
            self._next_file()
            self._encoder = LookupEncoder(self._salt)
            for lookup in self._framed:
                self._encoder.add(lookup)
            frame = self._encoder.frame()
        self._open.append(frame)
        self.written_bytes += len(frame)
        self.written_lookups += len(self._framed)
        self.written_blocks += sum(len(lookup.keys) for lookup in self._framed)
        self._framed.clear()

    def _look(self) -> None:
        """Notice that somebody removed the file; else the recording would go on, and nobody could ever read it.

        Raises:
            _FileGone: it is gone.
        """
        assert self._open is not None
        if self._open.is_in_place():
            return
        left = [stored.name for stored in self._directory.stored() if stored.header.recording == self._recording]
        self.file = left[-1] if left else ""
        kept = (
            f"of the recording {left[0]} to {left[-1]} are left" if left else "nothing of the recording is left there"
        )
        raise _FileGone(f"{self._open.path} was removed or moved while it was written; {kept}")

    def _next_file(self) -> None:
        stored = self._directory.stored()
        total = sum(file.size_bytes for file in stored) + self._file_bytes
        for old in stored:
            if total <= self._max_bytes:
                break
            self._directory.remove(old.name)
            total -= old.size_bytes
        self.file = f"{self._recording.hex()[:12]}-{self._sequence:06d}{RECORDING_SUFFIX}"
        self._open = self._directory.create(self.file)
        header = encode_header(
            LookupFileHeader(self._recording, self._sequence, self._started_unix_ns, self._dram_bytes)
        )
        self._open.append(header)
        self.written_bytes += len(header)
        self._sequence += 1
