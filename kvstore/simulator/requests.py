"""Requests of a trace, whatever format it came in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final, NamedTuple, Protocol

from kvstore.errors import InvalidArgument
from kvstore.simulator.arrivals import Arrival

__all__ = ["MAX_TOKENS", "Prompt", "Request", "Trace"]

MAX_TOKENS: Final = 1 << 40


class Prompt(Protocol):
    """What a replay needs of a request, in whichever format it came."""

    @property
    def full_blocks(self) -> tuple[int, ...]:
        """Ids of its full blocks from the first on, each of which stands for a whole prefix."""


class Request(NamedTuple):
    """One request.

    Attributes:
        time_ns: when it arrives.
        input_tokens: length of the prompt; of recordings, of its full blocks.
        output_tokens: length of the answer, 0 where the trace does not say.
        ids: of its full blocks from the first on. An id stands for a whole prefix: it always follows the same id.
    """

    time_ns: int
    input_tokens: int
    output_tokens: int
    ids: tuple[int, ...]

    @property
    def full_blocks(self) -> tuple[int, ...]:
        """See ``Prompt``."""
        return self.ids


@dataclass(frozen=True, slots=True)
class Trace:
    """Requests in the order of their arrival.

    Attributes:
        name: of the file, for people.
        format: "mooncake", "bailian" or "recording".
        block_tokens: tokens a block.
        requests: at least one.
        slot_bytes: that a block took on average where it was recorded, 0 where the trace does not say.
        dram_bytes: of the daemon that recorded it, 0 where the trace does not say.
        codec: that it was stored with there, "" where the trace does not say.
        notes: what a reader should know, for people: damage, or what was left out.
    """

    name: str
    format: str
    block_tokens: int
    requests: Sequence[Request]
    slot_bytes: int = 0
    dram_bytes: int = 0
    codec: str = ""
    notes: tuple[str, ...] = ()

    @property
    def arrivals(self) -> list[Arrival]:
        """The requests as the simulator takes them; time does not go back, whatever the trace says."""
        latest = 0
        arrivals = []
        for time_ns, _, _, ids in self.requests:
            latest = max(latest, time_ns)
            arrivals.append(Arrival(latest, ids))
        return arrivals

    def with_block_tokens(self, block_tokens: int) -> Trace:
        """The same requests in larger blocks: the last id of each stands for the whole, and tails are left out.

        Raises:
            InvalidArgument: not a multiple of the trace's own blocks.
        """
        if block_tokens == self.block_tokens:
            return self
        times, rest = divmod(block_tokens, self.block_tokens)
        if rest or times < 1:
            raise InvalidArgument(
                f"the trace {self.name!r} has blocks of {self.block_tokens} tokens: blocks can be a multiple of that, "
                f"not {block_tokens}"
            )
        return replace(
            self,
            block_tokens=block_tokens,
            slot_bytes=self.slot_bytes * times,
            requests=[request._replace(ids=request.ids[times - 1 :: times]) for request in self.requests],
        )
