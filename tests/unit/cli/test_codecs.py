"""``kvstore codecs``: what it says of each codec, how it looks, what it refuses."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from kvstore.cli import backends as machine
from kvstore.cli.backends import Backend, Backends, backends
from kvstore.cli.codecs import codecs
from kvstore.cli.codecs_report import codecs_report
from kvstore.cli.codecs_tables import codec_detail, codecs_table
from kvstore.cli.model_files import read_model
from kvstore.cli.quality.measured import CodecQuality, Estimate
from kvstore.errors import InvalidArgument
from kvstore_kernels.codecs import CODECS, get_codec
from kvstore_kernels.cuda import CudaUnavailable

NO_GPU = Backends(
    cpu=Backend(available=True, text="numba on a CPU"), cuda=Backend(available=False, text="no device: none is here")
)


def quality(codec: str, *, exact: bool = False) -> CodecQuality:
    return CodecQuality(
        codec=codec,
        sequences=96,
        bits=10.71,
        header_bits=0.06,
        padding_bits=0.1,
        exact=exact,
        natural=Estimate(1.0056, 0.0022),
        recall=Estimate(1.0117, 0.0019),
        natural_divergence=Estimate(0.0123, 0.0004),
        recall_divergence=Estimate(0.0234, 0.0005),
        key_error=0.183,
        value_error=0.182,
        attention_error=0.156,
        outlier_recall=Estimate(1.0641, 0.01),
    )


def text_of(renderable: Any, width: int = 80) -> str:
    console = Console(width=width, highlight=False, emoji=False, markup=False)
    with console.capture() as capture:
        console.print(renderable)
    text = capture.get()
    assert max(map(len, text.splitlines())) <= width
    assert "…" not in text
    return text


def table(model: str = "llama-3.1-8b", block_tokens: int = 64, **measured: CodecQuality) -> str:
    layout = read_model(model, block_tokens).groups[0].layout
    return text_of(codecs_table(codecs_report(model, layout, list(CODECS.values()), measured, NO_GPU)))


def detail(name: str, model: str = "llama-3.1-8b", width: int = 80, **measured: CodecQuality) -> str:
    codec = get_codec(name)
    layout = read_model(model, 64).groups[0].layout
    return text_of(codec_detail(codecs_report(model, layout, [codec], measured, NO_GPU), codec, layout), width)


def cells(text: str, codec: str) -> list[str]:
    return next(line.split() for line in text.splitlines() if line.split()[:1] == [codec])


# ------------------------------------------------------------------ the table


def test_table_has_bits_ratio_rule_fidelity_and_backends_of_each_codec() -> None:
    text = table()
    assert cells(text, "raw") == ["raw", "16.000", "1.00", "exact", "255", "-", "fast", "no"]
    assert cells(text, "kivi4") == ["kivi4", "4.500", "3.56", "channel", "85", "-", "fast", "no"]
    assert cells(text, "turbo3-2") == ["turbo3-2", "2.625", "6.10", "rotated", "36", "-", "fast", "no"]
    assert cells(text, "lossless") == ["lossless", "-", "-", "exact", "255", "-", "fast", "no"]
    assert "nothing measured comes with this version" in text
    assert "no device: none is here" in text


def test_table_shows_measured_quality_and_bits_where_the_data_decides() -> None:
    measured = {"turbo3": quality("turbo3"), "lossless-zstd": quality("lossless-zstd", exact=True)}
    text = table(**measured)
    assert "1.0117(19)" in cells(text, "turbo3")
    assert cells(text, "turbo3")[1] == "3.125"
    assert cells(text, "lossless-zstd")[1:3] == ["10.710", "1.49"]
    assert "exact" in cells(text, "lossless-zstd")[5]
    assert "nothing measured" not in text


def test_codec_that_cannot_store_the_layout_says_why() -> None:
    text = table(block_tokens=16)
    assert cells(text, "kivi4")[1:3] == ["-", "-"]
    assert "codec kivi4 needs blocks of a multiple of 64 tokens" in " ".join(text.split())


def test_planes_of_unusual_width_are_said_to_be_slow(tmp_path: Any) -> None:
    config = {"num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 48, "dtype": "bfloat16"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    layout = read_model(str(tmp_path), 64).groups[0].layout
    report = codecs_report("odd", layout, [get_codec("int8")], {}, NO_GPU)
    assert (report.codecs[0].cpu, report.codecs[0].cuda) == ("slow", "no")


# ------------------------------------------------------------------ one codec


@pytest.mark.parametrize("name", CODECS)
@pytest.mark.parametrize("width", [80, 120])
def test_detail_of_each_codec_fits_and_names_its_digest(name: str, width: int) -> None:
    text = detail(name, width=width, **{name: quality(name)})
    assert get_codec(name).digest.hex() in text
    assert "1.0117(19)" in text
    assert "0.0123 natural, 0.0234 recall" in text


def test_detail_has_source_regions_and_exact_bytes() -> None:
    text = detail("kivi4")
    assert "arXiv 2402.02750" in text
    assert "``" not in text
    assert ["key", "kivi4k", "codes", "uint32", "32", "8", "1", "16", "64", "1,048,576"] in [
        line.split() for line in text.splitlines()
    ]
    assert "2,359,296" in text
    assert "4.500 bits a value, a ratio of 3.56" in text
    assert ["rotary", "exact", "values"] in [line.split()[:3] for line in detail("int8", "deepseek-v3").splitlines()]


def test_detail_of_a_codec_whose_size_varies_has_its_bound() -> None:
    assert "at most 8,389,120" in detail("lossless")
    assert "at most" not in detail("raw")


# ------------------------------------------------------------------ the command


def test_command_prints_one_json_object(capsys: pytest.CaptureFixture[str]) -> None:
    codecs(as_json=True)
    report = json.loads(capsys.readouterr().out)
    assert [row["codec"] for row in report["codecs"]] == list(CODECS)
    assert [row["id"] for row in report["codecs"]] == list(range(1, len(CODECS) + 1))
    turbo4 = report["codecs"][8]
    assert turbo4["bits_per_value"] == 4.125
    regions = turbo4["sections"][0]["regions"]
    assert [region["name"] for region in regions] == ["codes", "scales"]
    assert sum(region["region_bytes"] for region in regions) == turbo4["sections"][0]["most_bytes"]
    assert report["backends"]["cpu"]["available"] is True
    codecs("int8", model="deepseek-v3", as_json=True)
    (row,) = json.loads(capsys.readouterr().out)["codecs"]
    assert [section["role"] for section in row["sections"]] == ["latent", "rotary"]


def test_unknown_codec_is_refused_with_those_that_there_are() -> None:
    with pytest.raises(InvalidArgument, match=r"^unknown codec 'kivi'; known are raw, .*centred3-2$"):
        codecs("kivi")
    with pytest.raises(InvalidArgument, match="no such file"):
        codecs(model="nowhere")


# ------------------------------------------------------------------ the machine


def test_backends_of_this_machine_say_what_they_run_on() -> None:
    found = backends()
    assert found.cpu.available
    assert "numba" in found.cpu.text
    assert found.cuda.text


def test_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def unavailable() -> Any:
        raise CudaUnavailable("the CUDA kernels need CuPy\nor another machine")

    monkeypatch.setattr(machine, "find_spec", lambda name: None)
    monkeypatch.setattr("kvstore_kernels.cuda.device.cupy_module", unavailable)
    found = backends()
    assert (found.cpu.available, found.cuda.available) == (False, False)
    assert "pip install numba" in found.cpu.text
    assert found.cuda.text == "the CUDA kernels need CuPy or another machine"


def test_gpu_that_is_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = SimpleNamespace(
        getDeviceProperties=lambda device: {"name": b"Fast GPU", "major": 9, "minor": 0}, getDeviceCount=lambda: 2
    )
    cupy = SimpleNamespace(__version__="14", cuda=SimpleNamespace(runtime=runtime))
    monkeypatch.setattr("kvstore_kernels.cuda.device.cupy_module", lambda: cupy)
    found = backends().cuda
    assert found == Backend(available=True, text="CuPy 14 on Fast GPU and 1 more, compute capability 9.0")


def test_codecs_that_run_on_a_gpu_are_those_that_the_kernels_take() -> None:
    gpu = Backends(cpu=NO_GPU.cpu, cuda=Backend(available=True, text="a GPU"))

    def on_gpu(model: str, dtype: str | None = None) -> dict[str, str]:
        layout = read_model(model, 64, dtype).groups[0].layout
        report = codecs_report(model, layout, list(CODECS.values()), {}, gpu)
        return {row.codec: row.cuda for row in report.codecs}

    found = on_gpu("llama-3.1-8b")
    assert {name for name, runs in found.items() if runs == "no"} == {"lossless", "lossless-zstd"}
    assert set(on_gpu("deepseek-v3").values()) == {"yes", "no"}
    fp8_cache = on_gpu("llama-3.1-8b", "float8_e4m3fn")
    assert {name for name, runs in fp8_cache.items() if runs == "yes"} == {"raw"}
    assert "codec lossless has no CUDA kernels" in detail("lossless")
    assert "no device: none is here" in detail("int8")
