"""Golden blocks of the codecs: the same inputs everywhere, and the bytes that version 1 makes of them.

Inputs are made from a hash, not stored; ``index.tsv`` pins their digests, and for each codec the void groups, the
sections' lengths and the digest of the decoded values. ``<block>/<codec>.bin`` is the sections in order. What a
compressor gives is its own business, so of the lossless codecs only decoding is golden. Backends are tested against
these files; files of a release are never changed.

``python -c "import golden_codecs; golden_codecs.write_missing()"`` inside ``tests`` adds files of new codecs.
"""

from __future__ import annotations

import functools
import hashlib
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from kvstore_kernels.codecs import CODECS, get_codec
from kvstore_kernels.codecs.turbo import sum_of_squares
from kvstore_kernels.layout import KVLayout, Layout, MLALayout

if TYPE_CHECKING:
    import torch

FOLDER: Final = Path(__file__).parent / "compat" / "golden" / "codecs-1"
INDEX: Final = FOLDER / "index.tsv"

BLOCKS: Final[dict[str, Layout]] = {
    "gqa128-bfloat16": KVLayout(1, 1, 128, "bfloat16", 64),
    "gqa96-bfloat16": KVLayout(1, 1, 96, "bfloat16", 64),
    "gqa64-float16": KVLayout(1, 2, 64, "float16", 64),
    "gqa16-float32": KVLayout(2, 2, 16, "float32", 96),
    "mla128-bfloat16": MLALayout(2, 128, 16, "bfloat16", 64),
    "edges128-float32": KVLayout(1, 1, 128, "float32", 64),
}
"""Layouts by the name of the block. ``gqa16`` has 96 tokens, of which ``kivi4`` cannot make groups."""


@dataclass(frozen=True)
class Golden:
    """What a codec makes of a golden block.

    Attributes:
        block: name in ``BLOCKS``.
        codec: name of the codec.
        sections: their bytes.
        void_groups: as the encoder counts them.
        decoded_sha256: of the decoded block's bytes, hex.
    """

    block: str
    codec: str
    sections: list[bytes]
    void_groups: int
    decoded_sha256: str

    @property
    def layout(self) -> Layout:
        return BLOCKS[self.block]


@functools.cache
def golden_block(name: str) -> torch.Tensor:
    """The input of that name: about normal, two large channels, and rows that codecs must define.

    Head 0 of layer 0 is finite everywhere; other planes have infinities, NaN and numbers beyond every codec's limit.
    The vectors of ``edges128`` have a sum of squares at the turbo codecs' limit, where the order of the sum decides
    whether they are void.
    """
    import torch

    layout = BLOCKS[name]
    block = _noise(name, math.prod(layout.shape)).view(layout.shape)
    if name.startswith("edges"):
        return _at_limit(block.view(-1, layout.shape[-1])).view(layout.shape)
    dtype = getattr(torch, layout.dtype)
    least = math.ldexp(1, -14 if layout.dtype == "float16" else -126)
    for section in layout.split(block):
        section[..., 3] *= 8
        section[..., 11] -= 12
        section[:, :, 1] = 0
        section[:, :, 2] = -0.0
        section[:, :, 3] = 0.375
        section[:, :, 4] = -3.5
        section[:, :, 5] *= least
        section[:, :, 6] *= 1e-5
        section[:, :, 7] = section[:, :, 7].round() + 0.5
        section[:, :, 19] *= 5e-8
        section[:, :, 20] *= 2e-7
        section[..., 9] = 0
        section[..., 10] = 1.5
        for layer in range(section.shape[0]):
            for head in range(section.shape[1]):
                if layer or head:
                    _put_limits(section[layer, head])
    return block.to(dtype)


def _noise(name: str, count: int) -> torch.Tensor:
    """Nearly normal numbers of deviation 1.15 and all bits of a float32: sums of four even ones."""
    import torch

    raw = torch.frombuffer(bytearray(hashlib.shake_256(name.encode()).digest(16 * count)), dtype=torch.int32)
    return (raw.view(count, 4).long().sum(-1).double() / 2.0**31).float()


