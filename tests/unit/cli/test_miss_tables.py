"""What ``kvstore stats --misses`` and ``kvstore why`` show, of daemons that do not exist."""

from __future__ import annotations

import io

import pytest
from rich.console import Console, RenderableType
from sample_stats import sample_stats

from kvstore.cli.miss_tables import CAUSE_WORDS, miss_tables
from kvstore.cli.why_search import Answer
from kvstore.cli.why_view import why_view
from kvstore.core.misses import EXTRA_MULTIPLES
from kvstore.observability.metrics import make_registry, render_metrics
from kvstore.protocol.messages import WhyReply
from kvstore.protocol.misses import MissCause
from kvstore.protocol.statistics import CauseStats, DaemonStats, MissStats
from kvstore.protocol.stories import GhostStory, KeyStory
from kvstore_client.why import Explanation, explanation_of

MIB = 1 << 20


def shown(renderable: RenderableType, width: int = 80) -> list[str]:
    out = io.StringIO()
    Console(file=out, width=width, highlight=False, markup=False).print(renderable)
    text = out.getvalue().splitlines()
    assert all(len(line) <= width for line in text)
    return [line.rstrip() for line in text]


def missed(extra: dict[int, int] | None = None, **blocks: int) -> DaemonStats:
    """Statistics with so many missed blocks by cause, each of a request of its own; of the evicted by bucket."""
    stats = sample_stats()
    extra_blocks = [0] * (len(EXTRA_MULTIPLES) + 1)
    for bucket, count in (extra or {}).items():
        extra_blocks[bucket] = count
    stats.misses = MissStats(
        requests=sum(blocks.values()),
        blocks=sum(blocks.values()),
        causes={cause: CauseStats(requests=count, blocks=count) for cause, count in blocks.items()},
        multiples=list(EXTRA_MULTIPLES),
        extra_blocks=extra_blocks,
        ghosts=1200,
        ghost_bytes=105_600,
        ghost_limit_bytes=32 * MIB,
        oldest_ghost_s=125.0,
    )
    return stats


def test_causes_are_shown_by_size_with_their_shares() -> None:
    text = shown(miss_tables(missed(never_seen=30, diverged=60, not_stored=10)))
    assert [line.split()[:2] for line in text[3:6]] == [["prompt", "differs"], ["never", "seen"], ["not", "stored"]]
    assert text[3].split()[2:7] == ["60", "60.0", "%", "60", "60.0"]
    assert any(line.split()[:3] == ["all", "100", "100.0"] for line in text)
    assert any("1,200 departures are remembered" in line for line in text)


def test_evicted_blocks_say_what_would_have_kept_half_of_them() -> None:
    bucket = EXTRA_MULTIPLES.index(0.5)
    text = shown(miss_tables(missed({bucket - 1: 20, bucket: 50, bucket + 1: 30}, evicted=100, never_seen=10)))
    table = [line.split() for line in text if " x " in f" {line} "]
    assert [row[4] for row in table] == ["20", "70", "100"]
    assert [row[:4] for row in table][1] == ["4.0", "GiB", "x", "1.5"]
    advice = " ".join(text[-4:]).replace("\u00a0", " ")
    assert "4.0 GiB more of DRAM would have kept 70.0 % of that" in advice


def test_evicted_blocks_that_no_capacity_in_reach_would_have_kept() -> None:
    text = " ".join(shown(miss_tables(missed({len(EXTRA_MULTIPLES): 100}, evicted=100))))
    assert "would have needed more than 32 times the capacity" in text


@pytest.mark.parametrize("cause", [cause for cause in MissCause if cause is not MissCause.EVICTED])
def test_every_cause_has_words_and_says_what_to_do(cause: MissCause) -> None:
    text = shown(miss_tables(missed(**{cause.value: 5, "never_seen" if cause is MissCause.CORRUPT else "corrupt": 1})))
    assert any(line.startswith(CAUSE_WORDS[cause]) for line in text)
    assert " ".join(text).count("Most of what missed") == 1


@pytest.mark.parametrize(
    ("largest", "words"), [(6, "Most of what missed is on"), (5, "The largest part of what missed (50.0 %) is on")]
)
def test_most_is_more_than_half(largest: int, words: str) -> None:
    some = missed(recompute=largest, never_seen=4, removed=10 - 4 - largest)
    assert words in " ".join(shown(miss_tables(some))).replace("\u00a0", " ")
    bucket = EXTRA_MULTIPLES.index(0.5)
    for extra in ({bucket: 10}, {len(EXTRA_MULTIPLES): 10}):
        some = missed(extra, evicted=largest, never_seen=4, removed=10 - 4 - largest)
        told = " ".join(shown(miss_tables(some))).replace("\u00a0", " ")
        assert words.replace("is on", "had been evicted") in told


