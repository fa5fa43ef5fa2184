from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from fakes.fake_tensor_store import FakeTensorStore

from kvstore.errors import DaemonUnavailable, InvalidArgument
from kvstore_client.integrations.row_tier.keys import Chain
from kvstore_client.integrations.row_tier.rows import Rows, load_rows, store_rows
from kvstore_client.tensors import Failure

ROWS = 200
ROW_BYTES = 8192


def buffer(seed: int | None = None) -> np.ndarray:
    if seed is None:
        return np.zeros((ROWS, ROW_BYTES), np.int8)
    return np.random.default_rng(seed).integers(-128, 128, (ROWS, ROW_BYTES), np.int8)


def key(number: int) -> bytes:
    return number.to_bytes(32, "big")


def never() -> bool:
    return False


def chain(numbers: range, parent: int | None = None) -> Chain:
    keys = [key(number) for number in numbers]
    return Chain(None if parent is None else key(parent), keys, list(numbers), [each + bytes(4) for each in keys])


@pytest.mark.parametrize(
    ("element", "tokens", "dtype", "kept"),
    [("bfloat16", 16, "bfloat16", 16), ("float32", 48, "float32", 1), ("fp8_ds_mla", 16, "uint8", 16)],
)
def test_rows_lie_where_the_view_says(element: str, tokens: int, dtype: str, kept: int) -> None:
    memory = buffer(1)
    rows = Rows(memoryview(memory), element, tokens)
    assert (rows.count, rows.row_bytes) == (ROWS, ROW_BYTES)
    assert rows.layout.block_bytes == ROW_BYTES
    assert (rows.layout.dtype, rows.layout.block_tokens) == (dtype, kept)
    store = FakeTensorStore(rows.layout)
    assert store_rows(store, rows.paged, [chain(range(1, 4))], never).complete  # type: ignore[arg-type]
    assert [store.blocks[key(number)] for number in (1, 2, 3)] == [memory[number].tobytes() for number in (1, 2, 3)]


def test_rows_keep_no_hold_of_the_view() -> None:
    view = memoryview(buffer())
    Rows(view)
    view.release()


def test_rows_of_something_else_are_refused() -> None:
    for memory in (
        np.zeros(64, np.int8),
        np.zeros((4, 64), np.int16),
        np.zeros((4, 128), np.int8)[:, ::2],
        np.zeros((4, 63), np.int8),
        np.zeros((4, 0), np.int8),
    ):
        with pytest.raises(InvalidArgument, match="the primary tier's view"):
            Rows(memoryview(memory))
    with pytest.raises(InvalidArgument, match="writable"):
        Rows(memoryview(buffer()).toreadonly())


def test_a_store_and_a_load_give_every_byte_back() -> None:
    memory, other = buffer(2), buffer()
    source, target = Rows(memoryview(memory), "bfloat16", 16), Rows(memoryview(other), "bfloat16", 16)
    store: Any = FakeTensorStore(source.layout)
    stored = store_rows(store, source.paged, [chain(range(1, 150)), chain(range(160, 170), parent=159)], never)
    assert set(stored.results.values()) == {"stored"}
    assert stored.stored_bytes == 159 * ROW_BYTES
    assert store.parents[key(1)] is None
    assert store.parents[key(65)] == key(64)
    assert store.parents[key(160)] == key(159)
    names = [(key(number) + bytes(4), key(number)) for number in (*range(1, 150), *range(160, 170))]
    rows = list(range(len(names)))
    loaded = load_rows(store, target.paged, names, rows, never)
    assert (loaded.failed, loaded.error) == ({}, None)
    assert loaded.keys == [name for name, _ in names]
    assert (other[:149] == memory[1:150]).all()
    assert (other[149:159] == memory[160:170]).all()
    assert not other[159:].any()


def test_a_load_with_gaps_loads_the_rest() -> None:
    memory = buffer(3)
    rows = Rows(memoryview(memory))
    store: Any = FakeTensorStore(rows.layout)
    store_rows(store, rows.paged, [chain(range(1, 100))], never)
    store.remove([key(5), key(70), key(99)])
    store.failures[key(30)] = Failure.CORRUPT
    names = [(key(number) + bytes(4), key(number)) for number in range(1, 100)]
    loaded = load_rows(store, rows.paged, names, list(range(1, 100)), never)
    assert {int.from_bytes(name[:32], "big"): why for name, why in loaded.failed.items()} == {
        5: "miss",
        30: "corrupt",
        70: "miss",
        99: "miss",
    }
    assert len(loaded.keys) == 95


def test_a_load_that_is_throttled_again_and_again_ends() -> None:
    memory = buffer(3)
    rows = Rows(memoryview(memory))
    store: Any = FakeTensorStore(rows.layout)
    store_rows(store, rows.paged, [chain(range(1, 21))], never)
    store.failures = {key(number): Failure.THROTTLED for number in range(1, 21)}
    names = [(key(number) + bytes(4), key(number)) for number in range(1, 21)]
    loaded = load_rows(store, rows.paged, names, list(range(1, 21)), never)
    assert set(loaded.failed.values()) == {"throttled"}
    assert len(loaded.failed) == 20
    assert len(store.requests) <= 4


def test_refused_stores_are_named() -> None:
    memory = buffer(3)
    rows = Rows(memoryview(memory))
    store: Any = FakeTensorStore(rows.layout, throttle_next=1, reject={key(4)})
    stored = store_rows(store, rows.paged, [chain(range(1, 6))], never)
    assert list(stored.results.values()) == ["throttled", "stored", "stored", "parent_unknown", "stored"]
    assert not stored.complete


def test_what_is_cancelled_or_fails_names_every_block() -> None:
    memory = buffer(3)
    rows = Rows(memoryview(memory))
    store: Any = FakeTensorStore(rows.layout)
    calls = iter([False, True])
    stored = store_rows(store, rows.paged, [chain(range(1, 100))], lambda: next(calls))
    assert list(stored.results.values()).count("stored") == 64
    assert list(stored.results.values()).count("cancelled") == 35
    names = [(key(number) + bytes(4), key(number)) for number in range(1, 100)]
    calls = iter([False, False, True])
    loaded = load_rows(store, rows.paged, names, list(range(1, 100)), lambda: next(calls))
    assert len(loaded.keys) == 64
    assert list(loaded.failed.values()) == ["miss"] + ["cancelled"] * 34

    def gone(*_: object, **__: object) -> None:
        raise DaemonUnavailable("gone")

    store.load_blocks = store.save_blocks = gone
    loaded = load_rows(store, rows.paged, names, list(range(1, 100)), never)
    assert (loaded.keys, set(loaded.failed.values())) == ([], {"unavailable"})
    assert isinstance(loaded.error, DaemonUnavailable)
    stored = store_rows(store, rows.paged, [chain(range(1, 100))], never)
    assert set(stored.results.values()) == {"unavailable"}
    assert len(stored.results) == 99
