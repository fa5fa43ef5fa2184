"""What ``kvstore layout`` finds out about a model's KV, and how it is shown.

Sizes are of whole blocks. A codec whose size depends on the data has no bytes here; ``kvstore codecs`` shows what was
measured.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import msgspec
from rich.console import Group, RenderableType
from rich.text import Text

from kvstore.cli import render
from kvstore.format.constants import RECORD_HEADER_BYTES
from kvstore.format.record import padded_bytes
from kvstore_kernels.codecs import Codec
from kvstore_kernels.layout import Layout, MLALayout
from kvstore_kernels.models import LayerGroup, ModelLayout, transfer_s

__all__ = ["LINKS", "CodecSizes", "GroupSizes", "LayoutReport", "Link", "layout_report", "layout_table"]


class Link(msgspec.Struct, frozen=True, kw_only=True):
    """A way for bytes.

    Attributes:
        name: for people.
        gb_per_s: nominal rate, 10^9 bytes a second in one direction.
    """

    name: str
    gb_per_s: float


LINKS: Final = (
    Link(name="PCIe 4 x16", gb_per_s=31.5),
    Link(name="PCIe 5 x16", gb_per_s=63.0),
    Link(name="NVMe", gb_per_s=7.0),
    Link(name="100 GbE", gb_per_s=12.5),
    Link(name="400 GbE", gb_per_s=50.0),
)
"""Nominal rates: PCIe after its line code (128b/130b), a fast PCIe 4 x4 drive, Ethernet's bits by eight."""


class GroupSizes(msgspec.Struct, frozen=True, kw_only=True):
    """Layers that are stored together.

    Attributes:
        name: of the group.
        layers: their indices.
        reach: how much of a prefix they need: ``all``, ``window(N)`` or ``last``.
        layout: canonical text, as in a namespace.
        shape: of a block.
        formula: of the bytes a token.
        token_bytes, block_bytes: unquantised.
    """

    name: str
    layers: tuple[int, ...]
    reach: str
    layout: str
    shape: tuple[int, ...]
    formula: str
    token_bytes: int
    block_bytes: int


