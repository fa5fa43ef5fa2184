"""``kvstore top`` on live daemons, without a terminal: what is on the screen, keys, sizes, and daemons that go away."""

from __future__ import annotations

import asyncio
import os
import pty
import re
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from hashlib import sha256
from typing import Any

import pytest
from daemon_process import MIB, DaemonProcess, child_environment
from textual.pilot import Pilot

from kvstore.cli.top.app import TopApp
from kvstore.cli.top.lines_widget import LinesWidget
from kvstore.cli.top.panel_widget import PanelWidget
from kvstore.cli.top.registry import ABOVE, DECK
from kvstore.policy.registry import POLICIES
from kvstore_client import Client

QUICK_S = 0.1


@pytest.fixture(scope="module")
def watched() -> Iterator[DaemonProcess]:
    """A daemon with some blocks."""
    with DaemonProcess(capacity="16MiB", grant="8MiB") as daemon:
        put_some(daemon.endpoint)
        yield daemon


def put_some(endpoint: str, blocks: int = 32) -> None:
    keys = [sha256(b"%d" % number).digest() for number in range(blocks)]
    with Client(endpoint, namespace="watched", mapped=False) as client:
        client.put_many(keys, [bytes(4096)] * blocks)
        assert len(client.match(keys)) == blocks


def configure(endpoint: str, policy: str) -> None:
    with Client(endpoint, mapped=False) as client:
        client.configure(policy=policy)


@asynccontextmanager
async def top(endpoint: str, size: tuple[int, int] = (120, 60), **options: Any) -> AsyncIterator[Pilot[None]]:
    app = TopApp(endpoint, interval_s=QUICK_S, **options)
    async with app.run_test(size=size) as pilot:
        yield pilot


async def until(pilot: Pilot[None], condition: Callable[[], object], timeout_s: float = 10.0) -> None:
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end, f"not on the screen after {timeout_s:g} s:\n{screen(pilot)}"
        await pilot.pause(0.02)


def screen(pilot: Pilot[None]) -> str:
    """The screen as text."""
    return "\n".join(strip.text for strip in pilot.app.screen._compositor.render_strips())


def lines(pilot: Pilot[None], name: str) -> str:
    return "\n".join(one.plain for one in pilot.app.query_one(f"#{name}", LinesWidget).lines)


def number_of(panel: str) -> str:
    """The key of a panel."""
    names = [one.name for one in (*ABOVE, *DECK)]
    return str((names.index(panel) + 1) % 10)


def focused(pilot: Pilot[None]) -> str:
    widget = pilot.app.focused
    return widget.panel.name if isinstance(widget, PanelWidget) else ""


async def test_first_frame_shows_what_the_daemon_holds(watched: DaemonProcess) -> None:
    async with top(watched.endpoint) as pilot:
        await until(pilot, lambda: "watched" in screen(pilot))
        shown = screen(pilot)
        for title in ("1 Hit rate", "2 Traffic", "3 Tiers", "Policy", "Clients", "Namespaces", "q quit"):
            assert title in shown
        assert "● live" in shown
        assert "policy lru" in shown
        assert "SSD" not in lines(pilot, "tiers"), "it has no such tier"
        assert not pilot.app.query_one("#ssd").display


async def test_load_shows_as_rates(watched: DaemonProcess) -> None:
    async with top(watched.endpoint) as pilot:
        await until(pilot, lambda: "0 MB/s" in lines(pilot, "traffic"))
        assert "█" not in lines(pilot, "hits").splitlines()[-2], "a chart of nothing"
        await asyncio.to_thread(put_some, watched.endpoint)
        await until(pilot, lambda: "█" in lines(pilot, "hits").splitlines()[-2])
        assert "100.0 %" in lines(pilot, "hits")


@pytest.mark.parametrize("size", [(80, 24), (200, 60), (60, 16), (40, 8)])
async def test_resized_terminal_is_filled_again(watched: DaemonProcess, size: tuple[int, int]) -> None:
    async with top(watched.endpoint) as pilot:
        await until(pilot, lambda: "watched" in screen(pilot))
        await pilot.resize_terminal(*size)
        await until(pilot, lambda: len(screen(pilot).splitlines()) == size[1] and "╰" in screen(pilot).splitlines()[-2])
        rows = screen(pilot).splitlines()
        assert {len(row) for row in rows} == {size[0]}
        assert "Hit rate" in rows[1]
        assert "quit" in rows[-1]
        if size == (80, 24):
            await pilot.press(number_of("namespaces"))
            await until(pilot, lambda: "watched" in screen(pilot))
            assert "100.0 %" in screen(pilot), "the table of a page of its own is whole"


