from __future__ import annotations

import itertools
from dataclasses import dataclass, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstore_client.integrations.l2_adapter import keys as module
from kvstore_client.integrations.l2_adapter.keys import Chains, Named, named


@dataclass(frozen=True)
class Name:
    chunk_hash: bytes = b"hash"
    model_name: str = "model"
    kv_rank: int = 0x01000100
    object_group_id: int = 0
    cache_salt: str = ""


def test_every_field_makes_another_key() -> None:
    first = Name()
    others = [
        replace(first, chunk_hash=b"hash2"),
        replace(first, model_name="model2"),
        replace(first, kv_rank=1),
        replace(first, object_group_id=1),
        replace(first, cache_salt="user"),
        # What one field loses another gains.
        replace(first, chunk_hash=b"hashm", model_name="odel"),
        replace(first, model_name="modelu", cache_salt=""),
        replace(first, model_name="model", cache_salt="u"),
    ]
    keys = [named(name).key for name in [first, *others]]
    assert len(set(keys)) == len(keys)
    assert {len(key) for key in keys} == {32}


def test_a_key_is_the_same_in_every_process() -> None:
    assert named(Name()).key.hex() == "04109741ec794d6cd850ec9d830d020d2e33775c9a321082146e2e538c8501b9"


@given(st.binary(max_size=80), st.text(max_size=20), st.integers(0, 1 << 40), st.integers(0, 99), st.text(max_size=20))
def test_any_name_has_a_key(chunk_hash: bytes, model: str, rank: int, group: int, salt: str) -> None:
    name = Name(chunk_hash, model, rank, group, salt)
    assert named(name) == named(name)
    assert len(named(name).key) == 32


def row(count: int, **fields: object) -> list[Named]:
    return [named(Name(chunk_hash=str(index).encode(), **fields)) for index in range(count)]  # type: ignore[arg-type]


def test_runs_follow_what_lookups_said() -> None:
    chains, names = Chains(), row(6)
    keys = [name.key for name in names]
    chains.learn(names, [True, True, False, False, False, False])
    assert chains.runs(keys[2:]) == [(keys[1], slice(0, 4))]
    # Another order, and a chunk of which nothing is known.
    assert chains.runs([keys[3], keys[4], keys[2], b"x" * 32]) == [
        (keys[2], slice(0, 2)),
        (keys[1], slice(2, 3)),
        (None, slice(3, 4)),
    ]
    assert chains.runs([]) == []


def test_rows_of_other_ranks_and_prompts_are_no_parents() -> None:
    chains, first, second = Chains(), row(2), row(2, kv_rank=7)
    chains.learn([*first, *second], [False] * 4)
    assert chains.runs([name.key for name in second]) == [(None, slice(0, 2))]
    assert chains.runs([second[0].key]) == [(None, slice(0, 1))]


def test_a_key_that_is_there_twice_is_not_its_own_parent() -> None:
    chains, names = Chains(), row(1) * 3
    chains.learn(names, [False] * 3)
    assert chains.runs([name.key for name in names]) == [(None, slice(at, at + 1)) for at in range(3)]


def test_runs_cover_every_key_once() -> None:
    chains, names = Chains(), row(5)
    chains.learn(names, [False] * 5)
    for order in itertools.permutations(range(5)):
        keys = [names[at].key for at in order]
        runs = chains.runs(keys)
        assert [at for _, run in runs for at in range(run.start, run.stop)] == list(range(5))
        for parent, run in runs:
            at = order[run.start]
            assert parent == (names[at - 1].key if at else None)
            assert all(order[index] == order[index - 1] + 1 for index in range(run.start + 1, run.stop))


def test_what_is_remembered_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_MOST_LINKS", 10)
    chains, names = Chains(), row(30)
    chains.learn(names, [False] * 30)
    assert chains.runs([names[5].key])[0][0] is None
    assert chains.runs([names[29].key])[0][0] == names[28].key
