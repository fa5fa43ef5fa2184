"""``KVStoreConnector``: vLLM's KV connector interface, each half in a class of its own."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any, Final

import torch
from vllm.config import VllmConfig
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorRole,
    KVConnectorTransferResults,
    SupportsHMA,
)
from vllm.v1.kv_cache_interface import KVCacheConfig
from vllm.v1.metrics.cache_hit_source import CacheHitSource

from kvstore.errors import DaemonUnavailable
from kvstore_client.integrations.vllm.messages import StepJobs, StepReport
from kvstore_client.integrations.vllm.model import describe_model
from kvstore_client.integrations.vllm.scheduler import SchedulerHalf
from kvstore_client.integrations.vllm.settings import ConnectorSettings
from kvstore_client.integrations.vllm.stats import ConnectorProm, ConnectorStats
from kvstore_client.integrations.vllm.worker import WorkerHalf

if TYPE_CHECKING:
    from vllm.forward_context import ForwardContext
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.outputs import KVConnectorOutput
    from vllm.v1.request import Request

__all__ = ["KVStoreConnector"]

_log: Final = logging.getLogger("kvstore_client")


class KVStoreConnector(KVConnectorBase_V1, SupportsHMA):
    """Loads the KV of prompts' beginnings from a kvstore daemon, and stores what the engine computes.

    Named in vLLM's ``--kv-transfer-config`` as ``kv_connector``, with ``kv_connector_module_path``
    ``kvstore_client.integrations.vllm``; settings (``ConnectorSettings``) in ``kv_connector_extra_config``.

    Args:
        vllm_config: of the engine.
        role: which half this is.
        kv_cache_config: of the engine.

    Raises:
        InvalidArgument: a setting is wrong, or the model's KV cannot be stored.
        DaemonUnavailable: nobody answers, and ``required`` is set.
    """

    _cache_hit_source = CacheHitSource.HOST

    def __init__(self, vllm_config: VllmConfig, role: KVConnectorRole, kv_cache_config: KVCacheConfig) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        transfer = self._kv_transfer_config
        settings = ConnectorSettings.parse(dict(transfer.kv_connector_extra_config))
        model = describe_model(settings, vllm_config, kv_cache_config)
        self._scheduler: SchedulerHalf | None = None
        self._worker: WorkerHalf | None = None
        if role is KVConnectorRole.WORKER:
            self._worker = WorkerHalf(settings, model)
            return
        self._scheduler = SchedulerHalf(settings, model, loads=transfer.is_kv_consumer, saves=transfer.is_kv_producer)
        if transfer.kv_load_failure_policy != "recompute":
            _log.warning(
                "kvstore connector: with kv_load_failure_policy=%s a load that fails ends its request; set it to "
                "recompute in --kv-transfer-config",
                transfer.kv_load_failure_policy,
            )
        if not self._scheduler.connect() and settings.required:
            raise DaemonUnavailable(
                "kvstore connector: no daemon answers and required is set; start one with kvstore serve, or name "
                "another endpoint in kv_connector_extra_config"
            )

    @property
    def requires_kv_delivery(self) -> bool:
        """A save that does not happen is a miss later, no loss."""
        return False

    # -------------------------------------------------------------- worker

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        """See ``KVConnectorBase_V1``."""
        self._of_worker.register(kv_caches)

    def handle_preemptions(self, kv_connector_metadata: KVConnectorMetadata) -> None:
        """Saves of pages that are about to be overwritten end, or do not happen."""
        assert isinstance(kv_connector_metadata, StepJobs)
        self._of_worker.begin(kv_connector_metadata)

    def bind_connector_metadata(self, connector_metadata: KVConnectorMetadata) -> None:
        """The jobs of the step that is about to be computed."""
        super().bind_connector_metadata(connector_metadata)
        self._of_worker.compute(self._jobs)

    def start_load_kv(self, forward_context: ForwardContext, **kwargs: Any) -> None:
        """Loads of this step; those that it computes on are over when this returns."""
        self._of_worker.load(self._jobs)

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Nothing to wait for: see ``start_load_kv``."""

    def save_kv_layer(self, layer_name: str, kv_layer: torch.Tensor, attn_metadata: Any, **kwargs: Any) -> None:
        """Nothing yet: blocks are stored with all their layers."""

    def wait_for_save(self) -> None:
        """Begin this step's saves, and end them where they are ``sync``."""
        self._of_worker.save(self._jobs)

    def get_finished(self, finished_req_ids: set[str]) -> tuple[set[str] | None, set[str] | None]:
        """See ``get_transfer_results``."""
        results = self.get_transfer_results(finished_req_ids)
        return results.finished_sending, results.finished_recving

    def get_transfer_results(self, finished_req_ids: set[str]) -> KVConnectorTransferResults:
        """Requests whose blocks may be freed, whose loads are over, and whose loads failed."""
        sent, received, failed = self._of_worker.over()
        return KVConnectorTransferResults(finished_sending=sent, finished_recving=received, failed_recving=failed)

    def get_block_ids_with_load_errors(self) -> set[int]:
        """Pages that should have been loaded and were not."""
        return self._of_worker.take_invalid()

    def build_connector_worker_meta(self) -> StepReport | None:
        """What this worker did."""
        return self._of_worker.take_report()

    # -------------------------------------------------------------- scheduler

    def on_new_request(self, request: Request) -> None:
        """A request came."""
        self._of_scheduler.new_request(request)

    def get_num_new_matched_tokens(self, request: Request, num_computed_tokens: int) -> tuple[int | None, bool]:
        """Tokens that the store has behind the engine's own ones; they are kept for ``lease_s``."""
        return self._of_scheduler.matched_tokens(request, num_computed_tokens)

    def update_state_after_alloc(self, request: Request, blocks: KVCacheBlocks, num_external_tokens: int) -> None:
        """Plan the load of them."""
        self._of_scheduler.allocated(request, blocks.get_block_ids(), num_external_tokens)

    def build_connector_meta(self, scheduler_output: SchedulerOutput) -> KVConnectorMetadata:
        """The jobs of this step."""
        return self._of_scheduler.step(scheduler_output)

    def update_connector_output(self, connector_output: KVConnectorOutput) -> None:
        """Take over what workers report."""
        report = connector_output.kv_connector_worker_meta
        assert report is None or isinstance(report, StepReport)
        self._of_scheduler.reported(report)

    def request_finished(self, request: Request, block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        """Whether its blocks must be kept until its saves are done."""
        return self._of_scheduler.finished(request, (block_ids,)), None

    def request_finished_all_groups(
        self, request: Request, block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        """Whether its blocks must be kept until its saves are done."""
        return self._of_scheduler.finished(request, block_ids), None

    def reset_cache(self) -> bool | None:
        """Nothing stored before counts any more, here and for every engine of this namespace."""
        return self._of_scheduler.reset()

    # -------------------------------------------------------------- both

    def get_kv_connector_stats(self) -> ConnectorStats | None:
        """Counts since the last call."""
        return (self._worker or self._of_scheduler).stats.take()

    @classmethod
    def build_kv_connector_stats(cls, data: dict[str, Any] | None = None) -> ConnectorStats:
        """Counts from what was sent."""
        return ConnectorStats(data=data or {})

    @classmethod
    def build_prom_metrics(
        cls,
        vllm_config: VllmConfig,
        metric_types: dict[Any, Any],
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> ConnectorProm:
        """The counters of Prometheus."""
        return ConnectorProm(vllm_config, metric_types, labelnames, per_engine_labelvalues)

    def shutdown(self) -> None:
        """End threads and connections."""
        for half in (self._worker, self._scheduler):
            if half is not None:
                half.close()

    @property
    def _jobs(self) -> StepJobs:
        jobs = self._get_connector_metadata()
        assert isinstance(jobs, StepJobs)
        return jobs

    @property
    def _of_worker(self) -> WorkerHalf:
        assert self._worker is not None, "asked of the scheduler's half"
        return self._worker

    @property
    def _of_scheduler(self) -> SchedulerHalf:
        assert self._scheduler is not None, "asked of a worker's half"
        return self._scheduler
