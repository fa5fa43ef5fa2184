"""What the README shows works as it stands there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from daemon_process import DaemonProcess
from typer.testing import CliRunner

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_readme_example_stores_and_finds_blocks(daemon: DaemonProcess, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("KVSTORE_ENDPOINT", daemon.endpoint)
    (example,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    blocks = 5
    payloads = [bytes([number]) * 5000 for number in range(blocks)]
    variables = {
        "prompt_tokens": list(range(blocks * 64 + 3)),
        "buffers": [bytearray(5000) for _ in range(blocks)],
        "payloads": payloads,
    }
    exec(compile(example, "README.md", "exec"), variables)
    assert len(variables["match"]) == 0
    exec(compile(example, "README.md", "exec"), variables)
    assert len(variables["match"]) == blocks
    assert variables["buffers"] == payloads


def test_readme_names_only_commands_files_and_links_that_exist():
    from kvstore.cli.main import app

    runner = CliRunner()
    commands = {line.split("#")[0].split()[1] for line in README.splitlines() if line.startswith("kvstore ")}
    assert commands >= {"serve", "stats", "replay", "verify", "bench"}
    for command in commands:
        assert runner.invoke(app, [command, "--help"]).exit_code == 0, command
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert (ROOT / target).exists(), target
    for script in re.findall(r"^scripts/\w+", README, re.MULTILINE):
        assert (ROOT / script).stat().st_mode & 0o111, script
