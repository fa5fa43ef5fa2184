"""The blocking client."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TypeVar

import zmq

from kvstore.errors import KVStoreError
from kvstore.format.record import RecordHeader
from kvstore.protocol.framing import encode
from kvstore.protocol.messages import Bye, Configured, PutStatus, VerifyReply
from kvstore.protocol.statistics import DaemonStats, RecordStats
from kvstore_client.arguments import check_durable, check_read
from kvstore_client.base import (
    DRAM,
    GOODBYE_MS,
    VERIFY_TIMEOUT_S,
)
from kvstore_client.blocking import Blocking
from kvstore_client.operations import MISSED, NOT_THERE
from kvstore_client.results import FlushResult, MatchResult
from kvstore_client.session import Ask
from kvstore_client.views import View
from kvstore_client.warming import WarmingCalls
from kvstore_client.why import Explanation

if TYPE_CHECKING:
    from kvstore_client.mapped_session import MappedSession

R = TypeVar("R")


@dataclass(frozen=True, slots=True)
class Match(MatchResult):
    """A match that can give its lease back; also a context manager that does so."""

    _client: Client | None = field(default=None, repr=False, compare=False)
    _session: int = field(default=0, repr=False, compare=False)

    def release(self) -> None:
        """Give the lease back, if there is one and it still holds."""
        if self.lease and self._client is not None and self._client._session.number == self._session:
            self._client.release(self.lease)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.release()


class Client(Blocking, WarmingCalls):
    """A connection to a daemon, for threads that may wait.

    Thread-safe: calls of several threads are served one after the other; a client a thread runs in parallel. Made by
    one process, it cannot be used in a forked child. Every operation ends within ``timeout`` seconds. After a restart
    of the daemon the next operation greets the new one; operations change nothing when they are repeated.

    Args: see ``BaseClient``.

    Raises:
        DaemonUnavailable: nobody answers at the endpoint.
        PermissionRefused: the daemon does not let this user in.
        ProtocolMismatch: client and daemon have no version in common.
        InvalidArgument: an argument is wrong.
    """

    def __init__(self, endpoint: str | None = None, **options: Any) -> None:
        super().__init__(endpoint, **options)
        self._load_compiled()
        with self._lock:
            self._connect(time.monotonic() + self.timeout)

    # -------------------------------------------------------------- life

    def close(self) -> None:
        """Wait for unanswered puts, say goodbye, free everything. May be called again."""
        if self._closed or self._is_of_another_process():
            return
        with contextlib.suppress(KVStoreError):
            if self._unwaited:
                self.flush()
        with self._lock:
            self._closed = True
            link, self._link = self._link, None
            self._end_mapping()
            if link is not None:
                with contextlib.suppress(zmq.ZMQError):
                    link.send(encode(self._session.request(Ask(Bye), 0.2)))
                link.close(GOODBYE_MS)
            self._session.forget()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # -------------------------------------------------------------- operations

    def put(
        self,
        key: bytes,
        data: object,
        *,
        parent: bytes | None = None,
        part: int = 0,
        wait: bool = True,
        request: int | None = None,
        durable: bool = False,
    ) -> PutStatus:
        """Store one part of a block.

        Args:
            key: 32 bytes.
            data: any contiguous buffer of at least one byte.
            parent: key of the block before it; None for a prompt's first block. It need not be there (yet).
            part: shard and KV group, 0 where there is one.
            wait: False returns ``PENDING`` as soon as the data is copied out; ``flush`` tells what became of it.
            request: the ``request`` of a match of the same engine request.
            durable: wait also until the block, and what is stored of those before it, is in a tier that outlives the
                daemon. For what was stored or there the answer is then whether that is so: ``STORED``, ``THROTTLED``
                (not yet) or ``REJECTED`` (this daemon has no such tier, or cannot write it: the log says so).

        Returns:
            ``STORED``; ``EXISTS``: the key was there and its record is kept; ``THROTTLED``: not now;
            ``REJECTED``: there is no place for it behind its own chain, or the namespace was invalidated. A put for
            which blocks have to be written to a tier below first is tried again for as long as ``timeout`` allows.

        Raises:
            InvalidArgument: a bad key, parent, part or buffer, or more data than the largest slot holds; ``durable`` of
                a put that does not wait.
            ProtocolMismatch: the daemon is too old for ``durable``; nothing was stored.
        """
        mapped = self._mapped
        if mapped is not None and not (wait or durable) and mapped.put_unwaited(key, data, parent, part, request):
            if mapped.refused:
                self._operations.note_mapped(mapped)
            return PutStatus.PENDING
        return self.put_many([key], [data], parent=parent, part=part, wait=wait, request=request, durable=durable)[0]

    def put_many(
        self,
        keys: Sequence[bytes],
        datas: Sequence[object],
        *,
        parent: bytes | None = None,
        part: int = 0,
        wait: bool = True,
        request: int | None = None,
        durable: bool = False,
    ) -> list[PutStatus]:
        """Store one part of each block of a chain: ``keys[i - 1]`` is the parent of ``keys[i]``. See ``put``."""
        self._check_usable()
        check_durable(durable, wait)
        chain = self._operations.check_chain(keys, datas, parent, part, request)
        if wait:
            return self._run(self._operations.put_chain(chain, time.monotonic() + self.timeout, durable))
        rest = self._run(self._operations.put_unwaited(chain))
        if rest.blocks:
            deadline = time.monotonic() + self.timeout
            with self._held(deadline):
                for ask in self._operations.put_asks(rest):
                    self._send_unwaited(ask, deadline)
        return [PutStatus.PENDING] * len(keys)

    def get(self, key: bytes, *, part: int = 0, request: int | None = None) -> bytes | None:
        """The data of one part of a block, or None.

        Raises:
            Throttled: the daemon would not send it now.
        """
        with self.view(key, part=part, request=request) as payload:
            return None if payload is None else bytes(payload)

    def get_into(self, key: bytes, out: object, *, part: int = 0, request: int | None = None) -> int | None:
        """Copy the data into a writable contiguous buffer; its length in bytes, or None for a miss.

        Raises:
            InvalidArgument: ``out`` is too small, read-only or not contiguous; it is unchanged then.
        """
        mapped = self._mapped
        if mapped is not None:
            check_read(part, request)
            below = mapped.lower_tiers
            length = mapped.get_into(key, out, part, request or 0, not (self._unwaited or below))
            if length >= 0:
                return length
            if length in NOT_THERE:
                return None
            if below and length == MISSED:
                return self._receive_into([key], [out], [key], part, request)[0]
        return self._receive_into([key], [out], [], part, request)[0]

    def get_many_into(
        self, keys: Sequence[bytes], outs: Sequence[object], *, part: int = 0, request: int | None = None
    ) -> list[int | None]:
        """Copy the data of several blocks, each into its buffer; lengths, None for a miss. See ``get_into``."""
        mapped = self._mapped
        if mapped is None or len(keys) != len(outs) or not keys:
            return self._receive_into(keys, outs, [], part, request)
        found = self._read_mapped(mapped, keys, outs, part, request, sure=not self._unwaited)
        if isinstance(found, list):
            return list[int | None](found)
        if found.asked:
            found.fill(self._receive_into(*found.arguments(), part, found.access or None))
        return found.lengths

    def _receive_into(
        self, keys: Sequence[bytes], outs: Sequence[object], missed: Sequence[bytes], part: int, request: int | None
    ) -> list[int | None]:
        return self._run(self._operations.read_rest(keys, outs, missed, part, request))

    def _receive_one(
        self, pin: Callable[[MappedSession], bool], key: bytes, part: int, request: int | None, missed: bool
    ) -> tuple[RecordHeader, memoryview] | None:
        return self._run(self._operations.view_rest(pin, key, part, request, missed))

    def view(self, key: bytes, *, part: int = 0, request: int | None = None) -> View:
        """A read-only memoryview of the data, valid inside the ``with``; None for a miss.

        Mapped, it is the daemon's memory itself, kept from being used again until the ``with`` ends, and as long as
        something made from it (a slice, an array) is there. Else it is a received copy.
        """
        return View(self, key, part, request)

    def match(self, keys: Sequence[bytes], *, lease: float | None = None, prefetch: bool | float = False) -> Match:
        """How many leading blocks are complete, and in which tiers.

        Args:
            keys: a chain's keys, from the first block on.
            lease: seconds for which the hits must not be evicted. Leases of a client that dies end at once. Where they
                may not hold as much as that (``limits.lease_share``), the hits are the leading blocks that are held.
            prefetch: those of the hits that are in tiers below DRAM begin to come up; the gets then wait less. As a
                number: what did not begin to within so many seconds is dropped (True: 30).

        Raises:
            InvalidArgument: a lease longer than the daemon's ``limits.max_lease_s``.
            Throttled: this client holds too many leases, or all leases together hold what they may.
        """
        mapped = self._mapped
        if mapped is not None and lease is None and not self._unwaited:
            known = self._match_mapped(mapped, keys)
            if known is not None:
                return Match(known[0], DRAM * known[0], known[1], 0, 0.0, known[2], 0, self, 0)
        found = self._run(self._operations.match(keys, lease, prefetch))
        fields = (found.hits, found.tiers, found.request, found.lease, found.lease_s, found.fidelity, found.recompute)
        return Match(*fields, self, self._session.number)

    def release(self, lease: int) -> bool:
        """Give a lease back; whether it still held."""
        return self._run(self._operations.release(lease))

    def exists(self, keys: Sequence[bytes]) -> list[bool]:
        """Whether each block is complete. Counts as no access."""
        return self._run(self._operations.exists(keys))

    def remove(self, keys: Sequence[bytes]) -> int:
        """Remove blocks; how many were there. Blocks behind them stay, and are the first to be evicted."""
        return self._run(self._operations.remove(keys))

    def clear(self) -> int:
        """Remove all blocks of the namespace; how many there were."""
        return self._run(self._operations.clear())

    def flush(self) -> FlushResult:
        """Return when all earlier puts of this client are published or refused; what became of ``wait=False`` puts."""
        return self._run(self._operations.flush())

    def invalidate(self) -> None:
        """Say that what this client computes from now on differs from before (weights changed in place).

        The namespace moves to its next generation and all its blocks go. Where another client already said so, this
        one joins the current generation. Clients that do not say so read misses and their puts are rejected.
        """
        self._run(self._operations.invalidate())

    def retain(
        self, keys: Sequence[bytes], *, priority: int = 80, ttl_s: float | None = None, drop: bool = False
    ) -> int:
        """Have blocks leave DRAM later than others, or earlier; softly: no put is ever refused for it.

        Blocks of a priority above 50 leave after all of a lower one, and those before them in DRAM are retained as
        well; blocks of a priority below 50 leave before all others. What was said last of a block counts. See
        docs/retention.md.

        Args:
            keys: of the blocks.
            priority: 0 to 100; 50 is normal, and ends what was said before.
            ttl_s: for so many seconds; None: until it is changed, or the daemon ends.
            drop: the blocks are removed then, from all tiers.

        Returns:
            How many of the blocks are retained so, or will be once they are back in DRAM. Where that would be more
            than the daemon's ``retention.budget_bytes``, those of the lowest priority lose it.

        Raises:
            InvalidArgument: naming the argument.
            ProtocolMismatch: the daemon is too old for this.
        """
        return self._run(self._operations.retain(keys, priority, ttl_s, drop))

    def why(
        self, keys: Sequence[bytes], *, chained: bool = True, prefixes: Sequence[str] = (), namespace: str = ""
    ) -> Explanation:
        """Why keys hit or miss: where their blocks are, what became of them, and what would have kept them.

        Counts as no access. ``print(client.why(keys).text)`` is for people.

        Args:
            keys: of blocks, at most 4096, whether they are there or not.
            chained: they are a prompt's, from its first block on, as ``chain_keys`` gives them; False: each for itself.
            prefixes: first hexadecimal digits (8 or more) of further keys, of which one is known.
            namespace: first hexadecimal digits (8 or more) of another namespace's digest; "": this client's.

        Raises:
            InvalidArgument: too many keys, digits that begin no key or several, an unknown namespace, or a daemon
                that does not explain misses (``explain.memory_bytes`` is 0).
            ProtocolMismatch: the daemon is too old for this.
        """
        return self._run(self._operations.why(keys, chained, prefixes, namespace))

    def stats(self) -> DaemonStats:
        """The daemon's statistics."""
        return self._run(self._operations.stats())

    def configure(self, *, policy: str = "", ssd_policy: str = "", admission: str = "") -> Configured:
        """Change the policies of the running daemon, for all its clients; no block is lost.

        Its settings stay as they are, so it lasts until the daemon ends. An empty name changes nothing.

        Args:
            policy: eviction policy of DRAM; docs/eviction.md has those there are.
            ssd_policy: eviction policy of the SSD.
            admission: what is written to the SSD when it leaves DRAM: "all" or "predicted".

        Returns:
            The names of what the daemon has now.

        Raises:
            InvalidArgument: a name is unknown or no text, or there is no SSD tier; nothing was changed.
            ProtocolMismatch: the daemon is too old for this.
        """
        return self._run(self._operations.configure(policy, ssd_policy, admission))

    def record(self, action: str = "") -> RecordStats:
        """Have the daemon record what is looked up, or end that; docs/tune.md says what for.

        Args:
            action: "start", "stop", or "" to change nothing. To start what goes on, or to stop what does not, is no
                error.

        Returns:
            How it goes now.

        Raises:
            InvalidArgument: the daemon cannot make a file, or there is no such action.
            ProtocolMismatch: the daemon is too old for this.
        """
        return self._run(self._operations.record(action))

    def verify(self, *, timeout: float = VERIFY_TIMEOUT_S) -> VerifyReply:
        """Have the daemon check its invariants and the checksum of every record; corrupt ones leave the store."""
        return self._run(self._operations.verify(), timeout)

    def ping(self) -> float:
        """Seconds of one round trip."""
        begin = time.perf_counter()
        self._run(self._operations.ping())
        return time.perf_counter() - begin
