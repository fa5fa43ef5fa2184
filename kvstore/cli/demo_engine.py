"""The demo's engine: a transformer on the CPU that looks prompts up in the store before it computes them.

Covers: one process of the demo. It reads one ``EngineTask`` (JSON) from stdin, answers one prompt and writes one
``EngineReport`` (JSON) to stdout; whatever libraries print goes to stderr. Does not cover: starting processes,
comparing and showing them, see ``kvstore.cli.demo``. torch and transformers are imported inside functions.

What makes the demo's comparison fair, and what it is blind to:

- The weights are random (seeded, scaled so that attention is peaked) and so is the prompt. The text means nothing, but
  what is generated depends on the whole prompt: the KV of one wrong block changes the tokens.
- Every process prefills in chunks, as serving engines do, and the chunk with the prompt's last token begins at the
  last block border before it. A process that loaded everything up to there computes the rest in the same shapes as one
  that computed everything, so that with as many threads it gets the same bits. A prefill in one piece would differ in
  the last bits of the logits, and the greedy token with them where two tokens tie that closely.
- Before the clock starts, each process has loaded the model, answered another prompt and, if it uses the store,
  connected to it. Hashing the prompt, matching, loading and building the cache are inside the time to first token.
- Attention does not see the order of the cache's rows, since keys carry their positions: two blocks swapped on their
  way would not be noticed here. The store's record headers notice.
"""

from __future__ import annotations

import os
import sys
import time
from hashlib import file_digest, sha256
from pathlib import Path
from typing import TYPE_CHECKING, Final, Literal

import msgspec
import numpy as np

from kvstore.cli.demo_model import MODEL_SHAPES, Engine, load_model
from kvstore.errors import KVStoreError
from kvstore.protocol.keys import chain_keys
from kvstore.protocol.messages import PutStatus
from kvstore.protocol.namespace import Namespace
from kvstore_kernels.layout import KVLayout

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray

    from kvstore_client import Client

__all__ = ["ERROR_PREFIX", "EngineReport", "EngineTask", "Role", "answer", "load_blocks", "main", "run", "store_blocks"]

Role = Literal["cold", "store", "load"]
"""What a process does: nothing with the store; look up and store; look up only."""

ERROR_PREFIX: Final = "kvstore: error: "
_LEASE_S: Final = 30.0
_BATCH_BYTES: Final = 16 << 20
"""Payload bytes in one call to the store."""

_RETRY_S: Final = 0.02


class EngineTask(msgspec.Struct, frozen=True, kw_only=True):
    """What one engine process is to do.

    Attributes:
        role: see ``Role``.
        model_size: one of ``MODEL_SHAPES``.
        model_directory: where the weights are; made there by the first process.
        seed: of the weights and of the prompt.
        prompt_tokens, new_tokens: lengths, at least 2 and 1.
        block_tokens: tokens a block.
        threads: of torch; equal numbers give equal bits.
        endpoint: of the daemon, "" for the role ``cold``.
        timeout_s: of each call to the store.
    """

    role: Role
    model_size: str
    model_directory: str
    seed: int
    prompt_tokens: int
    new_tokens: int
    block_tokens: int
    threads: int
    endpoint: str
    timeout_s: float


class EngineReport(msgspec.Struct, frozen=True, kw_only=True):
    """What one engine process did.

    Attributes:
        role: of its task.
        tokens: generated, greedy.
        first_logits: sha256 of the logits that the first token was taken from.
        smallest_margin: least difference between the best and the second logit over all tokens.
        matched_tokens, computed_tokens: of the prompt, found in the store and computed here.
        stored_blocks, stored_bytes: put into the store and not there before.
        loaded_bytes: read from the store.
        first_token_s: from the prompt to the first token.
        match_s, load_s: within that, spent on matching and on reading the blocks.
        store_s: spent on putting blocks, outside the time to first token.
        namespace: where the blocks are.
        block_bytes: payload of one block.
        parameters: of the model.
    """

    role: Role
    tokens: list[int]
    first_logits: str
    smallest_margin: float
    matched_tokens: int
    computed_tokens: int
    stored_blocks: int
    stored_bytes: int
    loaded_bytes: int
    first_token_s: float
    match_s: float
    load_s: float
    store_s: float
    namespace: Namespace
    block_bytes: int
    parameters: int


