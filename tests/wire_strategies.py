"""Hypothesis strategies for everything that crosses the wire, read off the message types themselves."""

from __future__ import annotations

from typing import get_args

import msgspec
import msgspec.inspect as mi
from hypothesis import strategies as st

from kvstore.format.constants import CODECS_BY_NAME
from kvstore.protocol.messages import AnyReply, AnyRequest
from kvstore.protocol.namespace import MAX_PARTS, Namespace

REQUESTS: tuple[type[msgspec.Struct], ...] = get_args(AnyRequest)
REPLIES: tuple[type[msgspec.Struct], ...] = get_args(AnyReply)
MESSAGES = REQUESTS + REPLIES

U64 = (1 << 64) - 1
TEXT = st.text(st.characters(codec="utf-8"), max_size=20)
LINE = st.text(st.characters(codec="utf-8"), max_size=40)

NAMESPACES = st.builds(
    Namespace,
    name=LINE.filter(bool),
    model=LINE,
    revision=LINE,
    layout=LINE,
    dtype=LINE,
    block_tokens=st.integers(0, (1 << 31) - 1),
    parts=st.integers(1, MAX_PARTS),
    tenant_salt=st.binary(max_size=40),
    codec=st.sampled_from(["raw", "lossless", "lossless-zstd"]),
    fidelity=st.sampled_from(["any", "exact"]),
) | st.builds(Namespace, name=LINE.filter(bool), codec=st.sampled_from(sorted(CODECS_BY_NAME)))


def _values(kind: mi.Type) -> st.SearchStrategy[object]:
    match kind:
        case mi.BoolType():
            return st.booleans()
        case mi.IntType(ge=low, le=high):
            return st.integers(-(1 << 63) if low is None else low, U64 if high is None else high)
        case mi.FloatType():
            return st.floats(allow_nan=False)
        case mi.StrType(max_length=longest):
            return TEXT if longest is None else st.text(st.characters(codec="utf-8"), max_size=longest)
        case mi.BytesType():
            return st.binary(max_size=96)
        case mi.EnumType(cls=enum):
            return st.sampled_from(list(enum))
        case mi.VarTupleType(item_type=item, max_length=longest):
            return st.lists(_values(item), max_size=min(longest or 8, 8)).map(tuple)
        case mi.TupleType(item_types=items):
            return st.tuples(*map(_values, items))
        case mi.ListType(item_type=item):
            return st.lists(_values(item), max_size=4)
        case mi.DictType(key_type=key, value_type=value):
            return st.dictionaries(_values(key), _values(value), max_size=4)
        case mi.StructType(cls=struct) if struct is Namespace:
            return NAMESPACES
        case mi.StructType(cls=struct):
            return messages(struct)
        case mi.UnionType(types=kinds):
            return st.one_of(*map(_values, kinds))
        case mi.NoneType():
            return st.none()
    raise NotImplementedError(f"no strategy for {kind}")


def messages(struct: type[msgspec.Struct]) -> st.SearchStrategy[msgspec.Struct]:
    """All values of a struct."""
    described = mi.type_info(struct)
    assert isinstance(described, mi.StructType)
    return st.builds(struct, **{field.name: _values(field.type) for field in described.fields})
