"""The kernels' arithmetic on the host against numpy and torch: every bit, on all inputs where these are few."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from emulator.probes import HostProbes

from kvstore_kernels.codecs.turbo import DEVIATION, LEVELS, ROW, SIGNS, THRESHOLDS
from kvstore_kernels.cuda import tables

HALVES = np.arange(1 << 16, dtype=np.uint32)


@pytest.fixture(scope="module")
def host(libraries: Path) -> HostProbes:
    return HostProbes(libraries)


@pytest.fixture(scope="module")
def words() -> np.ndarray:
    """Every float32 whose low bits are around a tie of float16 or bfloat16, and others."""
    tops = np.arange(0, 1 << 32, 1 << 13, dtype=np.uint64)
    lows = np.array([0, 1, 0xFFF, 0x1000, 0x1001, 0x1FFF], np.uint64)
    random = np.random.default_rng(0).integers(0, 1 << 32, 1 << 20, np.uint64)
    return np.concatenate([(tops[:, None] + lows).reshape(-1), random]).astype(np.uint32)


def same(got: np.ndarray, expected: np.ndarray) -> bool:
    """Equal bits, where the expected number is no NaN, and NaN elsewhere."""
    kind = {1: "u1", 2: "u2", 4: "u4"}[expected.dtype.itemsize]
    number = got.astype(kind).view(expected.dtype)
    at_nan = np.isnan(expected)
    return bool((np.isnan(number) == at_nan).all() and (got.astype(kind) == expected.view(kind))[~at_nan].all())


def test_float_to_half_rounds_as_numpy(host: HostProbes, words: np.ndarray) -> None:
    with np.errstate(over="ignore"):
        assert same(host("float_to_half", words), words.view(np.float32).astype(np.float16))


def test_half_to_float_is_exact(host: HostProbes) -> None:
    assert same(host("half_to_float", HALVES), HALVES.astype(np.uint16).view(np.float16).astype(np.float32))


def test_floats_to_bfloats_rounds_as_torch(host: HostProbes, words: np.ndarray) -> None:
    low = torch.from_numpy(words.view(np.int32)).view(torch.float32).bfloat16()
    pairs = host("floats_to_bfloats", words, words[::-1].copy())
    nan = low.isnan().numpy()
    assert ((pairs & 0xFFFF).astype(np.uint16)[~nan] == low.view(torch.int16).numpy().view(np.uint16)[~nan]).all()
    assert ((pairs & 0x7FFF)[nan] > 0x7F80).all()
    assert (pairs >> 16 == (pairs & 0xFFFF)[::-1]).all()


@pytest.mark.parametrize("name", ["e4m3_in_steps", "e4m3_pair"])
def test_e4m3_rounds_as_torch(libraries: Path, words: np.ndarray, name: str) -> None:
    """In steps, and by the emulator's search for what the instruction gives."""
    host = HostProbes(libraries, "-DEMULATOR_HARDWARE_E4M3")
    x = words.view(np.float32)
    ties = (np.arange(0, 0x7E)[:, None] + np.array([0, 0.5])).reshape(-1)
    values = torch.arange(0x7F, dtype=torch.uint8).view(torch.float8_e4m3fn).float().numpy()
    between = np.interp(ties, np.arange(0x7F), values).astype(np.float32)
    x = np.concatenate([x[np.isfinite(x)][:: 1 if name == "e4m3_in_steps" else 40], between, -between])
    expected = torch.from_numpy(x).clamp(-448, 448).to(torch.float8_e4m3fn).view(torch.uint8).numpy()
    got = host(name, x.view(np.uint32), x[::-1].copy().view(np.uint32))
    assert (got & 0xFF == expected).all()
    assert (got >> 8 == expected[::-1]).all()


def test_e4m3_numbers_are_256th_as_halves(host: HostProbes) -> None:
    codes = np.array([code for code in range(256) if code & 0x7F != 0x7F], np.uint32)
    expected = torch.from_numpy(codes.astype(np.uint8)).view(torch.float8_e4m3fn).float() / 256
    assert same(host("e4m3_to_halves", codes), expected.numpy())


