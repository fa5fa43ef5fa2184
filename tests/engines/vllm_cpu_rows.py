"""``TieringOffloadingSpec`` where the KV cache is in host memory: vLLM's own worker copies between a GPU and rows only.

Everything but the copies is vLLM's: the connector, its scheduler, the tiering manager, the CPU tier over ``/dev/shm``.
``KVSTORE_TEST_NO_LOADS`` makes the worker load nothing and say that it did: the control of tests that compare tokens.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from vllm.v1.kv_offload.base import CanonicalKVCaches, OffloadingWorker, TransferResult
from vllm.v1.kv_offload.cpu.shared_offload_region import SharedOffloadRegion
from vllm.v1.kv_offload.tiering.spec import TieringOffloadingSpec


class HostRowsWorker(OffloadingWorker):
    """Copies pages of KV cache tensors in host memory into rows and back, at once."""

    def __init__(self, kv_caches: CanonicalKVCaches, region: SharedOffloadRegion, blocks_per_chunk: int) -> None:
        self._region = region
        self._blocks_per_chunk = blocks_per_chunk
        self._refs = [[ref.tensor_idx for ref in refs] for refs in kv_caches.group_data_refs]
        self._pages: list[torch.Tensor] = []
        self._rows: list[torch.Tensor] = []
        for each in kv_caches.tensors:
            size = each.page_size_bytes
            self._pages.append(each.tensor.view(torch.int8).view(-1, size))
            rows = region.create_next_worker_view(size * blocks_per_chunk)
            self._rows.append(rows.unflatten(1, (blocks_per_chunk, size)))
        self._finished: list[TransferResult] = []
        self._loads_nothing = bool(os.environ.get("KVSTORE_TEST_NO_LOADS"))

    def _transfer(self, job: int, pages: Any, rows: Any, *, store: bool) -> bool:
        page_ids, row_ids = iter(pages.block_ids.tolist()), iter(rows.block_ids.tolist())
        copied = 0
        for group, (size, first) in enumerate(zip(pages.group_sizes, pages.block_indices, strict=True)):
            row = -1
            for index in range(first, first + size):
                place = index % self._blocks_per_chunk
                if row < 0 or place == 0:
                    row = next(row_ids)
                page = next(page_ids)
                for tensor in self._refs[group]:
                    at, there = self._pages[tensor][page], self._rows[tensor][row, place]
                    if store:
                        there.copy_(at)
                    elif not self._loads_nothing:
                        at.copy_(there)
                    copied += at.numel()
        self._finished.append(TransferResult(job, True, copied, 1e-6))
        return True

    def submit_store(self, job_id: int, src_spec: Any, dst_spec: Any) -> bool:
        return self._transfer(job_id, src_spec, dst_spec, store=True)

    def submit_load(self, job_id: int, src_spec: Any, dst_spec: Any, expedited: bool = False) -> bool:
        return self._transfer(job_id, dst_spec, src_spec, store=False)

    def get_finished(self) -> list[TransferResult]:
        finished, self._finished = self._finished, []
        return finished

    def wait(self, job_ids: set[int]) -> None:
        pass

    def shutdown(self) -> None:
        self._pages.clear()
        self._rows.clear()
        self._region.cleanup()


class HostTieringSpec(TieringOffloadingSpec):
    """vLLM's spec with that worker."""

    def get_worker(self, kv_caches: CanonicalKVCaches) -> OffloadingWorker:
        if not self._worker:
            region = SharedOffloadRegion(
                engine_id=self._engine_id,
                num_chunks=self.num_chunks,
                rank=self.config.parallel.rank,
                kv_bytes_per_chunk=self.kv_bytes_per_chunk,
                cpu_page_size=self.cpu_page_size_per_worker,
            )
            self._worker = HostRowsWorker(kv_caches, region, self.blocks_per_chunk)
        return self._worker
