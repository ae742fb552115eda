"""From a recipe to the model it trains, initialised from another model, which is trained first if a recipe names it."""

import logging
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import torch

from lexiseg.clip.load import check_state, load_clip, random_clip, shapes_of
from lexiseg.clip.model import CLIP
from lexiseg.errors import LexisegError
from lexiseg.models import SYSTEMS
from lexiseg.models.base import SegmentationModel
from lexiseg.models.decoupled import DecoupledModel
from lexiseg.models.options import ModelOptions
from lexiseg.proposals.base import ProposalGenerator
from lexiseg.recipes import (
    ContrastiveRecipe,
    PictureWorldData,
    PromptRecipe,
    Recipe,
    SegmentationRecipe,
    is_recipe,
    load_recipe,
)
from lexiseg.recipes.data import AUGMENTATION
from lexiseg.recipes.schema import is_resnet
from lexiseg.training.prompts import read_prompts
from lexiseg.training.proposals import proposals_start
from lexiseg.training.segmentation import masked_names, refuse_leaks, training_vocabulary
from lexiseg.vocabulary import Vocabulary
from lexiseg.weights import load_model
from lexiseg.weights.hashes import tensors_hash, weights_hash

_log = logging.getLogger("lexiseg")
_Stage = TypeVar("_Stage", SegmentationRecipe, PromptRecipe)


def system_of(recipe: SegmentationRecipe) -> tuple[type[SegmentationModel], ModelOptions]:
    """The system a recipe trains and its options.

    A model trained transductively subtracts nothing from seen classes' scores unless the recipe says so.

    Raises LexisegError if there is no such system, or an option is unknown or wrong.
    """
    system = SYSTEMS.get(recipe.model.system)
    if system is None:
        raise LexisegError(f"There is no system '{recipe.model.system}' to train; there are {', '.join(SYSTEMS)}.")
    options = dict(recipe.model.options)
    if recipe.setting == "transductive" and "seen_offset" in system.options_class.model_fields:
        options.setdefault("seen_offset", 0.0)
    return system.variant(options), system.parse_options(options)


def build_model(recipe: SegmentationRecipe, vocabulary: Vocabulary, *, clip: CLIP | None = None) -> SegmentationModel:
    """Build the model of a recipe; its random weights depend on the generator's state.

    Args:
        recipe: ``initial`` and ``prompts_from`` are folders or models, no recipes.
        vocabulary: of the data.
        clip: the towers, in place of those the recipe names; it then starts from nothing else.

    Returns the model, with exactly those parameters requiring gradients that are trained. Raises LexisegError if the
    system, an option, the CLIP or what it starts from is not there or does not fit; or the training builds on proposals
    or a tuned tower that come from nowhere.
    """
    system, options = system_of(recipe)
    seen = masked_names(training_vocabulary(vocabulary, setting=recipe.setting))
    if recipe.initial is None or clip is not None:
        model = system(clip or load_clip(recipe.model.clip), options, seen)
    else:
        # It brings its proposals; a recipe cannot name both.
        model = start_from(recipe.initial, system, options, seen, vocabulary, steps=recipe.initial_steps)
        if model.clip.name != recipe.model.clip:
            _log.warning("'%s' brings its CLIP, so the recipe's '%s' is not used.", recipe.initial, recipe.model.clip)
    source = recipe.proposals_from
    if clip is None and source is not None:
        generator = proposals_of(model, source)
        start, seen_before = proposals_start(generator, source)
        refuse_leaks(f"What made the proposals in '{source}'", seen_before, seen, vocabulary)
        generator.load_state_dict(start, strict=False)
        filled = {name: tensor for name, tensor in generator.state_dict().items() if name in start}
        # A continued run asks whether these are still the weights it began with.
        model.metadata["proposals"] = {"from": source, "sha256": tensors_hash(filled)}
    if clip is None and recipe.prompts_from is not None:
        take_prompts(model, recipe.prompts_from, vocabulary)
    model.set_trainable()
    masks = recipe.initial is not None or (source is not None and not is_resnet(source))
    model.check_start(proposals=masks, steps=1 if clip is not None else recipe.train.steps)
    model.metadata |= {
        "description": recipe.description,
        "data": recipe.data.model_dump(mode="json"),
        "setting": recipe.setting,
        "steps": recipe.train.steps,
        "batch_size": recipe.train.batch_size * recipe.train.accumulate,
        "seed": recipe.train.seed,
    }
    return model


# ---- what is trained already


