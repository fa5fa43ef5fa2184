"""The KV of transformers models in the store: a ``Cache`` that begins with the longest stored prefix of a prompt.

    store = CacheStore(model, codec="lossless")
    with store.load(input_ids) as cache:
        output = model.generate(input_ids, past_key_values=cache)

Covers: models that decode only, with ordinary attention in all layers, also within a window; one sequence a cache.
Does not cover: what such a model is and which tokens are known, see ``transformers_cache``. ``docs/transformers.md`` is
the page for users.
"""

from __future__ import annotations

import inspect
import logging
import os
import threading
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from types import TracebackType
from typing import Any, Final, Literal, Self

import numpy as np

from kvstore.errors import InvalidArgument
from kvstore.format.constants import FIDELITY_EXACT
from kvstore.protocol.keys import chain_keys
from kvstore.protocol.messages import PutStatus
from kvstore_client.base import OnUnknownRevision
from kvstore_client.integrations.versions import require
from kvstore_client.tensors import Failure, LoadReport, SaveReport, TensorStore
from kvstore_client.tensors.plan import LEAST_BLOCK_TOKENS
from kvstore_kernels.layout import KVLayout

require("the transformers cache", ("transformers",), at_least="4.57", below="6")

from transformers import DynamicCache  # noqa: E402

from kvstore_client.integrations.transformers_cache.link import StoreLink  # noqa: E402
from kvstore_client.integrations.transformers_cache.model import (  # noqa: E402
    ModelKV,
    described,
    known_revision,
    weights_digest,
)
from kvstore_client.integrations.transformers_cache.states import (  # noqa: E402
    States,
    empty_states,
    layer_of,
    page_ids,
    pages_of,
    stream_of,
)
from kvstore_client.integrations.transformers_cache.tokens import (  # noqa: E402
    TokenRecord,
    Tokens,
    cache_in,
    named_arguments,
    token_ids,
)

__all__ = ["CacheStats", "CacheStore", "KVStoreCache", "weights_digest"]

_LEASE_S: Final = 10.0
_AGAIN_S: Final = 0.02
_log: Final = logging.getLogger("kvstore_client")


@dataclass(slots=True)
class CacheStats:
    """What a store did since it was made.

    Attributes:
        prompts: that were loaded for.
        prompt_tokens: tokens of these.
        loaded_tokens: of them, that came from the store.
        stored_blocks, stored_bytes: that were saved and not there before, and their encoded bytes.
        refused_blocks: that were to be saved and that the store did not take.
        unreadable: prefixes that ended at a block that is there and could not be decoded.
        missed: loads and saves that did without the store, because it could not be reached.
    """

    prompts: int = 0
    prompt_tokens: int = 0
    loaded_tokens: int = 0
    stored_blocks: int = 0
    stored_bytes: int = 0
    refused_blocks: int = 0
    unreadable: int = 0
    missed: int = 0


@dataclass(slots=True)
class _Prefix:
    """What was found of a prompt."""

    keys: list[bytes] = field(default_factory=list)
    states: States = field(default_factory=list)
    report: LoadReport | None = None
    request: int | None = None
    match_s: float = 0.0
    load_s: float = 0.0


