"""What ``kvstore tune`` finds out: plain objects, as ``--json`` prints them."""

from __future__ import annotations

import msgspec

from kvstore.cli.bench.machine import MachineFacts

__all__ = ["Applied", "Assumptions", "Point", "Recommendation", "TraceFacts", "TuneReport", "TuneRow"]


class TraceFacts(msgspec.Struct, frozen=True, kw_only=True):
    """What was asked for.

    Attributes:
        name: of the file.
        format: of the file: "mooncake", "bailian" or "recording".
        requests: how many.
        seconds: from the first to the last one.
        block_tokens: tokens a block.
        input_tokens: of a request, mean.
        asked_blocks, distinct_blocks: full blocks of all requests, and different ones among them.
        hot_blocks: that are in one request of a hundred or more.
        hit_rate, hit_rate_second_half: of a cache that nothing leaves.
        notes: for people.
    """

    name: str
    format: str
    requests: int
    seconds: float
    block_tokens: int
    input_tokens: float
    asked_blocks: int
    distinct_blocks: int
    hot_blocks: int
    hit_rate: float
    hit_rate_second_half: float
    notes: list[str]


class Assumptions(msgspec.Struct, frozen=True, kw_only=True):
    """What estimated times rest on.

    Attributes:
        block: where the sizes come from.
        block_bytes: unquantised.
        slot_bytes: of a block, by codec.
        prefill_tokens_per_s: of the engine.
        dram_gb_per_s, ssd_gb_per_s: of loads.
        decode_gb_per_s: by codec, of what comes out.
    """

    block: str
    block_bytes: int
    slot_bytes: dict[str, int]
    prefill_tokens_per_s: float
    dram_gb_per_s: float
    ssd_gb_per_s: float
    decode_gb_per_s: dict[str, float]


class TuneRow(msgspec.Struct, frozen=True, kw_only=True):
    """One policy, codec and capacity.

    Attributes:
        policy: its name; "opt" is the clairvoyant bound.
        codec: of what is stored.
        capacity_blocks: blocks that fit in DRAM with this codec.
        capacity_bytes: of DRAM.
        ssd_blocks, ssd_bytes: the same of the SSD, 0 without one.
        hit_rate, hit_rate_second_half: 0 to 1, in both tiers, of all requests and of the second half of them.
        ssd_hit_rate: the part of ``hit_rate`` that the SSD serves.
        ssd_written_bytes: written to the SSD over the whole trace; 0 for the bound, which is no policy.
        first_token_s: estimated seconds to the first token, mean.
        rate: share of the blocks that were simulated; 1: exact.
    """

    policy: str
    codec: str
    capacity_blocks: int
    capacity_bytes: int
    ssd_blocks: int
    ssd_bytes: int
    hit_rate: float
    hit_rate_second_half: float
    ssd_hit_rate: float
    ssd_written_bytes: int
    first_token_s: float
    rate: float


class Point(msgspec.Struct, frozen=True, kw_only=True):
    """LRU at one more capacity, for curves."""

    capacity_blocks: int
    hit_rate: float
    hit_rate_second_half: float


class Recommendation(msgspec.Struct, frozen=True, kw_only=True):
    """What to set, and why.

    Attributes:
        policy, codec, capacity_blocks, capacity_bytes, ssd_bytes: as in a row.
        hit_rate, first_token_s: as in that row.
        reasons: sentences.
        settings: lines for the daemon's TOML file.
    """

    policy: str
    codec: str
    capacity_blocks: int
    capacity_bytes: int
    ssd_bytes: int
    hit_rate: float
    first_token_s: float
    reasons: list[str]
    settings: list[str]


class Applied(msgspec.Struct, frozen=True, kw_only=True):
    """What became of the recommendation in a running daemon.

    Attributes:
        policy_before, policy: eviction from DRAM.
        ssd_policy_before, ssd_policy: eviction from the SSD, "" without one.
        not_changed: sentences: what cannot be changed while it runs, and what to set.
    """

    policy_before: str
    policy: str
    ssd_policy_before: str
    ssd_policy: str
    not_changed: list[str]


class TuneReport(msgspec.Struct, frozen=True, kw_only=True):
    """All of it.

    Attributes:
        machine, trace, assumptions: see their types.
        exact: whether all blocks were simulated everywhere.
        seconds: that it took.
        recommendation: None where no policy was simulated that a daemon can run.
        applied: with ``--apply``.
        rows: by SSD, codec, capacity and policy.
        lru_curve: uncompressed, in DRAM alone; exact where ``lru_rate`` is 1.
        lru_rate: share of the blocks that the curve rests on.
    """

    machine: MachineFacts
    trace: TraceFacts
    assumptions: Assumptions
    exact: bool
    seconds: float
    rows: list[TuneRow]
    lru_curve: list[Point]
    lru_rate: float
    recommendation: Recommendation | None
    applied: Applied | None = None
