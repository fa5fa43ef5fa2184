"""What clients make of transcoded records at a live daemon: ordinary ones they read, marked ones they never take."""

from __future__ import annotations

from collections.abc import Iterator

import msgspec
import pytest
import torch
from daemon_process import DaemonProcess
from tensor_blocks import LAYOUT, filled, kv_of, put_record, same
from transcode_records import lossless_record, raw_record

from kvstore.errors import InvalidArgument
from kvstore.format.record import decode_header, encode_header
from kvstore.protocol.messages import PutStatus
from kvstore.protocol.namespace import Namespace
from kvstore.transcode.records import restore, transcode
from kvstore_client import Client
from kvstore_client.tensors import Failure, TensorStore

both_paths = pytest.mark.parametrize("mapped", [True, False])
PAIRS = ("raw>lossless", "raw>lossless-zstd")


@pytest.fixture(scope="module")
def daemon() -> Iterator[DaemonProcess]:
    with DaemonProcess(capacity="64MiB") as daemon:
        yield daemon


def record_in(store: TensorStore, codec: str, key: bytes, block: torch.Tensor) -> bytes:
    """The record of a first block that a store of this namespace would write with a codec."""
    payload = block.view(torch.uint8).numpy().tobytes()
    record = (
        raw_record(payload, LAYOUT.dtype, LAYOUT.shape) if codec == "raw" else lossless_record(block, LAYOUT, codec)
    )
    header = msgspec.structs.replace(
        decode_header(record),
        key=key,
        parent_key=bytes(32),
        namespace_digest=store.client._session.digest,
        part=store.part,
    )
    return encode_header(header) + record[256:]


@both_paths
@pytest.mark.parametrize("codec", ["lossless", "lossless-zstd", "kivi4"])
def test_tensor_store_loads_what_became_of_a_lossless_record(daemon: DaemonProcess, mapped: bool, codec: str) -> None:
    name = f"kept {mapped} {codec}"
    kv = kv_of(LAYOUT, 1)
    with TensorStore(LAYOUT, codec, name=name, endpoint=daemon.endpoint, mapped=mapped) as store:
        (key,) = store.chain_keys(range(LAYOUT.block_tokens))
        made = transcode(record_in(store, "lossless", key, kv), "lossless>lossless-zstd")
        assert made is not None
        assert put_record(store.client, key, bytes(made[256:]), bytes(made[:256])) is PutStatus.STORED
        target = filled(kv)
        loaded = store.load_blocks([key], target)
        assert (loaded.loaded, loaded.fidelities) == (1, (255,))
        assert same(target, kv)


@both_paths
@pytest.mark.parametrize("pair", PAIRS)
def test_tensor_store_refuses_what_has_to_be_restored_and_loads_the_original(
    daemon: DaemonProcess, mapped: bool, pair: str
) -> None:
    kv = kv_of(LAYOUT, 1)
    with TensorStore(
        LAYOUT, "lossless", name=f"marked {mapped} {pair}", endpoint=daemon.endpoint, mapped=mapped
    ) as store:
        key, other = store.chain_keys(range(2 * LAYOUT.block_tokens))
        for at, wanted in ((key, Failure.CODEC), (other, None)):
            record = record_in(store, "raw", at, kv)
            made = transcode(record, pair)
            assert made is not None
            stored = made if wanted is Failure.CODEC else restore(made)
            assert put_record(store.client, at, bytes(stored[256:]), bytes(stored[:256])) is PutStatus.STORED
            target = filled(kv)
            loaded = store.load_blocks([at], target)
            assert loaded.failure == wanted
            assert loaded.loaded == (wanted is None)
            assert same(target, kv if wanted is None else filled(kv))


@both_paths
def test_plain_client_never_takes_a_transcoded_record_for_bytes_that_were_put(
    daemon: DaemonProcess, mapped: bool
) -> None:
    """A namespace of raw refuses it; where others are allowed, reading it as bytes is an error, not other bytes."""
    block = kv_of(LAYOUT, 1)
    for codec, status in (("raw", PutStatus.REJECTED), ("lossless", PutStatus.STORED)):
        with TensorStore(
            LAYOUT, codec, name=f"bytes {mapped} {codec}", endpoint=daemon.endpoint, mapped=mapped
        ) as store:
            (key,) = store.chain_keys(range(LAYOUT.block_tokens))
            made = transcode(record_in(store, "raw", key, block), "raw>lossless-zstd")
            assert made is not None
            assert put_record(store.client, key, bytes(made[256:]), bytes(made[:256])) is status
            if status is PutStatus.REJECTED:
                assert store.client.get(key) is None
                continue
            with pytest.raises(InvalidArgument, match="is stored as lossless-zstd, so its bytes are not those"):
                store.client.get(key)
            with pytest.raises(InvalidArgument, match="is stored as lossless-zstd"):
                store.client.get_into(key, bytearray(LAYOUT.block_bytes))


@both_paths
def test_plain_client_gets_the_bytes_that_it_put_of_a_record_that_was_restored(
    daemon: DaemonProcess, mapped: bool
) -> None:
    payload = kv_of(LAYOUT, 1).view(torch.uint8).numpy().tobytes()
    with Client(namespace=Namespace(name=f"restored {mapped}"), endpoint=daemon.endpoint, mapped=mapped) as client:
        first, second = b"1" * 32, b"2" * 32
        assert client.put(first, payload) is PutStatus.STORED
        (record,) = client._run(client._operations.get_records([first], 0, None))
        assert record is not None
        header, stored = record
        made = transcode(encode_header(header) + bytes(stored), "raw>lossless-zstd")
        assert made is not None
        back = bytes(restore(made))
        assert client.remove([first]) == 1
        assert put_record(client, first, back[256:], back[:256]) is PutStatus.STORED
        assert client.get(first) == payload
        assert client.get(second) is None
