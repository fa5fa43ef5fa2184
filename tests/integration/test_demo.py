"""The demo with real processes: a daemon, a transformer, and payloads that somebody altered."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

from kvstore.cli.demo_engine import EngineReport, EngineTask, Role, draw_prompts
from kvstore.cli.demo_model import MODEL_SHAPES
from kvstore.cli.demo_process import run_engine
from kvstore.cli.private_daemon import PrivateDaemon
from kvstore.errors import DeadlineExceeded, KVStoreError
from kvstore_client.tensors import TensorStore

if find_spec("torch") is None or find_spec("transformers") is None:
    pytest.skip("torch and transformers are not installed (the extra 'demo')", allow_module_level=True)

ROOT = Path(__file__).parents[2]
PROMPT_TOKENS, NEW_TOKENS, BLOCK_TOKENS, SEED = 256, 16, 16, 5
USABLE_TOKENS = PROMPT_TOKENS - BLOCK_TOKENS
PROCESS_S = 120.0


def task(role: Role, directory: Path, endpoint: str, model_size: str = "tiny") -> EngineTask:
    return EngineTask(
        role=role,
        model_size=model_size,
        model_directory=str(directory),
        seed=SEED,
        prompt_tokens=PROMPT_TOKENS,
        new_tokens=NEW_TOKENS,
        block_tokens=BLOCK_TOKENS,
        codec="raw",
        threads=1,
        expected=[],
        endpoint=endpoint,
        timeout_s=30.0,
    )


def alter_payloads(endpoint: str, report: EngineReport) -> int:
    """Put other KV under the keys of the report's prompt, in records that are right; how many."""
    shape = MODEL_SHAPES["tiny"]
    prompt, _ = draw_prompts(shape.vocabulary, PROMPT_TOKENS, SEED)
    layout = shape.layout(BLOCK_TOKENS)
    kv = np.zeros((*layout.shape[:2], PROMPT_TOKENS, *layout.shape[3:]), np.float32)
    named = report.namespace
    assert named is not None
    options = {"name": named.name, "model": named.model, "revision": named.revision, "least_block_tokens": 1}
    with TensorStore(layout, endpoint=endpoint, **options) as store:
        assert store.namespace == named
        keys = store.chain_keys(prompt)
        assert len(store.load_blocks(keys, kv)) == len(keys)
        assert store.client.remove(keys) == len(keys)
        assert store.save_blocks(keys, -kv).stored == len(keys)
        assert not store.client.verify().problems
    return len(keys)


def run_demo_command(*options: object) -> subprocess.CompletedProcess[str]:
    paths = os.pathsep.join(str(ROOT / part) for part in (".", "client", "kernels"))
    done = subprocess.run(
        [sys.executable, "-P", "-m", "kvstore", "demo", *map(str, options), "--json"],
        env={**os.environ, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        timeout=PROCESS_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done


@pytest.mark.slow
def test_demo_finds_the_prefix_and_generates_the_same_tokens() -> None:
    sizes = ("--prompt-tokens", PROMPT_TOKENS, "--new-tokens", NEW_TOKENS, "--block-tokens", BLOCK_TOKENS)
    done = run_demo_command("--model-size", "tiny", *sizes, "--seed", SEED)
    report = json.loads(done.stdout)
    stored, loaded, cold = report["stored"], report["loaded"], report["cold"]
    assert report["tokens_identical"]
    assert loaded["tokens"] == cold["tokens"] == stored["tokens"]
    assert len(set(cold["tokens"])) > NEW_TOKENS // 2
    assert (loaded["matched_tokens"], loaded["computed_tokens"]) == (USABLE_TOKENS, BLOCK_TOKENS)
    assert loaded["loaded_bytes"] == USABLE_TOKENS * 1024
    assert stored["stored_bytes"] == PROMPT_TOKENS * 1024
    assert (cold["matched_tokens"], cold["loaded_bytes"], cold["stored_bytes"]) == (0, 0, 0)
    (dram,) = report["tiers"]
    assert dram["blocks"] == PROMPT_TOKENS // BLOCK_TOKENS
    assert dram["capacity_bytes"] >= dram["used_bytes"] > stored["stored_bytes"]
    assert dram["blocks_hit"] == USABLE_TOKENS // BLOCK_TOKENS
    assert done.stderr.count("\n") == 4
    assert "warn" not in done.stderr.lower()


@pytest.mark.slow
def test_demo_with_a_lossy_codec_saves_bytes_and_says_how_many_tokens_agree() -> None:
    report = json.loads(run_demo_command("--codec", "kivi4", "--new-tokens", NEW_TOKENS).stdout)
    stored, loaded, cold = report["stored"], report["loaded"], report["cold"]
    assert (report["model"], report["codec"], report["exact"]) == ("trained", "kivi4", False)
    assert (report["prompt_tokens"], loaded["matched_tokens"]) == (448, 384)
    assert stored["tokens"] == cold["tokens"]
    assert loaded["first_logits"] != cold["first_logits"]
    assert loaded["expected"] > NEW_TOKENS // 2
    assert (stored["fidelity"], loaded["fidelity"]) == (255, 85)
    for process, blocks in ((stored, 7), (loaded, 6)):
        assert process["kv_bytes"] == blocks * 128 << 10
        assert process["stored_bytes"] + process["loaded_bytes"] == process["kv_bytes"] * 4.5 / 16


@pytest.mark.slow
def test_tokens_change_when_the_stored_payloads_were_altered(tmp_path: Path) -> None:
    with PrivateDaemon(capacity_bytes=16 << 20, grant_bytes=8 << 20) as daemon:
        stored = run_engine(task("store", tmp_path, daemon.endpoint), PROCESS_S)
        unaltered = run_engine(task("load", tmp_path, daemon.endpoint), PROCESS_S)
        assert alter_payloads(daemon.endpoint, stored) == PROMPT_TOKENS // BLOCK_TOKENS
        altered = run_engine(task("load", tmp_path, daemon.endpoint), PROCESS_S)
    assert stored.matched_tokens == 0
    assert unaltered.matched_tokens == altered.matched_tokens == USABLE_TOKENS
    assert unaltered.tokens == stored.tokens
    assert unaltered.first_logits == stored.first_logits
    assert altered.tokens != stored.tokens
    assert altered.first_logits != stored.first_logits


def test_failed_engine_process_is_reported_with_its_last_lines(tmp_path: Path) -> None:
    with pytest.raises(KVStoreError, match=r"\(cold\) ended with code 1: KeyError: 'gigantic'") as caught:
        run_engine(task("cold", tmp_path, "", model_size="gigantic"), PROCESS_S)
    (tail,) = caught.value.__notes__
    assert "demo_engine.py" in tail
    assert tail.endswith("KeyError: 'gigantic'")


def test_engine_process_that_takes_too_long_is_ended(tmp_path: Path) -> None:
    with pytest.raises(DeadlineExceeded, match=r"\(store\) has not finished within 0\.2 s"):
        run_engine(task("store", tmp_path, "ipc:///nonexistent/kvstore.sock"), 0.2)
