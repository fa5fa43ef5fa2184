"""What the layout promises: no package collides, imports stay light, pins are complete, import directions hold.

Every check of an import happens in a fresh interpreter, since this one has loaded whatever other tests needed.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
PACKAGES = (ROOT / "kvstore", ROOT / "kernels" / "kvstore_kernels", ROOT / "client" / "kvstore_client")
IGNORED = shutil.ignore_patterns("__pycache__", "*.pyc", "*.egg-info")


def load_pyproject() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def source_paths(root: Path) -> str:
    return os.pathsep.join(str(root / folder) for folder in (".", "kernels", "client"))


def modules_after(statement: str) -> set[str]:
    """Names of the modules that a fresh interpreter has loaded after a statement, and had not before it."""
    program = (
        "import json, sys\nbefore = set(sys.modules)\n"
        f"{statement}\nprint(json.dumps(sorted(set(sys.modules) - before)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=os.environ | {"PYTHONPATH": source_paths(ROOT)},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stdout))


def loaded_of(packages: set[str], modules: set[str]) -> list[str]:
    return sorted(name for name in modules if any(name == p or name.startswith(p + ".") for p in packages))


def lint_imports(root: Path) -> subprocess.CompletedProcess[str]:
    program = "from importlinter.cli import lint_imports_command; lint_imports_command(prog_name='lint-imports')"
    return subprocess.run(
        [sys.executable, "-c", program, "--no-cache", "--no-logo"],
        env=os.environ | {"PYTHONPATH": source_paths(root), "NO_COLOR": "1", "COLUMNS": "200"},
        cwd=root,
        capture_output=True,
        text=True,
        timeout=120,
    )


# ------------------------------------------------------------------ layout


@pytest.mark.parametrize("folder", ["kernels", "client", "tests", "configs"])
def test_top_folder_is_not_a_package(folder: str) -> None:
    """A package called ``kernels`` or ``client`` would collide with others' of the same name."""
    assert (ROOT / folder).is_dir()
    assert not (ROOT / folder / "__init__.py").exists()


def test_tests_hold_no_init_and_no_two_files_of_one_name() -> None:
    assert list((ROOT / "tests").rglob("__init__.py")) == []
    names = [path.name for path in (ROOT / "tests").rglob("test_*.py")]
    assert sorted(names) == sorted(set(names))


@pytest.mark.parametrize("package", PACKAGES, ids=lambda path: path.name)
def test_package_is_typed(package: Path) -> None:
    assert (package / "__init__.py").is_file()
    assert (package / "py.typed").is_file()


