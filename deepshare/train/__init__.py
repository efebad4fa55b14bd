"""Training: recipes, the papers' phases with distillation, and runs that resume exactly (docs/training.md)."""

from deepshare.train.errors import RecipeError, TrainingError
from deepshare.train.recipe import Recipe
from deepshare.train.recipe_file import load_recipe, recipe_names
from deepshare.train.trainer import TrainResult, train

__all__ = ["Recipe", "RecipeError", "TrainResult", "TrainingError", "load_recipe", "recipe_names", "train"]
