"""Decisions only: which block leaves next. One algorithm a file, one small interface, a registry."""
