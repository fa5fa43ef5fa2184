"""A real ``lmcache server`` with our adapter as its L2, and a worker that stores and retrieves KV as an engine does."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import torch
import zmq
from daemon_process import child_environment
from lmcache.utils import EngineType
from lmcache.v1.multiprocess.custom_types import IPCCacheServerKey
from lmcache.v1.multiprocess.group_view import EngineGroupInfo
from lmcache.v1.multiprocess.transfer_context import create_transfer_context
from lmcache.v1.multiprocess.transport.factory import RequestClientFactory

CHUNK_TOKENS = 64
LAYERS, HEADS, HEAD_DIM = 4, 2, 64
PAGES = 64
CHUNK_BYTES = LAYERS * 2 * CHUNK_TOKENS * HEADS * HEAD_DIM * 2
MODEL = "tests/tiny"
_WAIT_S = 30.0


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class LMCacheServer:
    """``lmcache server`` as a process.

    Args:
        folder: for its logs.
        adapter: ``adapter_params``.
        l1_gb: size of its own memory.
        serde: of the adapter's entry, None for none.
    """

    def __init__(
        self, folder: Path, adapter: dict[str, Any], *, l1_gb: float = 0.0625, serde: dict[str, Any] | None = None
    ) -> None:
        self._folder = folder
        self._entry: dict[str, Any] = {
            "type": "plugin",
            "module_path": "kvstore_client.integrations.lmcache",
            "class_name": "KVStoreL2Adapter",
            "adapter_params": {"unknown_revision": "ignore"} | adapter,
        }
        if serde:
            self._entry["serde"] = serde
        self._l1_gb = l1_gb
        self._runs = 0
        self._process: subprocess.Popen[bytes] | None = None
        self.rpc_port, self.http_port = free_port(), free_port()

    def start(self) -> Self:
        self._runs += 1
        command = [sys.executable, "-m", "lmcache.v1.multiprocess.http_server", "--instance-id", "tests"]
        command += ["--port", str(self.rpc_port), "--http-port", str(self.http_port), "--host", "127.0.0.1"]
        command += ["--chunk-size", str(CHUNK_TOKENS), "--l1-size-gb", str(self._l1_gb), "--eviction-policy", "LRU"]
        command += ["--eviction-trigger-watermark", "0.5", "--eviction-ratio", "0.8"]
        command += ["--prometheus-port", str(free_port()), "--l2-adapter", json.dumps(self._entry)]
        environ = child_environment(
            {"LMCACHE_DISABLE_BANNER": "1", "LMCACHE_TRACK_USAGE": "false", "DO_NOT_TRACK": "1"}
        )
        with self.log_path.open("wb") as log:
            self._process = subprocess.Popen(command, env=environ, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        self.wait(lambda: self._answers("/healthcheck"), "it serves")
        return self

    def stop(self) -> None:
        process, self._process = self._process, None
        if process is None or process.poll() is not None:
            return
        process.send_signal(signal.SIGINT)
        try:
            process.wait(_WAIT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            raise AssertionError(f"the server did not end: {self.log()}") from None

    def kill(self) -> None:
        process, self._process = self._process, None
        assert process is not None
        process.kill()
        process.wait()

    @property
    def log_path(self) -> Path:
        return self._folder / f"server-{self._runs}.log"

    def log(self) -> str:
        return self.log_path.read_text(errors="replace")

    def alive(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def adapter_status(self) -> dict[str, Any]:
        """What our adapter reports through the server's own status."""
        status = json.loads(self._get("/status"))

        def find(node: Any) -> dict[str, Any] | None:
            if isinstance(node, dict):
                if node.get("type") == "KVStoreL2Adapter":
                    return node
                node = list(node.values())
            if isinstance(node, list):
                return next((found for each in node if (found := find(each)) is not None), None)
            return None

        found = find(status)
        assert found is not None, status
        return found

    def wait(self, condition: Any, what: str, timeout_s: float = 90.0) -> None:
        end = time.monotonic() + timeout_s
        while not condition():
            assert self.alive(), f"the server ended before {what}: {self.log()[-3000:]}"
            assert time.monotonic() < end, f"not within {timeout_s:g} s: {what}: {self.log()[-3000:]}"
            time.sleep(0.05)

    def _get(self, path: str) -> bytes:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.http_port}{path}", timeout=10) as answer:
            body: bytes = answer.read()
            return body

    def _answers(self, path: str) -> bool:
        try:
            self._get(path)
        except OSError:
            return False
        return True


