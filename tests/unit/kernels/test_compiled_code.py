"""Packages share the way in which compiled code is kept, and nothing of what is kept."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest

from kvstore_kernels.compiled import CodeCache

_SCRIPT = """
import sys
sys.path.insert(0, sys.argv[1])
import logging
from pathlib import Path
from kvstore_kernels.compiled import CodeCache
from {package}.callee import CODE, double

@CODE.compiled_when_called
def run(number):
    return double(number)

print(run(21), run(1.5))
print(CODE.directory)
print(sum(run._cache_hits.values()))
"""


def make_package(parent: Path, name: str) -> Path:
    package = parent / name
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "callee.py").write_text(
        "import logging\nfrom pathlib import Path\nfrom kvstore_kernels.compiled import CodeCache, inlined\n"
        "CODE = CodeCache(Path(__file__).parent, 'is a test', logging.getLogger('test'))\n"
        "@inlined\ndef double(number):\n    return number * 2\n"
    )
    return package


def run(parent: Path, package: str) -> tuple[str, str, int]:
    script = parent / f"{package}_script.py"
    script.write_text(_SCRIPT.format(package=package))
    done = subprocess.run(
        [sys.executable, str(script), str(parent)],
        env=os.environ | {"KVSTORE_CACHE_DIR": str(parent / "kept"), "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    results, directory, hits = done.stdout.splitlines()
    return results, directory, int(hits)


def test_code_is_compiled_for_each_set_of_types_and_a_change_of_one_package_leaves_the_other_alone(
    tmp_path: Path,
) -> None:
    one, _ = make_package(tmp_path, "one"), make_package(tmp_path, "two")
    results, first, hits = run(tmp_path, "one")
    assert (results, hits) == ("42 3.0", 0)
    _, second, _ = run(tmp_path, "two")
    assert first != second
    callee = one / "callee.py"
    callee.write_text(callee.read_text().replace("number * 2", "number * 3"))
    results, changed, hits = run(tmp_path, "one")
    assert (results, hits) == ("63 4.5", 0)
    assert changed not in (first, second)
    assert run(tmp_path, "two") == ("42 3.0", second, 2)


def test_old_versions_of_a_package_are_removed_and_those_of_others_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = tmp_path / "kept"
    monkeypatch.setenv("KVSTORE_CACHE_DIR", str(kept))
    logger = logging.getLogger("test")
    one, two = make_package(tmp_path, "one"), make_package(tmp_path, "two")
    other = CodeCache(two, "is a test", logger).directory
    for version in range(8):
        (one / "callee.py").write_text(f"# version {version}\n")
        newest = CodeCache(one, "is a test", logger).directory
        assert newest is not None
        os.utime(newest, (version, version))
    names = {path.name for path in kept.iterdir()}
    assert other is not None
    assert {other.name, newest.name} <= names
    assert len(names) == 6


def test_interrupt_while_something_is_compiled_is_raised_afterwards(tmp_path: Path) -> None:
    """Within the compiler it would leave its lock taken, or memory freed twice."""
    script = """
import logging, os, signal
from pathlib import Path
import numba
import kvstore_kernels.compiled as compiled

finished = []

class Pass(numba.core.compiler.CompilerBase):
    def define_pipelines(self):
        os.kill(os.getpid(), signal.SIGINT)
        made = numba.core.compiler.DefaultPassBuilder.define_nopython_pipeline(self.state)
        finished.append(True)
        return [made]

code = compiled.CodeCache(Path(compiled.__file__).parent, "is tried", logging.getLogger())
function = code.compiled_when_called(lambda x: x + 1)
function._compiler.pipeline_class = Pass
try:
    function(1)
except KeyboardInterrupt:
    assert finished
else:
    raise SystemExit("no interrupt")
assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
assert function(1) == 2
"""
    run = subprocess.run([sys.executable, "-c", script], env={**os.environ, "KVSTORE_CACHE_DIR": str(tmp_path)})
    assert run.returncode == 0
