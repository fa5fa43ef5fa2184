"""How long a request waits for its first token, as estimated from what it hits.

What is missing is computed at the engine's rate; what is hit is loaded, over DRAM's way to the engine or the SSD's, and
decoded while the next block is loaded, so the slower of both counts. Nothing else overlaps and nothing queues: real
engines hide a part of the loads, and wait for each other. A load that would take longer than computing the block is not
made, as in the daemon.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from kvstore.cli.tune.sizes import BlockSizes

__all__ = ["CostModel"]

_GB: float = 1e9


@dataclass(frozen=True, slots=True)
class CostModel:
    """Rates, and the requests of a trace.

    Attributes:
        prefill_tokens_per_s: what the engine computes.
        dram_gb_per_s, ssd_gb_per_s: at which blocks come from DRAM and from the SSD, as they are stored.
        decode_gb_per_s: by codec, of what they decode to; a codec that is not named costs nothing.
        sizes: of blocks.
        block_tokens: tokens a block.
        input_tokens: of a request, mean.
        asked_blocks: of a request, mean.
    """

    prefill_tokens_per_s: float
    dram_gb_per_s: float
    ssd_gb_per_s: float
    decode_gb_per_s: Mapping[str, float]
    sizes: BlockSizes
    block_tokens: int
    input_tokens: float
    asked_blocks: float

    def block_decode_s(self, codec: str) -> float:
        """Seconds that decoding a block takes."""
        decode = self.decode_gb_per_s.get(codec)
        return self.sizes.block_bytes / (decode * _GB) if decode else 0.0

    def block_load_s(self, codec: str, gb_per_s: float) -> float:
        """Seconds for a block, of many that are loaded and decoded one after the other."""
        return max(self.sizes.slot_bytes[codec] / (gb_per_s * _GB), self.block_decode_s(codec))

    @property
    def block_prefill_s(self) -> float:
        """Seconds that the engine computes at a block."""
        return self.block_tokens / self.prefill_tokens_per_s

    def ssd_pays(self, codec: str) -> bool:
        """Whether loading from the SSD is faster than computing."""
        return self.block_load_s(codec, self.ssd_gb_per_s) < self.block_prefill_s

    def first_token_s(self, codec: str, dram_hit_rate: float, ssd_hit_rate: float = 0.0) -> float:
        """Seconds to the first token, mean over all requests.

        Args:
            codec: of what is stored.
            dram_hit_rate: blocks hit in DRAM of blocks asked for.
            ssd_hit_rate: the same of the SSD.
        """
        dram_s = min(self.block_load_s(codec, self.dram_gb_per_s), self.block_prefill_s)
        ssd_s = min(self.block_load_s(codec, self.ssd_gb_per_s), self.block_prefill_s)
        missing_tokens = self.input_tokens - (dram_hit_rate + ssd_hit_rate) * self.asked_blocks * self.block_tokens
        loads_s = self.asked_blocks * (dram_hit_rate * dram_s + ssd_hit_rate * ssd_s)
        return max(missing_tokens, 0.0) / self.prefill_tokens_per_s + loads_s
