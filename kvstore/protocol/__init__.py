"""What client and daemon must agree on: keys, namespaces, messages, framing, version and limits.

No I/O, no clock, no randomness. The normative text is ``docs/protocol.md``.
"""
