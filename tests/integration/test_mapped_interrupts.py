"""An exception from a signal handler inside a mapped copy: buffers are free, slots come back, nothing hangs."""

from __future__ import annotations

import subprocess
import sys

import pytest
from daemon_process import DaemonProcess

SCRIPT = """
import random, signal, sys, time
from kvstore_client import Client

class Interrupt(BaseException):
    pass

def interrupt(*_):
    raise Interrupt

what, chance = sys.argv[2], random.Random(7)
client = Client(sys.argv[1], namespace="interrupted", timeout=3.0, mapped=True, payload_bytes=[1_200_000])
keys = [number.to_bytes(32, "big") for number in range(1, 5)]
client.put_many(keys, [bytes([number]) * 1_200_000 for number in range(1, 5)])
signal.signal(signal.SIGALRM, interrupt)
hits = 0
for turn in range(300):
    buffers = [bytearray(1_200_000) for _ in keys]
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.00002 + chance.random() * 0.0012)
        if what == "put":
            client.put(chance.randbytes(32), buffers[0], wait=False)
        else:
            client.get_many_into(keys, buffers)
        signal.setitimer(signal.ITIMER_REAL, 0)
    except Interrupt:
        hits += 1
    signal.setitimer(signal.ITIMER_REAL, 0)
    for buffer in buffers:
        buffer.append(1)  # raises where somebody still holds it
    if turn % 20 == 0:
        client.flush()
client.flush()
end = time.monotonic() + 8
while client.stats().dram.granted_bytes and time.monotonic() < end:
    client.put(chance.randbytes(32), b"small")  # gives back what an interrupt left
    time.sleep(0.4)
    while client.stats().dram.granted_bytes and time.monotonic() < end:
        time.sleep(0.4)
print(hits, client.stats().dram.granted_bytes)
client.close()
"""


@pytest.mark.parametrize("what", ["put", "get_many_into"])
def test_interrupt_in_a_large_copy_leaves_buffers_and_slots_free(daemon: DaemonProcess, what: str) -> None:
    done = subprocess.run(
        [sys.executable, "-P", "-c", SCRIPT, daemon.endpoint, what],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    hits, granted_bytes = map(int, done.stdout.split())
    assert hits > 20
    assert granted_bytes == 0
