"""The CUDA kernels compile for three architectures without a GPU, spill nothing and stay within their instructions."""

from __future__ import annotations

import cuda_budgets
import nvrtc
import pytest
from cuda_budgets import ARCHITECTURES, NAMES, SLACK, fast_kv, fast_program, options
from cuda_centred import CENTRED_CASES
from emulator.cases import CASES, Case, paged
from gpu_cases import probe_source

from kvstore_kernels.codecs import get_codec
from kvstore_kernels.cuda.program import program_for

pytestmark = pytest.mark.skipif(nvrtc.missing() is not None, reason=str(nvrtc.missing()))

MIXED = [CASES[number] for number in (12, 15, 17, 24, 31, 33, 40, 50)]
MIXED += [CENTRED_CASES[number] for number in (5, 7, 9)]
"""Other dtypes, dimensions, pages, tails, strips and alignments."""
RECORDED_WITH, BUDGETS = cuda_budgets.recorded()


@pytest.mark.parametrize("sm", ARCHITECTURES)
@pytest.mark.parametrize("codec", NAMES)
def test_kernels_compile_without_spills_within_their_budget(codec: str, sm: int) -> None:
    facts, warnings = nvrtc.compile_kernels(fast_program(codec).source, options(sm))
    assert warnings == ""
    assert sorted(facts) == ["kv_decode", "kv_encode"]
    for kernel, fact in facts.items():
        assert (fact.stack_bytes, fact.spill_bytes) == (0, 0), kernel
        if nvrtc.compiler_version() != RECORDED_WITH:
            continue
        budget = BUDGETS[codec, kernel, sm]
        assert len(fact.opcodes) <= budget.instructions * SLACK, kernel
        assert fact.registers <= budget.registers + 8, kernel


@pytest.mark.parametrize("codec", NAMES)
def test_a_threads_way_stays_within_its_budget(codec: str) -> None:
    if nvrtc.compiler_version() != RECORDED_WITH:
        pytest.skip(f"budgets are of NVRTC {RECORDED_WITH}, this is {nvrtc.compiler_version()}")
    for budget in cuda_budgets.measure(codec, 90):
        limit = BUDGETS[codec, budget.kernel, 90]
        assert budget.first_path <= limit.first_path * SLACK, budget.kernel
        assert budget.second_path <= limit.second_path * SLACK, budget.kernel


@pytest.mark.parametrize("codec", ["fp8", "kivi4", "kivi2", "turbo4-3"])
def test_kernels_compile_with_flushed_denormals_as_cupy_forces_them(codec: str) -> None:
    facts, warnings = nvrtc.compile_kernels(fast_program(codec).source, options(90, "-ftz=true"))
    assert warnings == ""
    assert all(fact.spill_bytes == 0 for fact in facts.values())


@pytest.mark.parametrize("case", MIXED, ids=str)
def test_kernels_of_other_shapes_compile_without_spills(case: Case) -> None:
    kv = paged(case, "zeros").kv
    program, _ = program_for(get_codec(case.codec), kv, 16 if case.offset == 0 else 2)
    facts, warnings = nvrtc.compile_kernels(program.source, options(90))
    assert warnings == ""
    assert all((fact.stack_bytes, fact.spill_bytes) == (0, 0) for fact in facts.values())


@pytest.mark.parametrize("codec", ["kivi4", "centred4"])
def test_contraction_is_not_asked_for_and_changes_nothing(codec: str) -> None:
    """No operation is one that could be: the option that would allow it leaves the instructions as they are."""
    source = fast_program(codec).source
    strict, _ = nvrtc.compile_kernels(source, options(90))
    allowed = tuple(option.replace("-fmad=false", "-fmad=true") for option in options(90))
    loose, _ = nvrtc.compile_kernels(source, allowed)
    for kernel, fact in strict.items():
        counts = [sum(opcode.startswith("FFMA") for opcode in each[kernel].opcodes) for each in (strict, loose)]
        assert counts[0] == counts[1] > 0
        assert len(fact.opcodes) == len(loose[kernel].opcodes)


def test_kernels_call_nothing_slow_for_each_value() -> None:
    """Divisions and square roots are a few a thread, and no value is converted by an instruction of low rate."""
    facts, _ = nvrtc.compile_kernels(fast_program("turbo4").source, options(90))
    opcodes = facts["kv_encode"].opcodes
    assert sum(opcode.startswith(("MUFU", "CALL")) for opcode in opcodes) <= 12
    assert not any(opcode.startswith(("F2I", "FRND", "LDL", "STL")) for opcode in opcodes)


def test_source_includes_nothing() -> None:
    assert "#include" not in fast_program("turbo4-3").source
    assert "#include" not in program_for(get_codec("kivi2"), fast_kv(dim=64), 16)[0].source


def test_probes_for_a_gpu_compile() -> None:
    for sm in (80, 90):
        facts, warnings = nvrtc.compile_kernels(probe_source(), options(sm, "-ftz=true"))
        assert warnings == ""
        assert facts["kv_probe"].spill_bytes == 0
