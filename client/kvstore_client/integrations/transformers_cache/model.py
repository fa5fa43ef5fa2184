"""What the KV of a transformers model looks like, and by which name it is stored.

Covers: which models there are blocks for, and why not for others; the layout of their KV, which a short forward shows;
what tells two models apart. Does not cover: caches and the store, see ``kvstore_client.integrations.transformers``.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from hashlib import sha256
from inspect import signature
from typing import Any, Final

import torch
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from kvstore.errors import InvalidArgument
from kvstore_client.integrations.transformers_cache.tokens import CACHE_NAMES, cache_in, named_arguments
from kvstore_kernels.layout import KVLayout

__all__ = ["ModelKV", "described", "known_revision", "weights_digest"]

_PROBE_TOKENS: Final = 3
_ROUNDINGS: Final = 4
_LEAST_ROUNDING: Final = 1e-3
"""What other shapes inside of a forward (of experts, say) may change, relative to the largest value."""

_LAYER_TYPES: Final = frozenset({"full_attention", "sliding_attention"})
_ROPES_BY_LENGTH: Final = frozenset({"dynamic", "longrope", "su"})
"""Rotary embeddings that depend on how long the sequence is when a token is computed, and its KV with them."""

_WITHOUT_EFFECT: Final = frozenset(
    {"architectures", "id2label", "label2id", "problem_type", "transformers_version", "use_cache"}
    | {"output_attentions", "output_hidden_states", "return_dict"}
)
"""Entries of a configuration that do not change KV; those that begin with an underscore neither."""


@dataclass(frozen=True, slots=True)
class ModelKV:
    """A model as far as its KV goes.

    Attributes:
        decoder: the innermost module that is given token ids and the cache, whatever calls it.
        config: of the model.
        layout: of a block of its KV.
        device: where its KV is.
    """

    decoder: Any
    config: Any
    layout: KVLayout
    device: Any

    @classmethod
    def of(cls, model: Any, block_tokens: int) -> ModelKV:
        """Look at a model; has it read a few tokens.

        Args:
            model: a ``PreTrainedModel``, also compiled or with adapters of PEFT.
            block_tokens: tokens a block.

        Raises:
            InvalidArgument: not a model whose KV can be cut into blocks; says why.
        """
        own = _unwrapped(model)
        config = own.config
        problem = _problem_of(own, config)
        if problem:
            raise InvalidArgument(f"{type(own).__name__} cannot be used with the store: {problem}")
        probe = _probe(own)
        keys, layers = probe.layers[0].keys, len(probe.layers)
        dtype = str(keys.dtype).removeprefix("torch.")
        try:
            layout = KVLayout(layers, keys.shape[1], keys.shape[3], dtype, block_tokens)
        except ValueError as error:
            raise InvalidArgument(str(error)) from None
        if keys.device.type not in ("cpu", "cuda"):
            raise InvalidArgument(
                f"{type(own).__name__} cannot be used with the store: its KV is on the device {keys.device}; the store "
                "reads that of the CPU and of CUDA devices"
            )
        return cls(probe.decoder, config, layout, keys.device)


@dataclass(frozen=True, slots=True)
class _Probe:
    """The innermost module that reads token ids into a cache, and the layers of that cache."""

    decoder: Any
    layers: list[Any]


def _unwrapped(model: Any) -> Any:
    """The model of transformers in a compiled one, or in one of PEFT."""
    model = getattr(model, "_orig_mod", model)
    if not isinstance(model, PreTrainedModel) and hasattr(model, "peft_config") and hasattr(model, "get_base_model"):
        adapters = model.peft_config.values() if hasattr(model.peft_config, "values") else [model.peft_config]
        if any(getattr(adapter, "is_prompt_learning", False) for adapter in adapters):
            raise InvalidArgument(
                "the model has an adapter that learns a prompt: its KV begins with tokens that have no ids; use the "
                "model without it, or an adapter of the weights (LoRA)"
            )
        model = model.get_base_model()
    if not isinstance(model, PreTrainedModel):
        raise InvalidArgument(f"model must be a PreTrainedModel of transformers, got {type(model).__name__}")
    return model


def _problem_of(model: Any, config: Any) -> str:
    """Why there can be no blocks of a model's KV, "" where there can."""
    if config.is_encoder_decoder or getattr(config, "add_cross_attention", False):
        return "it is an encoder-decoder; the store keeps the KV of models that only decode"
    if config.get_text_config(decoder=True) is not config:
        return (
            "it is made of several models (text and images, say), and token ids alone do not name its KV; use its text "
            "model"
        )
    if not model.can_generate():
        return "it does not generate; use the model with its head (AutoModelForCausalLM)"
    kinds = set(getattr(config, "layer_types", None) or ())
    if getattr(config, "attention_chunk_size", None) is not None:
        kinds.add("chunked_attention")
    if getattr(model, "_is_stateful", False):
        kinds.add("recurrent layers")
    if kinds - _LAYER_TYPES:
        return (
            f"it has {', '.join(sorted(kinds - _LAYER_TYPES))}; the store keeps the KV of models whose layers all are "
            "full_attention or sliding_attention"
        )
    ropes = set(_ropes(getattr(config, "rope_scaling", None))) | set(_ropes(getattr(config, "rope_parameters", None)))
    if ropes & _ROPES_BY_LENGTH:
        return (
            f"the KV of its tokens depends on the length of the whole sequence (rotary embeddings of the type "
            f"{', '.join(sorted(ropes & _ROPES_BY_LENGTH))})"
        )
    if (getattr(model, "tp_size", None) or 1) > 1:
        return "it is split over several processes (tp_plan); the store takes whole models"
    generation = getattr(model, "generation_config", None)
    implementation = getattr(generation, "cache_implementation", None)
    if implementation is not None:
        return (
            f"generate() would make a cache of its own (generation_config.cache_implementation is {implementation!r}), "
            "and refuse another; set model.generation_config.cache_implementation = None"
        )
    return ""


