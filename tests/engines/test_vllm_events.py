"""vLLM reads kvstore's events with its own decoder and protocol, and kvstore reads vLLM's."""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator
from hashlib import sha256
from typing import Any

import pytest
import zmq
from daemon_process import DaemonProcess, wait_until

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    pytest.importorskip("vllm", reason="vLLM is not installed; run with the Python of an environment that has it")
    import msgspec
    from vllm.distributed import kv_events as theirs

from kvstore.protocol.kv_events import (
    END_OF_REPLAY,
    AllBlocksCleared,
    BlockRemoved,
    BlockStored,
    decode_batch,
    encode_batch,
    replay_request,
)
from kvstore.protocol.namespace import Namespace
from kvstore_client import Client
from kvstore_client.block_index import BlockIndex

pytestmark = [pytest.mark.engine, pytest.mark.filterwarnings("default")]

KEYS = [sha256(bytes([number])).digest() for number in range(60)]
NAMESPACE = Namespace(name="events", block_tokens=16)


@pytest.fixture
def daemon() -> Iterator[DaemonProcess]:
    environ = {"KVSTORE_EVENTS__PUBLISH": "true", "KVSTORE_EVENTS__HEARTBEAT_S": "0.1"}
    with DaemonProcess(environ=environ) as running:
        yield running


class Subscriber:
    """As subscribers of vLLM are written: a SUB socket, the last number, and another socket for what is missing."""

    def __init__(self, endpoint: str, replay_endpoint: str) -> None:
        self.decoder = msgspec.msgpack.Decoder(type=theirs.KVEventBatch)
        self.context: zmq.Context[Any] = zmq.Context()
        self.sub = self.context.socket(zmq.SUB)
        self.sub.setsockopt_string(zmq.SUBSCRIBE, "")
        self.sub.connect(endpoint)
        self.replay = self.context.socket(zmq.DEALER)
        self.replay.setsockopt(zmq.RCVTIMEO, 5000)
        self.replay.connect(replay_endpoint)
        self.last = -1
        self.blocks: dict[bytes, bytes | None] = {}
        self.gaps = 0

    def poll(self, lose: bool = False) -> None:
        while self.sub.poll(50):
            _, number, payload = self.sub.recv_multipart()
            if lose:
                continue
            sequence = int.from_bytes(number, "big")
            if self.last >= 0 and sequence > self.last + 1:
                self.gaps += 1
                self.ask(self.last + 1)
            if sequence > self.last:
                self.take(sequence, payload)

    def ask(self, start: int) -> None:
        self.replay.send_multipart([b"", start.to_bytes(8, "big")])
        while True:
            empty, _, number, payload = self.replay.recv_multipart()
            assert empty == b""
            if number == theirs.ZmqEventPublisher.END_SEQ:
                return
            sequence = int.from_bytes(number, "big")
            if sequence > self.last:
                self.take(sequence, payload)

    def take(self, sequence: int, payload: bytes) -> None:
        for event in self.decoder.decode(payload).events:
            if isinstance(event, theirs.BlockStored):
                assert event.medium == theirs.MEDIUM_CPU
                assert event.block_size == NAMESPACE.block_tokens
                assert event.token_ids == []
                parent = event.parent_block_hash
                for key in event.block_hashes:
                    self.blocks[key] = parent
                    parent = key
            elif isinstance(event, theirs.BlockRemoved):
                for key in event.block_hashes:
                    del self.blocks[key]
            else:
                assert isinstance(event, theirs.AllBlocksCleared)
                self.blocks.clear()
        self.last = sequence

    def close(self) -> None:
        self.sub.close(0)
        self.replay.close(0)
        self.context.term()


def held(client: Client) -> set[bytes]:
    return {key for key, there in zip(KEYS, client.exists(KEYS), strict=True) if there}


def test_vllm_subscriber_follows_and_replays(daemon: DaemonProcess) -> None:
    subscriber = Subscriber(f"{daemon.endpoint}.events", f"{daemon.endpoint}.replay")
    try:
        wait_until(lambda: subscriber.poll() or subscriber.last >= 0)
        with daemon.connect(namespace=NAMESPACE) as client:
            client.put_many(KEYS[:20], [b"there"] * 20)
            wait_until(lambda: subscriber.poll() or set(subscriber.blocks) == held(client))
            assert subscriber.blocks[KEYS[0]] is None
            assert subscriber.blocks[KEYS[7]] == KEYS[6]
            for first in range(20, 60, 4):
                client.put_many(KEYS[first : first + 4], [b"there"] * 4, parent=KEYS[first - 1])
                client.remove(KEYS[first - 9 : first - 7])
            subscriber.poll(lose=True)
            client.remove(KEYS[:1])
            wait_until(lambda: subscriber.poll() or set(subscriber.blocks) == held(client))
            assert subscriber.gaps == 1
            client.clear()
            wait_until(lambda: subscriber.poll() or not subscriber.blocks)
            # Heartbeats in between are batches like others.
            before, gaps = subscriber.last, subscriber.gaps
            time.sleep(0.5)
            subscriber.poll()
            assert subscriber.last > before
            assert subscriber.gaps == gaps
    finally:
        subscriber.close()