async def test_keys_move_sort_filter_zoom_pause_and_slow_down(watched: DaemonProcess) -> None:
    async with top(watched.endpoint) as pilot:
        await until(pilot, lambda: focused(pilot) == DECK[0].name)
        await pilot.press("tab")
        assert focused(pilot) == DECK[1].name
        await pilot.press("shift+tab", "left")
        assert focused(pilot) == "tiers"
        await pilot.press(number_of("namespaces"))
        assert focused(pilot) == "namespaces"
        await pilot.press("s")
        await until(pilot, lambda: "▼share" in lines(pilot, "namespaces"))
        await pilot.press("S")
        await until(pilot, lambda: "▲share" in lines(pilot, "namespaces"))

        await pilot.press("slash", *"watch", "enter")
        await until(pilot, lambda: "default" not in lines(pilot, "namespaces"))
        assert "filter: watch" in lines(pilot, "footer")
        await pilot.press("slash", "x", "escape")
        await until(pilot, lambda: "default" in lines(pilot, "namespaces"))

        await pilot.press("d")
        await until(pilot, lambda: "Hit rate" not in screen(pilot) and "watched" in screen(pilot))
        await pilot.press("escape")
        await until(pilot, lambda: "Hit rate" in screen(pilot))

        await pilot.press("p")
        await until(pilot, lambda: "paused" in lines(pilot, "header"))
        held = lines(pilot, "hits")
        await asyncio.sleep(3 * QUICK_S)
        assert lines(pilot, "hits") == held
        await pilot.press("p")
        await until(pilot, lambda: "live" in lines(pilot, "header"))

        await pilot.press("plus", "plus")
        await until(pilot, lambda: "0.5 s" in lines(pilot, "header"))
        await pilot.press("minus", "minus")
        await until(pilot, lambda: "most often" in lines(pilot, "footer"))
        await pilot.press("t")
        assert pilot.app.theme == "light"
        await pilot.press("question_mark")
        await until(pilot, lambda: "dark or light" in screen(pilot))
        await pilot.press("escape")
        await until(pilot, lambda: "dark or light" not in screen(pilot))
        await pilot.press("q")
        await until(pilot, lambda: not pilot.app.is_running)


async def test_policy_is_switched_while_the_daemon_runs(watched: DaemonProcess) -> None:
    async with top(watched.endpoint) as pilot:
        await until(pilot, lambda: "lru" in lines(pilot, "policy"))
        await pilot.press("e")
        await until(pilot, lambda: "● lru" in screen(pilot) and "clock" in screen(pilot))
        await pilot.press("escape")
        await until(pilot, lambda: "● lru" not in screen(pilot))
        await pilot.press("e")
        await until(pilot, lambda: "● lru" in screen(pilot))
        names = sorted(POLICIES)
        steps = names.index("clock") - names.index("lru")
        await pilot.press(*["down" if steps > 0 else "up"] * abs(steps), "enter")
        await until(pilot, lambda: "policy clock" in lines(pilot, "header"))
        assert "DRAM: clock from now on" in lines(pilot, "footer")
        assert "clock" in lines(pilot, "policy")
        await asyncio.to_thread(configure, watched.endpoint, "lru")
        await until(pilot, lambda: "policy lru" in lines(pilot, "header"))


async def test_daemon_that_dies_leaves_a_banner_and_one_that_comes_back_is_followed() -> None:
    with DaemonProcess(capacity="8MiB", grant="8MiB") as daemon:
        put_some(daemon.endpoint)
        async with top(daemon.endpoint) as pilot:
            await until(pilot, lambda: "watched" in screen(pilot))
            await asyncio.to_thread(daemon.kill)
            await until(pilot, lambda: "no answer for" in screen(pilot))
            assert "✗ lost" in lines(pilot, "header")
            assert "watched" in screen(pilot), "what was last seen stays"
            await asyncio.to_thread(daemon.start)
            await until(pilot, lambda: "no answer" not in screen(pilot) and "live" in lines(pilot, "header"))
            # Its counts begin anew.
            await until(pilot, lambda: "0 MB/s" in lines(pilot, "traffic"))
            assert not re.search(r"-\d", lines(pilot, "traffic") + lines(pilot, "hits")), "no rate is negative"


