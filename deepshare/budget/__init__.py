"""Budgets: which plan a number of DReLUs becomes."""

from deepshare.budget.allocate import Allocation, BudgetError, allocate

__all__ = ["Allocation", "BudgetError", "allocate"]
