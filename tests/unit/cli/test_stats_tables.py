from __future__ import annotations

import io
import os

import pytest
from rich.console import Console, RenderableType
from sample_stats import sample_retention, sample_ssd, sample_stats, sample_tenants

from kvstore.cli.stats_tables import stats_tables, waiting
from kvstore.protocol.statistics import NamespaceStats, SlotClassStats


def lines(renderable: RenderableType) -> list[str]:
    out = io.StringIO()
    Console(file=out, width=1000, highlight=False, markup=False).print(renderable)
    return [line.rstrip() for line in out.getvalue().splitlines()]


def row(text: list[str], name: str) -> list[str]:
    return next(line for line in text if line.split()[:1] == [name]).split()


def test_stats_of_a_busy_daemon_show_its_numbers() -> None:
    text = lines(stats_tables(sample_stats()))
    assert row(text, "match") == ["match", "1,000", "64,000", "32,000", "50.0", "%"]
    assert row(text, "get")[-2:] == [">99.9", "%"]
    assert row(text, "dram")[-4:] == ["36.6", "%", "12,000", "24,000"]
    assert any(line.split()[:1] == ["removed"] and line.endswith(" blocks, by clients or expired") for line in text)
    assert "written 5.9 GiB; refused: 5 overloaded, 2 too large" in text
    assert row(text, "model-1") == ["model-1", "1", "2", "2.0", "MiB"]
    assert row(text, "260.0")[-2:] == ["97.8", "%"]
    assert row(text, "index") == ["index", "81.0", "MiB,", "for", "524,288", "records"]


def test_stats_have_a_line_of_events_where_they_are_published() -> None:
    text = lines(stats_tables(sample_stats(events=True)))
    told = "1,500 batches, 90,000 blocks stored, 78,000 removed, 12 replays, 2 snapshots, 1 requests dropped"
    assert any(line.split(maxsplit=1) == ["events", told] for line in text)
    assert not any(line.startswith("events") for line in lines(stats_tables(sample_stats())))


def test_stats_show_an_ssd_tier_where_there_is_one() -> None:
    text = lines(stats_tables(sample_stats(ssd=True)))
    assert row(text, "ssd")[1:5] == ["20.0", "GiB", "100.0", "GiB"]
    assert row(text, "ssd")[-2:] == ["81,000", "162,000"]
    assert row(text, "demoted") == ["demoted", "90,000", "22.0", "GiB"]
    assert "41,000 blocks served" in text
    told = {line.split(maxsplit=1)[0]: line.split(maxsplit=1)[1] for line in text if len(line.split()) > 1}
    assert told["directory"] == "/var/lib/kvstore/default, direct I/O"
    assert told["rates"] == "read 3.10 GB/s, write unknown"
    assert {"not kept", "not loaded"} <= {line[:12].strip() for line in text}
    assert (told["damaged"], told["errors"]) == ("1 records", "2 reads, 3 writes")
    assert not any("SSD" in line or line.startswith("ssd") for line in lines(stats_tables(sample_stats())))


def test_stats_show_retention_and_quotas_where_they_are_used() -> None:
    stats = sample_stats()
    stats.retention, stats.tenants = sample_retention(), sample_tenants()
    text = lines(stats_tables(stats))
    told = {line.split(maxsplit=1)[0]: line.split(maxsplit=1)[1] for line in text if len(line.split()) > 1}
    assert told["retained"] == "1,200 blocks, 1.0 GiB of 2.0 GiB (50.0 %)"
    assert told["leased"] == "1.0 GiB of 4.0 GiB (25.0 %)"
    assert told["others"] == "40 of low priority, 7 not in DRAM now"
    assert told["lost"] == "300 over the budget, 5 for room"
    assert told["expired"] == "900 normal again, 60 dropped"
    assert told["leases"] == "3 cut short, 2 refused"
    assert row(text, "chat")[1:6] == ["dram", "900.0", "MiB", "1000.0", "MiB"]
    assert row(text, "chat")[-3:] == ["%", "70", "4"]
    assert row(text, "archive")[1] == "ssd"
    assert row(text, "archive")[-2:] == ["%", "11"]
    at = [text.index(line) for line in text if line.split()[:1] in (["chat"], ["archive"])]
    assert text[at[0]].split()[0] == "chat", "those nearest to their limits come first"


def test_stats_say_nothing_of_retention_and_quotas_where_nobody_uses_them() -> None:
    stats = sample_stats()
    stats.retention = sample_retention()
    for name in stats.retention.__struct_fields__:
        setattr(stats.retention, name, 1 << 30 if name in ("budget_bytes", "lease_limit_bytes") else 0)
    text = lines(stats_tables(stats))
    assert not any(line.startswith(("Retention", "Quotas")) for line in text)


def test_stats_show_what_came_up_ahead_and_what_was_loaded_or_computed() -> None:
    text = lines(stats_tables(sample_stats(ssd=True, ahead=True)))
    assert row(text, "used")[-2:] == ["75.0", "%"]
    assert "wanted by 3,000 matches, 500 hints, 1,000 warming up" in text
    assert "dropped: 12 expired, 5 of clients that went" in text
    assert "refused: 90 too many of one client, 33 no room" in text
    assert "7 of 40 hints were begun later: unused blocks stay for 1 min 35 s" in text
    told = {line.split(maxsplit=1)[0]: line.split(maxsplit=1)[1] for line in text if len(line.split()) > 1}
    assert told["matches"] == "900 loaded, 40 computed, 8 loaded in part"
    assert told["engine"] == "8,000 tokens/s (reported)"
    assert told["saved"] == "13 min 32 s by loading, 30.2 s by computing (estimated)"
    assert not any("ahead" in line or "Load or" in line for line in lines(stats_tables(sample_stats(ssd=True))))


