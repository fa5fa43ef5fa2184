from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
import zmq

from kvstore.cli import render
from kvstore.cli.bench.echo import echo_server
from kvstore.cli.bench.idle import cpu_seconds, parse_stat
from kvstore.cli.bench.machine import MachineFacts, cpu_model, machine_facts
from kvstore.cli.bench.process import READY, ChildProcess
from kvstore.cli.bench.report import Report, Row, percentile, table_of
from kvstore.cli.bench.wire import DaemonSession, Wire
from kvstore.errors import DaemonUnavailable, DeadlineExceeded, ErrorCode, RemoteError
from kvstore.protocol.framing import decode_request, encode
from kvstore.protocol.messages import Attach, Attached, Bye, Done, ErrorReply, Hello, Ping, Welcome
from kvstore.protocol.namespace import Namespace

MACHINE = MachineFacts(
    cpu="Fast CPU",
    cores=2,
    memory_bytes=1 << 30,
    kernel="Linux 6",
    python="3.11.7",
    pyzmq="27",
    libzmq="4.3.5",
    msgspec="0.20",
    uvloop="",
    load_average=(0.5, 0.25, 0.0),
)


@pytest.fixture
def context() -> Iterator[zmq.Context[zmq.Socket[bytes]]]:
    made: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    yield made
    made.term()


# ------------------------------------------------------------------ rows, reports, facts


def test_row_fields_that_do_not_apply_are_absent() -> None:
    encoded = msgspec.json.decode(msgspec.json.encode(Row(op="ping", batch=0, ratio=0.5, limit=0.7)))
    assert encoded == {"op": "ping", "batch": 0, "ratio": 0.5, "limit": 0.7}


@pytest.mark.parametrize(
    ("row", "within"),
    [
        (Row(op="a", batch=1), True),
        (Row(op="a", batch=1, ratio=0.7, limit=0.7), True),
        (Row(op="a", batch=1, ratio=0.69, limit=0.7), False),
        (Row(op="a", batch=1, limit=0.7), False),
        (Row(op="idle", batch=16, core_share=0.01, limit=0.01), True),
        (Row(op="idle", batch=16, core_share=0.011, limit=0.01), False),
    ],
)
def test_row_limit_is_the_least_ratio_or_the_most_share(row: Row, within: bool) -> None:
    assert row.within_limit is within


def test_percentile_is_the_nearest_rank() -> None:
    values = list(range(100))
    assert percentile(values, 0.99) == 99
    assert percentile(values, 0.5) == 50
    assert percentile([7], 0.99) == 7
    with pytest.raises(ValueError, match="no values"):
        percentile([], 0.5)


def test_table_shows_rows_limits_and_the_machine(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    rows = [
        Row(
            op="ping",
            batch=0,
            median_us=150.0,
            p99_us=900.0,
            ops_per_s=6666,
            baseline_median_us=120,
            ratio=0.8,
            limit=0.67,
        ),
        Row(op="match", batch=1, depth=32, ops_per_s=20000.0, baseline_ops_per_s=80000.0, ratio=0.25, limit=0.5),
        Row(op="idle", batch=16, seconds=60.0, core_share=0.004, limit=0.01),
    ]
    render.console().print(table_of(Report(machine=MACHINE, baseline="an echo", rows=rows), "Control path"))
    shown = capsys.readouterr().out
    assert "150 us" in shown
    assert "match 1 key, 32 at once" in shown
    assert "…" not in shown
    assert "80,000" in shown
    assert "MISSED" in shown
    assert "0.4 % of a core, 16 clients and the daemon over" in shown
    assert "Fast CPU, 2 cores, 1.0 GiB" in shown
    assert "0.50 0.25 0.00" in shown


def test_machine_facts_are_of_this_machine() -> None:
    facts = machine_facts()
    assert facts.cores == len(os.sched_getaffinity(0))
    assert facts.libzmq == zmq.zmq_version()
    assert facts.memory_bytes > 1 << 20
    assert facts.cpu


def test_cpu_model_is_read_or_empty() -> None:
    assert cpu_model(["processor : 0\n", "model name\t: A Chip @ 3: GHz\n"]) == "A Chip @ 3: GHz"
    assert cpu_model(["processor : 0\n", "model name :\n"]) == ""


# ------------------------------------------------------------------ cpu time


def test_parse_stat_name_with_brackets_and_spaces_is_skipped() -> None:
    fields = ["S", *["0"] * 10, "12", "30", *["0"] * 20]
    assert parse_stat(f"77 (a) b (c) {' '.join(fields)}\n") == 42


def test_cpu_seconds_grow_with_work_of_all_threads() -> None:
    before = cpu_seconds([os.getpid()])

    def work() -> None:
        end = time.thread_time() + 0.15
        while time.thread_time() < end:
            pass

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert cpu_seconds([os.getpid()]) - before >= 0.1


def test_cpu_seconds_of_a_process_that_is_gone_names_it() -> None:
    with pytest.raises(DaemonUnavailable, match="process 4194305 ended"):
        cpu_seconds([4194305])


# ------------------------------------------------------------------ children


def child(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str) -> ChildProcess:
    (tmp_path / "bench_child.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    return ChildProcess("the child", "bench_child")


def test_child_ends_with_its_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_leaks: None) -> None:
    with child(tmp_path, monkeypatch, f"import sys\nprint({READY!r}, flush=True)\nsys.stdin.read()\n") as started:
        started.wait_until_ready(time.monotonic() + 30)
        assert Path(f"/proc/{started.pid}").exists()
    assert not Path(f"/proc/{started.pid}").exists()


def test_child_that_reports_a_problem_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with (
        child(tmp_path, monkeypatch, "print('no daemon there')\n") as started,
        pytest.raises(DaemonUnavailable, match="the child did not start: no daemon there"),
    ):
        started.wait_until_ready(time.monotonic() + 30)


def test_child_that_ends_at_once_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with (
        child(tmp_path, monkeypatch, "") as started,
        pytest.raises(DaemonUnavailable, match="the child did not start: its process ended"),
    ):
        started.wait_until_ready(time.monotonic() + 30)


def test_child_that_says_nothing_in_time_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with (
        child(tmp_path, monkeypatch, "import sys\nsys.stdin.read()\n") as started,
        pytest.raises(DaemonUnavailable, match="the child was not ready in time"),
    ):
        started.wait_until_ready(time.monotonic() + 0.05)


ECHO = f"""
import sys
print({READY!r}, flush=True)
for line in sys.stdin:
    if line.strip() == "end":
        break
    if line.strip() != "nothing":
        print("heard " + line.strip(), flush=True)
"""


def test_child_answers_what_it_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_leaks: None) -> None:
    with child(tmp_path, monkeypatch, ECHO) as started:
        started.wait_until_ready(time.monotonic() + 30)
        assert not started.has_answer()
        for word in ("one", "two"):
            started.tell(word)
            assert started.has_answer(30)
            assert started.answer(time.monotonic() + 30) == f"heard {word}"
        started.tell("nothing")
        with pytest.raises(DeadlineExceeded, match="the child did not answer in time"):
            started.answer(time.monotonic() + 0.05)


