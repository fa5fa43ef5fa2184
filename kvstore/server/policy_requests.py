"""Requests that change what the running daemon does: its policies."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import TypeVar

from kvstore.core.events import AdmissionChanged, PolicyChanged
from kvstore.core.pools import pooled
from kvstore.core.tenants import Tenant
from kvstore.errors import ErrorCode, InvalidArgument
from kvstore.observability.logs import Log
from kvstore.policy.admission import make_admission
from kvstore.policy.base import EvictionPolicy, PolicyContext
from kvstore.policy.registry import make_policy
from kvstore.protocol.messages import Configure, Configured, Reply
from kvstore.server.executor import Executor
from kvstore.server.refusal import Refused
from kvstore.server.sessions import Session

T = TypeVar("T")


class PolicyRequests:
    """Answers them.

    Args:
        executor: of the store.
        ssd_capacity_bytes: what the SSD may take, 0 without one.
        clock: nanoseconds, monotonic; the policies'.
        incarnation: of the daemon.
        log: told of each change.
    """

    def __init__(
        self, executor: Executor, ssd_capacity_bytes: int, clock: Callable[[], int], incarnation: int, log: Log
    ) -> None:
        self._executor = executor
        self._ssd_capacity_bytes = ssd_capacity_bytes
        self._clock = clock
        self._incarnation = incarnation
        self._log = log

    def configure(self, session: Session, request: Configure) -> Reply:
        """Change policies; all of them, or none where one of the names is wrong."""
        store = self._executor.store
        if store.ssd is None and (request.ssd_policy or request.admission):
            raise Refused(ErrorCode.BAD_REQUEST, "this daemon has no SSD tier: no policy and no admission of it")
        policy = self._policy(request.policy, store.limits.capacity_bytes, store.tenants)
        below_tenants = {} if store.ssd is None else store.ssd.tenants
        ssd_policy = self._policy(request.ssd_policy, self._ssd_capacity_bytes, below_tenants)
        admission = _named(make_admission, request.admission)
        if policy is not None and policy.name != store.policy.name:
            self._log.info("policy_changed", tier="dram", before=store.policy.name, after=policy.name, pid=session.pid)
            self._executor.apply(PolicyChanged(policy))
        if ssd_policy is not None and store.ssd is not None and ssd_policy.name != store.ssd.policy.name:
            before = store.ssd.policy.name
            self._log.info("policy_changed", tier="ssd", before=before, after=ssd_policy.name, pid=session.pid)
            self._executor.apply(PolicyChanged(ssd_policy, ssd=True))
        if admission is not None and admission.name != store.admission.name:
            before = store.admission.name
            self._log.info("admission_changed", before=before, after=admission.name, pid=session.pid)
            self._executor.apply(AdmissionChanged(admission))
        below = store.ssd
        return Configured(
            request.id,
            self._incarnation,
            store.policy.name,
            "" if below is None else below.policy.name,
            "" if below is None else store.admission.name,
        )

    def _policy(self, name: str, capacity_bytes: int, tenants: Mapping[str, Tenant]) -> EvictionPolicy | None:
        context = PolicyContext(capacity_bytes, self._clock)
        return _named(lambda name: pooled(partial(make_policy, name), context, tenants.values()), name)


def _named(make: Callable[[str], T], name: str) -> T | None:
    """What has that name, None for no name."""
    if not name:
        return None
    try:
        return make(name)
    except InvalidArgument as error:
        raise Refused(ErrorCode.BAD_REQUEST, str(error)) from None
