"""Why a lookup missed, asked of a live daemon: statistics, stories through the SDK, and the commands."""

from __future__ import annotations

import errno
import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from client_adapter import CLIENTS
from daemon_process import DaemonProcess
from fakes.disk_faults import Fault
from forked_daemons import Nursery
from killed_daemon import Orders
from ssd_daemon import SsdDaemon, found_blocks, key_of, payload_of, put_durable, ssd_stats

from kvstore.cli.main import _run
from kvstore.protocol.messages import PutStatus
from kvstore.protocol.namespace import Namespace
from kvstore.protocol.statistics import MissStats
from kvstore_client import Client, InvalidArgument, ProtocolMismatch, chain_keys

SLOT_BYTES = 64 << 10
BLOCK_BYTES = SLOT_BYTES - 256
TOKENS = 16


def misses_of(client: Any) -> MissStats:
    found: MissStats | None = client.stats().misses
    assert found is not None
    return found


def chat(name: str) -> Namespace:
    return Namespace(name=name, block_tokens=TOKENS)


def put(client: Any, tokens: list[int], first: int = 0) -> list[bytes]:
    """Store a prompt's blocks from one of them on; its keys."""
    keys = chain_keys(tokens, TOKENS)
    parent = keys[first - 1] if first else None
    client.put_many(keys[first:], [bytes(BLOCK_BYTES)] * (len(keys) - first), parent=parent)
    return keys


Kvstore = Callable[..., str]


