"""Sessions: who is there, who is gone, and that nobody uses another's."""

from __future__ import annotations

import os
import resource
import signal
import socket
import stat
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import pytest
from client_adapter import CLIENTS, MAPPING, AnyClient, Connect
from daemon_process import DaemonProcess, read_line, script, wait_until
from raw_peer import RawPeer

from kvstore.errors import ErrorCode
from kvstore.protocol.messages import (
    Attach,
    Attached,
    Bye,
    Clear,
    CountReply,
    Done,
    Exists,
    ExistsReply,
    Get,
    GetReply,
    Hello,
    Invalidate,
    Match,
    MatchReply,
    Ping,
    PutReply,
    PutStatus,
    Reason,
    Release,
    Welcome,
)
from kvstore.protocol.namespace import Namespace
from kvstore.protocol.version import PROTOCOL_OLDEST, PROTOCOL_VERSION
from kvstore_client import Client, ConnectionLost, KVStoreError, RemoteError
from kvstore_client.session import Session

HOLD = """
import os, signal, sys, time
from kvstore_client import Client
client = Client(sys.argv[1], namespace=sys.argv[2])
key = bytes(31) + b"1"
client.put(key, b"x" * 5000)
lease = client.match([key], lease=60)
assert lease.lease
print("holding", flush=True)
sys.stdin.read(1)
if sys.argv[3] == "exit":
    sys.exit()
if sys.argv[3] == "abort":
    os.abort()
client.close()
"""


def key(number: int) -> bytes:
    return number.to_bytes(4, "big") * 8


@pytest.fixture
def watching(daemon: DaemonProcess) -> Iterator[Client]:
    with daemon.connect(namespace="watching") as client:
        wait_until(lambda: len(client.stats().sessions) == 1)
        yield client


@pytest.fixture
def peer(daemon: DaemonProcess, stack: ExitStack) -> Callable[[], RawPeer]:
    """Makes raw peers; each says goodbye at the end."""

    def make(*, same_host: bool = False) -> RawPeer:
        made = stack.enter_context(RawPeer(daemon.endpoint, same_host=same_host))
        stack.callback(lambda: made.send(made.request(Bye)) if made.session else None)
        return made

    return make


# ------------------------------------------------------------------ the end of a client


@pytest.mark.parametrize("end", ["close", "exit", "abort", "kill"])
def test_client_that_ends_gives_back_its_lease_and_its_file(
    daemon: DaemonProcess, watching: Client, namespace: str, end: str
):
    files = set(daemon.arena_directory.iterdir())
    with script(HOLD, daemon.endpoint, namespace, end) as process:
        assert read_line(process) == "holding"
        stats = watching.stats()
        assert stats.leases == 1
        mine = [session for session in stats.sessions if session.pid == process.pid]
        assert [session.leases for session in mine] == [1]
        (file,) = set(daemon.arena_directory.iterdir()) - files
        assert stat.S_IMODE(file.stat().st_mode) == 0o600
        if end == "kill":
            process.kill()
        else:
            assert process.stdin is not None
            process.stdin.write("x")
            process.stdin.flush()
        begin = time.monotonic()
        process.wait(10)
        wait_until(lambda: watching.stats().leases == 0, 3)
        assert time.monotonic() - begin < 2.5
    stats = watching.stats()
    assert len(stats.sessions) == 1
    assert set(daemon.arena_directory.iterdir()) == files


def test_stopped_client_keeps_its_session_and_lease(daemon: DaemonProcess, watching: Client, namespace: str):
    with script(HOLD, daemon.endpoint, namespace, "close") as process:
        assert read_line(process) == "holding"
        os.kill(process.pid, signal.SIGSTOP)
        time.sleep(2.2)
        assert watching.stats().leases == 1
        os.kill(process.pid, signal.SIGCONT)
        process.communicate("x", timeout=10)
        wait_until(lambda: watching.stats().leases == 0, 1)


