"""What the demo found out: the comparison of its processes, and how it is shown."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import msgspec

from kvstore.cli import render
from kvstore.cli.demo_engine import EngineReport
from kvstore.cli.demo_model import MODEL_SHAPES, TRAINED
from kvstore.protocol.statistics import DaemonStats

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table
    from rich.text import Text

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
        codec: by which blocks were stored.
        exact: whether the codec gives every bit back.
        prompt_tokens, block_tokens, seed: as given.
        tokens_identical: all three processes generated the same tokens.
        logits_identical: the first token's logits are the same to the bit with the store and without it.
        speed_up: time to first token of the faster of A and C, which computed everything, divided by that of B.
        stored, loaded, cold: what processes A, B and C did.
        tiers: of the daemon, afterwards.
    """

    model: str
    codec: str
    exact: bool
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

    @property
    def agreement(self) -> tuple[int, int]:
        """How many of B's tokens are those of C, and how many of them before the first that is not."""
        alike = [one == other for one, other in zip(self.loaded.tokens, self.cold.tokens, strict=True)]
        return sum(alike), alike.index(False) if False in alike else len(alike)


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
    """Why the demo failed, None where it did not. Of a lossy codec nobody expects that tokens never change."""
    if report.loaded.matched_tokens == 0:
        return "process B found nothing in the store and computed the whole prompt"
    for name, process in (("B, from the store,", report.loaded), ("A", report.stored)):
        if process is report.loaded and not report.exact:
            continue
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
    weights = "trained" if report.model == TRAINED else "random"
    introduction = render.facts(
        "One prompt, three engine processes, one store",
        [
            (
                "model",
                f"{report.model}, {report.cold.parameters / 1e6:.1f} M {weights} parameters, {report.cold.dtype}",
            ),
            ("attention", f"{shape.layers} layers, {shape.query_heads} heads on {shape.kv_heads} KV heads"),
            (
                "prompt",
                f"{render.count(report.prompt_tokens)} tokens, blocks of {report.block_tokens} "
                f"({render.size(report.cold.block_bytes)} of KV each)",
            ),
            ("codec", f"{report.codec}, {'exact' if report.exact else 'lossy'}"),
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
    made = _foldable(render.table("Comparison", ["", "A: stores", "B: from the store", "C: no store"]))
    made.add_row("tokens matched", *(count(process.matched_tokens) for process in processes))
    made.add_row("prompt tokens computed", *(count(process.computed_tokens) for process in processes))
    made.add_row("KV moved", *(size(process.kv_bytes) for process in processes))
    made.add_row("  as stored", *(size(_moved(process)) for process in processes))
    made.add_row("  saved", *(_saved(process) for process in processes))
    made.add_row("  match", *(latency(process.match_s) for process in processes[:2]), render.NOTHING)
    made.add_row("  store or load", latency(report.stored.store_s), latency(report.loaded.load_s), render.NOTHING)
    made.add_row("time to first token", *(latency(process.first_token_s) for process in processes))
    made.add_row("speed-up", render.NOTHING, Text(f"{report.speed_up:.1f}x", style="bold"), render.NOTHING)
    made.add_row("tokens as C's", *(_alike(process, report.cold) for process in processes[:2]), render.NOTHING)
    made.add_row("  given those before", render.NOTHING, _of(report.loaded.expected, report), render.NOTHING)
    return made


def _foldable(made: Table) -> Table:
    """On a narrow terminal cells take several lines: a figure that is cut off would be another one."""
    for column in made.columns:
        column.no_wrap, column.overflow = False, "fold"
    return made


def _moved(process: EngineReport) -> int:
    return process.stored_bytes + process.loaded_bytes


def _saved(process: EngineReport) -> str:
    """The share of the KV's bytes that the codec made unnecessary."""
    return render.NOTHING if not process.kv_bytes else render.percent(max(0.0, 1 - _moved(process) / process.kv_bytes))


def _alike(process: EngineReport, cold: EngineReport) -> str:
    return f"{sum(map(int.__eq__, process.tokens, cold.tokens))} of {len(cold.tokens)}"


def _of(count: int, report: DemoReport) -> str:
    return f"{count} of {len(report.cold.tokens)}"


def _outcome(report: DemoReport) -> Table:
    from rich.text import Text

    made = _foldable(render.table("Outcome", ["", render.text_column("")], show_header=False))
    made.add_row(Text("tokens identical", style="dim"), _identical(report))
    logits = "identical to the bit" if report.logits_identical else "not identical to the bit"
    made.add_row(Text("first logits", style="dim"), logits)
    made.add_row(Text("generated", style="dim"), _shown(report.loaded.tokens))
    if report.loaded.tokens != report.cold.tokens:
        made.add_row(Text("without the store", style="dim"), _shown(report.cold.tokens))
    return made


def _identical(report: DemoReport) -> Text:
    from rich.text import Text

    generated = f" ({len(report.cold.tokens)} generated by each process)"
    if report.tokens_identical:
        return Text("yes", style="bold green").append(generated, style="dim")
    alike, leading = report.agreement
    if problem_of(report) is not None:
        return Text("NO", style="bold red").append(generated, style="dim")
    return Text(f"{alike} of {len(report.cold.tokens)}", style="bold yellow").append(
        f", the first {leading} in a row; {report.codec} is lossy", style="dim"
    )


def _shown(tokens: list[int]) -> str:
    dots = ["..."] if len(tokens) > _SHOWN_TOKENS else []
    return " ".join([*map(str, tokens[:_SHOWN_TOKENS]), *dots])


def _tiers(tiers: list[TierReport]) -> Table:
    made = _foldable(render.table("Tiers", ["tier", "capacity", "used", "blocks", "hit rate", "blocks hit / asked"]))
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
