"""Namespaces: what makes equal token sequences have equal KV.

A namespace has a canonical description (JSON, sorted keys, printable ASCII) and, for each generation, a
digest: the sha256 of ``kvstore namespace 1``, a zero byte, the canonical description and the generation as a
little-endian u64. Every record carries that digest.
"""

from __future__ import annotations

import json
from hashlib import sha256
from typing import Any, Final, Literal

import msgspec

from kvstore.errors import InvalidArgument
from kvstore.format.constants import CODEC_FIDELITY, CODECS_BY_NAME, EXACT_CODECS, CodecId

DIGEST_BYTES: Final = 32
MAX_PARTS: Final = 4096
_PREFIX: Final = b"kvstore namespace 1\0"
_MAX_TEXT: Final = 512


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


UNNAMED: Final = "default"
"""Name of a namespace to which nobody gave one."""


class Namespace(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Description of a namespace; two clients share blocks when all fields are equal.

    Attributes:
        name: a label of the user's; the whole description where nothing else is known.
        model: model name or path, as served.
        revision: weights revision (a commit, a checksum). Unknown ("") with a model set makes the SDK warn or
            refuse, by its setting, because blocks of other weights would be taken for right.
        layout: KV layout, for example ``"gqa layers=32 kv_heads=8 head_dim=128"``.
        dtype: dtype of the KV in the engine, for example ``"bfloat16"``.
        block_tokens: tokens a block, 0 where the engine does not say.
        parts: records that make a block complete (tensor-parallel shards x KV groups), 1 to 4096.
        tenant_salt: secret or name that keeps tenants apart.
        codec: the worst codec that a record may be of, by name (``docs/codecs.md``); see ``codecs``.
        fidelity: ``"any"``, or ``"exact"`` where nothing lossy is ever stored or served: neither records of lossy
            codecs nor what was computed on such.
    """

    name: str = UNNAMED
    model: str = ""
    revision: str = ""
    layout: str = ""
    dtype: str = ""
    block_tokens: int = 0
    parts: int = 1
    tenant_salt: bytes = b""
    codec: str = "raw"
    fidelity: Literal["any", "exact"] = "any"

    def __post_init__(self) -> None:
        for field in ("name", "model", "revision", "layout", "dtype", "codec", "fidelity"):
            value = getattr(self, field)
            if not isinstance(value, str) or len(value) > _MAX_TEXT:
                raise InvalidArgument(
                    f"namespace {field} must be text of at most {_MAX_TEXT} characters, got {repr(value)[:80]}"
                )
            if not value.isascii() and any("\ud800" <= character <= "\udfff" for character in value):
                raise InvalidArgument(f"namespace {field} must be valid Unicode, got {repr(value)[:80]}")
        if not self.name:
            raise InvalidArgument("namespace name must not be empty")
        if self.codec not in CODECS_BY_NAME:
            known = ", ".join(CODECS_BY_NAME)
            raise InvalidArgument(f"unknown codec {self.codec!r} in the namespace; there are {known}")
        if self.fidelity not in ("any", "exact"):
            raise InvalidArgument(f"namespace fidelity must be 'any' or 'exact', got {self.fidelity!r}")
        if self.fidelity == "exact" and CODECS_BY_NAME[self.codec] not in EXACT_CODECS:
            exact = ", ".join(sorted(codec.text for codec in EXACT_CODECS))
            raise InvalidArgument(f"an exact namespace cannot store {self.codec!r}, which is lossy; use one of {exact}")
        if not _is_whole(self.parts) or not 1 <= self.parts <= MAX_PARTS:
            raise InvalidArgument(f"namespace parts must be 1 to {MAX_PARTS}, got {self.parts!r}")
        if not _is_whole(self.block_tokens) or not 0 <= self.block_tokens < 1 << 31:
            raise InvalidArgument(f"namespace block_tokens must be 0 (unknown) to 2**31 - 1, got {self.block_tokens!r}")
        if not isinstance(self.tenant_salt, bytes):
            raise InvalidArgument(f"namespace tenant_salt must be bytes, got {type(self.tenant_salt).__name__}")
        if len(self.tenant_salt) > _MAX_TEXT:
            raise InvalidArgument(
                f"namespace tenant_salt must be at most {_MAX_TEXT} bytes, got {len(self.tenant_salt)}"
            )

    @classmethod
    def parse(cls, value: str | Namespace | dict[str, Any]) -> Namespace:
        """A namespace from its name, a dict of options, or itself.

        Raises:
            InvalidArgument: an unknown or impossible option, named.
        """
        if isinstance(value, Namespace):
            return value
        if isinstance(value, str):
            return cls(name=value)
        if not isinstance(value, dict):
            raise InvalidArgument(f"namespace must be a name, a dict or a Namespace, got {type(value).__name__}")
        unknown = sorted(set(value) - set(cls.__struct_fields__), key=str)
        if unknown:
            known = ", ".join(cls.__struct_fields__)
            raise InvalidArgument(f"unknown namespace option {', '.join(map(repr, unknown))}; known are {known}")
        return cls(**value)

    @property
    def codecs(self) -> frozenset[CodecId]:
        """Codecs that a record of this namespace may be of.

        With ``raw`` that one alone: what is read is what was put, byte for byte. With any other codec all that come as
        near to the original as it does or nearer: it may be wrong for a block (a value that is not finite), or too weak
        for the first blocks of a prompt.
        """
        codec = CODECS_BY_NAME[self.codec]
        if codec is CodecId.RAW:
            return frozenset({codec})
        return frozenset(other for other in CodecId if CODEC_FIDELITY[other] >= CODEC_FIDELITY[codec])

    def canonical(self) -> bytes:
        """The description as canonical JSON: every field, sorted, no blanks; the tenant's salt as its sha256.

        Everything outside printable ASCII is escaped as four lower-case hex digits, so that the bytes are the
        same whatever wrote them.
        """
        fields: dict[str, object] = {name: getattr(self, name) for name in self.__struct_fields__}
        fields["tenant_salt"] = sha256(self.tenant_salt).hexdigest() if self.tenant_salt else ""
        return json.dumps(fields, sort_keys=True, separators=(",", ":")).encode("ascii")

    def digest(self, generation: int) -> bytes:
        """32-byte digest of this description in a generation (0 until the first ``invalidate()``)."""
        return namespace_digest(self.canonical(), generation)

    @classmethod
    def from_canonical(cls, canonical: bytes) -> Namespace:
        """A namespace from its canonical description. The tenant's salt is not in it, only its digest: it stays empty.

        Raises:
            InvalidArgument: it is no canonical description.
        """
        try:
            fields = json.loads(canonical)
            del fields["tenant_salt"]
            return cls(**fields)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise InvalidArgument(f"no description of a namespace: {error}") from None


def namespace_digest(canonical: bytes, generation: int) -> bytes:
    """32-byte digest of a canonical description in a generation."""
    return sha256(_PREFIX + canonical + generation.to_bytes(8, "little")).digest()