def start_from(
    initial: str,
    system: type[SegmentationModel],
    options: ModelOptions,
    seen_names: Sequence[str],
    vocabulary: Vocabulary,
    *,
    steps: int | None = None,
) -> SegmentationModel:
    """Build a model with the weights, CLIP's included, of a trained one; see `SegmentationModel.init_from`.

    Args:
        initial: folder of a run or of a model, or any name :func:`lexiseg.weights.load_model` takes.
        system: of the model that is built.
        options: of the model that is built.
        seen_names: classes with masks in the training to come.
        vocabulary: of the data; a class that has no masks in the training to come must have had none before.
        steps: how many steps ``initial`` should have been trained for; another number gives a warning.

    Returns the model; its metadata say where the weights come from. Raises LexisegError if there is no such model, it
    does not fit, or it had masks of a class that is unseen now.
    """
    what = f"The initial model '{initial}'"
    start = load_model(initial)
    refuse_leaks(what, start.seen_names, seen_names, vocabulary)
    model = system(start.clip, options, tuple(seen_names))
    parts = model.init_from(start, what)
    if parts:
        _log.warning("Of '%s' only the %s are used: the rest has another architecture.", initial, " and ".join(parts))
    done = start.metadata.get("steps")
    if steps is not None and done is not None and done != steps:
        _log.warning(
            "'%s' was trained for %s steps, while the recipe's initial_steps is %d; it is used as it is.",
            initial,
            done,
            steps,
        )
    model.metadata = {"initial": {"model": str(initial), "steps": done, "weights_sha256": weights_hash(start)}}
    if parts:
        model.metadata["initial"]["part"] = ", ".join(parts)
    return model


def take_prompts(model: SegmentationModel, source: str, vocabulary: Vocabulary, *, any_clip: bool = False) -> None:
    """Put text prompts that were learned offline, in a run of the kind "prompts", into a model.

    Raises LexisegError if there are no prompts, the model has no place for them or one of another size, or they were
    learned with another CLIP (which ``any_clip`` allows), or with a class of the ``vocabulary`` that is unseen now.
    """
    (tensors, card), target = read_prompts(source), model.learned_prompts
    if target is None:
        raise _no_prompts(source, model.system)
    advice = "give both the same numbers of vectors, and the same CLIP"
    check_state(tensors, shapes_of(target), f"The learned prompt in '{source}'", advice=advice)
    if not any_clip and card.get("clip_fingerprint") not in (None, model.clip.fingerprint()):
        raise LexisegError(
            f"The prompts in '{source}' were learned with another CLIP, {card.get('clip')}; learn them with this one."
        )
    refuse_leaks(f"What made the prompts in '{source}'", card.get("seen_names", ()), model.seen_names, vocabulary)
    target.load_state_dict(tensors)
    model.metadata["prompts"] = {"from": str(source), "sha256": target.fingerprint()}


def proposals_of(model: SegmentationModel, source: str) -> ProposalGenerator:
    """The generator that ``proposals_from``, which is ``source``, is meant for; a `LexisegError` if there is none."""
    if not isinstance(model, DecoupledModel):
        raise LexisegError(f"'proposals_from' is '{source}', but {model.system} proposes no regions; remove the key.")
    return model.generator


def _no_prompts(source: str | None, system: str) -> LexisegError:
    return LexisegError(
        f"'prompts_from' is '{source}', but this {system} has no learned prompts; set its options to have some, or "
        "remove the key."
    )


# ---- recipes that are trained first


def with_stages(recipe: Recipe, run_dir: Path, train: Callable[..., Path]) -> Recipe:
    """Train the recipes that another one builds on, in folders in its own, and name their models instead.

    Args:
        recipe: whose keys ``initial``, ``proposals_from``, ``prompts_from`` and ``teacher`` may name recipes.
        run_dir: its folder; theirs are ``initial``, ``proposals``, ``prompts`` and ``teacher`` in it.
        train: trains a recipe in a folder and gives the folder of the model; takes ``stop_after``. A finished run that
            is resumed only exports again.

    Raises LexisegError if a key names a recipe that cannot come before this one; nothing is trained then.
    """
    if isinstance(recipe, ContrastiveRecipe) and is_recipe(recipe.model.initial):
        model = train(load_recipe(str(recipe.model.initial), seed=recipe.train.seed), run_dir / "initial")
        return recipe.model_copy(update={"model": recipe.model.model_copy(update={"initial": str(model)})})
    if not isinstance(recipe, SegmentationRecipe):
        return recipe
    found: dict[str, str] = {}
    for key, stage in stages_of(recipe).items():
        stop_after = recipe.initial_steps if key == "initial" else None
        found[key] = str(train(stage, run_dir / key.removesuffix("_from"), stop_after=stop_after))
    return recipe.model_copy(update=found)


