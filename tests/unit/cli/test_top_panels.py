"""Panels of ``kvstore top`` on statistics of daemons that do not exist: busy, fresh, old, in trouble."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import msgspec
import pytest
from sample_stats import sample_stats
from textual.content import Content

from kvstore.cli.top import bars
from kvstore.cli.top.frame import Frame, Order
from kvstore.cli.top.history import History
from kvstore.cli.top.once import frame_text
from kvstore.cli.top.panel import Panel
from kvstore.cli.top.registry import PANELS
from kvstore.cli.top.themes import usual_theme
from kvstore.protocol.statistics import (
    CauseStats,
    DaemonStats,
    LoadingStats,
    MissStats,
    PrefetchStats,
    RetentionStats,
    TenantStats,
)

GIB = 1 << 30


def frame_of(stats: DaemonStats, earlier: DaemonStats | None = None, **options: object) -> Frame:
    """A frame of one snapshot, or of two a second apart."""
    history = History()
    if earlier is not None:
        history.add(earlier, 99.0)
    history.add(stats, 100.0)
    return Frame(stats, history, **options)  # type: ignore[arg-type]


def busy(**options: object) -> Frame:
    """A daemon that was asked for 1000 blocks in the last second, and hit 632."""
    earlier, stats = (sample_stats(ssd=True, sessions=3, **options) for _ in range(2))  # type: ignore[arg-type]
    earlier.uptime_s -= 1.0
    stats.lookups.match_keys += 1000
    stats.lookups.match_hits += 632
    stats.lookups.bytes_out += 3 * 10**9
    stats.puts.stored += 123
    stats.puts.throttled += 9
    stats.eviction.evicted_blocks += 45
    assert stats.ssd is not None
    earlier.misses, stats.misses = sample_misses(evicted=1), sample_misses(evicted=200, never_seen=169)
    stats.ssd.hits += 120
    stats.ssd.demoted_bytes += 50 * 10**6
    stats.sessions[1].requests += 400
    return frame_of(stats, earlier)


def text(panel: str, frame: Frame, width: int = 76, rows: int = 30, *, details: bool = False) -> str:
    one: Panel = PANELS[panel]
    draw = one.details if details and one.details is not None else one.draw
    lines: Sequence[Content] = draw(frame, width, rows)
    assert all(line.cell_length <= width for line in lines), "a line is wider than the panel"
    return "\n".join(line.plain for line in lines)


def test_hits_panel_tells_rate_now_and_by_tier() -> None:
    drawn = text("hits", busy())
    assert "63.2 % now" in drawn
    assert "DRAM 51.2 %" in drawn
    assert "SSD 12.0 %" in drawn
    assert "miss 36.8 %" in drawn
    assert "- 1 min" in drawn, "a window that is not over says nothing"


def test_traffic_panel_shows_rates_and_bad_answers_first() -> None:
    drawn = text("traffic", busy(), width=60)
    assert "3.00 GB/s" in drawn
    assert drawn.index("123 stored") < drawn.index("9.00 throttled") < drawn.index("0 exists")


def test_tiers_panel_tells_what_fills_each() -> None:
    drawn = text("tiers", busy())
    assert "2.9 GiB of 8.0 GiB" in drawn
    assert "20.0 GiB of 100.0 GiB" in drawn
    assert "12,000 blocks" in drawn
    assert "266,240" not in drawn
    assert "260.0 KiB" in text("tiers", busy(), details=True), "slots on demand"


def test_tiers_panel_says_what_is_wrong() -> None:
    frame = busy(problem="only 5.0 GiB fit")
    assert frame.stats.ssd is not None
    frame.stats.ssd.state, frame.stats.ssd.problem = "read-only", "the device failed"
    drawn = text("tiers", frame)
    assert "only 5.0 GiB fit" in drawn
    assert "read-only: the device failed" in drawn
    assert "▲ read-only" in text("ssd", frame)


def test_panels_without_ssd_leave_it_out() -> None:
    frame = frame_of(sample_stats(sessions=2))
    assert not PANELS["ssd"].there(frame)
    for panel in ("hits", "traffic", "tiers"):
        drawn = text(panel, frame)
        assert "SSD" not in drawn
        assert "demoted" not in drawn
        assert "retired" not in drawn


def test_panels_before_the_second_look_show_no_rates() -> None:
    frame = frame_of(sample_stats(ssd=True, sessions=2))
    assert "- now" in text("hits", frame)
    assert "0 MB/s" not in text("traffic", frame)
    assert "/s" not in text("clients", frame).split("\n", 1)[1]


def test_panels_of_a_fresh_daemon_show_no_hit_rate() -> None:
    fresh = sample_stats(fresh=True)
    earlier = sample_stats(fresh=True)
    earlier.uptime_s -= 1.0
    drawn = text("hits", frame_of(fresh, earlier))
    assert "%" not in drawn.replace("100 %", "").replace("50 %", "").replace("0 %", "")
    assert "·" in drawn, "nothing was asked: marked, not drawn as a miss"


def test_clients_panel_sorts_filters_and_leaves_itself_out() -> None:
    frame = busy()
    rows = text("clients", frame, width=100).splitlines()
    assert rows[1].split()[0] == "5001", "the busiest first"
    assert "400 /s" in rows[1]
    by_pid = text("clients", frame_of(frame.stats, orders={"clients": Order("pid")})).splitlines()
    assert [row.split()[0] for row in by_pid[1:]] == ["5000", "5001", "5002"]
    assert "5001" not in text("clients", frame_of(frame.stats, own_pid=5001))
    assert "5002" in text("clients", frame_of(frame.stats, needle="5002"))
    assert "None of 3 clients" in text("clients", frame_of(frame.stats, needle="nobody"))
    assert "No client" in text("clients", frame_of(sample_stats(sessions=0)))


def test_namespaces_panel_shows_shares() -> None:
    drawn = text("namespaces", frame_of(sample_stats(namespaces=2))).splitlines()
    assert drawn[1].split()[0] == "model-1"
    assert "66.7 %" in drawn[1]


def test_retention_panel_shows_budget_and_quotas() -> None:
    stats = sample_stats()
    assert not PANELS["retention"].there(frame_of(stats))
    numbers = dict.fromkeys((field.name for field in msgspec.structs.fields(RetentionStats)), 0)
    stats.retention = RetentionStats(
        **(numbers | {"budget_bytes": GIB, "retained_bytes": GIB // 2, "retained_blocks": 9})
    )
    stats.retention.leases_refused = 3
    stats.tenants = [
        TenantStats(name="a", used_bytes=GIB, limit_bytes=2 * GIB, evicted_blocks=5, refused_puts=0),
        TenantStats(name="b", used_bytes=GIB, limit_bytes=0, evicted_blocks=0, refused_puts=0),
    ]
    drawn = text("retention", frame_of(stats))
    assert "512.0 MiB of 1.0 GiB" in drawn
    assert "9 retained" in drawn
    assert "3 refused" in drawn
    assert "50.0 %" in drawn
    assert "no limit" in drawn


def sample_misses(**blocks: int) -> MissStats:
    """Of what was evicted a quarter more capacity would have kept a quarter, twice as much three quarters."""
    evicted = blocks.get("evicted", 0)
    return MissStats(
        requests=sum(blocks.values()),
        blocks=sum(blocks.values()),
        causes={name: CauseStats(requests=count, blocks=count) for name, count in blocks.items()},
        multiples=[0.25, 0.5, 1.0],
        extra_blocks=[evicted // 4, evicted // 4, evicted // 4, evicted - 3 * (evicted // 4)],
        ghosts=12_345,
        ghost_bytes=3 << 20,
        ghost_limit_bytes=8 << 20,
        oldest_ghost_s=720.0,
    )


def test_misses_panel_shows_recent_shares_by_cause() -> None:
    earlier, stats = sample_stats(), sample_stats()
    earlier.uptime_s -= 1.0
    earlier.misses = sample_misses(never_seen=900, evicted=100)
    stats.misses = sample_misses(never_seen=925, evicted=175, later_cause=0)
    drawn = text("misses", frame_of(stats, earlier), width=70)
    rows = drawn.splitlines()
    assert rows[1].startswith("evicted"), "the largest recent share first"
    assert "75.0 %" in rows[1]
    assert "15.9 %" in rows[1]
    assert rows[2].startswith("never seen")
    assert "25.0 %" in rows[2]
    assert "84.1 %" in rows[2]
    assert "later cause" in rows[3]
    assert "more DRAM would have kept  +25 % 24.6 %  +100 % 73.7 %" in drawn
    assert "12,345 departures remembered" in drawn
    assert PANELS["misses"].note is not None
    assert PANELS["misses"].note(frame_of(stats, earlier)) == "100 /s missed"


def test_misses_panel_of_one_look_has_only_what_was_since_the_start() -> None:
    stats = sample_stats()
    stats.misses = sample_misses(never_seen=3, diverged=1)
    rows = text("misses", frame_of(stats)).splitlines()
    assert rows[1].split()[-3:] == ["75.0", "%", "3"]
    assert "- " in rows[1], "no recent share"
    stats.misses = sample_misses()
    assert "Nothing was missed yet." in text("misses", frame_of(stats))
    assert not PANELS["misses"].there(frame_of(sample_stats()))


def test_loading_panel_tells_what_was_decided_and_what_became_of_it() -> None:
    stats = sample_stats(ssd=True)
    assert not PANELS["loading"].there(frame_of(stats))
    stats.loading = LoadingStats(
        read_bytes_per_s=1.2e9,
        latency_s=0.002,
        queued_bytes=0,
        prefill_tokens_per_s=8000.0,
        prefill_source="reported",
        decisions={"all": 70, "none": 30, "probe": 0},
        refused_blocks=90,
        load_saved_s=75.0,
        refusal_saved_s=0.0,
    )
    numbers = dict.fromkeys((field.name for field in msgspec.structs.fields(PrefetchStats)), 0)
    shown = {"wanted": {"arrived": 500, "hinted": 20}, "refused": {"no_room": 7}, "residence_s": 40.0}
    stats.prefetch = PrefetchStats(**(numbers | shown | {"blocks": 200, "used_blocks": 150, "most_bytes": 1 << 30}))  # type: ignore[arg-type]
    drawn = text("loading", frame_of(stats), width=60)
    assert "1.20 GB/s" in drawn
    assert "8,000 tokens/s  reported" in drawn
    assert "loaded 70.0 %  computed 30.0 %" in drawn
    assert "1 min 15 s by loading" in drawn
    assert "used 75.0 %" in drawn
    assert "500 matches  20 hints" in drawn
    assert "7 no room" in drawn
    assert "40.0 s in DRAM" in drawn
    assert "left unused" not in drawn


def test_policy_panel_tells_what_adaptive_follows() -> None:
    stats = sample_stats(ssd=True)
    assert "," not in text("policy", frame_of(stats)).splitlines()[0]
    stats.eviction.policy, stats.eviction.following = "adaptive", "lru"
    stats.eviction.ssd_policy, stats.eviction.admission = "clock", "all"
    stats.eviction.ghost_bytes = 2 << 20
    drawn = text("policy", frame_of(stats))
    assert "adaptive, as LRU for now" in drawn
    assert "clock   admits all" in drawn
    assert "2.0 MiB" in drawn
    stats.eviction.following = "learned"
    assert "adaptive, by learned returns" in text("policy", frame_of(stats))


def test_curve_panel_marks_the_present_capacity_and_tells_gains() -> None:
    drawn = text("curve", frame_of(sample_stats(curve=True, ssd=True)), width=66, rows=9)
    rows = drawn.splitlines()
    assert len(rows) == 9
    assert "30.0 % with LRU in 8.0 GiB" in rows[0]
    assert "62.0 % with the SSD" in rows[0]
    assert "60.0 %" in rows[1]
    axis = rows[-2]
    assert axis.split() == ["¼x", "½x", "1x", "2x", "4x", "8x"]
    assert rows[1][axis.index("1x")] == "┊", "where the tier is now"
    assert " ".join(rows[-1].split()) == "½x -10.0 2x +10.0 4-bit blocks +18.3 4x +20.0 8x +30.0 points"


def test_curve_panel_before_anything_was_asked_says_so() -> None:
    stats = sample_stats(curve=True)
    assert stats.curve is not None
    stats.curve.accesses = 0.0
    assert "Nothing was asked for yet." in text("curve", frame_of(stats))
    stats.curve.accesses = 10.0
    assert "few accesses yet" in text("curve", frame_of(stats))


@pytest.mark.parametrize("kind", ["busy", "fresh", "old", "alone"])
@pytest.mark.parametrize("name", list(PANELS))
def test_panel_at_any_width_stays_within_it(name: str, kind: str) -> None:
    frame = {
        "busy": busy,
        "fresh": lambda: frame_of(sample_stats(fresh=True, sessions=0, namespaces=0)),
        "old": lambda: frame_of(old_stats()),
        "alone": lambda: frame_of(sample_stats(sessions=1, ssd=True, curve=True)),
    }[kind]()
    panel = PANELS[name]
    if not panel.there(frame):
        return
    for width in (1, 2, 7, 20, 33, 54, 76, 116, 300):
        for rows in (1, 2, 5, 12, 50):
            for draw in (panel.draw, panel.details or panel.draw):
                lines = [one.truncate(width) if one.cell_length > width else one for one in draw(frame, width, rows)]
                if width >= 33:
                    assert lines
                assert "nan" not in "".join(one.plain for one in lines)
    assert panel.wanted(frame) >= 1


def old_stats() -> DaemonStats:
    """What a daemon of the first version answers: every field that was added later is absent."""
    whole = msgspec.to_builtins(sample_stats(sessions=2))
    for name in ("events", "ssd", "retention", "tenants", "misses", "curve", "prefetch", "loading"):
        whole.pop(name, None)
    for name in ("mapped_reads", "dropped_reports"):
        whole["lookups"].pop(name)
    whole["puts"].pop("replaced")
    return msgspec.convert(whole, DaemonStats)


def test_old_daemon_shows_what_it_has_and_leaves_out_the_rest() -> None:
    frame = frame_of(old_stats())
    assert [name for name, panel in PANELS.items() if panel.there(frame)] == [
        "hits",
        "traffic",
        "tiers",
        "policy",
        "clients",
        "namespaces",
    ]


def test_frame_as_text_has_every_panel_and_no_wide_line() -> None:
    drawn = frame_text(replace(busy(), charts=False), 100)
    for title in ("Hit rate", "Traffic", "Tiers", "Clients", "Namespaces", "SSD"):
        assert f"\n\n{title}" in drawn
    assert max(map(len, drawn.splitlines())) <= 100
    assert "\x1b" not in drawn


def test_bars_fit_any_width() -> None:
    frame = busy()
    for width in (20, 40, 80, 120, 200):
        for state in ("live", "paused", "lost"):
            shown = bars.header(frame, "ipc:///x", state=state, interval_s=1.0, clock="12:00:00", width=width)
            assert shown.cell_length <= width
        assert bars.footer("said", "needle", width).cell_length <= width
        assert bars.lost_banner("it is gone", 12.0, width).cell_length <= width
        assert bars.tabs([[(1, "a", "A")], [(2, "b", "B")]], "a", "a", width).cell_length <= width
    assert "no answer for 12.0 s" in bars.lost_banner("it is gone", 12.0, 80).plain


def test_theme_follows_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    for value, theme in (("0;15", "light"), ("15;0", "dark"), ("15;default;7", "light"), ("", "dark"), ("x", "dark")):
        monkeypatch.setenv("COLORFGBG", value)
        assert usual_theme() == theme
