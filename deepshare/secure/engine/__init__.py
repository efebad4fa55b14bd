"""A party of the secure engine: what it computes on its shares (docs/engine.md). Imports nothing of the dealer."""
