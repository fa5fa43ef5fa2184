"""``kvstore tune``: rows against the simulator, what it recommends and why, and what it refuses."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console
from synthetic_trace import synthetic_requests, write_trace
from typer.testing import CliRunner

from kvstore.cli.main import app
from kvstore.cli.tune.costs import CostModel
from kvstore.cli.tune.options import (
    Capacity,
    capacities_around,
    default_capacities,
    parse_capacities,
    parse_codecs,
    parse_policies,
)
from kvstore.cli.tune.report import TuneReport
from kvstore.cli.tune.runs import Run, carry_out, planned, sampling_rate
from kvstore.cli.tune.sizes import BlockSizes, given_sizes, model_sizes
from kvstore.cli.tune.tables import tune_tables
from kvstore.cli.tune.tuning import Asked, tuned
from kvstore.errors import InvalidArgument
from kvstore.policy.registry import POLICIES, SIMULATED
from kvstore.simulator.arrivals import Arrival, full_block_arrivals
from kvstore.simulator.clairvoyant import simulate_clairvoyant
from kvstore.simulator.prefix import simulate
from kvstore.simulator.sampling import Workload
from kvstore.simulator.tiered import simulate_tiered
from kvstore.simulator.trace_files import read_requests

REQUESTS = synthetic_requests(1500, seed=11)
ARRIVALS = full_block_arrivals(REQUESTS)
SIZES = given_sizes(1 << 20, ["raw", "kivi4"])


@pytest.fixture(scope="module")
def trace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_trace(tmp_path_factory.mktemp("tune") / "trace.jsonl", REQUESTS)


def tuned_json(trace: Path, *arguments: str) -> dict[str, object]:
    result = CliRunner().invoke(app, ["tune", str(trace), "--json", *arguments])
    assert result.exit_code == 0, result.output + str(result.exception)
    return json.loads(result.stdout)


def report(trace: Path, **changed: object) -> TuneReport:
    asked = {
        "policies": ["lru", "clock", "opt"],
        "capacities": [Capacity(50), Capacity(200), Capacity(800)],
        "codecs": ["raw"],
        "ssd": [Capacity()],
        "have": None,
        "exact": True,
        "prefill_tokens_per_s": 8000.0,
        "dram_gb_per_s": 25.0,
        "ssd_gb_per_s": 6.0,
        "decode_gb_per_s": {},
        **changed,
    }
    return tuned(read_requests(trace), SIZES, Asked(**asked))  # type: ignore[arg-type]


def printed(found: TuneReport) -> str:
    console = Console(width=80)
    with console.capture() as capture:
        console.print(tune_tables(found))
    return capture.get()


def test_exact_rows_are_what_the_simulator_gives_to_the_last_digit(trace: Path) -> None:
    found = tuned_json(trace, "--exact", "--policies", "lru,clock,opt", "--capacities", "20,100,5k")
    assert [(row["policy"], row["capacity_blocks"]) for row in found["rows"]] == [
        (policy, size) for size in (20, 100, 5000) for policy in ("lru", "clock", "opt")
    ]
    for row in found["rows"]:
        size = row["capacity_blocks"]
        simulated = (
            simulate_clairvoyant(ARRIVALS, size) if row["policy"] == "opt" else simulate(ARRIVALS, row["policy"], size)
        )
        assert row["hit_rate"] == pytest.approx(simulated.hit_rate, abs=1e-12)
        assert row["hit_rate_second_half"] == pytest.approx(simulated.hit_rate_second_half, abs=1e-12)
    assert found["exact"] is True
    assert found["machine"]["cores"] >= 1
    assert found["trace"]["requests"] == len(REQUESTS)


def test_codec_holds_more_blocks_in_the_same_bytes(trace: Path) -> None:
    found = report(trace, codecs=["raw", "kivi4"])
    raw, kivi4 = (
        [row for row in found.rows if row.codec == codec and row.policy == "lru"] for codec in ("raw", "kivi4")
    )
    for plain, small in zip(raw, kivi4, strict=True):
        assert small.capacity_bytes == plain.capacity_bytes
        assert small.capacity_blocks == plain.capacity_bytes // SIZES.slot_bytes["kivi4"]
        assert 3.4 < small.capacity_blocks / plain.capacity_blocks < 3.6
        assert small.hit_rate == simulate(ARRIVALS, "lru", small.capacity_blocks).hit_rate
        assert small.hit_rate >= plain.hit_rate


def test_ssd_rows_say_which_part_the_ssd_serves(trace: Path) -> None:
    found = report(trace, ssd=[Capacity(), Capacity(400)], capacities=[Capacity(50)])
    for row in found.rows:
        if not row.ssd_blocks:
            assert row.ssd_hit_rate == row.ssd_written_bytes == 0
        elif row.policy == "opt":
            above, both = (simulate_clairvoyant(ARRIVALS, size).hit_rate for size in (50, 450))
            assert (row.hit_rate, row.ssd_hit_rate) == pytest.approx((both, both - above))
        else:
            tiers = simulate_tiered(ARRIVALS, row.policy, 50, 400)
            asked = sum(len(ids) for _, ids in ARRIVALS)
            assert row.ssd_hit_rate == pytest.approx(sum(tiers.ssd) / asked)
            assert row.ssd_written_bytes == tiers.written * SIZES.slot_bytes["raw"]
            assert row.hit_rate == pytest.approx((sum(tiers.dram) + sum(tiers.ssd)) / asked)


def test_processes_give_what_one_gives() -> None:
    workload = Workload(ARRIVALS * 1)
    runs = [
        Run(policy, size, below, rate)
        for policy in ("clock", "opt")
        for size in (50, 300)
        for below, rate in ((0, 1.0), (0, 0.5))
    ]
    told: list[int] = []
    alone = carry_out(workload, runs, told.append)
    assert told == sorted(told)
    assert told[-1] == len(runs) * len(ARRIVALS)
    from kvstore.cli.tune import runs as module

    before = module._ALONE_BELOW
    module._ALONE_BELOW = 0
    try:
        assert carry_out(workload, runs, told.append) == alone
    finally:
        module._ALONE_BELOW = before


def test_nothing_is_simulated_where_counting_will_do() -> None:
    workload = Workload(ARRIVALS)
    planned_runs = planned(workload, ["lru", "clock", "opt"], [(100, 0), (10**6, 0)], exact=True)
    assert set(planned_runs) == {("clock", 100, 0), ("opt", 100, 0)}
    tiered = planned(workload, ["lru", "opt"], [(100, 400)], exact=True)
    assert set(tiered) == {("lru", 100, 400), ("opt", 500, 0), ("opt", 100, 0)}


def test_samples_are_large_enough_and_small_traces_are_simulated_whole() -> None:
    small = Workload(ARRIVALS)
    assert sampling_rate(small, 1000, exact=False) == 1.0
    large = Workload([Arrival(at, tuple(range(100 * at, 100 * at + 100))) for at in range(20_000)])
    assert sampling_rate(large, 100_000, exact=False) == 1 / 32
    assert sampling_rate(large, 1000, exact=False) == 1 / 8
    assert sampling_rate(large, 150, exact=False) == 1.0
    assert sampling_rate(large, 100_000, exact=True) == 1.0


def test_estimated_time_adds_what_is_missing_to_what_is_loaded() -> None:
    sizes = BlockSizes("test", 1_000_000, {"raw": 1_000_000, "kivi4": 250_000})
    costs = CostModel(1000.0, 1.0, 0.1, {"kivi4": 2.0}, sizes, 100, 2000.0, 20.0)
    assert costs.first_token_s("raw", 0.0) == pytest.approx(2.0)
    # Half of 20 blocks of 0.1 s each are loaded in 1 ms each.
    assert costs.first_token_s("raw", 0.5) == pytest.approx(1.0 + 10 * 0.001)
    assert costs.first_token_s("kivi4", 0.0, 0.5) == pytest.approx(1.0 + 10 * 0.0025)
    assert costs.first_token_s("kivi4", 0.5) == pytest.approx(1.0 + 10 * 0.0005)
    slow = CostModel(1000.0, 1.0, 0.001, {}, sizes, 100, 2000.0, 20.0)
    assert not slow.ssd_pays("raw")
    assert slow.first_token_s("raw", 0.0, 0.5) == pytest.approx(2.0)


def test_sizes_are_those_of_slots() -> None:
    sizes = model_sizes("llama-3.1-8b", 64, ["kivi4", "lossless"])
    assert sizes.block_bytes == 64 * 131072
    assert sizes.slot_bytes["raw"] == 64 * 131072 + 4096
    assert sizes.slot_bytes["raw"] / sizes.slot_bytes["kivi4"] == pytest.approx(16 / 4.5, rel=0.01)
    assert 1.2 < sizes.slot_bytes["raw"] / sizes.slot_bytes["lossless"] < 1.4


def test_recommendation_says_what_each_step_would_give(trace: Path) -> None:
    found = report(trace, codecs=["raw", "kivi4"], ssd=[Capacity(), Capacity(400)], have=Capacity(200))
    advice = found.recommendation
    assert advice is not None
    assert advice.capacity_bytes == 200 * SIZES.slot_bytes["raw"]
    said = " ".join(advice.reasons)
    for part in ("LRU then hits", "Twice the DRAM", "kivi4 in the same bytes", "An SSD of", "It is lossy"):
        assert part in said
    assert "--have" not in said
    assert advice.settings[0] == "[dram]"
    chosen = next(
        row
        for row in found.rows
        if (row.policy, row.codec, row.capacity_bytes, row.ssd_bytes)
        == (advice.policy, advice.codec, advice.capacity_bytes, advice.ssd_bytes)
    )
    fastest = min(
        row.first_token_s for row in found.rows if row.capacity_bytes == advice.capacity_bytes and row.policy != "opt"
    )
    assert chosen.first_token_s <= fastest * 1.01


def test_bound_is_never_recommended_and_lru_is_where_nothing_beats_it(trace: Path) -> None:
    found = report(trace, policies=["opt", "fifo", "lru"], have=Capacity(100)).recommendation
    assert found is not None
    assert found.policy == "lru"


def test_policy_that_only_the_simulator_has_is_not_recommended(trace: Path) -> None:
    found = report(trace, policies=["lfu", "clock", "lru"], have=Capacity(100)).recommendation
    assert found is not None
    assert found.policy in POLICIES
    none = report(trace, policies=["lfu", "opt"], have=Capacity(100))
    assert none.recommendation is None
    assert "Nothing to recommend" in printed(none)


def test_only_the_bound_gives_no_recommendation_but_an_error(trace: Path) -> None:
    with pytest.raises(InvalidArgument, match="opt is a bound"):
        report(trace, policies=["opt"])


def test_tables_fit_80_columns(trace: Path) -> None:
    policies = [*SIMULATED, "opt"]
    text = printed(report(trace, policies=policies, codecs=["raw", "kivi4"], ssd=[Capacity(), Capacity(90)]))
    assert max(map(len, text.splitlines())) <= 80
    assert "…" not in text
    for policy in policies:
        assert policy in text


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1000,5k", [Capacity(1000), Capacity(5000)]),
        ("1.5k, 2M ,1000,1_000", [Capacity(1500), Capacity(2_000_000), Capacity(1000)]),
        ("64GiB,100MB", [Capacity(size_bytes=64 << 30), Capacity(size_bytes=10**8)]),
    ],
)
def test_capacities_are_blocks_or_sizes(text: str, expected: list[Capacity]) -> None:
    assert parse_capacities(text) == expected


def test_zero_is_a_capacity_of_an_ssd_only() -> None:
    assert parse_capacities("0,200GiB", "--ssd", zero=True) == [Capacity(), Capacity(size_bytes=200 << 30)]
    with pytest.raises(InvalidArgument, match="--capacities: '0' must be more than 0"):
        parse_capacities("0")


@pytest.mark.parametrize("text", ["", "1,,2", "-5", "1.5", "0.0001k", "5x", "12 parsecs", "k", "1e3", "9" * 30, "nan"])
def test_wrong_capacities_are_refused(text: str) -> None:
    with pytest.raises(InvalidArgument, match="--capacities: "):
        parse_capacities(text)


def test_unknown_names_are_refused_with_those_there_are() -> None:
    with pytest.raises(InvalidArgument, match="--policies: unknown policy 'belady'; there are: .*lru.*opt"):
        parse_policies("lru,belady")
    with pytest.raises(InvalidArgument, match="--codecs: unknown codec 'zip'; known are raw"):
        parse_codecs("zip")


def test_default_capacities_are_round_and_below_all_blocks() -> None:
    assert [one.blocks for one in default_capacities(170_899)] == [
        500,
        1000,
        2000,
        5000,
        10_000,
        20_000,
        50_000,
        100_000,
    ]
    assert default_capacities(1) == [Capacity(1)]


def test_times_that_fall_or_stand_still_are_said(trace: Path, tmp_path: Path) -> None:
    assert not report(trace).trace.notes
    lines = trace.read_text().splitlines()
    swapped = tmp_path / "swapped.jsonl"
    swapped.write_text("\n".join([*lines[:-2], lines[-1], lines[-2]]))
    found = report(swapped)
    assert found.trace.notes == ["times fall 1 times: simulated in the file's order, with the latest time so far"]
    assert found.trace.seconds == report(trace).trace.seconds
    still = tmp_path / "still.jsonl"
    still.write_text("\n".join(re.sub(r'"timestamp": ?[0-9]+', '"timestamp": 7', line) for line in lines))
    assert "all requests have one time" in report(still).trace.notes[0]


def test_capacities_around_what_there_is_hold_a_block_and_come_once(trace: Path) -> None:
    assert [one.blocks for one in capacities_around(Capacity(3))] == [1, 3, 6, 12, 24, 48]
    two_and_a_bit = Capacity(size_bytes=SIZES.slot_bytes["raw"] * 2 + 1)
    for have, expected in ((Capacity(1), [1, 2, 4, 8, 16]), (two_and_a_bit, [1, 2, 4, 8, 16, 32])):
        found = report(trace, have=have, capacities=None, policies=["lru"])
        assert [row.capacity_blocks for row in found.rows] == expected
        assert found.recommendation is not None
        assert "for 1 block " in found.recommendation.reasons[0] or have is two_and_a_bit


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        (["--capacities", "1KiB"], "--capacities: 1.0 KiB cannot hold a block: one takes "),
        (["--model", "none-such"], "no such file"),
        (["--model", "llama-3.1-8b", "--block-bytes", "1MiB"], "give one of them"),
        (["--block-bytes", "many"], "--block-bytes: "),
        (["--prefill-tokens-per-s", "0"], "--prefill-tokens-per-s: a rate is a number above 0"),
        (["--ssd-gb-per-s", "nan"], "--ssd-gb-per-s"),
        (["--have", "1,2"], "--have: give one"),
        (["--have", "1B"], "--have: 1 B cannot hold a block: one takes "),
        (["--block-tokens", "700"], "multiple"),
        (["--block-tokens", "51200"], "has a full block"),
    ],
)
def test_wrong_arguments_are_refused(trace: Path, arguments: list[str], what: str) -> None:
    result = CliRunner().invoke(app, ["tune", str(trace), *arguments])
    assert isinstance(result.exception, InvalidArgument)
    assert what in str(result.exception)


def test_error_is_one_line_and_status_two(tmp_path: Path) -> None:
    (tmp_path / "bad.jsonl").write_text('{"timestamp": 0}\n')
    done = subprocess.run(
        [sys.executable, "-P", "-m", "kvstore", "tune", str(tmp_path / "bad.jsonl")],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(os.path.abspath(entry) for entry in sys.path)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("kvstore: error: ")
    assert "bad.jsonl:1: " in done.stderr
    assert done.stderr.count("\n") == 1