@contextmanager
def running(folder: Path, adapter: dict[str, Any], **options: Any) -> Iterator[LMCacheServer]:
    server = LMCacheServer(folder, adapter, **options)
    try:
        yield server.start()
    finally:
        server.stop()


class Worker:
    """An engine's worker of world size 1, whose pages are chunks, in host memory that it shares with the server."""

    def __init__(self, server: LMCacheServer, dtype: torch.dtype = torch.bfloat16) -> None:
        self.layers = {
            f"layer.{index}": torch.zeros((2, PAGES, CHUNK_TOKENS, HEADS, HEAD_DIM), dtype=dtype)
            for index in range(LAYERS)
        }
        self._context = zmq.Context()
        self._context.setsockopt(zmq.LINGER, 0)
        self._client = RequestClientFactory.create(f"tcp://127.0.0.1:{server.rpc_port}", context=self._context)
        self._transfer = create_transfer_context(
            self.layers, mode="lmcache_driven", instance_id=os.getpid(), req_client=self._client
        )
        self._transfer.register(
            self.layers,
            MODEL,
            1,
            1,
            _WAIT_S,
            layout_hints={"kv_layout": "NHD"},
            engine_group_infos=[
                EngineGroupInfo(engine_group_id=0, layer_indices=tuple(range(LAYERS)), tokens_per_block=CHUNK_TOKENS)
            ],
            engine_type=EngineType.VLLM,
        )

    def close(self) -> None:
        left = self._transfer.unregister()
        if left is not None:
            left.result(timeout=_WAIT_S)
        self._transfer.close()
        self._client.close()
        self._context.term()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def fill(self, pages: Sequence[int], seed: int) -> list[torch.Tensor]:
        """Random KV into pages; what stands in them now."""
        random = torch.Generator().manual_seed(seed)
        for layer in self.layers.values():
            values = torch.randn((2, len(pages), *layer.shape[2:]), generator=random)
            layer[:, list(pages)] = values.to(layer.dtype)
        return self.read(pages)

    def read(self, pages: Sequence[int]) -> list[torch.Tensor]:
        """A copy of what stands in pages, by layer."""
        return [layer[:, list(pages)].clone() for layer in self.layers.values()]

    def clear(self, pages: Sequence[int]) -> None:
        for layer in self.layers.values():
            layer[:, list(pages)] = 0

    def store(self, tokens: Sequence[int], pages: Sequence[int], salt: str = "") -> bool:
        """Have the server take pages as the KV of tokens."""
        request = uuid.uuid4().hex
        key = self._key(tokens, request, salt, worker=0)
        event = self._transfer.create_recorded_event()
        done = self._transfer.submit_store(request, key, self.layers, [list(pages)], event, 1).result(timeout=_WAIT_S)
        self._client.end_session(request).result(timeout=_WAIT_S)
        return bool(done)

    def retrieve(self, tokens: Sequence[int], pages: Sequence[int], salt: str = "") -> int:
        """Look tokens up and have the server write what it finds into pages; how many chunks."""
        request = uuid.uuid4().hex
        self._client.lookup(self._key(tokens, request, salt, worker=None), 1).result(timeout=_WAIT_S)
        end = time.monotonic() + _WAIT_S
        while (hits := self._client.query_prefetch_status(request).result(timeout=_WAIT_S)) is None:
            assert time.monotonic() < end, "the lookup did not end"
            time.sleep(0.005)
        if hits:
            key = self._key(tokens[: hits * CHUNK_TOKENS], request, salt, worker=0)
            event = self._transfer.create_recorded_event()
            done = self._transfer.submit_retrieve(
                request, key, self.layers, [list(pages[:hits])], event, 1, skip_first_n_tokens=0
            ).result(timeout=_WAIT_S)
            assert done, "the server did not retrieve what it had found"
        self._client.end_session(request).result(timeout=_WAIT_S)
        return int(hits)

    @staticmethod
    def _key(tokens: Sequence[int], request: str, salt: str, worker: int | None) -> IPCCacheServerKey:
        return IPCCacheServerKey(
            model_name=MODEL,
            world_size=1,
            worker_id=worker,
            token_ids=tuple(tokens),
            start=0,
            end=len(tokens) // CHUNK_TOKENS * CHUNK_TOKENS,
            request_id=request,
            cache_salt=salt,
            num_kv_readers=1,
        )
