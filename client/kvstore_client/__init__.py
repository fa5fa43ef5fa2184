"""The SDK of kvstore: ``Client`` and ``AsyncClient``. Loads neither torch nor the daemon."""

from kvstore.errors import (
    ConnectionLost,
    DaemonUnavailable,
    DeadlineExceeded,
    ForkedClient,
    InvalidArgument,
    KVStoreError,
    PermissionRefused,
    ProtocolMismatch,
    RemoteError,
    Throttled,
)
from kvstore.protocol.keys import chain_keys
from kvstore.protocol.messages import PutStatus, Reason
from kvstore.protocol.namespace import Namespace
from kvstore.protocol.statistics import DaemonStats
from kvstore_client.aio import AsyncClient, AsyncMatch
from kvstore_client.client import Client, Match
from kvstore_client.results import Chain, FlushResult, WarmResult
from kvstore_client.why import Explanation, Story

__all__ = [
    "AsyncClient",
    "AsyncMatch",
    "Chain",
    "Client",
    "ConnectionLost",
    "DaemonStats",
    "DaemonUnavailable",
    "DeadlineExceeded",
    "Explanation",
    "FlushResult",
    "ForkedClient",
    "InvalidArgument",
    "KVStoreError",
    "Match",
    "Namespace",
    "PermissionRefused",
    "ProtocolMismatch",
    "PutStatus",
    "Reason",
    "RemoteError",
    "Story",
    "Throttled",
    "WarmResult",
    "chain_keys",
]
