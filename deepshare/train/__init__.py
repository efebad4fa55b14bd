"""Training: recipes, the papers' phases with distillation, and runs that resume exactly (docs/training.md)."""

from deepshare.train.artifacts import ArtifactStore
from deepshare.train.errors import ArtifactError, RecipeError, TrainingError, TrainingPaused
from deepshare.train.recipe import Recipe
from deepshare.train.recipe_file import load_recipe, recipe_names
from deepshare.train.trainer import TrainResult, train

__all__ = [
    "ArtifactError",
    "ArtifactStore",
    "Recipe",
    "RecipeError",
    "TrainResult",
    "TrainingError",
    "TrainingPaused",
    "load_recipe",
    "recipe_names",
    "train",
]
