"""Caches of transformers models when something is wrong: daemons that are away, arguments, models that do not fit."""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from daemon_process import DaemonProcess

if find_spec("torch") is None or find_spec("transformers") is None:
    pytest.skip("torch and transformers are not installed (the extra 'transformers')", allow_module_level=True)

from tiny_models import COMMON, WINDOW, generate, made, model_of, prompt_of, quiet, torch, transformers

from kvstore.errors import DaemonUnavailable, InvalidArgument, KVStoreError
from kvstore.protocol.messages import PutStatus
from kvstore_client.integrations.transformers import CacheStore, weights_digest
from kvstore_client.integrations.transformers_cache import link

NOWHERE = "ipc:///nonexistent/kvstore.sock"
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def llama() -> Any:
    return model_of("Llama")


@pytest.fixture
def soon(monkeypatch: pytest.MonkeyPatch) -> float:
    """A daemon that is away is looked for again after a moment."""
    monkeypatch.setattr(link, "PAUSE_S", 0.2)
    return 0.2


@pytest.fixture
def ids() -> Any:
    return prompt_of(301)


# ---------------------------------------------------------------- daemons


def test_no_daemon_is_an_error_that_says_how_to_start_one(llama: Any) -> None:
    with pytest.raises(DaemonUnavailable, match=r"no daemon at ipc:///nonexistent/kvstore\.sock: .*kvstore serve"):
        CacheStore(llama, revision="1", endpoint=NOWHERE)
    assert not llama.model._forward_pre_hooks


def test_without_a_daemon_that_is_not_required_it_generates(
    llama: Any, ids: Any, caplog: pytest.LogCaptureFixture
) -> None:
    with (
        caplog.at_level(logging.WARNING, "kvstore_client"),
        CacheStore(llama, revision="1", endpoint=NOWHERE, required=False) as store,
    ):
        cold = generate(llama, ids)
        for _ in range(3):
            with store.load(ids) as cache:
                assert torch.equal(generate(llama, ids, cache), cold)
            assert set(cache.save(retry_s=0).reasons.values()) == {"away"}
        assert store.stats.missed == 9
        with pytest.raises(KVStoreError, match="no daemon at"):
            store.invalidate()
    assert [record.getMessage() for record in caplog.records] == [
        "going on without the store, which is tried again after 5 s: no daemon at ipc:///nonexistent/kvstore.sock: the "
        "socket does not exist; start one with `kvstore serve --endpoint ipc:///nonexistent/kvstore.sock`"
    ]


def test_a_daemon_that_starts_later_is_found(llama: Any, ids: Any, soon: float) -> None:
    daemon = DaemonProcess()
    with CacheStore(llama, revision="1", endpoint=daemon.endpoint, required=False) as store:
        cache = store.load(ids)
        generate(llama, ids, cache)
        assert cache.save(retry_s=0).statuses == (PutStatus.THROTTLED,) * 5
        with daemon:
            time.sleep(soon)
            assert cache.save().stored == 5
            assert store.load(ids).loaded_tokens == 256
            assert store.tensors is not None
            store.close()


@pytest.mark.parametrize("mapped", [True, False])
def test_a_daemon_that_dies_does_not_end_generation(
    llama: Any, ids: Any, soon: float, mapped: bool, caplog: pytest.LogCaptureFixture
) -> None:
    cold = generate(llama, ids)
    with (
        DaemonProcess() as daemon,
        CacheStore(llama, revision="1", endpoint=daemon.endpoint, mapped=mapped, timeout=2.0) as store,
    ):
        with store.load(ids) as cache:
            assert torch.equal(generate(llama, ids, cache), cold)
        cache = store.load(ids)
        assert cache.loaded_tokens == 256
        daemon.kill()
        begin = time.monotonic()
        assert torch.equal(generate(llama, ids, cache), cold)
        assert cache.save(retry_s=0).stored == 0
        with store.load(ids) as cache:
            assert torch.equal(generate(llama, ids, cache), cold)
        assert cache.loaded_tokens == 0
        assert time.monotonic() - begin < 20
        assert store.stats.missed >= 2
        warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
        assert sum(text.startswith("going on without the store") for text in warnings) == 1
        daemon.start()
        time.sleep(soon)
        # What the cache still has is stored in the new one.
        assert cache.save().stored == 5
        assert store.load(ids).loaded_tokens == 256
        store.close()


def test_a_daemon_that_hangs_costs_one_timeout(llama: Any, ids: Any) -> None:
    import os
    import signal

    with (
        DaemonProcess() as daemon,
        CacheStore(llama, revision="1", endpoint=daemon.endpoint, mapped=False, timeout=0.5) as store,
    ):
        os.kill(daemon.pid, signal.SIGSTOP)
        try:
            begin = time.monotonic()
            caches = [store.load(ids) for _ in range(50)]
            assert time.monotonic() - begin < 3
            assert store.stats.missed == 50
            assert caches[0].loaded is None
        finally:
            os.kill(daemon.pid, signal.SIGCONT)
        store.close()


