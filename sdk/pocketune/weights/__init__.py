"""Frozen weights on disk: memory-mapped, packed to few bits, and read only while they are used."""
