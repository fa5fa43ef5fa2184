"""The stores of one backend: each opened when it is first used, while there is a daemon."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Final

from kvstore.errors import DeadlineExceeded, InvalidArgument
from kvstore.protocol.namespace import Namespace
from kvstore_client import Client
from kvstore_client.integrations.hicache.host_bytes import HostBytes, host_bytes
from kvstore_client.integrations.hicache.host_pools import paged_of, shares_out_heads
from kvstore_client.integrations.hicache.identity import Identity
from kvstore_client.integrations.hicache.page_stores import BytePages, PageStore, TensorPages
from kvstore_client.tensors import TensorStore
from kvstore_kernels.codecs import LOSSY_DTYPES, get_codec
from kvstore_kernels.layout import Layout
from kvstore_kernels.paged import PagedKV

__all__ = ["KV", "VALUES", "Pool", "Stores", "open_kv", "open_pool", "open_values", "plan_kv", "plan_pool"]

KV: Final = "kv"
VALUES: Final = "values"
"""Where the generic interface keeps its tensors."""

Open = Callable[[], PageStore]

_STATE: Final = "mamba"
_DRAFT: Final = "draft"
_PAGE_SIZES: Final = (16, 32, 64, 128, 256)


@dataclass(frozen=True, slots=True)
class Pool:
    """A host pool and how its pages are stored.

    Attributes:
        name: SGLang's.
        pages: as strides, or as bytes.
        replicated: whether all tensor-parallel ranks hold the same pages.
        draft: whether it holds KV of a draft model.
        complete: whether all ranks that hold a part of its pages are asked to store theirs.
    """

    name: str
    pages: PagedKV | HostBytes
    replicated: bool
    draft: bool
    complete: bool = True


class Stores:
    """Connections to a daemon, one a namespace.

    Args:
        opens: makes each, by name; more may be added later.
        first: that is opened at once, and asked whether the daemon is there.

    Attributes:
        client, part: of the first.
    """

    def __init__(self, opens: dict[str, Open], first: str) -> None:
        self._opens = opens
        self._lock = threading.Lock()
        self._stores: dict[str, PageStore] = {first: opens[first]()}
        self.client, self.part = self._stores[first].client, self._stores[first].part
        self._closed = False

    def of(self, name: str) -> PageStore:
        """A store, opened now where it was not yet.

        Raises:
            InvalidArgument: there is none of that name.
            KVStoreError: it cannot be opened.
        """
        store = self._stores.get(name)
        if store is not None:
            return store
        if name not in self._opens:
            raise InvalidArgument(f"no host pool {name!r} was registered; there are {', '.join(self._opens)}")
        if not self._lock.acquire(timeout=self.client.timeout):
            raise DeadlineExceeded(f"another thread opened a store for {self.client.timeout:g} s")
        try:
            if self._closed:
                raise InvalidArgument("the backend is closed")
            if name not in self._stores:
                self._stores[name] = self._opens[name]()
            return self._stores[name]
        finally:
            self._lock.release()

    def close(self) -> None:
        """Close all connections."""
        with self._lock:
            self._closed = True
            for store in self._stores.values():
                store.close()


def plan_kv(identity: Identity, pool: Any) -> Pool:
    """How KV pages of a host pool are stored.

    Raises:
        InvalidArgument: the codec does not take them; says what to do.
    """
    codec = identity.settings.codec
    draft = pool.layer_num > getattr(pool, "target_layer_num", pool.layer_num)
    try:
        paged = paged_of(pool)
    except ValueError as error:
        if codec != "raw":
            raise InvalidArgument(
                f"kvstore HiCache: codec {codec!r} needs to know what is where in a page, and of this host pool it "
                f"does not: {error}; use codec 'raw', or another --hicache-mem-layout"
            ) from None
        return Pool(KV, host_bytes(pool), replicated=identity.config.is_mla_model, draft=draft)
    _check_page(codec, paged.layout)
    return Pool(KV, paged, replicated=identity.config.is_mla_model, draft=draft)


def plan_pool(identity: Identity, name: str, pool: Any) -> Pool:
    """How pages of another host pool are stored: as bytes.

    In models whose KV is the same on all ranks SGLang has only one of them store pages, and all of them Mamba states.

    Args:
        identity: of this rank.
        name: SGLang's.
        pool: the host pool.

    Raises:
        InvalidArgument: its pages cannot be had.
    """
    config = identity.config
    by_head = shares_out_heads(pool)
    complete = not (config.is_mla_model and by_head and config.tp_size > 1 and name != _STATE)
    replicated = config.is_mla_model and not by_head
    return Pool(name, host_bytes(pool), replicated, name.startswith(_DRAFT), complete)


def open_kv(identity: Identity, pool: Pool) -> PageStore:
    """Connect to the namespace of KV pages.

    Raises:
        KVStoreError: as ``TensorStore``.
    """
    paged = pool.pages
    if not isinstance(paged, PagedKV):
        return open_pool(identity, pool)
    settings, config = identity.settings, identity.config
    shard, shards = identity.shard(replicated=pool.replicated)
    name = identity.namespace(pool.name, {"page_tokens": paged.page_tokens}, draft=pool.draft, opaque=False)
    store = TensorStore(
        paged.layout,
        settings.codec,
        model=config.model_name or "",
        revision=identity.revision,
        name=name,
        tenant_salt=settings.tenant_salt.encode(),
        shard=shard,
        shards=shards,
        fidelity=settings.fidelity,
        exact_codec=settings.exact_codec,
        least_block_tokens=1,
        threads=settings.threads,
        **identity.options,
    )
    return TensorPages(store, paged)


def open_pool(identity: Identity, pool: Pool) -> BytePages:
    """Connect to the namespace of a pool's pages as bytes.

    Raises:
        KVStoreError: as ``Client``.
    """
    host = pool.pages
    if isinstance(host, PagedKV):
        raise InvalidArgument(f"the pool {pool.name} has no pages of bytes")
    shard, shards = identity.shard(replicated=pool.replicated)
    client = _client(identity, pool.name, host.described, shards, host.page_tokens, pool.draft, (host.page_bytes,))
    return BytePages(client, shard, host)


def open_values(identity: Identity, page_tokens: int, described: dict[str, object]) -> BytePages:
    """Connect to the namespace of the generic interface.

    Raises:
        KVStoreError: as ``Client``.
    """
    shard, shards = identity.shard(replicated=identity.config.is_mla_model)
    return BytePages(_client(identity, VALUES, described, shards, page_tokens, True, ()), shard, None)


def _client(
    identity: Identity,
    pool: str,
    described: dict[str, object],
    parts: int,
    page_tokens: int,
    draft: bool,
    payload_bytes: tuple[int, ...],
) -> Client:
    settings, config = identity.settings, identity.config
    namespace = Namespace(
        name=identity.namespace(pool, described, draft=draft, opaque=True),
        model=config.model_name or "",
        revision=identity.revision,
        layout=f"sglang {pool} pages of {sum(payload_bytes)} bytes" if payload_bytes else f"sglang {pool}",
        dtype=str(described.get("dtype", "")).removeprefix("torch."),
        block_tokens=page_tokens,
        parts=parts,
        tenant_salt=settings.tenant_salt.encode(),
        codec="raw",
        fidelity=settings.fidelity,
    )
    return Client(namespace=namespace, payload_bytes=payload_bytes, **identity.options)


def _check_page(codec: str, layout: Layout) -> None:
    """See whether a codec takes pages of this layout.

    Raises:
        InvalidArgument: it does not; says which --page-size it takes.
    """
    if layout.dtype not in LOSSY_DTYPES:
        # The engine quantised them itself; they are stored as they are.
        return
    try:
        get_codec(codec).check(layout)
    except ValueError as error:
        sizes = [size for size in _PAGE_SIZES if _takes(codec, layout, size)]
        instead = f"start SGLang with --page-size {sizes[0]}, or use" if sizes else "use"
        raise InvalidArgument(
            f"kvstore HiCache: codec {codec!r} does not take pages of {layout.block_tokens} tokens ({error}); "
            f"{instead} codec raw or lossless"
        ) from None


def _takes(codec: str, layout: Layout, page_tokens: int) -> bool:
    try:
        get_codec(codec).check(replace(layout, block_tokens=page_tokens))
    except ValueError:
        return False
    return True
