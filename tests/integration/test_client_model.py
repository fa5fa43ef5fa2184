"""Hypothesis drives two clients of two kinds against a live daemon and a plain dict: the same answers, always.

The tier is large enough for everything, so a block that was stored is there until it is removed. In a second machine it
is not: what a call says to have stored is there when it returns, and what is there can be reached.
"""

from __future__ import annotations

import random
from contextlib import ExitStack
from itertools import count

import pytest
from client_adapter import CLIENTS, AnyClient
from daemon_process import DaemonProcess, wait_until_nothing_is_lent
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from kvstore.settings import Settings
from kvstore_client import Namespace, PutStatus

PARTS = 2
BLOCKS = 24
CHAIN = 6
"""Blocks 0 to 5 are one chain, 6 to 11 the next, ..."""

GRANT_BYTES_PER_SESSION = Settings().limits.grant_bytes_per_session

BLOCK = st.integers(0, BLOCKS - 1)
PART = st.integers(0, PARTS - 1)
LENGTH = st.sampled_from([1, 3, 100, 3840, 3841, 4096, 20_000, 65_280, 65_536, 150_000])
WHO = st.sampled_from([0, 1])

_runs = count()


def key(block: int) -> bytes:
    return (block + 1).to_bytes(4, "big") * 8


def parent(block: int) -> bytes | None:
    return key(block - 1) if block % CHAIN else None


def payload(seed: int, length: int) -> bytes:
    return random.Random(seed).randbytes(length)