def test_wheel_lists_the_three_packages() -> None:
    listed = load_pyproject()["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]
    assert {ROOT / path for path in listed} == set(PACKAGES)


# ------------------------------------------------------------------ weight of imports


def test_kvstore_imported_loads_nothing_else() -> None:
    assert modules_after("import kvstore") == {"kvstore"}


def test_sdk_imported_and_every_name_used_stays_light() -> None:
    """An engine imports the SDK: it gets neither the daemon, nor what the daemon needs, nor a second torch."""
    modules = modules_after("import kvstore_client\nfor name in kvstore_client.__all__: getattr(kvstore_client, name)")
    daemon = {f"kvstore.{name}" for name in ("server", "core", "tiers", "policy", "cli", "observability", "settings")}
    heavy = {"torch", "transformers", "numba", "aiohttp", "uvloop", "pydantic", "typer", "rich", "prometheus_client"}
    assert "kvstore_client.client" in modules
    assert loaded_of(daemon | heavy, modules) == []


def test_loaded_of_given_a_heavy_module_finds_it() -> None:
    assert loaded_of({"email"}, modules_after("import email.message")) != []
    assert loaded_of({"mail"}, {"mailbox", "email"}) == []


# ------------------------------------------------------------------ pins


def pin_lines() -> list[str]:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    return [line for line in lines if not line.startswith("#")]


def pins() -> dict[str, str]:
    entries = (line.partition("==") for line in pin_lines())
    return {name: version for name, _, version in entries}


def declared() -> list[Requirement]:
    project = load_pyproject()
    groups = [
        project["build-system"]["requires"],
        project["project"]["dependencies"],
        *project["project"]["optional-dependencies"].values(),
    ]
    return [Requirement(text) for group in groups for text in group]


def test_constraints_are_exact_pins_normalised_sorted_and_once_each() -> None:
    entries = pin_lines()
    for entry in entries:
        assert re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*==[0-9][0-9a-z.]*", entry), entry
    assert entries == sorted(entries)
    assert len(pins()) == len(entries)


@pytest.mark.parametrize("requirement", declared(), ids=str)
def test_declared_dependency_is_pinned_to_a_version_it_allows(requirement: Requirement) -> None:
    version = pins()[canonicalize_name(requirement.name)]
    assert requirement.specifier.contains(version)


@pytest.mark.parametrize("name", ["pip", "editables"])
def test_installers_need_is_pinned(name: str) -> None:
    assert name in pins()


def test_everything_that_installed_dependencies_need_is_pinned() -> None:
    pinned = pins()
    unpinned: set[str] = set()
    seen: set[tuple[str, frozenset[str]]] = set()
    waiting = [(canonicalize_name(r.name), frozenset(r.extras)) for r in declared()]
    while waiting:
        name, extras = waiting.pop()
        if (name, extras) in seen:
            continue
        seen.add((name, extras))
        if name not in pinned:
            unpinned.add(name)
        try:
            needed = metadata.requires(name) or []
        except metadata.PackageNotFoundError:
            continue  # What builds the project need not be installed where it runs.
        for requirement in map(Requirement, needed):
            marker = requirement.marker
            if marker is None or any(marker.evaluate({"extra": extra}) for extra in (extras or {""})):
                waiting.append((canonicalize_name(requirement.name), frozenset(requirement.extras)))
    assert unpinned == set()


# ------------------------------------------------------------------ import directions


def test_import_contracts_of_the_tree_are_kept() -> None:
    done = lint_imports(ROOT)
    assert done.returncode == 0, done.stdout + done.stderr


BREAKS = {
    "kvstore/protocol/broken.py": "import kvstore.server",
    "client/kvstore_client/broken.py": "import kvstore.core",
    "kvstore/server/broken.py": "import kvstore_client",
    "kvstore/simulator/broken.py": "import kvstore.core",
    "kernels/kvstore_kernels/broken.py": "import kvstore",
    "kvstore/tiers/broken.py": "import aiofiles",
    "kvstore/observability/broken.py": "import kvstore_kernels.layout",
    "kvstore/transcode/broken.py": "import asyncio",
    "kvstore/core/broken.py": "import zmq",
    "client/kvstore_client/client.py": "import torch",
    "client/kvstore_client/views.py": "import kvstore_kernels.layout",
    "kvstore/mapped/broken.py": "import kvstore_kernels.layout",
    "client/kvstore_client/tensors/work.py": "import kvstore_client.integrations.versions",
}


def test_import_contracts_of_a_broken_copy_are_each_reported(tmp_path: Path) -> None:
    """The check above can fail: one forbidden import for each contract, and each contract names its own."""
    for package in PACKAGES:
        shutil.copytree(package, tmp_path / package.relative_to(ROOT), ignore=IGNORED)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    for path, statement in BREAKS.items():
        with (tmp_path / path).open("a", encoding="utf-8") as file:
            file.write(f"\n{statement}\n")

    done = lint_imports(tmp_path)

    assert done.returncode == 1, done.stdout + done.stderr
    contracts = [contract["name"] for contract in load_pyproject()["tool"]["importlinter"]["contracts"]]
    words = {name: r"\s+".join(map(re.escape, name.split())) for name in contracts}  # long names are wrapped
    broken = [name for name in contracts if re.search(words[name] + r"\s+BROKEN", done.stdout)]
    assert broken == contracts
