"""The daemon ends or starts again under its clients: they hear of it at once, and nothing stays behind."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack

import pytest
from client_adapter import CLIENTS, AnyClient
from daemon_process import DaemonProcess, read_line, script, wait_until

from kvstore_client import ConnectionLost, DaemonUnavailable, KVStoreError, PutStatus

ENDS = [signal.SIGTERM, signal.SIGKILL]
PRESENT = (PutStatus.STORED, PutStatus.EXISTS)


def key(number: int) -> bytes:
    return number.to_bytes(4, "big") * 8


def end(daemon: DaemonProcess, number: signal.Signals) -> None:
    if number is signal.SIGKILL:
        daemon.kill()
    else:
        assert daemon.terminate() == 0


OPERATIONS: list[Callable[[AnyClient], object]] = [
    lambda client: client.ping(),
    lambda client: client.get(key(1)),
    lambda client: client.get_into(key(1), bytearray(10)),
    lambda client: client.put(key(2), b"x"),
    lambda client: client.put(key(2), b"x", wait=False),
    lambda client: client.put_many([key(2), key(3)], [b"x", b"y"]),
    lambda client: client.match([key(1)], lease=5),
    lambda client: client.exists([key(1)]),
    lambda client: client.remove([key(1)]),
    lambda client: client.clear(),
    lambda client: client.invalidate(),
    lambda client: client.flush(),
    lambda client: client.prefetch([key(1)]),
    lambda client: client.stats(),
    lambda client: client.verify(),
]


@pytest.fixture
def clients(kind: str, stack: ExitStack) -> Callable[[DaemonProcess], list[AnyClient]]:
    """Makes a client for each operation, each in a namespace of its own."""

    def make(daemon: DaemonProcess) -> list[AnyClient]:
        return [
            stack.enter_context(CLIENTS[kind](daemon.endpoint, namespace=f"own-{number}", timeout=10.0))
            for number in range(len(OPERATIONS))
        ]

    return make


INVALIDATE = 10


@pytest.mark.parametrize("number", ENDS)
def test_operations_after_the_daemons_end_fail_at_once_and_work_after_its_return(
    clients: Callable[[DaemonProcess], list[AnyClient]], number: signal.Signals
):
    with DaemonProcess() as daemon:
        made = clients(daemon)
        for client in made:
            client.put(key(1), b"before")
        incarnation = made[0].incarnation
        end(daemon, number)
        if number is signal.SIGKILL:
            # Nobody tells a mapped client: it reads what was there until it finds out by itself, within a second.
            with contextlib.suppress(DaemonUnavailable):
                assert made[0].get(key(1)) == b"before"
            wait_until(lambda: not any(client.mapped for client in made), 1.5)
        for client, operation in zip(made, OPERATIONS, strict=True):
            for _ in range(2):
                begin = time.monotonic()
                with pytest.raises(DaemonUnavailable, match="no daemon at .*kvstore serve --endpoint"):
                    operation(client)
                assert time.monotonic() - begin < 1.0
        daemon.start()
        for client, operation in zip(made, OPERATIONS, strict=True):
            operation(client)
            assert client.incarnation != incarnation
            client.clear()
            assert client.put(key(1), b"after") is PutStatus.STORED
            assert client.get(key(1)) == b"after"
        assert [client.generation for client in made].index(1) == INVALIDATE


@pytest.mark.parametrize("number", ENDS)
def test_restarted_daemon_is_used_without_an_error(
    clients: Callable[[DaemonProcess], list[AnyClient]], number: signal.Signals
):
    with DaemonProcess() as daemon:
        made = clients(daemon)
        for client in made:
            client.put(key(1), b"before")
        end(daemon, number)
        daemon.start()
        for client, operation in zip(made, OPERATIONS, strict=True):
            operation(client)
        assert made[0].get(key(1)) is None
        assert [client.generation for client in made].index(1) == INVALIDATE


def test_invalidate_by_a_client_that_was_stale_before_a_restart_leaves_its_generation(kind: str, stack: ExitStack):
    """The new daemon knows of no later generation, so joining its current one would not be enough."""
    with DaemonProcess() as daemon:
        new, old, other = (stack.enter_context(CLIENTS[kind](daemon.endpoint, timeout=10.0)) for _ in range(3))
        new.invalidate()
        daemon.restart()
        new.ping()
        assert old.put(key(1), b"x") is PutStatus.REJECTED
        assert old.stale
        daemon.restart()
        assert other.put(key(1), b"old weights") is PutStatus.STORED
        old.invalidate()
        assert old.generation == 1
        assert old.get(key(1)) is None
        assert other.get(key(1)) is None


def test_puts_that_the_daemon_took_with_it_are_counted_as_lost(kind: str):
    with DaemonProcess() as daemon, CLIENTS[kind](daemon.endpoint, timeout=10.0) as client:
        # A mapped client is lent slots of this size from now on, and needs nobody to write into them.
        client.put(key(99), bytes(1000))
        os.kill(daemon.pid, signal.SIGSTOP)
        for number in range(1, 11):
            assert client.put(key(number), bytes(1000), wait=False) is PutStatus.PENDING
        daemon.kill()
        daemon.start()
        done = client.flush()
        assert (done.lost, done.stored) == (10, 0)
        assert client.flush().lost == 0


def test_generation_survives_the_daemons_restart(kind: str, stack: ExitStack):
    """Blocks of weights that a client gave up do not come back through a daemon that forgot the generation."""
    with DaemonProcess() as daemon:
        new, old = (stack.enter_context(CLIENTS[kind](daemon.endpoint, timeout=10.0)) for _ in range(2))
        old.put(key(1), b"old weights")
        new.invalidate()
        daemon.restart()
        assert new.put(key(1), b"new weights") is PutStatus.STORED
        assert new.generation == 1
        assert old.get(key(1)) is None
        assert old.stale
        assert old.put(key(1), b"old weights") is PutStatus.REJECTED
        assert new.get(key(1)) == b"new weights"
        old.invalidate()
        assert (old.generation, old.stale) == (1, False)
        assert old.get(key(1)) == b"new weights"
        daemon.restart()
        assert old.put(key(2), b"old first") is PutStatus.STORED
        assert new.get(key(2)) == b"old first"


@pytest.mark.parametrize("number", ENDS)
def test_daemon_that_ends_under_busy_clients_leaves_them_with_clear_errors_and_right_bytes(number: signal.Signals):
    with DaemonProcess() as daemon:
        outcomes: list[BaseException] = []
        wrong: list[int] = []
        waited: list[float] = []
        stop = threading.Event()

        def work(index: int) -> None:
            payload = bytes([index]) * 70_000
            client: AnyClient | None = None
            while not stop.is_set():
                begin = time.monotonic()
                try:
                    if client is None:
                        client = daemon.connect(namespace="busy", timeout=10.0)
                    client.put(key(index), payload, wait=index % 2 == 0)
                    if client.get(key(index)) not in (payload, None):
                        wrong.append(index)
                    client.match([key(index)], lease=1.0)
                except KVStoreError as error:
                    outcomes.append(error)
                    time.sleep(0.02)
                except BaseException as error:
                    outcomes.append(error)
                    raise
                waited.append(time.monotonic() - begin)
            if client is not None:
                client.close()

        threads = [threading.Thread(target=work, args=(index,)) for index in range(1, 9)]
        for thread in threads:
            thread.start()
        for _ in range(4):
            time.sleep(0.3)
            begin = time.monotonic()
            end(daemon, number)
            assert time.monotonic() - begin < 3.0
            if number is signal.SIGTERM:
                assert daemon.files() == []
            time.sleep(0.1)
            daemon.start()
        time.sleep(0.3)
        stop.set()
        for thread in threads:
            thread.join()
        assert not wrong
        assert len(outcomes) >= 8
        assert {type(error) for error in outcomes} <= {DaemonUnavailable, ConnectionLost}
        assert max(waited) < 3.0


def test_files_of_a_killed_daemon_are_removed_by_the_next():
    with DaemonProcess() as daemon:
        client = daemon.connect()
        client.put(key(1), b"x" * 100_000)
        arena = next(daemon.arena_directory.glob("arena-*"))
        session = next(daemon.arena_directory.glob("client-*"))
        with open(arena, "rb") as mapped:
            daemon.kill()
            assert arena.exists()
            assert session.exists()
            daemon.start()
            assert not arena.exists()
            assert not session.exists()
            assert any(event["event"] == "removed_stale_arena" for event in daemon.events())
            # Whoever still maps the old arena reads in its header that it is over.
            mapped.seek(12)
            assert int.from_bytes(mapped.read(4), "little") == 2
        assert len(list(daemon.arena_directory.glob("arena-*"))) == 1
        assert client.get(key(1)) is None
        client.close()


def test_daemon_starts_again_and_again_and_leaves_nothing():
    with DaemonProcess(capacity="8MiB", grant="1MiB") as daemon:
        for number in range(4):
            with daemon.connect() as client:
                client.put(key(1), b"x")
            if number % 2:
                assert daemon.terminate() == 0
                assert daemon.files() == []
            else:
                daemon.kill()
            daemon.start()


def test_term_while_memory_is_populated_ends_at_once():
    daemon = DaemonProcess(capacity="1GiB", grant="64MiB")
    try:
        daemon.start(populated=False)
        begin = time.monotonic()
        assert daemon.terminate() == 0
        assert time.monotonic() - begin < 2.0
        assert daemon.files() == []
        assert daemon.errors() == []
    finally:
        daemon._remove()


def test_term_at_any_moment_of_the_start_leaves_nothing():
    for delay_s in (0.15, 0.3, 0.4, 0.45, 0.5, 0.55, 0.6, 0.7):
        daemon = DaemonProcess(capacity="64MiB")
        try:
            process = daemon.spawn()
            time.sleep(delay_s)
            process.send_signal(signal.SIGTERM)
            status = process.wait(10)
            assert status in (0, -signal.SIGTERM, 1, 130, 143), daemon.log()
            assert daemon.files() == [], f"after {delay_s} s: {daemon.log()}"
            assert "Traceback" not in daemon.log()
        finally:
            daemon._remove()


def test_second_term_ends_the_daemon_at_once_and_the_next_one_cleans_up():
    with DaemonProcess() as daemon:
        os.kill(daemon.pid, signal.SIGSTOP)
        os.kill(daemon.pid, signal.SIGTERM)
        os.kill(daemon.pid, signal.SIGINT)
        os.kill(daemon.pid, signal.SIGCONT)
        assert daemon.process is not None
        assert daemon.process.wait(5) in (0, 128 + signal.SIGINT, 128 + signal.SIGTERM)
        daemon.start()


def test_term_during_a_verification_answers_it_and_ends():
    with DaemonProcess(capacity="256MiB", grant="64MiB") as daemon, daemon.connect(timeout=20.0) as client:
        for number in range(1, 200):
            client.put(key(number), bytes([number]) * 1_000_000)
        outcomes: list[object] = []

        def verify() -> None:
            with daemon.connect(timeout=20.0) as other:
                begin = time.monotonic()
                try:
                    outcomes.append(other.verify().problems)
                except KVStoreError as error:
                    outcomes.append(error)
                outcomes.append(time.monotonic() - begin)

        thread = threading.Thread(target=verify)
        thread.start()
        time.sleep(0.03)
        assert daemon.terminate() == 0
        thread.join(5)
        assert outcomes[0] == [] or isinstance(outcomes[0], DaemonUnavailable)
        daemon.start()


def test_parent_that_dies_takes_its_daemon_with_it():
    """What the tests rely on: no daemon outlives them."""
    with DaemonProcess() as daemon:
        source = (
            "import os, subprocess, sys, time\n"
            "child = subprocess.Popen([sys.executable, '-P', '-m', 'kvstore', 'serve', '--endpoint', sys.argv[1], "
            "'--http', 'off', '--capacity', '8MiB', '--parent-pid', str(os.getpid())], stderr=subprocess.DEVNULL)\n"
            "print(child.pid, flush=True)\n"
            "time.sleep(60)\n"
        )
        endpoint = f"ipc://{daemon.directory}/child.sock"
        with script(source, endpoint) as process:
            pid = int(read_line(process))
            wait_until((daemon.directory / "child.sock").exists)
            process.kill()
            process.wait()

        def gone() -> bool:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, 0)
                return False
            return True

        wait_until(gone, 5)
        assert not (daemon.directory / "child.sock").exists()
