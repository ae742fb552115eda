"""From a recipe to the model it trains, with what it starts from in place."""

from __future__ import annotations

from lexiseg.clip import CLIP, load_clip
from lexiseg.errors import LexisegError
from lexiseg.models import SYSTEMS
from lexiseg.models.base import ModelOptions, SegmentationModel
from lexiseg.training.initial import start_from, take_prompts
from lexiseg.training.labels import masked_names, training_vocabulary
from lexiseg.training.recipe import SegmentationRecipe
from lexiseg.vocabulary import Vocabulary


def system_of(recipe: SegmentationRecipe) -> tuple[type[SegmentationModel], ModelOptions]:
    """The system a recipe trains and its options.

    A model trained transductively takes nothing off the scores of seen classes unless the recipe says so.

    Raises:
        LexisegError: there is no such system, or an option is unknown or wrong.
    """
    system = SYSTEMS.get(recipe.model.system)
    if system is None:
        raise LexisegError(f"There is no system '{recipe.model.system}' to train; there are {', '.join(SYSTEMS)}.")
    options = dict(recipe.model.options)
    if recipe.setting == "transductive" and "seen_offset" in system.options_class.model_fields:
        options.setdefault("seen_offset", 0.0)
    return system, system.parse_options(options)


def build_model(recipe: SegmentationRecipe, vocabulary: Vocabulary, *, clip: CLIP | None = None) -> SegmentationModel:
    """Build the model of a recipe; its random weights depend on the generator's state.

    Args:
        recipe: ``initial`` and ``prompts_from`` are folders or models, no recipes.
        vocabulary: of the data.
        clip: the towers, in place of those the recipe names; it then starts from nothing else.

    Returns:
        the model, with exactly those parameters requiring gradients that are trained.

    Raises:
        LexisegError: the system, an option, the CLIP or what it starts from is not there or does not fit.
    """
    system, options = system_of(recipe)
    seen = masked_names(training_vocabulary(vocabulary, setting=recipe.setting))
    if clip is not None:
        return system(clip, options, seen).set_trainable()
    if recipe.initial is None:
        model = system(load_clip(recipe.model.clip), options, seen)
    else:
        model = start_from(recipe.initial, system, options, seen, vocabulary, steps=recipe.initial_steps)
    if recipe.prompts_from is not None:
        take_prompts(model, recipe.prompts_from, vocabulary)
    model.set_trainable()
    model.metadata |= {
        "description": recipe.description,
        "data": recipe.data.model_dump(mode="json"),
        "setting": recipe.setting,
        "steps": recipe.train.steps,
        "batch_size": recipe.train.batch_size * recipe.train.accumulate,
        "seed": recipe.train.seed,
    }
    return model
