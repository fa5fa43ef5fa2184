"""Pictures of ``kvstore top`` for the documents: a daemon under a load of chat sessions, seen for a while.

Usage: ``python benchmarks/pictures/top.py DIRECTORY [--seconds 90] [--sizes 120x40,80x24] [--themes dark,light]``;
writes ``top-WIDTHxHEIGHT-THEME.png`` into it.
"""

from __future__ import annotations

import argparse
import asyncio
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

from terminal_png import terminal_png

from kvstore.cli.private_daemon import PrivateDaemon
from kvstore.cli.top.app import TopApp

LOAD = Path(__file__).with_name("top_load.py")
CLIENTS = (
    "--requests-per-s 14 --seed 1",
    "--requests-per-s 9 --seed 4",
    "--requests-per-s 8 --seed 2 --tenant agents --model Qwen/Qwen3-32B --codec fp8 --block-bytes 49152",
    "--requests-per-s 3 --seed 3 --tenant batch --socket --model mistralai/Mistral-7B-v0.3",
)
SETTINGS = {
    "eviction.policy": "adaptive",
    "quota.tenants": "agents=48MiB,batch=16MiB",
    "ssd.prefill_tokens_per_s": "40000",
}


async def look(
    endpoint: str, sizes: list[tuple[int, int]], themes: list[str], seconds: float, out: Path, panels: list[str]
) -> None:
    app = TopApp(endpoint, interval_s=1.0)
    async with app.run_test(size=sizes[0]) as pilot:
        await asyncio.sleep(seconds)
        for width, height in sizes:
            await pilot.resize_terminal(width, height)
            for theme in themes:
                app.theme = theme
                await asyncio.sleep(1.5)
                name = f"top-{width}x{height}-{theme}"
                terminal_png(app, out / f"{name}.png")
                for keys in panels:
                    for key in keys.split("+"):
                        await pilot.press(key)
                    await asyncio.sleep(0.5)
                    terminal_png(app, out / f"{name}-{keys}.png")


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("directory", type=Path)
    arguments.add_argument("--seconds", type=float, default=90.0)
    arguments.add_argument("--sizes", default="120x40")
    arguments.add_argument("--themes", default="dark")
    arguments.add_argument("--keys", default="", help="more pictures after these keys, for example d,escape+5")
    arguments.add_argument("--endpoint", default="", help="a daemon that has its load already")
    arguments.add_argument("--serve", action="store_true", help="only run daemon and load, until Ctrl+C")
    given = arguments.parse_args()
    given.directory.mkdir(parents=True, exist_ok=True)
    sizes = [(int(size.split("x")[0]), int(size.split("x")[1])) for size in given.sizes.split(",")]
    with ExitStack() as stack:
        endpoint = given.endpoint
        settings = [word for name, value in SETTINGS.items() for word in ("--set", f"{name}={value}")]
        if not endpoint:
            ssd = stack.enter_context(tempfile.TemporaryDirectory(prefix="kvstore-top-"))
            daemon = stack.enter_context(
                PrivateDaemon(
                    capacity_bytes=160 << 20,
                    grant_bytes=32 << 20,
                    arguments=("--ssd", ssd, "--ssd-capacity", "384MiB", *settings),
                )
            )
            endpoint = daemon.endpoint
            for more in CLIENTS:
                process = subprocess.Popen([sys.executable, str(LOAD), endpoint, *more.split()])
                stack.callback(process.wait)
                stack.callback(process.terminate)
        if given.serve:
            print(endpoint, flush=True)
            while True:
                time.sleep(1)
        keys = [one for one in given.keys.split(",") if one]
        asyncio.run(look(endpoint, sizes, given.themes.split(","), given.seconds, given.directory, keys))


if __name__ == "__main__":
    main()
