from __future__ import annotations

import importlib.metadata
import subprocess
import sys

import pytest

from kvstore.errors import KVStoreError, UnsupportedEngine
from kvstore_client.integrations import versions


def installed(monkeypatch: pytest.MonkeyPatch, **found: str) -> None:
    def version(name: str) -> str:
        if name not in found:
            raise importlib.metadata.PackageNotFoundError(name)
        return found[name]

    monkeypatch.setattr(versions, "version", version)


def ask() -> str:
    return versions.require("the test", ("engine", "engine_cpu"), at_least="0.32", below="0.34")


@pytest.mark.parametrize("found", ["0.32", "0.32.0", "0.33.9", "0.33.0+cpu", "v0.32.1", "0.33.0rc1", "0.32.0.post2"])
def test_takes_versions_in_the_range(monkeypatch: pytest.MonkeyPatch, found: str) -> None:
    installed(monkeypatch, engine=found)
    assert ask() == found


@pytest.mark.parametrize("found", ["0.31.9", "0.34", "0.34.0.dev1", "1.0", "0.3", "2026.1", "unknown"])
def test_names_the_version_that_is_wrong_and_the_range(monkeypatch: pytest.MonkeyPatch, found: str) -> None:
    installed(monkeypatch, engine=found)
    with pytest.raises(UnsupportedEngine) as raised:
        ask()
    message = str(raised.value)
    assert f"engine {found} is installed" in message
    assert "engine>=0.32,<0.34" in message
    assert "\n" not in message


def test_looks_for_other_builds_of_the_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    installed(monkeypatch, engine_cpu="0.32.0")
    assert ask() == "0.32.0"


def test_says_how_to_install_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    installed(monkeypatch)
    with pytest.raises(UnsupportedEngine, match=r"pip install 'engine>=0.32,<0.34'") as raised:
        ask()
    assert isinstance(raised.value, ImportError)
    assert isinstance(raised.value, KVStoreError)


def test_the_sdk_imports_no_integration_and_no_engine() -> None:
    program = (
        "import sys, kvstore_client, kvstore_client.tensors, kvstore_client.integrations; "
        "print([name for name in sys.modules if name.partition('.')[0] in "
        "('torch', 'vllm', 'sglang', 'lmcache', 'transformers') or 'integrations.' in name])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
