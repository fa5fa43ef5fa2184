"""The blocking client beyond what both clients share: threads, forks, interrupts, timeouts, its own end."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable

import pytest
from daemon_process import DaemonProcess, read_line, script, wait_until, wait_until_nothing_is_lent

from kvstore_client import (
    Client,
    ConnectionLost,
    DeadlineExceeded,
    InvalidArgument,
    KVStoreError,
    PutStatus,
    Throttled,
)


def key(number: int) -> bytes:
    return number.to_bytes(4, "big") * 8


def in_threads(count: int, work: Callable[[int], None]) -> None:
    """Run ``work(0..count-1)`` in threads; the first exception is the test's."""
    errors: list[BaseException] = []

    def run(index: int) -> None:
        try:
            work(index)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(index,)) for index in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


@pytest.mark.parametrize("mapped", [True, False])
def test_threads_share_one_client(daemon: DaemonProcess, namespace: str, mapped: bool):
    with daemon.connect(namespace=namespace, mapped=mapped) as client:

        def work(index: int) -> None:
            for number in range(index * 100 + 1, index * 100 + 41):
                payload = number.to_bytes(4, "big") * (50 * (number % 700 + 1))
                client.put(key(number), payload, wait=number % 3 != 0)
                assert client.get(key(number)) == payload
                assert client.exists([key(number), key(1 << 30)]) == [True, False]

        in_threads(8, work)
        assert client.flush().lost == 0
        assert client.clear() == 320
        wait_until_nothing_is_lent(client.stats)


def test_clients_of_many_threads_work_side_by_side(daemon: DaemonProcess, namespace: str):
    def work(index: int) -> None:
        with daemon.connect(namespace=namespace) as client:
            for number in range(1, 60):
                payload = bytes([number]) * 30_000
                assert client.put(key(number), payload) in (PutStatus.STORED, PutStatus.EXISTS)
                assert client.get(key(number)) == payload

    in_threads(12, work)
    with daemon.connect(namespace=namespace) as client:
        assert client.clear() == 59


def test_many_clients_connect_at_once(daemon: DaemonProcess, namespace: str):
    clients: list[Client] = []
    lock = threading.Lock()

    def work(index: int) -> None:
        client = daemon.connect(namespace=namespace, timeout=20.0)
        with lock:
            clients.append(client)

    in_threads(150, work)
    assert len(clients[0].stats().sessions) >= 150
    in_threads(150, lambda index: clients[index].close())


# ------------------------------------------------------------------ fork


FORK = """
import os, sys, warnings
warnings.simplefilter("ignore", DeprecationWarning)
from kvstore_client import AsyncClient, Client, ForkedClient
client = Client(sys.argv[1], namespace="fork", mapped=sys.argv[2] == "True")
client.put(bytes(31) + b"1", b"x" * 100_000)
client.put(bytes(31) + b"2", b"x" * 100_000, wait=False)
child = os.fork()
if not child:
    try:
        for attempt in (
            lambda: client.get(bytes(31) + b"1"), client.ping, client.flush, client.stats,
            lambda: client.get_into(bytes(31) + b"1", bytearray(100_000)), lambda: client.match([bytes(31) + b"1"]),
            lambda: client.put(bytes(31) + b"3", b"y"), lambda: client.put(bytes(31) + b"3", b"y", wait=False),
            lambda: client.put(bytes(31) + b"4", b"y" * 100_000, wait=False),
        ):
            try:
                attempt()
            except ForkedClient as error:
                assert str(os.getppid()) in str(error), error
            else:
                os._exit(3)
        assert not client.mapped
        client.close()
        client.close()
        with Client(sys.argv[1], namespace="fork", mapped=sys.argv[2] == "True") as own:
            assert own.get(bytes(31) + b"1") == b"x" * 100_000
            assert own.exists([bytes(31) + b"3", bytes(31) + b"4"]) == [False, False]
    except BaseException as error:
        print(repr(error), file=sys.stderr, flush=True)
        os._exit(4)
    os._exit(0)
_, status = os.waitpid(child, 0)
print("child", os.waitstatus_to_exitcode(status))
assert str(client.mapped) == sys.argv[2]
assert client.get(bytes(31) + b"1") == b"x" * 100_000
print("flush", client.flush().stored, "sessions", [session.pid for session in client.stats().sessions] == [os.getpid()])
client.clear()
client.close()
"""


