"""Metrics and health over HTTP, on the daemon's own event loop.

Covers: ``/metrics`` (Prometheus text), ``/healthz`` (the loop answers), ``/readyz`` (200 or 503 with the reason) and
an index. Does not cover: who may connect; bind it to an address that only the right people reach.

Each connection carries one request and lives for ten seconds at most, and only 64 exist at a time: nobody can use up
the daemon's file descriptors here, and an idle server has nothing to do.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import socket
from collections.abc import Callable
from typing import Final

import msgspec
from aiohttp import web

from kvstore.errors import InvalidArgument, PermissionRefused, ResourceTaken, SettingsError
from kvstore.observability.logs import RepeatedLog, get_log
from kvstore.observability.metrics import CONTENT_TYPE, make_registry, render_metrics
from kvstore.protocol.statistics import DaemonStats
from kvstore.settings import parse_http

__all__ = ["HttpServer", "start_http"]

_SERVER: Final = "kvstore"
_MAX_CONNECTIONS: Final = 64
_CONNECTION_S: Final = 10.0
_STOP_S: Final = 1.0
_TEXT: Final = "text/plain; charset=utf-8"
_JSON: Final = "application/json"
_INDEX: Final = b"""kvstore
/metrics  Prometheus metrics
/healthz  200 while the daemon runs
/readyz   200 when it serves, 503 and the reason when it does not
"""


class HttpServer:
    """A running server; ``start_http`` makes it."""

    def __init__(self, runner: web.ServerRunner, address: str) -> None:
        self._runner = runner
        self.address = address
        """The actual HOST:PORT."""

    async def stop(self) -> None:
        """Close the port, give requests one second to end."""
        await self._runner.cleanup()


async def start_http(
    address: str, snapshot: Callable[[], DaemonStats], readiness: Callable[[], tuple[bool, str]]
) -> HttpServer:
    """Serve on the running loop.

    Args:
        address: HOST:PORT; port 0 takes any free one.
        snapshot: statistics for ``/metrics``.
        readiness: whether the daemon serves, and if not why.

    Raises:
        InvalidArgument: no HOST:PORT.
        ResourceTaken: the port is in use.
        PermissionRefused: the port needs privileges.
        SettingsError: the host is not one of this machine's.
    """
    place = parse_http(address)
    if place is None:
        raise InvalidArgument("http is off; there is nothing to start")
    host, port = place
    pages = _Pages(snapshot, readiness)
    runner = web.ServerRunner(_Server(pages.answer, logger=_silent(), access_log=None), shutdown_timeout=_STOP_S)
    await runner.setup()
    try:
        await web.TCPSite(runner, host, port, reuse_address=True).start()
    except OSError as error:
        await runner.cleanup()
        raise _refused(address, error) from None
    bound_host, bound_port = runner.addresses[0][:2]
    shown = f"[{bound_host}]" if ":" in bound_host else bound_host
    return HttpServer(runner, f"{shown}:{bound_port}")


def _refused(address: str, error: OSError) -> Exception:
    if error.errno == errno.EADDRINUSE:
        return ResourceTaken(
            f"the HTTP address {address} is taken by another process, perhaps another kvstore; "
            "choose another port (--http 127.0.0.1:9478) or none (--http off)"
        )
    if error.errno in (errno.EACCES, errno.EPERM):
        return PermissionRefused(f"may not listen on the HTTP address {address}; use a port above 1023 or --http off")
    if isinstance(error, socket.gaierror) or error.errno in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):
        return SettingsError(
            f"http: {address} is not an address of this machine; use one that is (--http 127.0.0.1:9477) or --http off"
        )
    return SettingsError(f"http: cannot listen on {address}: {error.strerror or error}")


class _Pages:
    def __init__(self, snapshot: Callable[[], DaemonStats], readiness: Callable[[], tuple[bool, str]]) -> None:
        self._registry = make_registry(snapshot)
        self._readiness = readiness
        self._log = RepeatedLog(get_log())

    async def answer(self, request: web.BaseRequest) -> web.Response:
        """The response to any request; a failure inside is a 500 and one log line a minute."""
        if request.method not in ("GET", "HEAD"):
            return _response(405, _TEXT, b"only GET and HEAD here\n", {"Allow": "GET, HEAD"})
        try:
            return self._page(request.path)
        except Exception as error:
            self._log.log_every(60, request.path, "error", "http request failed", path=request.path, exc_info=error)
            return _response(500, _TEXT, b"the daemon's log has the reason\n")

    def _page(self, path: str) -> web.Response:
        if path == "/metrics":
            return _response(200, CONTENT_TYPE, render_metrics(self._registry))
        if path == "/healthz":
            return _response(200, _JSON, b'{"status":"ok"}\n')
        if path == "/readyz":
            ready, reason = self._readiness()
            status: dict[str, str] = {"status": "ready"} if ready else {"status": "not ready", "reason": reason}
            return _response(200 if ready else 503, _JSON, msgspec.json.encode(status) + b"\n")
        if path == "/":
            return _response(200, _TEXT, _INDEX)
        return _response(404, _TEXT, b"not found; / lists what there is\n")


def _response(status: int, content_type: str, body: bytes, headers: dict[str, str] | None = None) -> web.Response:
    fields = {"Content-Type": content_type, "Server": _SERVER, "Cache-Control": "no-store", **(headers or {})}
    response = web.Response(status=status, body=body, headers=fields)
    response.force_close()
    return response


def _silent() -> logging.Logger:
    """A logger for malformed requests: anybody can send them, so they are not worth a line each."""
    logger = logging.Logger("kvstore.http")
    logger.addHandler(logging.NullHandler())
    return logger


class _Server(web.Server):
    """Makes connections that end; refuses the 65th."""

    def __call__(self) -> asyncio.Protocol:  # type: ignore[override]
        if len(self.connections) >= _MAX_CONNECTIONS:
            return _Refusal()
        return _Connection(self, loop=self._loop, **self._kwargs)


class _Refusal(asyncio.Protocol):
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        transport.close()


class _Connection(web.RequestHandler):
    __slots__ = ("_deadline",)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self._deadline = self._loop.call_later(_CONNECTION_S, self.force_close)

    def connection_lost(self, exc: BaseException | None) -> None:
        self._deadline.cancel()
        super().connection_lost(exc)

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        """The answer to what is no HTTP, without a word about software versions."""
        response = super().handle_error(request, status, exc, message)
        response.headers["Server"] = _SERVER
        return response
