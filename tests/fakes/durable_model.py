"""What a store that outlives its process owes for one key, as plain sets."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class Expected:
    """Of one key: what a reader may see (else a miss), what it must see, what may come back at a crash."""

    possible: set[bytes] = field(default_factory=set)
    durable: bytes | None = None
    ghosts: set[bytes] = field(default_factory=set)

    def gone(self, *, acknowledged: bool) -> None:
        """It was removed."""
        self.ghosts = set() if acknowledged else self.ghosts | self.possible
        self.possible = set()
        self.durable = None

    def missed(self) -> None:
        """It is gone, and nobody promised that it stays so: the log may not know yet."""
        self.gone(acknowledged=False)

    def unsure(self) -> None:
        """It is being removed, and the process may die meanwhile."""
        self.durable = None

    def crashed(self) -> None:
        """The process died."""
        self.possible |= self.ghosts
        self.ghosts = set()
