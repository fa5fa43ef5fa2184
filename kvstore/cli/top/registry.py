"""All panels: those that are always above, and those below in the order of their numbers."""

from __future__ import annotations

from typing import Final

from kvstore.cli.top.panel import Panel
from kvstore.cli.top.panels.clients import CLIENTS
from kvstore.cli.top.panels.curve import CURVE
from kvstore.cli.top.panels.hits import HITS
from kvstore.cli.top.panels.loading import LOADING
from kvstore.cli.top.panels.misses import MISSES
from kvstore.cli.top.panels.namespaces import NAMESPACES
from kvstore.cli.top.panels.policy import POLICY
from kvstore.cli.top.panels.retention import RETENTION
from kvstore.cli.top.panels.ssd import SSD
from kvstore.cli.top.panels.tiers import TIERS
from kvstore.cli.top.panels.traffic import TRAFFIC

__all__ = ["ABOVE", "DECK", "PANELS"]

ABOVE: Final = (HITS, TRAFFIC, TIERS)
DECK: Final = (MISSES, POLICY, CLIENTS, NAMESPACES, SSD, LOADING, RETENTION, CURVE)
PANELS: Final[dict[str, Panel]] = {panel.name: panel for panel in (*ABOVE, *DECK)}