class CacheStore:
    """The store for the KV of one model. Use it with ``with``, or ``close()`` it.

    It listens to the model's forward, to know which tokens its caches are fed. May be used by several threads; a cache
    belongs to one.

    Args:
        model: a ``PreTrainedModel`` that decodes only, with its KV on one device, the CPU or CUDA. Its decoder reads
            three tokens here, for the shape of its KV.
        codec: by which blocks are stored, by name (``docs/codecs.md``).
        revision: of the weights, adapters included; None: the commit that transformers loaded them from.
        unknown_revision: what to do where nobody knows one: ``"refuse"``, ``"warn"`` or ``"ignore"``.
        model_name: in the namespace; None: the name or path that the model was loaded by.
        block_tokens: tokens a block; codecs by channel need a multiple of 64.
        required: False goes on without a daemon that is not there, and looks for it again every few seconds.
        name, tenant_salt, fidelity, exact_codec, threads, endpoint, mapped, timeout, directory: see ``TensorStore``.

    Raises:
        InvalidArgument: the model has KV that cannot be cut into blocks, its revision is not known, or another argument
            is wrong.
        DaemonUnavailable: nobody answers at the endpoint, and ``required``; also other errors of ``Client``.
    """

    def __init__(
        self,
        model: Any,
        codec: str = "raw",
        *,
        revision: str | None = None,
        unknown_revision: OnUnknownRevision = "refuse",
        model_name: str | None = None,
        block_tokens: int = LEAST_BLOCK_TOKENS,
        required: bool = True,
        name: str = "default",
        tenant_salt: bytes = b"",
        fidelity: Literal["any", "exact"] = "any",
        exact_codec: str = "raw",
        threads: int = 1,
        endpoint: str | None = None,
        mapped: bool | None = None,
        timeout: float = 5.0,
        directory: str | os.PathLike[str] | None = None,
    ) -> None:
        if unknown_revision not in ("refuse", "warn", "ignore"):
            raise InvalidArgument(f"unknown_revision must be 'refuse', 'warn' or 'ignore', got {unknown_revision!r}")
        weights = known_revision(model, revision, refuse=unknown_revision == "refuse")
        self._kv = ModelKV.of(model, block_tokens)
        self._closed = False
        self._lock = threading.Lock()
        self._stats = CacheStats()
        options: dict[str, Any] = {
            "model": described(self._kv.config, model_name),
            "revision": weights,
            "unknown_revision": unknown_revision,
            "name": name,
            "tenant_salt": tenant_salt,
            "fidelity": fidelity,
            "exact_codec": exact_codec,
            "least_block_tokens": min(block_tokens, LEAST_BLOCK_TOKENS),
            "threads": threads,
            "endpoint": endpoint,
            "mapped": mapped,
            "timeout": timeout,
            "directory": directory,
        }
        self._link = StoreLink(lambda: TensorStore(self.layout, codec, **options), required=required)
        self._observing = self._kv.decoder.register_forward_pre_hook(_Observer(self), with_kwargs=True)

    @property
    def layout(self) -> KVLayout:
        """Of a block."""
        return self._kv.layout

    @property
    def tensors(self) -> TensorStore | None:
        """The store of tensors beneath; None as long as no daemon was reached."""
        return self._link.store

    @property
    def stats(self) -> CacheStats:
        """What was done so far; a copy."""
        with self._lock:
            return replace(self._stats, missed=self._link.missed)

    def load(self, input_ids: Any) -> KVStoreCache:
        """A cache for a prompt, with the longest prefix of it that is stored; empty where there is none.

        At least the prompt's last token is left to compute: its logits are what generation begins with.

        Args:
            input_ids: of the whole prompt, ``[1, tokens]`` or ``[tokens]``, without padding.

        Returns:
            What to pass to ``generate`` or ``forward`` as ``past_key_values``, for this prompt.

        Raises:
            InvalidArgument: not the token ids of one sequence, or the store is closed.
        """
        self._check_open()
        tokens = token_ids(input_ids)
        usable = self.layout.full_blocks(len(tokens) - 1) * self.layout.block_tokens
        keys = chain_keys(tokens[:usable], self.layout.block_tokens)
        prefix = (self._link.attempt(lambda tensors: self._load(tensors, keys)) if keys else None) or _Prefix()
        cache = KVStoreCache(self, tokens, prefix)
        with self._lock:
            self._stats.prompts += 1
            self._stats.prompt_tokens += len(tokens)
            self._stats.loaded_tokens += cache.loaded_tokens
        return cache

    def empty(self) -> KVStoreCache:
        """A cache for any prompt, for which nothing is loaded: what is computed in it can be saved."""
        self._check_open()
        return KVStoreCache(self, np.empty(0, np.int64), _Prefix())

    def _load(self, tensors: TensorStore, keys: list[bytes]) -> _Prefix:
        """Find leading blocks and load them."""
        device = self._kv.device
        begin = time.perf_counter()
        match = tensors.match(keys, lease=_LEASE_S, prefetch=True)
        found = _Prefix(request=match.request, match_s=time.perf_counter() - begin)
        try:
            if not len(match):
                return found
            keys = keys[: len(match)]
            found.states = empty_states(self.layout, len(keys), device)
            found.report = tensors.load_blocks(
                keys,
                pages_of(self.layout, found.states),
                pages=page_ids(0, len(keys)),
                request=match.request,
                stream=stream_of(device),
            )
        finally:
            match.release()
        found.keys = keys[: found.report.loaded]
        found.load_s = time.perf_counter() - begin - found.match_s
        if found.report.failure not in (None, Failure.MISS, Failure.THROTTLED):
            with self._lock:
                self._stats.unreadable += 1
            _log.warning("a stored prefix cannot be loaded to its end: %s", found.report.detail)
        return found

    def _save(self, cache: KVStoreCache, keys: list[bytes], states: States, first: int, retry_s: float) -> SaveReport:
        """Save blocks ``first`` to the last of a chain; those that are throttled are tried again for a while."""
        kv = pages_of(self.layout, states)
        deadline = time.monotonic() + retry_s
        made = SaveReport((PutStatus.THROTTLED,) * (len(keys) - first), dict.fromkeys(range(len(keys) - first), "away"))

        def save(tensors: TensorStore) -> SaveReport:
            at = first + _settled(made)
            return tensors.save_blocks(
                keys[at:],
                kv,
                pages=page_ids(at, len(keys)),
                parent=keys[at - 1] if at else None,
                lineage=FIDELITY_EXACT if cache.loaded is None else cache.loaded,
                request=cache._request,
                stream=stream_of(self._kv.device),
            )

        while (saved := self._link.attempt(save)) is not None:
            made = _joined(made, saved, _settled(made))
            if PutStatus.THROTTLED not in made.statuses or time.monotonic() >= deadline:
                break
            time.sleep(_AGAIN_S)
        refused = len(made.statuses) - made.stored - made.exists
        with self._lock:
            self._stats.stored_blocks += made.stored
            self._stats.stored_bytes += made.stored_bytes
            self._stats.refused_blocks += refused
        if refused:
            _log.info("%d blocks were not stored: %s", refused, ", ".join(sorted(set(made.reasons.values()))))
        return made

    def invalidate(self) -> None:
        """Forget all blocks of this namespace, for all who use it: the weights were changed in place.

        Raises:
            KVStoreError: the daemon cannot be reached.
        """
        self._check_open()
        self._link.reach().client.invalidate()

    def close(self) -> None:
        """Listen to the model no more and close the connection. May be called again; caches go on as plain ones."""
        self._closed = True
        self._observing.remove()
        self._link.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """A copied cache has the same store."""
        return self

    def _check_open(self) -> None:
        if self._closed:
            raise InvalidArgument("this store is closed; make a new CacheStore")