@pytest.mark.parametrize("mapped", [True, False])
def test_fork_child_cannot_use_the_client_and_harms_nobody(daemon: DaemonProcess, mapped: bool):
    with script(FORK, daemon.endpoint, str(mapped)) as process:
        assert read_line(process) == "child 0"
        assert read_line(process) == "flush 1 sessions True"
        assert process.wait(10) == 0


FORK_WHILE_BUSY = """
import os, sys, threading, time, warnings
warnings.simplefilter("ignore", DeprecationWarning)
from kvstore_client import Client, ForkedClient
client = Client(sys.argv[1], namespace="fork")
stop = False
def work():
    while not stop:
        client.ping()
thread = threading.Thread(target=work)
thread.start()
for _ in range(20):
    child = os.fork()
    if not child:
        try:
            client.ping()
        except ForkedClient:
            client.close()
            os._exit(0)
        os._exit(3)
    assert os.waitpid(child, 0)[1] == 0
stop = True
thread.join()
client.close()
print("done")
"""


def test_fork_while_another_thread_uses_the_client_does_not_block_the_child(daemon: DaemonProcess):
    with script(FORK_WHILE_BUSY, daemon.endpoint) as process:
        assert read_line(process) == "done"
        assert process.wait(10) == 0


# ------------------------------------------------------------------ interrupts and timeouts


INTERRUPTS = """
import signal, sys, time
from kvstore_client import Client, PutStatus
payloads = {number.to_bytes(32, "big"): bytes([number]) * 90_000 for number in range(1, 30)}
present = (PutStatus.STORED, PutStatus.EXISTS)

class Interrupt(BaseException):
    pass

def interrupt(*_):
    raise Interrupt

def later(seconds):
    signal.setitimer(signal.ITIMER_REAL, seconds)

signal.signal(signal.SIGALRM, interrupt)
mapped = sys.argv[2] == "True"
client = Client(sys.argv[1], namespace="interrupted", timeout=3.0, mapped=mapped)
client.put_many(list(payloads), list(payloads.values()))  # pyzmq's own threads start undisturbed
hits, slowest, step = 0, 0.0, 0.00001 if mapped else 0.00004
for turn in range(400):
    keys = list(payloads)[turn % 20 : turn % 20 + 5]
    try:
        outs = [bytearray(90_000) for _ in keys]
        later(0.00002 + (turn % 80) * step)
        client.put_many(keys, [payloads[key] for key in keys])
        client.get_many_into(keys, outs)
        client.put(keys[0], payloads[keys[0]], wait=False)
        if sys.argv[3] == "views":
            with client.view(keys[1]) as view:
                assert view == payloads[keys[1]]
        later(0)
    except Interrupt:
        hits += 1
    later(0)
    begin = time.monotonic()
    for key in keys:
        assert client.put(key, payloads[key]) in present
        assert client.get(key) == payloads[key]
    slowest = max(slowest, time.monotonic() - begin)
    if turn % 10 == 0:
        client.flush()
assert client.verify().problems == []
client.clear()
assert client.mapped == mapped
deadline = time.monotonic() + 5
while time.monotonic() < deadline:
    dram = client.stats().dram
    if not dram.granted_bytes + dram.limbo_bytes:
        break
    time.sleep(0.1)
client.close()
print(hits, slowest, dram.granted_bytes, dram.limbo_bytes)
"""


@pytest.mark.parametrize("mapped", [True, False])
def test_interrupt_at_any_moment_leaves_the_client_usable(daemon: DaemonProcess, mapped: bool):
    """A signal handler that raises hits the client in every line of it."""
    with script(INTERRUPTS, daemon.endpoint, str(mapped), "no views", stderr=subprocess.DEVNULL) as process:
        hits, slowest, lent, held = map(float, read_line(process).split())
        assert process.wait(10) == 0
    assert hits > 50
    assert slowest < 2.0
    # Compiled calls are not interrupted, so no slot is lost between a lane and the ring.
    assert (lent, held) == (0, 0)
    with daemon.connect() as watching:
        wait_until_nothing_is_lent(watching.stats)


