"""A cache tier whose blocks are rows of one host buffer, without an engine: what ``vllm_tier`` is made of.

``settings``: what a user configures. ``keys``: an engine's keys as block keys, and which block comes before which.
``rows``: rows into the store and out of it. ``link``: whether there is a store now. ``jobs``: transfers on threads of
their own. ``lookups``: answers that do not wait. ``leases``: what was promised stays. ``counters``: what happened.
"""
