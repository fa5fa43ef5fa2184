from __future__ import annotations

from types import SimpleNamespace

from kvstore_client.integrations.hicache.keys import key_of, keys_of, parent_of

HASH = "0123456789abcdef" * 4


def test_a_page_hash_is_its_own_key() -> None:
    assert key_of(HASH) == bytes.fromhex(HASH)


def test_other_names_have_keys_of_their_own() -> None:
    names = ["", "x", HASH.upper(), HASH[:-1], HASH + "0", "0" * 64, f"{HASH}.mamba", "\udcff", "ключ"]
    keys = keys_of([*names, HASH])
    assert len(set(keys)) == len(names) + 1
    assert all(len(key) == 32 and any(key) for key in keys)


def test_the_parent_is_the_last_page_before_the_call() -> None:
    assert parent_of(SimpleNamespace(prefix_keys=["a", HASH])) == bytes.fromhex(HASH)
    for nothing in (None, SimpleNamespace(prefix_keys=None), SimpleNamespace(prefix_keys=[])):
        assert parent_of(nothing) is None
