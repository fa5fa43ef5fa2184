from __future__ import annotations

import gc
import tracemalloc
from hashlib import sha256

from kvstore.policy.ghosts import GHOST_BYTES, Ghosts


def test_ghosts_shrink_forgets_the_oldest_first():
    ghosts = Ghosts()
    for name in range(5):
        ghosts.add(name, 100)
    ghosts.add(0, 150)
    ghosts.shrink(350)
    assert [name in ghosts for name in range(5)] == [True, False, False, True, True]
    assert (len(ghosts), ghosts.slot_bytes) == (3, 350)
    assert ghosts.take(3)
    assert not ghosts.take(3)
    assert ghosts.slot_bytes == 250
    ghosts.shrink(0)
    assert (len(ghosts), ghosts.slot_bytes) == (0, 0)


def test_ghosts_take_no_more_memory_than_they_say():
    ghosts = Ghosts()
    gc.collect()
    tracemalloc.start()
    for number in range(20_000):
        ghosts.add(sha256(number.to_bytes(4, "little")).digest(), 4096 + number)
    taken_bytes, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert ghosts.memory_bytes == 20_000 * GHOST_BYTES
    assert 0.5 * ghosts.memory_bytes <= taken_bytes <= ghosts.memory_bytes
