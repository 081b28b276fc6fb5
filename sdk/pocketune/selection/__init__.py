"""The search for blocks that a model can go without; what it finds is a `pocketune.plan.selection.Selection`."""

from pocketune.selection.search import Judge, Personalized, select_blocks

__all__ = ["Judge", "Personalized", "select_blocks"]