class CodecSizes(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A codec on this model; sizes are absent where they depend on the data.

    Attributes:
        codec: its name.
        bits_per_value: with all parameters.
        payload_bytes: of a block in all groups.
        slot_bytes: the same with record headers, in slots of whole pages.
        prefix_bytes: payloads that a prefix of ``tokens`` takes.
        transfer_s: of those over each link.
        problem: why the codec cannot store this model.
    """

    codec: str
    bits_per_value: float | None = None
    payload_bytes: int | None = None
    slot_bytes: int | None = None
    prefix_bytes: int | None = None
    transfer_s: dict[str, float] | None = None
    problem: str | None = None


class LayoutReport(msgspec.Struct, frozen=True, kw_only=True):
    """The KV of a model.

    Attributes:
        model: as given.
        dtype: of the KV.
        block_tokens: tokens a block.
        tokens: of the prefix whose bytes and times are given; full blocks of it count.
        token_bytes, block_bytes: in all groups, unquantised.
        groups, codecs, links: see their types.
    """

    model: str
    dtype: str
    block_tokens: int
    tokens: int
    token_bytes: int
    block_bytes: int
    groups: list[GroupSizes]
    codecs: list[CodecSizes]
    links: list[Link]


def layout_report(
    given: str, model: ModelLayout, codecs: Sequence[Codec], links: Sequence[Link], tokens: int
) -> LayoutReport:
    """Work all sizes out.

    Args:
        given: names the model.
        model: its groups.
        codecs: to work them out for.
        links: to work transfer times out for.
        tokens: of a prefix.
    """
    return LayoutReport(
        model=given,
        dtype=model.groups[0].layout.dtype,
        block_tokens=model.block_tokens,
        tokens=tokens,
        token_bytes=model.token_bytes,
        block_bytes=model.block_bytes,
        groups=[_group_sizes(group) for group in model.groups],
        codecs=[_codec_sizes(model, codec, links, tokens) for codec in codecs],
        links=list(links),
    )


def _group_sizes(group: LayerGroup) -> GroupSizes:
    return GroupSizes(
        name=group.name,
        layers=group.layers,
        reach=str(group.reach),
        layout=group.layout.text,
        shape=group.layout.shape,
        formula=_formula(group.layout),
        token_bytes=group.layout.token_bytes,
        block_bytes=group.layout.block_bytes,
    )


def _formula(layout: Layout) -> str:
    if isinstance(layout, MLALayout):
        per_layer = f"({layout.latent_dim} latent + {layout.rotary_dim} rotary)"
    else:
        per_layer = f"2 (K, V) x {layout.num_kv_heads} heads x {layout.head_dim}"
    return f"{layout.num_layers} layers x {per_layer} x {layout.element_bytes} bytes"


def _codec_sizes(model: ModelLayout, codec: Codec, links: Sequence[Link], tokens: int) -> CodecSizes:
    try:
        payload_bytes = model.payload_bytes(codec)
        prefix_bytes = model.prefix_bytes(tokens, codec)
    except ValueError as problem:
        return CodecSizes(codec=codec.name, problem=str(problem))
    if payload_bytes is None or prefix_bytes is None:
        return CodecSizes(codec=codec.name)
    sections = [codec.section_bytes(group.layout) or () for group in model.groups]
    return CodecSizes(
        codec=codec.name,
        bits_per_value=8 * payload_bytes * model.groups[0].layout.element_bytes / model.block_bytes,
        payload_bytes=payload_bytes,
        slot_bytes=sum(padded_bytes(RECORD_HEADER_BYTES + sum(lengths)) for lengths in sections),
        prefix_bytes=prefix_bytes,
        transfer_s={link.name: transfer_s(prefix_bytes, link.gb_per_s) for link in links},
    )


def layout_table(report: LayoutReport) -> RenderableType:
    """All of it, in tables that fit 80 columns."""
    parts: list[RenderableType] = [_groups(report), "", _sizes(report), "", _times(report)]
    problems = [(row.codec, row.problem) for row in report.codecs if row.problem is not None]
    if problems:
        parts += ["", render.facts("Not for this model", problems)]
    return Group(*parts, "", _meanings(report))


def _groups(report: LayoutReport) -> RenderableType:
    made = render.facts(f"KV of {report.model}", [("dtype", report.dtype)])
    for group in report.groups:
        made.add_row(Text(f"group {group.name}", style="dim"), f"{group.formula} = {render.count(group.token_bytes)}")
        if group.reach != "all":
            made.add_row("", f"a prefix needs its newest blocks only: {group.reach}")
    made.add_row(
        Text("a token", style="dim"), f"{render.size(report.token_bytes)} ({render.count(report.token_bytes)} bytes)"
    )
    made.add_row(
        Text("a block", style="dim"), f"{render.size(report.block_bytes)} ({render.count(report.block_tokens)} tokens)"
    )
    return made


def _sizes(report: LayoutReport) -> RenderableType:
    made = render.table("Stored", ["codec", "bits", "ratio", "a token", "a block", "its slot", "prefix"])
    for row in report.codecs:
        if row.payload_bytes is None or row.slot_bytes is None or row.prefix_bytes is None:
            made.add_row(row.codec, *[render.NOTHING] * 6)
            continue
        made.add_row(
            row.codec,
            f"{row.bits_per_value:.3f}",
            f"{report.block_bytes / row.payload_bytes:.2f}",
            render.size(row.payload_bytes / report.block_tokens),
            render.size(row.payload_bytes),
            render.size(row.slot_bytes),
            render.size(row.prefix_bytes),
        )
    return made


def _times(report: LayoutReport) -> RenderableType:
    made = render.table("Transfer times", ["codec", *(link.name for link in report.links)])
    for row in report.codecs:
        if row.transfer_s is not None:
            made.add_row(row.codec, *(render.latency(row.transfer_s[link.name]) for link in report.links))
    return made


def _meanings(report: LayoutReport) -> RenderableType:
    links = ", ".join(f"{link.name} {link.gb_per_s:g}" for link in report.links)
    meanings = [
        ("bits", "a value, with all parameters of the codec"),
        ("its slot", f"a block with its header of {RECORD_HEADER_BYTES} bytes, in whole pages"),
        ("prefix", f"full blocks of {render.count(report.tokens)} tokens; the transfer times are of these"),
        ("links", f"nominal rates in 10^9 bytes a second: {links}"),
    ]
    varying = [row.codec for row in report.codecs if row.payload_bytes is None and row.problem is None]
    if varying:
        meanings.append(("varying", f"{', '.join(varying)}: by the data; 'kvstore codecs' shows what was measured"))
    return render.facts("", meanings)
