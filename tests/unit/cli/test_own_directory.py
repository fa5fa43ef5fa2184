"""Directories of a command's own: gone with it, wherever an interrupt comes."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from kvstore.cli import own_directory as module
from kvstore.cli.own_directory import fresh_path, own_directory


@pytest.fixture
def at_exit(monkeypatch: pytest.MonkeyPatch) -> list[Callable[[], object]]:
    """What this process was asked to do when it exits."""
    asked: list[Callable[[], object]] = []
    monkeypatch.setattr(module.atexit, "register", asked.append)
    monkeypatch.setattr(module.atexit, "unregister", asked.remove)
    return asked


def test_own_directory_is_private_and_gone_with_its_content(tmp_path: Path, at_exit: list[Callable[[], object]]):
    path = fresh_path("kvstore-x-", tmp_path)
    assert path.name.startswith("kvstore-x-")
    assert path != fresh_path("kvstore-x-", tmp_path)
    with own_directory(path) as made:
        assert made == path
        assert path.stat().st_mode & 0o777 == 0o700
        (path / "deep").mkdir()
        (path / "deep" / "file").write_text("x")
    assert not path.exists()
    assert not at_exit


def test_a_directory_that_is_there_already_is_refused_and_kept(tmp_path: Path, at_exit: list[Callable[[], object]]):
    (tmp_path / "file").write_text("somebody's")
    with pytest.raises(FileExistsError), own_directory(tmp_path):
        pass
    assert (tmp_path / "file").read_text() == "somebody's"
    assert not at_exit


def interrupting(line_event: int) -> Callable[[FrameType, str, Any], Any]:
    """A trace function that raises KeyboardInterrupt before the so-manieth line of ours or of shutil's."""
    files = {module.__file__, shutil.__file__}
    lines = 0

    def trace(frame: FrameType, event: str, argument: Any) -> Any:
        nonlocal lines
        if frame.f_code.co_filename not in files:
            return None
        if event == "line":
            lines += 1
            if lines == line_event:
                raise KeyboardInterrupt
        return trace

    return trace


def interrupted(path: Path, line_event: int) -> bool:
    """Use a directory at ``path``; whether the interrupt came."""
    before = sys.gettrace()
    sys.settrace(interrupting(line_event))
    try:
        with own_directory(path):
            (path / "file").write_text("x")
    except (KeyboardInterrupt, OSError):  # rmtree interrupted before it notes that it closed: EBADF on the second close
        return True
    finally:
        sys.settrace(before)
    return False


def test_an_interrupt_before_any_line_leaves_no_directory(tmp_path: Path, at_exit: list[Callable[[], object]]):
    line_event = 1
    while interrupted(fresh_path(f"{line_event}-", tmp_path), line_event):
        for function in at_exit:
            function()
        at_exit.clear()
        assert not list(tmp_path.iterdir()), f"left by an interrupt before line event {line_event}"
        line_event += 1
    assert line_event > 20
    assert not list(tmp_path.iterdir())