def test_interrupt_at_any_moment_of_a_view_does_not_hold_its_slot_for_ever(daemon: DaemonProcess):
    with script(INTERRUPTS, daemon.endpoint, "True", "views", stderr=subprocess.DEVNULL) as process:
        hits, _, _, held = map(float, read_line(process).split())
        assert process.wait(10) == 0
    assert hits > 50
    assert held == 0, f"{held:.0f} bytes that were removed are still held by views that were interrupted"


@pytest.fixture
def stopped(daemon: DaemonProcess):
    """Stops the daemon until the test lets it go on."""
    os.kill(daemon.pid, signal.SIGSTOP)
    yield lambda: os.kill(daemon.pid, signal.SIGCONT)
    os.kill(daemon.pid, signal.SIGCONT)


@pytest.fixture
def client(daemon: DaemonProcess, namespace: str):
    """A client over the socket: every operation waits for the daemon."""
    with daemon.connect(namespace=namespace, timeout=0.4, mapped=False) as client:
        client.put(key(1), b"x" * 200_000)
        yield client


@pytest.fixture
def mapped(daemon: DaemonProcess, namespace: str):
    """A mapped client that was lent slots of 200,000 bytes."""
    with daemon.connect(namespace=namespace, timeout=0.4, mapped=True) as client:
        client.put(key(1), b"x" * 200_000)
        yield client


def test_mapped_client_of_a_stopped_daemon_reads_on_and_ends_the_rest_in_time(
    mapped: Client, stopped: Callable[[], None]
):
    out = bytearray(200_000)
    assert mapped.get_into(key(1), out) == 200_000
    assert out == b"x" * 200_000
    assert mapped.get(key(1)) == b"x" * 200_000
    assert mapped.get_into(key(9), out) is None
    assert len(mapped.match([key(1), key(9)])) == 1
    with mapped.view(key(1)) as view:
        assert view == b"x" * 200_000
    assert mapped.put(key(2), b"y" * 200_000, wait=False) is PutStatus.PENDING
    operations: list[Callable[[], object]] = [
        mapped.ping,
        lambda: mapped.put(key(3), b"z" * 200_000),
        lambda: mapped.put(key(4), b"of a size that it has no lane for"),
        lambda: mapped.put(key(4), b"of a size that it has no lane for", wait=False),
        # Its own put is not published yet, so a miss may not be one.
        lambda: mapped.get(key(2)),
        lambda: mapped.match([key(1)], lease=5),
        lambda: mapped.exists([key(1)]),
        mapped.flush,
        mapped.stats,
    ]
    for operation in operations:
        begin = time.monotonic()
        with pytest.raises(DeadlineExceeded, match=r"did not answer in time \(timeout 0\.4 s\)"):
            operation()
        assert 0.3 < time.monotonic() - begin < 1.0
    stopped()
    wait_until(lambda: answers(mapped))
    assert mapped.get(key(2)) == b"y" * 200_000
    # What was committed before its client gave up is there; what was not is not.
    assert mapped.get(key(3)) == b"z" * 200_000
    assert mapped.exists([key(4)]) == [False]
    assert mapped.flush().stored == 1
    mapped.timeout = 5.0
    wait_until_nothing_is_lent(mapped.stats)
    mapped.clear()


def test_mapped_client_of_a_stopped_daemon_closes_soon(mapped: Client, stopped: Callable[[], None]):
    assert mapped.put(key(2), b"y" * 200_000, wait=False) is PutStatus.PENDING
    begin = time.monotonic()
    mapped.close()
    assert time.monotonic() - begin < 1.5


def test_operation_ends_within_its_timeout_and_the_client_recovers(client: Client, stopped: Callable[[], None]):
    operations: list[Callable[[], object]] = [
        client.ping,
        lambda: client.get(key(1)),
        lambda: client.get_into(key(1), bytearray(200_000)),
        lambda: client.put(key(2), b"y" * 200_000),
        lambda: client.match([key(1)], lease=5),
        lambda: client.exists([key(1)]),
        client.flush,
        client.stats,
        lambda: client.verify(timeout=0.4),
    ]
    for operation in operations:
        begin = time.monotonic()
        with pytest.raises(DeadlineExceeded, match=r"did not answer in time \(timeout 0\.4 s\)"):
            operation()
        assert 0.3 < time.monotonic() - begin < 1.0
    stopped()
    wait_until(lambda: answers(client))
    assert client.get(key(1)) == b"x" * 200_000
    assert client.put(key(3), b"z") is PutStatus.STORED
    assert client.exists([key(2)]) == [False], "a put whose client had given up was carried out"