class KVStoreCache(DynamicCache):
    """A cache of one sequence, as ``CacheStore.load`` makes it; beyond that a ``DynamicCache``.

    ``save()`` stores the full blocks of what it was fed; so does the end of its ``with`` block, unless by an exception.

    Attributes:
        loaded: the report of the load, None where nothing was found.
        match_s, load_s: seconds that finding the prefix and loading it took.
    """

    def __init__(self, store: CacheStore, tokens: Tokens, prefix: _Prefix) -> None:
        # Without a configuration all layers keep all tokens, those with a window too: masks hide what is outside of it,
        # and every block can be stored and loaded.
        super().__init__()
        self.loaded = prefix.report
        self.match_s, self.load_s = prefix.match_s, prefix.load_s
        self._store = store
        self._keys = prefix.keys
        self._request = prefix.request
        self._saved = len(prefix.keys)
        count = self._saved * store.layout.block_tokens
        self._record = TokenRecord(tokens[:count], tokens[count:])
        if count:
            self.layers = [layer_of(keys[:, :, :count], values[:, :, :count]) for keys, values in prefix.states]

    @property
    def loaded_tokens(self) -> int:
        """Tokens whose KV came from the store."""
        return 0 if self.loaded is None else self.loaded.loaded * self._store.layout.block_tokens

    @property
    def unsaved(self) -> str:
        """Why what comes will not be saved, "" where it will: the token ids behind its KV are not known for certain."""
        return self._record.why

    def save(self, *, retry_s: float = 1.0) -> SaveReport:
        """Store the full blocks that are complete now and were not saved yet.

        Only what the model's forward was seen to compute from token ids is saved, under these ids.

        Args:
            retry_s: seconds for which blocks are tried again that the daemon throttles.

        Returns:
            What became of them; where the daemon is away they are throttled, for the reason ``away``, and the next
            ``save()`` tries them again.

        Raises:
            InvalidArgument: the cache is not of the store's model any more (another dtype), or the store is closed.
        """
        store = self._store
        store._check_open()
        block_tokens = store.layout.block_tokens
        lengths = {layer.get_seq_length() for layer in self.layers}
        tokens = self._record.take(lengths.pop() if len(lengths) == 1 else 0)
        if self.unsaved:
            _log.info("blocks behind token %d are not saved: %s", len(tokens), self.unsaved)
        count, known = len(tokens) // block_tokens, len(self._keys)
        if count > known:
            parent = self._keys[-1] if known else None
            self._keys += chain_keys(tokens[known * block_tokens : count * block_tokens], block_tokens, parent=parent)
        if count <= self._saved:
            return SaveReport(())
        end = count * block_tokens
        states = [(layer.keys[:1, :, :end], layer.values[:1, :, :end]) for layer in self.layers]
        report = store._save(self, self._keys[:count], states, self._saved, retry_s)
        self._saved += _settled(report)
        return report

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.save()

    # -------------------------------------------------------------- what changes it besides the forward

    def crop(self, *args: Any, **kwargs: Any) -> None:
        """See ``DynamicCache``; what is cut off is forgotten."""
        before = self.get_seq_length()
        super().crop(*args, **kwargs)
        self._record.crop(before, self.get_seq_length())
        self._forget_behind(self.get_seq_length())

    def reset(self) -> None:
        """See ``DynamicCache``; nothing is saved any more."""
        before = self.get_seq_length()
        super().reset()
        self._record.crop(before, 0)
        self._record.end("the cache was reset", 0)
        self._forget_behind(0)

    def reorder_cache(self, *args: Any, **kwargs: Any) -> None:
        """See ``DynamicCache``; what all beams have in common is saved."""
        self._record.end("beams were reordered", self.get_seq_length())
        super().reorder_cache(*args, **kwargs)

    def batch_repeat_interleave(self, *args: Any, **kwargs: Any) -> None:
        """See ``DynamicCache``; what was computed before is saved."""
        self._record.end("one sequence became several", self.get_seq_length())
        super().batch_repeat_interleave(*args, **kwargs)

    def batch_select_indices(self, *args: Any, **kwargs: Any) -> None:
        """See ``DynamicCache``; what was computed before is saved."""
        self._record.end("sequences were selected", self.get_seq_length())
        super().batch_select_indices(*args, **kwargs)

    def _forget_behind(self, tokens: int) -> None:
        blocks = tokens // self._store.layout.block_tokens
        del self._keys[blocks:]
        self._saved = min(self._saved, blocks)


