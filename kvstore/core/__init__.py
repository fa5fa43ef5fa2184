"""The store's state as a machine without I/O: events in, instructions out; clock and randomness are arguments."""
