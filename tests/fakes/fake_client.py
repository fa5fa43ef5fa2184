"""A store in this process with the SDK's synchronous interface, as far as engines use it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from kvstore.protocol.keys import check_key
from kvstore.protocol.messages import PutStatus


@dataclass
class FakeMatch:
    """Leading hits, the request id, and whether the lease was given back."""

    hits: int
    request: int
    lease: float | None
    released: bool = False

    def __len__(self) -> int:
        return self.hits

    @property
    def tiers(self) -> list[str]:
        return ["dram"] * self.hits

    def release(self) -> None:
        self.released = True


@dataclass
class FakeClient:
    """Blocks in a dict; what was called is kept for assertions.

    Attributes:
        blocks: payloads by key.
        parents: parent of each stored key, None for a first block.
        throttle_next: how many of the next puts are answered with THROTTLED.
        reject: keys whose puts are rejected.
    """

    blocks: dict[bytes, bytes] = field(default_factory=dict)
    parents: dict[bytes, bytes | None] = field(default_factory=dict)
    throttle_next: int = 0
    reject: set[bytes] = field(default_factory=set)
    matches: list[FakeMatch] = field(default_factory=list)
    requests: list[int | None] = field(default_factory=list)

    def match(self, keys: Sequence[bytes], *, lease: float | None = None) -> FakeMatch:
        hits = 0
        for key in keys:
            if check_key(key) not in self.blocks:
                break
            hits += 1
        self.matches.append(FakeMatch(hits, request=len(self.matches) + 1, lease=lease))
        return self.matches[-1]

    def put(
        self, key: bytes, data: memoryview, *, parent: bytes | None = None, request: int | None = None
    ) -> PutStatus:
        self.requests.append(request)
        if check_key(key) in self.reject:
            return PutStatus.REJECTED
        if self.throttle_next:
            self.throttle_next -= 1
            return PutStatus.THROTTLED
        if key in self.blocks:
            return PutStatus.EXISTS
        self.blocks[key] = bytes(data)
        self.parents[key] = parent
        return PutStatus.STORED

    def put_many(
        self,
        keys: Sequence[bytes],
        datas: Sequence[memoryview],
        *,
        parent: bytes | None = None,
        request: int | None = None,
    ) -> list[PutStatus]:
        statuses = []
        for key, data in zip(keys, datas, strict=True):
            statuses.append(self.put(key, data, parent=parent, request=request))
            parent = key
        return statuses

    def get_many_into(
        self, keys: Sequence[bytes], outs: Sequence[memoryview], *, request: int | None = None
    ) -> list[int | None]:
        self.requests.append(request)
        return [self._get_into(key, out) for key, out in zip(keys, outs, strict=True)]

    def remove(self, keys: Sequence[bytes]) -> int:
        return sum(self.blocks.pop(key, None) is not None for key in keys)

    def _get_into(self, key: bytes, out: memoryview) -> int | None:
        data = self.blocks.get(key)
        if data is None:
            return None
        out[: len(data)] = data
        return len(data)
