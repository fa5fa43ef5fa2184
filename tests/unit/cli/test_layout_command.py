"""``kvstore layout``: the sizes it works out, how it shows them, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from kvstore.cli.known_models import KNOWN_MODELS
from kvstore.cli.layout import layout
from kvstore.cli.layout_report import LINKS, Link, layout_report, layout_table
from kvstore.cli.model_files import read_model
from kvstore.errors import InvalidArgument
from kvstore_kernels.codecs import CODECS

MLA = {
    "num_hidden_layers": 61,
    "num_attention_heads": 128,
    "kv_lora_rank": 512,
    "qk_rope_head_dim": 64,
    "torch_dtype": "bfloat16",
}


def shown(model: str, width: int = 80, block_tokens: int = 64, tokens: int = 8192) -> str:
    report = layout_report(model, read_model(model, block_tokens), list(CODECS.values()), LINKS, tokens)
    console = Console(width=width, highlight=False, emoji=False, markup=False)
    with console.capture() as capture:
        console.print(layout_table(report))
    return capture.get()


def written(directory: Path, config: Any) -> str:
    (directory / "config.json").write_text(config if isinstance(config, str) else json.dumps(config))
    return str(directory)


def as_json(capsys: pytest.CaptureFixture[str], *arguments: Any, **options: Any) -> dict[str, Any]:
    layout(*arguments, **options, as_json=True)
    report: dict[str, Any] = json.loads(capsys.readouterr().out)
    return report


# ------------------------------------------------------------------ sizes


@pytest.mark.parametrize(
    ("model", "token_bytes", "groups"),
    [
        ("llama-3.1-8b", 32 * 2 * 8 * 128 * 2, {"full": 32}),
        ("llama-3.1-405b", 126 * 2 * 8 * 128 * 2, {"full": 126}),
        ("deepseek-v3", 61 * (512 + 64) * 2, {"full": 61}),
        ("gpt-oss-20b", 24 * 2 * 8 * 64 * 2, {"full": 12, "window": 12}),
        ("gemma-3-27b", 62 * 2 * 16 * 128 * 2, {"full": 10, "window": 52}),
    ],
)
def test_known_models_have_the_bytes_of_their_formula(
    capsys: pytest.CaptureFixture[str], model: str, token_bytes: int, groups: dict[str, int]
) -> None:
    report = as_json(capsys, model)
    assert (report["token_bytes"], report["block_bytes"]) == (token_bytes, 64 * token_bytes)
    assert {group["name"]: len(group["layers"]) for group in report["groups"]} == groups
    assert sum(group["token_bytes"] for group in report["groups"]) == token_bytes


def test_every_known_model_can_be_read() -> None:
    for name in KNOWN_MODELS:
        assert read_model(name.upper(), 64).token_bytes > 0


def test_codec_sizes_and_transfer_times_of_a_prefix(capsys: pytest.CaptureFixture[str]) -> None:
    report = as_json(capsys, "llama-3.1-8b", tokens=1024, codec=["raw", "kivi4", "lossless"], link_gbps=[100.0, 8.0])
    raw, kivi4, lossless = report["codecs"]
    assert raw["payload_bytes"] == raw["prefix_bytes"] // 16 == 8 << 20
    assert raw["slot_bytes"] == (8 << 20) + 4096
    assert kivi4["bits_per_value"] == 4.5
    assert kivi4["prefix_bytes"] == (128 << 20) * 4.5 / 16
    assert kivi4["transfer_s"] == {
        "100 Gbit/s": pytest.approx(kivi4["prefix_bytes"] / 12.5e9),
        "8 Gbit/s": pytest.approx(kivi4["prefix_bytes"] / 1e9),
    }
    assert lossless == {"codec": "lossless"}
    assert report["links"] == [{"name": "100 Gbit/s", "gb_per_s": 12.5}, {"name": "8 Gbit/s", "gb_per_s": 1.0}]


def test_prefix_takes_only_the_newest_blocks_of_a_window(capsys: pytest.CaptureFixture[str]) -> None:
    report = as_json(capsys, "gpt-oss-20b", tokens=6400, codec=["raw"])
    full, window = report["groups"]
    assert window["reach"] == "window(128)"
    assert report["codecs"][0]["prefix_bytes"] == 100 * full["block_bytes"] + 2 * window["block_bytes"]


def test_config_is_found_in_its_directory_and_in_its_part_for_text(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    directory = written(tmp_path, {"text_config": MLA, "vision_config": {"num_hidden_layers": 3}})
    for given in (directory, f"{directory}/config.json"):
        report = as_json(capsys, given, dtype="float32")
        assert (report["model"], report["dtype"]) == (given, "float32")
        assert report["token_bytes"] == 61 * 576 * 4
        assert report["groups"][0]["formula"] == "61 layers x (512 latent + 64 rotary) x 4 bytes"


# ------------------------------------------------------------------ how it looks


@pytest.mark.parametrize("model", ["llama-3.1-405b", "gpt-oss-20b", "deepseek-v3"])
@pytest.mark.parametrize(("width", "block_tokens", "tokens"), [(80, 64, 131072), (80, 16, 100_000), (120, 64, 8192)])
def test_tables_fit_a_terminal(model: str, width: int, block_tokens: int, tokens: int) -> None:
    text = shown(model, width, block_tokens, tokens)
    assert max(map(len, text.splitlines())) <= width
    assert "…" not in text
    for name in CODECS:
        assert f"\n{name} " in text


def test_codec_that_cannot_store_the_model_is_named_with_its_reason() -> None:
    text = " ".join(shown("llama-3.1-8b", block_tokens=16).split())
    assert "kivi4 group full: codec kivi4 needs blocks of a multiple of 64 tokens, got 16" in text
    assert "kivi4 - - - - - -" in text
    assert "Not for this model" not in shown("llama-3.1-8b")


# ------------------------------------------------------------------ what is refused


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("{", r"config\.json is no JSON: .*give a model's config\.json"),
        ("[1]", r"config\.json holds no JSON object"),
        ("[" * 100_000, r"config\.json is no JSON"),
        ({**MLA, "qk_rope_head_dim": None}, "lacks qk_rope_head_dim"),
        ({**MLA, "torch_dtype": None}, r"lacks dtype.*use --dtype"),
        ({"num_hidden_layers": 2, "num_attention_heads": 4, "dtype": "float16"}, r"lacks hidden_size.*head_dim"),
    ],
)
def test_config_that_does_not_say_it_all_is_refused(tmp_path: Path, config: Any, message: str) -> None:
    with pytest.raises(InvalidArgument, match=message) as caught:
        layout(written(tmp_path, config))
    assert str(tmp_path) in str(caught.value)


def test_model_that_is_no_file_and_not_known_is_refused_with_those_that_are() -> None:
    with pytest.raises(InvalidArgument, match=r"^nowhere/x: no such file; .*llama-3\.1-8b.*deepseek-v3"):
        layout("nowhere/x")


def test_directory_without_a_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match=r"cannot read .*/config\.json: No such file"):
        layout(str(tmp_path))


def test_wrong_options_are_refused() -> None:
    with pytest.raises(InvalidArgument, match="--codec: unknown codec 'zip'; known are raw"):
        layout("llama-3.1-8b", codec=["zip"])
    with pytest.raises(InvalidArgument, match="--dtype: 'int3' is none of"):
        layout("llama-3.1-8b", dtype="int3")
    for rate in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(InvalidArgument, match="--link-gbps"):
            layout("llama-3.1-8b", link_gbps=[rate])


def test_links_have_names_of_their_own() -> None:
    assert len({link.name for link in LINKS}) == len(LINKS)
    assert all(isinstance(link, Link) and link.gb_per_s > 0 for link in LINKS)
