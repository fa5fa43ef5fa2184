"""Pages into the store and out of it: of KV, through codecs; of anything else, as bytes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final, Protocol

from kvstore.errors import InvalidArgument
from kvstore.protocol.keys import BlockKey
from kvstore.protocol.messages import PutStatus
from kvstore.protocol.version import MAX_KEYS_PER_REQUEST
from kvstore_client import Client
from kvstore_client.integrations.hicache.host_bytes import HostBytes
from kvstore_client.integrations.hicache.host_pools import page_ids, pages_of
from kvstore_client.tensors import TensorStore
from kvstore_kernels.codecs import get_codec
from kvstore_kernels.paged import PagedKV

__all__ = ["BytePages", "Loaded", "PageStore", "Saved", "TensorPages"]

_BATCH_BYTES: Final = 32 << 20
_SHORT: Final = "another size"
_THERE: Final = (PutStatus.STORED, PutStatus.EXISTS)


@dataclass(frozen=True, slots=True)
class Loaded:
    """What became of a load.

    Attributes:
        pages: leading pages that are in host memory now.
        failure: why the next one is not, "" where all are.
        stored_bytes: what they were in the store.
    """

    pages: int
    failure: str = ""
    stored_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Saved:
    """What became of a save.

    Attributes:
        there: whether each page is in the store now.
        results: of each page: ``stored``, ``exists``, ``throttled``, ``rejected``.
        stored_bytes: of those that were stored.
    """

    there: list[bool]
    results: list[str]
    stored_bytes: int = 0


class PageStore(Protocol):
    """Pages of one pool in the store."""

    client: Client
    part: int

    def match(self, keys: Sequence[BlockKey]) -> int:
        """How many leading pages are there, with the parts of all ranks. One request at most."""
        ...

    def exists(self, keys: Sequence[BlockKey]) -> list[bool]:
        """Whether each page is there, with the parts of all ranks."""
        ...

    def save(self, keys: Sequence[BlockKey], indices: Any, parent: BlockKey | None) -> Saved:
        """Store this rank's part of pages of a chain."""
        ...

    def load(self, keys: Sequence[BlockKey], indices: Any) -> Loaded:
        """Load this rank's part of leading pages, up to the first that cannot be."""
        ...

    def close(self) -> None:
        """Close the connection."""
        ...


class TensorPages:
    """KV pages: encoded straight out of the host pool and decoded straight into it.

    Args:
        store: of the pool's layout; closed with this.
        paged: the pool's pages.
    """

    def __init__(self, store: TensorStore, paged: PagedKV) -> None:
        self._store, self._paged = store, paged
        self.client, self.part = store.client, store.part
        codec = get_codec(store.codec)
        # Who computed a page on which others SGLang does not say: with a lossy codec none of them passes for exact.
        self._lineage = codec.fidelity

    def match(self, keys: Sequence[BlockKey]) -> int:
        """See ``PageStore``."""
        return self._store.match(keys[:MAX_KEYS_PER_REQUEST], prefetch=True).hits if keys else 0

    def exists(self, keys: Sequence[BlockKey]) -> list[bool]:
        """See ``PageStore``."""
        return self.client.exists(keys)

    def save(self, keys: Sequence[BlockKey], indices: Any, parent: BlockKey | None) -> Saved:
        """See ``PageStore``."""
        pages = pages_of(page_ids(indices, len(keys), self._paged.page_tokens).tolist())
        done = self._store.save_blocks(keys, self._paged, pages=pages, parent=parent, lineage=self._lineage)
        results = [done.reasons.get(at) or status.name.lower() for at, status in enumerate(done.statuses)]
        return Saved([status in _THERE for status in done.statuses], results, done.stored_bytes)

    def load(self, keys: Sequence[BlockKey], indices: Any) -> Loaded:
        """See ``PageStore``."""
        pages = pages_of(page_ids(indices, len(keys), self._paged.page_tokens).tolist())
        done = self._store.load_blocks(keys, self._paged, pages=pages)
        return Loaded(done.loaded, "" if done.failure is None else done.failure.value, done.stored_bytes)

    def close(self) -> None:
        """See ``PageStore``."""
        self._store.close()


