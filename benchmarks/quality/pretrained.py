"""Codecs through a pretrained language model, as ``kvstore quality`` does with its small one.

    python benchmarks/quality/pretrained.py --model DIRECTORY --text FILE [FILE ...] > benchmarks/results/NAME.json

DIRECTORY holds a Llama-style model and its tokenizer as transformers saves them. From each file that is long enough one
sequence is taken: a prefix of 384 tokens from ``--skip`` characters on, whose KV goes through the codec in blocks of
128, and continuations of 96 tokens, the natural one and one that repeats the prefix from token 64 on.

Large models have what the small one lacks: keys with a mean far from zero, and attention sinks, tokens whose keys and
values are short and matter much. What looks good on the small one may be useless here.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

import msgspec
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

from kvstore.cli.quality.command import codec_round_trip
from kvstore.cli.quality.evaluation import estimate
from kvstore.cli.quality.measured import Estimate
from kvstore_kernels.codecs import CODECS, Codec, get_codec
from kvstore_kernels.layout import KVLayout

PREFIX_TOKENS, CONTINUATION_TOKENS, BLOCK_TOKENS, RECALLED_TOKEN = 384, 96, 128, 64


class Row(msgspec.Struct, kw_only=True):
    """One codec; fields as ``kvstore.cli.quality.measured.CodecQuality``."""

    codec: str
    bits: float
    natural: Estimate
    recall: Estimate
    natural_divergence: Estimate
    recall_divergence: Estimate
    key_error: float
    value_error: float


class Report(msgspec.Struct, kw_only=True):
    date: str
    model: str
    texts: list[str]
    rows: list[Row]


class Sequence(NamedTuple):
    """A sequence's KV, ``[layers, 2, tokens, heads, dim]``, and by task its tokens and what the model says of them."""

    text: str
    kv: torch.Tensor
    tasks: dict[str, tuple[torch.Tensor, torch.Tensor]]


class Model:
    def __init__(self, directory: Path) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, local_files_only=True).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True)
        config = self.model.config
        dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        self.layout = KVLayout(config.num_hidden_layers, config.num_key_value_heads, dim, "bfloat16", BLOCK_TOKENS)

    def sequences(self, texts: list[Path], skip: int) -> Iterator[Sequence]:
        for text in texts:
            ids = self.tokenizer(text.read_text(errors="replace")[skip : skip + 12_000])["input_ids"]
            tokens = torch.tensor(ids[: PREFIX_TOKENS + CONTINUATION_TOKENS + 1])
            if len(tokens) <= PREFIX_TOKENS + CONTINUATION_TOKENS:
                continue
            with torch.inference_mode():
                cache = self.model(input_ids=tokens[None, :PREFIX_TOKENS], use_cache=True).past_key_values
            layers = [torch.stack([layer.keys[0], layer.values[0]]).transpose(1, 2) for layer in cache.layers]
            kv = torch.stack(layers).bfloat16()
            starts = {"natural": PREFIX_TOKENS, "recall": RECALLED_TOKEN}
            parts = {task: tokens[start : start + CONTINUATION_TOKENS + 1] for task, start in starts.items()}
            yield Sequence(text.name, kv, {task: (part, self.extend(part, kv)) for task, part in parts.items()})

    def extend(self, tokens: torch.Tensor, kv: torch.Tensor) -> torch.Tensor:
        """Log likelihoods of all tokens behind each of the continuation's, float32."""
        cache = DynamicCache()
        for layer, (keys, values) in enumerate(kv.float().transpose(2, 3)):
            cache.update(keys[None].contiguous(), values[None].contiguous(), layer)
        with torch.inference_mode():
            logits = self.model(input_ids=tokens[None, :-1], past_key_values=cache, use_cache=True).logits[0]
        return logits.log_softmax(-1)

    def measure(self, codec: Codec, sequences: list[Sequence]) -> Row:
        round_trip = codec_round_trip(codec)
        ratios: dict[str, list[float]] = {"natural": [], "recall": []}
        divergences: dict[str, list[float]] = {"natural": [], "recall": []}
        squares = torch.zeros(2, 2)
        section_bytes = 0
        for sequence in sequences:
            decoded = torch.empty_like(sequence.kv)
            for first in range(0, PREFIX_TOKENS, BLOCK_TOKENS):
                part = slice(first, first + BLOCK_TOKENS)
                decoded[:, :, part], sizes = round_trip(sequence.kv[:, :, part].contiguous(), self.layout)
                section_bytes += sum(sizes)
            right = sequence.kv.float()
            squares += torch.stack([(decoded.float() - right).pow(2).sum((0, 2, 3, 4)), right.pow(2).sum((0, 2, 3, 4))])
            for task, (tokens, before) in sequence.tasks.items():
                after = self.extend(tokens, decoded)
                gained = (before - after).gather(-1, tokens[1:, None]).mean()
                ratios[task].append(float(gained.exp()))
                divergences[task].append(float((before.exp() * (before - after)).sum(-1).mean()))
        key_error, value_error = (squares[0] / squares[1]).sqrt().tolist()
        return Row(
            codec=codec.name,
            bits=8 * section_bytes / sum(sequence.kv.numel() for sequence in sequences),
            natural=estimate(torch.tensor(ratios["natural"])),
            recall=estimate(torch.tensor(ratios["recall"])),
            natural_divergence=estimate(torch.tensor(divergences["natural"])),
            recall_divergence=estimate(torch.tensor(divergences["recall"])),
            key_error=key_error,
            value_error=value_error,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--text", type=Path, nargs="+", required=True)
    parser.add_argument("--skip", type=int, default=1000, help="characters left out at the beginning of a text")
    parser.add_argument("--codec", nargs="*", help="default: all that are not exact")
    options = parser.parse_args()
    torch.set_num_threads(1)
    model = Model(options.model)
    sequences = list(model.sequences(options.text, options.skip))
    if len(sequences) < 2:
        parser.error("give at least two texts that are long enough")
    names = options.codec or [name for name, codec in CODECS.items() if not codec.exact]
    rows = []
    for name in names:
        rows.append(model.measure(get_codec(name), sequences))
        print(f"{name}: {rows[-1].bits:.3f} bits, recall {rows[-1].recall}", file=sys.stderr, flush=True)
    report = Report(
        date=datetime.now(tz=UTC).date().isoformat(),
        model=options.model.name,
        texts=[sequence.text for sequence in sequences],
        rows=rows,
    )
    print(msgspec.json.format(msgspec.json.encode(report), indent=1).decode())


if __name__ == "__main__":
    main()
