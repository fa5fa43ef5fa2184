"""Plugin for LMCache's own test-suite: its mock L2 adapter is ours, with a daemon and a namespace for each one made.

Loaded by ``test_lmcache.py`` in a process of its own, before LMCache's tests import the mock. What these tests
ask of the mock beyond the interface is answered by asking the store: how many objects there are, which, how many are
locked. A mock's bandwidth is kept by waiting, so that its tests of slow adapters find one.
"""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Callable
from typing import Any

import lmcache
import lmcache.v1.distributed.l2_adapters.mock_l2_adapter as mock

from kvstore_client.integrations.l2_adapter.keys import named
from kvstore_client.integrations.lmcache import KVStoreL2Adapter

_numbers = itertools.count()


class AdapterInPlaceOfMock(KVStoreL2Adapter):
    """Ours, made from the mock's configuration."""

    def __init__(self, config: Any) -> None:
        name = f"suite-{os.getpid()}-{next(_numbers)}"
        super().__init__({"endpoint": os.environ["KVSTORE_SUITE_ENDPOINT"], "name": name, "unknown_revision": "ignore"})
        self._config = config
        # The mock's tests of usage want a capacity; the mock evicts nothing by itself either.
        self._max_capacity_bytes = int(config.max_size_gb * (1 << 30))

    def _wait(self, objects: list[Any], ended: Callable[[], bool]) -> None:
        size = sum(each.get_size() for each in objects)
        end = time.monotonic() + size / (self._config.mock_bandwidth_gb * (1 << 30))
        while time.monotonic() < end and not ended():
            time.sleep(0.002)

    def _store(self, task: int, keys: list[Any], objects: list[Any], size: int, ended: Callable[[], bool]) -> None:
        self._wait(objects, ended)
        super()._store(task, keys, objects, size, ended)

    def _load(self, task: int, keys: list[Any], objects: list[Any], ended: Callable[[], bool]) -> None:
        self._wait(objects, ended)
        super()._load(task, keys, objects, ended)

    def debug_get_stored_object_count(self) -> int:
        with self._guard:
            return len(self._sizes)

    def debug_has_key(self, key: Any) -> bool:
        wanted = [named(key).key]
        places = self._places.known(key.model_name)
        return any(self._sessions.use(place, lambda session: session.client.exists(wanted))[0] for place in places)

    def debug_get_locked_key_count(self) -> int:
        return len(self._locks)


mock.MockL2Adapter = AdapterInPlaceOfMock
# LMCache skips its controllers' tests where there is no GPU; they need none.
lmcache.torch_dev.is_available = lambda: True
