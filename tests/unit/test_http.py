from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

import aiohttp
import pytest
from sample_stats import sample_stats

from kvstore.errors import InvalidArgument, ResourceTaken, SettingsError
from kvstore.protocol.statistics import DaemonStats
from kvstore.server import http as http_module
from kvstore.server.http import HttpServer, start_http

pytestmark = pytest.mark.usefixtures("no_leaks", "no_leaked_tasks")


@dataclass
class Daemon:
    """What the pages ask."""

    ready: tuple[bool, str] = (True, "")
    stats: DaemonStats = field(default_factory=sample_stats)
    broken: bool = False
    snapshots: int = 0

    def snapshot(self) -> DaemonStats:
        self.snapshots += 1
        if self.broken:
            raise RuntimeError("broken")
        return self.stats


@pytest.fixture
def daemon() -> Daemon:
    return Daemon()


@pytest.fixture
async def server(daemon: Daemon) -> AsyncIterator[HttpServer]:
    started = await start_http("127.0.0.1:0", daemon.snapshot, lambda: daemon.ready)
    yield started
    await started.stop()


async def ask(server: HttpServer, path: str, method: str = "GET") -> tuple[int, str, str]:
    async with (
        aiohttp.ClientSession() as session,
        session.request(method, f"http://{server.address}{path}") as response,
    ):
        assert response.headers["Server"] == "kvstore"
        return response.status, response.content_type, await response.text()


async def send(server: HttpServer, request: bytes) -> bytes:
    host, port = server.address.split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(request)
    try:
        return await asyncio.wait_for(reader.read(), 5)
    finally:
        writer.close()
        await writer.wait_closed()


async def test_metrics_asked_gives_prometheus_text(server: HttpServer, daemon: Daemon) -> None:
    assert daemon.snapshots == 0
    status, content_type, text = await ask(server, "/metrics")
    assert (status, content_type, daemon.snapshots) == (200, "text/plain", 1)
    assert "kvstore_requests_total 29000.0" in text


async def test_healthz_asked_answers_even_when_not_ready(server: HttpServer, daemon: Daemon) -> None:
    daemon.ready = (False, "stopping")
    assert await ask(server, "/healthz") == (200, "application/json", '{"status":"ok"}\n')


async def test_readyz_follows_readiness(server: HttpServer, daemon: Daemon) -> None:
    assert await ask(server, "/readyz") == (200, "application/json", '{"status":"ready"}\n')
    daemon.ready = (False, "stopping")
    expected = '{"status":"not ready","reason":"stopping"}\n'
    assert await ask(server, "/readyz") == (503, "application/json", expected)


async def test_index_lists_the_pages(server: HttpServer) -> None:
    status, _, text = await ask(server, "/")
    assert status == 200
    assert all(page in text for page in ("/metrics", "/healthz", "/readyz"))


@pytest.mark.parametrize(
    ("method", "path", "status"), [("GET", "/nothing", 404), ("POST", "/metrics", 405), ("HEAD", "/metrics", 200)]
)
async def test_other_requests_have_their_status(server: HttpServer, method: str, path: str, status: int) -> None:
    assert (await ask(server, path, method))[0] == status


async def test_failing_snapshot_answers_500_and_the_server_lives(server: HttpServer, daemon: Daemon) -> None:
    daemon.broken = True
    assert (await ask(server, "/metrics"))[0] == 500
    daemon.broken = False
    assert (await ask(server, "/metrics"))[0] == 200


@pytest.mark.parametrize(
    "junk", [b"\x16\x03\x01\x02\x00junk\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n", b"\r\n" * 3 + b"x y\r\n\r\n"]
)
async def test_junk_is_refused_without_a_version_banner(server: HttpServer, junk: bytes) -> None:
    reply = await send(server, junk)
    assert b"aiohttp" not in reply
    assert b"Python/" not in reply
    assert (await ask(server, "/healthz"))[0] == 200


async def test_silent_connection_is_closed_after_its_time(server: HttpServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_module, "_CONNECTION_S", 0.1)
    assert await send(server, b"GET /metr") == b""


async def test_connections_beyond_the_limit_are_closed_and_the_others_live(
    server: HttpServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http_module, "_MAX_CONNECTIONS", 2)
    host, port = server.address.split(":")
    held = [await asyncio.open_connection(host, int(port)) for _ in range(2)]
    await asyncio.sleep(0.05)
    assert await send(server, b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n") == b""
    reader, writer = held[0]
    writer.write(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")
    assert (await reader.read()).startswith(b"HTTP/1.1 200")
    for _, writer in held:
        writer.close()
        await writer.wait_closed()


async def test_taken_port_is_refused_naming_it_and_what_to_do(daemon: Daemon) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        address = f"127.0.0.1:{other.getsockname()[1]}"
        with pytest.raises(ResourceTaken, match=f"{address} is taken .*--http 127.0.0.1:9478.*--http off"):
            await start_http(address, daemon.snapshot, lambda: (True, ""))


async def test_foreign_address_is_refused(daemon: Daemon) -> None:
    with pytest.raises(SettingsError, match=r"192\.0\.2\.1:80 is not an address of this machine"):
        await start_http("192.0.2.1:80", daemon.snapshot, lambda: (True, ""))


@pytest.mark.parametrize("address", ["9477", "off", "http://127.0.0.1:1"])
async def test_no_address_is_refused(daemon: Daemon, address: str) -> None:
    with pytest.raises(InvalidArgument):
        await start_http(address, daemon.snapshot, lambda: (True, ""))


async def test_stop_frees_the_port_even_with_an_open_connection(daemon: Daemon) -> None:
    server = await start_http("127.0.0.1:0", daemon.snapshot, lambda: daemon.ready)
    host, port = server.address.split(":")
    _, writer = await asyncio.open_connection(host, int(port))
    await asyncio.wait_for(server.stop(), 5)
    writer.close()
    again = await start_http(server.address, daemon.snapshot, lambda: daemon.ready)
    await again.stop()