class Clients(RuleBasedStateMachine):
    """``blocks[block][part]`` is what both clients of the current generation must find."""

    daemon: DaemonProcess

    def __init__(self) -> None:
        super().__init__()
        self.stack = ExitStack()
        self.blocks: dict[int, dict[int, bytes]] = {}
        self.generation = 0
        self.generations = [0, 0]
        self.leases: list[object] = []
        self.seeds = count()
        self.namespace = Namespace(name=f"model-{next(_runs)}", parts=PARTS)

    @initialize(kinds=st.permutations(list(CLIENTS)))
    def connect(self, kinds: list[str]) -> None:
        self.kinds = kinds[:2]
        self.clients = [self.make(kind) for kind in self.kinds]

    def make(self, kind: str) -> AnyClient:
        return self.stack.enter_context(CLIENTS[kind](self.daemon.endpoint, namespace=self.namespace, timeout=20.0))

    def current(self, who: int) -> bool:
        return self.generations[who] == self.generation

    def visible(self, who: int) -> dict[int, dict[int, bytes]]:
        return self.blocks if self.current(who) else {}

    def store(self, who: int, block: int, part: int, data: bytes) -> PutStatus:
        """What a put must answer, and what it changes."""
        if not self.current(who):
            return PutStatus.REJECTED
        parts = self.blocks.setdefault(block, {})
        if part in parts:
            return PutStatus.EXISTS
        parts[part] = data
        return PutStatus.STORED

    # -------------------------------------------------------------- writing

    @rule(who=WHO, block=BLOCK, part=PART, length=LENGTH)
    def put(self, who: int, block: int, part: int, length: int) -> None:
        data = payload(next(self.seeds), length)
        expected = self.store(who, block, part, data)
        assert self.clients[who].put(key(block), data, parent=parent(block), part=part) is expected

    @rule(who=WHO, chain=st.integers(0, BLOCKS // CHAIN - 1), first=st.integers(0, CHAIN - 1), part=PART, length=LENGTH)
    def put_chain(self, who: int, chain: int, first: int, part: int, length: int) -> None:
        numbers = range(chain * CHAIN + first, (chain + 1) * CHAIN)
        datas = [payload(next(self.seeds), length) for _ in numbers]
        expected = [self.store(who, block, part, data) for block, data in zip(numbers, datas, strict=True)]
        keys = [key(block) for block in numbers]
        assert self.clients[who].put_many(keys, datas, parent=parent(numbers[0]), part=part) == expected

    @rule(who=WHO, blocks=st.lists(BLOCK, min_size=1, max_size=5), part=PART, length=LENGTH)
    def put_without_wait(self, who: int, blocks: list[int], part: int, length: int) -> None:
        client = self.clients[who]
        expected = []
        for block in blocks:
            data = payload(next(self.seeds), length)
            expected.append(self.store(who, block, part, data))
            assert client.put(key(block), data, parent=parent(block), part=part, wait=False) is PutStatus.PENDING
        assert client.get(key(blocks[-1]), part=part) == self.visible(who).get(blocks[-1], {}).get(part)
        done = client.flush()
        assert (done.stored, done.exists, done.rejected, done.throttled, done.lost) == (
            expected.count(PutStatus.STORED),
            expected.count(PutStatus.EXISTS),
            expected.count(PutStatus.REJECTED),
            0,
            0,
        )

    @rule(who=WHO, blocks=st.lists(BLOCK, max_size=4))
    def remove(self, who: int, blocks: list[int]) -> None:
        there = self.visible(who)
        expected = sum(there.pop(block, None) is not None for block in blocks)
        assert self.clients[who].remove([key(block) for block in blocks]) == expected

    @rule(who=WHO)
    def clear(self, who: int) -> None:
        there = self.visible(who)
        assert self.clients[who].clear() == len(there)
        there.clear()

    @rule(who=WHO)
    def invalidate(self, who: int) -> None:
        self.clients[who].invalidate()
        if self.current(who):
            self.generation += 1
            self.blocks.clear()
        self.generations[who] = self.generation
        assert self.clients[who].generation == self.generation

    # -------------------------------------------------------------- reading

    @rule(who=WHO, block=BLOCK, part=PART)
    def get(self, who: int, block: int, part: int) -> None:
        assert self.clients[who].get(key(block), part=part) == self.visible(who).get(block, {}).get(part)

    @rule(who=WHO, blocks=st.lists(BLOCK, max_size=8), part=PART)
    def get_many_into(self, who: int, blocks: list[int], part: int) -> None:
        outs = [bytearray(150_000) for _ in blocks]
        lengths = self.clients[who].get_many_into([key(block) for block in blocks], outs, part=part)
        for block, out, length in zip(blocks, outs, lengths, strict=True):
            expected = self.visible(who).get(block, {}).get(part)
            assert length == (None if expected is None else len(expected))
            assert out[: length or 0] == (expected or b"")
            assert not any(out[length or 0 :])

    @rule(who=WHO, block=BLOCK, part=PART)
    def view(self, who: int, block: int, part: int) -> None:
        with self.clients[who].view(key(block), part=part) as found:
            assert found == self.visible(who).get(block, {}).get(part)

    @rule(who=WHO)
    def exists_and_prefetch(self, who: int) -> None:
        keys = [key(block) for block in range(BLOCKS)]
        complete = [len(self.visible(who).get(block, {})) == PARTS for block in range(BLOCKS)]
        assert self.clients[who].exists(keys) == complete
        assert self.clients[who].prefetch(keys) == sum(complete)

    @rule(who=WHO, chain=st.integers(0, BLOCKS // CHAIN - 1), lease=st.none() | st.just(30.0))
    def match(self, who: int, chain: int, lease: float | None) -> None:
        numbers = range(chain * CHAIN, (chain + 1) * CHAIN)
        complete = [len(self.visible(who).get(block, {})) == PARTS for block in numbers]
        expected = complete.index(False) if False in complete else CHAIN
        found = self.clients[who].match([key(block) for block in numbers], lease=lease)
        assert (len(found), found.tiers) == (expected, ["dram"] * expected)
        assert bool(found.lease) == (lease is not None and expected > 0)
        if found.lease:
            self.leases.append(found)

    @precondition(lambda self: self.leases)
    @rule()
    def release(self) -> None:
        self.leases.pop().release()  # type: ignore[attr-defined]

    # -------------------------------------------------------------- life

    @rule(who=WHO)
    def reconnect(self, who: int) -> None:
        self.clients[who].close()
        self.leases.clear()
        self.clients[who] = self.make(self.kinds[who])
        self.generations[who] = self.generation
        assert self.clients[who].generation == self.generation

    @invariant()
    def nothing_is_lent(self) -> None:
        if hasattr(self, "clients"):
            stats = self.clients[0].stats()
            assert stats.eviction.evicted_blocks == 0
            assert stats.eviction.corrupt_records == 0
            # Mapped clients are lent slots ahead, though not more than their share.
            mapped = sum(session.mapped for session in stats.sessions)
            assert stats.dram.granted_bytes <= mapped * GRANT_BYTES_PER_SESSION
            for session in stats.sessions:
                assert session.mapped or not session.granted_bytes

    def teardown(self) -> None:
        if hasattr(self, "clients"):
            client = self.clients[0]
            if not self.current(0):
                client.invalidate()
            assert client.verify().problems == []
            client.clear()
        self.stack.close()


@pytest.mark.timeout(150)
def test_clients_answer_as_a_dict_does(daemon: DaemonProcess):
    machine = type("ClientsOfTheDaemon", (Clients,), {"daemon": daemon})
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=150, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck)
        ),
    )
    with daemon.connect() as watching:
        wait_until_nothing_is_lent(watching.stats)


class ClientsOfASmallTier(RuleBasedStateMachine):
    """Chains that are put piece by piece, by clients of two kinds, into a tier that has room for two of four."""

    daemon: DaemonProcess
    chains, length, payload = 4, 20, bytes(36 << 10)

    def __init__(self) -> None:
        super().__init__()
        self.stack = ExitStack()
        self.namespace = Namespace(name=f"small-{next(_runs)}")

    @initialize(kinds=st.permutations(list(CLIENTS)))
    def connect(self, kinds: list[str]) -> None:
        self.clients: list[AnyClient] = [
            self.stack.enter_context(CLIENTS[kind](self.daemon.endpoint, namespace=self.namespace, timeout=20.0))
            for kind in kinds[:2]
        ]

    def keys(self, chain: int) -> list[bytes]:
        return [key(1000 * (chain + 1) + block) for block in range(self.length)]

    @rule(
        who=WHO,
        chain=st.integers(0, chains - 1),
        count=st.integers(1, 12),
        skipped=st.sampled_from([0, 0, 0, 1]),
        how=st.sampled_from(["together", "together, own", "one by one", "one by one, own"]),
        wait=st.booleans(),
    )
    def go_on(self, who: int, chain: int, count: int, skipped: int, how: str, wait: bool) -> None:
        """As an engine does: match, then put what is behind the hits, or in disorder, what is not there yet."""
        client, keys = self.clients[who], self.keys(chain)
        found = client.match(keys)
        begin = len(found) + skipped
        some = keys[begin : begin + count]
        if not some:
            return
        before = client.exists(some)
        request = None if how.endswith("own") else found.request
        parents = [keys[begin - 1] if begin else None, *some]
        if how.startswith("together"):
            datas = [self.payload] * len(some)
            statuses = client.put_many(some, datas, parent=parents[0], wait=wait, request=request)
        else:
            statuses = [
                client.put(each, self.payload, parent=parent, wait=wait, request=request)
                for each, parent in zip(some, parents, strict=False)
            ]
        done = client.flush()
        there = client.exists(some)
        if wait:
            assert set(statuses) <= {PutStatus.STORED, PutStatus.EXISTS, PutStatus.REJECTED}
            assert [status is not PutStatus.REJECTED for status in statuses] == there
        else:
            assert (done.throttled, done.lost) == (0, 0)
            assert done.stored + done.exists == sum(there)
        assert len(client.match(keys)) >= len(found)
        if not skipped and not any(before):
            assert there == sorted(there, reverse=True), "what was stored of a chain is not its beginning"

    @rule(who=WHO, chain=st.integers(0, chains - 1))
    def clear_some(self, who: int, chain: int) -> None:
        self.clients[who].remove(self.keys(chain)[10:])

    def teardown(self) -> None:
        if hasattr(self, "clients"):
            assert self.clients[0].verify().problems == []
            self.clients[0].clear()
        self.stack.close()


@pytest.mark.timeout(150)
@pytest.mark.parametrize("flags", [("--slab", "64KiB"), ("--slab", "1MiB")], ids=["slots", "bytes"])
def test_clients_of_a_small_tier_are_told_what_is_there(flags: tuple[str, str]):
    grant = "64KiB" if "64KiB" in flags else "1MiB"
    with DaemonProcess(*flags, capacity="1536KiB", grant=grant) as daemon:
        machine = type("ClientsOfTheSmallTier", (ClientsOfASmallTier,), {"daemon": daemon})
        run_state_machine_as_test(
            machine,
            settings=settings(
                max_examples=60, stateful_step_count=25, deadline=None, suppress_health_check=list(HealthCheck)
            ),
        )
