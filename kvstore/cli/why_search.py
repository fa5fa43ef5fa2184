"""Which namespace a key or a prompt is of, where nobody says so: all that the daemon knows are asked.

A namespace whose blocks have all left is asked as well: the daemon remembers what left it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import TYPE_CHECKING, Final

from kvstore.cli.namespaces import listed, named_namespace, used_namespaces
from kvstore.errors import InvalidArgument
from kvstore.protocol.stories import NO_SUCH_PREFIX
from kvstore_client import chain_keys

if TYPE_CHECKING:
    from kvstore.protocol.statistics import NamespaceStats
    from kvstore_client import Client, Explanation

__all__ = ["Answer", "Search"]

_KEY_DIGITS: Final = 64
_UNKNOWN: Final = "unknown"
"""State of a story of a key that is not there and not remembered."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What is told of a key or of a prompt.

    Attributes:
        explained: in the namespace that knows it.
        unknown_in: where a key was looked up that no namespace knows; its story is then that of any of them.
    """

    explained: Explanation
    unknown_in: tuple[NamespaceStats, ...] = ()


class Search:
    """Asks for keys and prompts.

    Args:
        client: of the daemon.
        name: of the namespace that is meant; "": the one that knows what is asked for.

    Raises:
        InvalidArgument: the name is that of no namespace, or of several.
    """

    def __init__(self, client: Client, name: str) -> None:
        self._client = client
        known = client.stats().namespaces
        self._asked = [named_namespace(known, name)] if name else list(known)
        self._used = self._asked if name else used_namespaces(client, known)

    def key(self, digits: str) -> Answer:
        """A key, or the one that begins so.

        Raises:
            InvalidArgument: several namespaces know it, or it is a beginning of no key or of several.
        """
        found: list[Explanation] = []
        fitting: list[NamespaceStats] = []
        unknown: dict[str, Explanation] = {}
        for one in self._asked:
            explained = self._key_in(digits, one)
            if explained is not None and explained[0].state == _UNKNOWN:
                unknown[one.digest] = explained
            elif explained is not None:
                found.append(explained)
                fitting.append(one)
        if len(found) > 1:
            raise InvalidArgument(
                f"{len(found)} namespaces know {_short(digits)}; say which is meant (--namespace): {listed(fitting)}"
            )
        if found:
            return Answer(found[0])
        if not unknown:
            raise InvalidArgument(
                f"no block that is there or remembered begins with {digits}; looked up in {listed(self._used)}"
            )
        explained = unknown[self._used[0].digest]
        return Answer(explained, tuple(self._used) if len(self._used) > 1 else ())

    def _key_in(self, digits: str, namespace: NamespaceStats) -> Explanation | None:
        """What a namespace knows of a key; None where none begins so."""
        whole = len(digits) == _KEY_DIGITS
        keys, prefixes = ([bytes.fromhex(digits)], []) if whole else ([], [digits])
        try:
            return self._client.why(keys, chained=False, prefixes=prefixes, namespace=namespace.digest)
        except InvalidArgument as error:
            if NO_SUCH_PREFIX in str(error):
                return None
            if len(self._asked) == 1:
                raise
            raise InvalidArgument(f"in {namespace.label} ({namespace.digest}): {error}") from None

    def prompt(self, tokens: Sequence[int], block_tokens: int, salt: bytes) -> Answer:
        """A prompt, in the namespace that knows most of its beginning.

        Args:
            tokens: its token ids.
            block_tokens: tokens a block where the namespace does not say, 0: unknown.
            salt: of the first block.

        Raises:
            InvalidArgument: several namespaces know as much of it, or of several none knows any; of the only one that
                it can be of: blocks are of another size, the size is unknown, or the prompt is shorter than a block.
        """
        refused: dict[str, InvalidArgument] = {}
        keys: dict[str, list[bytes]] = {}
        for one in self._asked:
            try:
                keys[one.digest] = self._prompt_keys(tokens, one, block_tokens, salt)
            except InvalidArgument as error:
                refused[one.digest] = error
        asked = [one for one in self._asked if one.digest in keys]
        if len(self._used) > 1:
            # What does not know the first block knows no beginning: one key is cheaper to ask for than thousands.
            first = {one.digest: self._client.why(keys[one.digest][:1], namespace=one.digest) for one in asked}
            asked = [one for one in asked if first[one.digest][0].state != _UNKNOWN]
        told = [(one, self._client.why(keys[one.digest], namespace=one.digest)) for one in asked]
        most = max((_known_tokens(explained, block_tokens) for _, explained in told), default=0)
        best = [(one, explained) for one, explained in told if _known_tokens(explained, block_tokens) == most]
        if most and len(best) > 1:
            raise InvalidArgument(
                f"{len(best)} namespaces know the same {most:,} leading tokens of the prompt; say which is meant "
                f"(--namespace): {listed([one for one, _ in best])}"
            )
        if most:
            return Answer(best[0][1])
        if len(self._used) == 1:
            (only,) = self._used
            if only.digest in refused:
                raise refused[only.digest]
            return Answer(next(explained for one, explained in told if one is only))
        looked_up = [one for one in self._used if one.digest in keys]
        others = [one for one in self._used if one.digest in refused]
        why_not = f"; not in {listed(others)}: {refused[others[0].digest]}" if others else ""
        raise InvalidArgument(
            "no namespace knows the beginning of the prompt; say of which it is (--namespace); it was looked up in "
            f"{listed(looked_up)}{why_not}"
        )

    def _prompt_keys(
        self, tokens: Sequence[int], namespace: NamespaceStats, block_tokens: int, salt: bytes
    ) -> list[bytes]:
        """The keys of a prompt in a namespace.

        Raises:
            InvalidArgument: its blocks are of another size, the size is unknown, or the prompt is shorter than a block.
        """
        known = self._client.why([], namespace=namespace.digest).block_tokens
        if known and block_tokens and known != block_tokens:
            raise InvalidArgument(f"blocks of {namespace.label} have {known} tokens, not {block_tokens}")
        if not known and not block_tokens:
            raise InvalidArgument(f"{namespace.label} does not say how many tokens a block has: --block-tokens N")
        keys = chain_keys(list(tokens), known or block_tokens, salt=salt)
        if not keys:
            raise InvalidArgument(f"{len(tokens)} tokens are no whole block of {known or block_tokens}")
        return keys


def _known_tokens(explained: Explanation, block_tokens: int) -> int:
    """Leading tokens of a prompt whose blocks are there, or are remembered."""
    leading = sum(1 for _ in takewhile(lambda story: story.state != _UNKNOWN, explained))
    return leading * (explained.block_tokens or block_tokens)


def _short(digits: str) -> str:
    return digits[:16]
