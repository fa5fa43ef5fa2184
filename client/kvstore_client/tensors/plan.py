"""What a tensor store stores: namespace, part, codec and block sizes, derived from what an engine knows of itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Final, Literal

from kvstore.errors import InvalidArgument
from kvstore.protocol.keys import check_key
from kvstore.protocol.namespace import Namespace
from kvstore_client.tensors.records import BlockRecords, Readable
from kvstore_kernels.codecs import LOSSY_DTYPES, get_codec
from kvstore_kernels.layout import KVLayout, Layout, MLALayout

__all__ = ["LEAST_BLOCK_TOKENS", "StorePlan", "plan", "store_layout"]

LEAST_BLOCK_TOKENS: Final = 64
"""Tokens of a store block, at least: codecs by channel need 32 or 64, and a header costs less."""

_MULTIPLES: Final = 64
"""Multiples of an engine's block that are tried: more tokens than that no codec asks for."""


@dataclass(frozen=True, slots=True)
class StorePlan:
    """What is stored, and under which name.

    Attributes:
        namespace: all clients that derive an equal one share blocks.
        part: of this shard and group.
        layout: of this group's blocks in this shard.
        engine_blocks: engine blocks of a store block.
        records: of the codec that blocks are stored by.
        exact_records: of the codec for blocks that the other cannot hold.
        readable: records that blocks are loaded from.
    """

    namespace: Namespace
    part: int
    layout: Layout
    engine_blocks: int
    records: BlockRecords
    exact_records: BlockRecords
    readable: Readable

    @property
    def payload_bytes(self) -> tuple[int, ...]:
        """Sizes that are known beforehand: their slots are without waste."""
        kinds = (self.records, self.exact_records)
        return tuple(dict.fromkeys(kind.max_payload_bytes for kind in kinds if kind.fixed))

    def keys_of(self, engine_hashes: Sequence[bytes]) -> list[bytes]:
        """Keys of the store blocks of a prompt, each the hash of its last engine block; a partial block has none.

        Args:
            engine_hashes: of all engine blocks from the prompt's first on, 32 bytes each, chained by the engine.

        Raises:
            InvalidArgument: a hash that is no key.
        """
        step = self.engine_blocks
        return [
            check_key(key, f"hash {step * index + step - 1}")
            for index, key in enumerate(engine_hashes[step - 1 :: step])
        ]


def store_layout(engine: Layout, codec: str = "raw", *, at_least: int = LEAST_BLOCK_TOKENS) -> Layout:
    """The layout of store blocks for an engine's blocks: the fewest whole ones that a codec takes.

    Args:
        engine: of the engine's blocks.
        codec: by name. KV that the engine quantised is stored as it is, whatever the codec.
        at_least: tokens of a store block.

    Raises:
        InvalidArgument: an unknown codec, or one that takes no multiple of the engine's blocks; says why.
    """
    if not isinstance(engine, KVLayout | MLALayout):
        raise InvalidArgument(f"engine must be a KVLayout or an MLALayout, got {type(engine).__name__}")
    step = engine.block_tokens
    first = -(-_count(at_least, "at_least") // step)
    problem: ValueError | None = None
    for blocks in range(first, first + _MULTIPLES):
        layout = replace(engine, block_tokens=blocks * step)
        try:
            get_codec(_stored_by(codec, layout)).check(layout)
        except ValueError as error:
            problem = error
            continue
        return layout
    raise InvalidArgument(str(problem))


def plan(
    layout: Layout | Sequence[Layout],
    codec: str,
    *,
    exact_codec: str,
    engine_block_tokens: int | None,
    at_least: int,
    shard: int,
    shards: int,
    group: int,
    groups: int,
    fidelity: Literal["any", "exact"],
    **description: Any,
) -> StorePlan:
    """Derive what ``TensorStore`` stores; see there for the arguments.

    Raises:
        InvalidArgument: they do not fit each other; says which, and what to do.
    """
    layouts = _layouts(layout, groups)
    if not 0 <= _count(group, "group", 0) < len(layouts):
        raise InvalidArgument(
            f"group must be one of the {len(layouts)} KV groups, 0 to {len(layouts) - 1}, got {group}"
        )
    if not 0 <= _count(shard, "shard", 0) < _count(shards, "shards"):
        raise InvalidArgument(f"shard must be one of the {shards} shards, 0 to {shards - 1}, got {shard}")
    own = layouts[group]
    if own.block_tokens < at_least:
        raise InvalidArgument(
            f"a store block has at least {at_least} tokens, this layout {own.block_tokens}: group engine blocks with "
            "store_layout(), and name engine_block_tokens"
        )
    step = own.block_tokens if engine_block_tokens is None else _count(engine_block_tokens, "engine_block_tokens")
    if own.block_tokens % step:
        raise InvalidArgument(
            f"blocks of {own.block_tokens} tokens are not whole engine blocks of {step}; store_layout() gives a layout "
            "that is"
        )
    try:
        codec = _stored_by(codec, own)
        records = BlockRecords(get_codec(codec), own)
        wanted = get_codec(exact_codec)
        exact_records = BlockRecords(records.codec if records.codec.exact else wanted, own)
    except ValueError as error:
        raise InvalidArgument(str(error)) from None
    if not wanted.exact:
        raise InvalidArgument(f"exact_codec must be exact, {exact_codec!r} is not: use raw or lossless")
    namespace = Namespace(
        layout=" + ".join(each.text for each in layouts),
        dtype=own.dtype,
        block_tokens=own.block_tokens,
        parts=shards * len(layouts),
        codec=codec,
        fidelity=fidelity,
        **description,
    )
    return StorePlan(
        namespace=namespace,
        part=shard * len(layouts) + group,
        layout=own,
        engine_blocks=own.block_tokens // step,
        records=records,
        exact_records=exact_records,
        readable=Readable(records, fidelity == "exact"),
    )


def _stored_by(codec: str, layout: Layout) -> str:
    """The codec that a layout's blocks are stored by where ``codec`` is asked for.

    What the engine quantised itself is stored as it is: quantised again it would only be worse.

    Raises:
        ValueError: no codec has that name.
    """
    return "raw" if layout.dtype not in LOSSY_DTYPES and not get_codec(codec).exact else codec


def _layouts(layout: Layout | Sequence[Layout], groups: int) -> tuple[Layout, ...]:
    """The layout of each KV group."""
    one = isinstance(layout, (KVLayout, MLALayout))
    several = layout if isinstance(layout, Sequence) else ()
    layouts: tuple[Any, ...] = (layout,) * _count(groups, "groups") if one else tuple(several)
    if not layouts or not all(isinstance(each, (KVLayout, MLALayout)) for each in layouts):
        raise InvalidArgument(f"layout must be a KVLayout, an MLALayout or one for each KV group, got {layout!r}")
    if not one and groups not in (1, len(layouts)):
        raise InvalidArgument(f"there are {len(layouts)} layouts for {groups} KV groups")
    if len({(each.dtype, each.block_tokens) for each in layouts}) > 1:
        raise InvalidArgument(
            "all KV groups must have blocks of equally many tokens and one dtype; stores of their own can differ"
        )
    return layouts


def _count(value: object, name: str, least: int = 1) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise InvalidArgument(f"{name} must be a whole number of at least {least}, got {value!r}")
    return value
