"""``TensorStore`` and ``AsyncTensorStore``: an engine's KV by block, from and into its own tensors."""

from __future__ import annotations

import os
from collections.abc import Sequence
from types import TracebackType
from typing import Any, Final, Literal, Self

import numpy as np

from kvstore.errors import InvalidArgument
from kvstore.protocol.keys import chain_keys
from kvstore.protocol.namespace import Namespace
from kvstore_client.aio import AsyncClient, AsyncMatch
from kvstore_client.arguments import check_request
from kvstore_client.base import BaseClient, OnUnknownRevision
from kvstore_client.client import Client, Match
from kvstore_client.tensors.backends import Backend, backend_for
from kvstore_client.tensors.blocks import Blocks
from kvstore_client.tensors.loading import Loading
from kvstore_client.tensors.plan import LEAST_BLOCK_TOKENS, plan
from kvstore_client.tensors.results import LoadReport, SaveReport, lineage_of
from kvstore_client.tensors.saving import Saving
from kvstore_client.tensors.work import do, do_async
from kvstore_kernels.layout import Layout
from kvstore_kernels.paged import PagedKV

__all__ = ["AsyncTensorStore", "TensorStore"]


_MOST_THREADS: Final = 256


class BaseTensorStore:
    """Arguments and state common to both stores.

    Args:
        layout: of the blocks of this shard, or one for each KV group of a hybrid model, with equal dtypes and tokens.
        codec: by name (``docs/codecs.md``). What an engine quantised itself is stored as it is, by ``raw``.
        model: as served.
        revision: of the weights, see ``unknown_revision``.
        name: of the namespace.
        tenant_salt: keeps tenants apart.
        shard, shards: rank and number of workers whose layouts are equal: tensor-parallel ones, and pipeline-parallel
            ones with as many layers each. Others have different namespaces and never match.
        group, groups: which KV group this is, and how many there are.
        fidelity: ``"exact"``: nothing lossy is ever stored or loaded.
        exact_codec: by which blocks are stored that ``codec`` cannot hold: ``raw``, ``lossless``, ``lossless-zstd``.
        engine_block_tokens: tokens of an engine's block, of which a block here is a multiple; None: the same.
        least_block_tokens: smaller blocks are refused.
        threads: that encoding and decoding may use.
        endpoint, mapped, timeout, unknown_revision, directory: see ``Client``.

    Raises:
        InvalidArgument: arguments that are wrong or do not fit each other.
    """

    _client: BaseClient

    def __init__(
        self,
        layout: Layout | Sequence[Layout],
        codec: str = "raw",
        *,
        model: str = "",
        revision: str = "",
        name: str = "default",
        tenant_salt: bytes = b"",
        shard: int = 0,
        shards: int = 1,
        group: int = 0,
        groups: int = 1,
        fidelity: Literal["any", "exact"] = "any",
        exact_codec: str = "raw",
        engine_block_tokens: int | None = None,
        least_block_tokens: int = LEAST_BLOCK_TOKENS,
        threads: int = 1,
        endpoint: str | None = None,
        mapped: bool | None = None,
        timeout: float = 5.0,
        unknown_revision: OnUnknownRevision = "warn",
        directory: str | os.PathLike[str] | None = None,
    ) -> None:
        self._plan = plan(
            layout,
            codec,
            exact_codec=exact_codec,
            engine_block_tokens=engine_block_tokens,
            at_least=least_block_tokens,
            shard=shard,
            shards=shards,
            group=group,
            groups=groups,
            fidelity=fidelity,
            name=name,
            model=model,
            revision=revision,
            tenant_salt=tenant_salt,
        )
        if type(threads) is not int or not 1 <= threads <= _MOST_THREADS:
            raise InvalidArgument(f"threads must be a whole number from 1 to {_MOST_THREADS}, got {threads!r}")
        self._threads = threads
        self._backends: dict[str, Backend] = {}
        self._client = self._connect_by(
            endpoint,
            namespace=self._plan.namespace,
            mapped=mapped,
            timeout=timeout,
            payload_bytes=self._plan.payload_bytes,
            unknown_revision=unknown_revision,
            directory=directory,
        )

    def _connect_by(self, endpoint: str | None, **options: Any) -> BaseClient:
        raise NotImplementedError

    @property
    def layout(self) -> Layout:
        """Of the blocks that this store saves and loads."""
        return self._plan.layout

    @property
    def codec(self) -> str:
        """By which blocks are stored."""
        return self._plan.records.codec.name

    @property
    def part(self) -> int:
        """Of a block, that this shard and group is."""
        return self._plan.part

    @property
    def namespace(self) -> Namespace:
        """As it was derived; stores of all shards and groups of a model derive the same."""
        return self._plan.namespace

    def chain_keys(self, tokens: Any, *, parent: bytes | None = None, salt: bytes = b"") -> list[bytes]:
        """Keys of the full blocks of a prompt's tokens; see ``kvstore_client.chain_keys``."""
        return chain_keys(tokens, self._plan.layout.block_tokens, parent=parent, salt=salt)

    def keys_of(self, engine_hashes: Sequence[bytes]) -> list[bytes]:
        """Keys of the full blocks of a prompt, from the hashes of its engine blocks.

        Each is the hash of the last engine block in it: an engine's hash covers all before it.

        Args:
            engine_hashes: 32 bytes each, from the prompt's first block on.

        Raises:
            InvalidArgument: one of the hashes is no key.
        """
        return self._plan.keys_of(engine_hashes)

    def _backend(self, kv: PagedKV) -> Backend:
        backend = self._backends.get(kv.device)
        if backend is None:
            backend = self._backends[kv.device] = backend_for(kv, self._threads)
        return backend

    def prepare(self, kv: PagedKV) -> None:
        """Compile, or load, what saving from and loading into a cache needs, which the first calls would do otherwise.

        Args:
            kv: of this store's layout, with a block's pages at least; its first pages are decoded into: use spare ones.

        Raises:
            InvalidArgument: a codec does not take these pages.
        """
        backend = self._backend(kv)
        pages = np.arange(kv.block_pages, dtype=np.int32).reshape(1, -1)
        for records in (self._plan.records, self._plan.exact_records):
            unable = backend.check(records.codec, kv)
            if unable:
                raise InvalidArgument(unable)
            memory = backend.scratch.take(records.max_payload_bytes)
            try:
                payload = np.array([memory.ctypes.data], np.uint64)
                lengths, _ = backend.encode(records.codec, kv, pages, payload, None)
                backend.decode(records.codec, kv, pages, payload, lengths, None)
            finally:
                backend.scratch.put(memory)

    def _checked(self, blocks: Blocks, stream: object) -> Backend:
        """The kernels for blocks.

        Raises:
            InvalidArgument: they do not take them.
        """
        backend = self._backend(blocks.kv)
        if stream is not None and blocks.kv.device == "cpu":
            raise InvalidArgument("stream= is for caches on a device; this one is on the CPU")
        for records in (self._plan.records, self._plan.exact_records):
            unable = backend.check(records.codec, blocks.kv)
            if unable:
                raise InvalidArgument(unable)
        return backend

    def _access(self, request: int | None) -> int:
        check_request(request)
        return request or self._client._operations.next_access()

    def _saving(
        self,
        keys: Sequence[bytes],
        source: object,
        pages: object,
        parent: bytes | None,
        lineage: int | LoadReport,
        request: int | None,
        stream: object,
        durable: bool,
    ) -> Saving:
        blocks = Blocks.of(self._plan.layout, keys, source, pages, parent, written=False)
        return Saving(
            self._client._session,
            self._client._operations,
            self._plan,
            self._checked(blocks, stream),
            blocks,
            lineage_of(lineage),
            self._access(request),
            stream,
            durable,
            self._client.timeout,
        )

    def _loading(
        self,
        keys: Sequence[bytes],
        target: object,
        pages: object,
        lineage: int | LoadReport,
        request: int | None,
        sure: bool,
        stream: object,
    ) -> Loading:
        blocks = Blocks.of(self._plan.layout, keys, target, pages, None, written=True)
        return Loading(
            self._client._session,
            self._client._operations,
            self._plan,
            self._checked(blocks, stream),
            blocks,
            lineage_of(lineage),
            self._access(request),
            sure,
            stream,
        )