# ---------------------------------------------------------------- a model that does not fit


@pytest.fixture(scope="module")
def daemon() -> Iterator[DaemonProcess]:
    with DaemonProcess() as daemon:
        yield daemon


MLA: dict[str, Any] = {
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 64,
    "moe_intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "n_routed_experts": 4,
    "n_group": 1,
    "topk_group": 1,
    "num_experts_per_tok": 1,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "qk_nope_head_dim": 16,
}
LONGROPE = {"type": "longrope", "short_factor": [1.0] * 8, "long_factor": [2.0] * 8}


@pytest.mark.parametrize(
    ("config", "model", "options", "why"),
    [
        ("DeepseekV3Config", "DeepseekV3ForCausalLM", MLA, "one number of heads and one head_dim for all"),
        ("MambaConfig", "MambaForCausalLM", {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 1}, "recurrent"),
        ("T5Config", "T5ForConditionalGeneration", {"d_model": 32, "num_layers": 1, "d_ff": 32}, "encoder-decoder"),
        ("LlamaConfig", "LlamaModel", COMMON, r"does not generate; .*AutoModelForCausalLM"),
        (
            "LlamaConfig",
            "LlamaForCausalLM",
            {**COMMON, "rope_scaling": {"rope_type": "dynamic", "factor": 2.0}},
            "depends on the length of the whole sequence .*dynamic",
        ),
        (
            "Phi3Config",
            "Phi3ForCausalLM",
            {**COMMON, "original_max_position_embeddings": 512, "rope_scaling": LONGROPE},
            "depends on the length of the whole sequence .*longrope",
        ),
        ("Llama4TextConfig", "Llama4ForCausalLM", {**WINDOW, "num_local_experts": 2}, "chunked_attention"),
        (
            "BertConfig",
            "BertLMHeadModel",
            {
                "vocab_size": 64,
                "hidden_size": 32,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "initializer_range": 1.0,
            },
            "cannot be used with the store: (its tokens attend to those behind them|it does not keep keys and values)",
        ),
    ],
)
def test_a_model_without_blocks_is_refused_with_the_reason(
    daemon: DaemonProcess, config: str, model: str, options: dict[str, Any], why: str
) -> None:
    with pytest.raises(InvalidArgument, match=why):
        CacheStore(made(config, model, **options), revision="1", endpoint=daemon.endpoint)


def test_a_model_that_makes_a_cache_of_its_own_is_refused(daemon: DaemonProcess) -> None:
    model = model_of("Llama")
    model.generation_config.cache_implementation = "static"
    with pytest.raises(InvalidArgument, match=r"'static'\), and refuse another; set .*cache_implementation = None"):
        CacheStore(model, revision="1", endpoint=daemon.endpoint)


def test_what_is_no_model_is_refused(daemon: DaemonProcess) -> None:
    for wrong in ("gpt2", torch.nn.Linear(2, 2), None):
        with pytest.raises(InvalidArgument, match="model must be a PreTrainedModel of transformers"):
            CacheStore(wrong, revision="1", endpoint=daemon.endpoint)


def test_a_revision_that_nobody_knows_is_refused(llama: Any, daemon: DaemonProcess) -> None:
    with pytest.raises(InvalidArgument, match=r"nobody knows the revision .* weights_digest\(model\)"):
        CacheStore(llama, endpoint=daemon.endpoint)
    with pytest.warns(UserWarning, match="no revision"):
        CacheStore(llama, endpoint=daemon.endpoint, unknown_revision="warn").close()
    CacheStore(llama, endpoint=daemon.endpoint, unknown_revision="ignore").close()
    llama.config._commit_hash = "0123abcd"
    try:
        with CacheStore(llama, endpoint=daemon.endpoint) as store:
            assert store.tensors is not None
            assert store.tensors.namespace.revision == "0123abcd"
    finally:
        del llama.config._commit_hash


def test_adapters_need_a_revision(daemon: DaemonProcess) -> None:
    model = model_of("Llama")
    model.config._commit_hash = "0123abcd"
    model.model.layers[0].adapter = type("LoraLayer", (torch.nn.Identity,), {"__module__": "peft.tuners.lora.layer"})()
    with pytest.raises(InvalidArgument, match="the model has adapters, which change its KV"):
        CacheStore(model, endpoint=daemon.endpoint)
    CacheStore(model, revision=weights_digest(model), endpoint=daemon.endpoint).close()


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"codec": "zip"}, "unknown codec 'zip'"),
        ({"codec": "kivi4", "block_tokens": 48}, "kivi4"),
        ({"block_tokens": 0}, "block_tokens"),
        ({"block_tokens": "64"}, "block_tokens"),
        ({"revision": ""}, "revision must be text"),
        ({"revision": 3}, "revision must be text"),
        ({"model_name": ""}, "model_name must be text"),
        ({"unknown_revision": "maybe"}, "unknown_revision must be"),
        ({"threads": 0}, "threads must be"),
        ({"timeout": -1}, "timeout must be"),
    ],
)
def test_wrong_arguments_are_named(llama: Any, daemon: DaemonProcess, options: dict[str, Any], why: str) -> None:
    for required in (True, False):
        with pytest.raises(InvalidArgument, match=why):
            CacheStore(llama, **{"revision": "1", "endpoint": daemon.endpoint, "required": required, **options})
    assert not llama.model._forward_pre_hooks


