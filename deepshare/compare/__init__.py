"""Methods side by side at equal DReLU count: one table and one picture of accuracy over DReLUs (docs/compare.md)."""

from deepshare.compare.cells import Cell, cells
from deepshare.compare.recipe import CompareError, CompareRecipe, compare_recipe_names, load_compare_recipe
from deepshare.compare.run import Result, compare

__all__ = [
    "Cell",
    "CompareError",
    "CompareRecipe",
    "Result",
    "cells",
    "compare",
    "compare_recipe_names",
    "load_compare_recipe",
]
