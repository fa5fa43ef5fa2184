"""Where an engine keeps its KV: addresses and strides of pages, as the kernels read and write them.

Covers pages in tensors of any strides, one tensor a layer or one for all, of numpy or torch, on the CPU or a GPU. Does
not cover which pages hold which block: callers say so with each call. Nothing is copied here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from kvstore_kernels.layout import AXES, MLA_AXES, KVLayout, Layout, MLALayout

__all__ = ["PagedKV", "PagedPlanes"]

Device = Literal["cpu", "cuda"]

_STAND_INS: Final = {"bfloat16": ("uint16", "int16"), "float8_e4m3fn": ("uint8",), "float8_e5m2": ("uint8",)}
"""What numpy arrays have instead of dtypes that numpy lacks."""


@dataclass(frozen=True, slots=True)
class PagedPlanes:
    """The planes of one section.

    A channel of a token of a page lies at ``bases[layer] + page * page_stride + token * token_stride + head *
    head_stride + channel * element_stride``.

    Attributes:
        bases: int64 ``[num_layers]``, addresses.
        page_stride: bytes from a page to the next; all strides may be negative.
        token_stride: bytes from a token of a page to the next.
        head_stride: bytes from a plane of a layer to the next.
        element_stride: bytes from a channel to the next; the element's size where they lie side by side.
    """

    bases: npt.NDArray[np.int64]
    page_stride: int
    token_stride: int
    head_stride: int
    element_stride: int


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class PagedKV:
    """KV in pages of ``page_tokens`` tokens; the pages of a block are given with each call.

    Each is equal only to itself. Backends keep what they worked out about it as long as it lives, so an engine's
    should be made once.

    Attributes:
        layout: of the blocks.
        page_tokens: tokens a page; divides the block's.
        num_pages: pages that there are.
        sections: one for each of ``layout.planes``.
        device: where the addresses are valid.
        owner: what the memory belongs to; kept as long as this is.
    """

    layout: Layout
    page_tokens: int
    num_pages: int
    sections: tuple[PagedPlanes, ...]
    device: Device
    owner: object

    def __post_init__(self) -> None:
        if self.page_tokens < 1 or self.layout.block_tokens % self.page_tokens:
            raise ValueError(
                f"blocks of {self.layout.block_tokens} tokens are not whole pages of {self.page_tokens}: "
                "use block_tokens that are a multiple of the page's"
            )

    @property
    def block_pages(self) -> int:
        """Pages of a block."""
        return self.layout.block_tokens // self.page_tokens

    @classmethod
    def from_tensor(cls, layout: Layout, tensor: Any) -> PagedKV:
        """Blocks side by side in one tensor; page n is block n.

        Args:
            layout: of the blocks.
            tensor: ``[num_layers, 2, tokens, num_kv_heads, head_dim]``, or ``[num_layers, tokens, latent_dim +
                rotary_dim]`` of latent attention; any strides; tokens are a multiple of a block's.

        Raises:
            ValueError: a wrong shape or dtype.
        """
        _check_layout(layout)
        array = _describe(tensor, layout.dtype)
        token_axis = (MLA_AXES if isinstance(layout, MLALayout) else AXES).index("token")
        expected = list(layout.shape)
        if len(array.shape) == len(expected):
            expected[token_axis] = array.shape[token_axis]
        if list(array.shape) != expected or expected[token_axis] % layout.block_tokens:
            raise ValueError(
                f"expected shape {_with_tokens(layout, token_axis)} with a multiple of {layout.block_tokens} tokens, "
                f"got {list(array.shape)}"
            )
        bases = array.address + np.arange(layout.num_layers, dtype=np.int64) * array.strides[0]
        token = array.strides[token_axis]
        page = token * layout.block_tokens
        if isinstance(layout, MLALayout):
            sections = _latent_sections(layout, bases, page, token, array.strides[2])
        else:
            kv, head, element = array.strides[1], array.strides[3], array.strides[4]
            sections = tuple(PagedPlanes(bases + i * kv, page, token, head, element) for i in (0, 1))
        pages = array.shape[token_axis] // layout.block_tokens
        return cls(layout, layout.block_tokens, pages, sections, array.device, tensor)

    @classmethod
    def from_layers(cls, layout: Layout, layers: Sequence[Any], axes: str) -> PagedKV:
        """An engine's tensors, one a layer.

        Args:
            layout: of the blocks.
            layers: tensors of one shape and one set of strides; pairs of keys and values where ``axes`` have no
                ``kv``.
            axes: names of a tensor's axes, in order: ``"kv page token head dim"`` in any order, for example
                ``"page kv token head dim"`` or ``"kv page head token dim"``; without ``kv`` where keys and values are
                tensors of their own; ``"page token dim"`` for latent attention. Without ``token`` a page is one token.

        Raises:
            ValueError: wrong axes, a wrong shape or dtype, or tensors that differ in strides.
        """
        _check_layout(layout)
        if not isinstance(axes, str):
            raise ValueError(f"axes must be a text such as 'kv page token head dim', got {axes!r}")
        names = axes.split()
        latent = isinstance(layout, MLALayout)
        needed = {"page", "dim"} if latent else {"page", "head", "dim"}
        allowed = needed | ({"token"} if latent else {"token", "kv"})
        if len(set(names)) != len(names) or not needed <= set(names) <= allowed:
            raise ValueError(
                f"axes must be {' '.join(name for name in _ORDER if name in allowed)} in some order, each at most once "
                f"({' and '.join(name for name in _ORDER if name in allowed - needed)} may be left out), got {axes!r}"
            )
        layers = _layers(layout, layers)
        pairs = not latent and "kv" not in names
        if pairs and not all(isinstance(layer, tuple | list) and len(layer) == 2 for layer in layers):
            raise ValueError(
                "without the axis kv each layer must be a pair of keys and values; tensors of both need the axis kv"
            )
        tensors = [tensor for layer in layers for tensor in (layer if pairs else (layer,))]
        arrays = [_describe(tensor, layout.dtype) for tensor in tensors]
        first = arrays[0]
        if len(first.shape) != len(names):
            raise ValueError(f"axes {axes!r} do not fit the shape {list(first.shape)}")
        _check_alike(arrays)
        size = dict(zip(names, first.shape, strict=True))
        stride = dict(zip(names, first.strides, strict=True))
        wanted = {"dim": layout.shape[-1]}
        if isinstance(layout, KVLayout):
            wanted |= {"head": layout.num_kv_heads, "kv": 2}
        for name, expected in wanted.items():
            if size.get(name, expected) != expected:
                raise ValueError(f"axis {name} must be {expected}, got {size[name]} in shape {list(first.shape)}")
        page, token = stride["page"], stride.get("token", 0)
        bases = np.array([array.address for array in arrays], np.int64)
        if isinstance(layout, MLALayout):
            sections = _latent_sections(layout, bases, page, token, stride["dim"])
        else:
            of_kv = (bases[0::2], bases[1::2]) if pairs else (bases, bases + stride["kv"])
            sections = tuple(PagedPlanes(each, page, token, stride["head"], stride["dim"]) for each in of_kv)
        return cls(layout, size.get("token", 1), size["page"], sections, first.device, tuple(tensors))

    @classmethod
    def from_vllm_cpu(cls, layout: KVLayout, layers: Sequence[Any]) -> PagedKV:
        """Tensors of vLLM's CPU backend: keys of a page and head transposed ``[D, N]``, then its values ``[N, D]``.

        Args:
            layout: of the blocks.
            layers: tensors ``[num_pages, num_kv_heads, page_tokens, 2 * head_dim]``, contiguous in the last two axes.

        Raises:
            ValueError: a wrong shape, dtype or strides.
        """
        _check_layout(layout)
        if isinstance(layout, MLALayout):
            raise ValueError("vLLM's CPU backend keeps latents as any tensor: use from_layers")
        layers = _layers(layout, layers)
        arrays = [_describe(tensor, layout.dtype) for tensor in layers]
        first, element = arrays[0], layout.element_bytes
        if len(first.shape) != 4 or first.shape[1] != layout.num_kv_heads or first.shape[3] != 2 * layout.head_dim:
            raise ValueError(
                f"expected shape [pages, {layout.num_kv_heads}, page tokens, {2 * layout.head_dim}], "
                f"got {list(first.shape)}"
            )
        pages, _, tokens, _ = first.shape
        if first.strides[2:] != (2 * layout.head_dim * element, element):
            raise ValueError(f"the last two axes must be contiguous, got strides of {first.strides} bytes")
        _check_alike(arrays)
        bases = np.array([array.address for array in arrays], np.int64)
        page, head = first.strides[:2]
        keys = PagedPlanes(bases, page, element, head, tokens * element)
        values = PagedPlanes(bases + tokens * layout.head_dim * element, page, layout.head_dim * element, head, element)
        return cls(layout, tokens, pages, (keys, values), first.device, tuple(layers))


_ORDER: Final = ("kv", "page", "token", "head", "dim")
"""Names of axes, as messages list them."""


def _check_layout(layout: object) -> None:
    if not isinstance(layout, KVLayout | MLALayout):
        raise ValueError(f"layout must be a KVLayout or an MLALayout, got {type(layout).__name__}")


def _layers(layout: Layout, layers: object) -> Sequence[Any]:
    """One tensor or pair for each layer."""
    if hasattr(layers, "shape") or not isinstance(layers, Sequence):
        raise ValueError(f"layers must be a list of {layout.num_layers} tensors, got {type(layers).__name__}")
    if len(layers) != layout.num_layers:
        raise ValueError(f"expected {layout.num_layers} layers, got {len(layers)}")
    return layers


class _Array(NamedTuple):
    """A tensor, whoever made it; strides in bytes."""

    address: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    device: Device


def _describe(tensor: Any, dtype: str) -> _Array:
    """Address, shape and strides of a numpy array, a torch tensor or another array on a GPU."""
    if hasattr(tensor, "data_ptr"):
        if tensor.is_sparse or tensor.is_neg() or tensor.is_conj():
            raise ValueError("expected a plain tensor, got a sparse one or a view that changes signs: copy it first")
        name, element = str(tensor.dtype).removeprefix("torch."), tensor.element_size()
        strides = tuple(stride * element for stride in tensor.stride())
        address, device = tensor.data_ptr(), tensor.device.type
    elif isinstance(tensor, np.ndarray):
        if not tensor.dtype.isnative or isinstance(tensor, np.ma.MaskedArray):
            raise ValueError(
                f"expected a plain array in this machine's byte order, got {tensor.dtype.str}: copy it first"
            )
        name, strides, address, device = tensor.dtype.name, tensor.strides, tensor.ctypes.data, "cpu"
    elif hasattr(tensor, "__cuda_array_interface__"):
        name, strides, device = tensor.dtype.name, tuple(tensor.strides), "cuda"
        address = tensor.__cuda_array_interface__["data"][0]
    else:
        raise ValueError(f"expected an array of numpy or a tensor of torch, got {type(tensor).__name__}")
    if name != dtype and name not in _STAND_INS.get(dtype, ()):
        raise ValueError(f"expected elements of {dtype}, got {name}")
    if device not in ("cpu", "cuda"):
        raise ValueError(f"expected memory of the CPU or a CUDA device, got {device}")
    return _Array(address, tuple(tensor.shape), strides, device)


def _check_alike(arrays: Sequence[_Array]) -> None:
    for number, array in enumerate(arrays):
        if array[1:] != arrays[0][1:]:
            raise ValueError(
                f"tensor {number} differs from the first in shape, strides or device: {array[1:]}, {arrays[0][1:]}"
            )


def _latent_sections(
    layout: MLALayout, bases: npt.NDArray[np.int64], page: int, token: int, element: int
) -> tuple[PagedPlanes, ...]:
    latent = layout.planes[0]
    return (
        PagedPlanes(bases, page, token, latent.dim * element, element),
        PagedPlanes(bases + layout.latent_dim * element, page, token, 0, element),
    )


def _with_tokens(layout: Layout, token_axis: int) -> str:
    return f"[{', '.join('tokens' if axis == token_axis else str(n) for axis, n in enumerate(layout.shape))}]"
