"""``kvstore tune --apply``: what of a recommendation a running daemon can take over, and what it cannot."""

from __future__ import annotations

from collections.abc import Iterator

from kvstore.cli import render
from kvstore.cli.tune.report import Applied, Recommendation
from kvstore.cli.tune.sizes import RAW
from kvstore_client import Client

__all__ = ["applied", "daemon_capacity"]


def daemon_capacity(endpoint: str | None, timeout_s: float) -> int:
    """Bytes of the running daemon's DRAM.

    Raises:
        KVStoreError: there is no daemon, or it does not answer in time.
    """
    with Client(endpoint, timeout=timeout_s) as client:
        return client.stats().dram.capacity_bytes


def applied(advice: Recommendation, endpoint: str | None, timeout_s: float) -> Applied:
    """Change the running daemon's policies.

    Args:
        advice: what is recommended.
        endpoint: of the daemon, None for the usual one.
        timeout_s: of each call.

    Raises:
        KVStoreError: it is too old, does not know the policy, or does not answer; nothing was changed then.
    """
    with Client(endpoint, timeout=timeout_s) as client:
        stats = client.stats()
        before = client.configure()
        # A tier that was not simulated is left alone.
        below = advice.policy if before.ssd_policy and advice.ssd_bytes else ""
        after = client.configure(policy=advice.policy, ssd_policy=below)
    return Applied(
        policy_before=before.policy,
        policy=after.policy,
        ssd_policy_before=before.ssd_policy,
        ssd_policy=after.ssd_policy,
        not_changed=[
            *_not_changed(
                advice, stats.dram.capacity_bytes, 0 if stats.ssd is None else stats.ssd.capacity_bytes, after.policy
            )
        ],
    )


def _not_changed(advice: Recommendation, dram_bytes: int, ssd_bytes: int, policy: str) -> Iterator[str]:
    yield f'To keep the policy when the daemon starts anew: [eviction] policy = "{policy}".'
    if dram_bytes != advice.capacity_bytes:
        yield (
            f"DRAM stays as it is, {render.size(dram_bytes)}: its size is set when the daemon starts. The "
            f"recommendation is for {render.size(advice.capacity_bytes)}: [dram] capacity_bytes = "
            f"{advice.capacity_bytes}."
        )
    if ssd_bytes and not advice.ssd_bytes:
        yield (
            f"The SSD stays as it is, {render.size(ssd_bytes)}, and so does its policy: the recommendation has none. "
            f"To have it simulated: --ssd {ssd_bytes}."
        )
    elif ssd_bytes != advice.ssd_bytes:
        now = render.size(ssd_bytes) if ssd_bytes else "none"
        yield (
            f"The SSD stays as it is, {now}: it is set when the daemon starts. Recommended: [ssd] capacity_bytes = "
            f"{advice.ssd_bytes}."
        )
    if advice.codec != RAW:
        yield (
            f"The codec is the clients' to choose, as they join: TensorStore(layout, {advice.codec!r}, ...), or the "
            "codec setting of an engine's connector. Blocks of other codecs are in other namespaces."
        )
