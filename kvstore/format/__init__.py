"""The bytes of a record, as pure functions. One page of documentation a format: ``docs/record.md``."""
