"""Eviction policies on recorded traces, without bytes: the daemon's own policies, called as the daemon calls them."""
