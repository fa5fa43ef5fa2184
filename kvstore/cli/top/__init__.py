"""``kvstore top``: what a daemon holds and does, live.

Covers: polling, rates, the terminal view. Does not cover a single look in full, see ``kvstore.cli.stats``.
"""
