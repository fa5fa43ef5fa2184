"""Which tokens the KV of a cache is of, as far as that is certain: what a model's forward was given is written down.

A block is stored under a key made of token ids, so these must be the ids that were really read, at positions that
count from 0, each seeing all before it. What may be otherwise (padding, embeddings instead of ids, arguments that are
not known) ends the record: what was certain before stays, and nothing behind it is ever stored. torch is not needed to
import this module, its tensors are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from kvstore.errors import InvalidArgument

__all__ = ["CACHE_NAMES", "TokenRecord", "Tokens", "cache_in", "named_arguments", "token_ids"]

Tokens = npt.NDArray[np.int64]
"""Token ids ``[tokens]``."""

_CHECKED: Final = frozenset({"input_ids", "attention_mask", "position_ids", "cache_position"})
CACHE_NAMES: Final = ("cache", "past_key_values")
"""Names of a forward's argument that is the cache, since transformers 5.24 and before."""

_HARMLESS: Final = frozenset(
    {*CACHE_NAMES, "use_cache", "return_dict", "output_attentions", "output_hidden_states"}
    | {"output_router_logits", "logits_to_keep", "labels", "num_items_in_batch", "is_first_iteration"}
)
"""Arguments of a decoder's forward that leave KV as it is."""

_MOST_CHUNKS: Final = 512


