"""Layouts of the files that daemon and clients share in memory. Pure functions; ``docs/mapped-files.md``."""
