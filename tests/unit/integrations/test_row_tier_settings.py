from __future__ import annotations

from typing import Any

import pytest
from doc_tables import tables

from kvstore.errors import InvalidArgument
from kvstore_client.integrations.row_tier.settings import BYTE_CODECS, TierSettings


def test_settings_without_any_are_defaults() -> None:
    settings = TierSettings.parse({})
    assert settings == TierSettings()
    assert settings.codec == "raw"
    assert settings.endpoint is None


@pytest.mark.parametrize("codec", BYTE_CODECS)
def test_settings_take_codecs_of_bytes(codec: str) -> None:
    assert TierSettings.parse({"codec": codec, "endpoint": "/run/kv.sock"}).codec == codec


def test_settings_unknown_key_is_named_with_the_known_ones() -> None:
    with pytest.raises(InvalidArgument) as caught:
        TierSettings.parse({"lease": 3, "codec": "raw", "speed": 1})
    message = str(caught.value)
    assert "unknown setting 'lease', 'speed' (did you mean 'lease_s'?)" in message
    for name in TierSettings.__dataclass_fields__:
        assert name in message
    assert "\n" not in message


def test_settings_lossy_codec_is_refused_with_the_reason() -> None:
    with pytest.raises(InvalidArgument, match=r"codec 'kivi4' is lossy.*rows of bytes.*raw, lossless, lossless-zstd"):
        TierSettings.parse({"codec": "kivi4"})
    with pytest.raises(InvalidArgument, match="unknown codec 'zip'"):
        TierSettings.parse({"codec": "zip"})


def test_settings_endpoint_that_is_none_is_refused() -> None:
    with pytest.raises(InvalidArgument, match="tcp"):
        TierSettings.parse({"endpoint": "tcp://127.0.0.1:9000"})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("endpoint", 3),
        ("directory", b"x"),
        ("mapped", "yes"),
        ("name", ""),
        ("name", None),
        ("revision", 7),
        ("unknown_revision", "shrug"),
        ("on_reset", "clear"),
        ("threads", 0),
        ("threads", 65),
        ("threads", True),
        ("threads", 1.5),
        ("timeout_s", 0),
        ("timeout_s", float("nan")),
        ("timeout_s", "2"),
        ("lookup_timeout_s", -1),
        ("job_timeout_s", 3601),
        ("retry_s", float("inf")),
        ("lease_s", -0.1),
        ("lease_s", 1e9),
        ("queued_stores", 0),
        ("queued_stores", 2.0),
    ],
)
def test_settings_wrong_value_is_named(name: str, value: Any) -> None:
    with pytest.raises(InvalidArgument, match=f"kvstore tier: {name} must be"):
        TierSettings.parse({name: value})


def test_settings_are_those_of_the_page() -> None:
    (table,) = [table for table in tables("vllm-tier.md") if table.heading == "Settings"]
    assert sorted(table.column("setting")) == sorted(TierSettings.__dataclass_fields__)
    documented = dict(zip(table.column("setting"), table.column("default"), strict=True))
    for name in ("codec", "name", "threads", "timeout_s", "lookup_timeout_s", "job_timeout_s", "lease_s", "retry_s"):
        default = getattr(TierSettings(), name)
        assert documented[name] == (default if isinstance(default, str) else f"{default:g}"), name
