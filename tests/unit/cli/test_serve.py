"""Flags of ``kvstore serve`` become settings; the daemon itself is not started here."""

from __future__ import annotations

import os
import sys

import pytest

from kvstore.cli import main as main_module
from kvstore.settings import Settings


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[Settings]:
    """Settings that a daemon would have been started with."""
    import kvstore.server.app as app_module

    runs: list[Settings] = []

    def run(settings: Settings) -> int:
        runs.append(settings)
        return 0

    monkeypatch.setattr(app_module, "run", run)
    for name in [name for name in os.environ if name.startswith("KVSTORE_")]:
        monkeypatch.delenv(name)
    return runs


def kvstore(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["kvstore", *arguments])
    with pytest.raises(SystemExit) as caught:
        main_module.main()
    assert isinstance(caught.value.code, int)
    return caught.value.code


def test_serve_without_flags_uses_the_defaults(started: list[Settings], monkeypatch: pytest.MonkeyPatch) -> None:
    assert kvstore(monkeypatch, "serve") == 0
    assert started == [Settings()]


def test_serve_with_every_flag_sets_every_setting(
    started: list[Settings], monkeypatch: pytest.MonkeyPatch, tmp_path: os.PathLike[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    flags = (
        "--endpoint /tmp/k.sock --http off --capacity 8GiB --grant 1GiB --slab 8MiB --arena-dir arena --verify always"
    )
    more = "--log-level debug --log-format json --mode 0660 --group 4321 --set limits.max_sessions=7 --set http=x"
    mapped = "--set dram.mapped=false --set dram.max_records=1000"
    events = "--set events.publish=true --set events.endpoint=/tmp/e.sock --set events.heartbeat_s=2"
    ssd = "--ssd below --ssd-capacity 2GiB --set ssd.reserve_bytes=0 --set ssd.transcode=raw>lossless-zstd"
    quotas = "--set quota.tenants=chat=1GiB,batch=1MiB --set quota.ssd_tenants=chat=2GiB"
    kept = "--set retention.budget_bytes=3GiB --set retention.hint_s=5"
    given = f"{flags} {more} {mapped} {events} {ssd} {quotas} {kept}"
    assert kvstore(monkeypatch, "serve", *given.split()) == 0
    (settings,) = started
    assert settings.model_dump(mode="json") == {
        "endpoint": "ipc:///tmp/k.sock",
        "http": "off",
        "log_level": "debug",
        "log_format": "json",
        "events": {
            "publish": True,
            "endpoint": "ipc:///tmp/e.sock",
            "replay_endpoint": "",
            "topic": "",
            "buffer_steps": 10_000,
            "hwm": 10_000,
            "heartbeat_s": 2.0,
        },
        "ssd": {
            "directory": os.path.join(os.path.realpath(tmp_path), "below"),
            "capacity_bytes": 2 << 30,
            "slab_bytes": None,
            "reserve_bytes": 0,
            "max_records": None,
            "threads": 8,
            "group_records": 64,
            "group_ms": 20,
            "recovery": "lazy",
            "admission": "all",
            "transcode": "raw>lossless-zstd",
            "prefetch_bytes": None,
            "warm": "",
            "prefill_tokens_per_s": 0.0,
        },
        "dram": {
            "directory": os.path.join(os.path.realpath(tmp_path), "arena"),
            "capacity_bytes": 8 << 30,
            "grant_bytes": 1 << 30,
            "slab_bytes": 8 << 20,
            "mapped": False,
            "max_records": 1000,
            "verify": "always",
            "verify_every": 64,
        },
        "access": {"mode": 0o660, "group": "4321"},
        "limits": Settings().limits.model_dump() | {"max_sessions": 7},
        "eviction": {"policy": "lru", "ssd_policy": "lru"},
        "record": Settings().record.model_dump(mode="json"),
        "explain": Settings().explain.model_dump(mode="json"),
        "quota": {"tenants": {"chat": 1 << 30, "batch": 1 << 20}, "ssd_tenants": {"chat": 2 << 30}},
        "retention": {"budget_bytes": 3 << 30, "hint_s": 5.0},
    }


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--capacity", "8gigs"], "--capacity: '8gigs' has the unknown unit 'gigs'; write bytes"),
        (["--set", "limits.max_lese_s=1"], "unknown setting 'limits.max_lese_s'; did you mean limits.max_lease_s?"),
        (["--set", "dram.verify_every=often"], "--set dram.verify_every = 'often': should be a valid integer"),
        (["--set", "nonsense"], "--set nonsense: write KEY=VALUE"),
        (["--config", "/no/such.toml"], "cannot read the settings file /no/such.toml: No such file"),
        (["--endpoint", "tcp://0.0.0.0:5555"], "tcp://"),
        (["--grup", "x"], "No such option: --grup"),
        (["superfluous"], "unexpected extra argument"),
        (["--parent-pid", "999999999"], "cannot watch the parent process 999999999"),
    ],
)
def test_serve_with_a_mistake_is_one_line_and_starts_nothing(
    started: list[Settings],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    line: str,
) -> None:
    status = kvstore(monkeypatch, "serve", *arguments)
    out, err = capsys.readouterr()
    assert status == (1 if "--parent-pid" in arguments else 2)
    assert not out
    assert err.startswith("kvstore: error: ")
    assert line in err
    assert err.count("\n") == 1
    assert not started


def test_interrupted_command_is_one_line(
    started: list[Settings], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import kvstore.server.app as app_module

    def run(settings: Settings) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(app_module, "run", run)
    assert kvstore(monkeypatch, "serve") == 130
    assert capsys.readouterr().err.strip() == "kvstore: error: interrupted"


def test_unexpected_error_is_one_line_and_a_traceback_with_debug(
    started: list[Settings], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import kvstore.server.app as app_module

    def run(settings: Settings) -> int:
        raise ZeroDivisionError("a bug\nof two lines")

    monkeypatch.setattr(app_module, "run", run)
    assert kvstore(monkeypatch, "serve") == 1
    assert capsys.readouterr().err == (
        "kvstore: error: internal error: ZeroDivisionError: a bug of two lines; 'kvstore --debug ...' shows where\n"
    )
    with pytest.raises(ZeroDivisionError):
        kvstore(monkeypatch, "--debug", "serve")


def test_command_missing_shows_the_help(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert kvstore(monkeypatch) == 2
    out, err = capsys.readouterr()
    assert "serve" in out + err
    assert "error" not in out + err


def test_version_is_shown_by_flag_and_by_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert kvstore(monkeypatch, "version") == kvstore(monkeypatch, "--version") == 0
    first, second = capsys.readouterr().out.splitlines()
    assert first == second
    assert first.startswith("kvstore 0")


def test_watch_with_json_or_a_wrong_interval_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert kvstore(monkeypatch, "stats", "--watch", "--json") == 2
    assert kvstore(monkeypatch, "stats", "--watch", "0") == 2
    assert kvstore(monkeypatch, "stats", "--watch=x") == 2
    errors = capsys.readouterr().err.splitlines()
    assert [line.startswith("kvstore: error: ") for line in errors] == [True] * 3
    assert "do not go together" in errors[0]
    assert "0.1 to 86400 seconds" in errors[1]
