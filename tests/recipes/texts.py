"""The recipes in the package: their files as they are written, and those that train a segmentation system."""

from __future__ import annotations

from pathlib import Path

from lexiseg import recipes
from lexiseg.recipes import SegmentationRecipe, load_recipe


def recipe_text(name: str) -> str:
    """The text of the file that a packaged recipe is in; its variant may be named."""
    folder = Path(recipes.__file__).parent
    return next(folder.rglob(f"{name.partition(':')[0]}.yaml")).read_text("utf-8")


def recipe_of(name: str | Path) -> SegmentationRecipe:
    """A recipe that trains a segmentation system."""
    recipe = load_recipe(name)
    assert isinstance(recipe, SegmentationRecipe)
    return recipe
