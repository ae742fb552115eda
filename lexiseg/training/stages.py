"""Trainings that come before a training: what `initial`, `prompts_from` and `teacher` name when they name recipes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from lexiseg.errors import LexisegError
from lexiseg.training.recipe import (
    ContrastiveRecipe,
    Data,
    PictureWorldData,
    PromptRecipe,
    Recipe,
    SegmentationRecipe,
    list_recipes,
    load_recipe,
)
from lexiseg.training.recipe_schema import AUGMENTATION

_Stage = TypeVar("_Stage", SegmentationRecipe, PromptRecipe)


def is_recipe(name: str | None) -> bool:
    """Whether ``name`` is a recipe of the package, or a YAML file, and no folder of a trained model."""
    if name is None:
        return False
    file = name.rpartition(":")[0] or name
    return name in list_recipes() or any(
        path.endswith((".yaml", ".yml")) and Path(path).is_file() for path in (name, file)
    )


def with_stages(recipe: Recipe, run_dir: Path, train: Callable[..., Path]) -> Recipe:
    """Train the recipes that another one builds on, in folders in its own, and name their models instead.

    Args:
        recipe: whose keys ``initial``, ``prompts_from`` and ``teacher`` may name recipes.
        run_dir: its folder; theirs are ``initial``, ``prompts`` and ``teacher`` in it.
        train: trains a recipe in a folder and gives the folder of the model; takes ``until``. A finished run that is
            resumed only exports again.
    """
    if isinstance(recipe, ContrastiveRecipe) and recipe.model.initial in list_recipes():
        model = train(load_recipe(recipe.model.initial, seed=recipe.train.seed), run_dir / "initial")
        return recipe.model_copy(update={"model": recipe.model.model_copy(update={"initial": str(model)})})
    if not isinstance(recipe, SegmentationRecipe):
        return recipe
    found: dict[str, Any] = {}
    if is_recipe(recipe.initial):
        found["initial"] = train(first_stage(recipe), run_dir / "initial", until=recipe.initial_steps)
    if is_recipe(recipe.prompts_from):
        found["prompts_from"] = train(prompt_stage(recipe), run_dir / "prompts")
    if is_recipe(recipe.teacher):
        found["teacher"] = train(_stage(recipe, "teacher", SegmentationRecipe), run_dir / "teacher")
    return recipe.model_copy(update={key: str(folder) for key, folder in found.items()})


def first_stage(recipe: SegmentationRecipe) -> SegmentationRecipe:
    """The recipe that ``recipe.initial`` names, on the data and the CLIP of ``recipe`` and with its seed.

    How pictures are cropped and augmented stays the stage's own: the decoupled papers' stages differ in that.

    Raises:
        LexisegError: it trains no segmentation system, or for fewer steps than ``initial_steps``.
    """
    first = _stage(recipe, "initial", SegmentationRecipe)
    if recipe.initial_steps is not None and recipe.initial_steps > first.train.steps:
        raise LexisegError(
            f"'initial_steps' is {recipe.initial_steps}, but '{recipe.initial}' has only {first.train.steps} steps."
        )
    return first


def prompt_stage(recipe: SegmentationRecipe) -> PromptRecipe:
    """The recipe that ``recipe.prompts_from`` names, likewise. It learns from all classes if ``recipe`` does.

    Raises:
        LexisegError: it learns no prompts.
    """
    first = _stage(recipe, "prompts_from", PromptRecipe)
    return first.model_copy(update={"setting": "supervised" if recipe.setting == "supervised" else "inductive"})


def _stage(recipe: SegmentationRecipe, key: str, kind: type[_Stage]) -> _Stage:
    name = str(getattr(recipe, key))
    stage = load_recipe(name, seed=recipe.train.seed)
    if not isinstance(stage, kind):
        what = "trains no segmentation system" if kind is SegmentationRecipe else "learns no text prompts"
        raise LexisegError(f"'{key}' names '{name}', which {what}; name one that does.")
    model = stage.model.model_copy(update={"clip": recipe.model.clip})
    return stage.model_copy(update={"data": _same_pictures(stage.data, recipe.data), "model": model})


def _same_pictures(stage: Data, data: Data) -> Data:
    """The pictures of ``data``, augmented as ``stage`` says."""
    if isinstance(stage, PictureWorldData) or isinstance(data, PictureWorldData):
        return data
    return data.model_copy(update={key: getattr(stage, key) for key in AUGMENTATION})
