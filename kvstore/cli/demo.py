"""``kvstore demo``: a real transformer whose second process finds in the store what the first one computed.

Covers: starting a private daemon and three engine processes, one after the other, comparing what they generated, and
showing it. Does not cover: what an engine process does and how its times are taken, see ``kvstore.cli.demo_engine``.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from enum import StrEnum
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer

from kvstore.cli.own_directory import fresh_path, own_directory
from kvstore.errors import DeadlineExceeded, InvalidArgument, KVStoreError

if TYPE_CHECKING:
    from kvstore.cli.demo_engine import EngineReport, EngineTask, Role
    from kvstore.cli.demo_report import DemoReport

    Phase = Callable[[str], AbstractContextManager[Callable[[str], None]]]

__all__ = ["ModelSize", "demo", "run_demo", "run_engine"]

_MOST_THREADS: Final = 8
"""More do not help models as small as these."""

_MOST_BLOCK_BYTES: Final = 16 << 20
_MIN_CAPACITY_BYTES: Final = 64 << 20
_TAIL_LINES: Final = 12
_PACKAGES: Final = ("kvstore", "kvstore_client", "kvstore_kernels")
_NEEDED: Final = ("torch", "transformers")
_PROCESSES: Final[tuple[tuple[str, Role, str], ...]] = (
    ("A", "store", "computes the prompt and stores its KV"),
    ("B", "load", "looks the prompt up in the store"),
    ("C", "cold", "works without the store, for comparison"),
)
_ENGINE_ENVIRONMENT: Final = {
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "TOKENIZERS_PARALLELISM": "false",
    "DO_NOT_TRACK": "1",
    # Threads that wait for each other sleep: spinning ones stall a prefill when anything else needs a core.
    "OMP_WAIT_POLICY": "PASSIVE",
}


class ModelSize(StrEnum):
    """Names of ``kvstore.cli.demo_model.MODEL_SHAPES``."""

    TINY = "tiny"
    SMALL = "small"
    MEDIUM = "medium"


def demo(
    model_size: Annotated[
        ModelSize, typer.Option(help="Model made for the demo: 0.4, 31 or 152 million parameters.")
    ] = ModelSize.SMALL,
    prompt_tokens: Annotated[int, typer.Option(help="Length of the prompt.", min=2, max=1 << 17, metavar="N")] = 2048,
    new_tokens: Annotated[int, typer.Option(help="Tokens to generate.", min=1, max=4096, metavar="N")] = 32,
    block_tokens: Annotated[int, typer.Option(help="Tokens a block.", min=1, max=1 << 16, metavar="N")] = 64,
    seed: Annotated[int, typer.Option(help="Seed of the weights and the prompt.", min=0, max=1 << 31)] = 0,
    timeout: Annotated[float, typer.Option(help="Seconds that each engine process may take.", min=1)] = 180.0,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Run a transformer with and without the store and compare what it generates.

    Process A computes a long prompt and stores its KV; process B, fresh, loads it and computes only the rest; process C
    works without the store. Exits with 1 if their tokens differ or nothing was found in the store.
    """
    import msgspec

    from kvstore.cli import render
    from kvstore.cli.demo_report import problem_of, tables

    notes = render.console(stderr=True)

    @contextlib.contextmanager
    def phase(text: str) -> Iterator[Callable[[str], None]]:
        with notes.status(text, refresh_per_second=4) if notes.is_terminal else contextlib.nullcontext():
            yield lambda done: notes.print(done, style="dim")

    try:
        report = run_demo(
            model_size=model_size,
            prompt_tokens=prompt_tokens,
            new_tokens=new_tokens,
            block_tokens=block_tokens,
            seed=seed,
            timeout_s=timeout,
            phase=phase,
        )
    except KVStoreError as error:
        for tail in getattr(error, "__notes__", ()):
            if "\n" in tail:  # one line is in the message already
                notes.print(tail, style="dim")
        raise
    if as_json:
        print(msgspec.json.encode(report).decode())
    else:
        render.console().print(tables(report))
    problem = problem_of(report)
    if problem is not None:
        print(f"kvstore: error: {problem}", file=sys.stderr)
        raise typer.Exit(1)


