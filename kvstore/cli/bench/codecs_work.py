"""One codec's work on all blocks of the benchmark, and the checks of what it leaves behind.

A codec is checked before anything of it is timed: for two blocks its bytes and what they decode to are compared with
the reference implementation, for all blocks the two forms of the KV with each other, and for exact codecs what was
decoded with the KV itself. While it is timed, blocks of each call are compared with what came out then, by checksum.
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from kvstore.cli.bench.codecs_memory import Form, KVMemory
from kvstore.cli.bench.local_blocks import wrong
from kvstore.format.constants import PAGE_BYTES, RECORD_HEADER_BYTES
from kvstore.format.record import checksum, padded_bytes
from kvstore_kernels import cpu
from kvstore_kernels.codecs import Codec
from kvstore_kernels.layout import KVLayout

__all__ = ["CodecWork", "Payloads", "has_reference"]

_SPOILED: Final = 0xA5
_SPOILED_BYTES: Final = 64


def has_reference() -> bool:
    """Whether the reference implementations can run here."""
    return find_spec("torch") is not None


class Payloads:
    """Places for the payloads of all blocks, spaced as in slots.

    Args:
        most_bytes: of a payload.
        blocks: how many.

    Attributes:
        addresses: uint64 ``[blocks]``.
    """

    def __init__(self, most_bytes: int, blocks: int) -> None:
        stride = padded_bytes(RECORD_HEADER_BYTES + most_bytes)
        # Slots begin with a page, and so do these: what is stored across two lines of the cache takes longer.
        memory = np.full(blocks * stride + PAGE_BYTES, _SPOILED, np.uint8)
        begin = -int(memory.ctypes.data) % PAGE_BYTES
        self._slots = memory[begin : begin + blocks * stride].reshape(blocks, stride)
        first = self._slots.ctypes.data + RECORD_HEADER_BYTES
        self.addresses: npt.NDArray[np.uint64] = np.arange(blocks, dtype=np.uint64) * np.uint64(stride) + np.uint64(
            first
        )

    def payload(self, number: int, payload_bytes: int) -> npt.NDArray[np.uint8]:
        """The payload of a block, in place."""
        return self._slots[number, RECORD_HEADER_BYTES : RECORD_HEADER_BYTES + payload_bytes]

    def spoil(self, begin: int, end: int) -> None:
        """Overwrite the first bytes of these payloads."""
        self._slots[begin:end, RECORD_HEADER_BYTES : RECORD_HEADER_BYTES + _SPOILED_BYTES] ^= _SPOILED


class CodecWork:
    """One codec's work on all blocks; making it encodes and decodes everything and checks it.

    Args:
        codec: what works.
        memory: the KV.
        payloads: room for what the codec makes of it.

    Attributes:
        section_bytes: int64 ``[blocks, sections]``, of the payloads, which are there from now on.

    Raises:
        KVStoreError: the codec does not do what its reference does, or not the same in both forms.
    """

    def __init__(self, codec: Codec, memory: KVMemory, payloads: Payloads) -> None:
        self.codec = codec
        self.memory = memory
        self.payloads = payloads
        self.section_bytes: npt.NDArray[np.int64] = self._encode_all(memory.contiguous)
        self._payload_checksums = [checksum(self._payload(number).data) for number in range(memory.blocks)]
        self._decode_all(memory.contiguous)
        self._decoded_checksums = [checksum(block.data) for block in self._decoded(memory.contiguous)]
        if has_reference():
            for number in {0, memory.blocks - 1}:
                self._check_against_reference(number)
        if codec.exact:
            self._check_against_source()
        self._check_paged_form()

    def check_payloads(self, begin: int, section_bytes: npt.NDArray[np.int64], what: str) -> None:
        """Compare the first and the last of these payloads with what was there at first.

        Args:
            begin: number of the first block.
            section_bytes: of them.
            what: wrote them.

        Raises:
            KVStoreError: a length or a byte is another.
        """
        end = begin + len(section_bytes)
        if not np.array_equal(section_bytes, self.section_bytes[begin:end]):
            raise wrong(f"{what} gave sections of other lengths to blocks {begin} to {end - 1} than before")
        for number in {begin, end - 1}:
            if checksum(self._payload(number).data) != self._payload_checksums[number]:
                raise wrong(f"{what} gave block {number} other bytes than before")

    def check_decoded(self, form: Form, begin: int, end: int, what: str) -> None:
        """Compare the first and the last of these decoded blocks with what was there at first.

        Raises:
            KVStoreError: a number is another.
        """
        for number in {begin, end - 1}:
            if checksum(form.target_block(number).data) != self._decoded_checksums[number]:
                raise wrong(f"{what} gave block {number} other numbers than before")

    def _payload(self, number: int) -> npt.NDArray[np.uint8]:
        return self.payloads.payload(number, int(self.section_bytes[number].sum()))

    def _decoded(self, form: Form) -> Iterator[npt.NDArray[Any]]:
        return (form.target_block(number) for number in range(self.memory.blocks))

    def _encode_all(self, form: Form) -> npt.NDArray[np.int64]:
        self.payloads.spoil(0, self.memory.blocks)
        encoded = cpu.encode(self.codec, form.source, form.pages, self.payloads.addresses)
        if encoded.void_groups.any():
            raise wrong(
                f"{self.codec.name} could not hold ordinary numbers: {int(encoded.void_groups.sum())} void groups"
            )
        return encoded.section_bytes

    def _decode_all(self, form: Form) -> None:
        form.spoil_target(0, self.memory.blocks)
        cpu.decode(self.codec, form.target, form.pages, self.payloads.addresses, self.section_bytes)

    def _check_against_reference(self, number: int) -> None:
        layout, payload = self.memory.layout, self._payload(number)
        if self.codec.section_bytes(layout) is not None:
            sections = self.codec.encode(_tensor(self.memory.contiguous.source_block(number), layout), layout).sections
            if b"".join(sections) != payload.tobytes():
                raise wrong(f"{self.codec.name} gave block {number} other bytes than its reference implementation")
        ends = np.cumsum(self.section_bytes[number])
        sections = [part.tobytes() for part in np.split(payload, ends[:-1])]
        decoded = _tensor(self.memory.contiguous.target_block(number), layout)
        if not self.codec.decode(sections, layout).equal(decoded):
            raise wrong(f"{self.codec.name} gave block {number} other numbers than its reference implementation")

    def _check_against_source(self) -> None:
        for number, decoded in enumerate(self._decoded(self.memory.contiguous)):
            if not np.array_equal(decoded, self.memory.contiguous.source_block(number)):
                raise wrong(f"{self.codec.name} is exact and gave block {number} other numbers than it got")

    def _check_paged_form(self) -> None:
        paged, what = self.memory.paged, f"{self.codec.name} with pages"
        section_bytes = self._encode_all(paged)
        self._decode_all(paged)
        for number in range(self.memory.blocks):
            self.check_payloads(number, section_bytes[number : number + 1], what)
            self.check_decoded(paged, number, number + 1, what)


def _tensor(block: npt.NDArray[Any], layout: KVLayout) -> Any:
    """A torch tensor of a copied block; numpy has bfloat16 as its bits."""
    import torch

    if layout.dtype == "bfloat16":
        return torch.from_numpy(block.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(block)