def test_what_is_no_prompt_is_named(llama: Any, daemon: DaemonProcess, ids: Any) -> None:
    wrong: list[tuple[Any, str]] = [
        (ids.repeat(3, 1), "3 sequences; a cache is loaded for one"),
        (ids.float(), "token ids of one sequence, .* got float32"),
        ("text", "got text: run the tokenizer"),
        (transformers.BatchEncoding({"input_ids": ids}), r"that is \.input_ids"),
        ([], "token ids of one sequence"),
        (None, "token ids"),
        (-ids, r"tokens must lie in \[0, 2\*\*32\)"),
    ]
    with CacheStore(llama, revision="1", endpoint=daemon.endpoint) as store:
        for given, why in wrong:
            with pytest.raises(InvalidArgument, match=why):
                store.load(given)
        assert store.load(ids[0].tolist()).loaded_tokens == store.load(ids[0].numpy()).loaded_tokens == 0
        assert store.stats.prompts == 2


def test_a_closed_store_listens_and_saves_no_more(llama: Any, daemon: DaemonProcess, ids: Any) -> None:
    store = CacheStore(llama, revision="closed", endpoint=daemon.endpoint)
    cache = store.load(ids)
    store.close()
    store.close()
    assert not llama.model._forward_pre_hooks
    assert torch.equal(generate(llama, ids, cache), generate(llama, ids))
    for use in (cache.save, store.empty, store.invalidate, lambda: store.load(ids)):
        with pytest.raises(InvalidArgument, match="this store is closed"):
            use()


def test_a_cache_that_was_cast_is_not_saved(daemon: DaemonProcess, ids: Any) -> None:
    model = model_of("Llama")
    with CacheStore(model, revision="cast", endpoint=daemon.endpoint) as store, torch.no_grad(), quiet():
        cache = store.load(ids)
        model.bfloat16()(ids, past_key_values=cache)
        with pytest.raises(
            InvalidArgument, match="not of the model that the store was made for: .*float32, got bfloat16"
        ):
            cache.save()


def test_a_model_can_be_saved_whole_while_a_store_listens(daemon: DaemonProcess, tmp_path: Path) -> None:
    model = model_of("Llama")
    with CacheStore(model, revision="1", endpoint=daemon.endpoint), quiet():
        torch.save(model, tmp_path / "model.pt")
        torch.load(tmp_path / "model.pt", weights_only=False)(prompt_of(5))


def test_an_exception_saves_nothing(llama: Any, daemon: DaemonProcess, ids: Any) -> None:
    with CacheStore(llama, revision="exception", endpoint=daemon.endpoint) as store:
        with pytest.raises(TypeError), store.load(ids) as cache:
            list(generate(llama, ids, cache), "more")  # type: ignore[call-arg]
        assert store.stats.stored_blocks == 0


def test_a_digest_of_weights_follows_them() -> None:
    digests = [weights_digest(model_of("Llama", seed)) for seed in (0, 0, 1)]
    assert digests[0] == digests[1] != digests[2]
    model = model_of("Llama").bfloat16()
    before = weights_digest(model)
    with torch.no_grad():
        model.model.layers[2].mlp.down_proj.weight[3, 5] += 1
    assert weights_digest(model) != before
    with pytest.raises(InvalidArgument, match="not loaded"):
        weights_digest(model.to("meta"))


# ---------------------------------------------------------------- the page


def test_the_example_of_the_page_runs(daemon: DaemonProcess, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (ROOT / "docs" / "transformers.md").read_text(encoding="utf-8")
    monkeypatch.setenv("KVSTORE_ENDPOINT", daemon.endpoint)
    model = model_of("Llama")
    model.config._commit_hash = "0123abcd"

    class Tokenizer:
        eos_token_id = None

        def __call__(self, text: str, return_tensors: str) -> Any:
            return transformers.BatchEncoding({"input_ids": torch.tensor([list(text.encode())])})

        def decode(self, tokens: Any) -> str:
            return bytes(tokens.tolist()).decode(errors="replace")

    with quiet():
        monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", lambda name: model)
        monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda name: Tokenizer())
    (example,) = re.findall(r"<!-- example -->\n```python\n(.*?)```", page, re.DOTALL)
    runs: list[dict[str, Any]] = [{}, {}]
    for variables in runs:
        with quiet():
            exec(compile(example, "transformers.md", "exec"), variables)
    first, again = runs
    assert first["text"] == again["text"]
    assert first["cache"].loaded_tokens == 0
    assert again["cache"].loaded_tokens == (again["inputs"].input_ids.shape[1] - 1) // 64 * 64 > 0
    for target in re.findall(r"\]\(([^)#]+)\)", page):
        assert (ROOT / "docs" / target).exists(), target
