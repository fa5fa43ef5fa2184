"""An L2 store of chunks by key, without an engine: what ``lmcache`` is made of.

``settings``: what a user configures. ``keys``: an object's key as a block key, and which chunk comes before which.
``places``: in which namespace an object of a layout lies, and how. ``sessions``: connections to the daemon, and whether
it is there. ``locks``: leases by key. ``lookups``, ``transfers``: the work itself. ``workers``: threads and results.
"""
