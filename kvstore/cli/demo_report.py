"""What the demo found out: the comparison of its processes, and how it is shown."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import msgspec

from kvstore.cli import render
from kvstore.cli.demo_engine import EngineReport
from kvstore.cli.demo_model import MODEL_SHAPES
from kvstore.protocol.messages import DaemonStats

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

__all__ = ["DemoReport", "TierReport", "problem_of", "tables", "tiers_of"]

_SHOWN_TOKENS: Final = 8


class TierReport(msgspec.Struct, frozen=True, kw_only=True):
    """One tier after the demo.

    Attributes:
        tier: its name.
        capacity_bytes, used_bytes: slots it may have, slots that hold blocks.
        blocks: resident.
        blocks_asked, blocks_hit: by ``match``, since the daemon's start.
    """

    tier: str
    capacity_bytes: int
    used_bytes: int
    blocks: int
    blocks_asked: int
    blocks_hit: int


class DemoReport(msgspec.Struct, frozen=True, kw_only=True):
    """The demo's outcome; what ``--json`` prints.

    Attributes:
        model: name, for example ``llama-small``.
        prompt_tokens, block_tokens, seed: as given.
        tokens_identical: all three processes generated the same tokens.
        logits_identical: the first token's logits are the same to the bit with the store and without it.
        speed_up: time to first token of the faster of A and C, which computed everything, divided by that of B.
        stored, loaded, cold: what processes A, B and C did.
        tiers: of the daemon, afterwards.
    """

    model: str
    prompt_tokens: int
    block_tokens: int
    seed: int
    tokens_identical: bool
    logits_identical: bool
    speed_up: float
    stored: EngineReport
    loaded: EngineReport
    cold: EngineReport
    tiers: list[TierReport]


def tiers_of(stats: DaemonStats) -> list[TierReport]:
    """One entry a tier, nearest first."""
    return [
        TierReport(
            tier="dram",
            capacity_bytes=stats.dram.capacity_bytes,
            used_bytes=stats.dram.resident_bytes,
            blocks=stats.dram.blocks,
            blocks_asked=stats.lookups.match_keys,
            blocks_hit=stats.lookups.match_hits,
        )
    ]


def problem_of(report: DemoReport) -> str | None:
    """Why the demo failed, None where it did not."""
    if report.loaded.matched_tokens == 0:
        return "process B found nothing in the store and computed the whole prompt"
    for name, process in (("B, from the store,", report.loaded), ("A", report.stored)):
        pairs = enumerate(zip(process.tokens, report.cold.tokens, strict=True))
        different = [index for index, (one, other) in pairs if one != other]
        if different:
            at = different[0]
            return (
                f"tokens differ: {len(different)} of {len(process.tokens)}, the first at {at}, where process {name} "
                f"generated {process.tokens[at]} and process C, without the store, {report.cold.tokens[at]}"
            )
    return None


def tables(report: DemoReport) -> RenderableType:
    """The comparison, then the tiers."""
    from rich.console import Group
    from rich.text import Text

    shape = MODEL_SHAPES[report.model.removeprefix("llama-")]
    introduction = render.facts(
        "One prompt, three engine processes, one store",
        [
            (
                "model",
                f"{report.model}, {report.cold.parameters / 1e6:.1f} M parameters, {report.cold.namespace.dtype}, "
                "random weights",
            ),
            ("attention", f"{shape.layers} layers, {shape.query_heads} heads on {shape.kv_heads} KV heads"),
            (
                "prompt",
                f"{render.count(report.prompt_tokens)} tokens, blocks of {report.block_tokens} "
                f"({render.size(report.cold.block_bytes)} of KV each)",
            ),
        ],
    )
    note = Text(
        "Loading the model, connecting and a warm-up on another prompt are outside the\ntimes; hashing the prompt, "
        "matching, loading and the first token are inside.\nThe speed-up is over the faster of A and C, which both "
        "computed all tokens.",
        style="dim",
    )
    return Group("", introduction, "", _comparison(report), "", note, "", _outcome(report), "", _tiers(report.tiers))


def _comparison(report: DemoReport) -> Table:
    from rich.text import Text

    processes = (report.stored, report.loaded, report.cold)
    count, size, latency = render.count, render.size, render.latency
    made = render.table("Comparison", ["", "A: stores", "B: from the store", "C: no store"])
    made.add_row("tokens matched", *(count(process.matched_tokens) for process in processes))
    made.add_row("prompt tokens computed", *(count(process.computed_tokens) for process in processes))
    made.add_row("bytes moved", *(size(process.stored_bytes + process.loaded_bytes) for process in processes))
    made.add_row("  match", *(latency(process.match_s) for process in processes[:2]), render.NOTHING)
    made.add_row("  store or load", latency(report.stored.store_s), latency(report.loaded.load_s), render.NOTHING)
    made.add_row("time to first token", *(latency(process.first_token_s) for process in processes))
    made.add_row("speed-up", render.NOTHING, Text(f"{report.speed_up:.1f}x", style="bold"), render.NOTHING)
    return made


def _outcome(report: DemoReport) -> Table:
    from rich.text import Text

    identical = Text("yes", style="bold green") if report.tokens_identical else Text("NO", style="bold red")
    identical.append(f" ({len(report.cold.tokens)} generated by each process)", style="dim")
    shown = [str(token) for token in report.loaded.tokens[:_SHOWN_TOKENS]]
    dots = ["..."] if len(report.loaded.tokens) > len(shown) else []
    made = render.table("Outcome", ["", render.text_column("")], show_header=False)
    made.add_row(Text("tokens identical", style="dim"), identical)
    logits = "identical to the bit" if report.logits_identical else "not identical to the bit"
    made.add_row(Text("first logits", style="dim"), logits)
    made.add_row(Text("generated", style="dim"), " ".join(shown + dots))
    return made


def _tiers(tiers: list[TierReport]) -> Table:
    made = render.table("Tiers", ["tier", "capacity", "used", "blocks", "hit rate", "blocks hit / asked"])
    for tier in tiers:
        made.add_row(
            tier.tier,
            render.size(tier.capacity_bytes),
            f"{render.size(tier.used_bytes)} ({render.ratio(tier.used_bytes, tier.capacity_bytes)})",
            render.count(tier.blocks),
            render.ratio(tier.blocks_hit, tier.blocks_asked),
            f"{render.count(tier.blocks_hit)} / {render.count(tier.blocks_asked)}",
        )
    return made
