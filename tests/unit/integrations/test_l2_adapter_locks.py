from __future__ import annotations

from kvstore_client.client import Match
from kvstore_client.integrations.l2_adapter.locks import Locks

KEYS = [bytes([number]) * 32 for number in range(1, 7)]


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def match(lease: int, lease_s: float = 10.0, request: int = 0) -> Match:
    return Match(1, ["dram"], request or 100 + lease, lease, lease_s)


def test_a_lease_ends_with_the_last_of_its_keys() -> None:
    locks, lease = Locks(), match(1)
    locks.take(KEYS[:3], lease)
    assert len(locks) == 3
    assert locks.unlock([KEYS[1]]) == []
    assert locks.unlock([KEYS[0], KEYS[5]]) == []
    assert locks.unlock([KEYS[2], KEYS[2]]) == [lease]
    assert locks.unlock(KEYS) == []
    assert len(locks) == 0


def test_a_key_that_is_locked_twice_is_unlocked_twice() -> None:
    locks, first, second = Locks(), match(1), match(2)
    locks.take(KEYS[:2], first)
    locks.take(KEYS[1:3], second)
    assert locks.unlock(KEYS[:2]) == [first]
    assert len(locks) == 2
    assert locks.unlock(KEYS[1:3]) == [second]


def test_expired_leases_are_forgotten_and_nobody_gives_them_back() -> None:
    clock = Clock()
    locks = Locks(clock)
    locks.take(KEYS[:2], match(1))
    clock.now = 5.0
    locks.take(KEYS[1:3], match(2))
    clock.now = 10.0
    assert locks.unlock([KEYS[0]]) == []
    assert len(locks) == 2
    clock.now = 15.0
    locks.take([KEYS[4]], match(3))
    assert len(locks) == 1


def test_what_was_unlocked_is_not_kept_until_it_expires() -> None:
    locks = Locks(Clock())
    for number in range(1, 1000):
        locks.take(KEYS[:2], match(number))
        assert len(locks.unlock(KEYS[:2])) == 1
    assert len(locks._by_time) <= 2


def test_a_match_without_a_lease_locks_nothing() -> None:
    locks = Locks()
    locks.take(KEYS, match(0))
    locks.take([], match(1))
    assert len(locks) == 0


def test_reads_belong_to_the_request_that_locked() -> None:
    locks = Locks()
    locks.take(KEYS[:1], match(1, request=7))
    locks.take(KEYS[:1], match(2, request=8))
    assert locks.request(KEYS[0]) == 7
    locks.unlock(KEYS[:1])
    assert locks.request(KEYS[0]) == 8
    assert locks.request(KEYS[1]) is None
