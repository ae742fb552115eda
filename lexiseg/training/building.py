"""From a recipe to the model it trains, with what it starts from in place."""

from __future__ import annotations

import torch

from lexiseg.clip.load import load_clip
from lexiseg.clip.model import CLIP
from lexiseg.errors import LexisegError
from lexiseg.models import SYSTEMS
from lexiseg.models.base import ModelOptions, SegmentationModel
from lexiseg.models.decoupled import DecoupledModel
from lexiseg.models.region_base import RegionModel
from lexiseg.proposals.pretrained import IMAGENET, WEIGHT_FILES
from lexiseg.recipes import SegmentationRecipe
from lexiseg.training.initial import start_from, take_prompts, take_proposals
from lexiseg.training.labels import masked_names, training_vocabulary
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
        LexisegError: the system, an option, the CLIP or what it starts from is not there or does not fit; the training
            builds on proposals and no recipe or model says where trained ones come from, or it adds MAFT and tunes
            nothing.
    """
    system, options = system_of(recipe)
    seen = masked_names(training_vocabulary(vocabulary, setting=recipe.setting))
    if clip is not None:
        model = system(clip, options, seen).set_trainable()
        _refuse_untrained_proposals(model, recipe)
        return model
    if recipe.initial is None:
        model = system(load_clip(recipe.model.clip), options, seen)
        if recipe.proposals_from is not None:
            take_proposals(model, recipe.proposals_from, vocabulary)
    else:
        # It brings its proposals; a recipe cannot name both.
        model = start_from(recipe.initial, system, options, seen, vocabulary, steps=recipe.initial_steps)
    if recipe.prompts_from is not None:
        take_prompts(model, recipe.prompts_from, vocabulary)
    model.set_trainable()
    _refuse_untrained_proposals(model, recipe)
    _refuse_untuned_tower(model, recipe)
    model.metadata |= {
        "description": recipe.description,
        "data": recipe.data.model_dump(mode="json"),
        "setting": recipe.setting,
        "steps": recipe.train.steps,
        "batch_size": recipe.train.batch_size * recipe.train.accumulate,
        "seed": recipe.train.seed,
    }
    return model


def _refuse_untrained_proposals(model: SegmentationModel, recipe: SegmentationRecipe) -> None:
    """See that a stage that leaves the proposals as they are (MAFT, DeOP's last one) has trained ones.

    On random masks it would run for days, its loss would fall, and nothing would be learned.
    """
    source = recipe.proposals_from
    # ImageNet weights, and a file of them, fill the backbone alone; a whole model brings its masks.
    masks = recipe.initial is not None or not (source in (None, IMAGENET) or str(source).endswith(WEIGHT_FILES))
    if masks or not isinstance(model, DecoupledModel) or model.generator.trainable:
        return
    if any(True for _ in model.generator.parameters()):
        raise LexisegError(
            f"This training of '{recipe.model.system}' builds on proposals that it does not train itself, and they "
            "have random weights; let 'initial' name a model or a recipe that trains them, as the packaged recipes "
            "with 'maft' or 'deop' in their names do."
        )


def _refuse_untuned_tower(model: SegmentationModel, recipe: SegmentationRecipe) -> None:
    """See that a recipe of 0 steps with MAFT has a tuned tower from somewhere."""
    if recipe.train.steps or not isinstance(model, RegionModel) or model.student is None:
        return
    plain = model.clip.visual.state_dict()
    if all(torch.equal(value, plain[name]) for name, value in model.student.state_dict().items()):
        raise LexisegError(
            "The recipe adds 'maft', but 'train.steps' is 0 and what it starts from has no tuned tower, so that "
            "nothing would be tuned; set train.steps, as the packaged recipes with 'maft' in their names do."
        )
