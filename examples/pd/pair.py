"""A prefill engine that stores, a decode engine that loads: two vLLM processes and a kvstore daemon.

See README.md beside this file.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

PROMPT_TOKENS = 1024
GENERATED = 16


def engine(model: str, role: str, endpoint: str, dtype: str) -> None:
    """One engine: reads prompts as lines of JSON, answers with tokens and the time to the first one."""
    from vllm import LLM, SamplingParams
    from vllm.config import KVTransferConfig

    transfer = (
        {}
        if role == "none"
        else {
            "kv_transfer_config": KVTransferConfig(
                kv_connector="KVStoreConnector",
                kv_connector_module_path="kvstore_client.integrations.vllm",
                kv_role=role,
                kv_load_failure_policy="recompute",
                kv_connector_extra_config={
                    "endpoint": endpoint,
                    "revision": "example",
                    "codec": "lossless",
                    # The decode engine is asked as soon as this one answered.
                    "save": "sync",
                },
            )
        }
    )
    llm = LLM(
        model,
        skip_tokenizer_init=True,
        max_model_len=PROMPT_TOKENS + 64,
        enforce_eager=True,
        seed=0,
        disable_log_stats=False,
        enable_prefix_caching=True,
        dtype=dtype,
        **transfer,
    )
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        (output,) = llm.generate(
            [{"prompt_token_ids": asked["tokens"]}],
            SamplingParams(temperature=0.0, max_tokens=asked["max_tokens"], ignore_eos=True, detokenize=False),
            use_tqdm=False,
        )
        metrics = output.metrics
        answer = {
            "tokens": list(output.outputs[0].token_ids),
            "loaded": output.num_cached_tokens,
            "ttft_s": metrics.first_token_ts - metrics.scheduled_ts,
        }
        print(json.dumps(answer), flush=True)


class Engine:
    """An engine in a process of its own."""

    def __init__(self, model: str, role: str, endpoint: str, dtype: str) -> None:
        environment = os.environ | {"VLLM_LOGGING_LEVEL": os.environ.get("VLLM_LOGGING_LEVEL", "ERROR")}
        self._process = subprocess.Popen(
            [sys.executable, __file__, "--engine", role, "--endpoint", endpoint, "--dtype", dtype, model],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        self._answer()
        # The first request of an engine takes seconds more than others.
        self.ask([7] * 32, 2)

    def ask(self, tokens: list[int], max_tokens: int) -> dict[str, Any]:
        """Greedy tokens behind a prompt."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"tokens": tokens, "max_tokens": max_tokens}) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def close(self) -> None:
        """Have it end."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(60)

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith('{"'):
                answer: dict[str, Any] = json.loads(line)
                return answer
        raise SystemExit("an engine ended before it answered; its messages are above")


def tiny_model(directory: Path) -> str:
    """A Llama of random weights."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=2048,
        hidden_size=512,
        intermediate_size=1024,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=2,
        max_position_embeddings=4096,
        initializer_range=0.06,
        dtype="float32",
    )
    LlamaForCausalLM(config).save_pretrained(directory)
    return str(directory)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Prefill and decode in two vLLM engines that share a kvstore daemon.")
    parser.add_argument("model", nargs="?", help="folder or name of a model")
    parser.add_argument("--tiny", action="store_true", help="make a small Llama of random weights instead")
    parser.add_argument("--prompts", type=int, default=3)
    parser.add_argument("--dtype", default="auto", help="of the engines; with float32 answers must be equal")
    parser.add_argument("--engine", choices=("kv_producer", "kv_consumer", "none"), help=argparse.SUPPRESS)
    parser.add_argument("--endpoint", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.engine:
        engine(arguments.model, arguments.engine, arguments.endpoint, arguments.dtype)
        return
    if not arguments.tiny and not arguments.model:
        parser.error("name a model, or --tiny")
    with tempfile.TemporaryDirectory() as folder:
        model = tiny_model(Path(folder) / "model") if arguments.tiny else arguments.model
        endpoint = f"ipc://{folder}/kvstore.sock"
        daemon = subprocess.Popen(
            [sys.executable, "-m", "kvstore", "serve", "--endpoint", endpoint, "--capacity", "256MiB", "--http", "off"],
            stderr=subprocess.DEVNULL,
        )
        try:
            pair(model, endpoint, arguments.prompts, "float32" if arguments.tiny else arguments.dtype)
        finally:
            daemon.terminate()
            daemon.wait(30)


def pair(model: str, endpoint: str, prompts: int, dtype: str) -> None:
    """Serve prompts by an engine alone, then by the pair; says whether tokens are equal."""
    import random

    rng = random.Random(0)
    asked = [[rng.randrange(3, 2000) for _ in range(PROMPT_TOKENS)] for _ in range(prompts)]
    alone = Engine(model, "none", endpoint, dtype)
    expected = [alone.ask(tokens, GENERATED) for tokens in asked]
    alone.close()
    deadline = time.monotonic() + 60
    while not Path(endpoint.removeprefix("ipc://")).exists():
        if time.monotonic() > deadline:
            raise SystemExit("the daemon did not start")
        time.sleep(0.1)
    prefill, decode = Engine(model, "kv_producer", endpoint, dtype), Engine(model, "kv_consumer", endpoint, dtype)
    wrong = 0
    print(f"{'prompt':>6}  {'one engine':>12}  {'prefill':>12}  {'decode':>12}  {'loaded':>7}  tokens")
    for number, (tokens, known) in enumerate(zip(asked, expected, strict=True)):
        first = prefill.ask(tokens, 1)
        rest = decode.ask(tokens, GENERATED)
        equal = sum(map(int.__eq__, rest["tokens"], known["tokens"]))
        wrong += equal < GENERATED
        times = (f"{each['ttft_s'] * 1000:>9.1f} ms" for each in (known, first, rest))
        print(f"{number:>6}  {'  '.join(times)}  {rest['loaded']:>7}  {equal} of {GENERATED} equal")
    prefill.close()
    decode.close()
    if wrong and dtype != "float32":
        print(f"{dtype} rounds otherwise where a prompt is computed in one go; with --dtype float32 all are equal")
    elif wrong:
        raise SystemExit(f"{wrong} of {prompts} answers differ from those of one engine")


if __name__ == "__main__":
    main()
