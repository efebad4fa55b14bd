"""The papers' numbers from one command: recipes, seeds, what they need first, results (docs/reproduce.md)."""

from deepshare.reproduce.call import Reproduction, reproduce
from deepshare.reproduce.errors import ReproduceError
from deepshare.reproduce.outcome import Outcome
from deepshare.reproduce.result import Result, SiteAffine, read_result, read_results
from deepshare.reproduce.statistics import Statistics, statistics
from deepshare.reproduce.table import Standing, end_table, listing, standing

__all__ = [
    "Outcome",
    "ReproduceError",
    "Reproduction",
    "Result",
    "SiteAffine",
    "Standing",
    "Statistics",
    "end_table",
    "listing",
    "read_result",
    "read_results",
    "reproduce",
    "standing",
    "statistics",
]