class BytePages:
    """Pages as SGLang lays them out, and values of its generic interface.

    Args:
        client: of their namespace; closed with this.
        part: this rank's.
        host: the pool's pages, None for values.
    """

    def __init__(self, client: Client, part: int, host: HostBytes | None) -> None:
        self.client, self.part = client, part
        self._host = host

    def match(self, keys: Sequence[BlockKey]) -> int:
        """See ``PageStore``."""
        return self.client.match(keys[:MAX_KEYS_PER_REQUEST], prefetch=True).hits if keys else 0

    def exists(self, keys: Sequence[BlockKey]) -> list[bool]:
        """See ``PageStore``."""
        return self.client.exists(keys)

    def save(self, keys: Sequence[BlockKey], indices: Any, parent: BlockKey | None) -> Saved:
        """See ``PageStore``."""
        host = self._pages()
        whole = _whole(indices, len(keys), host.page_tokens)

        def sources(begin: int, end: int) -> list[memoryview]:
            return host.sources(_some(whole, begin, end, host.page_tokens), end - begin)

        return self.put(keys, sources, parent, max(1, _BATCH_BYTES // host.page_bytes))

    def load(self, keys: Sequence[BlockKey], indices: Any) -> Loaded:
        """See ``PageStore``."""
        host = self._pages()
        whole = _whole(indices, len(keys), host.page_tokens)
        most = max(1, _BATCH_BYTES // host.page_bytes)
        loaded = 0
        while loaded < len(keys):
            end = min(loaded + most, len(keys))
            targets = host.targets(_some(whole, loaded, end, host.page_tokens), end - loaded)
            good, failure = self.get_into(keys[loaded:end], targets)
            if good:
                some = _some(whole, loaded, loaded + good, host.page_tokens)
                host.accept(some, good, targets[:good])
            loaded += good
            if failure:
                return Loaded(loaded, failure, loaded * host.page_bytes)
        return Loaded(loaded, "", loaded * host.page_bytes)

    def put(
        self,
        keys: Sequence[BlockKey],
        sources: Callable[[int, int], list[memoryview]],
        parent: BlockKey | None,
        most: int,
    ) -> Saved:
        """Store what is not there yet.

        Args:
            keys: of a chain.
            sources: gives the bytes of some of them, by the first's position and that behind the last.
            parent: key before the first one.
            most: keys that are stored by one call.
        """
        present = self.exists(keys)
        results = ["exists" if there else "" for there in present]
        stored_bytes = at = 0
        while at < len(keys):
            if present[at]:
                at += 1
                continue
            end = at + 1
            while end < len(keys) and not present[end] and end - at < most:
                end += 1
            payloads = sources(at, end)
            before = keys[at - 1] if at else parent
            statuses = self.client.put_many(keys[at:end], payloads, parent=before, part=self.part)
            for offset, (status, payload) in enumerate(zip(statuses, payloads, strict=True)):
                results[at + offset] = status.name.lower()
                stored_bytes += payload.nbytes if status is PutStatus.STORED else 0
            at = end
        return Saved([result in ("stored", "exists") for result in results], results, stored_bytes)

    def get_into(self, keys: Sequence[BlockKey], targets: Sequence[memoryview]) -> tuple[int, str]:
        """Copy records of exactly the targets' sizes; how many leading ones, and why not the next."""
        lengths = self.client.get_many_into(keys, targets, part=self.part)
        for at, (length, target) in enumerate(zip(lengths, targets, strict=True)):
            if length is None:
                return at, "miss"
            if length != target.nbytes:
                return at, _SHORT
        return len(keys), ""

    def close(self) -> None:
        """See ``PageStore``."""
        self.client.close()

    def _pages(self) -> HostBytes:
        if self._host is None:
            raise InvalidArgument("values have no host pool")
        return self._host


def _whole(indices: Any, count: int, tokens: int) -> Any:
    """Indices of whole pages.

    Raises:
        InvalidArgument: they are not so many.
    """
    given = 0 if indices is None else len(indices)
    if given != count * tokens:
        raise InvalidArgument(f"{count} pages of {tokens} tokens need {count * tokens} host indices, got {given}")
    return indices


def _some(indices: Any, begin: int, end: int, tokens: int) -> Any:
    return indices[begin * tokens : end * tokens]
