"""What a kvstore tier says to Prometheus through vLLM."""

from __future__ import annotations

from typing import Final

from vllm.distributed.kv_transfer.kv_connector.v1.offloading.metrics import OffloadingConnectorStats
from vllm.v1.kv_offload.base import OffloadingCounterMetadata, OffloadingGaugeMetadata, OffloadingMetricMetadata

from kvstore_client.integrations.row_tier.counters import Counters

__all__ = ["metric_definitions", "stats_of"]

_PREFIX: Final = "vllm:kv_offload_kvstore_"
_IS_UP: Final = _PREFIX + "up"
_COUNTERS: Final = {
    "lookups": ("Chunk lookups of a kvstore tier, by answer.", ("result",)),
    "chunks": ("Chunks that a kvstore tier was to store or load, by what became of them.", ("operation", "result")),
    "stored_bytes": ("Bytes of stored and loaded chunks as they are in the store, after the codec.", ("operation",)),
    "leases": ("Leases of a kvstore tier, by what became of them.", ("result",)),
    "state_changes": ("Times that the store of a kvstore tier came or went.", ("state",)),
}


def metric_definitions() -> dict[str, OffloadingMetricMetadata]:
    """The metrics; each has the tier's type as its first label."""
    definitions: dict[str, OffloadingMetricMetadata] = {
        _PREFIX + name: OffloadingCounterMetadata(text, ("tier", *labels)) for name, (text, labels) in _COUNTERS.items()
    }
    definitions[_IS_UP] = OffloadingGaugeMetadata("Whether a kvstore tier has a store now.", ("tier",))
    return definitions


def stats_of(counters: Counters, tier_type: str, is_up: bool) -> OffloadingConnectorStats:
    """What was counted since the last time."""
    stats = OffloadingConnectorStats()
    for (name, labels), count in counters.take().items():
        stats.increase_counter(_PREFIX + name, count, (tier_type, *labels))
    stats.set_gauge(_IS_UP, int(is_up), (tier_type,))
    return stats
