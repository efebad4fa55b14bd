"""The yardstick: the same networks on CrypTen's own operations (docs/baseline.md)."""

from deepshare.secure.baseline.session import run, run_model

__all__ = ["run", "run_model"]
