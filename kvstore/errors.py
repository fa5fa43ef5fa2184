"""Errors by cause, and the closed set of codes they have on the wire.

Covers: every exception that the daemon, the SDK and the CLI raise on purpose. Every message names what was wrong
and what to do. Does not cover: answers that are not errors (hit, miss, throttled, rejected), see
``kvstore.protocol.messages``.
"""

from __future__ import annotations

from enum import IntEnum

__all__ = [
    "ConnectionLost",
    "CorruptRecord",
    "DaemonUnavailable",
    "DeadlineExceeded",
    "ErrorCode",
    "ForkedClient",
    "InsufficientMemory",
    "InvalidArgument",
    "InvalidTransition",
    "InvariantViolation",
    "KVStoreError",
    "PermissionRefused",
    "ProtocolMismatch",
    "RemoteError",
    "ResourceTaken",
    "SettingsError",
    "Throttled",
    "UnsupportedEngine",
]


class ErrorCode(IntEnum):
    """Codes of an ``ErrorReply``. Persisted on the wire: values are never changed or reused."""

    BAD_REQUEST = 1
    PROTOCOL_MISMATCH = 2
    UNKNOWN_SESSION = 3
    UNKNOWN_NAMESPACE = 4
    THROTTLED = 5
    SHUTTING_DOWN = 6
    LIMIT = 7
    INTERNAL = 8


class KVStoreError(Exception):
    """Base of all errors raised on purpose; the message names what was wrong and what to do."""


class InvalidArgument(KVStoreError, ValueError):
    """A caller's argument cannot be right (key length, empty data, an unknown option)."""


class SettingsError(KVStoreError, ValueError):
    """A settings file, environment variable or flag was refused."""


class DaemonUnavailable(KVStoreError, ConnectionError):
    """No daemon answers at the endpoint."""


class ConnectionLost(KVStoreError, ConnectionError):
    """The client was closed, or the daemon went away while an operation was waiting."""


class DeadlineExceeded(KVStoreError, TimeoutError):
    """The daemon is there but did not answer within the operation's timeout."""


class ProtocolMismatch(KVStoreError):
    """Client and daemon speak no common protocol version."""


class Throttled(KVStoreError):
    """The daemon refused to do work now (overload, no free slots); trying again later can succeed."""


class ForkedClient(KVStoreError):
    """A client made before a fork was used in the child; the child must make its own."""


class PermissionRefused(KVStoreError, PermissionError):
    """The operating system denied access to a socket, file or directory."""


class ResourceTaken(KVStoreError):
    """Another process owns the socket, the arena directory or the port."""


class InsufficientMemory(KVStoreError):
    """The configured sizes do not fit the memory or the shared-memory file system of this machine."""


class CorruptRecord(KVStoreError):
    """The bytes of a record are not what its header says, or are no record at all."""


class RemoteError(KVStoreError):
    """The daemon answered with an error.

    Attributes:
        code: the cause.
    """

    def __init__(self, code: ErrorCode, message: str) -> None:
        super().__init__(message)
        self.code = code


class InvalidTransition(KVStoreError):
    """The state machine met an event that its transition table does not allow: a bug, with the key's story."""


class InvariantViolation(KVStoreError):
    """``validate_state()`` found the store in a state that must never be."""


class UnsupportedEngine(KVStoreError, ImportError):
    """An integration was imported beside a version of its engine that it does not know, or without the engine."""