def test_child_that_ends_when_it_is_asked_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with child(tmp_path, monkeypatch, ECHO) as started:
        started.wait_until_ready(time.monotonic() + 30)
        started.tell("end")
        with pytest.raises(DaemonUnavailable, match="the child ended while it was asked"):
            started.answer(time.monotonic() + 30)
        started._process.wait(30)
        with pytest.raises(DaemonUnavailable, match="the child ended: it said nothing"):
            started.tell("more")


# ------------------------------------------------------------------ the loop


def test_wire_and_echo_give_back_what_was_sent(no_leaks: None, context: zmq.Context[zmq.Socket[bytes]]) -> None:
    with echo_server() as endpoint, Wire(context, endpoint, "the echo") as wire:
        assert wire.exchange(b"some frame") == b"some frame"
        times = wire.round_trips(b"x" * 100, 20)
        assert len(times) == 20
        assert all(time_ns > 0 for time_ns in times)
        assert wire.pipelined([bytes([index]) for index in range(32)], 500) > 0
        assert wire.exchange(b"the window left nothing behind") == b"the window left nothing behind"


def test_wire_silent_server_ends_in_an_error_that_names_it(
    context: zmq.Context[zmq.Socket[bytes]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvstore.cli.bench.wire._DEADLINE_MS", 50)
    endpoint = f"ipc://{tmp_path / 'silent.sock'}"
    with context.socket(zmq.ROUTER) as silent:
        silent.bind(endpoint)
        with Wire(context, endpoint, "the daemon") as wire:
            for call in (
                lambda: wire.exchange(b"a"),
                lambda: wire.round_trips(b"a", 1),
                lambda: wire.pipelined([b"a"], 2),
            ):
                with pytest.raises(DeadlineExceeded, match=f"the daemon at {endpoint} did not answer"):
                    call()


class FakeDaemon(threading.Thread):
    """Answers the greeting; pings with what it was told to."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], endpoint: str, ping_code: int = 0) -> None:
        super().__init__()
        self._socket = context.socket(zmq.ROUTER)
        self._socket.bind(endpoint)
        self._ping_code = ping_code
        self.seen: list[str] = []

    def run(self) -> None:
        with self._socket as socket:
            while True:
                route, frame = socket.recv_multipart()
                request = decode_request(frame)
                self.seen.append(type(request).__name__)
                match request:
                    case Hello():
                        assert request.session == 0
                        reply = Welcome(request.id, 7, 1, 42, "0", 1 << 20)
                    case Attach():
                        assert request.session == 42
                        reply = Attached(request.id, 7, 3, 0, bytes(32))
                    case Ping() if self._ping_code:
                        reply = ErrorReply(request.id, 7, self._ping_code, "not today")
                    case Ping():
                        assert request.namespace_id == 3
                        reply = Done(request.id, 7)
                    case Bye():
                        return
                    case _:
                        raise AssertionError(request)
                socket.send_multipart([route, encode(reply)])


def test_session_greets_asks_and_says_bye(context: zmq.Context[zmq.Socket[bytes]], tmp_path: Path) -> None:
    endpoint = f"ipc://{tmp_path / 'fake.sock'}"
    fake = FakeDaemon(context, endpoint)
    fake.start()
    with DaemonSession(context, endpoint, Namespace(name="x")) as session:
        assert isinstance(session.ask(Ping(*session.envelope()), Done), Done)
        with pytest.raises(RemoteError, match="answered Done 4, not Welcome 4"):
            session.ask(Ping(*session.envelope()), Welcome)
        first, second = session.envelope(), session.envelope()
        assert first[0] != second[0]
        assert first[1:3] == (42, 3)
    fake.join(10)
    assert fake.seen == ["Hello", "Attach", "Ping", "Ping", "Bye"]


def test_session_error_reply_is_raised_with_its_code(context: zmq.Context[zmq.Socket[bytes]], tmp_path: Path) -> None:
    endpoint = f"ipc://{tmp_path / 'fake.sock'}"
    fake = FakeDaemon(context, endpoint, ErrorCode.INTERNAL)
    fake.start()
    with (
        DaemonSession(context, endpoint, Namespace()) as session,
        pytest.raises(RemoteError, match="not today") as raised,
    ):
        session.ask(Ping(*session.envelope()), Done)
    fake.join(10)
    assert raised.value.code is ErrorCode.INTERNAL
