from __future__ import annotations

import grp
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstore.errors import InvalidArgument, SettingsError
from kvstore.protocol.endpoint import default_arena_directory, default_endpoint
from kvstore.settings import AccessSettings, DramSettings, Settings, parse_http
from kvstore.sizes import format_size, parse_size

GIB = 1 << 30
OWN_GROUP = grp.getgrgid(os.getgid()).gr_name


def refusal(
    config: Path | None = None,
    overrides: dict[str, object] | None = None,
    flags: dict[str, str] | None = None,
    **environ: str,
) -> str:
    with pytest.raises(SettingsError) as caught:
        Settings.load(config, overrides, flags=flags, environ=environ)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def config(tmp_path: Path) -> Path:
    return tmp_path / "kvstore.toml"


# ------------------------------------------------------------------ sizes


@pytest.mark.parametrize(
    ("text", "size"),
    [
        (4096, 4096),
        ("4096", 4096),
        ("1_000_000", 1_000_000),
        ("512B", 512),
        ("64KiB", 64 << 10),
        ("512 MiB", 512 << 20),
        ("8GiB", 8 << 30),
        ("1TiB", 1 << 40),
        ("1.5GiB", 3 << 29),
        ("2GB", 2 * 10**9),
        ("0.5KB", 500),
    ],
)
def test_size_written_in_an_accepted_form_is_its_bytes(text: str | int, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize(
    "text",
    [
        "",
        "8 giga",
        "8Gb",
        "8gib",
        "8G",
        "GiB",
        "8GiB!",
        "8 8GiB",
        "1e9",
        "0x10",
        "1.5",
        "1.0001KiB",
        "٣GiB",
        True,
        1.5,
        None,
    ],
)
def test_size_in_another_form_is_refused_with_the_accepted_ones(text: object) -> None:
    with pytest.raises(InvalidArgument, match=r"8GiB, 512MiB, 64KiB, 2GB"):
        parse_size(text)  # type: ignore[arg-type]


@pytest.mark.parametrize("text", [0, -1, "0", "0GiB", "-8GiB", "9223372036854775808", "8388608TiB"])
def test_size_out_of_range_is_refused(text: str | int) -> None:
    with pytest.raises(InvalidArgument, match=r"must be (more than 0|less than 2\*\*63)"):
        parse_size(text)


def test_size_with_a_nearly_right_unit_names_the_right_one() -> None:
    with pytest.raises(InvalidArgument, match="did you mean GiB"):
        parse_size("8gib")


@given(st.integers(1, 2**63 - 1))
def test_size_in_whole_bytes_reads_as_itself(size: int) -> None:
    assert parse_size(str(size)) == parse_size(size) == size


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (8 * GIB, "8.0 GiB"),
        (1024 * GIB - 1, "1.0 TiB"),
        (-1024, "-1.0 KiB"),
    ],
)
def test_size_formatted_is_readable(size: int, text: str) -> None:
    assert format_size(size) == text


# ------------------------------------------------------------------ http


@pytest.mark.parametrize(
    ("address", "place"),
    [
        ("off", None),
        ("127.0.0.1:9477", ("127.0.0.1", 9477)),
        ("localhost:0", ("localhost", 0)),
        ("[::1]:80", ("::1", 80)),
    ],
)
def test_http_address_parsed_is_host_and_port(address: str, place: tuple[str, int] | None) -> None:
    assert parse_http(address) == place


@pytest.mark.parametrize(
    "address",
    ["", "9477", ":9477", "127.0.0.1", "127.0.0.1:", "h:65536", "h:-1", "h:x", "http://h:1", "::1:80", "h h:1"],
)
def test_http_address_in_another_form_is_refused(address: str) -> None:
    with pytest.raises(InvalidArgument, match="HOST:PORT"):
        parse_http(address)


# ------------------------------------------------------------------ sources


def test_settings_without_sources_are_the_defaults() -> None:
    settings = Settings.load(environ={})
    assert settings == Settings()
    assert settings.endpoint == default_endpoint()
    assert settings.dram.capacity_bytes == GIB
    assert settings.access.mode == 0o600
    assert settings.arena_directory == default_arena_directory(settings.endpoint)