def answers(client: Client) -> bool:
    try:
        client.ping()
    except DeadlineExceeded:
        return False
    return True


def test_put_without_wait_to_a_stopped_daemon_waits_no_longer_than_the_timeout(
    daemon: DaemonProcess, namespace: str, stopped: Callable[[], None]
):
    stopped()
    with daemon.connect(namespace=namespace, timeout=1.0, mapped=False) as client:
        os.kill(daemon.pid, signal.SIGSTOP)
        begin = time.monotonic()
        with pytest.raises(DeadlineExceeded):  # noqa: PT012 - which of them waits is the daemon's business
            for number in range(1, 200):
                client.put(key(number), bytes(1_000_000), wait=False)
        assert time.monotonic() - begin < 3.0
        stopped()
        wait_until(lambda: answers(client))
        done = client.flush()
        assert done.stored + done.throttled + done.lost > 60
        client.clear()


def test_close_of_a_client_of_a_stopped_daemon_ends_soon(client: Client, stopped: Callable[[], None]):
    client.put(key(2), b"x", wait=False)
    begin = time.monotonic()
    client.close()
    assert time.monotonic() - begin < 1.5


def test_second_thread_is_told_that_the_client_is_busy(client: Client, stopped: Callable[[], None]):
    client.timeout = 2.0

    def ping() -> None:
        with pytest.raises(DeadlineExceeded):
            client.ping()

    thread = threading.Thread(target=ping)
    thread.start()
    time.sleep(0.2)
    client.timeout = 0.3
    with pytest.raises(DeadlineExceeded, match=r"another thread kept this client for 0\.3 s; use one client a thread"):
        client.ping()
    thread.join()


def test_mutated_buffer_of_a_put_that_timed_out_is_never_stored(client: Client, stopped: Callable[[], None]):
    """Over the socket libzmq may send the buffer later than its owner thinks: the checksum decides."""
    buffer = bytearray(b"a" * 1_000_000)
    with pytest.raises(DeadlineExceeded):
        client.put(key(5), buffer)
    buffer[:] = b"b" * 1_000_000
    stopped()
    wait_until(lambda: answers(client))
    assert client.get(key(5)) in (None, b"a" * 1_000_000)


# ------------------------------------------------------------------ what it loads


LOADED = """
import sys
from kvstore_client import Client
key = bytes(31) + b"1"
with Client(sys.argv[1], namespace="loaded", mapped=None if sys.argv[2] == "None" else False) as client:
    client.put(key, b"x" * 1000)
    client.put(key, b"x" * 1000, wait=False)
    assert client.get_into(key, bytearray(1000)) == 1000
    with client.view(key) as view:
        assert view == b"x" * 1000
    assert len(client.match([key])) == 1
    client.flush()
    client.clear()
    mapped = client.mapped
print(mapped, sorted({"numba", "llvmlite", "numpy", "torch"} & set(sys.modules)))
"""


def test_client_over_the_socket_loads_no_compiler(daemon: DaemonProcess):
    """Compiling the readers takes seconds on a machine's first use: only who maps pays for it."""
    with script(LOADED, daemon.endpoint, "False") as process:
        assert read_line(process) == "False []"
    with script(LOADED, daemon.endpoint, "None") as process:
        assert read_line(process) == "True ['llvmlite', 'numba', 'numpy']"


# ------------------------------------------------------------------ the end


def test_closed_client_says_so(daemon: DaemonProcess):
    client = daemon.connect()
    client.close()
    client.close()
    operations: list[Callable[[], object]] = [
        client.ping,
        client.flush,
        lambda: client.get(key(1)),
        lambda: client.put(key(1), b"x"),
        lambda: client.put(key(1), b"x", wait=False),
    ]
    for operation in operations:
        with pytest.raises(ConnectionLost, match="this client is closed; make a new one"):
            operation()


