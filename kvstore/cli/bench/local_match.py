"""How fast a prefix is looked up: ``match`` through the mapped index, over the socket, and a dict in the same process.

All keys are there and form one chain; the store and the dict hold nothing else. Each call gets fresh key objects, as an
engine makes them for each request: a dict must hash and compare them. Its loop is the least that an index in Python
costs.
"""

from __future__ import annotations

from collections.abc import Sequence
from time import perf_counter_ns
from typing import Final

from kvstore.cli.bench.local_blocks import mapping_of, wrong
from kvstore.cli.bench.local_sides import Kind, Side, Walk, row_of, take_turns
from kvstore.cli.bench.report import Row
from kvstore.errors import Throttled
from kvstore.protocol.keys import KEY_BYTES, chain_keys
from kvstore_client import Client

__all__ = ["COUNTS", "DICT", "SOCKET", "Matches"]

COUNTS: Final = (1, 16, 256, 4096)
SOCKET: Final = "mapped=False"
DICT: Final = "dict loop"

_PAYLOAD: Final = bytes(range(64))
_LIMITS: Final = {(256, SOCKET): 8.0, (4096, DICT): 1.0}
_CALLS: Final = 32
_KEYS_A_ROUND: Final = 1 << 16
_CHUNK: Final = 8


class _Lookup(Side):
    """Looks a chain's first keys up."""

    def __init__(self, keys: Sequence[bytes], count: int) -> None:
        super().__init__()
        self._joined = b"".join(keys[:count])
        self.hits = count

    def fresh(self) -> list[bytes]:
        """Equal keys as objects that nobody saw before."""
        return [self._joined[at : at + KEY_BYTES] for at in range(0, len(self._joined), KEY_BYTES)]

    def check(self) -> None:
        """Nothing is left behind."""


class SdkMatch(_Lookup):
    """``Client.match``."""

    def __init__(self, client: Client, keys: Sequence[bytes], count: int) -> None:
        super().__init__(keys, count)
        self._client = client

    def run(self, numbers: Sequence[int]) -> None:
        """Time them."""
        match, clock, add = self._client.match, perf_counter_ns, self.times_ns.append
        for _ in numbers:
            keys = self.fresh()
            started = clock()
            found = match(keys)
            add(clock() - started)
            if found.hits != self.hits:
                raise wrong(f"match of {self.hits} keys found {found.hits}")


class DictLoop(_Lookup):
    """A loop over a dict that holds the same keys as the store."""

    def __init__(self, keys: Sequence[bytes], count: int) -> None:
        super().__init__(keys, count)
        self._known = dict.fromkeys(keys, 0)

    def run(self, numbers: Sequence[int]) -> None:
        """Time them."""
        known, clock, add = self._known, perf_counter_ns, self.times_ns.append
        for _ in numbers:
            keys = self.fresh()
            started = clock()
            for key in keys:
                if key not in known:
                    break
            add(clock() - started)


class Matches:
    """All lookups. ``round`` measures some of each, ``rows`` tells.

    Args:
        client: mapped.
        socket_client: of the same namespace, with ``mapped=False``.

    Raises:
        Throttled: the daemon did not take the blocks.
    """

    def __init__(self, client: Client, socket_client: Client) -> None:
        mapping_of(client)
        keys = chain_keys(range(COUNTS[-1]), 1, salt=b"match")
        client.put_many(keys, [_PAYLOAD] * len(keys), wait=False)
        flushed = client.flush()
        if flushed.stored + flushed.exists != len(keys):
            raise Throttled(f"the daemon did not store {len(keys)} small blocks: {flushed}")
        self._sides = [
            (SdkMatch(client, keys, count), SdkMatch(socket_client, keys, count), DictLoop(keys, count))
            for count in COUNTS
        ]

    def round(self) -> None:
        """Measure some of each."""
        for sides in self._sides:
            calls = max(_CHUNK, min(_CALLS, _KEYS_A_ROUND // sides[0].hits))
            take_turns(sides, Walk(1, 0), calls, _CHUNK)

    def rows(self) -> list[Row]:
        """What was found: two rows for each number of keys, one a baseline."""
        return [
            row_of(
                Kind("match", batch=ours.hits),
                ours.times_ns,
                name,
                baseline.times_ns,
                limit=_LIMITS.get((ours.hits, name)),
            )
            for ours, socket, loop in self._sides
            for name, baseline in ((SOCKET, socket), (DICT, loop))
        ]
