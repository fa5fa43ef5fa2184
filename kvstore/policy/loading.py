"""Load or recompute: how much of a chain that lies below DRAM comes up sooner than an engine computes it anew.

``T(k)``, the time until everything is there if the leading ``k`` blocks are loaded and the others computed, is

``latency + (queued bytes + bytes of the loads among the k) / bandwidth + tokens of the others / prefill rate``

without latency and queue where nothing is loaded. The ``k`` with the least ``T(k)`` is taken: for blocks of one size
behind each other that is all of them or none, but blocks in DRAM behind some that are below come for nothing, and sizes
may differ. Loading is taken to overlap with nothing, and computing a token to cost the same everywhere in a prompt; the
first makes loads look dearer than they are for engines that load by layers, the second makes long prefixes look cheaper
to compute than they are.

Bandwidth and latency are measured from the moment that a read is asked for until its record is verified and, where it
was transcoded, decoded. The prefill rate is set, or told by the engine; it is not guessed from the time between a match
and the puts of the same request: a put of what was computed before looks like a very fast engine, and then loads that
pay would be refused.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable, Sequence
from typing import Final

__all__ = ["LoadCosts", "LoadDecision", "PrefillRates", "leading_worth_loading"]

_MEASURED_BYTES: Final = 4 << 20
_RATE_WEIGHT: Final = 0.25
_LATENCY_WEIGHT: Final = 1 / 16
_DEEP: Final = 4
"""Reads at a time from which on a device is taken to be busy: its bandwidth is measured then."""

_PROBE_S: Final = 20.0
"""Where loads are refused, one is let through so often: a device that was slow once may be fast again."""

_MOST_NAMESPACES: Final = 1024
_REPORTED_S: Final = 30.0
"""Seconds of reported computing after which older reports count half."""


class LoadDecision:
    """How much of a chain is worth loading.

    Attributes:
        blocks: leading blocks to take, of those that were asked about.
        kind: "all", "none" or "part" of what is below; "unknown" where nothing is known to compare; "probe".
        saved_s: seconds that it saves: against computing all where all is loaded, else against loading all.
        queue_s: how long its loads would wait for others.
    """

    __slots__ = ("blocks", "kind", "queue_s", "saved_s")

    def __init__(self, blocks: int, kind: str, saved_s: float = 0.0, queue_s: float = 0.0) -> None:
        self.blocks = blocks
        self.kind = kind
        self.saved_s = saved_s
        self.queue_s = queue_s


def leading_worth_loading(
    loads: Sequence[int], start_s: float, bytes_per_s: float, compute_s: float
) -> tuple[int, float, float, float]:
    """The cheapest number of leading blocks to take.

    Args:
        loads: for each block the bytes to be loaded, 0 for one in DRAM.
        start_s: latency, and the wait for other loads; paid once, if anything is loaded.
        bytes_per_s: bandwidth.
        compute_s: seconds to compute a block.

    Returns:
        How many, and the seconds of that, of loading nothing (taking what comes before the first load) and of taking
        all. Where two are equal the longer.
    """
    count = len(loads)
    first = next((index for index, load_bytes in enumerate(loads) if load_bytes), count)
    nothing_s = (count - first) * compute_s
    best, best_s, load_s = first, nothing_s, start_s
    for index in range(first, count):
        load_s += loads[index] / bytes_per_s
        total_s = load_s + (count - index - 1) * compute_s
        if total_s <= best_s:
            best, best_s = index + 1, total_s
    return best, best_s, nothing_s, load_s if first < count else 0.0


class PrefillRates:
    """Tokens a second by namespace, as engines report them: of the last half minute or so of computing."""

    def __init__(self) -> None:
        self._reported: OrderedDict[int, tuple[float, float]] = OrderedDict()

    def report(self, namespace_id: int, tokens: int, seconds: float) -> None:
        """An engine computed so many tokens of prompts in so many seconds."""
        known_tokens, known_s = self._reported.pop(namespace_id, (0.0, 0.0))
        kept = 0.5 ** (seconds / _REPORTED_S)
        self._reported[namespace_id] = (known_tokens * kept + tokens, known_s * kept + seconds)
        if len(self._reported) > _MOST_NAMESPACES:
            self._reported.popitem(last=False)

    def of(self, namespace_id: int) -> float:
        """Tokens a second, 0.0 where nobody told."""
        tokens, seconds = self._reported.get(namespace_id, (0.0, 0.0))
        return tokens / seconds if seconds else 0.0

    def last(self) -> float:
        """The rate that was reported last, of any namespace."""
        return self.of(next(reversed(self._reported))) if self._reported else 0.0


class LoadCosts:
    """What loads cost, measured; and the decisions that follow.

    Args:
        clock: nanoseconds that never go back.
        prefill_tokens_per_s: of the engine, as it is set; 0: as it is reported.
    """

    def __init__(self, clock: Callable[[], int], prefill_tokens_per_s: float = 0.0) -> None:
        self._clock = clock
        self._set_rate = prefill_tokens_per_s
        self.rates = PrefillRates()
        self.bytes_per_s = 0.0
        self.latency_s = 0.0
        self._deep = False
        self._flying = 0
        self._since_ns = 0
        self._busy = {False: [0, 0], True: [0, 0]}
        self._tried_ns = clock()
        self.decisions: Counter[str] = Counter()
        self.refused_blocks = 0
        self.load_saved_s = 0.0
        self.refusal_saved_s = 0.0

    # -------------------------------------------------------------- measuring

    def began(self) -> tuple[int, bool]:
        """A read is asked for; gives what ``ended`` wants to know of it: when, and whether nothing else was read."""
        now_ns = self._clock()
        if not self._flying:
            self._since_ns = now_ns
        else:
            self._pass(now_ns)
        self._flying += 1
        self._tried_ns = now_ns
        return now_ns, self._flying == 1

    def ended(self, began: tuple[int, bool], slot_bytes: int, *, good: bool) -> None:
        """A read is over, and what it read is verified, unless it failed."""
        now_ns = self._clock()
        deep = self._flying >= _DEEP
        self._pass(now_ns)
        self._flying -= 1
        if not good:
            return
        began_ns, alone = began
        if alone and self.bytes_per_s:
            # What it took beyond its bytes is latency.
            latency_s = max((now_ns - began_ns) / 1e9 - slot_bytes / self.bytes_per_s, 0.0)
            self.latency_s += (latency_s - self.latency_s) * (_LATENCY_WEIGHT if self.latency_s else 1.0)
        busy = self._busy[deep]
        busy[0] += slot_bytes
        if busy[0] >= _MEASURED_BYTES and busy[1]:
            rate = busy[0] * 1e9 / busy[1]
            if deep and not self._deep:
                # What was known came from single reads, which leave the device idle in between.
                self._deep, self.bytes_per_s = True, rate
            elif deep or not self._deep:
                self.bytes_per_s += (rate - self.bytes_per_s) * (_RATE_WEIGHT if self.bytes_per_s else 1.0)
            self._busy[deep] = [0, 0]

    def _pass(self, now_ns: int) -> None:
        self._busy[self._flying >= _DEEP][1] += now_ns - self._since_ns
        self._since_ns = now_ns

    # -------------------------------------------------------------- deciding

    def prefill_tokens_per_s(self, namespace_id: int) -> float:
        """Of a namespace's engine: as it is set, else as it was reported, 0.0 where neither is known."""
        return self._set_rate or self.rates.of(namespace_id)

    @property
    def prefill_source(self) -> str:
        """Where the rate comes from: "set", "reported", or "" where none is known."""
        return "set" if self._set_rate else "reported" if self.rates.last() else ""

    @property
    def shown_tokens_per_s(self) -> float:
        """The rate that is used, or was reported last."""
        return self._set_rate or self.rates.last()

    def decide(self, namespace_id: int, loads: Sequence[int], block_tokens: int, queued_bytes: int) -> LoadDecision:
        """How many leading blocks are worth taking, and count the decision.

        Args:
            namespace_id: whose chain it is.
            loads: for each block the bytes to be loaded, 0 for one in DRAM; at least one is not 0.
            block_tokens: tokens of a block.
            queued_bytes: of loads that come first.
        """
        rate = self.prefill_tokens_per_s(namespace_id)
        if not rate or not self.bytes_per_s or not block_tokens:
            return self._count(LoadDecision(len(loads), "unknown"), 0)
        queue_s = queued_bytes / self.bytes_per_s
        blocks, best_s, nothing_s, all_s = leading_worth_loading(
            loads, self.latency_s + queue_s, self.bytes_per_s, block_tokens / rate
        )
        below = sum(1 for load_bytes in loads if load_bytes)
        taken = sum(1 for load_bytes in loads[:blocks] if load_bytes)
        if not taken and self._clock() - self._tried_ns > _PROBE_S * 1e9:
            return self._count(LoadDecision(len(loads), "probe", 0.0, queue_s), 0)
        if taken:
            self.load_saved_s += nothing_s - best_s
        if taken < below:
            self.refusal_saved_s += all_s - best_s
        kind = "all" if taken == below else "part" if taken else "none"
        saved_s = max(nothing_s if taken == below else all_s, best_s) - best_s
        return self._count(LoadDecision(blocks, kind, saved_s, queue_s), below - taken)

    def would_take(self, namespace_id: int, loads: Sequence[int], block_tokens: int, queued_bytes: int) -> int:
        """How many leading blocks ``decide`` would find worth taking, but for a probe; nothing is counted."""
        rate = self.prefill_tokens_per_s(namespace_id)
        if not rate or not self.bytes_per_s or not block_tokens:
            return len(loads)
        before_s = self.latency_s + queued_bytes / self.bytes_per_s
        return leading_worth_loading(loads, before_s, self.bytes_per_s, block_tokens / rate)[0]

    def _count(self, decision: LoadDecision, refused: int) -> LoadDecision:
        self.decisions[decision.kind] += 1
        self.refused_blocks += refused
        return decision
