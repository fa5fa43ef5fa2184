"""The record of which tokens a cache has the KV of."""

from __future__ import annotations

import copy
from importlib.util import find_spec
from typing import Any

import numpy as np
import pytest

if find_spec("torch") is None:
    pytest.skip("torch is not installed", allow_module_level=True)

import torch
from hypothesis import given
from hypothesis import strategies as st

from kvstore.errors import InvalidArgument
from kvstore_client.integrations.transformers_cache import tokens as module
from kvstore_client.integrations.transformers_cache.tokens import TokenRecord, cache_in, named_arguments, token_ids

NONE = np.empty(0, np.int64)


def ids(*numbers: int) -> Any:
    return torch.tensor([numbers])


def fed(record: TokenRecord, *chunks: tuple[int, ...], past: int = 0) -> int:
    """Have a cache of ``past`` tokens read chunks; its length."""
    for chunk in chunks:
        record.observe({"input_ids": ids(*chunk)}, past)
        past += len(chunk)
    return past


def test_tokens_are_those_that_were_read() -> None:
    record = TokenRecord(NONE, NONE)
    length = fed(record, (1, 2, 3), (4,), (5,))
    assert record.take(length).tolist() == [1, 2, 3, 4, 5]
    assert record.take(fed(record, (6, 7), past=length)).tolist() == [1, 2, 3, 4, 5, 6, 7]
    assert record.why == ""


def test_a_forward_that_did_not_reach_the_cache_is_none() -> None:
    record = TokenRecord(NONE, NONE)
    fed(record, (1, 2), (3, 4))
    assert record.take(2).tolist() == [1, 2]
    assert "something else" in record.why


@pytest.mark.parametrize("past", [1, 3, 9])
def test_a_length_that_nobody_read_ends_the_record(past: int) -> None:
    record = TokenRecord(NONE, NONE)
    fed(record, (1,), (2,))
    record.observe({"input_ids": ids(5)}, past)
    assert record.take(past + 1).tolist() == [1]
    fed(record, (7,), past=past + 1)
    assert record.take(past + 2).tolist() == [1]


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        ({"input_ids": None, "inputs_embeds": torch.zeros(1, 2, 4)}, "embeddings"),
        ({"input_ids": ids(1, 2).repeat(4, 1)}, "4 sequences"),
        ({"input_ids": ids(1, 2), "token_type_ids": ids(0, 0)}, "token_type_ids, whose effect"),
        ({"input_ids": ids(1, 2), "attention_mask": torch.ones(1, 1, 2, 3)}, "not \\[1, all tokens\\]"),
        ({"input_ids": ids(1, 2), "attention_mask": {"full_attention": None}}, "not \\[1, all tokens\\]"),
        ({"input_ids": ids(1, 2), "attention_mask": ids(1, 1)}, "not \\[1, all tokens\\]"),
        ({"input_ids": ids(1, 2), "attention_mask": ids(1, 0, 1)}, "hides tokens"),
        ({"input_ids": ids(1, 2), "position_ids": ids(0, 1)}, "position_ids do not count"),
        ({"input_ids": ids(1, 2), "position_ids": ids(1, 2).repeat(3, 1)}, "not one a token"),
        ({"input_ids": ids(1, 2), "cache_position": torch.tensor([1, 3])}, "cache_position do not count"),
    ],
)
def test_what_cannot_be_named_ends_the_record(arguments: dict[str, Any], why: str) -> None:
    record = TokenRecord(NONE, NONE)
    fed(record, (9,))
    record.observe(arguments, 1)
    assert record.take(3).tolist() == [9]
    assert record.why
    import re

    assert re.search(why, record.why)


def test_usual_arguments_are_no_reason() -> None:
    record = TokenRecord(NONE, NONE)
    record.observe(
        {
            "input_ids": ids(4, 5),
            "attention_mask": ids(1, 1),
            "position_ids": ids(0, 1),
            "cache_position": torch.tensor([0, 1]),
            "use_cache": True,
            "past_key_values": object(),
            "token_type_ids": None,
            "output_attentions": False,
            "logits_to_keep": 1,
        },
        0,
    )
    assert record.take(2).tolist() == [4, 5]
    assert record.why == ""


