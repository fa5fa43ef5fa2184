"""vLLM's own tiering manager with a kvstore tier, and a driver that plays its scheduler and its worker.

What is real: ``TieringOffloadingSpec``, the manager, its CPU tier over ``/dev/shm``, the factory that finds the tier by
its module's name, the tier, the daemon. What is played: which keys are looked up, and the copies between GPU and rows.
"""

from __future__ import annotations

import hashlib
import itertools
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from vllm.v1.kv_offload.base import LookupResult, OffloadKey, ReqContext, ScheduleEndContext, make_offload_key
from vllm.v1.kv_offload.config import (
    OffloadingCacheConfig,
    OffloadingConfig,
    OffloadingGroupConfig,
    OffloadingModelConfig,
    OffloadingParallelConfig,
)
from vllm.v1.kv_offload.tiering.spec import TieringOffloadingSpec

BLOCK_BYTES = 8192
BLOCK_TOKENS = 16
MODULE = "kvstore_client.integrations.vllm_tier"


def config_of(endpoint: str, *, rows: int = 16, world: int = 1, groups: int = 1, **tier: Any) -> OffloadingConfig:
    """What vLLM hands to a spec; ``tier`` are more settings of the tier."""
    settings = {"type": "KVStoreTier", "module_path": MODULE, "endpoint": endpoint, "unknown_revision": "ignore"}
    model = tier.pop("model", "tiny")
    return OffloadingConfig(
        groups=tuple(
            OffloadingGroupConfig(tokens_per_block=BLOCK_TOKENS, layer_names=(f"layer.{index}",), group_id=index)
            for index in range(groups)
        ),
        worker_kv_bytes_per_block=BLOCK_BYTES,
        enable_kv_cache_events=False,
        extra_config={
            "spec_name": "TieringOffloadingSpec",
            "cpu_bytes_to_use": rows * BLOCK_BYTES * world,
            "secondary_tiers": [settings | tier],
        },
        engine_id=uuid.uuid4().hex,
        model=OffloadingModelConfig(name=model, dtype="bfloat16"),
        cache=OffloadingCacheConfig(tokens_per_hash=BLOCK_TOKENS, blocks_per_chunk=1),
        parallel=OffloadingParallelConfig(
            rank=0,
            world_size=world,
            tp_size=world,
            pp_size=1,
            pcp_size=1,
            dcp_size=1,
            data_parallel_index=0,
            data_parallel_size=1,
            data_parallel_rank_local=None,
            is_parallelism_agnostic=False,
        ),
        kv_cache_layout="LBHNC",
    )


def keys_of(prompt: str, blocks: int, group: int = 0) -> list[OffloadKey]:
    """Keys of a prompt's blocks: chained hashes of 32 bytes."""
    keys, digest = [], prompt.encode()
    for _ in range(blocks):
        digest = hashlib.sha256(digest).digest()
        keys.append(make_offload_key(digest, group))
    return keys