def _at_limit(vectors: torch.Tensor) -> torch.Tensor:
    """Vectors scaled so that their squares, summed up as the page says, reach 2^26, or pass it by one last place.

    Each is scaled by ever larger factors until that is so and a sum in the order of elements says otherwise; those
    that no factor brings there stay as they are.
    """
    import torch

    limit = 2.0**26
    done = vectors.clone()
    found = torch.zeros(len(vectors), dtype=torch.bool)
    unit = vectors.double() / vectors.double().norm(dim=-1, keepdim=True)
    for step in range(-200, 200):
        scaled = (unit * math.sqrt(limit) * (1 + step * 2.0**-26)).float()
        in_tree = sum_of_squares(scaled)[:, 0]
        near = ~found & ((in_tree == limit) | (in_tree == limit + 8))
        if near.any():
            in_order = torch.zeros(len(vectors))
            for element in range(vectors.shape[-1]):
                in_order = in_order + scaled[:, element] * scaled[:, element]
            near &= (in_order > limit) != (in_tree > limit)
            done[near] = scaled[near]
            found |= near
    assert found.sum() > len(vectors) / 2
    return done


def _put_limits(plane: torch.Tensor) -> None:
    plane[8, 0] = 61440.0
    plane[12, 1] = math.inf
    plane[13, 2] = -math.inf
    plane[14, 4] = math.nan
    plane[15, 5] = 61696.0
    plane[16, 6] = -65504.0
    plane[17] = 8192.0


def golden_names() -> list[tuple[str, str]]:
    """Block and codec of each golden file."""
    return [(block, codec) for block, codec, *_ in _index() if codec != "input"]


def golden(block: str, codec: str) -> Golden:
    """The golden file of a block and a codec."""
    for in_block, in_codec, void_groups, lengths, digest in _index():
        if (in_block, in_codec) == (block, codec):
            data, sections = (FOLDER / block / f"{codec}.bin").read_bytes(), []
            for length in map(int, lengths.split("+")):
                sections.append(data[:length])
                data = data[length:]
            assert not data, f"{block}/{codec}.bin is longer than its sections"
            return Golden(block, codec, sections, int(void_groups), digest)
    raise KeyError(f"no golden file of {codec} for {block}")


def input_sha256(block: str) -> str:
    """Pinned digest of a golden block's bytes."""
    return next(digest for in_block, codec, *_, digest in _index() if (in_block, codec) == (block, "input"))


def sha256_of(block: torch.Tensor) -> str:
    """Digest of a block's bytes, each NaN as the dtype's own positive quiet one."""
    from kvstore_kernels.codecs.arithmetic import to_bytes

    return hashlib.sha256(to_bytes(block.masked_fill(block.isnan(), math.nan))).hexdigest()


def write_missing() -> None:
    """Add what ``BLOCKS`` and ``CODECS`` have and the folder does not; what is there is left as it is."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    lines = ["\t".join(line) for line in _index()] if INDEX.exists() else []
    known = {tuple(line.split("\t")[:2]) for line in lines}
    for name, layout in BLOCKS.items():
        block = golden_block(name)
        if (name, "input") not in known:
            lines.append(f"{name}\tinput\t0\t{layout.block_bytes}\t{sha256_of(block)}")
        for codec in CODECS.values():
            if codec.name == "raw" or (name, codec.name) in known or not _applies(codec.name, name):
                continue
            sections, void_groups = codec.encode(block, layout)
            decoded = sha256_of(codec.decode(sections, layout))
            (FOLDER / name).mkdir(exist_ok=True)
            (FOLDER / name / f"{codec.name}.bin").write_bytes(b"".join(sections))
            lengths = "+".join(str(len(section)) for section in sections)
            lines.append(f"{name}\t{codec.name}\t{void_groups}\t{lengths}\t{decoded}")
    INDEX.write_text("\n".join(["# block\tcodec\tvoid groups\tsection bytes\tsha256 of decoded", *lines]) + "\n")


def _applies(codec: str, block: str) -> bool:
    if block.startswith("edges"):
        return codec.startswith("turbo")
    try:
        get_codec(codec).check(BLOCKS[block])
    except ValueError:
        return False
    return True


def _index() -> list[list[str]]:
    lines = INDEX.read_text(encoding="ascii").splitlines()
    return [line.split("\t") for line in lines if line and not line.startswith("#")]