class _Observer:
    """A hook that tells a store's caches what the forward is given. A copy of it (of a model) tells nothing."""

    def __init__(self, store: CacheStore | None = None) -> None:
        self._store: Callable[[], CacheStore | None] = _none if store is None else weakref.ref(store)
        self._names = () if store is None else tuple(inspect.signature(store._kv.decoder.forward).parameters)

    def __call__(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        arguments = named_arguments(self._names, args, kwargs)
        cache = cache_in(arguments)
        if isinstance(cache, KVStoreCache) and cache._store is self._store():
            cache._record.observe(arguments, cache.get_seq_length())

    def __reduce__(self) -> tuple[type[_Observer], tuple[()]]:
        return _Observer, ()


def _none() -> None:
    return None


def _settled(report: SaveReport) -> int:
    """Leading blocks that are in the store, or never will be."""
    statuses = report.statuses
    return next((at for at, status in enumerate(statuses) if status == PutStatus.THROTTLED), len(statuses))


def _joined(before: SaveReport, after: SaveReport, at: int) -> SaveReport:
    """One report of two tries, the second of blocks ``at`` to the last."""
    statuses = list(before.statuses)
    for index, status in enumerate(after.statuses, at):
        if statuses[index] != PutStatus.STORED:  # by the first try: it is there already for the second
            statuses[index] = status
    reasons = {index: why for index, why in before.reasons.items() if index < at}
    return SaveReport(
        tuple(statuses),
        {**reasons, **{at + index: why for index, why in after.reasons.items()}},
        tuple(sorted({*before.void, *(at + index for index in after.void)})),
        before.raw_bytes + after.raw_bytes,
        before.stored_bytes + after.stored_bytes,
    )