def test_dead_client_is_told_from_one_that_said_goodbye(daemon: DaemonProcess, watching: Client, namespace: str):
    before = watching.stats().server
    with script(HOLD, daemon.endpoint, namespace, "kill") as process:
        read_line(process)
        process.kill()
        process.wait()
        wait_until(lambda: watching.stats().leases == 0, 3)
    with daemon.connect(namespace=namespace):
        pass
    after = watching.stats().server
    assert after.sessions_opened - before.sessions_opened == 2
    assert after.sessions_died - before.sessions_died == 1
    assert after.sessions_expired == before.sessions_expired


# ------------------------------------------------------------------ silence


@pytest.fixture(scope="module")
def hasty() -> Iterator[DaemonProcess]:
    """A daemon that gives up a silent client after a second, and takes three at a time."""
    with DaemonProcess("--set", "limits.session_idle_s=1", "--set", "limits.max_sessions=3") as daemon:
        yield daemon


def test_silent_client_without_a_lock_is_given_up_and_one_with_a_lock_is_not(hasty: DaemonProcess):
    with hasty.connect() as locked, RawPeer(hasty.endpoint) as silent, RawPeer(hasty.endpoint, same_host=True) as other:
        assert silent.greet().session_file == ""
        assert other.greet().session_file.startswith(str(hasty.arena_directory))
        time.sleep(3.2)
        stats = locked.stats()
        assert [session.pid for session in stats.sessions] == [os.getpid()]
        assert stats.server.sessions_expired >= 2
        assert silent.error(Ping).code == ErrorCode.UNKNOWN_SESSION
        assert locked.get(key(1)) is None
        assert locked.stats().server.sessions_opened == stats.server.sessions_opened


def test_client_that_dies_within_its_greeting_is_noticed_within_seconds(
    daemon: DaemonProcess, watching: Client, peer: Callable[..., RawPeer]
):
    """Killed before its Attach, or while the Attach of a locked session was on its way: no lock was ever seen."""
    files = set(daemon.arena_directory.iterdir())
    peer(same_host=True).greet()
    peer(same_host=True).greet()
    other = peer(same_host=True)
    other.greet()
    other.ask(Attach, Namespace(name="watching"), (), True, -1)
    patient = peer(same_host=True)
    patient.greet()
    patient.ask(Attach, Namespace(name="watching"), (), False, -1)
    assert len(watching.stats().sessions) == 5
    wait_until(lambda: len(watching.stats().sessions) == 2, 8)
    assert len(set(daemon.arena_directory.iterdir()) - files) == 1
    time.sleep(1.5)
    assert len(watching.stats().sessions) == 2, "one that never locked has limits.session_idle_s"


@pytest.mark.parametrize("kind", MAPPING)
def test_client_stopped_within_its_greeting_greets_again(
    daemon: DaemonProcess, namespace: str, kind: str, monkeypatch: pytest.MonkeyPatch
):
    lock = Session._lock
    greetings = []

    def slowly(session: Session, welcome: Welcome) -> bool:
        greetings.append(welcome.session)
        if len(greetings) == 1:
            time.sleep(7)
        return lock(session, welcome)

    monkeypatch.setattr(Session, "_lock", slowly)
    with CLIENTS[kind](daemon.endpoint, namespace=namespace, timeout=20) as client:
        client.put(key(1), b"x")
        assert client.get(key(1)) == b"x"
    assert len(greetings) == 2


