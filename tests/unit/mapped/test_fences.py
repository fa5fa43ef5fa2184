"""The fences that the protocols rest on are in the machine code, on x86-64 and on arm64.

A stress cannot show that a full fence is needed (the window is a store buffer's), so its presence is what is tested.
The same functions that run here are compiled once more for both processors; nothing of it is run.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import cache
from typing import Any

import llvmlite.binding as llvm
import numba
import pytest

from kvstore.mapped import batch_reads, batch_writes, grants, index_reader, index_writer, reads, ring, writes

_TRIPLES = {"x86-64": "x86_64-unknown-linux-gnu", "arm64": "aarch64-unknown-linux-gnu"}


@cache
def _targets() -> dict[str, Any]:
    llvm.initialize_all_targets()
    llvm.initialize_all_asmprinters()
    found = {}
    for name, triple in _TRIPLES.items():
        try:
            found[name] = llvm.Target.from_triple(triple).create_target_machine(opt=3)
        except RuntimeError:
            pytest.skip(f"this llvmlite has no {name} backend")
    return found


@cache
def _intermediate(function: Callable[..., Any], signature: str) -> str:
    fresh = numba.njit(error_model="numpy")(function.py_func)  # type: ignore[attr-defined]
    fresh.compile(signature)
    (text,) = fresh.inspect_llvm().values()
    return str(text)


@cache
def assembly(function: Callable[..., Any], signature: str, processor: str) -> str:
    """What a compiled function becomes on a processor."""
    machine = _targets()[processor]
    text = _intermediate(function, signature)
    text = re.sub(r"target triple = .*", f'target triple = "{_TRIPLES[processor]}"', text)
    text = re.sub(r"target datalayout = .*", f'target datalayout = "{machine.target_data}"', text)
    text = re.sub(r'"target-(cpu|features)"="[^"]*"', "", text)
    if processor == "arm64":
        # The sources that the compiled functions come from ask once which processor they are for.
        text = re.sub(r"(tail )?call void @llvm\.x86\.sse\.sfence\(\)[^\n]*", "fence seq_cst", text)
        text = re.sub(r"declare void @llvm\.x86\.sse\.sfence\(\)[^\n]*", "", text)
    made: str = machine.emit_assembly(llvm.parse_assembly(text))
    return made


def count(pattern: str, text: str) -> int:
    return len(re.findall(pattern, text, re.MULTILINE))


_X86_FULL = r"^\s+(mfence|lock\s+or|lock\s+orl)"
_ARM_FULL = r"^\s+dmb\s+ish$"

_WITHDRAW = (index_writer.withdraw, "int64(int64, int64, int64, int64, int64, int64, int64)")
_PIN = (reads.pin_one, "int64(int64, int64, int64, int64, int64, int64)")
_COPY = (index_reader.copy_batch, "void(int64, int64, int64, int64)")
_PUT = (writes.put_one, "int64(int64, int64, int64, int64, int64, int64)")
_HOLD = (batch_reads.hold_batch, "int64(int64, int64, int64, int64, int64, int64, int64, int64)")
_VERIFY = (batch_reads.verify_batch, "int64(int64, int64, int64, int64)")
_CLAIM = (batch_writes.claim_slots, "int64(int64, int64, int64, int64)")
_COMMIT = (batch_writes.commit_slots, "int64(int64, int64, int64, int64, int64, int64)")
_SEAL = (batch_writes.seal_slots, "void(int64, int64, int64)")
_PUBLISH = (index_writer.publish, "int64(int64, int64, int64, int64, int64, int64)")
_BELLS = (ring.lower_bells, "int64(int64, int64)")
_REVOKE = (grants.revoke, "int64(int64, int64, int64)")


@pytest.mark.parametrize(
    ("function", "fences"),
    [(_WITHDRAW, 1), (_PIN, 1), (_BELLS, 1), (_PUT, 2), (_HOLD, 1), (_CLAIM, 1), (_COMMIT, 1)],
    ids=["withdraw", "pin", "lower_bells", "put", "hold_batch", "claim_slots", "commit_slots"],
)
def test_full_fence_is_an_instruction_on_both_processors(function: Any, fences: int) -> None:
    assert count(_X86_FULL, assembly(*function, "x86-64")) >= fences
    assert count(_ARM_FULL, assembly(*function, "arm64")) >= fences


def unfenced_ends(arm: str, after: str) -> int:
    """Ways from an instruction to a call or the return without a full fence; blocks stand in any order in the text."""
    lines = [line.strip() for line in arm.splitlines() if line.strip() and not line.strip().startswith((".p2", ".cfi"))]
    labels = {line[:-1]: at for at, line in enumerate(lines) if line.endswith(":")}
    open_ways = [at + 1 for at, line in enumerate(lines) if re.match(after, line)]
    assert open_ways
    seen: set[int] = set()
    ends = 0
    while open_ways:
        at = open_ways.pop()
        if at in seen:
            continue
        seen.add(at)
        name, _, operands = lines[at].partition("\t")
        if name == "dmb" and operands == "ish":
            continue
        if name in ("ret", "bl", "blr", "br"):
            ends += 1
            continue
        target = labels.get(operands.rpartition(",")[2].strip())
        if target is not None:
            open_ways.append(target)
        if name != "b":
            open_ways.append(at + 1)
    return ends


def test_withdraw_fences_after_the_last_entry_and_before_the_first_hazard() -> None:
    assert count(_X86_FULL, assembly(*_WITHDRAW, "x86-64"))
    arm = assembly(*_WITHDRAW, "arm64")
    assert not unfenced_ends(arm, r"stlr\s")
    assert unfenced_ends(re.sub(_ARM_FULL, "\tnop", arm, flags=re.MULTILINE), r"stlr\s")


def test_pin_on_arm64_reads_the_sequence_again_after_the_fence() -> None:
    arm = assembly(*_PIN, "arm64")
    full = [match.start() for match in re.finditer(_ARM_FULL, arm, re.MULTILINE)]
    assert any(re.search(r"^\s+(ldr|ldar)\s", arm[place:], re.MULTILINE) for place in full)
    assert count(r"^\s+stlr\s", arm) >= 1


def test_batches_fence_where_single_records_do() -> None:
    arm = assembly(*_HOLD, "arm64")
    full = [match.start() for match in re.finditer(_ARM_FULL, arm, re.MULTILINE)]
    assert any(re.search(r"^\s+(ldr|ldar)\s", arm[place:], re.MULTILINE) for place in full)
    assert count(r"^\s+dmb\s+ishld$", assembly(*_VERIFY, "arm64")) >= 1
    assert count(r"^\s+sfence", assembly(*_SEAL, "x86-64")) >= 1
    assert count(r"^\s+stlr\s", assembly(*_COMMIT, "arm64")) >= 1


def test_reader_on_arm64_acquires_before_and_fences_after_the_copy() -> None:
    arm = assembly(*_COPY, "arm64")
    assert count(r"^\s+ldar\s", arm) >= 2
    assert count(r"^\s+dmb\s+ishld$", arm) >= 2
    assert re.search(r"bl\s+memcpy.*?^\s+dmb\s+ishld$", arm, re.MULTILINE | re.DOTALL)


def test_reader_on_x86_needs_no_fence_instruction_but_the_streams_one() -> None:
    assert count(_X86_FULL, assembly(*_COPY, "x86-64")) == 0
    assert count(r"^\s+sfence", assembly(*_COPY, "x86-64")) >= 1


def test_publish_on_arm64_releases_sequence_and_tag() -> None:
    arm = assembly(*_PUBLISH, "arm64")
    assert count(r"^\s+stlr\s", arm) >= 2
    assert count(_ARM_FULL, arm) >= 1


def test_put_streams_are_fenced_before_the_head_is_published() -> None:
    x86 = assembly(*_PUT, "x86-64")
    assert count(r"^\s+v?movnt", x86) >= 1
    streams = [match.start() for match in re.finditer(r"^\s+v?movnt", x86, re.MULTILINE)]
    fences = [match.start() for match in re.finditer(r"^\s+sfence", x86, re.MULTILINE)]
    assert fences
    assert fences[-1] > streams[0]
    assert count(r"^\s+stnp\s", assembly(*_PUT, "arm64")) >= 1


def test_grants_are_exchanged_atomically() -> None:
    assert count(r"^\s+xchg", assembly(*_REVOKE, "x86-64")) >= 1
    arm = assembly(*_REVOKE, "arm64")
    assert count(r"^\s+(swpal|ldaxr|bl\s+__aarch64_swp8_acq_rel)", arm) >= 1
