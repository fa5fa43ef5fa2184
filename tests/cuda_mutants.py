"""Faulty twins of the CUDA kernels: changes of their source, built for the emulator, and what must find them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from emulator.cases import Case, check_case
from emulator.emulated import EmulatedRunner, KernelFault


@dataclass(frozen=True)
class Mutant:
    """A change of the source, and what it must lead to.

    Attributes:
        name: what is wrong.
        case: number of the case that finds it.
        old, new: text of the source; every occurrence is changed.
        finds: pattern of the report, of a fault or of a wrong byte.
        kinds: numbers that find it.
    """

    name: str
    case: int
    old: str
    new: str
    finds: str
    kinds: tuple[str, ...] = ("normal",)


RACE: Final = "no barrier after the write|without a barrier after the read"
UNWRITTEN: Final = "is read and was not written"
WRONG: Final = "wrong bytes"
MEMORY: Final = "outside of all memory|past the end"


def build_twins(folder: Path, mutants: Sequence[Mutant], cases: Sequence[Case]) -> dict[str, EmulatedRunner]:
    """Runners of all mutants by name, built several at a time."""
    runners = {mutant.name: EmulatedRunner(folder, change=(mutant.old, mutant.new)) for mutant in mutants}
    with ThreadPoolExecutor(2) as executor:
        list(executor.map(lambda mutant: runners[mutant.name].prepare(cases[mutant.case]), mutants))
    return runners


def check_mutant(mutant: Mutant, twin: EmulatedRunner, cases: Sequence[Case]) -> None:
    """Raises where a mutant's numbers do not find it, or for another reason than they should."""
    found = []
    for kind in mutant.kinds:
        try:
            check_case(twin, cases[mutant.case], kind)
        except KernelFault as fault:
            found.append(str(fault))
        except AssertionError as wrong:
            found.append(str(wrong))
    assert found, f"nothing was found with {', '.join(mutant.kinds)}"
    assert any(re.search(mutant.finds, each) for each in found), found
