"""One client of the soak: random operations for ever, every byte of every hit checked. Run as a script.

Each of its connections maps the daemon's memory or does not, by chance. Arguments: endpoint, seed, and how many prompts
there are (200). Prints one line for each hundred rounds; ends with status 1 at the first wrong byte.
"""

from __future__ import annotations

import random
import sys
from hashlib import sha256

from kvstore.errors import DaemonUnavailable, DeadlineExceeded, Throttled
from kvstore_client import Client

PROMPTS = 200
BLOCKS = 12


def payload(key: bytes) -> bytes:
    """Bytes of a block: length and content follow from its key."""
    length = (200, 4_000, 30_000, 150_000)[key[0] % 4] + key[1]
    return (key * (length // 32 + 1))[:length]


def chain(prompt: int) -> list[bytes]:
    """Keys of a prompt."""
    keys, previous = [], bytes(32)
    for number in range(BLOCKS):
        previous = sha256(previous + f"{prompt} {number}".encode()).digest()
        keys.append(previous)
    return keys


def work(client: Client, rng: random.Random, prompts: int) -> None:
    """One engine request and a little mischief."""
    keys = chain(rng.randrange(prompts))
    match = client.match(keys, lease=rng.choice([None, 0.2, 5.0]))
    outs = [bytearray(150_300) for _ in range(len(match))]
    lengths = client.get_many_into(keys[: len(match)], outs, request=match.request)
    for key, out, length in zip(keys, outs, lengths, strict=False):
        if length is not None and out[:length] != payload(key):
            print(f"wrong bytes for {key.hex()}", flush=True)
            sys.exit(1)
    rest = keys[len(match) : rng.randint(len(match), BLOCKS)]
    if rest:
        parent = keys[len(match) - 1] if len(match) else None
        client.put_many(
            rest, [payload(key) for key in rest], parent=parent, wait=rng.random() < 0.5, request=match.request
        )
    if rng.random() < 0.3:
        match.release()
    if rng.random() < 0.02:
        client.remove(rng.sample(keys, 2))
    if rng.random() < 0.05:
        with client.view(rng.choice(keys)) as view:
            if view is not None and bytes(view) not in {payload(key) for key in keys}:
                print("wrong bytes in a view", flush=True)
                sys.exit(1)


def main() -> None:
    """Work until killed."""
    endpoint, seed = sys.argv[1:3]
    prompts = int(sys.argv[3]) if len(sys.argv) > 3 else PROMPTS
    rng = random.Random(seed)
    rounds = 0
    while True:
        with Client(endpoint, namespace="soak", timeout=20.0, mapped=rng.choice([None, False])) as client:
            for _ in range(rng.randint(50, 500)):
                try:
                    work(client, rng, prompts)
                except (Throttled, DaemonUnavailable, DeadlineExceeded) as error:
                    print(type(error).__name__, flush=True)
                rounds += 1
                if rounds % 100 == 0:
                    print(rounds, flush=True)


if __name__ == "__main__":
    main()
