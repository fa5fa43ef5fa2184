from __future__ import annotations

from typing import Any

import pytest

from kvstore.errors import InvalidArgument
from kvstore_client.integrations.l2_adapter.settings import AdapterSettings


def test_no_settings_are_the_defaults() -> None:
    settings = AdapterSettings.parse({})
    assert settings.codec == "raw"
    assert settings.endpoint is None
    assert settings.name == "lmcache"


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"host": "x"}, "unknown setting 'host' in adapter_params; known are endpoint, directory"),
        ({"codek": "raw"}, "unknown setting 'codek' (did you mean 'codec'?)"),
        ({"codec": "zip"}, "codec must be one of raw, "),
        ({"codec": "kivi4"}, "set head_dim"),
        ({"codec": ""}, "codec must be text"),
        ({"name": 3}, "name must be text"),
        ({"endpoint": 3}, "endpoint must be text"),
        ({"endpoint": "tcp://1.2.3.4:5"}, "endpoint"),
        ({"mapped": "yes"}, "mapped must be true, false or null"),
        ({"revision": 3}, "revision must be text, or an object"),
        ({"revision": {"m": 3}}, "revision must be text, or an object"),
        ({"unknown_revision": "maybe"}, "unknown_revision must be"),
        ({"timeout_s": 0}, "timeout_s must be"),
        ({"timeout_s": float("nan")}, "timeout_s must be"),
        ({"task_timeout_s": True}, "task_timeout_s must be"),
        ({"retry_s": -1}, "retry_s must be"),
        ({"lease_s": -1}, "lease_s must be"),
        ({"lease_s": 1e9}, "lease_s must be"),
        ({"load_threads": 0}, "load_threads must be a whole number from 1 to 64"),
        ({"codec_threads": 1.5}, "codec_threads must be"),
        ({"layouts": 1000}, "layouts must be"),
        ({"queued_bytes": 0}, "queued_bytes must be"),
        ({"head_dim": True}, "head_dim must be"),
        ({"rotary_dim": -1}, "rotary_dim must be"),
    ],
)
def test_a_wrong_setting_is_named_in_one_line(params: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidArgument) as raised:
        AdapterSettings.parse(params)
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_revision_is_that_of_the_model() -> None:
    assert AdapterSettings.parse({"revision": "abc"}).revision_of("any") == "abc"
    settings = AdapterSettings.parse({"revision": {"one": "abc"}})
    assert settings.revision_of("one") == "abc"
    assert settings.revision_of("two") == ""


@pytest.mark.parametrize(
    "params", [{"codec": "lossless"}, {"codec": "kivi4", "head_dim": 128}, {"codec": "kivi4", "rotary_dim": 64}]
)
def test_exact_codecs_need_no_head_dim_and_lossy_ones_one_of_two(params: dict[str, Any]) -> None:
    assert AdapterSettings.parse(params).codec == params["codec"]
