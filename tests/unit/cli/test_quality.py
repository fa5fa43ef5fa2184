"""``kvstore quality``: its options, its table and plot, and the committed results."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from math import log10
from pathlib import Path

import msgspec
import pytest
from typer.testing import CliRunner

from kvstore.cli import plot_files, render
from kvstore.cli.main import app
from kvstore.cli.quality import command
from kvstore.cli.quality.measured import Estimate, QualityReport, measured, measured_report
from kvstore.cli.quality.model import SmallModel
from kvstore.cli.quality.report import table_of
from kvstore.errors import InvalidArgument, KVStoreError
from kvstore_kernels.codecs import CODECS


def run(*arguments: str) -> str:
    result = CliRunner().invoke(app, ["quality", *arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.stdout


# ------------------------------------------------------------------ the command


def test_quality_of_two_codecs_as_json_and_plot_has_both(tmp_path: Path) -> None:
    picture = tmp_path / "quality.svg"
    output = run(
        "--codec", "int8", "--codec", "kivi4", "--sequences", "2", "--outliers", "--json", "--plot", str(picture)
    )
    report = msgspec.json.decode(output, type=QualityReport)
    assert [row.codec for row in report.codecs] == ["int8", "kivi4"]
    for row in report.codecs:
        assert row.sequences == 2
        assert row.bits == CODECS[row.codec].bits_per_value(SmallModel.layout(128))
        assert row.header_bits == pytest.approx(256 * 8 / (1 << 17))
        assert (row.bits + row.header_bits + row.padding_bits) * (1 << 17) / 8 % 4096 == pytest.approx(0)
        assert row.recall.mean == pytest.approx(1, abs=0.05)
        assert row.outlier_recall is not None
    drawn = picture.read_text()
    assert drawn.count("kivi4") == 3  # natural, recall, outliers


def test_quality_as_a_table_names_codec_and_exactness() -> None:
    output = run("--codec", "raw", "--sequences", "2")
    assert "raw" in output
    assert "exact" in output
    assert "outliers:" not in output


def test_quality_of_an_unknown_codec_lists_those_that_there_are() -> None:
    with pytest.raises(InvalidArgument, match=r"int9.*known are.*kivi4"):
        run("--codec", "int9", "--sequences", "2")


def test_quality_without_torch_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "find_spec", lambda name: None)
    with pytest.raises(KVStoreError, match=r"needs torch: pip install 'kvstored\[quality\]'"):
        run("--codec", "int8")


def test_plot_without_matplotlib_says_what_to_install_before_measuring(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(plot_files, "find_spec", lambda name: None)
    with pytest.raises(KVStoreError, match=r"--plot needs matplotlib: pip install 'kvstored\[quality\]'"):
        run("--codec", "int8", "--plot", str(tmp_path / "a.png"))


@pytest.mark.parametrize(("name", "why"), [("a.gif", "must end in .png, .svg"), ("none/a.svg", "no directory")])
def test_plot_that_cannot_be_written_is_refused_before_measuring(tmp_path: Path, name: str, why: str) -> None:
    with pytest.raises(InvalidArgument, match=why):
        run("--codec", "int8", "--plot", str(tmp_path / name))


# ------------------------------------------------------------------ committed results


def test_committed_results_are_of_every_codec_as_it_is() -> None:
    """A codec that is new, or whose bits changed, has to be measured: see docs/quality.md."""
    results = measured()
    assert list(results) == list(CODECS)
    for name, row in results.items():
        codec = CODECS[name]
        assert row.sequences >= 96
        assert row.exact == codec.exact
        bits = codec.bits_per_value(SmallModel.layout(128))
        assert bits is None or row.bits == bits
        assert row.outlier_recall is not None


def test_fidelity_of_lossy_codecs_is_four_times_the_measured_decibels() -> None:
    for name, row in measured().items():
        if not row.exact:
            decibels = -20 * log10(max(row.key_error, row.value_error))
            assert CODECS[name].fidelity == pytest.approx(4 * decibels, abs=3), name


def test_committed_results_are_read_without_torch_and_numpy() -> None:
    program = (
        "import sys\nfrom kvstore.cli.quality.measured import measured\nassert measured()\n"
        "assert not {'torch', 'numpy', 'matplotlib'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)


def test_tables_of_the_committed_results_have_a_row_a_codec_and_fit_80_columns(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    render.console().print(table_of(measured_report()))
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    assert not any("…" in line for line in lines)
    for name in CODECS:
        assert sum(line.split()[:1] == [name] for line in lines) == 3


def test_table_of_a_ratio_shows_mean_and_standard_error(capsys: pytest.CaptureFixture[str]) -> None:
    row = msgspec.structs.replace(measured()["kivi4"], recall=Estimate(mean=1.01168, se=0.00192))
    report = msgspec.structs.replace(measured_report(), codecs=[row])
    render.console().print(table_of(report))
    assert "1.0117(19)" in capsys.readouterr().out


def test_package_data_is_beside_the_package() -> None:
    spec = importlib.util.find_spec("kvstore.cli.quality")
    assert spec is not None
    assert spec.origin is not None
    folder = Path(spec.origin).parent
    assert (folder / "small-model.npz").stat().st_size < 6_000_000
    assert (folder / "measured.json").is_file()
