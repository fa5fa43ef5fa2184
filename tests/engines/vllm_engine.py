"""One vLLM engine on the CPU: reads commands as JSON lines, answers with tokens, times and counts.

Run as a program: ``vllm_engine.py OPTIONS``; OPTIONS is JSON: ``model``, ``extra`` (kv_connector_extra_config; null:
no connector), and ``role``, ``policy``, ``block_size``, ``batched_tokens``, ``suppress`` (loads do nothing),
``dtype``, ``dummy`` (random weights, nothing but a config.json is needed).
Commands: ``{"prompts": [[tokens]], "max_tokens": n, "logprobs": n}``, ``{"reset": true, "connector": bool}``,
``{"counts": true}``, ``{"fail": n}`` (the next n loads end after half of their blocks; in process only).
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

VOCABULARY = 2048


def make_model(directory: Path, **changes: Any) -> None:
    """A Llama with grouped queries, random weights and no tokenizer: 8 layers, 2 KV heads of 64."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(1)
    settings = {
        "vocab_size": VOCABULARY,
        "hidden_size": 512,
        "intermediate_size": 1024,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "max_position_embeddings": 4096,
        "initializer_range": 0.06,
        "dtype": "float32",
    }
    LlamaForCausalLM(LlamaConfig(**(settings | changes))).save_pretrained(directory)


def make_other_model(directory: Path, kind: str) -> None:
    """A Gemma with ``windows`` in every other layer, or a DeepSeek with ``latent`` attention and no experts."""
    import torch
    import transformers

    torch.manual_seed(1)
    settings = {
        "vocab_size": VOCABULARY,
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "max_position_embeddings": 4096,
        "initializer_range": 0.06,
    }
    model: Any
    if kind == "windows":
        windows = {"num_key_value_heads": 2, "head_dim": 64, "sliding_window": 256, "sliding_window_pattern": 2}
        model = transformers.Gemma3ForCausalLM(
            transformers.Gemma3TextConfig(**settings, **windows, query_pre_attn_scalar=64)
        )
    else:
        latent = {"kv_lora_rank": 512, "qk_rope_head_dim": 64, "qk_nope_head_dim": 64, "v_head_dim": 64}
        dense = {"first_k_dense_replace": 4, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1}
        model = transformers.DeepseekV2ForCausalLM(
            transformers.DeepseekV2Config(
                **settings,
                **latent,
                **dense,
                num_key_value_heads=4,
                q_lora_rank=None,
                moe_intermediate_size=64,
                n_group=1,
                topk_group=1,
            )
        )
    model.to(torch.float32).save_pretrained(directory)


def suppress_loads() -> None:
    """Have every load say that it is done, and write nothing."""
    from kvstore_client.integrations.vllm.worker import WorkerHalf

    WorkerHalf._load = lambda self, job, event: len(job.keys)  # type: ignore[method-assign]


def fail_loads(times: list[int]) -> None:
    """Have loads end after half of their blocks as long as ``times[0]`` is above zero."""
    from kvstore_client.integrations.vllm.worker import WorkerHalf

    load = WorkerHalf._load

    def failing(self: Any, job: Any, event: Any) -> int:
        if times[0] > 0:
            times[0] -= 1
            half = len(job.keys) // 2
            part = replace(
                job, keys=job.keys[:half], pages=tuple(p[: len(p) // len(job.keys) * half] for p in job.pages)
            )
            return load(self, part, event)
        return load(self, job, event)

    WorkerHalf._load = failing  # type: ignore[method-assign]


def main() -> None:
    options = json.loads(sys.argv[1])
    from vllm import LLM, SamplingParams
    from vllm.config import KVTransferConfig

    times = [0]
    arguments: dict[str, Any] = {}
    if options["extra"] is not None:
        if options.get("suppress"):
            suppress_loads()
        fail_loads(times)
        arguments["kv_transfer_config"] = KVTransferConfig(
            kv_connector="KVStoreConnector",
            kv_connector_module_path="kvstore_client.integrations.vllm",
            kv_role=options.get("role", "kv_both"),
            kv_load_failure_policy=options.get("policy", "recompute"),
            kv_connector_extra_config=options["extra"],
        )
    if options.get("dummy"):
        arguments["load_format"] = "dummy"
    if options.get("batched_tokens"):
        arguments["max_num_batched_tokens"] = options["batched_tokens"]
    if options.get("num_blocks"):
        arguments["num_gpu_blocks_override"] = options["num_blocks"]
    llm = LLM(
        options["model"],
        skip_tokenizer_init=True,
        dtype=options.get("dtype", "float32"),
        block_size=options.get("block_size", 32),
        max_model_len=options.get("max_model_len", 4096),
        max_num_seqs=4,
        max_logprobs=VOCABULARY,
        enforce_eager=True,
        enable_prefix_caching=True,
        seed=0,
        disable_log_stats=False,
        **arguments,
    )
    counts: Counter[str] = Counter()
    core = getattr(llm.llm_engine.engine_core, "engine_core", None)
    if core is not None and core.scheduler.connector is not None:
        make_stats = core.scheduler.make_stats

        def observed(spec: Any = None, connector: Any = None, *rest: Any, **named: Any) -> Any:
            if connector is not None:
                counts.update(connector.data)
            return make_stats(spec, connector, *rest, **named)

        core.scheduler.make_stats = observed
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        command = json.loads(line)
        answer: dict[str, Any] = {}
        if "prompts" in command:
            outputs = llm.generate(
                [{"prompt_token_ids": tokens} for tokens in command["prompts"]],
                SamplingParams(
                    temperature=0.0,
                    max_tokens=command.get("max_tokens", 8),
                    logprobs=command.get("logprobs"),
                    ignore_eos=True,
                    detokenize=False,
                ),
                use_tqdm=False,
            )
            answer["tokens"] = [list(output.outputs[0].token_ids) for output in outputs]
            answer["cached"] = [output.num_cached_tokens for output in outputs]
            answer["ttft_s"] = [output.metrics.first_token_ts - output.metrics.scheduled_ts for output in outputs]
            if command.get("logprobs"):
                answer["logprobs"] = [
                    [{token: entry.logprob for token, entry in step.items()} for step in output.outputs[0].logprobs]
                    for output in outputs
                ]
        elif "reset" in command:
            answer["reset"] = llm.reset_prefix_cache(reset_connector=command.get("connector", False))
        elif "fail" in command:
            times[0] = command["fail"]
        answer["counts"] = dict(counts)
        print(json.dumps(answer), flush=True)
    llm.llm_engine.engine_core.shutdown()


if __name__ == "__main__":
    main()