def answer(
    engine: Engine, client: Client | None, prompt: torch.Tensor, task: EngineTask, namespace: Namespace
) -> EngineReport:
    """Answer one prompt: match and load what the store has, compute the rest, store what it lacks, generate.

    Args:
        engine: warmed up.
        client: in ``namespace``; None works without a store.
        prompt: token ids, ``[task.prompt_tokens]``.
        task: role and lengths.
        namespace: for the report.

    Raises:
        KVStoreError: the store cannot be reached, refused a block, or returned one of the wrong length.
    """
    layout = engine.layout
    usable = layout.full_blocks(prompt.shape[0] - 1) if client is not None else 0
    pool = engine.empty_blocks(usable)
    matched = request = loaded_bytes = stored_blocks = 0
    match_s = load_s = store_s = 0.0

    begin = time.perf_counter()
    keys: list[bytes] = []
    if client is not None:
        keys = chain_keys(prompt.numpy(), layout.block_tokens)
        match = client.match(keys[:usable], lease=_LEASE_S)
        match_s = time.perf_counter() - begin
        try:
            request = match.request
            matched = load_blocks(client, keys[: len(match)], pool, layout, request)
        finally:
            match.release()
        loaded_bytes = matched * layout.block_bytes
        load_s = time.perf_counter() - begin - match_s
    cache = engine.cache_of(pool[:matched])
    start = matched * layout.block_tokens
    logits = engine.prefill(prompt, cache, start)
    int(logits.argmax())
    first_token_s = time.perf_counter() - begin

    if client is not None and task.role == "store":
        begin = time.perf_counter()
        blocks = engine.read_blocks(cache, matched, len(keys))
        stored_blocks = store_blocks(client, keys, blocks, matched, request, task.timeout_s)
        store_s = time.perf_counter() - begin
    tokens, smallest_margin = engine.decode(logits, cache, task.new_tokens)
    return EngineReport(
        role=task.role,
        tokens=tokens,
        first_logits=sha256(logits.numpy().tobytes()).hexdigest(),
        smallest_margin=smallest_margin,
        matched_tokens=start,
        computed_tokens=prompt.shape[0] - start,
        stored_blocks=stored_blocks,
        stored_bytes=stored_blocks * layout.block_bytes,
        loaded_bytes=loaded_bytes,
        first_token_s=first_token_s,
        match_s=match_s,
        load_s=load_s,
        store_s=store_s,
        namespace=namespace,
        block_bytes=layout.block_bytes,
        parameters=engine.parameters,
    )


