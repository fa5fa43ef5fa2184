"""Clients that cannot map: each says why and does everything over the socket, or refuses where mapping was demanded."""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
import pytest
import zmq
from daemon_process import DaemonProcess, child_environment, wait_until
from raw_peer import BOOT_ID, RawPeer

import kvstore_client.session
from kvstore.errors import PermissionRefused
from kvstore.mapped.compiled import cache_directory
from kvstore.mapped.index_file import MAPPED_LAYOUT
from kvstore.protocol.framing import decode_request
from kvstore.protocol.messages import Attach, Attached, Bye, Hello, PutStatus, Welcome
from kvstore.protocol.namespace import Namespace
from kvstore.server.app import Daemon
from kvstore.settings import DramSettings, Settings
from kvstore_client import Client
from kvstore_client.session import Session


def key(number: int) -> bytes:
    return (number + 1).to_bytes(4, "big") * 8


def use(client: Client) -> None:
    """Every operation, once."""
    keys = [key(number) for number in range(3)]
    assert client.put_many(keys, [b"a", b"bb", b"ccc"]) == [PutStatus.STORED] * 3
    assert client.put(key(3), b"d" * 70_000, parent=key(2), wait=False) is PutStatus.PENDING
    assert client.flush().stored == 1
    assert client.get(key(3)) == b"d" * 70_000
    outs = [bytearray(3) for _ in keys]
    assert client.get_many_into(keys, outs) == [1, 2, 3]
    assert client.get_into(key(2), outs[0]) == 3
    assert outs == [b"ccc", b"bb\0", b"ccc"]
    with client.view(key(1)) as found:
        assert found == b"bb"
    with client.match([*keys, key(3), key(4)], lease=5) as match:
        assert (len(match), client.stats().leases) == (4, 1)
    assert len(client.match([*keys, key(3), key(4)])) == 4
    assert client.exists([key(3), key(4)]) == [True, False]
    assert client.prefetch(keys) == 3
    assert client.remove([key(1)]) == 1
    client.invalidate()
    assert client.get(key(0)) is None
    assert client.put(key(0), b"new") is PutStatus.STORED
    assert client.clear() == 1
    assert client.verify().problems == []