@pytest.mark.parametrize(("state", "problem"), [("read-only", "no space is left"), ("off", "")])
def test_stats_of_an_ssd_tier_with_a_problem_name_it(state: str, problem: str) -> None:
    stats = sample_stats(problem="/dev/shm is full")
    stats.ssd = sample_ssd()
    stats.ssd.state, stats.ssd.problem = state, problem
    text = lines(stats_tables(stats))
    assert "problem: /dev/shm is full" in text
    assert f"the SSD tier is {state}: {problem or 'see the log of the daemon'}" in text


def test_stats_of_a_fresh_daemon_show_no_rate_where_nothing_was_asked() -> None:
    text = lines(stats_tables(sample_stats(fresh=True, namespaces=0, sessions=0)))
    assert row(text, "match") == ["match", "0", "0", "0", "-"]
    assert not any(line.startswith(("Slots", "Namespaces", "Clients")) for line in text)


@pytest.mark.parametrize("sessions", [1, 40])
def test_stats_fit_80_columns(sessions: int) -> None:
    text = lines(
        stats_tables(sample_stats(namespaces=40, sessions=sessions, ssd=True, ahead=True), since=sample_stats())
    )
    assert max(map(len, text)) <= 80
    assert sum("more, --json has them all" in line for line in text) == 1 + (sessions > 1)


def test_stats_with_an_earlier_snapshot_show_rates() -> None:
    now, before = sample_stats(), sample_stats()
    now.uptime_s += 2
    now.lookups.match_keys += 3000
    now.lookups.bytes_out += 4_000_000_000
    text = lines(stats_tables(now, since=before))
    assert row(text, "match")[-2:] == ["1,500", "/s"]
    (read,) = [line for line in text if line.startswith("read 11.4 GiB, now 2.00 GB/s; ")]
    assert "7 throttled" in read


def test_stats_of_a_restarted_daemon_show_no_rates() -> None:
    before = sample_stats()
    before.incarnation = "another"
    assert not any("/s" in line for line in lines(stats_tables(sample_stats(), since=before)))


def test_stats_of_a_tier_with_a_problem_name_it() -> None:
    assert "problem: /dev/shm is full" in lines(stats_tables(sample_stats(problem="/dev/shm is full")))


def test_stats_leave_out_the_client_that_asked() -> None:
    stats = sample_stats()
    stats.sessions[0].pid = os.getpid()
    assert not any(line.startswith("Clients") for line in lines(stats_tables(stats)))


def test_waiting_says_so_and_why() -> None:
    assert lines(waiting("nobody answers")) == ["waiting for the daemon ...", "nobody answers"]


def test_stats_say_when_slots_fill_slabs_badly() -> None:
    stats = sample_stats()
    assert not any("slots do not fill" in line for line in lines(stats_tables(stats)))
    half = stats.dram.slab_bytes * 51 // 100
    slabs = stats.dram.arena_bytes // stats.dram.slab_bytes
    stats.dram.classes = [SlotClassStats(slot_bytes=half, slabs=slabs, used_slots=slabs, free_slots=0)]
    text = lines(stats_tables(stats))
    assert row(text, "unfilled")[1:3] != ["0", "B"]
    (advice,) = [line for line in text if "slots do not fill" in line]
    assert advice.startswith("49.0 %")
    assert "dram.slab_bytes" in advice


def test_stats_tell_namespaces_apart_that_nobody_named() -> None:
    stats = sample_stats(namespaces=0)
    stats.namespaces = [
        NamespaceStats(name="default", generation=0, blocks=1, slot_bytes=size, model=model, codec=codec, digest=digest)
        for size, model, codec, digest in [
            (5, "meta-llama/Llama-3.1-8B", "kivi4", "aaaaaaaa"),
            (4, "/models/qwen3/", "int8", "bbbbbbbb"),
            (3, "/models/qwen3/", "int8", "cccccccc"),
            (2, "", "raw", "dddddddd"),
        ]
    ]
    text = lines(stats_tables(stats))
    assert row(text, "Llama-3.1-8B")[1] == "kivi4"
    assert [line.split()[:3] for line in text if line.split()[:1] == ["qwen3"]] == [
        ["qwen3", "int8", "bbbbbbbb"],
        ["qwen3", "int8", "cccccccc"],
    ]
    assert row(text, "default")[1:3] == ["0", "1"]


def test_stats_name_the_policies_of_both_tiers() -> None:
    stats = sample_stats(ssd=True)
    stats.eviction.ssd_policy, stats.eviction.admission = "lru", "predicted"
    stats.eviction.ghost_bytes, stats.eviction.switched = 3 << 20, 2
    stats.eviction.policy, stats.eviction.following = "adaptive", "learned"
    text = lines(stats_tables(stats))
    (below,) = [line for line in text if line.startswith("of the SSD")]
    (policy,) = [line for line in text if line.startswith("policy")]
    assert "adaptive, by learned returns" in policy
    assert "lru; admits predicted" in below
    assert row(text, "ghosts")[1:3] == ["3.0", "MiB"]
    assert row(text, "switched")[1] == "2"
