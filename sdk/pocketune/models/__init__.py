"""Diffusers models seen as ordered lists of blocks."""