def run_demo(
    *,
    model_size: str,
    prompt_tokens: int,
    new_tokens: int,
    block_tokens: int,
    seed: int,
    timeout_s: float,
    phase: Phase,
) -> DemoReport:
    """Start a private daemon and the three engine processes, and put together what they report.

    Args:
        model_size: one of ``MODEL_SHAPES``.
        prompt_tokens: length of the prompt, more than ``block_tokens``.
        new_tokens: tokens to generate.
        block_tokens: tokens a block.
        seed: of weights and prompt.
        timeout_s: of each engine process.
        phase: entered for each phase with what goes on; gives what to call with what came of it.

    Raises:
        InvalidArgument: the prompt has no full block, or a block is too large.
        KVStoreError: torch or transformers is missing, or a process failed; its last lines are notes.
        DeadlineExceeded: a process took too long and was ended.
    """
    from kvstore.cli import render
    from kvstore.cli.demo_engine import EngineTask
    from kvstore.cli.demo_model import MODEL_SHAPES
    from kvstore.cli.demo_report import DemoReport, tiers_of
    from kvstore.cli.private_daemon import PrivateDaemon
    from kvstore_client import Client

    layout = MODEL_SHAPES[model_size].layout(block_tokens)
    if prompt_tokens <= block_tokens:
        raise InvalidArgument(
            f"a prompt of {prompt_tokens} tokens has no full block of {block_tokens} with a token behind it; "
            "use a longer --prompt-tokens or fewer --block-tokens"
        )
    if layout.block_bytes > _MOST_BLOCK_BYTES:
        raise InvalidArgument(
            f"a block of {block_tokens} tokens has {render.size(layout.block_bytes)}, over "
            f"{render.size(_MOST_BLOCK_BYTES)}; use fewer --block-tokens"
        )
    missing = [name for name in _NEEDED if find_spec(name) is None]
    if missing:
        raise KVStoreError(f"the demo needs {' and '.join(missing)}: pip install 'kvstored[demo]'")

    count, size = render.count, render.size
    capacity_bytes = max(_MIN_CAPACITY_BYTES, 2 * layout.full_blocks(prompt_tokens) * layout.block_bytes)
    reports: list[EngineReport] = []
    with contextlib.ExitStack() as stack:
        directory = stack.enter_context(own_directory(fresh_path("kvstore-demo-")))
        with phase("starting a private daemon") as done:
            begin = time.monotonic()
            daemon = stack.enter_context(PrivateDaemon(capacity_bytes=capacity_bytes))
            done(f"daemon     {size(capacity_bytes)} of DRAM, ready in {render.duration(time.monotonic() - begin)}")
        for name, role, doing in _PROCESSES:
            task = EngineTask(
                role=role,
                model_size=model_size,
                model_directory=str(directory),
                seed=seed,
                prompt_tokens=prompt_tokens,
                new_tokens=new_tokens,
                block_tokens=block_tokens,
                threads=min(_MOST_THREADS, len(os.sched_getaffinity(0))),
                endpoint="" if role == "cold" else daemon.endpoint,
                timeout_s=min(30.0, timeout_s),
            )
            with phase(f"process {name}: {doing}") as done:
                report = run_engine(task, timeout_s)
                done(
                    f"process {name}  found {count(report.matched_tokens)} prompt tokens in the store, "
                    f"computed {count(report.computed_tokens)}, stored {count(report.stored_blocks)} blocks"
                )
            reports.append(report)
        with Client(daemon.endpoint) as client:
            tiers = tiers_of(client.stats())
    stored, loaded, cold = reports
    return DemoReport(
        model=stored.namespace.model,
        prompt_tokens=prompt_tokens,
        block_tokens=block_tokens,
        seed=seed,
        tokens_identical=loaded.tokens == cold.tokens == stored.tokens,
        logits_identical=loaded.first_logits == cold.first_logits,
        speed_up=min(stored.first_token_s, cold.first_token_s) / loaded.first_token_s,
        stored=stored,
        loaded=loaded,
        cold=cold,
        tiers=tiers,
    )


def run_engine(task: EngineTask, timeout_s: float) -> EngineReport:
    """Run one engine process to its end.

    Raises:
        KVStoreError: it failed; its last line is in the message, the lines before are a note.
        DeadlineExceeded: it was killed after ``timeout_s``.
    """
    import msgspec

    from kvstore.cli.demo_engine import ERROR_PREFIX, EngineReport

    try:
        ended = subprocess.run(
            [sys.executable, "-P", "-m", "kvstore.cli.demo_engine"],
            input=msgspec.json.encode(task),
            capture_output=True,
            timeout=timeout_s,
            env=_environment(task.model_directory),
            check=False,
        )
    except subprocess.TimeoutExpired as expired:
        error: KVStoreError = DeadlineExceeded(
            f"the demo's engine process ({task.role}) has not finished within {timeout_s:g} s; "
            "use a larger --timeout or a smaller --model-size"
        )
        error.add_note(_tail(expired.stderr))
        raise error from None
    if ended.returncode == 0:
        try:
            return msgspec.json.decode(ended.stdout, type=EngineReport)
        except msgspec.DecodeError as wrong:
            raise KVStoreError(f"the demo's engine process ({task.role}) gave no report: {wrong}") from None
    tail = _tail(ended.stderr)
    last = tail.splitlines()[-1].removeprefix(ERROR_PREFIX) if tail else "it said nothing"
    error = KVStoreError(f"the demo's engine process ({task.role}) ended with code {ended.returncode}: {last}")
    error.add_note(tail)
    raise error


def _tail(output: bytes | None) -> str:
    return "\n".join((output or b"").decode("utf-8", "replace").strip().splitlines()[-_TAIL_LINES:])


def _environment(model_directory: str) -> dict[str, str]:
    """This process's environment without kvstore's settings, offline, with these very packages importable."""
    environ = {name: value for name, value in os.environ.items() if not name.startswith("KVSTORE_")}
    environ |= _ENGINE_ENVIRONMENT
    environ["HF_HOME"] = model_directory
    roots = []
    for package in _PACKAGES:
        spec = find_spec(package)
        if spec is not None and spec.origin is not None:
            roots.append(str(Path(spec.origin).resolve().parents[1]))
    installed = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    path = [root for root in dict.fromkeys(roots) if root not in installed]
    environ["PYTHONPATH"] = os.pathsep.join(filter(None, [*path, environ.get("PYTHONPATH", "")]))
    return environ
