"""kvstore: a sidecar daemon for the KV cache of LLM inference engines.

This package imports nothing, so that ``import kvstore`` costs nothing inside an engine.
"""

__version__ = "0.1.0"
