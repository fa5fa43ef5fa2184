"""Hypothesis drives mapped and unmapped clients of one small daemon together: one plain dict predicts them all.

What was evicted the model cannot know; it finds out by reading everything, and only when the daemon says that something
was. So a block that a client misses is one that no other client finds either. A put is refused only where it has no way
to the first block of its chain and the tier is full of others that have one.
"""

from __future__ import annotations

import random
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import count

import pytest
from daemon_process import DaemonProcess, wait_until
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from kvstore_client import Client, Namespace, PutStatus

CHAIN = 6
CHAINS = 2
BLOCKS = CHAIN * CHAINS
"""Blocks 0 to 5 are one chain, 6 to 11 the other."""

MAPPED = (True, True, False)
"""Clients of each namespace; one more, not mapped, is the model's eye."""

BLOCK = st.integers(0, BLOCKS - 1)
LENGTH = st.sampled_from([1, 3, 3840, 3841, 20_000, 65_280, 65_281, 65_281, 65_281])
WHO = st.tuples(st.integers(0, 1), st.integers(0, len(MAPPED) - 1))
KEYS = [(block + 1).to_bytes(4, "big") * 8 for block in range(BLOCKS)]
LARGEST = 65_281

_runs = count()


def parent(block: int) -> bytes | None:
    return KEYS[block - 1] if block % CHAIN else None


def payload(seed: int, length: int) -> bytes:
    return random.Random(seed).randbytes(length)


