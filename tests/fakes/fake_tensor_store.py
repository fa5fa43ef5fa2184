"""A tensor store in this process with the interface of ``TensorStore``, as far as engines use it; blocks are raw."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from kvstore.protocol.keys import chain_keys
from kvstore.protocol.messages import PutStatus
from kvstore.protocol.namespace import Namespace
from kvstore_client.tensors import Failure, LoadReport, SaveReport
from kvstore_kernels import cpu
from kvstore_kernels.codecs import get_codec
from kvstore_kernels.layout import Layout
from kvstore_kernels.paged import PagedKV

RAW = get_codec("raw")


@dataclass
class FakeMatch:
    """Leading hits, the request id, and whether the lease was given back."""

    hits: int
    request: int
    lease: float | None
    released: bool = False

    def __len__(self) -> int:
        return self.hits

    def release(self) -> None:
        self.released = True


@dataclass
class FakeTensorStore:
    """Blocks in a dict; what was called is kept for assertions.

    Attributes:
        layout: of the blocks.
        blocks: contiguous blocks by key, in the layout's order.
        parents: parent of each stored key, None for a first block.
        throttle_next: how many of the next blocks that would be stored are answered with THROTTLED.
        reject: keys whose blocks are rejected.
        failures: why keys cannot be loaded though they are there.
    """

    layout: Layout
    blocks: dict[bytes, bytes] = field(default_factory=dict)
    parents: dict[bytes, bytes | None] = field(default_factory=dict)
    throttle_next: int = 0
    reject: set[bytes] = field(default_factory=set)
    failures: dict[bytes, Failure] = field(default_factory=dict)
    matches: list[FakeMatch] = field(default_factory=list)
    requests: list[int | None] = field(default_factory=list)
    namespace: Namespace = field(default_factory=lambda: Namespace(name="fake"))

    def chain_keys(self, tokens: Any) -> list[bytes]:
        return chain_keys(tokens, self.layout.block_tokens)

    def match(self, keys: Sequence[bytes], *, lease: float | None = None, prefetch: bool = False) -> FakeMatch:
        there = [key in self.blocks for key in keys]
        hits = there.index(False) if False in there else len(there)
        self.matches.append(FakeMatch(hits, request=len(self.matches) + 1, lease=lease))
        return self.matches[-1]

    def save_blocks(
        self,
        keys: Sequence[bytes],
        source: PagedKV,
        *,
        pages: Any,
        parent: bytes | None = None,
        lineage: int | LoadReport = 255,
        request: int | None = None,
        stream: object = None,
    ) -> SaveReport:
        self.requests.append(request)
        statuses = []
        for key, page in zip(keys, pages, strict=True):
            statuses.append(self._save(key, source, page, parent))
            parent = key
        stored_bytes = statuses.count(PutStatus.STORED) * self.layout.block_bytes
        reasons = {at: "parent_unknown" for at, status in enumerate(statuses) if status == PutStatus.REJECTED}
        return SaveReport(tuple(statuses), reasons, raw_bytes=stored_bytes, stored_bytes=stored_bytes)

    def load_blocks(
        self,
        keys: Sequence[bytes],
        target: PagedKV,
        *,
        pages: Any,
        request: int | None = None,
        stream: object = None,
    ) -> LoadReport:
        self.requests.append(request)
        failure, loaded = None, 0
        for key, page in zip(keys, pages, strict=True):
            failure = self.failures.get(key) if key in self.blocks else Failure.MISS
            if failure is not None:
                break
            payload = np.frombuffer(self.blocks[key], np.uint8)
            lengths = np.array([[payload.nbytes]], np.int64)
            cpu.decode(RAW, target, page[None], np.array([payload.ctypes.data], np.uint64), lengths)
            loaded += 1
        detail = "" if failure is None else f"block {loaded}: {failure}"
        total = loaded * self.layout.block_bytes
        return LoadReport(loaded, (255,) * loaded, 255, failure, detail, raw_bytes=total, stored_bytes=total)

    def close(self) -> None:
        pass

    def remove(self, keys: Sequence[bytes]) -> int:
        return sum(self.blocks.pop(key, None) is not None for key in keys)

    def _save(self, key: bytes, source: PagedKV, page: Any, parent: bytes | None) -> PutStatus:
        if key in self.reject:
            return PutStatus.REJECTED
        if key in self.blocks:
            return PutStatus.EXISTS
        if self.throttle_next:
            self.throttle_next -= 1
            return PutStatus.THROTTLED
        payload = np.zeros(self.layout.block_bytes, np.uint8)
        cpu.encode(RAW, source, page[None], np.array([payload.ctypes.data], np.uint64))
        self.blocks[key] = payload.tobytes()
        self.parents[key] = parent
        return PutStatus.STORED
