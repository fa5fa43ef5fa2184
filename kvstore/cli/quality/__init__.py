"""``kvstore quality``: what codecs cost in the quality of a small trained model, see ``docs/quality.md``.

Importing this package loads neither numpy nor torch: ``kvstore.cli.quality.measured`` reads committed results with
neither of them.
"""