def _ropes(parameters: object) -> Iterator[str]:
    """Types of rotary embeddings, of the model or of each kind of layers."""
    if isinstance(parameters, dict):
        for name, value in parameters.items():
            if name in ("rope_type", "type") and isinstance(value, str):
                yield value
            else:
                yield from _ropes(value)


def _probe(model: Any) -> _Probe:
    """Have a model read a few tokens, twice, with another last one: what its cache has of them, and through what.

    Raises:
        InvalidArgument: it does not run like this, or its layers are not alike.
    """
    name = f"{type(model).__name__} cannot be used with the store:"
    try:
        first, other = _forward(model, 0), _forward(model, 1)
    except (TypeError, ValueError, AttributeError, IndexError, RuntimeError, NotImplementedError) as error:
        raise InvalidArgument(f"{name} it does not run on a DynamicCache: {error}") from error
    if not first.layers or not all(type(layer) is DynamicLayer and layer.get_seq_length() for layer in first.layers):
        raise InvalidArgument(f"{name} it does not keep keys and values of all its layers in a DynamicCache")
    if first.decoder is None:
        raise InvalidArgument(f"{name} its decoder does not take token ids and a cache")
    keys = first.layers[0].keys
    if keys.ndim != 4 or keys.shape[0] != 1 or keys.shape[2] != _PROBE_TOKENS:
        raise InvalidArgument(
            f"{name} expected keys [1, kv_heads, {_PROBE_TOKENS}, head_dim], got {list(keys.shape)} of that many tokens"
        )
    rounding = max(_LEAST_ROUNDING, _ROUNDINGS * torch.finfo(keys.dtype).eps if keys.dtype.is_floating_point else 0)
    for index, (layer, changed) in enumerate(zip(first.layers, other.layers, strict=True)):
        for kind, tensor, again in (("keys", layer.keys, changed.keys), ("values", layer.values, changed.values)):
            if tensor.shape != keys.shape or tensor.dtype != keys.dtype:
                raise InvalidArgument(
                    f"{name} the {kind} of layer {index} are {tensor.dtype} {list(tensor.shape)}, the keys of layer 0 "
                    f"{keys.dtype} {list(keys.shape)}; blocks have one number of heads and one head_dim for all"
                )
            if tensor.device != keys.device:
                raise InvalidArgument(
                    f"{name} its layers are on several devices ({keys.device}, {tensor.device}); load it onto one"
                )
            before, after = tensor[:, :, :-1].float(), again[:, :, :-1].float()
            if float((before - after).abs().max()) > rounding * float(before.abs().max()):
                raise InvalidArgument(
                    f"{name} its tokens attend to those behind them, so that a prefix has no KV of its own"
                )
    return first


