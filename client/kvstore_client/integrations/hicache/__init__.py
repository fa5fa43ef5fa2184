"""Parts of the SGLang HiCache backend that need no SGLang.

``settings``: what a user configures. ``identity``: namespaces and parts. ``host_pools``: a host pool's pages as the
kernels see them, or as bytes. ``page_stores``: pages into the store and out of it. ``stores``: the stores of one
backend, and whether there is a daemon. ``pool_hits``: which prefixes the pools of a hybrid model can serve. ``keys``:
page hashes as keys.
"""
