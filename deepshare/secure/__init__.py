"""Private inference of shared-gate networks: shares in Z_2^64, exact costs (docs/secure.md)."""

from deepshare.secure.errors import SecureError
from deepshare.secure.report import SecureReport, SiteCost
from deepshare.secure.session import run, run_model

__all__ = ["SecureError", "SecureReport", "SiteCost", "run", "run_model"]
