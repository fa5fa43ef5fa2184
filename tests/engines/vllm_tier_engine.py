"""One vLLM engine on the CPU with a kvstore tier: reads prompts as JSON lines, answers with tokens and what was loaded.

Run as a program: ``vllm_tier_engine.py MODEL EXTRA_CONFIG REVISION``; EXTRA_CONFIG is JSON, ``none``: no connector.
What the tier counted is known only where scheduler and program are one process.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

BLOCK = 32


class Totals:
    """What a tier counted since the engine started; vLLM takes the counts at each step."""

    def __init__(self, llm: Any) -> None:
        core = getattr(llm.llm_engine.engine_core, "engine_core", None)
        connector = None if core is None else core.scheduler.connector
        self.tier = connector.connector_scheduler.manager.secondary_tiers[0] if connector else None
        self.counts: dict[str, float] = {}
        if self.tier is not None:
            self._take, self.tier._counters.take = self.tier._counters.take, self.take

    def namespace(self) -> dict[str, str]:
        """What the tier took for the identity of the model."""
        store = None if self.tier is None else self.tier._link.store
        return {} if store is None else {"revision": store.namespace.revision, "name": store.namespace.name}

    def take(self) -> Any:
        counts = self._take()
        for (name, labels), count in counts.items():
            what = " ".join((name, *labels))
            self.counts[what] = self.counts.get(what, 0) + count
        return counts


def main() -> None:
    model, extra, revision = sys.argv[1:]
    from vllm import LLM, SamplingParams
    from vllm.config import KVTransferConfig

    options: dict[str, Any] = {}
    if extra != "none":
        options["kv_transfer_config"] = KVTransferConfig(
            kv_connector="OffloadingConnector", kv_role="kv_both", kv_connector_extra_config=json.loads(extra)
        )
    llm = LLM(
        model,
        skip_tokenizer_init=True,
        dtype="float32",
        block_size=BLOCK,
        max_model_len=2048,
        max_num_seqs=4,
        enforce_eager=True,
        enable_prefix_caching=True,
        seed=0,
        revision=revision or None,
        **options,
    )
    totals = Totals(llm)
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        tokens = json.loads(line)
        (output,) = llm.generate(
            [{"prompt_token_ids": tokens}],
            SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True, detokenize=False),
            use_tqdm=False,
        )
        # Stores begin in the step after the prompt's; what ended is counted at a later one.
        llm.generate(
            [{"prompt_token_ids": [1, 2, 3]}],
            SamplingParams(temperature=0.0, max_tokens=20, ignore_eos=True, detokenize=False),
            use_tqdm=False,
        )
        if totals.tier is not None:
            end = time.monotonic() + 20.0
            while totals.tier._jobs.pending() and time.monotonic() < end:
                time.sleep(0.01)
            totals.tier.get_stats()
        answer = {"tokens": list(output.outputs[0].token_ids), "cached": output.num_cached_tokens}
        print(json.dumps(answer | {"counts": totals.counts, "namespace": totals.namespace()}), flush=True)


if __name__ == "__main__":
    main()
