"""In which namespace an object lies, and as what: decided by its layout alone, so that lookups and loads agree.

A layout is one of three: attention KV that a codec can take; anything else of two or more dimensions, as its bytes; and
flat bytes, which is what is left when the engine serialised a chunk itself.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from dataclasses import dataclass
from hashlib import sha256
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from kvstore.format.constants import CODECS_BY_NAME, EXACT_CODECS
from kvstore.protocol.namespace import Namespace
from kvstore_client.integrations.l2_adapter.settings import AdapterSettings
from kvstore_kernels.codecs import LOSSY_DTYPES, get_codec
from kvstore_kernels.layout import ELEMENT_BYTES, KVLayout, Layout, MLALayout

__all__ = ["PIECE_BYTES", "ObjectLayout", "Place", "Places"]

PIECE_BYTES: Final = 4 << 20
"""Larger objects are stored in parts of so many bytes: any daemon with its default sizes takes those."""

_MOST_PARTS: Final = 4096
_MOST_TEXT: Final = 512
_NUMPY: Final = {"bfloat16": "uint16", "float8_e4m3fn": "uint8", "float8_e5m2": "uint8"}
_FLAT: Final = "flat bytes"

ObjectLayout = tuple[tuple[tuple[int, ...], str], ...]
"""Shape and dtype name of each tensor of an object."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where objects of one model and layout lie.

    Attributes:
        namespace: of objects that are stored as they are.
        object_bytes: of each object; 0 for flat ones, which differ.
        layout: for a codec; None where objects are stored as they are.
        shape: of the object, ``[2, L, T, H, D]``, ``[L, T, D]`` or ``[1, L, T, D]``, where there is a codec.
        reason: why there is none, though one was asked for.
    """

    namespace: Namespace
    object_bytes: int
    layout: Layout | None = None
    shape: tuple[int, ...] = ()
    reason: str = ""

    @property
    def parts(self) -> int:
        """Records of an object."""
        return self.namespace.parts

    def piece(self, part: int) -> slice:
        """Bytes of an object that a part holds."""
        if self.parts == 1:
            return slice(None)
        step = -(-self.object_bytes // self.parts)
        return slice(part * step, min((part + 1) * step, self.object_bytes))

    def tensor(self, data: npt.NDArray[np.uint8]) -> npt.NDArray[Any]:
        """An object's bytes as the codec's layout, without a copy: ``[L, 2, T, H, D]``, or ``[L, T, D]``."""
        assert self.layout is not None
        dtype = self.layout.dtype
        array = data.view(_NUMPY.get(dtype, dtype)).reshape(self.shape)
        if isinstance(self.layout, MLALayout):
            return array.reshape(self.shape[-3:])
        return array.swapaxes(0, 1)


class Places:
    """Finds the place of an object.

    Args:
        settings: of the adapter.
        said: told once about each layout that a codec was asked for and that is stored as it is; and why.
    """

    def __init__(self, settings: AdapterSettings, said: Callable[[str], None]) -> None:
        self._settings = settings
        self._said = said
        self._lock = threading.Lock()
        self._known: dict[tuple[str, ObjectLayout], Place] = {}

    def of(self, model: str, layout: ObjectLayout) -> Place:
        """The place of a model's objects of a layout."""
        structured = bool(layout) and all(len(shape) >= 2 and math.prod(shape) for shape, _ in layout)
        which = (model, layout if structured else ())
        with self._lock:
            place = self._known.get(which)
            if place is not None:
                return place
            place = self._known[which] = self._make(*which)
        if place.reason:
            self._said(f"{model}: chunks of {_text(layout)} are stored as they are: {place.reason}")
        return place

    def known(self, model: str) -> list[Place]:
        """All places of a model so far."""
        with self._lock:
            return [place for (of, _), place in self._known.items() if of == model]

    def _make(self, model: str, layout: ObjectLayout) -> Place:
        settings = self._settings
        description: dict[str, Any] = {
            "name": settings.name,
            "model": _short(model),
            "revision": settings.revision_of(model),
        }
        if not layout:
            return Place(Namespace(layout=_FLAT, **description), 0)
        size = sum(math.prod(shape) * _element_bytes(dtype) for shape, dtype in layout)
        parts = min(-(-size // PIECE_BYTES), _MOST_PARTS)
        dtype = layout[0][1] if len({dtype for _, dtype in layout}) == 1 else ""
        namespace = Namespace(layout=_short(_text(layout)), dtype=dtype, parts=parts, **description)
        if settings.codec == "raw":
            return Place(namespace, size)
        try:
            kv = _kv_layout(layout, settings)
            get_codec(settings.codec).check(kv)
        except ValueError as error:
            return Place(namespace, size, reason=str(error))
        return Place(namespace, size, kv, _split(layout[0][0], kv))


def _kv_layout(layout: ObjectLayout, settings: AdapterSettings) -> Layout:
    """The layout for a codec.

    Raises:
        ValueError: it is not known to be attention KV.
    """
    if len(layout) > 1:
        raise ValueError("they are several tensors")
    shape, dtype = layout[0]
    exact = CODECS_BY_NAME[settings.codec] in EXACT_CODECS
    if dtype not in (ELEMENT_BYTES if exact else LOSSY_DTYPES):
        raise ValueError(f"codec {settings.codec} takes no {dtype}")
    if len(shape) == 4 and shape[0] == 2:
        hidden = shape[3]
        head_dim = settings.head_dim or (hidden if exact else 0)
        if not head_dim:
            raise ValueError("head_dim is not set")
        if hidden % head_dim:
            raise ValueError(f"{hidden} elements a token are no whole number of heads of head_dim {head_dim}")
        return KVLayout(shape[1], hidden // head_dim, head_dim, dtype, shape[2])
    if len(shape) == 3 or (len(shape) == 4 and shape[0] == 1):
        layers, tokens, width = shape[-3:]
        if settings.rotary_dim and settings.rotary_dim < width:
            return MLALayout(layers, width - settings.rotary_dim, settings.rotary_dim, dtype, tokens)
        raise ValueError("rotary_dim, which latent attention needs, is not set, or too large")
    raise ValueError("this is neither [2, layers, tokens, heads * head_dim] nor [layers, tokens, latent + rotary]")


def _split(shape: tuple[int, ...], layout: Layout) -> tuple[int, ...]:
    """The object's shape with its heads apart."""
    if isinstance(layout, MLALayout):
        return shape
    return (*shape[:3], layout.num_kv_heads, layout.head_dim)


def _element_bytes(dtype: str) -> int:
    known = ELEMENT_BYTES.get(dtype)
    if known is not None:
        return known
    try:
        return np.dtype(dtype).itemsize
    except TypeError:
        # float8_e8m0fnu and the like: the size of the object is checked against its bytes where they are used.
        return 1


def _text(layout: ObjectLayout) -> str:
    return " + ".join(f"{'x'.join(map(str, shape))} {dtype}" for shape, dtype in layout)


def _short(text: str) -> str:
    return text if len(text) <= _MOST_TEXT else f"sha256:{sha256(text.encode('utf-8', 'surrogatepass')).hexdigest()}"
