"""The demo's engine: a transformer on the CPU that looks prompts up in the store before it computes them.

Covers: one process of the demo. It reads one ``EngineTask`` (JSON) from stdin, answers one prompt and writes one
``EngineReport`` (JSON) to stdout; whatever libraries print goes to stderr. Does not cover: starting processes,
comparing and showing them, see ``kvstore.cli.demo``. torch and transformers are imported inside functions.

What makes the demo's comparison fair, and what it is blind to:

- The weights are random (seeded, scaled so that attention is peaked) and so is the prompt. The text means nothing, but
  what is generated depends on the whole prompt: the KV of one wrong block changes the tokens. So does any lossy codec,
  for which there is a trained model.
- Every process prefills in chunks, as serving engines do, and the chunk with the prompt's last token begins at the
  last block border before it. A process that loaded everything up to there computes the rest in the same shapes as one
  that computed everything, so that with as many threads it gets the same bits. A prefill in one piece would differ in
  the last bits of the logits, and the greedy token with them where two tokens tie that closely.
- Before the clock starts, each process has loaded the model, answered another prompt and, if it uses the store, stored
  and loaded one block of that in a namespace of its own, which also compiles the codec. Hashing the prompt, matching,
  loading and building the cache are inside the time to first token.
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

from kvstore.cli.demo_model import MODEL_SHAPES, TRAINED, Engine, LlamaEngine, load_model
from kvstore.cli.demo_trained import TrainedEngine, draw_texts, trained_revision
from kvstore.errors import KVStoreError
from kvstore.format.constants import FIDELITY_EXACT
from kvstore.protocol.messages import PutStatus
from kvstore.protocol.namespace import Namespace
from kvstore_client.tensors import LoadReport, SaveReport, TensorStore

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray

    from kvstore_client.integrations.transformers import CacheStore

__all__ = ["ERROR_PREFIX", "EngineReport", "EngineTask", "Role", "answer", "main", "run"]

Role = Literal["cold", "store", "load"]
"""What a process does: nothing with the store; look up and store; look up only."""

ERROR_PREFIX: Final = "kvstore: error: "
_NAMESPACE: Final = "demo"
_WARM_UP: Final = "demo warm-up"


class EngineTask(msgspec.Struct, frozen=True, kw_only=True):
    """What one engine process is to do.

    Attributes:
        role: see ``Role``.
        model_size: one of ``MODEL_SHAPES``.
        model_directory: where the weights are; made there by the first process.
        seed: of the weights and of the prompt.
        prompt_tokens, new_tokens: lengths, at least 2 and 1.
        block_tokens: tokens a block.
        codec: by which blocks are stored.
        threads: of torch and of the codec; equal numbers give equal bits.
        expected: what a process generated that computed everything; empty where none did yet.
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
    codec: str
    threads: int
    expected: list[int]
    endpoint: str
    timeout_s: float


class EngineReport(msgspec.Struct, frozen=True, kw_only=True):
    """What one engine process did.

    Attributes:
        role: of its task.
        tokens: generated, greedy.
        expected: how many of the task's expected tokens it would have generated, each behind those before it.
        first_logits: sha256 of the logits that the first token was taken from.
        smallest_margin: least difference between the best and the second logit over all tokens.
        matched_tokens, computed_tokens: of the prompt, found in the store and computed here.
        stored_blocks, stored_bytes: put into the store and not there before, as the codec made them.
        loaded_bytes: read from the store, likewise.
        kv_bytes: what was stored or loaded, as the model has it.
        fidelity: of what was loaded; 255 is exact, also where nothing was.
        first_token_s: from the prompt to the first token.
        match_s, load_s: within that, spent on matching and on reading the blocks.
        store_s: spent on putting blocks, outside the time to first token.
        namespace: where the blocks are, None without the store.
        dtype: of the model and its KV.
        block_bytes: payload of one block.
        parameters: of the model.
    """

    role: Role
    tokens: list[int]
    expected: int
    first_logits: str
    smallest_margin: float
    matched_tokens: int
    computed_tokens: int
    stored_blocks: int
    stored_bytes: int
    loaded_bytes: int
    kv_bytes: int
    fidelity: int
    first_token_s: float
    match_s: float
    load_s: float
    store_s: float
    namespace: Namespace | None
    dtype: str
    block_bytes: int
    parameters: int


