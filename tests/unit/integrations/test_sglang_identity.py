from __future__ import annotations

import logging
from types import SimpleNamespace
from typing import Any

import pytest

from kvstore.errors import InvalidArgument
from kvstore_client.integrations.hicache.identity import Identity
from kvstore_client.integrations.hicache.settings import HiCacheSettings

ALONE = {
    "tp_rank": 0,
    "tp_size": 1,
    "pp_rank": 0,
    "pp_size": 1,
    "attn_cp_rank": 0,
    "attn_cp_size": 1,
    "dcp_size": 1,
    "is_mla_model": False,
    "should_split_heads": False,
    "model_name": "m",
}
ARGUMENTS = {"revision": "abc", "kv_cache_dtype": "auto", "quantization": None, "dtype": "auto"}


def identity(
    settings: dict[str, Any] | None = None, arguments: dict[str, Any] | None = None, **changes: Any
) -> Identity:
    return Identity.of(
        SimpleNamespace(**(ALONE | changes)),
        HiCacheSettings(**(settings or {})),
        SimpleNamespace(**(ARGUMENTS | (arguments or {}))),
        changes.pop("version", "0.5.23"),
    )


def name_of(one: Identity, pages: dict[str, object] | None = None, **options: Any) -> str:
    return one.namespace("kv", pages or {}, **({"draft": False, "opaque": False} | options))


def test_equal_engines_have_equal_namespaces_and_others_do_not() -> None:
    names = [
        name_of(identity()),
        name_of(identity({"name": "x"})),
        name_of(identity({"identity": "x"})),
        name_of(identity(arguments={"kv_cache_dtype": "fp8_e5m2"})),
        name_of(identity(arguments={"quantization": "fp8"})),
        name_of(identity(pp_size=2)),
        name_of(identity(pp_size=2, pp_rank=1)),
        name_of(identity(tp_size=2)),
        name_of(identity(attn_cp_size=2)),
        name_of(identity(), {"layout": "page_first"}),
    ]
    assert len(set(names)) == len(names)
    assert name_of(identity()) == names[0]
    assert name_of(identity(tp_size=2, tp_rank=1)) == name_of(identity(tp_size=2))
    assert name_of(identity(tp_size=2, is_mla_model=True)) == name_of(identity(is_mla_model=True))


def test_the_draft_model_counts_for_pools_that_hold_its_kv() -> None:
    one, other = identity(), identity(arguments={"speculative_draft_model_path": "draft"})
    assert name_of(one) == name_of(other)
    assert name_of(one, draft=True) != name_of(other, draft=True)


def test_the_version_counts_for_pages_that_sglang_lays_out() -> None:
    one = identity()
    other = Identity(one.config, one.settings, one.engine, one.draft, "0.5.24", one.revision)
    assert name_of(one) == name_of(other)
    assert name_of(one, opaque=True) != name_of(other, opaque=True)


def test_a_rank_has_one_part_of_a_page() -> None:
    ranks = [identity(tp_rank=tp, tp_size=2, attn_cp_rank=cp, attn_cp_size=3) for tp in range(2) for cp in range(3)]
    assert [rank.shard(replicated=False) for rank in ranks] == [(at, 6) for at in range(6)]
    assert [rank.shard(replicated=True) for rank in ranks] == [(0, 3), (1, 3), (2, 3)] * 2


def test_the_revision_is_the_users_else_the_engines(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    assert identity().revision == "abc"
    assert identity({"revision": "x"}).revision == "x"
    assert caplog.text == ""
    assert identity(arguments={"revision": None}).revision == ""
    assert "no revision of the weights of 'm' is known" in caplog.text
    with pytest.raises(InvalidArgument, match="start SGLang with --revision"):
        identity({"unknown_revision": "refuse"}, arguments={"revision": None})
    caplog.clear()
    identity({"unknown_revision": "ignore"}, arguments={"revision": None})
    assert caplog.text == ""


def test_an_engine_whose_arguments_are_not_to_be_had_is_said_to_be_unknown(caplog: pytest.LogCaptureFixture) -> None:
    one = Identity.of(SimpleNamespace(**ALONE), HiCacheSettings(revision="1"), None, "0.5.23")
    assert (one.engine, one.draft) == ("", "")
    assert "set identity in the extra config" in caplog.text


@pytest.mark.parametrize(
    ("changes", "message"), [({"should_split_heads": True}, "tp_lcm_size"), ({"dcp_size": 2}, "2 decode")]
)
def test_ranks_of_unknown_kinds_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidArgument, match=message):
        identity(**changes)