@dataclass
class Space:
    """A namespace: its clients, their generations, and what the current generation holds, block by block and part."""

    parts: int
    clients: list[Client]
    eye: Client
    generations: list[int]
    generation: int = 0
    blocks: dict[int, dict[int, bytes]] = field(default_factory=dict)

    def current(self, who: int) -> bool:
        return self.generations[who] == self.generation

    def visible(self, who: int) -> dict[int, dict[int, bytes]]:
        return self.blocks if self.current(who) else {}

    def leading(self, who: int, numbers: list[int]) -> int:
        complete = [len(self.visible(who).get(block, {})) == self.parts for block in numbers]
        return complete.index(False) if False in complete else len(numbers)

    def orphan(self, block: int) -> bool:
        """Whether a block has no way to the first of its chain: nothing is evicted for it."""
        return not all(ancestor in self.blocks for ancestor in range(block // CHAIN * CHAIN, block))


def read(client: Client, part: int) -> list[bytes | None]:
    """All blocks' data, in one call."""
    outs = [bytearray(LARGEST) for _ in KEYS]
    lengths = client.get_many_into(KEYS, outs, part=part)
    return [None if length is None else bytes(out[:length]) for out, length in zip(outs, lengths, strict=True)]


class Mixed(RuleBasedStateMachine):
    daemon: DaemonProcess
    evictions = 0
    refusals = 0

    def __init__(self) -> None:
        super().__init__()
        self.stack = ExitStack()
        self.seeds = count()

    @initialize()
    def connect(self) -> None:
        self.spaces = []
        for parts in (2, 1):
            self.namespace = Namespace(name=f"mixed-{next(_runs)}", parts=parts)
            clients = [self.make(mapped) for mapped in MAPPED]
            assert [client.mapped for client in clients] == list(MAPPED)
            self.spaces.append(Space(parts, clients, self.make(False), [0] * len(MAPPED)))
        self.evicted = self.spaces[0].eye.stats().eviction.evicted_blocks

    def make(self, mapped: bool) -> Client:
        options = {"namespace": self.namespace, "mapped": mapped, "timeout": 20.0}
        return self.stack.enter_context(Client(self.daemon.endpoint, **options))

    def quiet(self) -> None:
        """Let received replies be freed: where slots are about to come back by themselves, puts are throttled."""
        eye = self.spaces[0].eye
        wait_until(lambda: (stats := eye.stats()).server.outbound_bytes == stats.dram.limbo_bytes == 0, poll_s=0.001)

    def take_evictions(self, put: dict[int, dict[int, bytes]], into: Space) -> bool:
        """Whether something was evicted since the last call; the model then forgets what is gone.

        ``put`` is what was just put: a block of it may have left before its own turn came, and be new now.
        """
        evicted = self.spaces[0].eye.stats().eviction.evicted_blocks
        self.evicted_by_last = evicted != self.evicted
        if not self.evicted_by_last:
            return False
        forgotten = 0
        for space in self.spaces:
            there = [read(space.eye, part) for part in range(space.parts)]
            for block, known in list(space.blocks.items()):
                new = put.get(block, {}) if space is into else {}
                found = {part: data for part in range(space.parts) if (data := there[part][block]) is not None}
                assert all(data in (known.get(part), new.get(part)) for part, data in found.items())
                if found:
                    assert new or found == known
                    space.blocks[block] = found
                else:
                    del space.blocks[block]
                    forgotten += 1
        assert forgotten <= evicted - self.evicted
        type(self).evictions += forgotten
        self.evicted = evicted
        return True

    def stored(self, who: tuple[int, int], blocks: list[int], part: int, datas: list[bytes], told: list[PutStatus]):
        """Puts were answered: were they right? They are the model's from now on."""
        space = self.spaces[who[0]]
        assert PutStatus.THROTTLED not in told
        if not space.current(who[1]):
            assert set(told) <= {PutStatus.REJECTED}
            # They got slots before they were refused.
            self.take_evictions({}, space)
            return
        expected, refused = [], []
        for block, data, answer in zip(blocks, datas, told, strict=True):
            there = part in space.blocks.get(block, {})
            expected.append(PutStatus.EXISTS if there else PutStatus.STORED)
            if answer is PutStatus.REJECTED:
                expected[-1] = answer
                refused.append(space.orphan(block) and not there)
            else:
                space.blocks.setdefault(block, {}).setdefault(part, data)
        put = {block: {part: data} for block, data in zip(blocks, datas, strict=True)}
        if not self.take_evictions(put, space):
            assert told == expected
            assert all(refused)
            type(self).refusals += len(refused)

    # -------------------------------------------------------------- writing

    @rule(who=WHO, block=BLOCK, part=st.integers(0, 1), length=LENGTH)
    def put(self, who: tuple[int, int], block: int, part: int, length: int) -> None:
        space = self.spaces[who[0]]
        part %= space.parts
        self.quiet()
        data = payload(next(self.seeds), length)
        told = space.clients[who[1]].put(KEYS[block], data, parent=parent(block), part=part)
        self.stored(who, [block], part, [data], [told])

    @rule(
        who=WHO,
        chain=st.integers(0, CHAINS - 1),
        first=st.integers(0, CHAIN - 1),
        part=st.integers(0, 1),
        length=LENGTH,
    )
    def put_chain(self, who: tuple[int, int], chain: int, first: int, part: int, length: int) -> None:
        space = self.spaces[who[0]]
        part %= space.parts
        self.quiet()
        blocks = list(range(chain * CHAIN + first, (chain + 1) * CHAIN))
        datas = [payload(next(self.seeds), length) for _ in blocks]
        keys = [KEYS[block] for block in blocks]
        told = space.clients[who[1]].put_many(keys, datas, parent=parent(blocks[0]), part=part)
        self.stored(who, blocks, part, datas, told)

    @rule(who=WHO, blocks=st.lists(BLOCK, min_size=1, max_size=4, unique=True), part=st.integers(0, 1), length=LENGTH)
    def put_without_wait(self, who: tuple[int, int], blocks: list[int], part: int, length: int) -> None:
        space = self.spaces[who[0]]
        part %= space.parts
        self.quiet()
        client = space.clients[who[1]]
        datas = [payload(next(self.seeds), length) for _ in blocks]
        for block, data in zip(blocks, datas, strict=True):
            told = client.put(KEYS[block], data, parent=parent(block), part=part, wait=False)
            assert told is PutStatus.PENDING
        # Its own puts come first, whatever it asks next and however that is carried.
        mine = client.get(KEYS[blocks[-1]], part=part)
        done = client.flush()
        assert (done.throttled, done.lost) == (0, 0)
        assert done.stored + done.exists + done.rejected == len(blocks)
        answers = [
            PutStatus.EXISTS if part in space.visible(who[1]).get(block, {}) else PutStatus.STORED for block in blocks
        ]
        if not space.current(who[1]):
            answers = [PutStatus.REJECTED] * len(blocks)
        elif done.rejected:
            there = read(space.eye, part)
            answers = [
                PutStatus.REJECTED if there[block] is None else answer
                for block, answer in zip(blocks, answers, strict=True)
            ]
        self.stored(who, blocks, part, datas, answers)
        if not self.evicted_by_last:
            assert (done.stored, done.exists) == (answers.count(PutStatus.STORED), answers.count(PutStatus.EXISTS))
        assert mine == self.spaces[who[0]].visible(who[1]).get(blocks[-1], {}).get(part)

    @rule(who=WHO, blocks=st.lists(BLOCK, max_size=4))
    def remove(self, who: tuple[int, int], blocks: list[int]) -> None:
        space = self.spaces[who[0]]
        expected = sum(space.visible(who[1]).pop(block, None) is not None for block in blocks)
        assert space.clients[who[1]].remove([KEYS[block] for block in blocks]) == expected

    @rule(who=WHO, seldom=st.sampled_from([False, False, False, True]))
    def clear(self, who: tuple[int, int], seldom: bool) -> None:
        if not seldom:
            return
        space = self.spaces[who[0]]
        assert space.clients[who[1]].clear() == len(space.visible(who[1]))
        space.visible(who[1]).clear()

    @rule(who=WHO, seldom=st.sampled_from([False, False, False, True]))
    def invalidate(self, who: tuple[int, int], seldom: bool) -> None:
        if not seldom:
            return
        space = self.spaces[who[0]]
        space.clients[who[1]].invalidate()
        if space.current(who[1]):
            space.generation += 1
            space.blocks.clear()
            space.eye.invalidate()
        space.generations[who[1]] = space.generation
        assert space.clients[who[1]].generation == space.generation == space.eye.generation

    # -------------------------------------------------------------- reading

    @rule(who=WHO, block=BLOCK, part=st.integers(0, 1))
    def get(self, who: tuple[int, int], block: int, part: int) -> None:
        space = self.spaces[who[0]]
        client, expected = space.clients[who[1]], space.visible(who[1]).get(block, {}).get(part)
        assert client.get(KEYS[block], part=part) == expected
        out = bytearray(LARGEST)
        assert client.get_into(KEYS[block], out, part=part) == (None if expected is None else len(expected))
        assert out[: len(expected or b"")] == (expected or b"")
        with client.view(KEYS[block], part=part) as found:
            assert found == expected

    @rule(who=WHO, part=st.integers(0, 1))
    def get_many_into(self, who: tuple[int, int], part: int) -> None:
        space = self.spaces[who[0]]
        expected = [space.visible(who[1]).get(block, {}).get(part) for block in range(BLOCKS)]
        assert read(space.clients[who[1]], part) == expected

    @rule(who=WHO, chain=st.integers(0, CHAINS - 1), length=st.integers(0, CHAIN))
    def match(self, who: tuple[int, int], chain: int, length: int) -> None:
        space = self.spaces[who[0]]
        blocks = list(range(chain * CHAIN, chain * CHAIN + length))
        found = space.clients[who[1]].match([KEYS[block] for block in blocks])
        expected = space.leading(who[1], blocks)
        assert (len(found), found.tiers, found.lease) == (expected, ["dram"] * expected, 0)

    @invariant()
    def all_find_the_same(self) -> None:
        for space in getattr(self, "spaces", ()):
            for who, client in enumerate(space.clients):
                complete = [len(space.visible(who).get(block, {})) == space.parts for block in range(BLOCKS)]
                assert client.exists(KEYS) == complete
                assert len(client.match(KEYS[:CHAIN])) == space.leading(who, list(range(CHAIN)))

    def teardown(self) -> None:
        with self.stack:
            for space in getattr(self, "spaces", ()):
                self.all_read_the_same(space)
        with self.daemon.connect(mapped=False) as client:
            wait_until(lambda: (dram := client.stats().dram).granted_bytes == dram.limbo_bytes == dram.blocks == 0)

    def all_read_the_same(self, space: Space) -> None:
        for part in range(space.parts):
            expected = [space.blocks.get(block, {}).get(part) for block in range(BLOCKS)]
            for who, client in enumerate(space.clients):
                assert read(client, part) == (expected if space.current(who) else [None] * BLOCKS)
        assert space.eye.verify().problems == []
        space.eye.clear()


@pytest.mark.timeout(150)
def test_mapped_and_unmapped_clients_of_one_daemon_answer_as_one_dict():
    with DaemonProcess("--slab", "128KiB", capacity="1MiB", grant="768KiB") as daemon:
        machine = type("MixedClients", (Mixed,), {"daemon": daemon})
        run_state_machine_as_test(
            machine,
            settings=settings(
                max_examples=50, stateful_step_count=60, deadline=None, suppress_health_check=list(HealthCheck)
            ),
        )
        assert machine.evictions > 80
