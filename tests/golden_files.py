"""Reads the golden files of ``tests/compat/golden``: frames as hex, ``#`` begins a comment, blank lines part frames.

A file that was part of a release is never changed: it is what peers in the field send, and what disks and memory
hold. A new version of a format gets files of its own.
"""

from __future__ import annotations

from pathlib import Path

GOLDEN = Path(__file__).parent / "compat" / "golden"
LINE_BYTES = 32


def parse_hex(text: str) -> list[bytes]:
    """The frames in a text."""
    frames: list[str] = [""]
    for line in text.splitlines():
        digits = "".join(line.partition("#")[0].split())
        if digits:
            frames[-1] += digits
        elif not line.strip() and frames[-1]:
            frames.append("")
    return [bytes.fromhex(digits) for digits in frames if digits]


def format_hex(frames: list[bytes], comments: list[str]) -> str:
    """Inverse of ``parse_hex``, with a comment above each frame."""
    paragraphs = []
    for frame, comment in zip(frames, comments, strict=True):
        lines = [frame[at : at + LINE_BYTES].hex() for at in range(0, len(frame), LINE_BYTES)]
        paragraphs.append("\n".join([f"# {comment}", *lines]))
    return "\n\n".join(paragraphs) + "\n"


def golden(name: str) -> list[bytes]:
    """The frames of a golden file, named without ``.hex``."""
    return parse_hex((GOLDEN / f"{name}.hex").read_text(encoding="ascii"))


def golden_names(folder: str) -> set[str]:
    """All golden files below a folder."""
    return {path.relative_to(GOLDEN).with_suffix("").as_posix() for path in (GOLDEN / folder).rglob("*.hex")}
