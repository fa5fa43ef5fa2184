"""What the README shows works as it stands there."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from daemon_process import DaemonProcess
from typer.testing import CliRunner

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
EXAMPLE, TENSORS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def test_readme_example_stores_and_finds_blocks(daemon: DaemonProcess, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("KVSTORE_ENDPOINT", daemon.endpoint)
    blocks = 5
    payloads = [bytes([number]) * 5000 for number in range(blocks)]
    variables = {
        "prompt_tokens": list(range(blocks * 64 + 3)),
        "buffers": [bytearray(5000) for _ in range(blocks)],
        "payloads": payloads,
    }
    exec(compile(EXAMPLE, "README.md", "exec"), variables)
    assert len(variables["match"]) == 0
    exec(compile(EXAMPLE, "README.md", "exec"), variables)
    assert len(variables["match"]) == blocks
    assert variables["buffers"] == payloads


def test_readme_example_with_tensors_loads_what_it_saved(daemon: DaemonProcess, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("KVSTORE_ENDPOINT", daemon.endpoint)
    blocks, pages_a_block, page_tokens = 3, 4, 16
    shape = (2, 2 * blocks * pages_a_block, page_tokens, 8, 128)
    numbers = np.random.default_rng(0).standard_normal(shape, np.float32)
    kv = (numbers.view(np.uint32) >> 16).astype(np.uint16)
    pages = np.arange(blocks * pages_a_block, dtype=np.int32).reshape(blocks, pages_a_block)
    variables = {
        "engine_tensors": [kv.copy() for _ in range(32)],
        "prompt_tokens": list(range(blocks * 64 + 3)),
        "pages": pages,
    }
    exec(compile(TENSORS, "README.md", "exec"), variables)
    assert (variables["hits"], variables["saved"].stored) == (0, blocks)
    variables["pages"] = pages + pages.size
    exec(compile(TENSORS, "README.md", "exec"), variables)
    assert (variables["hits"], variables["loaded"].loaded) == (blocks, blocks)
    assert variables["saved"].statuses == ()
    loaded = variables["engine_tensors"][7]
    decoded, original = (
        (loaded[:, half].astype(np.uint32) << 16).view(np.float32) for half in (slice(12, 24), slice(12))
    )
    assert not np.array_equal(decoded, original)
    assert np.abs(decoded - original).max() < 0.3


def test_readme_names_only_commands_files_and_links_that_exist():
    from kvstore.cli.main import app

    runner = CliRunner()
    commands = {line.split("#")[0].split()[1] for line in README.splitlines() if line.startswith("kvstore ")}
    assert commands >= {"serve", "stats", "replay", "verify", "bench", "codecs", "layout", "quality"}
    for command in commands:
        assert runner.invoke(app, [command, "--help"]).exit_code == 0, command
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert (ROOT / target).exists(), target
    for script in re.findall(r"^scripts/\w+", README, re.MULTILINE):
        assert (ROOT / script).stat().st_mode & 0o111, script