def test_a_cause_of_a_later_version_is_shown_as_it_is() -> None:
    text = shown(miss_tables(missed(moon_phase=3)))
    assert any(line.startswith("moon phase") for line in text)


def test_nothing_missed_and_nothing_explained_are_said() -> None:
    assert "nothing was missed yet" in shown(miss_tables(missed()))
    assert "does not explain misses" in shown(miss_tables(sample_stats()))[0]


def test_metrics_count_every_cause() -> None:
    bucket = EXTRA_MULTIPLES.index(2)
    stats = missed({bucket: 4}, evicted=5, never_seen=7)
    text = render_metrics(make_registry(lambda: stats)).decode()
    assert 'kvstore_missed_blocks_total{cause="evicted"} 5.0' in text
    assert 'kvstore_missed_requests_total{cause="never_seen"} 7.0' in text
    assert 'kvstore_evicted_misses_total{capacity_multiple="2"} 4.0' in text
    assert all(f'kvstore_missed_blocks_total{{cause="{cause.value}"}}' in text for cause in MissCause)
    assert "kvstore_ghost_bytes 105600.0" in text


def explained(*stories: KeyStory, chained: bool = True) -> Explanation:
    return explanation_of(WhyReply(1, 2, "chat", "ab" * 32, 3, 64, 2, list(stories)), chained)


def story(number: int, state: str = "resident", cause: str = "", **fields: object) -> KeyStory:
    tiers = ["dram"] if state == "resident" else []
    return KeyStory(key=bytes([number]) * 32, state=state, cause=cause, tiers=tiers, depth=number, **fields)  # type: ignore[arg-type]


GHOST = GhostStory(cause="evicted", ago_s=7200, tier="ssd", policy="adaptive", extra_bytes=3 * MIB)


def test_a_prompt_is_shown_run_by_run() -> None:
    told = explained(story(0), story(1), story(2, "gone", "evicted", ghost=GHOST), story(3, "unknown", "never_seen"))
    text = shown(why_view([Answer(told)]))
    rows = [line.split("   ") for line in text[3:6]]
    assert [[cell.strip() for cell in row if cell.strip()][:3] for row in rows] == [
        ["0 - 1", "0 - 127", "hit in DRAM"],
        ["2", "128 - 191", "evicted"],
        ["3", "192 - 255", "never seen"],
    ]
    joined = " ".join(text)
    assert "was evicted from the SSD by adaptive 2.0 h ago; 3.0 MiB more would have kept it" in joined
    assert "Of the blocks behind it: 1 never seen." in joined
    assert (told.hits, len(list(told))) == (2, 4)


@pytest.mark.parametrize(
    ("one", "words"),
    [
        (
            story(1, "gone", "not_stored", ghost=GhostStory(cause="not_stored", ago_s=3, reason="overloaded")),
            "overloaded",
        ),
        (story(1, "unknown", "not_stored"), "there was no slot when a block behind the one before was put"),
        (story(1, "gone", "removed", ghost=GhostStory(cause="removed", ago_s=3)), "was removed by a client 3.0 s ago"),
        (story(1, "gone", "expired", ghost=GhostStory(cause="expired", ago_s=90)), "expired 1.5 min ago"),
        (story(1, "gone", "corrupt", ghost=GhostStory(cause="corrupt", ago_s=1, tier="ssd")), "corrupt in the SSD"),
        (story(1, "unknown", "diverged"), "the prompt differs from token 64 on"),
        (story(1, "incomplete", "part_missing", parts=1), "lacks a part: 1 of 2 are there"),
        (story(1, "resident", "evicted"), "is there and of no use: a block before it is missing (evicted)"),
        (story(1, "unknown", "moon_phase"), "misses (moon phase)"),
        (story(1, "gone", "quota", ghost=GhostStory(cause="quota", ago_s=0.5)), "more than its quota 500 ms ago"),
    ],
)
def test_every_story_says_why_in_a_sentence(one: KeyStory, words: str) -> None:
    told = explained(one, chained=False)
    assert words in told[0].reason
    assert words in told.text
    assert words in " ".join(shown(why_view([Answer(told)]))).replace("  ", "")


def test_a_block_in_two_tiers_tells_of_both() -> None:
    one = story(1, used_ago=4, leases=2, slot_bytes=8192, codec="kivi4", fidelity=85, parts=2, retention="priority 80")
    one.tiers.append("ssd")
    text = explained(one, chained=False).text
    for words in ("in DRAM and the SSD", "8.0 KiB of kivi4, fidelity 85; 2 of 2 parts", "4 requests ago; 2 leases"):
        assert words in text
    assert "retention: priority 80" in text


def test_a_prompt_of_one_block_has_one_block() -> None:
    assert explained(story(0)).text.startswith("1 of 1 block of chat hit")
    assert explained(story(0), story(1)).text.startswith("2 of 2 blocks of chat hit")