def test_settings_strongest_source_wins(config: Path) -> None:
    config.write_text(
        'log_level = "error"\n[dram]\ncapacity_bytes = "2GiB"\ngrant_bytes = "2GiB"\nslab_bytes = "8MiB"\n'
    )
    settings = Settings.load(
        config,
        {"dram.capacity_bytes": "4GiB"},
        environ={"KVSTORE_DRAM__CAPACITY_BYTES": "3GiB", "KVSTORE_DRAM__GRANT_BYTES": "3GiB"},
    )
    assert settings.dram == DramSettings(capacity_bytes=4 * GIB, grant_bytes=3 * GIB, slab_bytes=8 << 20)
    assert settings.log_level == "error"


def test_settings_constructed_ignore_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVSTORE_HTTP", "off")
    assert Settings().http == "127.0.0.1:9477"
    assert Settings.load().http == "off"


def test_settings_file_named_by_the_environment_is_read(config: Path) -> None:
    config.write_text('http = "off"\n')
    assert Settings.load(environ={"KVSTORE_CONFIG": str(config)}).http == "off"
    assert Settings.load(environ={"KVSTORE_CONFIG": ""}).http == "127.0.0.1:9477"


def test_settings_are_immutable() -> None:
    settings = Settings()
    with pytest.raises(ValueError, match="frozen"):
        settings.http = "off"
    with pytest.raises(ValueError, match="frozen"):
        settings.dram.capacity_bytes = 1


def test_settings_environment_of_kubernetes_services_is_no_setting() -> None:
    environ = {
        "KVSTORE_SERVICE_HOST": "10.0.0.1",
        "KVSTORE_SERVICE_PORT": "9477",
        "KVSTORE_SERVICE_PORT_HTTP": "9477",
        "KVSTORE_PORT": "tcp://10.0.0.1:9477",
        "KVSTORE_PORT_9477_TCP_ADDR": "10.0.0.1",
        "KVSTORE_METRICS_SERVICE_HOST": "10.0.0.2",
    }
    assert Settings.load(environ=environ) == Settings()


# ------------------------------------------------------------------ refusals


def test_refusal_of_a_file_value_names_file_key_and_cause(config: Path) -> None:
    config.write_text('[dram]\ncapacity_bytes = "8 giga"\n')
    assert refusal(config) == (
        f"{config}: dram.capacity_bytes: '8 giga' has the unknown unit 'giga'; "
        "write bytes as a whole number, or like 8GiB, 512MiB, 64KiB, 2GB"
    )


def test_refusal_of_a_variable_names_it() -> None:
    text = refusal(KVSTORE_LIMITS__MAX_SESSIONS="many")
    assert text.startswith("KVSTORE_LIMITS__MAX_SESSIONS = 'many': should be a valid integer")


def test_refusal_of_a_flag_names_it() -> None:
    text = refusal(None, {"dram.capacity_bytes": "0"}, {"dram.capacity_bytes": "--capacity"})
    assert text == "--capacity: a size must be more than 0, got '0'"


def test_refusal_names_the_source_that_won(config: Path) -> None:
    config.write_text('[dram]\nverify = "sometimes"\n')
    assert refusal(config, KVSTORE_DRAM__VERIFY="never").startswith(
        "KVSTORE_DRAM__VERIFY = 'never': should be 'always'"
    )


def test_refusal_of_several_values_counts_the_others(config: Path) -> None:
    config.write_text('http = "x"\nlog_level = "loud"\n[dram]\nverify_every = 0\n')
    assert refusal(config).endswith("(and 2 more problems)")


@pytest.mark.parametrize(
    ("toml", "hint"),
    [
        ("[dram]\ncapcity_bytes = 1", "unknown key 'dram.capcity_bytes'; did you mean dram.capacity_bytes?"),
        ("capacity_bytes = 1", "unknown key 'capacity_bytes'; did you mean dram.capacity_bytes?"),
        ("[limits]\nverify = 1", "unknown key 'limits.verify'; did you mean dram.verify?"),
        ("zebra = 1", "known are endpoint, http, log_level, log_format, [dram], [access], [limits], [ssd], [eviction]"),
        ("[access]\nzebra = 1", "known in [access] are mode, group"),
        ("_env_file = 1", "unknown key '_env_file'"),
        ("dram = 4", "dram is a table of settings: write [dram], got 4"),
        ("[http]\nport = 1", "http = {'port': 1}: should be a valid string"),
    ],
)
def test_refusal_of_a_key_names_the_nearest(config: Path, toml: str, hint: str) -> None:
    config.write_text(toml)
    assert hint in refusal(config)


