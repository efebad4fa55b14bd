"""What trains many networks to compare them: above `train`, which trains one (docs/design.md, section 11)."""
