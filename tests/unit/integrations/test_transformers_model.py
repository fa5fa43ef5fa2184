"""Names of models, and reports of several tries."""

from __future__ import annotations

from importlib.util import find_spec

import pytest

if find_spec("torch") is None or find_spec("transformers") is None:
    pytest.skip("torch and transformers are not installed (the extra 'transformers')", allow_module_level=True)

from tiny_models import COMMON, transformers

from kvstore.errors import InvalidArgument
from kvstore.protocol.messages import PutStatus
from kvstore_client.integrations import transformers as integration
from kvstore_client.integrations.transformers_cache.model import described
from kvstore_client.tensors import SaveReport

STORED, EXISTS, THROTTLED, REJECTED = PutStatus.STORED, PutStatus.EXISTS, PutStatus.THROTTLED, PutStatus.REJECTED


def name_of(given: str | None = "model", **options: object) -> str:
    return described(transformers.LlamaConfig(**{**COMMON, **options}), given)


def test_a_name_has_all_that_changes_kv() -> None:
    changes: list[dict[str, object]] = [
        {},
        {"num_hidden_layers": 2},
        {"rms_norm_eps": 1e-3},
        {"rope_theta": 20000.0},
        {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}},
    ]
    assert len({name_of(**change) for change in changes}) == len(changes)
    assert name_of() == name_of()
    assert name_of().startswith("model config:")


def test_a_name_has_nothing_that_does_not() -> None:
    config = transformers.LlamaConfig(**COMMON)
    config.use_cache = False
    config.architectures = ["Another"]
    config._commit_hash = "0123"
    config._attn_implementation = "eager"
    assert described(config, "model") == name_of()


def test_a_model_without_a_name_has_that_of_its_configuration() -> None:
    assert name_of(None).startswith("LlamaConfig config:")
    config = transformers.LlamaConfig(**COMMON)
    config._name_or_path = "org/model"
    assert described(config, None).startswith("org/model config:")
    with pytest.raises(InvalidArgument, match="model_name must be text"):
        name_of("")


@pytest.mark.parametrize(
    ("statuses", "settled"),
    [
        ((), 0),
        ((STORED, EXISTS), 2),
        ((STORED, THROTTLED, STORED), 1),
        ((THROTTLED,), 0),
        ((STORED, REJECTED, REJECTED), 3),
    ],
)
def test_blocks_are_settled_up_to_the_first_that_was_throttled(statuses: tuple[PutStatus, ...], settled: int) -> None:
    assert integration._settled(SaveReport(statuses)) == settled


def test_two_tries_are_one_report() -> None:
    first = SaveReport((STORED, THROTTLED, STORED, THROTTLED), {1: "full", 3: "full"}, (0,), 20, 10)
    second = SaveReport((STORED, EXISTS, REJECTED), {2: "too_large"}, (1,), 10, 5)
    assert integration._joined(first, second, 1) == SaveReport(
        (STORED, STORED, STORED, REJECTED), {3: "too_large"}, (0, 2), 30, 15
    )
