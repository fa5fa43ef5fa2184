"""``kvstore demo``: a real transformer whose second process finds in the store what the first one computed.

Covers: the command; a private daemon and three engine processes, one after the other, and comparing what they
generated. Does not cover: what an engine process does and how its times are taken, see ``kvstore.cli.demo_engine``.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from enum import StrEnum
from importlib.util import find_spec
from typing import TYPE_CHECKING, Annotated, Final

import typer

from kvstore.cli.own_directory import fresh_path, own_directory
from kvstore.errors import InvalidArgument, KVStoreError

if TYPE_CHECKING:
    from kvstore.cli.demo_engine import EngineReport, Role
    from kvstore.cli.demo_report import DemoReport
    from kvstore_kernels.codecs import Codec

    Phase = Callable[[str], AbstractContextManager[Callable[[str], None]]]

__all__ = ["ModelSize", "demo", "run_demo"]

_MOST_THREADS: Final = 8
"""More do not help models as small as these."""

_MOST_BLOCK_BYTES: Final = 16 << 20
_MIN_CAPACITY_BYTES: Final = 64 << 20
_PROMPT_TOKENS: Final = 2048
_SPARE_TOKENS: Final = 64
"""Left for generated tokens in a prompt of the usual length."""

_NEEDED: Final = ("torch", "transformers")
_PROCESSES: Final[tuple[tuple[str, Role, str], ...]] = (
    ("A", "store", "computes the prompt and stores its KV"),
    ("B", "load", "looks the prompt up in the store"),
    ("C", "cold", "works without the store, for comparison"),
)


class ModelSize(StrEnum):
    """Names of ``kvstore.cli.demo_model.MODEL_SHAPES``."""

    TINY = "tiny"
    SMALL = "small"
    MEDIUM = "medium"
    TRAINED = "trained"


def demo(
    model_size: Annotated[
        ModelSize | None,
        typer.Option(
            help="Model: 0.4, 31 or 152 million random parameters, or 2.6 million trained ones. "
            "(default: small; trained with a lossy codec)",
        ),
    ] = None,
    prompt_tokens: Annotated[
        int | None,
        typer.Option(
            help="Length of the prompt. (default: 2048; 448 with the trained model)", min=2, max=1 << 17, metavar="N"
        ),
    ] = None,
    new_tokens: Annotated[int, typer.Option(help="Tokens to generate.", min=1, max=4096, metavar="N")] = 32,
    block_tokens: Annotated[int, typer.Option(help="Tokens a block.", min=1, max=1 << 16, metavar="N")] = 64,
    codec: Annotated[
        str, typer.Option(help="By which blocks are stored; see 'kvstore codecs'.", metavar="NAME")
    ] = "raw",
    seed: Annotated[int, typer.Option(help="Seed of the weights and the prompt.", min=0, max=1 << 31)] = 0,
    timeout: Annotated[float, typer.Option(help="Seconds that each engine process may take.", min=1)] = 180.0,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Run a transformer with and without the store and compare what it generates.

    Process A computes a long prompt and stores its KV; process B, fresh, loads it and computes only the rest; process C
    works without the store. Exits with 1 if nothing was found in the store, or if their tokens differ; with a lossy
    codec those of B may, and the outcome says how many agree.
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
            codec=codec,
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
    model_size: str | None,
    prompt_tokens: int | None,
    new_tokens: int,
    block_tokens: int,
    codec: str,
    seed: int,
    timeout_s: float,
    phase: Phase,
) -> DemoReport:
    """Start a private daemon and the three engine processes, and put together what they report.

    Args:
        model_size: one of ``MODEL_SHAPES``; None chooses by the codec: what a lossy one does to random weights says
            nothing of it.
        prompt_tokens: length of the prompt, more than ``block_tokens``; None for a usual one.
        new_tokens: tokens to generate.
        block_tokens: tokens a block.
        codec: by which blocks are stored.
        seed: of weights and prompt.
        timeout_s: of each engine process.
        phase: entered for each phase with what goes on; gives what to call with what came of it.

    Raises:
        InvalidArgument: the prompt has no full block, a block is too large, or the codec cannot store it.
        KVStoreError: torch or transformers is missing, or a process failed; its last lines are notes.
        DeadlineExceeded: a process took too long and was ended.
    """
    from kvstore.cli import render
    from kvstore.cli.demo_engine import EngineTask, model_name
    from kvstore.cli.demo_model import MODEL_SHAPES
    from kvstore.cli.demo_process import run_engine
    from kvstore.cli.demo_report import DemoReport, tiers_of
    from kvstore.cli.private_daemon import PrivateDaemon
    from kvstore_client import Client

    codec_used = _codec(codec)
    model_size = model_size or (ModelSize.SMALL if codec_used.exact else ModelSize.TRAINED)
    prompt_tokens = prompt_tokens or min(_PROMPT_TOKENS, MODEL_SHAPES[model_size].most_tokens - _SPARE_TOKENS)
    shape = MODEL_SHAPES[model_size]
    layout = shape.layout(block_tokens)
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
    if prompt_tokens + new_tokens > shape.most_tokens:
        raise InvalidArgument(
            f"the {model_size} model was made for {shape.most_tokens} tokens; use fewer --prompt-tokens or --new-tokens"
        )
    try:
        codec_used.check(layout)
    except ValueError as wrong:
        raise InvalidArgument(f"--codec: {wrong}") from None
    missing = [name for name in _NEEDED if find_spec(name) is None]
    if missing:
        raise KVStoreError(f"the demo needs {' and '.join(missing)}: pip install 'kvstored[demo]'")

    blocks, count, size = render.blocks, render.count, render.size
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
                codec=codec,
                threads=min(_MOST_THREADS, len(os.sched_getaffinity(0))),
                expected=reports[0].tokens if reports else [],
                endpoint="" if role == "cold" else daemon.endpoint,
                timeout_s=min(30.0, timeout_s),
            )
            with phase(f"process {name}: {doing}") as done:
                report = run_engine(task, timeout_s)
                done(
                    f"process {name}  found {count(report.matched_tokens)} prompt tokens in the store, "
                    f"computed {count(report.computed_tokens)}, stored {blocks(report.stored_blocks)}"
                )
            reports.append(report)
        with Client(daemon.endpoint) as client:
            tiers = tiers_of(client.stats())
    stored, loaded, cold = reports
    return DemoReport(
        model=model_name(model_size),
        codec=codec,
        exact=codec_used.exact,
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


def _codec(name: str) -> Codec:
    from kvstore_kernels.codecs import get_codec

    try:
        return get_codec(name)
    except ValueError as wrong:
        raise InvalidArgument(f"--codec: {wrong}") from None
