"""``kvstore why`` without ``--namespace``: which namespace of a live daemon is told of."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from daemon_process import DaemonProcess

from kvstore.cli.main import _run
from kvstore.protocol.namespace import Namespace
from kvstore_client import Client, chain_keys

BLOCK_BYTES = (64 << 10) - 256
TOKENS = 16
Kvstore = Callable[..., str]


@pytest.fixture
def daemon() -> Iterator[DaemonProcess]:
    """A daemon for 16 slots of 64 KiB that knows no namespace."""
    with DaemonProcess("--slab", "128KiB", capacity="1MiB", grant="512KiB") as daemon:
        yield daemon


@pytest.fixture
def kvstore(daemon: DaemonProcess, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Kvstore:
    """Runs a command: what it prints in one line, or where it fails its error."""
    monkeypatch.setenv("COLUMNS", "300")

    def run(*arguments: str, status: int = 0) -> str:
        assert _run([*arguments, "--endpoint", daemon.endpoint], debug=False) == status
        printed, error = capsys.readouterr()
        return " ".join((error if status else printed).split())

    return run


def put(
    daemon: DaemonProcess, name: str, tokens: list[int], block_tokens: int = TOKENS, at_once: int = 4
) -> list[bytes]:
    """Store a prompt in a namespace; its keys."""
    keys = chain_keys(tokens, TOKENS)
    with Client(daemon.endpoint, namespace=Namespace(name=name, block_tokens=block_tokens)) as client:
        for at in range(0, len(keys), at_once):
            some = keys[at : at + at_once]
            client.put_many(some, [bytes(BLOCK_BYTES)] * len(some), parent=keys[at - 1] if at else None)
    return keys


def file_of(path: Path, tokens: list[int]) -> str:
    path.write_text(json.dumps(tokens))
    return str(path)


def digest_of(daemon: DaemonProcess, name: str) -> str:
    with Client(daemon.endpoint, namespace=Namespace(name=name, block_tokens=TOKENS)) as client:
        return client.why([]).digest


def test_a_namespace_whose_blocks_have_all_left_is_asked_as_well(
    daemon: DaemonProcess, kvstore: Kvstore, tmp_path: Path
) -> None:
    chat = list(range(4 * TOKENS))
    keys = put(daemon, "chat", chat)
    put(daemon, "batch", [7] * 40 * TOKENS)
    with Client(daemon.endpoint) as client:
        blocks = {one.name: one.blocks for one in client.stats().namespaces}
    assert blocks["chat"] == 0 < blocks["batch"]
    for digits in (keys[0].hex(), keys[0].hex()[:10]):
        shown = kvstore("why", digits)
        assert "namespace chat, generation 0" in shown
        assert "was evicted from DRAM by lru" in shown
    prompt = file_of(tmp_path / "prompt", chat)
    shown = kvstore("why", "--tokens", prompt)
    assert "Prompt of 4 blocks in chat" in shown
    told = json.loads(kvstore("why", keys[1].hex(), "--json"))["stories"][0]
    assert (told["namespace"], told["cause"], told["unknown_in"]) == ("chat", "evicted", [])


def test_what_several_namespaces_know_has_to_be_told_apart(
    daemon: DaemonProcess, kvstore: Kvstore, tmp_path: Path
) -> None:
    tokens = list(range(3 * TOKENS))
    keys = put(daemon, "chat", tokens)
    put(daemon, "batch", tokens[: 2 * TOKENS])
    prompt = file_of(tmp_path / "prompt", tokens)
    for digits in (keys[0].hex(), keys[0].hex()[:8]):
        error = kvstore("why", digits, status=2)
        assert f"2 namespaces know {keys[0].hex()[: min(len(digits), 16)]}; say which is meant (--namespace)" in error
        assert f"chat ({digest_of(daemon, 'chat')[:8]})" in error
        assert f"batch ({digest_of(daemon, 'batch')[:8]})" in error
        assert "hits, in DRAM" in kvstore("why", digits, "--namespace", "batch")
    # Only one knows the third block, and so more of the prompt.
    assert "namespace chat, generation" in kvstore("why", keys[2].hex())
    assert "3 of 3 blocks of chat hit" in kvstore("why", "--tokens", prompt)
    put(daemon, "batch", tokens)
    error = kvstore("why", "--tokens", prompt, status=2)
    assert "2 namespaces know the same 48 leading tokens of the prompt" in error
    assert "--namespace" in error


def test_what_no_namespace_knows_is_said_of_all(daemon: DaemonProcess, kvstore: Kvstore, tmp_path: Path) -> None:
    prompt = file_of(tmp_path / "prompt", [3] * 2 * TOKENS)
    unknown = chain_keys([3] * TOKENS, TOKENS)[0].hex()
    keys = put(daemon, "chat", list(range(TOKENS)))
    # Of the only one that is used there is no doubt.
    assert "namespace chat, generation 0 lookup was never seen" in kvstore("why", unknown)
    assert "0 of 2 blocks of chat hit" in kvstore("why", "--tokens", prompt)
    put(daemon, "batch", [9] * TOKENS)
    put(daemon, "opaque", [8] * TOKENS, block_tokens=0)
    names = ["chat", "batch", "opaque"]
    shown = kvstore("why", unknown, keys[0].hex())
    assert "unknown in all of chat (" in shown
    assert all(f"{name} ({digest_of(daemon, name)[:8]})" in shown for name in names[:2])
    assert "was never seen, as far as is remembered" in shown
    assert "hits, in DRAM" in shown
    story = json.loads(kvstore("why", unknown, "--json"))["stories"][0]
    assert (story["namespace"], [one["namespace"] for one in story["unknown_in"]]) == ("", names)
    assert "begins with 00112233aa; looked up in chat (" in kvstore("why", "00112233aa", status=2)
    error = kvstore("why", "--tokens", prompt, status=2)
    assert "no namespace knows the beginning of the prompt; say of which it is (--namespace)" in error
    assert "looked up in chat (" in error
    assert "opaque does not say how many tokens a block has: --block-tokens N" in error


def test_digits_of_a_digest_name_a_namespace(daemon: DaemonProcess, kvstore: Kvstore, tmp_path: Path) -> None:
    tokens = list(range(2 * TOKENS))
    (key, _) = put(daemon, "chat", tokens)
    put(daemon, "batch", tokens)
    digest = digest_of(daemon, "chat")
    prompt = file_of(tmp_path / "prompt", tokens)
    for digits in (digest[:4], digest[:7], digest[:8], digest[:9].upper(), digest):
        assert "namespace chat, generation 0" in kvstore("why", key.hex(), "--namespace", digits)
        assert "2 of 2 blocks of chat hit" in kvstore("why", "--tokens", prompt, "--namespace", digits)
    wrong = digest[:8] + ("0" if digest[8] != "0" else "1")
    assert "not the first digits of one namespace's digest" in kvstore("why", key.hex(), "--namespace", wrong, status=2)


@pytest.mark.parametrize("option", [("--block-tokens", "32"), ("--salt", "pepper")])
def test_options_of_prompts_are_refused_with_keys(kvstore: Kvstore, option: Any) -> None:
    assert f"{option[0]} is for a prompt (--tokens FILE)" in kvstore("why", "00112233aa", *option, status=2)
