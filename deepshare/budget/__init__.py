"""Budgets: which plan a number of DReLUs becomes."""

from deepshare.budget.allocate import Allocation, Weights, allocate
from deepshare.budget.errors import BudgetError
from deepshare.budget.published import PublishedList, published, published_labels, weights_of

__all__ = [
    "Allocation",
    "BudgetError",
    "PublishedList",
    "Weights",
    "allocate",
    "published",
    "published_labels",
    "weights_of",
]
