"""skipmega pre-trains language models whose layers are skipped per token."""

__version__ = "0.1.0"