def load_blocks(client: Client, keys: list[bytes], pool: torch.Tensor, layout: KVLayout, request: int) -> int:
    """Read blocks into ``pool`` (``[at least len(keys), *layout.shape]``), one beside the other.

    Returns:
        How many leading blocks arrived; what is missing in between ends them.

    Raises:
        KVStoreError: a block has another length than the layout says.
    """
    rows = _rows(pool)
    batch = max(1, _BATCH_BYTES // layout.block_bytes)
    for first in range(0, len(keys), batch):
        last = min(first + batch, len(keys))
        lengths = client.get_many_into(keys[first:last], rows[first:last], request=request)
        for index, length in enumerate(lengths, first):
            if length is None:
                return index
            if length != layout.block_bytes:
                raise KVStoreError(f"block {index} has {length} bytes, its layout says {layout.block_bytes}")
    return len(keys)


def store_blocks(
    client: Client, keys: list[bytes], blocks: torch.Tensor, first_block: int, request: int, timeout_s: float
) -> int:
    """Put ``blocks`` (``[count, *layout.shape]``) under ``keys[first_block:]``, as a chain.

    Returns:
        How many were not there before.

    Raises:
        KVStoreError: a block was rejected, or throttled for longer than ``timeout_s``.
    """
    rows = _rows(blocks)
    batch = max(1, _BATCH_BYTES // len(rows[0])) if rows else 1
    deadline = time.monotonic() + timeout_s
    stored = 0
    for first in range(0, len(rows), batch):
        last = min(first + batch, len(rows))
        at, until = first_block + first, first_block + last
        while True:
            statuses = client.put_many(
                keys[at:until], rows[first:last], parent=keys[at - 1] if at else None, request=request
            )
            stored += statuses.count(PutStatus.STORED)
            if PutStatus.REJECTED in statuses:
                raise KVStoreError(f"the store rejected block {at + statuses.index(PutStatus.REJECTED)} of the prompt")
            if PutStatus.THROTTLED not in statuses:
                break
            if time.monotonic() > deadline:
                raise KVStoreError(f"the store has throttled the prompt's blocks for {timeout_s:g} s")
            time.sleep(_RETRY_S)
    return stored


def _rows(blocks: torch.Tensor) -> list[memoryview]:
    """The bytes of each block of a contiguous CPU tensor, writable, without a copy."""
    import torch

    if not blocks.shape[0]:
        return []
    return [memoryview(row) for row in blocks.flatten(1).view(torch.uint8).numpy()]


def namespace_of(directory: Path, model_size: str, layout: KVLayout) -> Namespace:
    """The namespace of a model on disk: its revision is a digest of the weights and the configuration."""
    revision = sha256()
    for name in ("config.json", "model.safetensors"):
        with open(directory / name, "rb") as file:
            revision.update(file_digest(file, "sha256").digest())
    return Namespace(
        name="demo",
        model=f"llama-{model_size}",
        revision=f"sha256:{revision.hexdigest()}",
        layout=layout.text,
        dtype=layout.dtype,
        block_tokens=layout.block_tokens,
    )


def draw_prompts(vocabulary: int, prompt_tokens: int, seed: int) -> NDArray[np.int64]:
    """Token ids of the prompt and of the one to warm up with, ``[2, prompt_tokens]``."""
    return np.random.default_rng(seed).integers(0, vocabulary, (2, prompt_tokens))


def run(task: EngineTask) -> EngineReport:
    """Load the model, warm up, connect and answer the task's prompt; see ``answer``."""
    import torch

    from kvstore_client import Client

    torch.set_num_threads(task.threads)
    with torch.inference_mode():
        shape = MODEL_SHAPES[task.model_size]
        directory = Path(task.model_directory)
        model = load_model(directory, shape, task.seed, task.prompt_tokens + task.new_tokens)
        engine = Engine(model, task.block_tokens)
        namespace = namespace_of(directory, task.model_size, engine.layout)
        prompt, other = torch.from_numpy(draw_prompts(shape.vocabulary, task.prompt_tokens, task.seed))
        cache = engine.cache_of(engine.empty_blocks(0))
        engine.decode(engine.prefill(other, cache, 0), cache, 2)
        if task.role == "cold":
            return answer(engine, None, prompt, task, namespace)
        with Client(
            task.endpoint,
            namespace=namespace,
            timeout=task.timeout_s,
            payload_bytes=(engine.layout.block_bytes,),
        ) as client:
            client.ping()
            return answer(engine, client, prompt, task, namespace)


def main() -> int:
    """One task from stdin, one report to stdout; what else is printed goes to stderr."""
    with os.fdopen(os.dup(1), "wb") as reports:
        os.dup2(2, 1)
        try:
            task = msgspec.json.decode(sys.stdin.buffer.read(), type=EngineTask)
            reports.write(msgspec.json.encode(run(task)))
        except KVStoreError as error:
            print(f"{ERROR_PREFIX}{error}", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
