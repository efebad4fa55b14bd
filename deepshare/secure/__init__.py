"""Two-party inference of shared-gate networks: shares in Z_2^64, CrypTen's protocols, exact costs (docs/secure.md)."""

from deepshare.secure.baseline.session import run, run_model
from deepshare.secure.errors import SecureError
from deepshare.secure.report import SecureReport, SiteCost

__all__ = ["SecureError", "SecureReport", "SiteCost", "run", "run_model"]
