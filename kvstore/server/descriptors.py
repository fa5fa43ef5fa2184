"""Open files: enough of them before the daemon serves, because libzmq ends the process where accepting runs out."""

from __future__ import annotations

import resource
from typing import Final

from kvstore.errors import SettingsError

_A_SESSION: Final = 2
"""A connection and a session file."""

_OWN: Final = 128
"""The arena, sockets of HTTP, pipes of libraries, and connections that come before others are gone."""


def reserve_descriptors(max_sessions: int) -> None:
    """Raise this process's limit of open files as far as it may.

    Raises:
        SettingsError: it may not have as many as the sessions need.
    """
    need = _A_SESSION * max_sessions + _OWN
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < need:
        raise SettingsError(
            f"limits.max_sessions = {max_sessions} needs {need} open files, this process may have {hard}; lower it, or "
            "raise the limit (ulimit -Hn, LimitNOFILE= of systemd, --ulimit nofile= of docker)"
        )
    if soft == resource.RLIM_INFINITY or soft == hard:
        return
    wanted = hard if hard != resource.RLIM_INFINITY else max(need, 1 << 16)
    if soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
