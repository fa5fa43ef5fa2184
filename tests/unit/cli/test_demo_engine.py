"""The demo's engine against a store in this process: what it stores, loads, computes and generates."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import msgspec
import pytest
from fakes.fake_client import FakeClient

from kvstore.cli.demo_engine import EngineReport, EngineTask, Role, answer, load_blocks, namespace_of, store_blocks
from kvstore.cli.demo_model import MODEL_SHAPES, Engine, load_model
from kvstore.errors import KVStoreError
from kvstore.protocol.keys import chain_keys
from kvstore.protocol.namespace import Namespace

if find_spec("torch") is None or find_spec("transformers") is None:
    pytest.skip("torch and transformers are not installed (the extra 'demo')", allow_module_level=True)

BLOCK_TOKENS = 16
PROMPT_TOKENS = 8 * BLOCK_TOKENS + 5
NEW_TOKENS = 12
SHAPE = MODEL_SHAPES["tiny"]


@dataclass
class Prepared:
    """A tiny model, a prompt, and what is generated for it without a store."""

    torch: Any
    engine: Engine
    prompt: Any
    namespace: Namespace
    directory: Path

    def task(self, role: Role) -> EngineTask:
        return EngineTask(
            role=role,
            model_size="tiny",
            model_directory=str(self.directory),
            seed=0,
            prompt_tokens=self.prompt.shape[0],
            new_tokens=NEW_TOKENS,
            block_tokens=BLOCK_TOKENS,
            threads=1,
            endpoint="",
            timeout_s=0.2,
        )

    def answer(self, client: FakeClient | None, role: Role = "load", prompt: Any = None) -> EngineReport:
        with self.torch.inference_mode():
            return answer(
                self.engine, client, self.prompt if prompt is None else prompt, self.task(role), self.namespace
            )

    @property
    def keys(self) -> list[bytes]:
        return chain_keys(self.prompt.tolist(), BLOCK_TOKENS)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prepared]:
    directory = tmp_path_factory.mktemp("model")
    with warnings.catch_warnings(), pytest.MonkeyPatch.context() as patch:
        warnings.simplefilter("ignore")  # of the imports of torch and transformers, which are not ours
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        import torch

        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        model = load_model(directory, SHAPE, seed=0, max_tokens=PROMPT_TOKENS + NEW_TOKENS)
        engine = Engine(model, BLOCK_TOKENS)
        prompt = torch.randint(0, SHAPE.vocabulary, (PROMPT_TOKENS,), generator=torch.Generator().manual_seed(1))
        yield Prepared(torch, engine, prompt, namespace_of(directory, "tiny", engine.layout), directory)
        torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def cold(prepared: Prepared) -> EngineReport:
    return prepared.answer(None, "cold")


def test_cold_process_computes_everything_and_generates_varied_tokens(cold: EngineReport) -> None:
    assert (cold.matched_tokens, cold.computed_tokens) == (0, PROMPT_TOKENS)
    assert (cold.loaded_bytes, cold.stored_bytes) == (0, 0)
    assert len(cold.tokens) == NEW_TOKENS
    assert len(set(cold.tokens)) > NEW_TOKENS // 2
    assert all(0 <= token < SHAPE.vocabulary for token in cold.tokens)


def test_storing_process_stores_all_full_blocks_as_a_chain(prepared: Prepared, cold: EngineReport) -> None:
    client = FakeClient()
    report = prepared.answer(client, "store")
    keys = prepared.keys
    assert list(client.blocks) == keys
    assert [client.parents[key] for key in keys] == [None, *keys[:-1]]
    assert {len(block) for block in client.blocks.values()} == {SHAPE.layout(BLOCK_TOKENS).block_bytes}
    assert (report.stored_blocks, report.stored_bytes) == (8, 8 * report.block_bytes)
    assert set(client.requests) == {client.matches[0].request}
    assert report.tokens == cold.tokens


def test_loading_process_computes_the_rest_and_generates_the_same_bits(prepared: Prepared, cold: EngineReport) -> None:
    client = FakeClient()
    prepared.answer(client, "store")
    report = prepared.answer(client)
    assert (report.matched_tokens, report.computed_tokens) == (8 * BLOCK_TOKENS, 5)
    assert report.loaded_bytes == 8 * report.block_bytes
    assert report.stored_blocks == 0
    assert report.tokens == cold.tokens
    assert report.first_logits == cold.first_logits
    assert client.matches[-1].released
    assert client.matches[-1].lease


def test_prompt_of_whole_blocks_leaves_one_block_to_compute(prepared: Prepared) -> None:
    client = FakeClient()
    prompt = prepared.prompt[: 4 * BLOCK_TOKENS]
    stored = prepared.answer(client, "store", prompt)
    report = prepared.answer(client, "load", prompt)
    assert stored.stored_blocks == 4
    assert (report.matched_tokens, report.computed_tokens) == (3 * BLOCK_TOKENS, BLOCK_TOKENS)
    assert report.tokens == stored.tokens
    assert report.first_logits == stored.first_logits


def test_prompt_that_continues_a_stored_one_is_computed_from_where_it_leaves_it(prepared: Prepared) -> None:
    client = FakeClient()
    prepared.answer(client, "store", prepared.prompt[: 5 * BLOCK_TOKENS])
    prompt = prepared.prompt.clone()
    prompt[4 * BLOCK_TOKENS + 3] += 1
    report = prepared.answer(client, "load", prompt)
    assert report.matched_tokens == 4 * BLOCK_TOKENS
    assert report.tokens == prepared.answer(None, "cold", prompt).tokens


def test_second_storing_process_stores_only_what_is_missing(prepared: Prepared) -> None:
    client = FakeClient()
    prepared.answer(client, "store")
    client.remove(prepared.keys[6:])
    report = prepared.answer(client, "store")
    assert (report.matched_tokens, report.stored_blocks) == (6 * BLOCK_TOKENS, 2)
    assert client.parents[prepared.keys[6]] == prepared.keys[5]


@pytest.mark.parametrize("index", range(8))
def test_tokens_change_with_the_kv_of_any_one_block(prepared: Prepared, cold: EngineReport, index: int) -> None:
    client = FakeClient()
    prepared.answer(client, "store")
    keys = prepared.keys
    other = FakeClient()
    prompt = prepared.prompt.flip(0)
    prepared.answer(other, "store", prompt)
    client.blocks[keys[index]] = other.blocks[chain_keys(prompt.tolist(), BLOCK_TOKENS)[index]]
    report = prepared.answer(client)
    assert report.matched_tokens == 8 * BLOCK_TOKENS
    assert report.tokens != cold.tokens


def test_tokens_change_where_keys_and_values_are_exchanged(prepared: Prepared, cold: EngineReport) -> None:
    client = FakeClient()
    prepared.answer(client, "store")
    for key, block in client.blocks.items():
        exchanged = prepared.torch.frombuffer(bytearray(block), dtype=prepared.torch.float32)
        exchanged = exchanged.view(prepared.engine.layout.shape).flip(1).contiguous()
        client.blocks[key] = exchanged.numpy().tobytes()
    assert prepared.answer(client).tokens != cold.tokens


def test_kv_that_is_not_a_number_is_an_error(prepared: Prepared) -> None:
    client = FakeClient()
    prepared.answer(client, "store")
    client.blocks[prepared.keys[0]] = b"\xff" * len(client.blocks[prepared.keys[0]])
    with pytest.raises(KVStoreError, match="logits are not finite"):
        prepared.answer(client)


def test_block_lost_between_match_and_load_is_computed(prepared: Prepared, cold: EngineReport) -> None:
    class Forgetful(FakeClient):
        def get_many_into(self, keys: Any, outs: Any, *, request: int | None = None) -> list[int | None]:
            self.remove(keys[3:4])
            return super().get_many_into(keys, outs, request=request)

    client = Forgetful()
    prepared.answer(client, "store")
    report = prepared.answer(client)
    assert report.matched_tokens == 3 * BLOCK_TOKENS
    assert report.loaded_bytes == 3 * report.block_bytes
    assert report.tokens == cold.tokens
    assert client.matches[-1].released


def test_block_of_wrong_length_is_an_error_that_names_it(prepared: Prepared) -> None:
    client = FakeClient()
    prepared.answer(client, "store")
    client.blocks[prepared.keys[2]] = b"short"
    with pytest.raises(KVStoreError, match="block 2 has 5 bytes"):
        prepared.answer(client)
    assert client.matches[-1].released


def test_throttled_puts_are_tried_again(prepared: Prepared) -> None:
    client = FakeClient(throttle_next=3)
    report = prepared.answer(client, "store")
    keys = prepared.keys
    assert report.stored_blocks == 8
    assert client.parents == dict(zip(keys, [None, *keys[:-1]], strict=True))


def test_puts_throttled_for_too_long_end_in_an_error(prepared: Prepared) -> None:
    with pytest.raises(KVStoreError, match=r"throttled .* for 0\.2 s"):
        prepared.answer(FakeClient(throttle_next=1 << 30), "store")


def test_rejected_put_is_an_error_that_names_the_block(prepared: Prepared) -> None:
    with pytest.raises(KVStoreError, match="rejected block 4"):
        prepared.answer(FakeClient(reject={prepared.keys[4]}), "store")


def test_blocks_read_out_of_a_cache_go_back_in_unchanged(prepared: Prepared) -> None:
    torch, engine = prepared.torch, prepared.engine
    draw = torch.Generator().manual_seed(2)
    blocks = torch.randn((3, *engine.layout.shape), generator=draw)
    cache = engine.cache_of(blocks)
    assert cache.get_seq_length() == 3 * BLOCK_TOKENS
    assert torch.equal(engine.read_blocks(cache, 0, 3), blocks)
    assert torch.equal(engine.read_blocks(cache, 1, 2), blocks[1:2])
    token, head = BLOCK_TOKENS + 3, 1
    assert torch.equal(cache.layers[1].keys[0, head, token], blocks[1, 1, 0, 3, head])
    assert torch.equal(cache.layers[1].values[0, head, token], blocks[1, 1, 1, 3, head])


def test_store_and_load_in_several_calls_move_every_block(prepared: Prepared, monkeypatch: pytest.MonkeyPatch) -> None:
    torch, engine = prepared.torch, prepared.engine
    monkeypatch.setattr("kvstore.cli.demo_engine._BATCH_BYTES", 3 * engine.layout.block_bytes)
    blocks = torch.randn((8, *engine.layout.shape), generator=torch.Generator().manual_seed(3))
    client, keys = FakeClient(), prepared.keys
    assert store_blocks(client, keys, blocks, 0, 7, 1.0) == 8
    assert [client.parents[key] for key in keys] == [None, *keys[:-1]]
    pool = engine.empty_blocks(8)
    assert load_blocks(client, keys, pool, engine.layout, 7) == 8
    assert torch.equal(pool, blocks)


@pytest.mark.parametrize(
    ("prompt_tokens", "start", "edges"),
    [
        (2048, 0, [0, 512, 1024, 1536, 2032, 2048]),
        (2049, 0, [0, 512, 1024, 1536, 2048, 2049]),
        (2048, 2032, [2032, 2048]),
        (2048, 1024, [1024, 1536, 2032, 2048]),
        (17, 0, [0, 16, 17]),
        (16, 0, [0, 16]),
        (2, 0, [0, 2]),
    ],
)
def test_last_chunk_begins_at_the_last_block_border_before_the_last_token(
    prepared: Prepared, prompt_tokens: int, start: int, edges: list[int]
) -> None:
    assert prepared.engine.chunk_edges(prompt_tokens, start) == edges


def test_namespace_of_a_model_follows_its_weights(prepared: Prepared, tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((prepared.directory / name).read_bytes())
    assert namespace_of(tmp_path, "tiny", prepared.engine.layout) == prepared.namespace
    with open(tmp_path / "model.safetensors", "r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x7f")
    assert namespace_of(tmp_path, "tiny", prepared.engine.layout).revision != prepared.namespace.revision


def test_shape_has_the_layout_of_the_model_made_of_it(prepared: Prepared) -> None:
    assert prepared.engine.layout == SHAPE.layout(BLOCK_TOKENS)


def test_task_and_report_survive_their_pipes(prepared: Prepared, cold: EngineReport) -> None:
    task = prepared.task("store")
    assert msgspec.json.decode(msgspec.json.encode(task), type=EngineTask) == task
    assert msgspec.json.decode(msgspec.json.encode(cold), type=EngineReport) == cold