def content_of(key: OffloadKey, row_bytes: int) -> np.ndarray:
    """Bytes of a block, the same wherever it is computed: some of them like KV, which compresses, and some noise."""
    rng = np.random.default_rng(int.from_bytes(key[:8], "little") + key[-1])
    values = rng.standard_normal(row_bytes // 4).astype(np.float32)
    bytes_ = values.view(np.uint8).copy()
    bytes_[: row_bytes // 4] = rng.integers(0, 256, row_bytes // 4, np.uint8)
    return bytes_


@dataclass
class Engine:
    """One engine: a manager, and what its worker would do.

    Attributes:
        manager: vLLM's.
        view: of the rows of its CPU tier.
        loaded, stored: keys so far, by what became of them at the CPU tier.
    """

    manager: Any
    spec: Any
    numbers: Iterator[int] = field(default_factory=itertools.count)

    @property
    def tier(self) -> Any:
        return self.manager.secondary_tiers[0]

    @property
    def rows(self) -> np.ndarray:
        return np.asarray(self.manager.primary_tier.get_kv_memoryview()).view(np.uint8)

    def request(self, keys: Sequence[OffloadKey]) -> ReqContext:
        """A request whose blocks have these keys, seen by the manager."""
        context = ReqContext(req_id=f"request-{next(self.numbers)}")
        ends: dict[int, int] = {}
        for key in keys:
            group = key[-1]
            ends[group] = ends.get(group, 0) + BLOCK_TOKENS
            context.set_offload_key_position(key, ends[group])
        self.manager.on_new_request(context)
        return context

    def step(self, new: Sequence[str] = ()) -> None:
        """The end of a scheduler's step."""
        self.manager.on_schedule_end(ScheduleEndContext(new_req_ids=list(new), preempted_req_ids=[]))

    def hits(self, keys: Sequence[OffloadKey], context: ReqContext, timeout_s: float = 10.0) -> int:
        """Leading blocks that can be loaded, as the scheduler finds them: asked again each step until all is known."""
        end = time.monotonic() + timeout_s
        while True:
            count, later = 0, False
            for key in keys:
                result = self.manager.lookup(key, context)
                if result is LookupResult.MISS:
                    break
                later |= result is not LookupResult.HIT
                count += result is not LookupResult.RETRY
            self.step()
            if not later:
                return count
            assert time.monotonic() < end, f"no answer after {timeout_s:g} s"
            time.sleep(0.002)

    def read(self, keys: Sequence[OffloadKey], context: ReqContext) -> list[np.ndarray]:
        """What the worker would copy to the GPU."""
        ids = self.manager.prepare_load(keys, context).chunk_ids
        rows = [self.rows[row].copy() for row in ids]
        self.manager.complete_load(keys, context)
        return rows

    def compute(self, keys: Sequence[OffloadKey], context: ReqContext) -> int:
        """Compute blocks and store them, as the worker would copy them from the GPU; how many the CPU tier took."""
        output = self.manager.prepare_store(keys, context)
        if output is None:
            return 0
        for key, row in zip(output.keys_to_store, output.store_spec.chunk_ids, strict=True):
            self.rows[row] = content_of(key, self.rows.shape[1])
        if output.keys_to_store:
            # A set, as the scheduler keeps them.
            self.manager.complete_store(set(output.keys_to_store), context, True)
        return len(output.keys_to_store)

    def finish(self, context: ReqContext) -> None:
        self.manager.on_request_finished(context)

    def reset(self) -> None:
        """Forget what is in the CPU tier, as vLLM does when weights change; then its workers are done with it."""
        self.manager.reset_cache()
        if hasattr(self.manager, "on_reset_flushed"):
            self.manager.on_reset_flushed()

    def settle(self, timeout_s: float = 20.0) -> None:
        """Steps until no transfer is under way."""
        end = time.monotonic() + timeout_s
        while self.manager.has_pending_work():
            assert time.monotonic() < end, f"transfers still run after {timeout_s:g} s"
            self.step()
            time.sleep(0.002)

    def serve(self, keys: Sequence[OffloadKey]) -> int:
        """A whole request: what is there is loaded and compared byte by byte, the rest computed; blocks loaded."""
        context = self.request(keys)
        hits = self.hits(keys, context)
        for key, row in zip(keys[:hits], self.read(keys[:hits], context), strict=True):
            assert np.array_equal(row, content_of(key, row.size)), f"wrong bytes of {key.hex()}"
        self.compute(keys[hits:], context)
        self.step([context.req_id])
        self.finish(context)
        return hits

    def counts(self) -> dict[str, float]:
        """The tier's own metrics since the last call, without prefix and tier."""
        stats = self.tier.get_stats()
        found: dict[str, float] = {}
        for name, values in stats._values.items():
            for labels, value in values.items():
                found[" ".join((name.rpartition("kvstore_")[2], *labels[1:]))] = value
        return found


@contextmanager
def engine(config: OffloadingConfig, *, connected: bool = True) -> Iterator[Engine]:
    """An engine that lives as long as the ``with``; by default one whose tier is connected."""
    spec = TieringOffloadingSpec(config)
    running = Engine(spec.get_manager(), spec)
    try:
        if connected:
            probe = running.request([])
            end = time.monotonic() + 90.0
            while running.tier._link.state != "up":
                assert time.monotonic() < end, f"the tier is {running.tier._link.state}"
                time.sleep(0.01)
            running.finish(probe)
        yield running
    finally:
        running.manager.shutdown()
