"""Recipes: a training, or an evaluation, as a YAML file that is checked before anything is loaded.

Training and evaluation both read them, so they lie below both. The files beside this one come with the package.
"""

from lexiseg.recipes.data import CatalogData, PictureWorldData
from lexiseg.recipes.reading import as_yaml, describe_recipes, is_recipe, list_recipes, load_recipe, parse_recipe
from lexiseg.recipes.schema import (
    ContrastiveRecipe,
    EvaluationRecipe,
    PromptRecipe,
    Recipe,
    SegmentationRecipe,
    TrainSettings,
)

__all__ = [
    "CatalogData",
    "ContrastiveRecipe",
    "EvaluationRecipe",
    "PictureWorldData",
    "PromptRecipe",
    "Recipe",
    "SegmentationRecipe",
    "TrainSettings",
    "as_yaml",
    "describe_recipes",
    "is_recipe",
    "list_recipes",
    "load_recipe",
    "parse_recipe",
]