def refuses(endpoint: str, why: str, **options: object) -> None:
    with pytest.raises(PermissionRefused, match="^mapped=True: ") as refused:
        Client(endpoint, mapped=True, **options)
    assert why in str(refused.value)
    assert len(str(refused.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("attribute", "value", "why"),
    [
        (
            "MAPPED_LAYOUT",
            MAPPED_LAYOUT + 98,
            f"the daemon's mapped layout is {MAPPED_LAYOUT}, the client's {MAPPED_LAYOUT + 98}; install the same "
            "version on both sides",
        ),
        ("_boot_id", lambda: "another-kernel", "the client is on another host"),
    ],
    ids=["layout", "host"],
)
def test_client_of_another_layout_or_host_sends_everything_and_says_why(
    daemon: DaemonProcess, namespace: str, monkeypatch: pytest.MonkeyPatch, attribute: str, value: object, why: str
):
    monkeypatch.setattr(kvstore_client.session, attribute, value)
    with daemon.connect(namespace=namespace) as client:
        assert (client.mapped, client.unmapped) == (False, why)
        use(client)
        assert not any(session.mapped for session in client.stats().sessions)
    refuses(daemon.endpoint, why)


def test_daemon_whose_setting_is_off_maps_nobody_and_says_so():
    with DaemonProcess("--set", "dram.mapped=false", capacity="4MiB") as daemon:
        with daemon.connect() as client:
            assert (client.mapped, client.unmapped) == (False, "the daemon's setting dram.mapped is off")
            use(client)
            assert client.stats().dram.index_bytes == 0
        refuses(daemon.endpoint, "the daemon's setting dram.mapped is off")


def test_client_that_does_not_want_to_map_gets_no_reason_but_its_own(daemon: DaemonProcess, namespace: str):
    with daemon.connect(namespace=namespace, mapped=False) as client:
        assert (client.mapped, client.unmapped) == (False, "mapped=False")
        use(client)


def test_client_of_protocol_1_is_served_as_ever(daemon: DaemonProcess, namespace: str, monkeypatch: pytest.MonkeyPatch):
    """As release 0.1 greeted: no field for a layout, and none in the answer that it would look at."""
    with RawPeer(daemon.endpoint) as peer:
        peer.send(msgspec.msgpack.encode([1, 1, 0, 0, 0, 0, 0, 0, 1, 1, "0.1.0", os.getpid(), BOOT_ID]))
        welcome, _ = peer.receive()
        assert isinstance(welcome, Welcome)
        assert (welcome.protocol, welcome.same_host) == (1, True)
        assert (welcome.index_file, welcome.arena_file, welcome.doorbell) == ("", "", "")
        assert Path(welcome.session_file).stat().st_size == 4096
        peer.session = welcome.session
        peer.attach(Namespace(name=namespace))
        assert peer.put(*peer.record(key(0), b"old")).statuses == bytes([PutStatus.STORED])
        with daemon.connect(namespace=namespace, mapped=True) as new:
            assert new.get(key(0)) == b"old"
            new.clear()
        peer.send(peer.request(Bye))
    monkeypatch.setattr(kvstore_client.session, "PROTOCOL_VERSION", 1)
    monkeypatch.setattr(kvstore_client.session, "MAPPED_LAYOUT", 0)
    with daemon.connect(namespace=namespace) as client:
        assert not client.mapped
        use(client)


@contextmanager
def old_daemon(path: Path) -> Iterator[str]:
    """Something that answers greetings as release 0.1 did."""
    stop = threading.Event()

    def serve(socket: zmq.Socket[bytes]) -> None:
        with socket:
            while not stop.is_set():
                if socket.poll(20):
                    identity, header = socket.recv_multipart()
                    request = decode_request(header)
                    if isinstance(request, Hello):
                        reply: object = [102, request.id, 7, 1, 99, "0.1.0", 1 << 20, "", False, os.getpid() + 1]
                    elif isinstance(request, Attach):
                        reply = Attached(request.id, 7, 1, 0, bytes(32))
                    else:
                        continue
                    socket.send_multipart([identity, msgspec.msgpack.encode(reply)])

    context = zmq.Context()
    router = context.socket(zmq.ROUTER)
    router.bind(f"ipc://{path}")
    thread = threading.Thread(target=serve, args=(router,))
    thread.start()
    try:
        yield f"ipc://{path}"
    finally:
        stop.set()
        thread.join()
        context.term()


def test_daemon_of_an_older_release_is_used_over_the_socket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("kvstore_client.link.probe", lambda *arguments: 0)
    why = "the daemon (kvstored 0.1.0) does not offer it"
    with old_daemon(tmp_path / "old.sock") as endpoint:
        with Client(endpoint) as client:
            assert (client.mapped, client.unmapped) == (False, why)
        refuses(endpoint, why)


@pytest.mark.parametrize("prefix", ["doorbell-", "arena-", "index-"])
def test_client_that_misses_one_file_keeps_its_session_and_says_which(
    daemon: DaemonProcess, namespace: str, prefix: str
):
    """The lock on its session's file, too: it lives, so its lease holds."""
    (file,) = daemon.arena_directory.glob(f"{prefix}*")
    hidden = file.with_name("hidden")
    file.rename(hidden)
    try:
        with daemon.connect(namespace=namespace) as client:
            assert not client.mapped
            assert f"{file} is not there for this process; in another container" in client.unmapped
            client.put(key(9), b"x")
            session = client._session.number
            with client.match([key(9)], lease=30):
                time.sleep(2.2)
                assert client.stats().leases == 1
                assert client._session.number == session
            use(client)
        refuses(daemon.endpoint, str(file))
    finally:
        hidden.rename(file)


def test_client_that_cannot_lock_its_file_says_why(
    daemon: DaemonProcess, namespace: str, monkeypatch: pytest.MonkeyPatch
):
    lock = Session._lock

    def lost(self: Session, welcome: Welcome) -> bool:
        os.unlink(welcome.session_file)
        return lock(self, welcome)

    monkeypatch.setattr(Session, "_lock", lost)
    with daemon.connect(namespace=namespace) as client:
        assert "the session's file" in client.unmapped
        assert "mount the daemon's directory and say where (directory= or KVSTORE_DIRECTORY)" in client.unmapped
        use(client)


def in_loop(settings: Settings, work: Callable[[], None]) -> None:
    async def run() -> None:
        daemon = Daemon(settings)
        await daemon.start()
        try:
            await asyncio.to_thread(work)
        finally:
            await daemon.stop()

    asyncio.run(run())


def test_client_in_the_daemons_own_process_does_not_map(tmp_path: Path):
    """Its lock would be the daemon's own, which would never see it go."""
    endpoint = f"ipc://{tmp_path}/kv.sock"
    dram = DramSettings(capacity_bytes=4 << 20, grant_bytes=2 << 20, directory=tmp_path / "arena")

    def work() -> None:
        wait_until((tmp_path / "kv.sock").exists)
        with Client(endpoint, timeout=20.0) as client:
            assert not client.mapped
            assert client.unmapped.startswith("the daemon lives in this very process")
            wait_until(lambda: (stats := client.stats().dram).populated_bytes == stats.arena_bytes)
            use(client)
        refuses(endpoint, "the daemon lives in this very process")

    in_loop(Settings(endpoint=endpoint, http="off", dram=dram), work)


def test_home_that_cannot_be_written_to_is_no_hindrance(tmp_path: Path):
    """The compiled code is kept in the temporary folder, here prepared so that nothing has to be compiled."""
    kept = cache_directory()
    assert kept is not None
    place = tmp_path / f"kvstore-{os.geteuid()}"
    place.mkdir(mode=0o700)
    shutil.copytree(kept, place / kept.name)
    source = (
        "import sys\nfrom kvstore_client import Client\nfrom kvstore.mapped.compiled import cache_directory\n"
        "with Client(sys.argv[1], mapped=True) as client:\n"
        "    client.put(bytes(31) + b'1', b'x')\n    assert client.get(bytes(31) + b'1') == b'x'\n"
        "print(cache_directory())\n"
    )
    environ = child_environment({"HOME": "/proc/nowhere", "TMPDIR": str(tmp_path)})
    environ.pop("XDG_CACHE_HOME", None)
    with DaemonProcess(capacity="4MiB") as daemon:
        done = subprocess.run(
            [sys.executable, "-P", "-c", source, daemon.endpoint],
            env=environ,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
    assert (done.stdout.strip(), done.returncode) == (str(place / kept.name), 0), done.stderr
