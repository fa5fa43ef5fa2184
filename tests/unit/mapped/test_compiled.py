"""Compiled code is kept once a machine, where it can be, and is never served stale."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

_SCRIPT = """
import logging, sys, time
logging.basicConfig(level=logging.WARNING)
from kvstore.mapped.compiled import cache_directory, compiled

@compiled("int64(int64, int64)")
def add(left, right):
    return left + right

assert add(2, 3) == 5
try:
    add("two", "three")
except TypeError:
    pass
else:
    raise SystemExit("took text for numbers")
print(cache_directory())
print(sum(add._cache_hits.values()))
"""


def run(environment: dict[str, str], script: Path, uid: int | None = None) -> tuple[str, int, str]:
    """The directory that a fresh process kept its code in, how much it found there, and what it logged."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("KVSTORE_", "XDG_", "NUMBA_"))}
    done = subprocess.run(
        [sys.executable, str(script)],
        env=clean | {"PYTHONPATH": os.pathsep.join(sys.path)} | environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        user=uid,
    )
    assert done.returncode == 0, done.stderr
    directory, hits = done.stdout.split("\n")[:2]
    return directory, int(hits), done.stderr


@pytest.fixture
def script(tmp_path: Path) -> Path:
    path = tmp_path / "script.py"
    path.write_text(_SCRIPT)
    tmp_path.chmod(0o755)
    return path


def test_code_is_kept_in_the_named_directory_and_found_by_the_next_process(tmp_path: Path, script: Path) -> None:
    environment = {"KVSTORE_CACHE_DIR": str(tmp_path / "named")}
    directory, hits, _ = run(environment, script)
    assert directory.startswith(str(tmp_path / "named") + os.sep)
    assert hits == 0
    assert run(environment, script)[:2] == (directory, 1)


@pytest.mark.parametrize("ending", [".nbi", ".nbc"])
@pytest.mark.parametrize("length", [0, 10, -1])
def test_damaged_file_of_kept_code_is_compiled_again_and_replaced(
    tmp_path: Path, script: Path, ending: str, length: int
) -> None:
    environment = {"KVSTORE_CACHE_DIR": str(tmp_path / "named")}
    directory, _, _ = run(environment, script)
    damaged = next(Path(directory).rglob(f"*{ending}"))
    damaged.write_bytes(damaged.read_bytes()[:length])
    _, hits, log = run(environment, script)
    assert hits == 0
    assert "could not be read" in log
    _, hits, log = run(environment, script)
    assert (hits, log) == (1, "")


def test_code_is_kept_under_the_home_where_nothing_is_named(tmp_path: Path, script: Path) -> None:
    directory, _, _ = run({"HOME": str(tmp_path / "home")}, script)
    assert directory.startswith(str(tmp_path / "home/.cache/kvstore") + os.sep)
    xdg, _, _ = run({"HOME": str(tmp_path / "home"), "XDG_CACHE_HOME": str(tmp_path / "xdg")}, script)
    assert xdg.startswith(str(tmp_path / "xdg/kvstore") + os.sep)


def test_code_read_only_home_goes_to_the_temporary_folder(tmp_path: Path, script: Path) -> None:
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    directory, _, _ = run({"HOME": "/proc/nowhere", "TMPDIR": str(temporary)}, script)
    assert directory.startswith(str(temporary / f"kvstore-{os.geteuid()}") + os.sep)
    assert not (temporary / f"kvstore-{os.geteuid()}").stat().st_mode & 0o077


def test_code_temporary_folder_that_others_can_write_to_is_not_trusted(tmp_path: Path, script: Path) -> None:
    temporary = tmp_path / "tmp"
    (temporary / f"kvstore-{os.geteuid()}").mkdir(parents=True)
    (temporary / f"kvstore-{os.geteuid()}").chmod(0o777)
    directory, hits, log = run({"HOME": "/proc/nowhere", "TMPDIR": str(temporary)}, script)
    assert directory == "None"
    assert hits == 0
    assert "KVSTORE_CACHE_DIR" in log


def test_code_of_changed_sources_lies_elsewhere(tmp_path: Path) -> None:
    import kvstore.mapped.compiled as module

    sources = Path(module.__file__).parent
    copied = tmp_path / "kvstore" / "mapped"
    copied.mkdir(parents=True)
    for name in ("__init__.py", "compiled.py", "context.py"):
        (copied / name).write_bytes((sources / name).read_bytes())
    (tmp_path / "kvstore" / "__init__.py").write_text("")
    script = tmp_path / "script.py"
    script.write_text("from kvstore.mapped.compiled import cache_directory; print(cache_directory()); print(0)")
    script.write_text(f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n" + script.read_text())
    environment = {"KVSTORE_CACHE_DIR": str(tmp_path / "named")}
    before = run(environment, script)[0]
    assert run(environment, script)[0] == before
    (copied / "context.py").write_text("# changed\n")
    assert run(environment, script)[0] != before
