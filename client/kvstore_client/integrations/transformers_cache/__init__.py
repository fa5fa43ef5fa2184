"""What ``kvstore_client.integrations.transformers`` is made of.

``model``: which models there are blocks for, and their names. ``tokens``: which tokens the KV of a cache is of.
``states``: tensors of a cache as pages of blocks. ``link``: a daemon that may be away.
"""
