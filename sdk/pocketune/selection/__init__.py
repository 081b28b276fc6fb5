"""The search for blocks that a model can go without; what it finds is a `pocketune.plan.selection.Selection`."""

from pocketune.selection.search import Personalized, select_blocks

__all__ = ["Personalized", "select_blocks"]
