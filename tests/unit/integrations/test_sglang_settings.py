from __future__ import annotations

import importlib.util
import re
from typing import Any

import pytest

from kvstore.errors import InvalidArgument, UnsupportedEngine
from kvstore_client.integrations.hicache.settings import HiCacheSettings


def test_keys_that_sglang_reads_itself_are_no_settings() -> None:
    config = {
        "backend_name": "kvstore",
        "module_path": "kvstore_client.integrations.sglang",
        "class_name": "KVStoreHiCache",
        "interface_v1": 1,
        "prefetch_threshold": 64,
        "codec": "kivi4",
    }
    assert HiCacheSettings.parse(config) == HiCacheSettings(codec="kivi4", interface_v1=True)
    assert HiCacheSettings.parse(None) == HiCacheSettings()


def test_unknown_keys_are_named_with_a_near_one() -> None:
    with pytest.raises(InvalidArgument, match=re.escape("unknown setting 'end_point' (did you mean 'endpoint'?)")):
        HiCacheSettings.parse({"end_point": "x"})
    with pytest.raises(InvalidArgument, match="'a', 'b'.*known are endpoint"):
        HiCacheSettings.parse({"a": 1, "b": 2})


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("endpoint", 5, "endpoint must be text"),
        ("endpoint", "http://x", "endpoint"),
        ("mapped", "yes", "mapped must be true, false or null"),
        ("codec", "zip", "codec must be one of"),
        ("exact_codec", "kivi4", "exact_codec must be one of raw, lossless"),
        ("fidelity", "best", "fidelity must be"),
        ("name", "", "name must be text that is not empty"),
        ("revision", 1, "revision must be text"),
        ("unknown_revision", "ask", "unknown_revision must be"),
        ("threads", 0, "threads must be a whole number"),
        ("threads", True, "threads must be a whole number"),
        ("timeout_s", 0, "timeout_s must be a number of seconds"),
        ("timeout_s", float("nan"), "timeout_s must be a number of seconds"),
        ("retry_s", "1", "retry_s must be a number of seconds"),
    ],
)
def test_wrong_values_name_their_setting(key: str, value: Any, message: str) -> None:
    with pytest.raises(InvalidArgument, match=message):
        HiCacheSettings.parse({key: value, "interface_v1": 1})


def test_a_codec_needs_the_interface_that_says_where_pages_are() -> None:
    with pytest.raises(InvalidArgument, match='"interface_v1": 1'):
        HiCacheSettings.parse({"codec": "lossless"})
    assert HiCacheSettings.parse({"codec": "lossless", "interface_v1": 1}).codec == "lossless"


def test_an_exact_namespace_takes_no_lossy_codec() -> None:
    with pytest.raises(InvalidArgument, match="fidelity 'exact' and the lossy codec 'kivi4'"):
        HiCacheSettings.parse({"codec": "kivi4", "fidelity": "exact", "interface_v1": 1})


@pytest.mark.skipif(importlib.util.find_spec("sglang") is not None, reason="SGLang is installed")
def test_the_module_says_which_sglang_it_wants() -> None:
    with pytest.raises(UnsupportedEngine, match=r"pip install 'sglang>=0.5.23,<0.5.24'"):
        import kvstore_client.integrations.sglang  # noqa: F401