def named_arguments(names: tuple[str, ...], args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """What a hook is given of a forward with parameters of these names, by name."""
    return {**dict(zip(names, args, strict=False)), **kwargs} if args else kwargs


def cache_in(arguments: Mapping[str, Any]) -> Any:
    """The cache among a forward's arguments, None where there is none."""
    return next((arguments[name] for name in CACHE_NAMES if arguments.get(name) is not None), None)


def token_ids(given: Any) -> Tokens:
    """Token ids of one sequence, as a tokenizer gives them.

    Args:
        given: ``[tokens]`` or ``[1, tokens]``: a tensor on any device, an array or a list of integers.

    Raises:
        InvalidArgument: not the ids of one sequence; says what it is.
    """
    if isinstance(given, Mapping):
        raise InvalidArgument("input_ids must be token ids; of what a tokenizer gives that is .input_ids")
    if isinstance(given, (str, bytes)):
        raise InvalidArgument("input_ids must be token ids, got text: run the tokenizer first")
    if hasattr(given, "detach"):
        given = given.detach().cpu()
    try:
        ids = np.asarray(given)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InvalidArgument(f"input_ids must be token ids: {error}") from None
    if ids.ndim == 2 and ids.shape[0] == 1:
        ids = ids[0]
    if ids.ndim == 2:
        raise InvalidArgument(
            f"input_ids has {ids.shape[0]} sequences; a cache is loaded for one: load and generate one after the other"
        )
    if ids.ndim != 1 or ids.dtype.kind not in "iu" or not ids.size:
        raise InvalidArgument(
            f"input_ids must be the token ids of one sequence, [1, tokens] or [tokens], got {ids.dtype} "
            f"{list(ids.shape)}"
        )
    return ids.astype(np.int64)


class TokenRecord:
    """The tokens of one cache.

    Args:
        loaded: whose KV is in the cache already.
        expected: that come next, where that is known; what is read must agree.

    Attributes:
        why: why nothing is written down any more, "" as long as it is.
    """

    def __init__(self, loaded: Tokens, expected: Tokens) -> None:
        self.why = ""
        self._loaded = len(loaded)
        self._expected = expected
        self._certain = len(loaded)
        """Tokens that are in the cache for certain."""
        self._chunks: list[Any] = [loaded]
        """What was read, ``[count]`` each; the last one may not be in the cache yet."""
        self._length = len(loaded)
        self._doubts: list[tuple[int, Any, str]] = []
        """Conditions that were not looked at yet, so that a device need not be waited for: from which token on, a
        tensor that must be true, and what it means where it is not."""

    def observe(self, arguments: Mapping[str, Any], past: int) -> None:
        """A forward begins.

        Args:
            arguments: of the decoder, by name.
            past: tokens in the cache.

        Raises:
            InvalidArgument: the sequence is another one than the prefix was loaded for, or hides a part of it.
        """
        self._settle(past)
        if self.why:
            return
        doubts: list[tuple[int, Any, str]] = []
        why = _unusable(arguments, past, doubts)
        if self._loaded and past - self._loaded < len(self._expected):
            self._check_prompt(arguments.get("input_ids"), past, doubts)
        if why:
            self._end(why)
            return
        ids = arguments["input_ids"].detach()[0].clone()
        self._doubts += doubts
        self._chunks.append(ids)
        self._length += len(ids)
        if len(self._chunks) > _MOST_CHUNKS:
            self._chunks = [self._joined()]
            self._resolve()

    def _check_prompt(self, ids: Any, past: int, doubts: list[tuple[int, Any, str]]) -> None:
        """Compare what is read behind a loaded prefix with the prompt that it was loaded for."""
        if ids is not None:
            expected = self._expected[past - self._loaded :]
            given = ids.detach().cpu().numpy().reshape(-1, ids.shape[-1])[:, : len(expected)]
            different = np.argwhere(given != expected[: given.shape[1]])
            if different.size:
                row, at = different[0].tolist()
                raise InvalidArgument(
                    f"a prefix of {self._loaded} tokens was loaded for a prompt whose token {past + at} is "
                    f"{expected[at]}, and the model is given {given[row, at]} there: load() the prompt to generate "
                    "from. Where generate() reads a prompt from its beginning whatever the cache holds (assisted "
                    "generation; before transformers 5.21 prefill_chunk_size), pass it empty()"
                )
        for _, condition, why in doubts:
            if not bool(condition):
                raise InvalidArgument(f"a prefix that was loaded cannot be used here: {why}")

    def _settle(self, past: int) -> None:
        """Compare what was written down with what the cache has."""
        if self.why:
            self._certain = min(self._certain, past)
        elif past == self._length:
            self._certain = past
        else:
            self._certain = min(self._certain, past)
            self._end("its KV was changed by something else than the model's forward")

    def _end(self, why: str) -> None:
        self.why = why
        self._length = self._certain

    def end(self, why: str, length: int) -> None:
        """Write down no more, because of what is about to be done to a cache of so many tokens."""
        self._settle(length)
        if not self.why:
            self._end(why)

    def crop(self, before: int, length: int) -> None:
        """The cache, of ``before`` tokens, has been cut to its first ``length``."""
        self._settle(before)
        self._certain = self._length = min(self._certain, length)
        self._chunks = [self._joined()[: self._certain]]
        self._doubts = [doubt for doubt in self._doubts if doubt[0] < self._certain]

    def take(self, length: int) -> Tokens:
        """The tokens that are in a cache of so many tokens for certain; waits for the device that they are on."""
        self._settle(length)
        self._resolve()
        tokens = self._joined()[: self._certain]
        self._chunks = [tokens]
        return tokens

    def _resolve(self) -> None:
        """Look at what was put off."""
        for start, condition, why in self._doubts:
            if not bool(condition):
                self._certain = min(self._certain, start)
                self._end(why)
                break
        self._doubts = []

    def _joined(self) -> Tokens:
        parts: Sequence[Any] = [np.asarray(chunk.cpu() if hasattr(chunk, "cpu") else chunk) for chunk in self._chunks]
        return np.concatenate(parts).astype(np.int64, copy=False)


def _unusable(arguments: Mapping[str, Any], past: int, doubts: list[tuple[int, Any, str]]) -> str:
    """Why the KV of what a forward reads cannot be named by its token ids, "" where it can if the doubts are none."""
    ids = arguments.get("input_ids")
    if ids is None:
        return "the model was given embeddings instead of token ids"
    if ids.ndim != 2 or ids.shape[0] != 1:
        return f"the model was given {ids.shape[0]} sequences at once"
    count = ids.shape[1]
    for name, value in arguments.items():
        if name not in _CHECKED and name not in _HARMLESS and value is not None and value is not False:
            return f"the model was given {name}, whose effect on KV is not known"
    mask = arguments.get("attention_mask")
    if mask is not None:
        if not hasattr(mask, "ndim") or mask.ndim != 2 or tuple(mask.shape) != (1, past + count):
            return "the model was given an attention mask that is not [1, all tokens]"
        doubts.append((past, mask.all(), "the attention mask hides tokens (padding)"))
    for name in ("position_ids", "cache_position"):
        positions = arguments.get(name)
        if positions is None:
            continue
        if positions.numel() != count:
            return f"the model was given {name} that are not one a token"
        wanted = _arange(positions, past, count)
        doubts.append((past, (positions.reshape(-1) == wanted).all(), f"{name} do not count from 0"))
    return ""


def _arange(like: Any, start: int, count: int) -> Any:
    """Consecutive positions, as a tensor like another one."""
    return like.new_ones(count).cumsum(0) + (start - 1)
