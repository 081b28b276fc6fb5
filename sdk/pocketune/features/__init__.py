"""Cached residual features of the blocks that training skips."""
