"""An engine in a process of its own, for tests: a program that reads lines of JSON and answers with such."""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from daemon_process import child_environment

HERE = Path(__file__).parent
START_S = 240.0
ANSWER_S = 180.0
ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_LOGGING_STREAM": "ext://sys.stderr",
    "VLLM_NO_USAGE_STATS": "1",
    "OMP_NUM_THREADS": "1",
    "OMP_WAIT_POLICY": "PASSIVE",
    "HF_HUB_OFFLINE": "1",
}
"""Of an engine on a CPU: with more threads it is slower by far on a machine that others use."""


class EngineProgram:
    """A program of this folder that runs an engine; use it with ``with``.

    Args:
        program: its file.
        arguments: of its command line.
        log: where its standard error goes.
        environ: beside ``ENVIRONMENT``.
    """

    def __init__(self, program: str, arguments: Sequence[str], log: Path, **environ: str) -> None:
        self._log_path = log
        self._log = log.open("ab")
        self._process = subprocess.Popen(
            [sys.executable, "-P", str(HERE / program), *arguments],
            env=child_environment(ENVIRONMENT | environ),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
        )
        self._buffer = b""

    def __enter__(self) -> Self:
        try:
            self._answer(START_S)
            self._warm_up()
        except BaseException as error:
            self._end(error)
            raise
        return self

    def _warm_up(self) -> None:
        """What is done before a test asks."""

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end(error)

    def _end(self, error: BaseException | None) -> None:
        """Have it end; where nothing failed before, it must do so by itself."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        try:
            self._process.wait(60)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
            if error is None:
                raise
        finally:
            self._process.stdout.close()
            self._log.close()
        if error is None:
            assert self._process.returncode == 0, self.log()

    def give(self, command: Any) -> dict[str, Any]:
        """Give a command and wait for its answer."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(command).encode() + b"\n")
        self._process.stdin.flush()
        return self._answer(ANSWER_S)

    def log(self) -> str:
        """What it wrote so far."""
        return self._log_path.read_text(errors="replace")[-20_000:]

    def _answer(self, timeout_s: float) -> dict[str, Any]:
        """The next line of its output that is an answer; vLLM writes others."""
        assert self._process.stdout is not None
        end = time.monotonic() + timeout_s
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.stdout, selectors.EVENT_READ)
            while True:
                line, newline, rest = self._buffer.partition(b"\n")
                if newline:
                    self._buffer = rest
                    if line.startswith(b'{"'):
                        answer: dict[str, Any] = json.loads(line)
                        return answer
                    continue
                if not selector.select(max(end - time.monotonic(), 0.0)):
                    raise AssertionError(f"the engine gave no answer in {timeout_s:g} s:\n{self.log()}")
                read = os.read(self._process.stdout.fileno(), 1 << 16)
                if not read:
                    raise AssertionError(f"the engine ended:\n{self.log()}")
                self._buffer += read


class EngineProcess(EngineProgram):
    """``vllm_engine.py``: an engine with the connector, asked with commands.

    Args:
        model: folder of the model.
        extra: ``kv_connector_extra_config``, None: no connector.
        multiprocess: the engine's core in a process of its own, and another one for the worker.
        log: where its standard error goes.
        options: see ``vllm_engine.py``.
    """

    def __init__(
        self, model: Path, extra: dict[str, Any] | None, log: Path, *, multiprocess: bool = False, **options: Any
    ) -> None:
        arguments = json.dumps({"model": str(model), "extra": extra, **options})
        environ = {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"} if multiprocess else {}
        super().__init__("vllm_engine.py", [arguments], log, **environ)

    def _warm_up(self) -> None:
        # The first request of an engine takes seconds more than others.
        self.generate([[5] * 40], max_tokens=2)

    def ask(self, **command: Any) -> dict[str, Any]:
        """Give a command and wait for its answer."""
        return self.give(command)

    def generate(self, prompts: list[list[int]], **options: Any) -> dict[str, Any]:
        """Greedy tokens of prompts that come together."""
        return self.ask(prompts=prompts, **options)

    def reset(self, *, connector: bool = False) -> bool:
        """Empty the engine's own prefix cache, and by wish that of the connector; whether it could.

        Blocks of a request that ended are in use until its saves are done, which the engine sees when it steps.
        """
        end = time.monotonic() + 30
        while not self.ask(reset=True, connector=connector)["reset"]:
            if time.monotonic() > end:
                return False
            self.generate([[5] * 40], max_tokens=2)
        return True
