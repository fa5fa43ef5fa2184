"""Machines without AVX2 get generic code for the instructions that they lack: the same bytes come out.

The instructions are those of the machine that a kernel is compiled for, which numba takes from its environment: these
tests compile in a process of their own, for a processor without AVX2.
"""

from __future__ import annotations

import platform

import pytest
from unit.kernels.cpu.codec_checks import run_without_avx2

_SCRIPT = """
import sys
from cpu_blocks import decoded_by_cpu, encoded_by_cpu
from golden_codecs import golden, golden_block, sha256_of
from kvstore_kernels.codecs import get_codec

for block, codec in (name.split("/") for name in sys.argv[1:]):
    expected = golden(block, codec)
    encoded = encoded_by_cpu(get_codec(codec), golden_block(block), expected.layout)
    assert encoded.sections == expected.sections, f"{codec} gives other bytes"
    assert encoded.void_groups == expected.void_groups
    decoded = decoded_by_cpu(get_codec(codec), expected.sections, expected.layout)
    assert sha256_of(decoded) == expected.decoded_sha256, f"{codec} gives other values"
"""


@pytest.mark.skipif(platform.machine() != "x86_64", reason="other machines compile nothing else")
def test_code_for_a_machine_without_avx2_gives_golden_bytes() -> None:
    block = "gqa128-bfloat16"
    names = [f"{block}/{codec}" for codec in ("int8", "int4", "kivi4", "kivi2", "turbo4", "turbo3", "turbo2")]
    run_without_avx2(_SCRIPT, *names)