@pytest.mark.parametrize("kind", MAPPING)
def test_silent_client_without_a_lock_greets_again_by_itself(
    hasty: DaemonProcess, kind: str, stack: ExitStack, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(Session, "_lock", lambda self, welcome: False)
    client = stack.enter_context(CLIENTS[kind](hasty.endpoint, namespace=f"silent-{kind}"))
    other = stack.enter_context(CLIENTS[kind](hasty.endpoint, namespace=f"silent-{kind}"))
    # Without the lock the daemon would not know that it still copies: it must not map.
    assert not client.mapped
    client.put(key(1), b"x")
    lease = client.match([key(1)], lease=30)
    for operation in (lambda: client.put(key(2), b"y"), lambda: client.put(key(3), b"z", wait=False)):
        time.sleep(2.1)
        operation()
    lease.release()
    done = client.flush()
    assert client.exists([key(1), key(2)]) == [True, True]
    assert done.stored + done.lost == 1, "a put that met an unknown session is stored or counted as lost"
    time.sleep(2.1)
    other.invalidate()
    client.invalidate()
    assert client.generation == other.generation
    assert client.stats().leases == 0
    client.clear()


def test_client_over_the_limit_is_refused_with_the_limit(hasty: DaemonProcess, kind: str, stack: ExitStack):
    first = [stack.enter_context(hasty.connect()) for _ in range(3)]
    with pytest.raises(RemoteError, match=r"3 clients are connected, the limit; .*limits\.max_sessions") as refused:
        CLIENTS[kind](hasty.endpoint)
    assert refused.value.code is ErrorCode.LIMIT
    first[0].close()

    def again() -> AnyClient | None:
        try:
            return CLIENTS[kind](hasty.endpoint)
        except KVStoreError:
            return None

    client = again()
    assert client is not None
    client.close()


# ------------------------------------------------------------------ whose session it is


def test_session_of_another_connection_is_unknown(daemon: DaemonProcess, peer: Callable[[], RawPeer], namespace: str):
    with daemon.connect(namespace=namespace) as client:
        client.put(key(1), b"secret")
        with client.match([key(1)], lease=30) as lease:
            thief = peer().ready("thief")
            others = [session.session for session in client.stats().sessions if session.session != thief.session]
            own = thief.session
            for session in (0, 1, own + 1, (1 << 64) - 1, *others):
                assert thief.error(Ping, session=session).code == ErrorCode.UNKNOWN_SESSION
                assert thief.error(Bye, session=session).code == ErrorCode.UNKNOWN_SESSION
            released = thief.ask(Release, lease.lease)
            assert isinstance(released, CountReply)
            assert released.count == 0
            assert client.stats().leases == 1
        assert client.get(key(1)) == b"secret"


def test_namespace_that_a_session_did_not_join_is_unknown_to_it(
    daemon: DaemonProcess, peer: Callable[[], RawPeer], namespace: str
):
    with daemon.connect(namespace=namespace) as client:
        client.put(key(1), b"secret")
        thief = peer().ready("thief")
        for namespace_id in range(1, 200):
            if namespace_id == thief.namespace_id:
                continue
            for kind, fields in ((Clear, ()), (Get, (key(1), 0)), (Exists, (key(1),)), (Match, (key(1), 0))):
                assert thief.error(kind, *fields, namespace_id=namespace_id).code == ErrorCode.UNKNOWN_NAMESPACE
        assert client.get(key(1)) == b"secret"


def test_requests_without_a_namespace_find_nothing(peer: Callable[[], RawPeer]):
    one = peer()
    one.greet()
    for kind, fields, reply in (
        (Get, (key(1), 0), GetReply(0, 0, b"\0")),
        (Exists, (key(1),), ExistsReply(0, 0, b"\0", b"\0")),
        (Match, (key(1), 1000), MatchReply(0, 0, 0)),
        (Clear, (), CountReply(0, 0, 0)),
        (Ping, (), Done(0, 0)),
    ):
        answer = one.ask(kind, *fields)
        answer.id = answer.incarnation = 0
        assert answer == reply
    put = one.put(*one.record(key(1), b"x"))
    assert isinstance(put, PutReply)
    assert put.statuses == bytes([PutStatus.REJECTED])


def test_second_greeting_of_a_connection_ends_its_first_session(
    watching: Client, peer: Callable[[], RawPeer], namespace: str
):
    one = peer().ready(namespace)
    assert one.put(*one.record(key(1), b"x")).statuses == bytes([PutStatus.STORED])
    found = one.ask(Match, key(1), 30_000)
    assert isinstance(found, MatchReply)
    assert found.lease
    first = one.session
    one.ready(namespace)
    assert one.session != first
    assert one.error(Ping, session=first, namespace_id=0).code == ErrorCode.UNKNOWN_SESSION
    assert watching.stats().leases == 0
    assert len(watching.stats().sessions) == 2


def test_greeting_of_another_protocol_is_refused_with_both_versions(peer: Callable[[], RawPeer]):
    one = peer()
    error = one.error(Hello, 90, 99, "9.9.9", 1, "", session=0)
    assert error.code == ErrorCode.PROTOCOL_MISMATCH
    assert f"speaks protocol {PROTOCOL_OLDEST} to {PROTOCOL_VERSION}, " in error.message
    assert "(kvstored 9.9.9) 90 to 99; install the same version on both sides" in error.message
    welcome = one.ask(Hello, 0, 99, "9.9.9", 1, "", session=0)
    assert isinstance(welcome, Welcome)
    assert welcome.protocol == PROTOCOL_VERSION


def test_two_generations_of_one_namespace_do_not_share_records(peer: Callable[[], RawPeer], namespace: str):
    """A record made for the old generation is refused, also by the id of the new one."""
    one = peer().ready(namespace)
    stale_record = one.record(key(1), b"old")
    advanced = one.ask(Invalidate, 0)
    assert isinstance(advanced, Attached)
    assert advanced.generation == 1
    reply = one.put(*stale_record)
    assert (reply.statuses, reply.reasons) == (bytes([PutStatus.REJECTED]), bytes([Reason.STALE_NAMESPACE]))
    one.namespace_id = advanced.namespace_id
    reply = one.put(*stale_record)
    assert (reply.statuses, reply.reasons) == (bytes([PutStatus.REJECTED]), bytes([Reason.BAD_RECORD]))
    one.digest = advanced.digest
    assert one.put(*one.record(key(1), b"new")).statuses == bytes([PutStatus.STORED])


def test_daemon_raises_its_limit_of_open_files(stack: ExitStack):
    daemon = DaemonProcess("--set", "limits.max_sessions=300")
    stack.callback(daemon.__exit__, None, None, None)
    with open_files(100, 4000):
        daemon.start()
    assert resource.prlimit(daemon.pid, resource.RLIMIT_NOFILE) == (4000, 4000)
    with ExitStack() as clients:
        for _ in range(120):
            clients.enter_context(daemon.connect())
        with daemon.connect() as client:
            assert len(client.stats().sessions) == 121


def test_daemon_that_may_not_open_a_file_for_each_session_does_not_start(stack: ExitStack):
    daemon = DaemonProcess()
    stack.callback(daemon.__exit__, None, None, None)
    with open_files(500, 2000):
        status, line = daemon.refused()
    assert status == 2
    assert "limits.max_sessions = 1024 needs 2176 open files, this process may have 2000; lower it, or raise" in line


@contextmanager
def open_files(soft: int, hard: int) -> Iterator[None]:
    """Children that are started meanwhile have these limits of open files."""
    make = subprocess.Popen.__init__

    def limited(self: object, command: list[str], **options: object) -> None:
        prefix = ["bash", "-c", f'ulimit -Sn {soft} && ulimit -Hn {hard} && exec "$@"', "bash"]
        make(self, [*prefix, *command], **options)  # type: ignore[call-overload]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(subprocess.Popen, "__init__", limited)
        yield


def test_connection_closed_during_the_greeting_is_said(daemon: DaemonProcess):
    """Something listens and hangs up: not a daemon."""
    path = daemon.directory / "other.sock"
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(path))
        listening.listen()

        def hang_up() -> None:
            for _ in range(2):
                listening.accept()[0].close()

        thread = threading.Thread(target=hang_up)
        thread.start()
        begin = time.monotonic()
        with pytest.raises(ConnectionLost, match="closed the connection during the greeting"):
            Client(str(path), timeout=5)
        assert time.monotonic() - begin < 2
        thread.join()
    path.unlink()


def test_namespace_digest_of_the_daemon_is_the_clients(connect: Connect, namespace: str):
    client = connect()
    assert client._session.digest == Namespace(name=namespace).digest(0)
