"""A daemon with an SSD: prefetches, hints, warming up, load or compute, and the curve, as clients see them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from daemon_process import DaemonProcess, wait_until

from kvstore.cli.stats import stats
from kvstore.cli.warm import warm
from kvstore.errors import InvalidArgument
from kvstore.format.warm_list import parse_warm_list
from kvstore.protocol.messages import PutStatus
from kvstore_client import Client, Namespace, chain_keys

BLOCK_BYTES = 60_000
CAPACITY_BLOCKS = 64
CHAIN = 24


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DaemonProcess]:
    """DRAM for 64 blocks, an SSD for a thousand."""
    directory = tmp_path_factory.mktemp("prefetch")
    ssd = ("--ssd", str(directory / "ssd"), "--ssd-capacity", "96MiB", "--set", "ssd.reserve_bytes=0")
    with DaemonProcess("--slab", "256KiB", *ssd, capacity="4MiB", grant="1MiB") as daemon:
        yield daemon


class Chain:
    """A chain that is stored durably, and then pushed out of memory by others."""

    def __init__(self, client: Client, salt: int, blocks: int = CHAIN) -> None:
        self.client = client
        self.keys = chain_keys([salt] * 64 * blocks, 64)
        self.data = [bytes([salt % 251, at]) * (BLOCK_BYTES // 2) for at in range(blocks)]
        assert set(client.put_many(self.keys, self.data, durable=True)) == {PutStatus.STORED}

    def below(self) -> int:
        """How many blocks are not in memory; asking for them would be a use."""
        resident = {key for one in self.client.chains() for key in one.keys}
        return sum(key not in resident for key in self.keys)

    def push_out(self, salt: int) -> None:
        for number in range(20):
            others = chain_keys([salt * 100 + number] * 64 * 8, 64)
            self.client.put_many(others, [bytes([number]) * BLOCK_BYTES] * 8)
            if self.below() == len(self.keys):
                return
        raise AssertionError("it does not leave")


@pytest.fixture
def client(daemon: DaemonProcess, request: pytest.FixtureRequest) -> Iterator[Client]:
    namespace = Namespace(name=request.node.name, block_tokens=64)
    with Client(daemon.endpoint, namespace=namespace, timeout=20) as client:
        yield client


def test_match_that_prefetches_has_the_chain_up_before_it_is_read(client: Client) -> None:
    chain = Chain(client, 1)
    chain.push_out(1)
    before = client.stats()
    assert before.prefetch is not None
    found = client.match(chain.keys, prefetch=10.0)
    assert (found.hits, found.recompute) == (CHAIN, 0)
    # Of one client a quarter of DRAM may come up ahead at a time: 17 of these.
    wait_until(lambda: client.stats().prefetch.blocks - before.prefetch.blocks >= 17)
    outs = [bytearray(BLOCK_BYTES) for _ in chain.keys]
    assert client.get_many_into(chain.keys, outs, request=found.request) == [BLOCK_BYTES] * CHAIN
    assert outs == chain.data
    wait_until(lambda: client.stats().prefetch.used_blocks - before.prefetch.used_blocks >= 17)
    after = client.stats().prefetch
    assert (after.wanted["arrived"], after.refused["client_bytes"]) == (17, CHAIN - 17)
    assert after.bytes > after.blocks * BLOCK_BYTES
    assert client.stats().ssd.promoted_blocks - before.ssd.promoted_blocks == CHAIN


def test_hints_and_prefetches_say_how_soon_and_bad_times_are_refused(client: Client) -> None:
    chain = Chain(client, 2)
    chain.push_out(2)
    before = client.stats().prefetch
    assert client.hint(chain.keys[:8], within_s=0.5) == 8
    wait_until(lambda: client.match(chain.keys).tiers[:8].count("dram") == 8)
    assert client.prefetch(chain.keys[:10], within_s=5) == 10
    wait_until(lambda: client.match(chain.keys).tiers[:10].count("dram") == 10)
    after = client.stats().prefetch
    assert (after.hints - before.hints, after.wanted["hinted"] - before.wanted.get("hinted", 0)) == (1, 8)
    for wrong in (0, -1, 1e9, True, "soon"):
        with pytest.raises(InvalidArgument, match="within_s must be more than 0 and at most 86400 seconds"):
            client.hint(chain.keys, within_s=wrong)  # type: ignore[arg-type]


def test_blocks_that_are_computed_sooner_are_left_to_the_engine(client: Client) -> None:
    chain = Chain(client, 3)
    chain.push_out(3)
    # Many at a time, so that the device's rate is known.
    while not client.stats().loading.read_bytes_per_s:
        client.prefetch(chain.keys, wait=True)
        chain.push_out(31)
    assert client.match(chain.keys).recompute == 0
    client.report_prefill(10_000_000_000, 1.0)
    found = client.match(chain.keys)
    assert (found.hits, found.recompute) == (0, CHAIN)
    loading = client.stats().loading
    assert (loading.prefill_source, loading.decisions["none"] >= 1, loading.refused_blocks >= CHAIN) == (
        "reported",
        True,
        True,
    )
    assert loading.refusal_saved_s > 0
    for _ in range(40):
        client.report_prefill(30, 30.0)
    assert client.match(chain.keys).hits == CHAIN
    assert client.stats().loading.load_saved_s > loading.load_saved_s
    with pytest.raises(InvalidArgument, match="tokens must be"):
        client.report_prefill(0, 1.0)
    with pytest.raises(InvalidArgument, match="seconds must be"):
        client.report_prefill(1, 0.0)


def test_prefetches_of_a_client_that_closed_are_dropped(daemon: DaemonProcess, client: Client) -> None:
    chain = Chain(client, 4)
    chain.push_out(4)
    before = client.stats().prefetch
    with Client(daemon.endpoint, namespace=client.namespace, timeout=20) as other:
        assert other.hint(chain.keys, within_s=3600) == CHAIN
    after = client.stats().prefetch
    assert after.hints - before.hints == 1
    # Whether it was begun at once or kept for later: nothing of it waits.
    wait_until(lambda: client.stats().prefetch.waiting_bytes == 0)


def test_warm_up_of_a_list_and_of_the_hottest(daemon: DaemonProcess, client: Client, tmp_path: Path) -> None:
    chain = Chain(client, 5)
    listed = client.chains("ssd")
    mine = [one for one in listed if one.namespace == client.namespace.name]
    assert [key for one in mine for key in one.keys][: len(chain.keys)] == chain.keys
    assert client.chains("ssd", budget_bytes=5 * 65_536)[0].keys == chain.keys[:5]
    chain.push_out(5)
    # Memory is full of what others use: nothing leaves for a list unless it may.
    warmed = client.warm([chain.keys])
    assert (warmed.brought, warmed.no_room, warmed.unknown) == (0, CHAIN, 0)
    progress = []
    warmed = client.warm([chain.keys, [b"?" * 32]], evict=True, budget_bytes=10 * 65_536, progress=progress.append)
    assert (warmed.brought, warmed.unknown, warmed.no_room + warmed.not_tried) == (10, 1, CHAIN - 10)
    assert warmed.brought_bytes == 10 * 61_440
    assert progress[-1] == warmed
    resident = [key for one in client.chains() for key in one.keys]
    assert set(chain.keys[:10]) <= set(resident)


def test_stats_hold_the_curve_of_what_was_asked_for(
    daemon: DaemonProcess, client: Client, capsys: pytest.CaptureFixture[str]
) -> None:
    chain = Chain(client, 6)
    for _ in range(50):
        client.match(chain.keys)
    client.stats()
    curve = client.stats().curve
    assert curve is not None
    assert (curve.capacity_bytes, curve.ssd_bytes) == (4 << 20, 100 << 20)
    assert curve.capacities_bytes[16] == 4 << 20
    assert curve.hit_rates == sorted(curve.hit_rates)
    assert curve.hit_rate > 0.5
    # Older ones count for less.
    assert curve.accesses > 49 * CHAIN
    stats(endpoint=daemon.endpoint, curve=True)
    shown = capsys.readouterr().out
    assert "of DRAM with LRU would hit" in shown
    assert "DRAM and SSD together" in shown


def test_warm_command_saves_a_list_and_brings_it_up(
    daemon: DaemonProcess, client: Client, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    chain = Chain(client, 7, blocks=8)
    digest = next(one.digest for one in client.chains() if one.namespace == client.namespace.name)
    saved = tmp_path / "saved"
    warm(save=saved, endpoint=daemon.endpoint)
    assert f"{saved} lists " in capsys.readouterr().out
    listed = list(parse_warm_list(saved.read_text().splitlines(), "saved"))
    # What was used last comes first.
    assert listed[0] == (digest, chain.keys)
    mine = tmp_path / "mine"
    mine.write_text("# by hand\n" + " ".join(key.hex() for key in chain.keys) + "\n")
    chain.push_out(7)
    with pytest.raises(InvalidArgument, match="does not say of which namespace it is"):
        warm(mine, endpoint=daemon.endpoint)
    warm(mine, namespace=client.namespace.name, evict=True, endpoint=daemon.endpoint, as_json=True)
    told = json.loads(capsys.readouterr().out)
    assert (told["blocks"], told["brought"], told["brought_bytes"]) == (8, 8, 8 * 61_440)
    assert chain.below() == 0
    prompt = tmp_path / "prompt"
    prompt.write_text("[" + ", ".join(["7"] * 64 * 9) + "]\n")
    warm(prompt, namespace=digest.hex()[:8], block_tokens=64, endpoint=daemon.endpoint)
    shown = capsys.readouterr().out
    assert "Warm-up of 9 blocks" in shown
    assert "8 in memory already" in shown
    assert "1 in no tier, or of another namespace" in shown
    warm(hottest="128KiB", endpoint=daemon.endpoint, as_json=True)
    assert json.loads(capsys.readouterr().out)["blocks"] == 2
    warm(hottest="1KiB", endpoint=daemon.endpoint)
    assert "the SSD holds no block that fits into 1KiB" in " ".join(capsys.readouterr().out.split())


def test_warm_command_says_what_it_had_no_room_for(
    daemon: DaemonProcess,
    client: Client,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    chain = Chain(client, 9)
    chain.push_out(9)
    listed = tmp_path / "list"
    listed.write_text(" ".join(key.hex() for key in chain.keys) + "\n")

    def shown(**options: Any) -> str:
        warm(listed, namespace=client.namespace.name, endpoint=daemon.endpoint, **options)
        return " ".join(capsys.readouterr().out.split())

    assert "no room 24 without free room, and nothing leaves for a list (see --evict)" in shown()
    told = shown(budget="100KiB", evict=True)
    assert "came up 1 block, 60.0 KiB" in told
    assert "no room 23 beyond the budget (--budget 100.0 KiB)" in told
    assert "--evict" not in told


def test_warm_command_says_that_there_is_no_ssd(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    listed = tmp_path / "list"
    listed.write_text("ab" * 32 + "\n")
    with DaemonProcess("--slab", "256KiB", capacity="4MiB", grant="1MiB") as memory_only:
        with pytest.raises(InvalidArgument, match="--hottest 1MiB: the daemon has no SSD"):
            warm(hottest="1MiB", endpoint=memory_only.endpoint)
        warm(listed, endpoint=memory_only.endpoint)
        shown = " ".join(capsys.readouterr().out.split())
        assert "1 in no tier" in shown
        assert "note the daemon has no SSD (kvstore serve --ssd DIR)" in shown


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({}, "give one of: a list, --hottest SIZE, --save FILE"),
        ({"save": Path("a"), "evict": True}, "--save writes all that memory holds"),
        ({"file": Path("/nowhere/list")}, "cannot read /nowhere/list: No such file"),
        ({"hottest": "many"}, "many"),
    ],
)
def test_warm_command_that_makes_no_sense_says_why(daemon: DaemonProcess, options: dict[str, Any], why: str) -> None:
    with pytest.raises(InvalidArgument, match=why):
        warm(**options, endpoint=daemon.endpoint)


def test_daemon_warms_itself_up_at_the_start(daemon: DaemonProcess, client: Client) -> None:
    chain = Chain(client, 8)
    assert daemon.terminate() == 0
    daemon._environ = {"KVSTORE_SSD__WARM": "hottest"}
    daemon.start()
    wait_until(lambda: client.stats().prefetch.wanted.get("warming", 0) >= CHAIN, 20.0)
    wait_until(lambda: client.stats().prefetch.waiting_bytes == 0)
    # The chain was used last; a quarter of memory is kept for puts.
    wait_until(lambda: client.match(chain.keys).tiers == ["dram"] * CHAIN)
    told = client.stats()
    assert told.dram.resident_bytes <= 3 << 20
    assert told.eviction.evicted_blocks == 0
    # The module's last test: another process is there than at its beginning.
    client.close()
    assert daemon.terminate() == 0
