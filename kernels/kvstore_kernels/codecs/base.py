"""What a codec is: its place in the registry, its exact sizes, and its reference implementation.

A codec of the contract (``docs/codecs.md``) either takes the whole block as bytes (``WholeCodec``) or cuts it into
planes and encodes those of each section by a method (``PlanesCodec``, ``method``). Importing this module
loads the standard library only; encoding and decoding load torch.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final, NamedTuple

from kvstore_kernels.codecs import arithmetic
from kvstore_kernels.codecs.method import LOSSY_DTYPES, REGION_BYTES, PlaneMethod, Region
from kvstore_kernels.layout import Layout, Planes, Rule

if TYPE_CHECKING:
    import torch

Buffer = bytes | bytearray | memoryview
"""The bytes of a section."""

EXACT: Final = "exact"
"""Name of the method that stores planes as they are."""

FIDELITY_EXACT: Final = 255


class Encoded(NamedTuple):
    """A block, encoded.

    Attributes:
        sections: their bytes.
        void_groups: groups whose numbers the codec could not hold and that decode to zeros.
    """

    sections: list[bytes]
    void_groups: int


class Codec(ABC):
    """A way to store the KV of one block, as its record names it.

    Attributes:
        name: in settings and on the command line.
        id: in the record header; never given to another codec.
        fidelity: 255 exact, else four times the signal-to-noise ratio in dB on the reference model.
        parameters: text that names everything that the bytes depend on; empty for ``raw``.
    """

    def __init__(self, name: str, id: int, fidelity: int, parameters: str) -> None:
        self.name = name
        self.id = id
        self.fidelity = fidelity
        self.parameters = parameters

    def __repr__(self) -> str:
        return f"<codec {self.name}>"

    @property
    def exact(self) -> bool:
        """Whether decoding gives the block back to the bit."""
        return self.fidelity == FIDELITY_EXACT

    @property
    def digest(self) -> bytes:
        """16 bytes for the record header: sha256 of the parameters, or zeros where there are none."""
        if not self.parameters:
            return bytes(16)
        return hashlib.sha256(self.parameters.encode("ascii")).digest()[:16]

    @property
    @abstractmethod
    def whole(self) -> bool:
        """Whether there is one section for the whole block, instead of one a role."""

    @abstractmethod
    def check(self, layout: Layout) -> None:
        """Whether the codec can store blocks of a layout.

        Raises:
            ValueError: it cannot; says why, and what would do.
        """

    @abstractmethod
    def section_bytes(self, layout: Layout) -> tuple[int, ...] | None:
        """Bytes of each section, or None where they depend on the data."""

    @abstractmethod
    def max_section_bytes(self, layout: Layout) -> tuple[int, ...]:
        """Bytes that each section has at most."""

    @abstractmethod
    def regions(self, planes: Planes, block_tokens: int) -> tuple[Region, ...]:
        """The regions of a section of fixed size.

        Raises:
            ValueError: the codec does not cut blocks into planes, or cannot store these.
        """

    @abstractmethod
    def plane_codec(self, planes: Planes) -> str:
        """Name of the method that encodes these planes, such as ``"int4"``, ``"kivi4k"`` or ``"exact"``.

        Raises:
            ValueError: the codec does not cut blocks into planes.
        """

    def bits_per_value(self, layout: Layout) -> float | None:
        """Bits that a value takes with all parameters, or None where that depends on the data."""
        sections = self.section_bytes(layout)
        return None if sections is None else 8 * sum(sections) * layout.element_bytes / layout.block_bytes

    @abstractmethod
    def encode(self, block: torch.Tensor, layout: Layout) -> Encoded:
        """Encode a block.

        Args:
            block: of the layout's shape and dtype, any strides and device.
            layout: of the block.

        Raises:
            ValueError: the codec cannot store the layout, or the block is not of it.
        """

    @abstractmethod
    def decode(self, sections: Sequence[Buffer], layout: Layout) -> torch.Tensor:
        """Decode a block.

        Returns:
            A new contiguous tensor of the layout's shape and dtype on the CPU.

        Raises:
            ValueError: the codec cannot store the layout, or the sections are not those of a block.
        """


class WholeCodec(Codec):
    """An exact codec with one section for the whole block."""

    @property
    def whole(self) -> bool:
        """Always."""
        return True

    def check(self, layout: Layout) -> None:
        """Takes every layout."""

    def regions(self, planes: Planes, block_tokens: int) -> tuple[Region, ...]:
        """As ``Codec.regions``: always an error."""
        raise ValueError(f"codec {self.name} does not cut blocks into planes; it has one section for the whole block")

    def plane_codec(self, planes: Planes) -> str:
        """As ``Codec.plane_codec``: always an error."""
        raise ValueError(f"codec {self.name} does not cut blocks into planes; it has one section for the whole block")


class PlanesCodec(Codec):
    """A lossy codec: a method by rule, and exact planes as they are."""

    def __init__(self, name: str, id: int, fidelity: int, channel: PlaneMethod, token: PlaneMethod) -> None:
        super().__init__(
            name, id, fidelity, f"{name} version=1 channel=({channel.parameters}) token=({token.parameters})"
        )
        self._methods = {Rule.CHANNEL: channel, Rule.TOKEN: token}

    @property
    def whole(self) -> bool:
        """Never."""
        return False

    def check(self, layout: Layout) -> None:
        """As ``Codec.check``."""
        layout.check_lossy()
        for planes in layout.planes:
            self._check_planes(planes, layout.block_tokens)

    def section_bytes(self, layout: Layout) -> tuple[int, ...]:
        """As ``Codec.section_bytes``; never None."""
        return tuple(
            sum(region.region_bytes for region in self.regions(planes, layout.block_tokens)) for planes in layout.planes
        )

    def max_section_bytes(self, layout: Layout) -> tuple[int, ...]:
        """Exactly ``section_bytes``."""
        return self.section_bytes(layout)

    def regions(self, planes: Planes, block_tokens: int) -> tuple[Region, ...]:
        """As ``Codec.regions``."""
        self._check_planes(planes, block_tokens)
        method = self._methods.get(planes.rule)
        if method is None:
            return (Region("values", (planes.num_layers, block_tokens, planes.dim), planes.dtype),)
        return method.regions(planes, block_tokens)

    def plane_codec(self, planes: Planes) -> str:
        """As ``Codec.plane_codec``."""
        method = self._methods.get(planes.rule)
        return EXACT if method is None else method.name

    def encode(self, block: torch.Tensor, layout: Layout) -> Encoded:
        """As ``Codec.encode``."""
        self.check(layout)
        check_block(block, layout)
        sections, void_groups = [], 0
        for planes, x in zip(layout.planes, layout.split(block), strict=True):
            method = self._methods.get(planes.rule)
            if method is None:
                sections.append(arithmetic.to_bytes(x))
                continue
            regions, void = method.encode(x.float())
            sections.append(b"".join(arithmetic.to_bytes(region) for region in regions))
            void_groups += void
        return Encoded(sections, void_groups)

    def decode(self, sections: Sequence[Buffer], layout: Layout) -> torch.Tensor:
        """As ``Codec.decode``."""
        import torch

        self.check(layout)
        check_lengths(sections, self.section_bytes(layout))
        dtype = getattr(torch, layout.dtype)
        block = torch.empty(layout.shape, dtype=dtype)
        for planes, out, section in zip(layout.planes, layout.split(block), sections, strict=True):
            tensors, at = [], 0
            for region in self.regions(planes, layout.block_tokens):
                data = memoryview(section)[at : at + region.region_bytes]
                tensors.append(_region_tensor(data, region))
                at += region.region_bytes
            method = self._methods.get(planes.rule)
            if method is None:
                out[:] = tensors[0].view(out.shape)
            else:
                out[:] = method.decode(tensors, planes, layout.block_tokens).to(dtype)
        return block

    def _check_planes(self, planes: Planes, block_tokens: int) -> None:
        method = self._methods.get(planes.rule)
        if method is not None:
            try:
                method.check(planes, block_tokens)
            except ValueError as error:
                raise ValueError(f"codec {self.name} {error}") from None
        elif planes.dtype not in LOSSY_DTYPES:
            raise ValueError(f"codec {self.name} takes {', '.join(LOSSY_DTYPES)}, got {planes.dtype}")


def check_block(block: torch.Tensor, layout: Layout) -> None:
    """Whether a tensor is a block of a layout.

    Raises:
        ValueError: another shape or dtype.
    """
    dtype = str(block.dtype).removeprefix("torch.")
    if tuple(block.shape) != layout.shape or dtype != layout.dtype:
        raise ValueError(
            f"a block of this layout is {layout.dtype} {list(layout.shape)}, got {dtype} {list(block.shape)}"
        )


def check_lengths(sections: Sequence[Buffer], expected: Sequence[int]) -> None:
    """Whether sections have the lengths that the layout gives them.

    Raises:
        ValueError: another number of sections, or another length.
    """
    lengths = [memoryview(section).nbytes for section in sections]
    if lengths != list(expected):
        raise ValueError(f"the sections have {lengths} bytes; blocks of this layout have {list(expected)}")


def _region_tensor(data: memoryview, region: Region) -> torch.Tensor:
    if region.dtype in ("uint16", "uint32"):
        return arithmetic.from_bytes(data, "uint8", (*region.shape, REGION_BYTES[region.dtype]))
    return arithmetic.from_bytes(data, region.dtype, region.shape)
