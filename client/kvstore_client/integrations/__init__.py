"""Engines' own plug-in points, each in a module that is imported by name; this package imports none of them.

``vllm``: a KV connector. ``vllm_tier``: a secondary tier of vLLM's native offloading. ``sglang``: a HiCache storage
backend. ``lmcache``: an L2 adapter. ``transformers``: a ``Cache``. What is wrong with an engine's version is said by
``UnsupportedEngine`` when the module is imported.
"""
