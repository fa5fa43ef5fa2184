"""The panels of ``kvstore top``, one a file."""