def answer(engine: Engine, store: CacheStore | None, prompt: torch.Tensor, task: EngineTask) -> EngineReport:
    """Answer one prompt: load what the store has, compute the rest, store what it lacks, generate.

    Args:
        engine: warmed up.
        store: of the engine's model; None works without one.
        prompt: token ids, ``[task.prompt_tokens]``.
        task: role and lengths.

    Raises:
        KVStoreError: the store cannot be reached, refused a block, or gave one that cannot be decoded.
    """
    layout = engine.layout
    loaded: LoadReport | None = None
    stored = SaveReport(())
    start, match_s, load_s, store_s = 0, 0.0, 0.0, 0.0

    begin = time.perf_counter()
    if store is None:
        cache = engine.new_cache()
    else:
        cache = store.load(prompt)
        loaded, start = cache.loaded, cache.loaded_tokens
        match_s, load_s = cache.match_s, cache.load_s
        _check_loaded(store, loaded)
    logits = engine.prefill(prompt, cache)
    int(logits.argmax())
    first_token_s = time.perf_counter() - begin

    if store is not None and task.role == "store":
        begin = time.perf_counter()
        stored = cache.save(retry_s=task.timeout_s)
        store_s = time.perf_counter() - begin
        _check_stored(stored, start // layout.block_tokens, task.timeout_s)
    expected = engine.agreement(logits, cache, task.expected)
    tokens, smallest_margin = engine.decode(logits, cache, task.new_tokens)
    return EngineReport(
        role=task.role,
        tokens=tokens,
        expected=expected,
        first_logits=sha256(logits.numpy().tobytes()).hexdigest(),
        smallest_margin=smallest_margin,
        matched_tokens=start,
        computed_tokens=prompt.shape[0] - start,
        stored_blocks=stored.stored,
        stored_bytes=stored.stored_bytes,
        loaded_bytes=0 if loaded is None else loaded.stored_bytes,
        kv_bytes=stored.raw_bytes + (0 if loaded is None else loaded.raw_bytes),
        fidelity=FIDELITY_EXACT if loaded is None else loaded.lineage,
        first_token_s=first_token_s,
        match_s=match_s,
        load_s=load_s,
        store_s=store_s,
        namespace=None if store is None or store.tensors is None else store.tensors.namespace,
        dtype=layout.dtype,
        block_bytes=layout.block_bytes,
        parameters=engine.parameters,
    )


def _check_loaded(store: CacheStore, loaded: LoadReport | None) -> None:
    """Raises: KVStoreError: what a cache goes on without is the demo's end."""
    from kvstore_client.tensors import Failure

    if store.stats.missed:
        raise KVStoreError("the store could not be reached")
    if loaded is not None and loaded.failure not in (None, Failure.MISS, Failure.THROTTLED):
        raise KVStoreError(f"the store gave a block that is none of this model's: {loaded.detail}")


def _check_stored(stored: SaveReport, first: int, timeout_s: float) -> None:
    """Raises: KVStoreError: a block was rejected, or throttled to the end."""
    if PutStatus.REJECTED in stored.statuses:
        at = stored.statuses.index(PutStatus.REJECTED)
        raise KVStoreError(
            f"the store rejected block {first + at} of the prompt: {stored.reasons.get(at, 'no reason')}"
        )
    if "away" in stored.reasons.values():
        raise KVStoreError("the store could not be reached")
    if not stored.complete:
        raise KVStoreError(f"the store has throttled the prompt's blocks for {timeout_s:g} s")


def model_name(model_size: str) -> str:
    """Name of a model in its namespace and in reports."""
    return model_size if model_size == TRAINED else f"llama-{model_size}"


def revision_of(directory: Path) -> str:
    """The revision of a model on disk: a digest of the weights and the configuration."""
    revision = sha256()
    for name in ("config.json", "model.safetensors"):
        with open(directory / name, "rb") as file:
            revision.update(file_digest(file, "sha256").digest())
    return f"sha256:{revision.hexdigest()}"


def draw_prompts(vocabulary: int, prompt_tokens: int, seed: int) -> NDArray[np.int64]:
    """Token ids of the prompt and of the one to warm up with, ``[2, prompt_tokens]``."""
    return np.random.default_rng(seed).integers(0, vocabulary, (2, prompt_tokens))


def run(task: EngineTask) -> EngineReport:
    """Load the model, warm up, connect and answer the task's prompt; see ``answer``."""
    import torch

    torch.set_num_threads(task.threads)
    with torch.inference_mode():
        engine, revision, prompts = _prepare(task)
        prompt, other = torch.from_numpy(prompts)
        cache = engine.new_cache()
        engine.decode(engine.prefill(other, cache), cache, 2)
        if task.role == "cold":
            return answer(engine, None, prompt, task)
        with _connected(task, engine, revision, _WARM_UP) as store:
            _warm_up(engine, store, other[: task.block_tokens])
        with _connected(task, engine, revision, _NAMESPACE) as store:
            _tensors(store).client.ping()
            return answer(engine, store, prompt, task)


def _warm_up(engine: Engine, store: CacheStore, block: torch.Tensor) -> None:
    """Store a block and load it, beneath the caches: the daemon counts no lookup of a prompt."""
    import torch

    with store.empty() as cache:
        engine.prefill(block, cache)
    tensors = _tensors(store)
    tensors.load_blocks(
        tensors.chain_keys(block.numpy()), torch.empty(engine.layout.shape, dtype=getattr(torch, engine.layout.dtype))
    )
    tensors.client.clear()


def _tensors(store: CacheStore) -> TensorStore:
    """What a store of caches saves to and loads from; it is there, since it was required."""
    assert store.tensors is not None
    return store.tensors


def _prepare(task: EngineTask) -> tuple[Engine, str, NDArray[np.int64]]:
    """The engine of a task, the revision of its weights, and the prompts: its own and the one to warm up with."""
    if task.model_size == TRAINED:
        return TrainedEngine(task.block_tokens), trained_revision(), draw_texts(task.prompt_tokens, task.seed)
    shape, directory = MODEL_SHAPES[task.model_size], Path(task.model_directory)
    model = load_model(directory, shape, task.seed, task.prompt_tokens + task.new_tokens)
    prompts = draw_prompts(shape.vocabulary, task.prompt_tokens, task.seed)
    return LlamaEngine(model, task.block_tokens), revision_of(directory), prompts


def _connected(task: EngineTask, engine: Engine, revision: str, name: str) -> CacheStore:
    from kvstore_client.integrations.transformers import CacheStore

    return CacheStore(
        engine.model,
        task.codec,
        name=name,
        model_name=model_name(task.model_size),
        revision=revision,
        block_tokens=task.block_tokens,
        threads=task.threads,
        endpoint=task.endpoint,
        timeout=task.timeout_s,
    )


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