class TensorStore(BaseTensorStore):
    """An engine's KV in the store, encoded on its way in and decoded on its way out, for threads that may wait.

    Thread-safe: threads encode and decode at the same time, and share one connection. Use it with ``with``.

    Args: see ``BaseTensorStore``; errors are also those of ``Client``.
    """

    client: Client

    def _connect_by(self, endpoint: str | None, **options: Any) -> Client:
        self.client = Client(endpoint, **options)
        return self.client

    def save_blocks(
        self,
        keys: Sequence[bytes],
        source: object,
        *,
        pages: object = None,
        parent: bytes | None = None,
        lineage: int | LoadReport = 255,
        request: int | None = None,
        stream: object = None,
        durable: bool = False,
    ) -> SaveReport:
        """Store blocks of a chain: ``keys[i - 1]`` is the parent of ``keys[i]``.

        Args:
            keys: of the blocks.
            source: a tensor ``[num_layers, 2, tokens, num_kv_heads, head_dim]`` (``[num_layers, tokens, latent_dim +
                rotary_dim]`` of latent attention) with the blocks side by side, or a ``PagedKV``. It must not change
                before this returns.
            pages: for a ``PagedKV``: page ids ``[len(keys), pages of a block]``.
            parent: key of the block before the first, None for a prompt's beginning.
            lineage: what the blocks were computed on: 255, or the report of the load of the blocks before them.
            request: the ``request`` of a match of the same engine request.
            stream: for a cache on a device: a ``cupy.cuda.Stream`` or a stream's handle, after whose work this is done;
                None for CuPy's current one.
            durable: wait also until the blocks, and what is stored of those before them, are in a tier that outlives
                the daemon; see ``Client.put``.

        Returns:
            What became of each block. A block that is there already is not encoded.

        Raises:
            InvalidArgument: an argument is wrong; nothing was stored then.
            ProtocolMismatch: the daemon is too old for ``durable``; nothing was stored then.
        """
        saving = self._saving(keys, source, pages, parent, lineage, request, stream, durable)
        return do(saving.run(), self.client)

    def load_blocks(
        self,
        keys: Sequence[bytes],
        target: object,
        *,
        pages: object = None,
        lineage: int | LoadReport = 255,
        request: int | None = None,
        stream: object = None,
    ) -> LoadReport:
        """Load leading blocks of a chain, up to the first that is not there or cannot be decoded.

        Args:
            keys: of the blocks.
            target: as ``source`` of ``save_blocks``; written to.
            pages: for a ``PagedKV``: page ids ``[len(keys), pages of a block]``.
            lineage: effective fidelity of the blocks before the first: 255, or the report of their load.
            request: the ``request`` of a match of the same engine request.
            stream: for a cache on a device: a ``cupy.cuda.Stream`` or a stream's handle, after whose work this is done;
                None for CuPy's current one.

        Returns:
            How many blocks are in the target now. What stands in it for the others is unspecified.

        Raises:
            InvalidArgument: an argument is wrong; the target is unchanged then.
        """
        sure = not self.client._unwaited
        return do(self._loading(keys, target, pages, lineage, request, sure, stream).run(), self.client)

    def match(self, keys: Sequence[bytes], *, lease: float | None = None, prefetch: bool = False) -> Match:
        """How many leading blocks are there with all their parts; see ``Client.match``."""
        return self.client.match(keys, lease=lease, prefetch=prefetch)

    def close(self) -> None:
        """Close the connection. May be called again."""
        self.client.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class AsyncTensorStore(BaseTensorStore):
    """``TensorStore`` for asyncio: the same arguments, results and errors. Use it with ``async with``.

    Encoding and decoding run in the loop's executor, without the interpreter lock. A cancelled call waits until what it
    computes at that moment is done; what it had not committed is not stored.
    """

    client: AsyncClient

    def _connect_by(self, endpoint: str | None, **options: Any) -> AsyncClient:
        self.client = AsyncClient(endpoint, **options)
        return self.client

    async def save_blocks(
        self,
        keys: Sequence[bytes],
        source: object,
        *,
        pages: object = None,
        parent: bytes | None = None,
        lineage: int | LoadReport = 255,
        request: int | None = None,
        stream: object = None,
        durable: bool = False,
    ) -> SaveReport:
        """See ``TensorStore.save_blocks``."""
        await self.client.connect()
        saving = self._saving(keys, source, pages, parent, lineage, request, stream, durable)
        return await do_async(saving.run(), self.client)

    async def load_blocks(
        self,
        keys: Sequence[bytes],
        target: object,
        *,
        pages: object = None,
        lineage: int | LoadReport = 255,
        request: int | None = None,
        stream: object = None,
    ) -> LoadReport:
        """See ``TensorStore.load_blocks``."""
        await self.client.connect()
        sure = not self.client._puts
        return await do_async(self._loading(keys, target, pages, lineage, request, sure, stream).run(), self.client)

    async def match(self, keys: Sequence[bytes], *, lease: float | None = None, prefetch: bool = False) -> AsyncMatch:
        """How many leading blocks are there with all their parts; see ``Client.match``."""
        return await self.client.match(keys, lease=lease, prefetch=prefetch)

    async def close(self) -> None:
        """Close the connection. May be called again."""
        await self.client.close()

    async def __aenter__(self) -> Self:
        await self.client.connect()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()
