"""What daemon and clients share in memory: layouts, and compiled functions over them. ``docs/mapped.md``."""
