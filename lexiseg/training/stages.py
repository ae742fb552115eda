"""Trainings that come before a training: of the recipes that keys such as `initial` and `proposals_from` name."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch

from lexiseg.clip.load import load_clip
from lexiseg.clip.model import CLIP
from lexiseg.errors import LexisegError
from lexiseg.models.base import ModelOptions
from lexiseg.models.decoupled import DecoupledOptions
from lexiseg.models.deop import DeOPOptions
from lexiseg.models.one_stage import OneStageOptions
from lexiseg.models.region_base import RegionModelOptions
from lexiseg.proposals.options import QueryOptions
from lexiseg.recipes import (
    ContrastiveRecipe,
    Data,
    PictureWorldData,
    PromptRecipe,
    Recipe,
    SegmentationRecipe,
    list_recipes,
    load_recipe,
)
from lexiseg.recipes.data import AUGMENTATION
from lexiseg.training.building import system_of
from lexiseg.training.initial import NO_WEIGHTS

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
        recipe: whose keys ``initial``, ``proposals_from``, ``prompts_from`` and ``teacher`` may name recipes.
        run_dir: its folder; theirs are ``initial``, ``proposals``, ``prompts`` and ``teacher`` in it.
        train: trains a recipe in a folder and gives the folder of the model; takes ``until``. A finished run that is
            resumed only exports again.

    Raises:
        LexisegError: a key names a recipe that cannot come before this one; nothing is trained then.
    """
    if isinstance(recipe, ContrastiveRecipe) and recipe.model.initial in list_recipes():
        model = train(load_recipe(recipe.model.initial, seed=recipe.train.seed), run_dir / "initial")
        return recipe.model_copy(update={"model": recipe.model.model_copy(update={"initial": str(model)})})
    if not isinstance(recipe, SegmentationRecipe):
        return recipe
    found: dict[str, Any] = {}
    if is_recipe(recipe.initial):
        first = first_stage(recipe)
        refuse_misfit(first, recipe)
        found["initial"] = train(first, run_dir / "initial", until=recipe.initial_steps)
    if is_recipe(recipe.proposals_from):
        # On its own pictures, which need not have classes.
        shapes = load_recipe(str(recipe.proposals_from), {"model.clip": recipe.model.clip}, seed=recipe.train.seed)
        found["proposals_from"] = train(shapes, run_dir / "proposals")
    if is_recipe(recipe.prompts_from):
        found["prompts_from"] = train(prompt_stage(recipe), run_dir / "prompts")
    if is_recipe(recipe.teacher):
        found["teacher"] = train(_stage(recipe, "teacher", SegmentationRecipe), run_dir / "teacher")
    return recipe.model_copy(update={key: str(folder) for key, folder in found.items()})


def first_stage(recipe: SegmentationRecipe) -> SegmentationRecipe:
    """The recipe that ``recipe.initial`` names, on the data and the CLIP of ``recipe`` and with its seed.

    How pictures are cropped and augmented stays the stage's own: the decoupled papers' stages differ in that. Options
    that weights depend on are those of ``recipe``: between one-stage systems their ``weights_depend_on``, between
    decoupled ones how the proposals are built.

    Raises:
        LexisegError: it trains no segmentation system, one whose weights do not fit, or for fewer steps than
            ``initial_steps``.
    """
    first = _stage(recipe, "initial", SegmentationRecipe)
    if recipe.initial_steps is not None and recipe.initial_steps > first.train.steps:
        raise LexisegError(
            f"'initial_steps' is {recipe.initial_steps}, but '{recipe.initial}' has only {first.train.steps} steps."
        )
    options = first.model.options | _carried(first, recipe)
    return first.model_copy(update={"model": first.model.model_copy(update={"options": options})})


