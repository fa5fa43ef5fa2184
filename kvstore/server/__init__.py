"""The daemon: sockets, executing the store's instructions, client sessions, overload."""
