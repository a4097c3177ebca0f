"""The mechanism: hooks, cache layers, attention routing, reports. It knows no method and no model family."""

from ..errors import UnsupportedError
from .report import PruneReport
from .session import Pruned, prune, restore

__all__ = ["PruneReport", "Pruned", "UnsupportedError", "prune", "restore"]