def _carried(first: SegmentationRecipe, recipe: SegmentationRecipe) -> dict[str, Any]:
    """The options that the first stage must get, as far as it does not have them by itself."""
    (_, own), (_, wanted) = system_of(first), system_of(recipe)
    before, after = own.model_dump(mode="json"), wanted.model_dump(mode="json")
    if isinstance(own, OneStageOptions) and isinstance(wanted, OneStageOptions):
        names = sorted(own.weights_depend_on & wanted.weights_depend_on)
        return {name: after[name] for name in names if before[name] != after[name]}
    if not isinstance(own, DecoupledOptions) or not isinstance(wanted, DecoupledOptions):
        return {}
    # SAM is not trained, so whoever has it takes no proposals over, and only the rest has to fit.
    if not isinstance(own.proposals, QueryOptions) or not isinstance(wanted.proposals, QueryOptions):
        return {}
    before, after = before["proposals"], after["proposals"]
    if before["kind"] != after["kind"]:
        raise LexisegError(
            f"'{recipe.initial}' trains proposals of the kind '{before['kind']}', and the recipe's are of the kind "
            f"'{after['kind']}'; give both the same."
        )
    changes = {name: after[name] for name in after if name not in NO_WEIGHTS and before[name] != after[name]}
    said = first.model.options.get("proposals") or {"kind": after["kind"]}
    return {"proposals": {**said, **changes}} if changes else {}


def refuse_misfit(first: SegmentationRecipe, recipe: SegmentationRecipe, clip: CLIP | None = None) -> None:
    """See, before the first stage is trained, that a model of it has the tensors that the recipe's model starts from.

    Args:
        first: see `first_stage`.
        recipe: whose ``initial`` it is.
        clip: the towers of both; None loads them.

    Raises:
        LexisegError: it has not, or one of the two cannot be built.
    """
    (before, own), (after, wanted) = system_of(first), system_of(recipe)
    if isinstance(own, DecoupledOptions) and isinstance(wanted, DecoupledOptions):
        return  # these take over what fits, and `first_stage` has seen to the proposals
    if isinstance(own, OneStageOptions) and isinstance(wanted, OneStageOptions):
        clip = clip or load_clip(recipe.model.clip)
        # Shapes are all that is asked for, and torch warns of the values that are lost.
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            states = [system(clip, options).state_dict() for system, options in ((before, own), (after, wanted))]
        there, here = ({name: tuple(value.shape) for name, value in state.items()} for state in states)
        if there == here:
            return
        if before is after:
            name = next(name for name in (*here, *there) if here.get(name) != there.get(name))
            raise LexisegError(
                f"The model of '{recipe.initial}' does not fit: {name} is {there.get(name, 'missing')} in it and "
                f"{here.get(name, 'missing')} in the recipe's; give both the same options."
            )
    raise LexisegError(
        f"'{recipe.initial}' trains the system '{before.system}', but the recipe trains '{after.system}'; name a "
        "recipe of that system."
    )


def prompt_stage(recipe: SegmentationRecipe) -> PromptRecipe:
    """The recipe that ``recipe.prompts_from`` names, likewise. It learns from all classes if ``recipe`` does.

    There are as many vectors as the recipe's model has places for.

    Raises:
        LexisegError: it learns no prompts, or the recipe's model has no learned ones.
    """
    first = _stage(recipe, "prompts_from", PromptRecipe)
    system, options = system_of(recipe)
    places = _places(options)
    if places is None:
        raise LexisegError(
            f"'prompts_from' is '{recipe.prompts_from}', but this {system.system} has no learned prompts; set its "
            "options to have some, or leave the key out."
        )
    return first.model_copy(
        update={
            "setting": "supervised" if recipe.setting == "supervised" else "inductive",
            "model": first.model.model_copy(update=places),
        }
    )


def _places(options: ModelOptions) -> dict[str, int] | None:
    """How many vectors a model's learned prompts have; None where it has none."""
    if isinstance(options, DeOPOptions) and options.text_prompts != "templates":
        return {"prefix": options.prompt_prefix, "suffix": options.prompt_suffix, "task": 0}
    prompts = options.prompts if isinstance(options, RegionModelOptions) else None
    return None if prompts is None else {"prefix": prompts.prefix, "suffix": prompts.suffix, "task": prompts.task}


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