def _forward(model: Any, last_token: int) -> _Probe:
    """What a model's cache has behind a few tokens, and the innermost module that was given them with the cache."""
    cache = DynamicCache()
    name = next((name for name in CACHE_NAMES if name in signature(model.forward).parameters), CACHE_NAMES[-1])
    candidates = [model, model.base_model]
    with suppress(AttributeError, NotImplementedError):
        candidates.append(model.get_decoder())
    reached: list[Any] = []

    def note(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        arguments = named_arguments(tuple(signature(module.forward).parameters), args, kwargs)
        if cache_in(arguments) is cache and arguments.get("input_ids") is not None:
            reached.append(module)

    hooks = [module.register_forward_pre_hook(note, with_kwargs=True) for module in dict.fromkeys(candidates)]
    tokens = torch.zeros(1, _PROBE_TOKENS, dtype=torch.long, device=model.device)
    tokens[0, -1] = last_token
    try:
        with torch.inference_mode():
            model(input_ids=tokens, use_cache=True, **{name: cache})
    finally:
        for hook in hooks:
            hook.remove()
    return _Probe(reached[-1] if reached else None, cache.layers)


# ------------------------------------------------------------------ names


def described(config: Any, given: str | None) -> str:
    """The model in the namespace: its name, and a digest of all that its configuration says.

    Weights of one revision give other KV where they are loaded with other settings (quantised, fewer layers, another
    rotary base), so name and revision alone would not tell them apart.

    Args:
        config: of the model.
        given: its name; None: the name or path that it was loaded by.

    Raises:
        InvalidArgument: no text.
    """
    if given is not None and (not isinstance(given, str) or not given):
        raise InvalidArgument(f"model_name must be text, got {given!r}")
    name = given or getattr(config, "_name_or_path", "") or type(config).__name__
    entries = {
        entry: value
        for entry, value in config.to_dict().items()
        if not entry.startswith("_") and entry not in _WITHOUT_EFFECT
    }
    text = json.dumps(entries, sort_keys=True, default=str)
    return f"{name} config:{sha256(text.encode()).hexdigest()[:16]}"


def known_revision(model: Any, given: str | None, *, refuse: bool) -> str:
    """The revision of a model's weights: as given, or the commit that they were loaded from, "" where nobody knows.

    Args:
        model: a model of transformers.
        given: what the user says.
        refuse: not to know it is an error.

    Raises:
        InvalidArgument: it is not known, or there are adapters, whose weights no commit covers.
    """
    if given is not None:
        if not isinstance(given, str) or not given:
            raise InvalidArgument(f"revision must be text, got {given!r}")
        return given
    own = _unwrapped(model)
    if any(type(module).__module__.partition(".")[0] == "peft" for module in own.modules()):
        raise InvalidArgument(
            "the model has adapters, which change its KV: name model and adapter in revision=, or take "
            "revision=weights_digest(model)"
        )
    revision = getattr(own.config, "_commit_hash", None) or ""
    if refuse and not revision:
        raise InvalidArgument(
            "nobody knows the revision of the model's weights (they were not loaded from a hub): set revision= to a "
            "name that changes with them, or to weights_digest(model); unknown_revision='warn' goes on without"
        )
    return revision


def weights_digest(model: Any) -> str:
    """A revision for weights that have no commit: a digest of all parameters and buffers of a model.

    Args:
        model: a ``torch.nn.Module``; its weights are read once (about a second a gigabyte), those on a device through
            host memory, one at a time.

    Returns:
        ``"sha256:..."``, the same wherever the weights are and whatever their order in memory.

    Raises:
        InvalidArgument: weights that are not loaded (on the device ``meta``).
    """
    digest = sha256()
    for name, tensor in sorted({**dict(model.named_parameters()), **dict(model.named_buffers())}.items()):
        if tensor.device.type == "meta":
            raise InvalidArgument(
                f"the weights {name} are not loaded (device meta): there is nothing to take a digest of"
            )
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        plain = tensor.detach().to("cpu").contiguous()
        digest.update(plain.reshape(-1).view(torch.uint8).numpy().data if plain.numel() else b"")
    return f"sha256:{digest.hexdigest()}"
