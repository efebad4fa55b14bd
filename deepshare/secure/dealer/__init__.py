"""The dealer of the secure engine: makes both parties' material (docs/engine.md). No party's process imports it."""