async def test_daemon_that_hangs_does_not_freeze_the_screen(watched: DaemonProcess) -> None:
    async with top(watched.endpoint, timeout_s=0.3) as pilot:
        await until(pilot, lambda: focused(pilot) == DECK[0].name)
        os.kill(watched.pid, signal.SIGSTOP)
        try:
            await until(pilot, lambda: "no answer for" in screen(pilot))
            started = time.monotonic()
            await pilot.press("tab")
            assert focused(pilot) == DECK[1].name
            assert time.monotonic() - started < 1.0
        finally:
            os.kill(watched.pid, signal.SIGCONT)
        await until(pilot, lambda: "live" in lines(pilot, "header"))


async def test_without_a_daemon_it_waits_and_says_for_whom() -> None:
    async with top("ipc:///tmp/kvstore-nobody-here.sock") as pilot:
        await until(pilot, lambda: "waiting for the daemon" in screen(pilot))
        assert "kvstore-nobody-here.sock" in screen(pilot)
        await pilot.press("tab", "d", "s", "p", "2", "question_mark", "escape", "q")


# ------------------------------------------------------------------ the command


def test_other_commands_do_not_load_it() -> None:
    program = "import kvstore.cli.main, sys; print(sorted({name.partition('.')[0] for name in sys.modules}))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=child_environment())
    assert "typer" in done.stdout
    assert "textual" not in done.stdout


def run(*arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-P", "-m", "kvstore", "top", *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=60, stdin=subprocess.DEVNULL, env=child_environment(environ)
    )


def test_once_prints_a_frame_as_text(watched: DaemonProcess) -> None:
    done = run("--once", "--interval", "0.2", "--endpoint", watched.endpoint, COLUMNS="80")
    assert done.returncode == 0, done.stderr
    assert "Hit rate" in done.stdout
    assert "watched" in done.stdout
    assert "\x1b" not in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 80


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ((), "kvstore stats --json"),
        (("--interval", "0"), "--interval must be 0.1 to 3600 seconds"),
        (("--theme", "blue"), "--theme must be dark or light"),
        (("--once", "--endpoint", "ipc:///tmp/kvstore-nobody-here.sock"), "kvstore-nobody-here.sock"),
    ],
)
def test_wrong_use_is_one_line(arguments: tuple[str, ...], told: str) -> None:
    done = run(*arguments)
    assert done.returncode in (1, 2)
    assert done.stdout == ""
    assert told in done.stderr
    assert done.stderr.count("\n") == 1


def test_on_a_terminal_without_colours_it_runs_and_quits(watched: DaemonProcess) -> None:
    """A real pseudo-terminal: little is written while nothing happens, and ``q`` gives the screen back."""
    leader, follower = pty.openpty()
    command = [sys.executable, "-P", "-m", "kvstore", "top", "--endpoint", watched.endpoint]
    environ = child_environment({"NO_COLOR": "1", "TERM": "xterm-256color", "COLUMNS": "80", "LINES": "24"})
    with subprocess.Popen(command, stdin=follower, stdout=follower, stderr=follower, env=environ) as process:
        os.close(follower)
        try:
            written = read_until(leader, b"Hit rate")
            read_for(leader, 0.5)
            quiet = read_for(leader, 1.5)
            os.write(leader, b"q")
            written += quiet + read_for(leader, 10.0, process)
            assert process.wait(10) == 0
        finally:
            if process.poll() is None:
                process.kill()
            os.close(leader)
    assert b"\x1b[?1049l" in written, "the terminal has its screen back"
    assert len(quiet) < 8 * 1024, "an idle daemon costs a slow link little"
    colours = {tuple(map(int, found)) for found in re.findall(rb"[34]8;2;(\d+);(\d+);(\d+)", written)}
    assert all(red == green == blue for red, green, blue in colours), "greys only"


def read_until(leader: int, wanted: bytes, timeout_s: float = 20.0) -> bytes:
    written, end = b"", time.monotonic() + timeout_s
    while wanted not in written:
        assert time.monotonic() < end, written[-2000:]
        written += read_for(leader, 0.1)
    return written


def read_for(leader: int, seconds: float, process: subprocess.Popen[bytes] | None = None) -> bytes:
    os.set_blocking(leader, False)
    written, end = b"", time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            written += os.read(leader, MIB)
        except BlockingIOError:
            time.sleep(0.02)
        except OSError:
            break
        if process is not None and process.poll() is not None:
            break
    return written