def test_doubts_are_looked_at_when_tokens_are_taken() -> None:
    """So that a device need not be waited for in every step; what came before the first wrong one stays."""
    record = TokenRecord(NONE, NONE)
    for step in range(4):
        mask = torch.ones(1, step + 1)
        mask[0, 0] = step != 2
        record.observe({"input_ids": ids(step), "attention_mask": mask}, step)
        assert record.why == ""
    assert record.take(4).tolist() == [0, 1]


def test_many_steps_are_put_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_MOST_CHUNKS", 5)
    record = TokenRecord(NONE, NONE)
    for step in range(40):
        record.observe({"input_ids": ids(step), "attention_mask": torch.ones(1, step + 1)}, step)
        assert len(record._chunks) <= 6
        assert len(record._doubts) <= 6
    assert record.take(40).tolist() == list(range(40))


def test_a_tensor_that_changes_later_changes_nothing() -> None:
    record, given_ids = TokenRecord(NONE, NONE), ids(1, 2)
    record.observe({"input_ids": given_ids}, 0)
    given_ids.zero_()
    assert record.take(2).tolist() == [1, 2]


def test_a_prefix_that_was_loaded_comes_first() -> None:
    record = TokenRecord(np.array([1, 2]), np.array([3, 4]))
    record.observe({"input_ids": ids(3, 4, 5)}, 2)
    assert record.take(5).tolist() == [1, 2, 3, 4, 5]


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        ({"input_ids": ids(3, 9)}, "whose token 3 is 4, and the model is given 9 there"),
        ({"input_ids": ids(1, 2, 3, 4)}, "whose token 2 is 3, and the model is given 1 there"),
        ({"input_ids": ids(3, 4), "attention_mask": ids(0, 1, 1, 1)}, "hides tokens"),
        ({"input_ids": ids(3, 4), "position_ids": ids(3, 4)}, "position_ids"),
    ],
)
def test_another_sequence_behind_a_loaded_prefix_is_an_error(arguments: dict[str, Any], why: str) -> None:
    record = TokenRecord(np.array([1, 2]), np.array([3, 4]))
    with pytest.raises(InvalidArgument, match=why):
        record.observe(arguments, 2)


def test_any_sequence_may_follow_where_nothing_was_loaded() -> None:
    record = TokenRecord(NONE, np.array([3, 4]))
    record.observe({"input_ids": ids(8, 9)}, 0)
    assert record.take(2).tolist() == [8, 9]


def test_end_keeps_what_was_there() -> None:
    record = TokenRecord(NONE, NONE)
    length = fed(record, (1, 2))
    record.end("because", length)
    record.end("for another reason", length)
    fed(record, (3,), past=length)
    assert record.take(3).tolist() == [1, 2]
    assert record.why == "because"


def test_a_copy_is_a_record_of_its_own() -> None:
    record = TokenRecord(NONE, NONE)
    fed(record, (1, 2))
    twin = copy.deepcopy(record)
    fed(twin, (3,), past=2)
    assert record.take(2).tolist() == [1, 2]
    assert twin.take(3).tolist() == [1, 2, 3]


@given(st.lists(st.one_of(st.integers(1, 5), st.integers(-6, 0)), max_size=12), st.randoms())
def test_reading_and_cropping_in_any_order_leaves_what_a_list_has(steps: list[int], random: Any) -> None:
    record, expected = TokenRecord(NONE, NONE), []
    for step in steps:
        before = len(expected)
        if step > 0:
            chunk = [random.randrange(100) for _ in range(step)]
            record.observe({"input_ids": ids(*chunk), "attention_mask": torch.ones(1, before + step)}, before)
            expected += chunk
        else:
            del expected[max(0, before + step) :]
            record.crop(before, len(expected))
    assert record.take(len(expected)).tolist() == expected
    assert record.why == ""


@pytest.mark.parametrize("given_ids", [[1, 2, 3], [[1, 2, 3]], ids(1, 2, 3), np.array([1, 2, 3], np.uint32)])
def test_ids_of_one_sequence_in_any_form(given_ids: Any) -> None:
    assert token_ids(given_ids).tolist() == [1, 2, 3]


def test_arguments_and_caches_have_names() -> None:
    cache: list[int] = []  # empty caches are false
    assert named_arguments(("input_ids", "mask"), (1,), {"past_key_values": cache}) == {
        "input_ids": 1,
        "past_key_values": cache,
    }
    assert cache_in({"past_key_values": cache}) is cache
    assert cache_in({"cache": cache, "past_key_values": None}) is cache
    assert cache_in({}) is None