def stages_of(recipe: SegmentationRecipe) -> dict[str, Recipe]:
    """The recipes that ``recipe`` names, by their keys, in the order in which they are trained.

    Raises LexisegError as `with_stages` does.
    """
    found: dict[str, Recipe] = {}
    if is_recipe(recipe.initial):
        found["initial"] = first = first_stage(recipe)
        refuse_misfit(first, recipe)
    if is_recipe(recipe.proposals_from):
        # On its own pictures, which need not have classes.
        given = {"model.clip": recipe.model.clip}
        found["proposals_from"] = load_recipe(str(recipe.proposals_from), given, seed=recipe.train.seed)
    if is_recipe(recipe.prompts_from):
        found["prompts_from"] = prompt_stage(recipe)
    if is_recipe(recipe.teacher):
        found["teacher"] = _stage(recipe, "teacher", SegmentationRecipe)
    return found


def first_stage(recipe: SegmentationRecipe) -> SegmentationRecipe:
    """The recipe that ``recipe.initial`` names, on the data and the CLIP of ``recipe`` and with its seed.

    How pictures are cropped and augmented stays the stage's own: the decoupled papers' stages differ in that. Options
    that weights depend on are those of ``recipe``, see `ModelOptions.changes_to_init`.

    Raises LexisegError if it does not train a segmentation system, one whose weights do not fit, or for fewer steps
    than ``initial_steps``.
    """
    first = _stage(recipe, "initial", SegmentationRecipe)
    if recipe.initial_steps is not None and recipe.initial_steps > first.train.steps:
        raise LexisegError(
            f"'initial_steps' is {recipe.initial_steps}, but '{recipe.initial}' has only {first.train.steps} steps; "
            "choose fewer."
        )
    given = first.model.options
    changes = system_of(first)[1].changes_to_init(system_of(recipe)[1], given, str(recipe.initial))
    return first.model_copy(update={"model": first.model.model_copy(update={"options": given | changes})})


def refuse_misfit(first: SegmentationRecipe, recipe: SegmentationRecipe) -> None:
    """See, before the first stage is trained, that a model of ``recipe`` can start from one of it.

    A `LexisegError` says that it cannot, or that one cannot be built.
    """
    # Shapes are all that is asked for, and torch warns of the values that are lost.
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        towers = _towers(recipe.model.clip)
        before, after = (system(towers, options) for system, options in map(system_of, (first, recipe)))
        after.init_from(before, f"A model of '{recipe.initial}'")


def _towers(name: str) -> CLIP:
    """Towers that are made up, or loaded if their name does not say what they are."""
    try:
        return random_clip(name)
    except LexisegError:
        with torch.device("cpu"):
            return load_clip(name)


def prompt_stage(recipe: SegmentationRecipe) -> PromptRecipe:
    """The recipe that ``recipe.prompts_from`` names, likewise, with as many vectors as the model has places for.

    It learns from all classes if ``recipe`` does.

    Raises LexisegError if it learns no prompts, or the recipe's model has no learned ones.
    """
    first = _stage(recipe, "prompts_from", PromptRecipe)
    system, options = system_of(recipe)
    places = options.prompt_places()
    if places is None:
        raise _no_prompts(recipe.prompts_from, system.system)
    return first.model_copy(
        update={
            "setting": "supervised" if recipe.setting == "supervised" else "inductive",
            "model": first.model.model_copy(update=places),
        }
    )


def _stage(recipe: SegmentationRecipe, key: str, kind: type[_Stage]) -> _Stage:
    name = str(getattr(recipe, key))
    stage = load_recipe(name, seed=recipe.train.seed)
    if not isinstance(stage, kind):
        what = "does not train a segmentation system" if kind is SegmentationRecipe else "does not learn text prompts"
        raise LexisegError(f"'{key}' names '{name}', which {what}; name one that does.")
    model, data = stage.model.model_copy(update={"clip": recipe.model.clip}), recipe.data
    if not isinstance(stage.data, PictureWorldData) and not isinstance(data, PictureWorldData):
        data = data.model_copy(update={key: getattr(stage.data, key) for key in AUGMENTATION})
    return stage.model_copy(update={"data": data, "model": model})
