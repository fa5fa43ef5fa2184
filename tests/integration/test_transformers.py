"""Caches of transformers models in a live store: the same tokens with it as without, and no others."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from importlib.util import find_spec
from itertools import count
from typing import Any, Protocol

import numpy as np
import pytest
from daemon_process import DaemonProcess

if find_spec("torch") is None or find_spec("transformers") is None:
    pytest.skip("torch and transformers are not installed (the extra 'transformers')", allow_module_level=True)

from tiny_models import (
    CHUNKS_GO_ON,
    FAMILIES,
    NEW_TOKENS,
    computed_tokens,
    generate,
    model_of,
    prompt_of,
    quiet,
    torch,
)

from kvstore.errors import InvalidArgument
from kvstore.protocol.messages import PutStatus
from kvstore_client.integrations.transformers import CacheStore, KVStoreCache
from kvstore_client.tensors import TensorStore

PROMPT_TOKENS = 301
BLOCK = 64
LOADED = 4 * BLOCK
_revisions = count()


class Open(Protocol):
    def __call__(self, model: Any, codec: str = "raw", **options: Any) -> CacheStore: ...


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def open_store(daemon: DaemonProcess) -> Iterator[Open]:
    """Makes stores of one namespace, which no other test uses."""
    stores: list[CacheStore] = []
    revision = f"revision {next(_revisions)}"

    def make(model: Any, codec: str = "raw", **options: Any) -> CacheStore:
        stores.append(CacheStore(model, codec, **{"revision": revision, "endpoint": daemon.endpoint, **options}))
        return stores[-1]

    yield make
    for store in stores:
        store.close()


@pytest.fixture(scope="module")
def llama() -> Any:
    return model_of("Llama")


def new_tokens(output: Any) -> list[int]:
    return output[0, -NEW_TOKENS:].tolist()


# ---------------------------------------------------------------- the same tokens


@pytest.mark.parametrize("codec", ["raw", "lossless"])
@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_with_a_hit_are_those_without(open_store: Open, family: str, codec: str) -> None:
    for seed in range(3):
        model, ids = model_of(family, seed), prompt_of(PROMPT_TOKENS, seed)
        cold = generate(model, ids)
        assert len(set(new_tokens(cold))) > 4
        store = open_store(model, codec, model_name=f"seed {seed}")
        with store.load(ids) as first:
            assert torch.equal(generate(model, ids, first), cold)
        assert (first.loaded_tokens, first.loaded) == (0, None)
        with store.load(ids) as again:
            output, computed = computed_tokens(model, lambda: generate(model, ids, again))  # noqa: B023
        assert torch.equal(output, cold)
        assert again.loaded_tokens == LOADED
        assert computed == PROMPT_TOKENS - LOADED + NEW_TOKENS - 1
        # The prompt and what was generated: 332 tokens were computed, 5 full blocks of them.
        assert store.stats.stored_blocks == 5
        assert again.unsaved == ""


@pytest.mark.parametrize("family", ["Llama", "Mistral", "Gemma3"])
def test_what_was_generated_is_found_as_the_next_prompt(open_store: Open, family: str) -> None:
    model, ids = model_of(family), prompt_of(PROMPT_TOKENS)
    store = open_store(model)
    for turn in range(3):
        cold = generate(model, ids)
        with store.load(ids) as cache:
            assert torch.equal(generate(model, ids, cache), cold)
        # All but the token that was generated last is in the store, by full blocks.
        assert cache.loaded_tokens == ((ids.shape[1] - 30) // BLOCK * BLOCK if turn else 0)
        ids = torch.cat([cold, prompt_of(29, seed=turn)], dim=1)


def test_a_fresh_store_of_the_same_model_finds_what_another_saved(open_store: Open, llama: Any) -> None:
    ids = prompt_of(PROMPT_TOKENS)
    with open_store(llama).load(ids) as cache:
        cold = generate(llama, ids, cache)
    twin = model_of("Llama")
    other = open_store(twin).load(ids)
    assert other.loaded_tokens == LOADED
    assert torch.equal(generate(twin, ids, other), cold)


def test_two_conversations_share_their_prefix(open_store: Open, llama: Any) -> None:
    store, system = open_store(llama), prompt_of(200)
    prompts = [torch.cat([system, prompt_of(101, seed)], dim=1) for seed in (1, 2)]
    with store.load(prompts[0]) as cache:
        generate(llama, prompts[0], cache)
    with store.load(prompts[1]) as cache:
        assert torch.equal(generate(llama, prompts[1], cache), generate(llama, prompts[1]))
    assert cache.loaded_tokens == 3 * BLOCK
    assert store.stats.stored_blocks == 5 + 2
    assert store.load(prompts[0]).loaded_tokens == store.load(prompts[1]).loaded_tokens == LOADED


@pytest.mark.parametrize("tokens", [1, 64, 65, 128, 129])
def test_the_last_token_is_always_left_to_compute(open_store: Open, llama: Any, tokens: int) -> None:
    store, ids = open_store(llama), prompt_of(tokens)
    cold = generate(llama, ids)
    for _ in range(2):
        with store.load(ids) as cache:
            assert torch.equal(generate(llama, ids, cache), cold)
    assert cache.loaded_tokens == (tokens - 1) // BLOCK * BLOCK


def test_prefill_in_chunks_goes_on_from_the_prefix(open_store: Open, llama: Any) -> None:
    store, ids = open_store(llama), prompt_of(PROMPT_TOKENS)
    with store.load(ids) as cache:
        cold = generate(llama, ids, cache, prefill_chunk_size=50)
    assert torch.equal(cold, generate(llama, ids))
    # transformers 5.0 counts wrong positions behind the last chunk: then the prompt is saved, and nothing after it.
    assert store.stats.stored_blocks == (4 if cache.unsaved else 5)
    cache = store.load(ids[:, :200])
    if CHUNKS_GO_ON:
        assert torch.equal(generate(llama, ids, cache, prefill_chunk_size=50), cold)
        assert cache.loaded_tokens == 3 * BLOCK
    else:
        with pytest.raises(InvalidArgument, match=r"prefill_chunk_size\), pass it empty"):
            generate(llama, ids, cache, prefill_chunk_size=50)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_low_precision_is_kept_to_the_bit(open_store: Open, dtype: str) -> None:
    model, ids = model_of("Llama").to(getattr(torch, dtype)), prompt_of(PROMPT_TOKENS)
    store = open_store(model, "lossless")
    assert store.layout.dtype == dtype
    with store.load(ids) as first, quiet():
        model(ids, past_key_values=first)
    again = store.load(ids)
    for ours, theirs in zip(again.layers, first.layers, strict=True):
        assert torch.equal(ours.keys, theirs.keys[:, :, :LOADED])
        assert torch.equal(ours.values, theirs.values[:, :, :LOADED])


def test_a_forward_of_ones_own_is_followed_too(open_store: Open, llama: Any) -> None:
    store, ids = open_store(llama), prompt_of(PROMPT_TOKENS)
    with torch.no_grad(), quiet():
        with store.load(ids) as cache:
            llama(ids[:, :70], past_key_values=cache)
            llama.model(ids[:, 70:], past_key_values=cache)
        cold = llama(ids).logits[0, -1]
        cache = store.load(ids)
        warm = llama(ids[:, LOADED:], past_key_values=cache).logits[0, -1]
    assert cache.loaded_tokens == LOADED
    assert torch.allclose(warm, cold, atol=1e-4)


# ---------------------------------------------------------------- controls


def test_other_payloads_under_the_same_keys_change_the_tokens(open_store: Open, llama: Any) -> None:
    store, ids = open_store(llama), prompt_of(PROMPT_TOKENS)
    with store.load(ids) as cache:
        cold = generate(llama, ids, cache)
    assert torch.equal(generate(llama, ids, store.load(ids)), cold)
    tensors = store.tensors
    assert tensors is not None
    keys = tensors.chain_keys(ids[0].numpy())
    kv = np.zeros((*store.layout.shape[:2], len(keys) * BLOCK, *store.layout.shape[3:]), np.float32)
    assert tensors.load_blocks(keys, kv).loaded == len(keys)
    for index in range(len(keys)):
        tensors.client.remove(keys)
        altered = kv.copy()
        block = altered[:, :, index * BLOCK : (index + 1) * BLOCK]
        block[:] = -block
        assert tensors.save_blocks(keys, altered).stored == len(keys)
        cache = store.load(ids)
        assert cache.loaded_tokens == LOADED
        assert not torch.equal(generate(llama, ids, cache), cold), f"block {index} does not matter"


def test_zeros_instead_of_what_was_loaded_change_the_tokens(open_store: Open, llama: Any) -> None:
    store, ids = open_store(llama), prompt_of(PROMPT_TOKENS)
    with store.load(ids) as cache:
        cold = generate(llama, ids, cache)
    cache = store.load(ids)
    for layer in cache.layers:
        layer.keys.zero_()
        layer.values.zero_()
    assert not torch.equal(generate(llama, ids, cache), cold)


def test_models_and_revisions_do_not_see_each_other(open_store: Open, llama: Any) -> None:
    ids = prompt_of(PROMPT_TOKENS)
    with open_store(llama).load(ids) as cache:
        generate(llama, ids, cache)
    others = [
        open_store(llama, revision="another"),
        open_store(llama, model_name="another"),
        open_store(llama, tenant_salt=b"another"),
        open_store(llama, "lossless"),
        open_store(model_of("Llama", rope_theta=20000.0)),
        open_store(model_of("Qwen2")),
        open_store(copy.deepcopy(llama).to(torch.bfloat16)),
    ]
    assert [store.load(ids).loaded_tokens for store in others] == [0] * len(others)
    assert open_store(llama).load(ids).loaded_tokens == LOADED


def test_weights_changed_in_place_are_a_new_generation(open_store: Open) -> None:
    model, ids = model_of("Llama"), prompt_of(PROMPT_TOKENS)
    store = open_store(model)
    with store.load(ids) as cache:
        old = generate(model, ids, cache)
    with torch.no_grad():
        model.model.layers[0].self_attn.k_proj.weight.mul_(-1.5)
    store.invalidate()
    cache = store.load(ids)
    assert cache.loaded_tokens == 0
    new = generate(model, ids, cache)
    assert cache.save().stored == 5
    assert not torch.equal(new, old)
    assert torch.equal(generate(model, ids, store.load(ids)), new)


# ---------------------------------------------------------------- lossy codecs


def test_a_lossy_prefix_is_told_of_and_inherited(
    open_store: Open,
    record_property: pytest.RecordProperty,  # type: ignore[name-defined]
) -> None:
    equal = total = 0
    for seed in range(3):
        model = model_of("Llama", seed, hidden_size=128)
        ids = prompt_of(PROMPT_TOKENS, seed)
        store = open_store(model, "kivi4", model_name=f"seed {seed}")
        with store.load(ids) as first:
            cold = generate(model, ids, first)
        assert first.loaded is None
        longer = torch.cat([cold, prompt_of(100, seed)], dim=1)
        with store.load(longer) as second:
            output = generate(model, longer, second)
        assert second.loaded is not None
        assert (second.loaded.loaded, second.loaded.lineage) == (5, 85)
        plain = generate(model, longer)
        equal += sum(map(int.__eq__, new_tokens(output), new_tokens(plain)))
        total += NEW_TOKENS
        # What was computed on lossy blocks is as lossy as they are, though its own payload may be exact.
        third = store.load(torch.cat([output, output[:, :1]], dim=1)).loaded
        assert third is not None
        assert third.loaded == 7
        assert third.lineage <= 85
    record_property("kivi4_equal_tokens", f"{equal} of {total}")
    print(f"kivi4: {equal} of {total} tokens as without the store")
    assert equal < total, "random weights amplify any loss: this would be an exact codec"


def test_an_exact_namespace_refuses_lossy_codecs(open_store: Open, llama: Any) -> None:
    with pytest.raises(InvalidArgument, match="exact"):
        open_store(llama, "kivi4", fidelity="exact")
    store, ids = open_store(llama, "lossless", fidelity="exact"), prompt_of(PROMPT_TOKENS)
    with store.load(ids) as cache:
        generate(llama, ids, cache)
    loaded = store.load(ids).loaded
    assert loaded is not None
    assert loaded.lineage == 255


# ---------------------------------------------------------------- what changes a cache besides the forward


def stored_equals_computed(store: CacheStore, model: Any, ids: Any, blocks: int) -> None:
    """What is stored under the keys of a sequence is what a plain forward computes of it."""
    with torch.no_grad(), quiet():
        plain = model(ids, use_cache=True).past_key_values
    tensors = store.tensors
    assert isinstance(tensors, TensorStore)
    keys = tensors.chain_keys(ids[0].numpy())[:blocks]
    shape = store.layout.shape
    kv = np.zeros((*shape[:2], blocks * BLOCK, *shape[3:]), np.float32)
    assert tensors.load_blocks(keys, kv).loaded == blocks
    for layer, stored in zip(plain.layers, torch.from_numpy(kv), strict=True):
        for half, states in zip(stored, (layer.keys, layer.values), strict=True):
            assert torch.allclose(half.transpose(0, 1), states[0, :, : blocks * BLOCK], atol=1e-3)


def test_assisted_generation_saves_only_what_stayed(open_store: Open, llama: Any) -> None:
    assistant = model_of("Llama", seed=7, num_hidden_layers=1)
    store, ids = open_store(llama), prompt_of(PROMPT_TOKENS)
    cold = generate(llama, ids, max_new_tokens=90)
    with store.empty() as cache:
        assert torch.equal(generate(llama, ids, cache, assistant_model=assistant, max_new_tokens=90), cold)
    assert cache.unsaved == ""
    assert store.stats.stored_blocks == 6
    stored_equals_computed(store, llama, cold, 6)
    assert torch.equal(generate(llama, ids, store.load(ids), max_new_tokens=90), cold)
    # Versions of transformers that read the whole prompt again on top of the prefix would generate something else.
    problem, output = "", cold
    try:
        output = generate(llama, ids, store.load(ids), assistant_model=assistant, max_new_tokens=90)
    except InvalidArgument as error:
        problem = str(error)
    assert torch.equal(output, cold)
    assert not problem or "(assisted generation; " in problem


def test_prompt_lookup_saves_only_what_stayed(open_store: Open, llama: Any) -> None:
    store = open_store(llama)
    ids = torch.cat([prompt_of(100), prompt_of(100), prompt_of(60)], dim=1)
    with store.empty() as cache:
        output = generate(llama, ids, cache, prompt_lookup_num_tokens=8, max_new_tokens=80, eos_token_id=0)
    assert torch.equal(output, generate(llama, ids, max_new_tokens=80, eos_token_id=0))
    assert store.stats.stored_blocks == 5
    stored_equals_computed(store, llama, output, 5)


def test_what_was_cropped_is_computed_and_saved_anew(open_store: Open, llama: Any) -> None:
    store, ids, other = open_store(llama), prompt_of(PROMPT_TOKENS), prompt_of(200, seed=9)
    cache = store.load(ids)
    with torch.no_grad(), quiet():
        llama(ids, past_key_values=cache)
        assert cache.save().stored == 4
        cache.crop(-201)
        assert cache.get_seq_length() == 100
        llama(other, past_key_values=cache)
    assert cache.save().stored == 3
    sequence = torch.cat([ids[:, :100], other], dim=1)
    stored_equals_computed(store, llama, sequence, 4)
    assert store.load(sequence).loaded_tokens == LOADED


def test_beams_save_what_they_have_in_common(open_store: Open, llama: Any) -> None:
    store, ids = open_store(llama), prompt_of(PROMPT_TOKENS)
    cache = store.load(ids)
    with torch.no_grad(), quiet():
        llama(ids[:, :-1], past_key_values=cache)
    cache.batch_repeat_interleave(3)
    output = generate(llama, ids, cache, num_beams=3)
    assert "several" in cache.unsaved
    assert torch.equal(output, generate(llama, ids, num_beams=3))
    assert cache.save().stored == 4
    stored_equals_computed(store, llama, ids, 4)


def test_a_copied_cache_goes_its_own_way(open_store: Open, llama: Any) -> None:
    store, system = open_store(llama), prompt_of(150)
    cache = store.load(system)
    with torch.no_grad(), quiet():
        llama(system, past_key_values=cache)
    for seed in (1, 2):
        ids = torch.cat([system, prompt_of(100, seed)], dim=1)
        twin = copy.deepcopy(cache)
        assert isinstance(twin, KVStoreCache)
        assert torch.equal(generate(llama, ids, twin), generate(llama, ids))
        twin.save()
        stored_equals_computed(store, llama, generate(llama, ids), 4)
    assert cache.get_seq_length() == 150
    assert cache.save().exists == 2


def test_a_reset_cache_saves_nothing(open_store: Open, llama: Any) -> None:
    store, ids = open_store(llama), prompt_of(PROMPT_TOKENS)
    cache = store.load(ids)
    with torch.no_grad(), quiet():
        llama(ids, past_key_values=cache)
        cache.reset()
        assert cache.save().statuses == ()
    assert store.load(ids).loaded_tokens == 0


# ---------------------------------------------------------------- tokens that are not known


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (lambda model, ids: {"inputs_embeds": model.get_input_embeddings()(ids)}, "embeddings instead of token ids"),
        (
            lambda model, ids: {"input_ids": ids, "position_ids": torch.arange(5, 305)[None]},
            "position_ids do not count",
        ),
        (lambda model, ids: {"input_ids": ids, "attention_mask": torch.arange(300)[None] > 4}, "mask hides tokens"),
        (lambda model, ids: {"input_ids": ids.repeat(2, 1)}, "2 sequences at once"),
    ],
)
def test_kv_whose_tokens_are_not_known_is_not_saved(open_store: Open, llama: Any, arguments: Any, why: str) -> None:
    store, ids = open_store(llama), prompt_of(300)
    cache = store.load(ids)
    with torch.no_grad(), quiet():
        llama(**arguments(llama, ids), past_key_values=cache)
    assert cache.save().statuses == ()
    assert why in cache.unsaved
    assert store.load(ids).loaded_tokens == 0


def test_what_was_known_before_is_saved(open_store: Open, llama: Any) -> None:
    store, ids = open_store(llama), prompt_of(PROMPT_TOKENS)
    cache = store.load(ids)
    with torch.no_grad(), quiet():
        llama(ids[:, :200], past_key_values=cache)
        llama(inputs_embeds=llama.get_input_embeddings()(ids[:, 200:]), past_key_values=cache)
    assert cache.save().stored == 3
    assert store.load(ids).loaded_tokens == 3 * BLOCK


def test_kv_that_somebody_put_there_is_not_saved(open_store: Open, llama: Any) -> None:
    store, ids = open_store(llama), prompt_of(PROMPT_TOKENS)
    cache = store.load(ids)
    with torch.no_grad(), quiet():
        llama(ids[:, :90], past_key_values=cache)
        llama(ids[:, 90:100], past_key_values=cache)
        for index, layer in enumerate(cache.layers):
            cache.update(layer.keys[:, :, :50], layer.values[:, :, :50], index)
        llama(ids[:, 150:], past_key_values=cache)
    assert cache.save().stored == 1
    assert "something else than the model's forward" in cache.unsaved


def test_a_cache_of_another_model_is_not_saved(open_store: Open, llama: Any) -> None:
    store, ids, other = open_store(llama), prompt_of(PROMPT_TOKENS), model_of("Llama", seed=3)
    copied = copy.deepcopy(llama)  # with the hooks of the original
    for model in (other, copied):
        cache = store.load(ids)
        with torch.no_grad(), quiet():
            model(ids, past_key_values=cache)
        assert cache.save().statuses == ()
        assert cache.unsaved


def test_a_prefix_of_another_prompt_is_an_error(open_store: Open, llama: Any) -> None:
    store, ids, other = open_store(llama), prompt_of(PROMPT_TOKENS), prompt_of(PROMPT_TOKENS, seed=5)
    with store.load(ids) as cache:
        generate(llama, ids, cache)
    with pytest.raises(InvalidArgument, match=r"loaded for a prompt whose token 256 is \d+, .*load\(\) the prompt"):
        generate(llama, other, store.load(ids))
    padded = torch.ones_like(ids)
    padded[0, :3] = 0
    with pytest.raises(InvalidArgument, match="cannot be used here: the attention mask hides tokens"):
        generate(llama, ids, store.load(ids), attention_mask=padded)


def test_a_report_says_what_became_of_each_block(open_store: Open, llama: Any) -> None:
    store, ids = open_store(llama), prompt_of(PROMPT_TOKENS)
    caches = [store.load(ids) for _ in range(2)]
    with torch.no_grad(), quiet():
        for cache in caches:
            llama(ids, past_key_values=cache)
    assert caches[0].save().statuses == (PutStatus.STORED,) * 4
    assert caches[1].save().statuses == (PutStatus.EXISTS,) * 4
    assert caches[0].save().statuses == ()
    stats = store.stats
    assert (stats.prompts, stats.prompt_tokens, stats.stored_blocks) == (2, 602, 4)
    assert (stats.refused_blocks, stats.missed, stats.unreadable) == (0, 0, 0)
