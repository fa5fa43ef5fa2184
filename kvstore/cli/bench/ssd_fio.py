"""fio, the baseline of the SSD tier: random requests of 1 MiB to a file of its own, past the page cache, 8 at once.

Covers: finding fio, writing its file through, running it, reading its report. Its file is written once before anything
is measured, so that neither the allocation of blocks nor unwritten extents are part of a figure.
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

import msgspec

from kvstore.errors import DeadlineExceeded, KVStoreError

__all__ = ["DEPTH", "REQUEST_BYTES", "Fio", "FioResult", "parse_fio", "why_not"]

DEPTH: Final = 8
"""Requests under way at once, and threads of the daemon's SSD tier."""

REQUEST_BYTES: Final = 1 << 20

_PROGRAM: Final = "fio"
_SLOWEST_BYTES_PER_S: Final = 20e6
_START_S: Final = 60.0
_TAIL_CHARACTERS: Final = 300

Pattern = Literal["randwrite", "randread"]


class _Side(msgspec.Struct):
    """What a job read, or wrote."""

    io_bytes: int
    runtime: float
    """Milliseconds."""


class _Job(msgspec.Struct):
    error: int
    read: _Side
    write: _Side


class _Output(msgspec.Struct):
    """Of fio's report what is used here."""

    jobs: list[_Job]


@dataclass(frozen=True, slots=True)
class FioResult:
    """One run.

    Attributes:
        io_bytes: moved.
        seconds: from the first request to the last answer.
    """

    io_bytes: int
    seconds: float

    @property
    def bytes_per_s(self) -> float:
        """What it reached."""
        return self.io_bytes / self.seconds


def why_not() -> str:
    """Why fio cannot be run, "" where it can."""
    return "" if shutil.which(_PROGRAM) else "fio is not installed (Debian and Ubuntu: apt install fio)"


class Fio:
    """fio on a file in a directory; making it writes the file through.

    Args:
        directory: on the file system that is measured.
        size_bytes: of the file.

    Attributes:
        version: of fio.

    Raises:
        KVStoreError: fio is not installed, or cannot write there.
    """

    def __init__(self, directory: Path, size_bytes: int) -> None:
        missing = why_not()
        if missing:
            raise KVStoreError(f"{missing}; the SSD tier is measured beside it")
        self._path = directory / "fio.dat"
        self._size_bytes = size_bytes
        self.version = _run(["--version"], _START_S).strip()
        _run(self._job("write", size_bytes, "--end_fsync=1"), _START_S + size_bytes / _SLOWEST_BYTES_PER_S)

    def run(self, pattern: Pattern, io_bytes: int) -> FioResult:
        """Write or read so many bytes at random places, none twice.

        Raises:
            KVStoreError: fio failed, or moved other bytes than it was told to.
        """
        output = _run(self._job(pattern, io_bytes), _START_S + io_bytes / _SLOWEST_BYTES_PER_S)
        result = parse_fio(output, pattern)
        if result.io_bytes != io_bytes:
            raise KVStoreError(f"fio moved {result.io_bytes} of {io_bytes} bytes; give whole MiB, at most its file's")
        return result

    def _job(self, pattern: str, io_bytes: int, *more: str) -> list[str]:
        return [
            "--name=kvstore",
            f"--filename={self._path}",
            f"--size={self._size_bytes}",
            f"--io_size={io_bytes}",
            f"--rw={pattern}",
            f"--bs={REQUEST_BYTES}",
            "--ioengine=libaio",
            f"--iodepth={DEPTH}",
            "--direct=1",
            "--randrepeat=0",
            "--output-format=json",
            *more,
        ]


def parse_fio(output: str, pattern: Pattern) -> FioResult:
    """The result in what ``fio --output-format=json`` printed, which may begin with notes.

    Raises:
        KVStoreError: it is no report, or one of a failure.
    """
    try:
        report = msgspec.json.decode(output[max(output.find("{"), 0) :], type=_Output)
        (job,) = report.jobs
    except (msgspec.DecodeError, ValueError):
        raise KVStoreError(f"fio printed no report of one job: {_tail(output)}") from None
    if job.error:
        raise KVStoreError(f"fio failed with error {job.error}: {_tail(output[: output.find('{')])}")
    side = job.read if pattern == "randread" else job.write
    if side.io_bytes <= 0 or side.runtime <= 0:
        raise KVStoreError(f"fio moved {side.io_bytes} bytes in {side.runtime:g} ms: give it more to do")
    return FioResult(side.io_bytes, side.runtime / 1e3)


def _run(arguments: Sequence[str], timeout_s: float) -> str:
    try:
        done = subprocess.run(
            [_PROGRAM, *arguments], stdin=subprocess.DEVNULL, capture_output=True, timeout=timeout_s, check=False
        )
    except subprocess.TimeoutExpired:
        raise DeadlineExceeded(f"fio did not end within {timeout_s:.0f} s: is the disk in order?") from None
    except OSError as error:
        raise KVStoreError(f"fio cannot be run: {error.strerror}") from None
    output = done.stdout.decode("utf-8", "replace")
    if done.returncode:
        said = done.stderr.decode("utf-8", "replace") or output
        raise KVStoreError(f"fio ended with code {done.returncode}: {_tail(said)}")
    return output


def _tail(text: str) -> str:
    """The end of what fio said, in one line."""
    return " ".join(text.split())[-_TAIL_CHARACTERS:] or "it said nothing"
