"""The parts of ``kvstore verify --stress`` that decide what is wrong: if they were blind, it would find nothing."""

from __future__ import annotations

import io

import pytest
from rich.console import Console
from sample_stats import sample_stats

from kvstore.cli.stress.pattern import KeyTable
from kvstore.cli.stress.private_daemon import accounting_problems, leaked_slots
from kvstore.cli.stress.profile import PROFILES, Blocks, Buffer, Profile
from kvstore.cli.stress.report import StageReport, StressReport, stress_tables

LENGTHS = (4, 8, 64, 20_001, 65_536)


@pytest.fixture(scope="module")
def blocks() -> Blocks:
    return Blocks(Profile("test", LENGTHS, 2))


@pytest.mark.parametrize("number", range(len(LENGTHS)))
def test_check_with_one_changed_byte_anywhere_sees_it(blocks: Blocks, number: int):
    buffer = Buffer(blocks.max_length)
    buffer.prepare(blocks, number)
    data = buffer.write(blocks, number)
    length = LENGTHS[number]
    assert len(data) == length
    assert buffer.wrong_bytes(blocks, number, length) == 0
    for at in {0, 3, length // 2, length - 1}:
        data[at] ^= 1
        assert buffer.wrong_bytes(blocks, number, length) > 0, at
        data[at] ^= 1
    assert buffer.wrong_bytes(blocks, number, length) == 0


def test_check_with_another_length_or_another_key_is_wrong_everywhere(blocks: Blocks):
    buffer = Buffer(blocks.max_length)
    buffer.prepare(blocks, 4)
    buffer.write(blocks, 4)
    assert buffer.wrong_bytes(blocks, 4, 65_528) == 65_536
    # Block 9 is as long as block 4, and agrees with it in no word.
    assert blocks.wrong_bytes(buffer.address, 65_536, buffer.data, 9) == 65_536


def test_check_with_a_byte_behind_the_block_changed_sees_it(blocks: Blocks):
    buffer = Buffer(blocks.max_length)
    buffer.prepare(blocks, 3)
    buffer.write(blocks, 3)
    assert buffer.wrong_bytes(blocks, 3, LENGTHS[3]) == 0
    buffer.data[LENGTHS[3]] ^= 1
    assert buffer.wrong_bytes(blocks, 3, LENGTHS[3]) > 0


def test_prepared_buffer_with_what_an_earlier_read_left_is_wrong(blocks: Blocks):
    buffer = Buffer(blocks.max_length)
    for number, length in enumerate(LENGTHS):
        buffer.write(blocks, number)
        buffer.prepare(blocks, number)
        assert buffer.wrong_bytes(blocks, number, length) > 0


def test_blocks_of_all_profiles_are_more_than_the_daemon_holds():
    for profile in PROFILES.values():
        assert sum(Blocks(profile).table.lengths) > 48 << 20


def test_key_table_row_is_key_and_length():
    table = KeyTable("rows", [5, 8])
    assert len(set(table.keys)) == 2
    assert table.row(1) - table.row(0) == 48


# ------------------------------------------------------------------ outcomes


def stage(**fields: object) -> StageReport:
    return StageReport(**({"phase": "index", "name": "a stage", "processes": 3, "reads": 9, "hits": 5} | fields))


@pytest.mark.parametrize(
    ("fields", "outcome"),
    [
        ({}, "ok"),
        ({"hits": 0}, "FAILED: nothing was read"),
        ({"wrong_blocks": 2}, "FAILED: 2 wrong blocks"),
        ({"leaked_slots": 1}, "FAILED: 1 slots leaked"),
        ({"hangs": 1}, "FAILED: something hung"),
        ({"problems": ["first\nwhat it was", "second"]}, "FAILED: what it was"),
        ({"phase": "control", "wrong_blocks": 1}, "ok: the fault was seen"),
        ({"phase": "control"}, "FAILED: the fault was not seen"),
        ({"phase": "control", "wrong_blocks": 1, "problems": ["died"]}, "FAILED: died"),
    ],
)
def test_stage_outcome(fields: dict[str, object], outcome: str):
    report = stage(**fields)
    assert report.outcome == outcome
    assert report.ok == outcome.startswith("ok")


def test_stress_tables_name_every_stage_and_every_problem():
    stages = [stage(retries=12), stage(phase="control", name="a fault", problems=["it died"])]
    out = io.StringIO()
    Console(file=out, width=200).print(stress_tables(StressReport(seconds=61.0, ok=False, stages=stages)))
    text = out.getvalue()
    assert "Stress: 1 min 01 s" in text
    assert "FAILED: it died" in text
    assert text.rstrip().endswith("a fault: it died")


def test_leaked_slots_and_accounting_of_a_daemon_that_adds_up_are_none():
    stats = sample_stats()
    dram = stats.dram
    dram.granted_bytes = dram.limbo_bytes = 0
    dram.records = sum(slots.used_slots for slots in dram.classes)
    for slots in dram.classes:
        slots.cut_slots = slots.slabs * (dram.slab_bytes // slots.slot_bytes)
        slots.free_slots = slots.cut_slots - slots.used_slots
    dram.populated_bytes = (sum(slots.slabs for slots in dram.classes) + dram.free_slabs) * dram.slab_bytes
    assert leaked_slots(stats) == 0
    assert accounting_problems(stats) == []
    dram.classes[0].used_slots += 1
    assert leaked_slots(stats) == 1
    assert len(accounting_problems(stats)) == 1
    # More than the slabs have room for, also where slots lie across joined ones.
    dram.classes[0].used_slots -= 1
    dram.classes[0].slabs = dram.classes[0].cut_slots * dram.classes[0].slot_bytes // dram.slab_bytes
    dram.populated_bytes = (sum(slots.slabs for slots in dram.classes) + dram.free_slabs) * dram.slab_bytes
    assert len(accounting_problems(stats)) == 1
    dram.limbo_bytes = 4096
    dram.free_slabs += 1
    assert len(accounting_problems(stats)) == 3