@pytest.mark.parametrize(
    ("least", "greatest", "dtype"),
    [
        ("least_bfloats", "greatest_bfloats", torch.bfloat16),
        ("least_halves", "greatest_halves", torch.float16),
        ("least", "greatest", torch.float32),
    ],
)
def test_least_and_greatest_are_those_of_torch_and_keep_nan(
    host: HostProbes, words: np.ndarray, least: str, greatest: str, dtype: torch.dtype
) -> None:
    a, b = words, np.random.default_rng(1).permutation(words)
    x, y = (torch.from_numpy(each.view(np.int32)).view(dtype).float() for each in (a, b))
    for name, expected in ((least, torch.minimum(x, y)), (greatest, torch.maximum(x, y))):
        got = torch.from_numpy(host(name, a, b).view(np.int32)).view(dtype).float()
        assert torch.equal(got.isnan(), expected.isnan())
        assert torch.equal(got[~got.isnan()], expected[~expected.isnan()])


def test_operations_are_those_of_numpy(host: HostProbes, words: np.ndarray) -> None:
    a, b = words, np.random.default_rng(2).permutation(words)
    x, y = a.view(np.float32), b.view(np.float32)
    with np.errstate(all="ignore"):
        assert same(host("reciprocal", a), np.float32(1) / x)
        assert same(host("square_root", a), np.sqrt(x))
        assert same(host("divide", a, b), x / y)
        assert same(host("add", a, b), x + y)
        assert same(host("multiply", a, b), x * y)
    assert same(host("int_to_float", a), a.view(np.int32).astype(np.float32))


def test_pick_bytes_picks(host: HostProbes) -> None:
    rng = np.random.default_rng(3)
    a, selector = rng.integers(0, 1 << 32, (2, 1000), np.uint32)
    picked = host("pick_bytes", a, selector)
    for word, chosen, got in zip(a.tolist(), (selector & 0x7777).tolist(), picked.tolist(), strict=True):
        source = word.to_bytes(4, "little") + (word ^ 0x5A5A5A5A).to_bytes(4, "little")
        assert got.to_bytes(4, "little") == bytes(source[chosen >> 4 * k & 7] for k in range(4))


@pytest.mark.parametrize("bits", [4, 3, 2])
def test_turbo_codes_of_every_coordinate_are_those_of_the_thresholds(host: HostProbes, bits: int) -> None:
    """By the tables and the operations of ``Turbo::code``, for each number that a coordinate can round to."""
    greatest = math.ceil(DEVIATION * math.sqrt(ROW))
    y = np.arange(-greatest, greatest + 1)
    place = host("fused_unit", y.astype(np.uint32))
    cell = host("fused_down", place) & 31
    cells = np.array(tables._cells(bits), np.int64) & 0xFFFFFFFF
    code = (cells[cell] + 0x4B400000 + y & 0xFFFFFFFF) >> 16
    half = 1 << (bits - 1)
    level = np.searchsorted(THRESHOLDS[bits], np.abs(y), side="left")
    assert (code == np.where(y < 0, half - 1 - level, half + level)).all()
    signed = np.array(LEVELS[bits])[level] * np.where(y < 0, -1, 1)
    assert (np.array(tables._levels(bits))[code] == signed).all()


def test_turbo_values_and_flips_are_those_of_the_reference() -> None:
    for bits in (4, 3, 2):
        values = np.array(tables._values(bits), np.uint32).view(np.float32)
        levels = np.array(LEVELS[bits]) / DEVIATION
        stored = levels if bits == 3 else np.concatenate([levels, -levels])
        assert (values == np.tile(stored, 32 // len(stored))).all()
    words = [word for entry in range(16) for word in tables._flip_words(entry)]
    flipped = [word >> shift & 1 for word in words for shift in (15, 31)]
    assert flipped == [SIGNS[i // 8] >> (i % 8) & 1 for i in range(ROW)]


def test_cells_with_two_borders_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(tables.THRESHOLDS, 2, (2010, 2020))
    with pytest.raises(ValueError, match="at most one"):
        tables._cells(2)