def test_refusal_of_a_variable_unknown_names_the_nearest() -> None:
    assert refusal(KVSTORE_DRAM_CAPACITY_BYTES="1GiB") == (
        "environment: unknown variable KVSTORE_DRAM_CAPACITY_BYTES; did you mean KVSTORE_DRAM__CAPACITY_BYTES?"
    )
    assert "settings are KVSTORE_KEY" in refusal(KVSTORE_ZEBRA_STRIPES="1")


def test_refusal_of_a_section_in_one_variable() -> None:
    assert "unknown variable KVSTORE_DRAM" in refusal(KVSTORE_DRAM='{"capacity_bytes": 1}')


def test_refusal_of_an_override_unknown_names_the_nearest() -> None:
    assert "did you mean dram.verify?" in refusal(None, {"dram.verfy": "off"})


def test_refusal_of_toml_names_file_and_line(config: Path) -> None:
    config.write_text('http = "off"\n[dram\n')
    assert refusal(config).startswith(f"{config}:2: not TOML: ")
    config.write_bytes(b"\xff\xfe")
    assert "not UTF-8" in refusal(config)
    config.write_text("a = " + "[" * 100_000)
    assert f"{config}" in refusal(config)


def test_refusal_of_a_file_that_cannot_be_read_names_it(tmp_path: Path) -> None:
    assert refusal(tmp_path / "none.toml") == (
        f"cannot read the settings file {tmp_path / 'none.toml'}: No such file or directory"
    )
    assert "Is a directory" in refusal(tmp_path)


@pytest.mark.parametrize(
    ("overrides", "cause"),
    [
        ({"dram.slab_bytes": 4097}, "must be a multiple of 4096"),
        ({"dram.slab_bytes": "2GiB"}, "dram.slab_bytes (2.0 GiB) must not be more than dram.capacity_bytes (1.0 GiB)"),
        ({"dram.capacity_bytes": "100KiB"}, "must be at least 1.0 MiB, got 100.0 KiB"),
        ({"dram.directory": "arena"}, "must be an absolute path"),
        ({"dram.verify_every": 0}, "should be greater than or equal to 1"),
        ({"dram.mapped": "perhaps"}, "should be a valid boolean"),
        ({"dram.max_records": 0}, "should be greater than or equal to 1"),
        ({"dram.max_records": True}, "must be a number, got true"),
        ({"limits.hazard_bytes_per_session": 0}, "must be more than 0"),
        ({"limits.reclaim_grace_s": -0.1}, "should be greater than or equal to 0"),
        ({"limits.reclaim_grace_s": "inf"}, "should be a finite number"),
        ({"limits.reclaim_grace_s": True}, "must be a number, got true"),
        ({"limits.max_lease_s": 601}, "should be less than or equal to 600"),
        ({"limits.max_lease_s": "nan"}, "should be greater than 0"),
        ({"limits.session_idle_s": "inf"}, "should be a finite number"),
        ({"limits.max_sessions": True}, "must be a number, got true"),
        ({"access.mode": "0640"}, 'must be one of "0600", "0660", "0666", got \'0640\''),
        ({"access.mode": 660}, "got 660"),
        ({"access.group": "no-such-group", "access.mode": "0660"}, "there is no group 'no-such-group'"),
        ({"access.group": OWN_GROUP}, 'needs access.mode = "0660", got "0600"'),
        ({"endpoint": "tcp://0.0.0.0:1"}, "tcp://"),
        ({"endpoint": "ipc:///" + "x" * 200}, "a unix socket allows 107"),
        ({"eviction.policy": ""}, "at least 1 character"),
        (
            {"dram.grant_bytes": "8MiB", "limits.grant_bytes_per_session": "16MiB"},
            "limits.grant_bytes_per_session (16.0 MiB) must not be more than dram.grant_bytes (8.0 MiB)",
        ),
    ],
)
def test_refusal_of_impossible_values_says_why(overrides: dict[str, object], cause: str) -> None:
    assert cause in refusal(None, overrides)


