"""``kvstore verify --ssd DIR``: what it says of whole and damaged directories, what it changes, and what it repairs."""

from __future__ import annotations

import io
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import pytest
from forked_daemons import Nursery
from ssd_daemon import SLAB_BYTES, SLOT_BYTES, SsdDaemon, found_blocks, key_of, put_durable, slots_of

from kvstore.cli.main import _run
from kvstore.format.ssd_files import SLABS_MAGIC

BLOCKS = range(12)
HEADER_BYTES = 4096


def kvstore(*arguments: str) -> tuple[int, str, str]:
    """Exit status, stdout and stderr of the command, which runs in this process."""
    with redirect_stdout(io.StringIO()) as out, redirect_stderr(io.StringIO()) as error:
        status = _run(list(arguments), debug=False)
    return status, out.getvalue(), error.getvalue()


def report(directory: Path, *arguments: str) -> tuple[int, dict[str, Any]]:
    status, out, error = kvstore("verify", "--ssd", str(directory), "--json", *arguments)
    assert out, error
    found: dict[str, Any] = json.loads(out)
    return status, found


def content(directory: Path) -> dict[str, bytes]:
    return {name: (directory / name).read_bytes() for name in sorted(os.listdir(directory))}


def slot_of(directory: Path, number: int) -> int:
    """Offset of a block's record in the slab file, by its key."""
    (slot,) = slots_of((directory / "slabs").read_bytes())[key_of(number)]
    return slot


def flip(path: Path, offset: int) -> None:
    with open(path, "r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 0x10]))


@pytest.fixture(scope="module")
def nursery() -> Iterator[Nursery]:
    with Nursery() as nursery:
        yield nursery


@pytest.fixture(scope="module")
def made(nursery: Nursery, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory in which a daemon, which is ended, stored blocks durably."""
    with SsdDaemon(nursery, tmp_path_factory.mktemp("made")) as daemon:
        with daemon.client() as client:
            put_durable(client, BLOCKS)
        daemon.terminate()
    return daemon.ssd


@pytest.fixture
def ssd(made: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return Path(shutil.copytree(made, tmp_path / "ssd"))


def test_a_whole_directory(ssd: Path) -> None:
    before = content(ssd)
    status, found = report(ssd)
    assert (status, found["problems"], found["dropped"], found["repaired"]) == (0, [], 0, False)
    assert (found["records"], found["blocks"], found["namespaces"]) == (len(BLOCKS), len(BLOCKS), 1)
    assert found["slabs"] * found["slab_bytes"] == found["free_bytes"] + len(BLOCKS) * SLOT_BYTES
    assert found["slabs"] * found["slab_bytes"] + HEADER_BYTES == (ssd / "slabs").stat().st_size
    status, out, error = kvstore("verify", "--ssd", str(ssd))
    assert (status, error) == (0, "")
    assert "records read" in out
    assert "none" in out
    assert content(ssd) == before


def test_a_daemon_has_it(nursery: Nursery, tmp_path: Path) -> None:
    with SsdDaemon(nursery, tmp_path) as daemon, daemon.client() as client:
        put_durable(client, [1])
        for more in ((), ("--repair",)):
            status, out, error = kvstore("verify", "--ssd", str(daemon.ssd), *more)
            assert (status, out) == (1, "")
            assert f"in use by another daemon (pid {daemon.pid})" in error
            assert "'kvstore verify' without --ssd" in error
        assert client.verify().problems == []
        assert client.verify().records >= 1


def test_damage_is_found_then_repaired(ssd: Path, nursery: Nursery, tmp_path: Path) -> None:
    hurt = {2: 300, 5: 13_000, 9: SLOT_BYTES - 1}
    slots = {number: slot_of(ssd, number) for number in hurt}
    for number, offset in hurt.items():
        flip(ssd / "slabs", slots[number] + offset)
    before = content(ssd)
    status, found = report(ssd)
    assert (status, found["dropped"], found["repaired"], found["records"]) == (1, 3, False, len(BLOCKS))
    for number in hurt:
        assert sum(key_of(number).hex() in problem for problem in found["problems"]) == 1, found["problems"]
    assert len(found["problems"]) == 3
    assert content(ssd) == before
    status, out, _ = kvstore("verify", "--ssd", str(ssd))
    assert status == 1
    assert "--repair" in " ".join(out.split())

    status, found = report(ssd, "--repair")
    assert (status, found["dropped"], found["repaired"], len(found["problems"])) == (1, 3, True, 3)
    status, found = report(ssd)
    assert (status, found["problems"], found["records"], found["logs"]) == (0, [], len(BLOCKS) - 3, 1)
    assert found["checkpoint_bytes"] > 0
    # The records are over for good, even where their bytes are whole again.
    for number, offset in hurt.items():
        flip(ssd / "slabs", slots[number] + offset)
    with SsdDaemon(nursery, tmp_path) as daemon, daemon.client() as client:
        assert found_blocks(client, BLOCKS) == [number for number in BLOCKS if number not in hurt]
        put_durable(client, hurt)
        assert client.verify().problems == []


def test_a_torn_log_is_a_note_and_a_broken_one_a_problem(ssd: Path) -> None:
    log = max(ssd.glob("log-*"))
    whole = log.read_bytes()
    log.write_bytes(whole[:-10])
    status, found = report(ssd)
    assert (status, found["problems"]) == (0, [])
    assert any("cut there" in note for note in found["notes"])
    log.write_bytes(whole)
    flip(log, 64 + 40)
    status, found = report(ssd)
    assert status == 1
    assert any(log.name in problem for problem in found["problems"])
    status, found = report(ssd, "--repair")
    assert (status, found["repaired"]) == (1, True)
    assert report(ssd)[0] == 0


def test_records_behind_the_end_are_a_problem(ssd: Path) -> None:
    slots = sorted(slot_of(ssd, number) for number in BLOCKS)
    first = (slots[0] - HEADER_BYTES) // SLAB_BYTES
    end = HEADER_BYTES + (first + 1) * SLAB_BYTES
    left = sum(slot < end for slot in slots)
    os.truncate(ssd / "slabs", end)
    status, found = report(ssd)
    assert status == 1
    behind = [problem for problem in found["problems"] if "behind the end of the slab file" in problem]
    assert len(behind) == found["dropped"] == len(BLOCKS) - left > 0
    assert report(ssd, "--repair")[0] == 1
    status, found = report(ssd)
    assert (status, found["records"], found["slabs"]) == (0, left, first + 1)


def test_what_is_no_store_is_refused(tmp_path: Path, ssd: Path) -> None:
    def refusal(*arguments: str) -> str:
        status, out, error = kvstore("verify", *arguments)
        assert (status, out) == (2, "")
        assert error.startswith("kvstore: error: ")
        assert error.count("\n") == 1
        return error

    assert "there is no directory" in refusal("--ssd", str(tmp_path / "nothing"))
    assert not (tmp_path / "nothing").exists()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "letter").write_text("mine")
    for more in ((), ("--repair",)):
        assert "holds no SSD tier" in refusal("--ssd", str(tmp_path / "other"), *more)
    assert os.listdir(tmp_path / "other") == ["letter"]
    assert "--repair goes with --ssd" in refusal("--repair")
    assert "--ssd takes no --timeout" in refusal("--ssd", str(tmp_path), "--timeout", "3")
    assert "--stress takes no --ssd" in refusal("--stress", "30", "--ssd", str(tmp_path))

    with open(ssd / "slabs", "r+b") as file:
        assert file.read(8) == SLABS_MAGIC
        file.write(b"\x63")
    assert "is of format 99" in refusal("--ssd", str(ssd), "--repair")
