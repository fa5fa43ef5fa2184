"""Names of wire types as ``docs/protocol.md`` uses them, read off the message types."""

from __future__ import annotations

import msgspec
import msgspec.inspect as mi

from kvstore.protocol.version import MAX_IDENT_CHARACTERS, MAX_KEYS_PER_REQUEST


def type_text(kind: mi.Type) -> str:
    """The page's name of a type."""
    match kind:
        case mi.BoolType():
            return "bool"
        case mi.IntType(ge=0, le=None):
            return "u64"
        case mi.IntType():
            return "i64"
        case mi.FloatType():
            return "f64"
        case mi.StrType(max_length=longest):
            if longest not in (None, MAX_IDENT_CHARACTERS):
                raise NotImplementedError(f"the page has no name for text of {longest} characters")
            return "text" if longest is None else "ident"
        case mi.LiteralType(values=values) if all(isinstance(value, str) for value in values):
            return "text"
        case mi.BytesType(max_length=longest):
            if longest not in (None, 32 * MAX_KEYS_PER_REQUEST):
                raise NotImplementedError(f"the page has no name for {longest} bytes")
            return "bytes" if longest is None else "keys"
        case mi.EnumType(cls=enum):
            return enum.__name__
        case mi.VarTupleType(item_type=item) | mi.ListType(item_type=item):
            return f"list of {type_text(item)}"
        case mi.TupleType(item_types=items):
            return f"({', '.join(map(type_text, items))})"
        case mi.DictType(key_type=key, value_type=value):
            return f"map of {type_text(key)} to {type_text(value)}"
        case mi.StructType(cls=struct):
            return struct.__name__
        case mi.UnionType(types=(one, mi.NoneType())):
            return f"{type_text(one)} or nil"
    raise NotImplementedError(f"the page has no name for {kind}")


def default_text(field: mi.Field) -> str:
    """The page's text of a field's default, empty where the field must be there."""
    if field.required:
        return ""
    value = field.default
    if isinstance(value, tuple):
        return str(list(value))
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int):
        return str(int(value))
    return f'b"{value.decode()}"' if isinstance(value, bytes) else f'"{value}"'


def fields(struct: type[msgspec.Struct]) -> tuple[mi.Field, ...]:
    """A struct's fields in wire order."""
    described = mi.type_info(struct)
    assert isinstance(described, mi.StructType)
    return described.fields