def test_refusal_of_values_in_conflict_names_both_sources(config: Path) -> None:
    config.write_text('[dram]\ngrant_bytes = "8MiB"\n')
    text = refusal(config, KVSTORE_LIMITS__GRANT_BYTES_PER_SESSION="16MiB")
    assert text.startswith(f"KVSTORE_LIMITS__GRANT_BYTES_PER_SESSION and {config}: dram.grant_bytes: ")


# ------------------------------------------------------------------ meaning


@pytest.mark.parametrize("mode", ["0660", "660", "0o660", 0o660])
def test_mode_in_octal_is_its_bits(mode: str | int) -> None:
    assert Settings.load(None, {"access.mode": mode}, environ={}).access.mode == 0o660


def test_group_by_name_and_by_number_has_its_id() -> None:
    assert AccessSettings(mode=0o660, group=OWN_GROUP).group_id == os.getgid()
    assert AccessSettings(mode=0o660, group="54321").group_id == 54321
    assert AccessSettings().group_id is None


def test_grants_of_one_client_default_to_no_more_than_all_grants() -> None:
    assert Settings().limits.grant_bytes_per_session == 32 << 20
    assert Settings(dram=DramSettings(grant_bytes=8 << 20)).limits.grant_bytes_per_session == 8 << 20
    assert Settings().limits.grant_bytes_per_session == 32 << 20


@pytest.mark.parametrize(
    ("capacity_bytes", "records"),
    [
        (1 << 20, 256),
        (256 << 20, 1 << 16),
        (1 << 30, 1 << 16),
        (2 << 30, 1 << 17),
        (100 << 30, 100 << 16),
    ],
)
def test_record_limit_by_default_is_one_in_16_kib_or_all_that_fit_a_small_tier(
    capacity_bytes: int, records: int
) -> None:
    assert DramSettings(capacity_bytes=capacity_bytes).record_limit == records
    assert DramSettings(capacity_bytes=capacity_bytes, max_records=7).record_limit == 7


def test_mapping_is_on_unless_switched_off_by_any_source(config: Path) -> None:
    assert Settings().dram.mapped
    config.write_text("[dram]\nmapped = false\n")
    assert not Settings.load(config, environ={}).dram.mapped
    assert not Settings.load(environ={"KVSTORE_DRAM__MAPPED": "false"}).dram.mapped
    assert Settings.load(config, {"dram.mapped": "true"}, environ={}).dram.mapped


def test_grace_of_zero_reclaims_at_once() -> None:
    assert Settings().limits.reclaim_grace_s == 2
    assert Settings.load(None, {"limits.reclaim_grace_s": "0"}, environ={}).limits.reclaim_grace_s == 0


def test_capacity_below_a_mebibyte_needs_a_slab_size() -> None:
    assert DramSettings(capacity_bytes=64 << 10, slab_bytes=16 << 10).capacity_bytes == 64 << 10


def test_arena_directory_set_is_used_with_the_home_expanded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/someone")
    assert Settings.load(None, {"dram.directory": "~/arena"}, environ={}).arena_directory == Path("/home/someone/arena")


# ---------------------------------------------------------------- events