@pytest.mark.parametrize("graceful", [True, False])
def test_vllm_subscriber_forgets_a_daemon_that_is_gone(daemon: DaemonProcess, graceful: bool) -> None:
    """It knows of no incarnations: a gap after the restart leads to a replay, which begins with everything cleared."""
    subscriber = Subscriber(f"{daemon.endpoint}.events", f"{daemon.endpoint}.replay")
    try:
        wait_until(lambda: subscriber.poll() or subscriber.last >= 0)
        with daemon.connect(namespace=NAMESPACE) as client:
            client.put_many(KEYS[:20], [b"there"] * 20)
            wait_until(lambda: subscriber.poll() or len(subscriber.blocks) == 20)
        if graceful:
            daemon.terminate()
            wait_until(lambda: subscriber.poll() or not subscriber.blocks)
            daemon.start()
        else:
            daemon.restart()
            wait_until(lambda: subscriber.poll() or not subscriber.blocks)
        with daemon.connect(namespace=NAMESPACE) as client:
            client.put_many(KEYS[30:35], [b"there"] * 5)
            wait_until(lambda: subscriber.poll() or set(subscriber.blocks) == set(KEYS[30:35]))
        assert subscriber.gaps == 1
    finally:
        subscriber.close()


def test_vllm_decoder_reads_every_event() -> None:
    digest = NAMESPACE.digest(0)
    payload = encode_batch(
        12.5,
        [
            BlockStored(list(KEYS[1:3]), KEYS[0], block_size=16, namespace=digest, incarnation=7),
            BlockRemoved([KEYS[1]], namespace=digest, incarnation=7),
            AllBlocksCleared(7),
        ],
    )
    batch = msgspec.msgpack.decode(payload, type=theirs.KVEventBatch)
    assert batch == theirs.KVEventBatch(
        ts=12.5,
        events=[
            theirs.BlockStored(
                block_hashes=KEYS[1:3],
                parent_block_hash=KEYS[0],
                token_ids=[],
                block_size=16,
                lora_id=None,
                medium="CPU",
                lora_name=None,
            ),
            theirs.BlockRemoved(block_hashes=[KEYS[1]], medium="CPU"),
            theirs.AllBlocksCleared(),
        ],
    )
    assert msgspec.msgpack.decode(encode_batch(1.0, []), type=theirs.KVEventBatch).events == []


def test_batches_of_vllm_are_read() -> None:
    publisher = theirs.ZmqEventPublisher(0, endpoint="inproc://events", replay_endpoint="inproc://replay", topic="kv")
    sub = zmq.Context.instance().socket(zmq.SUB)
    sub.setsockopt(zmq.RCVTIMEO, 5000)
    sub.setsockopt(zmq.SUBSCRIBE, b"kv")
    sub.connect("inproc://events")
    time.sleep(0.3)
    stored: dict[str, Any] = {"block_size": 2, "lora_id": None, "lora_name": "adapter", "extra_keys": [("adapter",)]}
    publisher.publish(
        theirs.KVEventBatch(
            ts=1.0,
            events=[
                theirs.BlockStored(
                    block_hashes=KEYS[:1], parent_block_hash=None, token_ids=[1, 2], medium="GPU", group_idx=0, **stored
                ),
                theirs.BlockStored(block_hashes=[2**63], parent_block_hash=11, token_ids=[3, 4], medium=None, **stored),
                theirs.BlockRemoved(block_hashes=[2**63], medium="GPU", group_idx=0),
            ],
        )
    )
    try:
        _, number, payload = sub.recv_multipart()
        dealer = zmq.Context.instance().socket(zmq.DEALER)
        try:
            dealer.setsockopt(zmq.RCVTIMEO, 5000)
            dealer.connect("inproc://replay")
            dealer.send_multipart(replay_request(0))
            assert dealer.recv_multipart() == [b"", b"kv", number, payload]
            assert dealer.recv_multipart() == [b"", b"", END_OF_REPLAY, b""]
        finally:
            dealer.close(0)
    finally:
        sub.close(0)
        publisher.shutdown()
    assert number == bytes(8)
    batch = decode_batch(payload)
    assert batch.data_parallel_rank == 0
    index = BlockIndex()
    index.apply(batch.events[:2])
    assert index.namespaces == {b"": {KEYS[0]: None, 2**63: 11}}
    index.apply(batch.events[2:])
    assert index.namespaces == {b"": {KEYS[0]: None}}
    assert isinstance(batch.events[0], BlockStored)
    assert batch.events[0].token_ids == [1, 2]
