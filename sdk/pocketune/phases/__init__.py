"""The phases of a personalization. Each loads what it needs, and what it loaded is gone when the next begins."""