def test_event_endpoints_are_beside_the_daemon_s_own_unless_set():
    settings = Settings(endpoint="/tmp/k/kv.sock")
    assert not settings.events.publish
    assert settings.event_endpoints == ("ipc:///tmp/k/kv.sock.events", "ipc:///tmp/k/kv.sock.replay")
    tree = {"events.endpoint": "tcp://*:5557", "events.replay_endpoint": "/tmp/k/again", "events.publish": "true"}
    settings = Settings.load(overrides=tree, environ={})
    assert settings.event_endpoints == ("tcp://*:5557", "ipc:///tmp/k/again")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"events.endpoint": "tcp://*"}, "must be tcp://HOST:PORT"),
        ({"events.endpoint": "tcp://:5557"}, "must be tcp://HOST:PORT"),
        ({"events.endpoint": "tcp://*:0"}, "must be tcp://HOST:PORT"),
        ({"events.endpoint": "inproc://events"}, "unknown transport"),
        ({"events.buffer_steps": 0}, "should be greater than or equal to 1"),
        ({"events.heartbeat_s": 0}, "should be greater than"),
        ({"events.heartbeat_s": True}, "must be a number"),
        ({"events.publish": "perhaps"}, "should be a valid boolean"),
        (
            {"events.publish": True, "events.endpoint": "/tmp/k/e", "events.replay_endpoint": "/tmp/k/e"},
            "must be three different ones",
        ),
        (
            {"events.publish": True, "endpoint": "/tmp/k/kv.sock", "events.endpoint": "/tmp/k/kv.sock"},
            "must be three different ones",
        ),
        ({"events.publish": True, "endpoint": "/tmp/" + "k" * 102}, "set events.endpoint and events.replay_endpoint"),
    ],
)
def test_event_settings_that_cannot_be_are_refused(overrides: dict[str, object], message: str):
    with pytest.raises(SettingsError, match=message) as caught:
        Settings.load(overrides=overrides, environ={})
    assert "\n" not in str(caught.value)


# ---------------------------------------------------------------- quotas and retention


def test_quotas_from_a_table_and_from_the_environment_are_the_same(tmp_path: Path):
    config = tmp_path / "kvstore.toml"
    config.write_text('[quota]\ntenants = { chat = "64MiB", "a=b" = 8192 }\n', encoding="utf-8")
    from_file = Settings.load(config, environ={})
    from_environment = Settings.load(environ={"KVSTORE_QUOTA__TENANTS": "chat=64MiB, a=b=8192"})
    assert from_file.quota.tenants == from_environment.quota.tenants == {"chat": 64 << 20, "a=b": 8192}


@pytest.mark.parametrize(
    ("environ", "cause"),
    [
        ({"KVSTORE_QUOTA__TENANTS": "chat"}, r"must be NAME=SIZE pairs, for example chat=4GiB,batch=1GiB, got 'chat'"),
        ({"KVSTORE_QUOTA__TENANTS": "chat=much"}, r"tenant 'chat': .*much"),
        ({"KVSTORE_QUOTA__TENANTS": "chat=1"}, r"tenant 'chat': a quota is at least 4096 bytes, got '1'"),
        ({"KVSTORE_QUOTA__TENANTS": "=8MiB"}, r"a tenant's name has 1 to 512 characters"),
        ({"KVSTORE_QUOTA__TENANTS": "a=8MiB,a=9MiB"}, r"tenant 'a' has two quotas"),
        ({"KVSTORE_QUOTA__TENANTS": ",".join(f"t{n}=1MiB" for n in range(65))}, r"at most 64 tenants .* got 65"),
        ({"KVSTORE_QUOTA__TENANTS": "a=2GiB"}, r"the quota of tenant 'a' \(2.0 GiB\) must not be more than dram"),
        ({"KVSTORE_QUOTA__SSD_TENANTS": "a=2GiB"}, r"quota.ssd_tenants is set and there is no SSD tier"),
        ({"KVSTORE_RETENTION__BUDGET_BYTES": "2GiB"}, r"retention.budget_bytes \(2.0 GiB\) must not be more than dram"),
        ({"KVSTORE_RETENTION__HINT_S": "0"}, r"greater than 0"),
        ({"KVSTORE_LIMITS__LEASE_SHARE": "0.95"}, r"less than or equal to 0.9"),
    ],
)
def test_impossible_quota_or_retention_is_refused_by_name(environ: dict[str, str], cause: str):
    with pytest.raises(SettingsError, match=cause):
        Settings.load(environ=environ)


def test_retention_budget_is_a_quarter_of_the_capacity_unless_it_is_set():
    assert Settings.load(environ={"KVSTORE_DRAM__CAPACITY_BYTES": "64MiB"}).retention_budget_bytes == 16 << 20
    assert Settings.load(environ={"KVSTORE_RETENTION__BUDGET_BYTES": "0"}).retention_budget_bytes == 0
