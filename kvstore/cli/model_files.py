"""Reads what a command is given as a model: a ``config.json``, a directory with one, or the name of a known model."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from kvstore.cli.known_models import KNOWN_MODELS
from kvstore.errors import InvalidArgument
from kvstore_kernels.layout import ELEMENT_BYTES
from kvstore_kernels.model_config import model_layout
from kvstore_kernels.models import ModelLayout

__all__ = ["read_model"]

_CONFIG: Final = "config.json"
_MOST_CONFIG_BYTES: Final = 16 << 20


def read_model(given: str, block_tokens: int, dtype: str | None = None) -> ModelLayout:
    """The KV groups of a model.

    Args:
        given: path of a Hugging Face ``config.json`` or of a directory that holds one, or a name in ``KNOWN_MODELS``.
        block_tokens: tokens a block.
        dtype: of the KV cache; left out, what the config says.

    Raises:
        InvalidArgument: there is no such file or model, it cannot be read, or it does not say what KV the model has.
    """
    if dtype is not None and dtype not in ELEMENT_BYTES:
        raise InvalidArgument(f"--dtype: {dtype!r} is none of {', '.join(ELEMENT_BYTES)}")
    config = _config_of(given)
    try:
        return model_layout(config, block_tokens, dtype)
    except ValueError as wrong:
        option = "; use --dtype" if "lacks dtype" in str(wrong) else ""
        raise InvalidArgument(f"{given}: {wrong}{option}") from None


def _config_of(given: str) -> Mapping[str, Any]:
    path = Path(given)
    if not path.exists():
        known = KNOWN_MODELS.get(given.lower())
        if known is None:
            raise InvalidArgument(
                f"{given}: no such file; give a model's config.json, a directory that holds one, or one of "
                f"{', '.join(KNOWN_MODELS)}"
            )
        return known
    if path.is_dir():
        path = path / _CONFIG
    try:
        with path.open("rb") as file:
            text = file.read(_MOST_CONFIG_BYTES + 1)
        if len(text) > _MOST_CONFIG_BYTES:
            raise InvalidArgument(f"{path} has more than {_MOST_CONFIG_BYTES >> 20} MiB: it is no model's config.json")
        config = json.loads(text)
    except OSError as error:
        raise InvalidArgument(f"cannot read {path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise InvalidArgument(f"{path} is no JSON: {error}; give a model's config.json") from None
    if not isinstance(config, dict):
        raise InvalidArgument(f"{path} holds no JSON object; give a model's config.json")
    return config
