"""What the connector counts, for vLLM's log and its Prometheus metrics."""

from __future__ import annotations

from typing import Any, Final

from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorPromMetrics, KVConnectorStats

__all__ = ["ConnectorProm", "ConnectorStats"]

_COUNTED: Final = {
    "lookups": "Lookups of a prompt's blocks",
    "lookups_unserved": "Lookups that the daemon did not answer in time",
    "lookup_s": "Seconds in lookups",
    "blocks_asked": "Blocks looked up",
    "blocks_hit": "Blocks that were there",
    "blocks_loaded": "Blocks loaded",
    "loaded_bytes": "Bytes of KV loaded",
    "loaded_stored_bytes": "Encoded bytes that it came from",
    "load_s": "Seconds in loads",
    "load_failures": "Loads of a request that failed, at least in part",
    "blocks_saved": "Blocks stored",
    "blocks_known": "Blocks that were there already when they were to be stored",
    "blocks_refused": "Blocks that were not stored",
    "blocks_void": "Blocks that the codec cannot hold, stored by the exact one",
    "saved_bytes": "Bytes of KV stored",
    "saved_stored_bytes": "Encoded bytes of it",
    "save_s": "Seconds in saves",
    "save_failures": "Saves that the daemon did not serve",
}


class ConnectorStats(KVConnectorStats):
    """Counts since the last step."""

    data: dict[str, Any]

    def add(self, name: str, count: float) -> None:
        """Count."""
        data = self.data
        data[name] = data.get(name, 0) + count

    def take(self) -> ConnectorStats | None:
        """What was counted; counting begins anew."""
        if not self.data:
            return None
        taken, self.data = ConnectorStats(data=self.data), {}
        return taken

    def reset(self) -> None:
        """Count from nothing."""
        self.data = {}

    def aggregate(self, other: KVConnectorStats) -> KVConnectorStats:
        """These counts and others."""
        for name, count in other.data.items():
            self.add(name, count)
        return self

    def reduce(self) -> dict[str, int | float]:
        """For vLLM's log, with rates."""
        data = {name: round(self.data[name], 4) for name in _COUNTED if name in self.data}
        for what in ("load", "save"):
            seconds = self.data.get(f"{what}_s", 0)
            if seconds:
                data[f"{what}_mib_per_s"] = round(
                    self.data.get(f"{what}ed_bytes", self.data.get("saved_bytes", 0)) / seconds / (1 << 20), 1
                )
        return data

    def is_empty(self) -> bool:
        """Whether nothing was counted."""
        return not self.data


class ConnectorProm(KVConnectorPromMetrics):
    """The same as counters ``vllm:kvstore_*``."""

    def __init__(
        self,
        vllm_config: Any,
        metric_types: dict[Any, Any],
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> None:
        super().__init__(vllm_config, metric_types, labelnames, per_engine_labelvalues)
        self._counters = {
            name: {engine: counter.labels(*values) for engine, values in per_engine_labelvalues.items()}
            for name, text in _COUNTED.items()
            for counter in [
                self._counter_cls(name=f"vllm:kvstore_{_metric(name)}", documentation=f"{text}.", labelnames=labelnames)
            ]
        }

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        """Count what a step counted."""
        for name, count in transfer_stats_data.items():
            counters = self._counters.get(name)
            if counters is not None:
                counters[engine_idx].inc(count)


def _metric(name: str) -> str:
    return name.removesuffix("_s") + "_seconds" if name.endswith("_s") else name
