"""Faults of operations on files, for the twin of the SSD directory and for a real daemon with wrapped files."""

from __future__ import annotations

from dataclasses import dataclass

CHANGING = ("write", "format", "truncate", "append", "create", "rename", "remove")
"""Last words of operations that a read-only file system refuses."""


@dataclass
class Fault:
    """Operations that fail.

    Attributes:
        op: their name, or the last word of it (``sync`` is all three).
        number: of the error.
        name: of the file, "" for any.
        start, end: only transfers that touch these bytes.
        passes: let so many through first.
        times: then fail so many.
    """

    op: str
    number: int
    name: str = ""
    start: int = 0
    end: int = 1 << 62
    passes: int = 0
    times: int = 1 << 62

    def strikes(self, op: str, name: str, start: int, end: int) -> bool:
        """Whether it hits this operation; counts it."""
        if op != self.op and op.rpartition("_")[2] != self.op:
            return False
        if (self.name and name != self.name) or end <= self.start or start >= self.end:
            return False
        if self.passes:
            self.passes -= 1
            return False
        self.times -= 1
        return self.times >= 0
