"""The SSD tier's benchmark without a daemon: fio and its report, places, blocks' names, aims, rows, the table."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
from rich.console import Console

from kvstore.cli.bench import ssd_fio, ssd_place
from kvstore.cli.bench.machine import machine_facts
from kvstore.cli.bench.ssd import UNDISTURBED, Samples, SsdExtent, SsdReport, aim, measure_ssd, rows_of
from kvstore.cli.bench.ssd_blocks import CHAIN_BLOCKS, keys_of
from kvstore.cli.bench.ssd_fio import Fio, FioResult, parse_fio, why_not
from kvstore.cli.bench.ssd_place import DiskFacts, Mount, check_place, mount_of
from kvstore.cli.bench.ssd_table import ssd_table
from kvstore.errors import DeadlineExceeded, InvalidArgument, KVStoreError

MIB, GIB = 1 << 20, 1 << 30
needs_fio = pytest.mark.skipif(bool(why_not()), reason=why_not())


def fio_report(error: int = 0, **sides: tuple[int, float]) -> str:
    job: dict[str, Any] = {"jobname": "kvstore", "error": error, "elapsed": 1}
    for name in ("read", "write", "trim"):
        io_bytes, runtime = sides.get(name, (0, 0))
        job[name] = {"io_bytes": io_bytes, "runtime": runtime, "bw_bytes": 1, "iops": 2.5}
    return json.dumps({"fio version": "fio-3.33", "jobs": [job], "disk_util": []}, indent=2)


# ------------------------------------------------------------------ fio


def test_report_of_fio_is_read() -> None:
    result = parse_fio(fio_report(write=(256 * MIB, 125)), "randwrite")
    assert result == FioResult(256 * MIB, 0.125)
    assert result.bytes_per_s == pytest.approx(2 * GIB)
    assert parse_fio("note: both iodepth >= 1\n" + fio_report(read=(MIB, 2)), "randread").seconds == 0.002


@pytest.mark.parametrize(
    ("output", "message"),
    [
        ("", "fio printed no report of one job: it said nothing"),
        ("fio: no such engine\n", "no report of one job: fio: no such engine"),
        ('{"jobs": []}', "no report of one job"),
        ('{"jobs": [{"error": 0}]}', "no report of one job"),
        (fio_report(read=(MIB, 2))[:-40], "no report of one job"),
        ("fio: disk full\n" + fio_report(error=28), "fio failed with error 28: fio: disk full"),
        (fio_report(write=(MIB, 2)), "fio moved 0 bytes in 0 ms"),
        (fio_report(read=(MIB, 0)), "in 0 ms: give it more to do"),
    ],
)
def test_report_of_fio_that_says_nothing_is_an_error(output: str, message: str) -> None:
    with pytest.raises(KVStoreError, match=message):
        parse_fio(output, "randread")


def test_fio_that_is_not_installed_is_named_with_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ssd_fio.shutil, "which", lambda name: None)
    assert "apt install fio" in why_not()
    with pytest.raises(
        KVStoreError, match=r"fio is not installed .*apt install fio\); the SSD tier is measured beside"
    ):
        Fio(tmp_path, MIB)


def fake_fio(monkeypatch: pytest.MonkeyPatch, answer: Any) -> list[list[str]]:
    """Have ``answer(arguments)`` stand for the program; the arguments of all runs."""
    runs: list[list[str]] = []

    def run(command: list[str], **options: Any) -> Any:
        assert options["timeout"] > 0
        runs.append(command)
        answered = answer(command[1:])
        return SimpleNamespace(returncode=0, stdout=answered.encode(), stderr=b"")

    monkeypatch.setattr(ssd_fio.shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(ssd_fio.subprocess, "run", run)
    return runs


def test_fio_writes_its_file_through_before_it_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def answer(arguments: list[str]) -> str:
        return "fio-3.33\n" if arguments == ["--version"] else fio_report(read=(8 * MIB, 4), write=(8 * MIB, 4))

    runs = fake_fio(monkeypatch, answer)
    fio = Fio(tmp_path, 64 * MIB)
    assert fio.version == "fio-3.33"
    assert fio.run("randread", 8 * MIB) == FioResult(8 * MIB, 0.004)
    _, written, measured = runs
    assert {"--rw=write", f"--io_size={64 * MIB}", "--end_fsync=1"} <= set(written)
    for run in (written, measured):
        assert {"--direct=1", "--iodepth=8", "--bs=1048576", "--ioengine=libaio", f"--size={64 * MIB}"} <= set(run)
        assert f"--filename={tmp_path / 'fio.dat'}" in run
    assert {"--rw=randread", f"--io_size={8 * MIB}", "--randrepeat=0"} <= set(measured)
    with pytest.raises(KVStoreError, match="fio moved 8388608 of 4194304 bytes"):
        fio.run("randwrite", 4 * MIB)


def test_fio_that_fails_or_hangs_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ssd_fio.shutil, "which", lambda name: f"/usr/bin/{name}")

    def fail(command: list[str], **options: Any) -> Any:
        return SimpleNamespace(returncode=1, stdout=b"", stderr=b"fio: failed\n  opening\n")

    monkeypatch.setattr(ssd_fio.subprocess, "run", fail)
    with pytest.raises(KVStoreError, match="fio ended with code 1: fio: failed opening"):
        Fio(tmp_path, MIB)

    def hang(command: list[str], **options: Any) -> Any:
        raise subprocess.TimeoutExpired(command, options["timeout"])

    monkeypatch.setattr(ssd_fio.subprocess, "run", hang)
    with pytest.raises(DeadlineExceeded, match="fio did not end within 60 s"):
        Fio(tmp_path, MIB)

    def vanish(command: list[str], **options: Any) -> Any:
        raise FileNotFoundError(2, "No such file or directory")

    monkeypatch.setattr(ssd_fio.subprocess, "run", vanish)
    with pytest.raises(KVStoreError, match="fio cannot be run: No such file"):
        Fio(tmp_path, MIB)


def direct_directory() -> Path | None:
    """A directory on a disk, where the folder for temporary files or this one is."""
    for directory in (Path(os.environ.get("TMPDIR", "/tmp")), Path.cwd()):
        try:
            check_place(directory, 64 * MIB)
        except InvalidArgument:
            continue
        return directory
    return None


@needs_fio
def test_fio_reads_and_writes_its_file_at_random(tmp_path: Path) -> None:
    if direct_directory() is None:
        pytest.skip("there is no directory here whose file system takes direct I/O")
    try:
        check_place(tmp_path, 64 * MIB)
    except InvalidArgument as unfit:
        pytest.skip(str(unfit))
    fio = Fio(tmp_path, 16 * MIB)
    assert fio.version.startswith("fio-")
    stat = (tmp_path / "fio.dat").stat()
    assert (stat.st_size, stat.st_blocks * 512 >= 16 * MIB) == (16 * MIB, True)
    for pattern in ("randwrite", "randread"):
        assert fio.run(pattern, 8 * MIB).bytes_per_s > 0  # type: ignore[arg-type]


# ------------------------------------------------------------------ the place

MOUNTS = """\
22 1 254:0 / / rw,relatime shared:1 - ext4 /dev/vda rw,discard
30 22 0:26 / /dev/shm rw,nosuid - tmpfs tmpfs rw,size=1g
31 22 254:1 / /mnt/two\\040words rw shared:7 master:3 - xfs /dev/vdb rw
32 22 254:1 / /mnt/two\\040words/inner rw - btrfs /dev/vdc rw
33 22 0:30 / /mnt/two\\040words/inner rw - tmpfs later rw
no mount at all
"""


@pytest.mark.parametrize(
    ("path", "kind", "source"),
    [
        ("/", "ext4", "/dev/vda"),
        ("/home/someone", "ext4", "/dev/vda"),
        ("/dev/shm", "tmpfs", "tmpfs"),
        ("/dev/shm/x", "tmpfs", "tmpfs"),
        ("/dev/shmem", "ext4", "/dev/vda"),
        ("/mnt/two words/x", "xfs", "/dev/vdb"),
        ("/mnt/two words/inner/x", "tmpfs", "later"),
    ],
)
def test_mount_of_a_path_is_the_innermost_and_the_last(path: str, kind: str, source: str) -> None:
    found = mount_of(path, MOUNTS.splitlines())
    assert (found.kind, found.source) == (kind, source)


def test_mount_that_nobody_knows_is_unknown() -> None:
    assert mount_of("/x", []).kind == "unknown"


@pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="there is no /dev/shm")
def test_place_in_memory_is_refused() -> None:
    with pytest.raises(InvalidArgument, match="--dir /dev/shm is on tmpfs, which is memory: there is no disk"):
        check_place(Path("/dev/shm"), MIB)


def test_place_that_is_none_or_full_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InvalidArgument, match="nowhere: No such file or directory; name a directory"):
        check_place(tmp_path / "nowhere", MIB)
    (tmp_path / "file").write_bytes(b"x")
    with pytest.raises(InvalidArgument, match="file is no directory"):
        check_place(tmp_path / "file", MIB)
    monkeypatch.setattr(ssd_place, "_IN_MEMORY", ())
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=3 * GIB))
    with pytest.raises(InvalidArgument, match=r"has 3\.0 GiB free and the benchmark needs 5\.0 GiB; .*smaller --size"):
        check_place(tmp_path, 5 * GIB)


def test_place_without_direct_io_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ssd_place, "_IN_MEMORY", ())

    def refuse(number: int) -> Any:
        def write(*arguments: object) -> int:
            raise OSError(number, os.strerror(number))

        return write

    monkeypatch.setattr(ssd_place.os, "pwritev", refuse(22))
    with pytest.raises(InvalidArgument, match=r"takes no direct I/O \(O_DIRECT\)"):
        check_place(tmp_path, MIB)
    monkeypatch.setattr(ssd_place.os, "pwritev", refuse(5))
    with pytest.raises(InvalidArgument, match="Input/output error; name a directory"):
        check_place(tmp_path, MIB)
    assert list(tmp_path.iterdir()) == []


def test_measurement_without_fio_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ssd_fio.shutil, "which", lambda name: None)
    monkeypatch.setattr("kvstore.cli.bench.ssd.check_place", lambda *arguments: Mount("/", "ext4", "/dev/vda"))
    with pytest.raises(KVStoreError, match="fio is not installed"):
        measure_ssd(tmp_path, SsdExtent())
    assert list(tmp_path.iterdir()) == []


# ------------------------------------------------------------------ extent and aims


def test_extent_has_room_for_chains_that_are_not_in_dram() -> None:
    extent = SsdExtent()
    assert (extent.rounds, extent.steps, extent.codecs) == (9, 18, ("", "kivi4"))
    assert (extent.room_bytes, extent.dram_bytes) == (384 * MIB, 640 * MIB)
    assert extent.needed_bytes == 5 * GIB
    small = SsdExtent(size_bytes=640 * MIB, round_bytes=32 * MIB, rounds=2, with_codec=False)
    assert (small.dram_bytes, small.resident_blocks, small.steps) == (192 * MIB, 32, 2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"round_bytes": 16 * MIB}, "--mib: a round moves whole chains of 32 MiB, not 16 MiB"),
        ({"round_bytes": 40 * MIB}, "whole chains of 32 MiB, not 40 MiB"),
        ({"size_bytes": GIB}, r"--size: with 256 MiB a round at least 1\.5 GiB are needed, 1\.0 GiB were given"),
        ({"size_bytes": 2 * GIB + 1}, "--size: give whole MiB, not 2147483649 bytes"),
    ],
)
def test_extent_that_cannot_be_measured_is_refused(options: dict[str, int], message: str) -> None:
    with pytest.raises(InvalidArgument, match=message):
        SsdExtent(**options)


@pytest.mark.parametrize(
    ("op", "codec", "expected"),
    [
        ("demotion", "", 0.8),
        ("promotion", "", 0.9),
        ("get_into during demotion", "", 0.7),
        ("get_into during promotion", "", 0.7),
        ("get_into sustained during demotion", "", None),
        ("demotion", "kivi4", None),
        ("promotion", "kivi4", None),
    ],
)
def test_aim(op: str, codec: str, expected: float | None) -> None:
    assert aim(op, codec) == expected


def test_keys_of_chains_differ() -> None:
    keys = [key for chain in range(3) for key in keys_of(chain)]
    assert len(set(keys)) == 3 * CHAIN_BLOCKS
    assert keys_of(1) == keys[CHAIN_BLOCKS : 2 * CHAIN_BLOCKS]


# ------------------------------------------------------------------ rows and table


def samples() -> list[Samples]:
    moved = {"cpu_us": [90.0, 110.0, 100.0], "others": [0.1, 0.3, 0.2]}
    return [
        Samples("demotion", "", "fio randwrite", MIB, ours=[2e9, 1e9, 3e9], theirs=[2e9, 2e9, 2e9], **moved),
        Samples("promotion", "", "fio randread", MIB, ours=[1e9, 1e9, 1e9], theirs=[2e9, 2e9, 1e9], **moved),
        Samples("get_into during demotion", "", UNDISTURBED, MIB, [3e9], [4e9]),
        Samples("get_into sustained during demotion", "", UNDISTURBED, MIB, [2e9], [4e9]),
        Samples("demotion", "kivi4", "fio randwrite", 4 * MIB, ours=[6e9] * 3, theirs=[2e9] * 3, **moved),
    ]


def report() -> SsdReport:
    disk = DiskFacts(filesystem="xfs", device="/dev/nvme0n1", size_bytes=2 * GIB, depth=8, fio="fio-3.33")
    return SsdReport(machine=machine_facts(), baseline="fio", rows=rows_of(samples()), disk=disk)


def test_rows_have_the_medians_of_the_ratios_of_rounds() -> None:
    demotion, promotion, gets, _, coded = rows_of(samples())
    assert (demotion.ratio, demotion.ratios, demotion.gb_per_s, demotion.baseline_gb_per_s) == (1, [1, 0.5, 1.5], 2, 2)
    assert (demotion.limit, demotion.within_limit, demotion.daemon_cpu_us, demotion.others_share) == (
        0.8,
        True,
        100,
        0.2,
    )
    # The ratio of the medians would be another.
    assert (promotion.ratio, promotion.baseline_gb_per_s, promotion.within_limit) == (0.5, 2, False)
    assert (gets.ratio, gets.batch, gets.depth, gets.daemon_cpu_us) == (0.75, 1, None, None)
    assert (coded.codec, coded.size_bytes, coded.ratio, coded.limit, coded.depth) == ("kivi4", 4 * MIB, 3, None, 8)


def test_report_is_one_json_object_with_the_disk() -> None:
    encoded = json.loads(msgspec.json.encode(report()))
    assert set(encoded) == {"machine", "baseline", "rows", "disk"}
    assert encoded["disk"] == {
        "filesystem": "xfs", "device": "/dev/nvme0n1", "size_bytes": 2 * GIB, "depth": 8, "fio": "fio-3.33",
    }  # fmt: skip
    assert "codec" not in encoded["rows"][0]
    assert encoded["rows"][0]["ratios"] == [1.0, 0.5, 1.5]


def test_table_shows_ratios_their_spread_and_what_was_missed() -> None:
    console = Console(width=200, highlight=False)
    with console.capture() as capture:
        console.print(ssd_table(report()))
    shown = capture.get()
    assert max(len(line.rstrip()) for line in shown.splitlines()[:8]) <= 80
    lines: dict[str, str] = {}
    for line in shown.splitlines():
        lines.setdefault(line.split("  ")[0].strip(), " ".join(line.split()))
    assert lines["demotion"] == "demotion 2.00 fio 2.00 1.00 0.50-1.50 0.80 met"
    assert lines["promotion"].endswith("0.50 0.50-1.00 0.90 MISSED")
    assert lines["during demotion"] == "during demotion 3.00 alone 4.00 0.75 0.75-0.75 0.70 met"
    assert lines["during demotion, all"] == "during demotion, all 2.00 alone 4.00 0.50 0.50-0.50"
    assert lines["kivi4, demotion"].endswith("3.00 3.00-3.00")
    for words in (
        "xfs on /dev/nvme0n1",
        "fio-3.33",
        "2.0 GiB a side",
        "3, each with a baseline of its own",
        "100 us a block by demotion",
    ):
        assert words in shown