def test_close_in_another_thread_waits_for_the_operation_under_way(daemon: DaemonProcess, namespace: str):
    for _ in range(20):
        client = daemon.connect(namespace=namespace)
        outcomes: list[object] = []

        def work(client: Client = client, outcomes: list[object] = outcomes) -> None:
            try:
                while True:
                    client.ping()
            except KVStoreError as error:
                outcomes.append(error)

        thread = threading.Thread(target=work)
        thread.start()
        time.sleep(0.005)
        client.close()
        thread.join(5)
        assert isinstance(outcomes[0], ConnectionLost)


def test_closed_clients_end_their_sessions_at_once(daemon: DaemonProcess, namespace: str):
    with daemon.connect(namespace=namespace) as watching:
        # A client that an earlier test left without a goodbye would end its session, as a death, during this one.
        wait_until(lambda: len(watching.stats().sessions) == 1)
        before = watching.stats()
        for _ in range(100):
            with daemon.connect(namespace=namespace):
                pass
        wait_until(lambda: len(watching.stats().sessions) == 1, 0.5)
        after = watching.stats()
        assert after.server.sessions_opened - before.server.sessions_opened == 100
        assert after.server.sessions_died == before.server.sessions_died


# As an error the warning would be raised in ``__del__``, and pytest, which keeps it, would keep the client alive.
@pytest.mark.filterwarnings("ignore:unclosed Client:ResourceWarning")
def test_forgotten_client_is_collected_without_hanging(daemon: DaemonProcess, namespace: str):
    with daemon.connect(namespace=namespace) as watching:
        client = daemon.connect(namespace=namespace)
        number = client._session.number
        assert number in [session.session for session in watching.stats().sessions]
        begin = time.monotonic()
        del client
        gc.collect()
        assert time.monotonic() - begin < 1.0
        # By its own number: sessions of others, of killed children say, end meanwhile.
        wait_until(lambda: number not in [session.session for session in watching.stats().sessions], 5)


def test_release_of_a_lease_from_before_a_restart_does_not_end_another(daemon: DaemonProcess, namespace: str):
    with DaemonProcess() as daemon, daemon.connect() as client:
        client.put(key(1), b"x")
        old = client.match([key(1)], lease=30)
        daemon.restart()
        client.put(key(1), b"x")
        new = client.match([key(1)], lease=30)
        old.release()
        assert client.stats().leases == 1
        new.release()
        assert client.stats().leases == 0


def test_too_many_leases_of_one_client_are_throttled(daemon: DaemonProcess, namespace: str):
    with daemon.connect(namespace=namespace) as client:
        client.put(key(1), b"x")
        leases = [client.match([key(1)], lease=30) for _ in range(4096)]
        with pytest.raises(Throttled, match="too many leases"):
            client.match([key(1)], lease=30)
        leases[0].release()
        assert client.match([key(1)], lease=30).lease
        assert client.stats().leases == 4096
    with daemon.connect(namespace=namespace) as client:
        wait_until(lambda: client.stats().leases == 0, 3)


def test_arguments_of_a_client_are_checked(daemon: DaemonProcess):
    wrong: list[tuple[dict[str, object], str]] = [
        ({"timeout": 0}, "timeout must be a positive number of seconds, got 0"),
        ({"timeout": -1}, "timeout"),
        ({"timeout": float("nan")}, "timeout"),
        ({"timeout": True}, "timeout"),
        ({"timeout": "5"}, "timeout"),
        ({"mapped": "yes"}, "mapped must be None, True or False, got 'yes'"),
        ({"mapped": 2}, "mapped must be None, True or False, got 2"),
        ({"payload_bytes": [0]}, "payload_bytes takes up to 64 positive sizes"),
        ({"payload_bytes": [1] * 65}, "payload_bytes"),
        ({"namespace": ""}, "namespace name must not be empty"),
        ({"namespace": {"nmae": "x"}}, "unknown namespace option 'nmae'; known are name, model"),
        ({"namespace": {"name": "x", "parts": 0}}, "namespace parts must be 1 to 4096, got 0"),
        ({"namespace": {"name": "x", "codec": "zip"}}, "unknown codec 'zip'"),
        ({"namespace": 5}, "namespace must be a name"),
    ]
    for options, message in wrong:
        with pytest.raises(InvalidArgument, match=message.replace("(", r"\(")):
            Client(daemon.endpoint, **options)
