"""The demo's engine against a store in this process: what it stores, loads, computes and generates."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import msgspec
import pytest
from fakes.fake_tensor_store import FakeTensorStore

from kvstore.cli.demo_engine import EngineReport, EngineTask, Role, answer, revision_of
from kvstore.cli.demo_model import MODEL_SHAPES, TRAINED, Engine, LlamaEngine, load_model
from kvstore.cli.demo_trained import TrainedEngine, draw_texts, trained_revision
from kvstore.cli.quality.model import SmallModel
from kvstore.errors import ConnectionLost, KVStoreError
from kvstore.protocol.keys import chain_keys
from kvstore_client.tensors import Failure

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
    directory: Path

    def store(self, **options: Any) -> FakeTensorStore:
        return FakeTensorStore(self.engine.layout, **options)

    def task(self, role: Role, expected: list[int] | None = None) -> EngineTask:
        return EngineTask(
            role=role,
            model_size="tiny",
            model_directory=str(self.directory),
            seed=0,
            prompt_tokens=self.prompt.shape[0],
            new_tokens=NEW_TOKENS,
            block_tokens=BLOCK_TOKENS,
            codec="raw",
            threads=1,
            expected=expected or [],
            endpoint="",
            timeout_s=0.2,
        )

    def answer(
        self,
        store: FakeTensorStore | None,
        role: Role = "load",
        prompt: Any = None,
        expected: list[int] | None = None,
    ) -> EngineReport:
        prompt = self.prompt if prompt is None else prompt
        with ExitStack() as stack:
            cached = None
            if store is not None:
                patch = stack.enter_context(pytest.MonkeyPatch.context())
                patch.setattr("kvstore_client.integrations.transformers.TensorStore", lambda *_, **__: store)
                from kvstore_client.integrations.transformers import CacheStore

                cached = stack.enter_context(CacheStore(self.engine.model, revision="1", block_tokens=BLOCK_TOKENS))
            stack.enter_context(self.torch.inference_mode())
            return answer(self.engine, cached, prompt, self.task(role, expected))

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
        engine = LlamaEngine(model, BLOCK_TOKENS)
        prompt = torch.randint(0, SHAPE.vocabulary, (PROMPT_TOKENS,), generator=torch.Generator().manual_seed(1))
        yield Prepared(torch, engine, prompt, directory)
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
    store = prepared.store()
    report = prepared.answer(store, "store")
    keys = prepared.keys
    assert list(store.blocks) == keys
    assert [store.parents[key] for key in keys] == [None, *keys[:-1]]
    assert {len(block) for block in store.blocks.values()} == {SHAPE.layout(BLOCK_TOKENS).block_bytes}
    assert (report.stored_blocks, report.stored_bytes) == (8, 8 * report.block_bytes)
    assert set(store.requests) == {store.matches[0].request}
    assert report.tokens == cold.tokens


def test_loading_process_computes_the_rest_and_generates_the_same_bits(prepared: Prepared, cold: EngineReport) -> None:
    store = prepared.store()
    prepared.answer(store, "store")
    report = prepared.answer(store)
    assert (report.matched_tokens, report.computed_tokens) == (8 * BLOCK_TOKENS, 5)
    assert report.loaded_bytes == 8 * report.block_bytes
    assert report.stored_blocks == 0
    assert report.tokens == cold.tokens
    assert report.first_logits == cold.first_logits
    assert store.matches[-1].released
    assert store.matches[-1].lease


def test_prompt_of_whole_blocks_leaves_one_block_to_compute(prepared: Prepared) -> None:
    store = prepared.store()
    prompt = prepared.prompt[: 4 * BLOCK_TOKENS]
    stored = prepared.answer(store, "store", prompt)
    report = prepared.answer(store, "load", prompt)
    assert stored.stored_blocks == 4
    assert (report.matched_tokens, report.computed_tokens) == (3 * BLOCK_TOKENS, BLOCK_TOKENS)
    assert report.tokens == stored.tokens
    assert report.first_logits == stored.first_logits


def test_prompt_that_continues_a_stored_one_is_computed_from_where_it_leaves_it(prepared: Prepared) -> None:
    store = prepared.store()
    prepared.answer(store, "store", prepared.prompt[: 5 * BLOCK_TOKENS])
    prompt = prepared.prompt.clone()
    prompt[4 * BLOCK_TOKENS + 3] += 1
    report = prepared.answer(store, "load", prompt)
    assert report.matched_tokens == 4 * BLOCK_TOKENS
    assert report.tokens == prepared.answer(None, "cold", prompt).tokens


def test_second_storing_process_stores_only_what_is_missing(prepared: Prepared) -> None:
    store = prepared.store()
    prepared.answer(store, "store")
    store.remove(prepared.keys[6:])
    report = prepared.answer(store, "store")
    assert (report.matched_tokens, report.stored_blocks) == (6 * BLOCK_TOKENS, 2)
    assert store.parents[prepared.keys[6]] == prepared.keys[5]


@pytest.mark.parametrize("index", range(8))
def test_tokens_change_with_the_kv_of_any_one_block(prepared: Prepared, cold: EngineReport, index: int) -> None:
    store = prepared.store()
    prepared.answer(store, "store")
    keys = prepared.keys
    other = prepared.store()
    prompt = prepared.prompt.flip(0)
    prepared.answer(other, "store", prompt)
    store.blocks[keys[index]] = other.blocks[chain_keys(prompt.tolist(), BLOCK_TOKENS)[index]]
    report = prepared.answer(store)
    assert report.matched_tokens == 8 * BLOCK_TOKENS
    assert report.tokens != cold.tokens


def test_tokens_change_where_keys_and_values_are_exchanged(prepared: Prepared, cold: EngineReport) -> None:
    store = prepared.store()
    prepared.answer(store, "store")
    for key, block in store.blocks.items():
        exchanged = prepared.torch.frombuffer(bytearray(block), dtype=prepared.torch.float32)
        exchanged = exchanged.view(prepared.engine.layout.shape).flip(1).contiguous()
        store.blocks[key] = exchanged.numpy().tobytes()
    assert prepared.answer(store).tokens != cold.tokens


def test_kv_that_is_not_a_number_is_an_error(prepared: Prepared) -> None:
    store = prepared.store()
    prepared.answer(store, "store")
    store.blocks[prepared.keys[0]] = b"\xff" * len(store.blocks[prepared.keys[0]])
    with pytest.raises(KVStoreError, match="logits are not finite"):
        prepared.answer(store)


def test_block_lost_between_match_and_load_is_computed(prepared: Prepared, cold: EngineReport) -> None:
    store = prepared.store()
    prepared.answer(store, "store")
    store.failures[prepared.keys[3]] = Failure.MISS
    report = prepared.answer(store)
    assert report.matched_tokens == 3 * BLOCK_TOKENS
    assert report.loaded_bytes == 3 * report.block_bytes
    assert report.tokens == cold.tokens
    assert store.matches[-1].released


@pytest.mark.parametrize("failure", [Failure.LAYOUT, Failure.CODEC, Failure.CORRUPT])
def test_block_that_cannot_be_decoded_is_an_error_that_names_it(prepared: Prepared, failure: Failure) -> None:
    store = prepared.store()
    prepared.answer(store, "store")
    store.failures[prepared.keys[2]] = failure
    with pytest.raises(KVStoreError, match=f"none of this model's: block 2: {failure}"):
        prepared.answer(store)
    assert store.matches[-1].released


def test_expected_tokens_are_counted_behind_those_before_them(prepared: Prepared, cold: EngineReport) -> None:
    assert (cold.expected, prepared.answer(None, "cold", expected=cold.tokens).expected) == (0, NEW_TOKENS)
    other = [*cold.tokens[:4], (cold.tokens[4] + 1) % SHAPE.vocabulary, *cold.tokens[5:]]
    report = prepared.answer(None, "cold", expected=other)
    assert 4 <= report.expected < NEW_TOKENS
    assert report.tokens == cold.tokens


def test_throttled_puts_are_tried_again(prepared: Prepared) -> None:
    store = prepared.store(throttle_next=3)
    report = prepared.answer(store, "store")
    keys = prepared.keys
    assert report.stored_blocks == 8
    assert store.parents == dict(zip(keys, [None, *keys[:-1]], strict=True))


def test_puts_throttled_for_too_long_end_in_an_error(prepared: Prepared) -> None:
    with pytest.raises(KVStoreError, match=r"throttled .* for 0\.2 s"):
        prepared.answer(prepared.store(throttle_next=1 << 30), "store")


def test_rejected_put_is_an_error_that_names_the_block(prepared: Prepared) -> None:
    with pytest.raises(KVStoreError, match="rejected block 4 of the prompt: parent_unknown"):
        prepared.answer(prepared.store(reject={prepared.keys[4]}), "store")


def test_a_store_that_goes_away_is_an_error(prepared: Prepared) -> None:
    store = prepared.store()

    def gone(*_: Any, **__: Any) -> Any:
        raise ConnectionLost("gone")

    store.match = gone  # type: ignore[method-assign]
    with pytest.raises(KVStoreError, match="the store could not be reached"):
        prepared.answer(store)
    store = prepared.store()
    store.save_blocks = gone  # type: ignore[method-assign]
    with pytest.raises(KVStoreError, match="the store could not be reached"):
        prepared.answer(store, "store")


# ------------------------------------------------------------------ the trained model


@pytest.fixture(scope="module")
def trained(prepared: Prepared) -> Prepared:
    prompt = prepared.torch.from_numpy(draw_texts(PROMPT_TOKENS, 3)[0])
    return Prepared(prepared.torch, TrainedEngine(BLOCK_TOKENS), prompt, prepared.directory)


def test_trained_model_says_in_steps_what_it_says_at_once(trained: Prepared) -> None:
    torch, engine, model = trained.torch, trained.engine, SmallModel()
    with torch.inference_mode():
        cache = engine.new_cache()
        engine.read(trained.prompt[:50], cache)
        engine.read(trained.prompt[50:51], cache)
        logits = engine.read(trained.prompt[51:60], cache)
        expected, _ = model.extend(trained.prompt[None, :60], torch.empty(1, 4, 2, 0, 2, 64, dtype=torch.bfloat16))
        kv = model.prefill(trained.prompt[None, :60])
    assert torch.allclose(logits, expected[0, -1], atol=0.2)
    assert int(logits.argmax()) == int(expected[0, -1].argmax())
    for states, layer in zip(cache.layers, kv[0], strict=True):
        assert torch.allclose(states.keys[0].float(), layer[0].transpose(0, 1).float(), atol=0.1, rtol=0.05)
        assert torch.allclose(states.values[0].float(), layer[1].transpose(0, 1).float(), atol=0.1, rtol=0.05)


def test_trained_model_goes_on_from_loaded_blocks_with_the_same_bits(trained: Prepared) -> None:
    cold = trained.answer(None, "cold")
    store = trained.store()
    stored = trained.answer(store, "store")
    report = trained.answer(store, expected=cold.tokens)
    assert (stored.stored_blocks, report.matched_tokens) == (8, 8 * BLOCK_TOKENS)
    assert report.tokens == stored.tokens == cold.tokens
    assert report.first_logits == cold.first_logits
    assert report.expected == NEW_TOKENS


def test_trained_model_has_the_shape_that_the_demo_says() -> None:
    shape = MODEL_SHAPES[TRAINED]
    assert shape.layout(64) == SmallModel.layout(64) == TrainedEngine(64).layout
    assert TrainedEngine(64).parameters == pytest.approx(2.6e6, rel=0.02)
    assert trained_revision().startswith("sha256:")


def test_texts_are_two_stretches_that_the_seed_decides() -> None:
    texts = draw_texts(448, 5)
    assert texts.shape == (2, 448)
    assert texts.max() < MODEL_SHAPES[TRAINED].vocabulary
    assert (texts == draw_texts(448, 5)).all()
    assert (texts[0] != texts[1]).any()
    assert (texts != draw_texts(448, 6)).any()


# ------------------------------------------------------------------ chunks, names, pipes


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


def test_revision_of_a_model_follows_its_weights(prepared: Prepared, tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((prepared.directory / name).read_bytes())
    assert revision_of(tmp_path) == revision_of(prepared.directory)
    with open(tmp_path / "model.safetensors", "r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x7f")
    assert revision_of(tmp_path) != revision_of(prepared.directory)


def test_shape_has_the_layout_of_the_model_made_of_it(prepared: Prepared) -> None:
    assert prepared.engine.layout == SHAPE.layout(BLOCK_TOKENS)


def test_task_and_report_survive_their_pipes(prepared: Prepared, cold: EngineReport) -> None:
    task = prepared.task("store")
    assert msgspec.json.decode(msgspec.json.encode(task), type=EngineTask) == task
    assert msgspec.json.decode(msgspec.json.encode(cold), type=EngineReport) == cold