@pytest.fixture
def kvstore(
    small_daemon: DaemonProcess, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Kvstore:
    """Runs a command: what it prints, or where it fails its only line of error."""
    monkeypatch.setenv("COLUMNS", "80")

    def run(*arguments: str, status: int = 0) -> str:
        assert _run([*arguments, "--endpoint", small_daemon.endpoint], debug=False) == status
        printed, error = capsys.readouterr()
        assert error.count("\n") == bool(status)
        assert "--json" in arguments or not any(len(line) > 80 for line in printed.splitlines())
        return error if status else printed

    return run


@pytest.mark.parametrize("kind", ["sync", "uvloop", "sync-socket"])
def test_causes_add_up_to_what_matches_missed(small_daemon: DaemonProcess, kind: str) -> None:
    choose = random.Random(kind)
    buffers = [bytearray(BLOCK_BYTES) for _ in range(8)]
    with CLIENTS[kind](small_daemon.endpoint, namespace=chat(f"sums-{kind}")) as client:
        client.flush()
        before, lookups = misses_of(client), client.stats().lookups
        for _ in range(60):
            steps = [choose.randrange(2) for _ in range(choose.randrange(1, 9))]
            prompt = [step for step in steps for _ in range(TOKENS)]
            keys = chain_keys(prompt, TOKENS)
            match = client.match(keys)
            # Of the same request, and of none: more than a report names are missing in neither.
            client.get_many_into(keys, buffers[: len(keys)], request=match.request)
            if len(match) < len(keys):
                missing = keys[len(match) :]
                parent = keys[len(match) - 1] if len(match) else None
                client.put_many(missing, [bytes(BLOCK_BYTES)] * len(missing), parent=parent, request=match.request)
        client.flush()
        after, now = misses_of(client), client.stats().lookups
        missed = (now.match_keys - lookups.match_keys) - (now.match_hits - lookups.match_hits)
        assert after.blocks - before.blocks == missed > 60
        assert sum(cause.blocks for cause in after.causes.values()) == after.blocks
        assert sum(cause.requests for cause in after.causes.values()) == after.requests
        assert {"evicted", "diverged"} <= after.causes.keys()
        assert sum(after.extra_blocks) <= after.causes["evicted"].blocks


def test_causes_of_gets_add_up_also_where_their_reports_are_long(small_daemon: DaemonProcess) -> None:
    there = [bytes([1, number]) * 16 for number in range(30)]
    gone = [bytes([2, number]) * 16 for number in range(40)]
    buffers = [bytearray(BLOCK_BYTES) for _ in range(70)]
    with Client(small_daemon.endpoint, namespace="gets", mapped=True) as client:
        for key in there:
            client.put(key, bytes(1000))
        client.flush()
        before, lookups = misses_of(client), client.stats().lookups
        for shift in range(20):
            # Each hit is a run of its own: a report takes 38 records, so that the second one is in two batches of 64.
            keys = there + gone[: 13 + shift % 27]
            found = client.get_many_into(keys, buffers[: len(keys)])
            assert [length is not None for length in found].count(True) == 30
        client.flush()
        after, now = misses_of(client), client.stats().lookups
        missed = (now.get_keys - lookups.get_keys) - (now.get_hits - lookups.get_hits)
        assert after.blocks - before.blocks == missed
        assert after.requests - before.requests == 20


@pytest.mark.parametrize("kind", ["sync", "uvloop", "sync-socket"])
def test_a_prompt_tells_how_far_it_hits_and_what_would_have_kept_the_rest(
    small_daemon: DaemonProcess, kind: str
) -> None:
    name = f"story-{kind}"
    with CLIENTS[kind](small_daemon.endpoint, namespace=chat(name)) as client:
        client.clear()
        keys = put(client, list(range(6 * TOKENS)))
        with Client(small_daemon.endpoint, namespace=f"others-{kind}") as other:
            other.clear()
            other.put_many(chain_keys([1] * 12 * TOKENS, TOKENS), [bytes(BLOCK_BYTES)] * 12)
        told = client.why(keys)
        assert (told.namespace, told.block_tokens, told.hits, len(told)) == (name, TOKENS, 4, 6)
        miss = told.first_miss
        assert miss is not None
        assert (miss.key, miss.cause, miss.depth, miss.state) == (keys[4], "evicted", 4, "gone")
        assert miss.ghost is not None
        assert (miss.ghost.tier, miss.ghost.policy, miss.ghost.extra_bytes) == ("dram", "lru", SLOT_BYTES)
        assert "was evicted from DRAM by lru" in told.text
        assert "64.0 KiB more would have kept it" in told.text
        assert [story.parent for story in told] == ["root", "dram", "dram", "dram", "dram", "gone"]
        first = told[0]
        assert (first.hit, first.tiers, first.children, first.slot_bytes) == (True, ("dram",), 1, SLOT_BYTES)
        assert "resident" in [chapter.after for chapter in first.chapters]

        other_end = chain_keys([*range(3 * TOKENS), *[7] * 2 * TOKENS], TOKENS)
        left = client.why(other_end).first_miss
        assert left is not None
        assert (left.cause, left.at_token) == ("diverged", 3 * TOKENS)
        assert f"differs from token {3 * TOKENS}" in left.text

        client.retain(keys[:1], priority=90, ttl_s=60)
        (kept,) = client.why(keys[:1])
        assert kept.retention.startswith("priority 90 for ")
        assert "retention: priority 90" in kept.text
        client.retain(keys[:1], priority=50)

        client.remove([keys[3]])
        assert client.put(keys[4], bytes(BLOCK_BYTES), parent=keys[3]) is PutStatus.STORED
        alone = client.why(keys[3:5], chained=False)
        assert [story.cause for story in alone] == ["removed", ""]
        assert alone[1].ghost is not None
        assert alone[1].ghost.back
        assert "parent: " + keys[3].hex()[:12] in alone[1].text
        assert client.why(keys)[4].cause == "removed"
        assert client.why([], prefixes=[keys[0].hex()[:10], keys[5].hex()[:8]], chained=False)[1].key == keys[5]


def test_keys_and_prefixes_that_cannot_be_explained_are_refused(small_daemon: DaemonProcess) -> None:
    with Client(small_daemon.endpoint, namespace="refusals") as client:
        with pytest.raises(InvalidArgument, match="begins with 0123456789"):
            client.why([], prefixes=["0123456789"])
        with pytest.raises(InvalidArgument, match="8 to 64 hexadecimal digits"):
            client.why([], prefixes=["xyz"])
        with pytest.raises(InvalidArgument, match="at most 4096 keys"):
            client.why([number.to_bytes(32, "big") for number in range(1, 4098)])
        with pytest.raises(InvalidArgument, match="not the first digits of one namespace's digest"):
            client.why([], namespace="0123456789")
        twins = [bytes([9]) * 31 + bytes([last]) for last in (1, 2)]
        client.put_many(twins, [bytes(100)] * 2)
        with pytest.raises(InvalidArgument, match=r"2 keys begin with 09090909: 0909\w+, 0909\w+; give more digits"):
            client.why([], prefixes=["09090909"])
        client._session.protocol = 4
        with pytest.raises(ProtocolMismatch, match="too old for Why, which needs protocol 5"):
            client.why(twins)


def test_the_command_tells_the_story_of_a_prompt_and_of_keys(
    small_daemon: DaemonProcess, kvstore: Kvstore, tmp_path: Path
) -> None:
    # No other test of the module stores these: they are of one namespace.
    tokens = [*range(1000, 1000 + 4 * TOKENS), 5]
    prompt = tmp_path / "prompt.json"
    prompt.write_text(json.dumps(tokens[: 2 * TOKENS] + [3] * 2 * TOKENS))
    with Client(small_daemon.endpoint, namespace=chat("command")) as client:
        keys = put(client, tokens)
        shown = kvstore("why", "--tokens", str(prompt), "--namespace", "command")
        assert "2 of 4 blocks of command hit: 2 in DRAM" in " ".join(shown.split())
        assert "prompt differs" in shown
        prompt.write_text(" ".join(map(str, tokens)))
        told = json.loads(kvstore("why", "--tokens", str(prompt), "--namespace", "command", "--json"))
        assert (told["hits"], [story["cause"] for story in told["stories"]]) == (4, [""] * 4)
        client.remove([keys[3]])
        shown = kvstore("why", keys[3].hex(), keys[0].hex()[:12])
        assert shown.index("was removed by a client") < shown.index("hits, in DRAM")
        told = json.loads(kvstore("why", keys[3].hex()[:12], "--json"))
        assert [(story["namespace"], story["cause"]) for story in told["stories"]] == [("command", "removed")]

        for arguments, why in (
            (["--tokens", str(prompt), "--namespace", "no-such"], "knows no namespace 'no-such'; there are: "),
            (["--tokens", str(prompt), "--namespace", "command", "--block-tokens", "8"], "have 16 tokens, not 8"),
            (["--tokens", str(tmp_path / "none")], "No such file"),
            (["abc"], "64 hexadecimal digits"),
            ([], "give keys, or a prompt"),
            (["00112233aa"], "00112233aa"),
        ):
            assert why in kvstore("why", *arguments, status=2)
        prompt.write_text('[1, "two"]')
        assert "token 1 is 'two'" in kvstore("why", "--tokens", str(prompt), status=2)
        client.match(chain_keys(tokens[: 2 * TOKENS] + [3] * TOKENS, TOKENS))
        client.flush()
        shown = kvstore("stats", "--misses")
        assert "prompt differs" in shown or "evicted" in shown
        assert "100.0 %" in shown
        assert json.loads(kvstore("stats", "--misses", "--json"))["blocks"] > 0


@pytest.fixture(scope="module")
def below(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SsdDaemon]:
    arguments = ("--set", "ssd.prefill_tokens_per_s=1e12")
    with (
        Nursery() as nursery,
        SsdDaemon(
            nursery, tmp_path_factory.mktemp("below"), *arguments, expected_errors=("ssd_read_failed",)
        ) as daemon,
    ):
        yield daemon


def test_a_block_that_cannot_be_read_failed_to_load(below: SsdDaemon) -> None:
    with below.client() as client:
        put_durable(client, range(80))
        below.control.order(Orders(faults=[Fault("data_read", errno.EIO, times=1)]))
        assert found_blocks(client, [7]) == []
        below.control.order()
        client.flush()
        assert misses_of(client).causes["failed_load"].blocks == 1
        (story,) = client.why([key_of(7)], chained=False)
        assert story.cause == "failed_load"
        assert "could not be loaded from the SSD" in story.text


def test_a_block_whose_load_is_slower_than_computing_it_is_recomputed(below: SsdDaemon) -> None:
    with below.client(namespace=chat("slow"), mapped=False) as client:
        keys = chain_keys(list(range(80 * TOKENS)), TOKENS)
        for at in range(0, 80, 8):
            some = [payload_of(number) for number in range(at, at + 8)]
            client.put_many(keys[at : at + 8], some, parent=keys[at - 1] if at else None, durable=True)
        told = client.why(keys)
        assert told.hits == 80
        assert {tier for story in told for tier in story.tiers} == {"dram", "ssd"}
        buffers = [bytearray(len(payload_of(0))) for _ in keys]
        for _ in range(12):
            # Until the rate of reads is known.
            if ssd_stats(client).read_bytes_per_s:
                break
            client.get_many_into(keys, buffers)
        before = misses_of(client).causes
        hits = len(client.match(keys))
        assert hits < 80
        after = misses_of(client).causes
        assert "recompute" not in before
        assert after["recompute"].blocks == 80 - hits
        assert after["recompute"].requests == 1
        told = client.why(keys)
        assert told.hits == hits
        assert told.first_miss is not None
        assert told.first_miss.cause == "recompute"
        assert "computing it anew is faster than loading it" in told.text
