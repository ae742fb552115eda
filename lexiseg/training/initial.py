"""Starting a training from a model that is trained already."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from torch import nn

from lexiseg.clip.load import check_state
from lexiseg.clip.prompt_learner import PromptLearner, load_prompts, prompts_folder, read_card
from lexiseg.errors import LexisegError
from lexiseg.evaluation.report import tensors_hash, weights_hash
from lexiseg.models.base import ModelOptions, SegmentationModel
from lexiseg.models.decoupled import DecoupledModel
from lexiseg.models.deop import DeOP
from lexiseg.models.one_stage import OneStageModel
from lexiseg.models.region_base import RegionModel
from lexiseg.proposals.base import ProposalGenerator
from lexiseg.proposals.own import seen_by
from lexiseg.proposals.pretrained import start_proposals
from lexiseg.vocabulary import Vocabulary
from lexiseg.weights import load_model
from lexiseg.words import word_key

_log = logging.getLogger("lexiseg")

# Options of a generator that its weights do not depend on.
NO_WEIGHTS = {"dropout", "frozen_dropout"}


def start_from(
    initial: str,
    system: type[SegmentationModel],
    options: ModelOptions,
    seen_names: Sequence[str],
    vocabulary: Vocabulary,
    *,
    steps: int | None = None,
) -> SegmentationModel:
    """Build a model with the weights, CLIP's included, of a trained one.

    Only weights are taken: options are those given, so that one that changes no tensor's shape, such as the score
    offset of seen classes, may differ from the trained model's. A one-stage system may start from another one with the
    same tensors (the second look from ZegCLIP). Of another decoupled system, or another form of the
    same, the parts are taken that both have: the proposals where their generators are equal, so that one training of
    proposals serves all, learned text prompts, and MAFT's tuned image tower.

    Args:
        initial: folder of a run or of a model, or any name :func:`lexiseg.weights.load_model` takes.
        system: of the model that is built.
        options: of the model that is built.
        seen_names: classes with masks in the training to come.
        vocabulary: of the data; a class that has no masks in the training to come must have had none before.
        steps: how many steps ``initial`` should have been trained for; another number is warned of.

    Returns:
        The model; its metadata say where the weights come from.

    Raises:
        LexisegError: there is no such model, it is of another system or of other shapes, or it had masks of a class
            that is unseen in the training to come.
    """
    start = load_model(initial)
    refuse_leaks(f"The initial model '{initial}'", start.seen_names, seen_names, vocabulary)
    model = system(start.clip, options, tuple(seen_names))
    state = start.state_dict()
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    # The second look is ZegCLIP's model with another way to predict: what has the same tensors may be taken over.
    related = start.system == system.system or (isinstance(start, OneStageModel) and issubclass(system, OneStageModel))
    alike = related and {name: tuple(value.shape) for name, value in state.items()} == shapes
    parts = [] if alike else _take_parts(start, model, initial)
    if parts:
        _log.info("Of '%s' the %s are taken: the rest is of another form.", initial, " and ".join(parts))
    elif not alike and start.system != system.system:
        raise LexisegError(
            f"The initial model '{initial}' is of the system '{start.system}', but the recipe trains "
            f"'{system.system}'; start from a model of that system."
        )
    else:
        check_state(state, shapes, f"The initial model '{initial}'")
        model.load_state_dict(state)
    done = start.metadata.get("steps")
    if steps is not None and done is not None and done != steps:
        _log.warning(
            "'%s' was trained for %s steps, while the recipe's initial_steps is %d; it is taken as it is.",
            initial,
            done,
            steps,
        )
    model.metadata = {"initial": {"model": str(initial), "steps": done, "weights_sha256": weights_hash(start)}}
    if parts:
        model.metadata["initial"]["part"] = ", ".join(parts)
    return model


def refuse_leaks(what: str, before: Sequence[str], now: Sequence[str], vocabulary: Vocabulary) -> None:
    """See that nothing that had masks of a class goes into a training in which that class is unseen.

    Args:
        what: begins the sentence.
        before: classes that had masks then.
        now: classes that have masks in the training to come.
        vocabulary: all its classes.

    Raises:
        LexisegError: a class had masks before and has none now.
    """
    known = {word_key(name) for name in before} - {word_key(name) for name in now}
    leaked = [name for name in vocabulary.names if word_key(name) in known]
    if leaked:
        raise LexisegError(
            f"{what} was trained on masks of '{leaked[0]}', which is unseen in this training; take one that never had "
            "them."
        )


def learned_prompts(model: SegmentationModel) -> PromptLearner | None:
    """The learned text prompts of a model; None where it has none."""
    if isinstance(model, RegionModel):
        return model.prompts
    return model.prompt if isinstance(model, DeOP) else None


def take_prompts(model: SegmentationModel, source: str, vocabulary: Vocabulary) -> None:
    """Put text prompts that were learned offline into a model.

    Args:
        model: gets the prompts.
        source: folder of a run of the kind "prompts", or of the model in it.
        vocabulary: of the data; a class that has no masks in the training to come must have had none before.

    Raises:
        LexisegError: there are no prompts, the model has no place for them or one of another size, or they were learned
            with another CLIP, or with a class that is unseen now.
    """
    folder = prompts_folder(source)
    learner, card = load_prompts(folder), read_card(folder)
    target = learned_prompts(model)
    if target is None:
        raise LexisegError(
            f"'prompts_from' is '{source}', but this {model.system} has no learned prompts; set its options to have "
            "some, or leave the key out."
        )
    found, wanted = (
        {name: tuple(value.shape) for name, value in prompts.state_dict().items()} for prompts in (learner, target)
    )
    if found != wanted:
        raise LexisegError(
            f"The prompts in '{source}' are {_shapes(found)} and the recipe's model wants {_shapes(wanted)}; give both "
            "the same numbers of vectors, and the same CLIP."
        )
    if card.get("clip_fingerprint") not in (None, model.clip.fingerprint()):
        raise LexisegError(
            f"The prompts in '{source}' were learned with another CLIP, {card.get('clip')}; learn them with this one."
        )
    refuse_leaks(f"What made the prompts in '{source}'", card.get("seen_names", ()), model.seen_names, vocabulary)
    target.load_state_dict(learner.state_dict())
    model.metadata["prompts"] = {"from": str(source), "sha256": learner.fingerprint()}


def take_proposals(model: SegmentationModel, source: str, vocabulary: Vocabulary) -> None:
    """Fill a model's proposals with weights that were trained elsewhere.

    Args:
        model: a decoupled one, new.
        source: see `lexiseg.proposals.pretrained.start_proposals`.
        vocabulary: of the data; a class that has no masks in the training to come must have had none before.

    Raises:
        LexisegError: the model proposes no regions, or the weights are not there, do not fit, or saw masks of a class
            that is unseen now.
    """
    generator = proposals_of(model, source)
    refuse_leaks(f"What made the proposals in '{source}'", seen_by(source), model.seen_names, vocabulary)
    state, names = generator.state_dict(), start_proposals(generator, source)
    # A continued run asks whether these are still the weights it began with.
    digest = tensors_hash({name: state[name] for name in names})
    model.metadata["proposals"] = {"from": source, "sha256": digest}


def proposals_of(model: SegmentationModel, source: str) -> ProposalGenerator:
    """The generator that ``proposals_from``, which is ``source``, is meant for.

    Raises:
        LexisegError: the model proposes no regions.
    """
    if not isinstance(model, DecoupledModel):
        raise LexisegError(
            f"'proposals_from' is '{source}', but {model.system} proposes no regions; leave the key out."
        )
    return model.generator


def _shapes(shapes: dict[str, tuple[int, ...]]) -> str:
    return ", ".join(f"{name} {' x '.join(map(str, shape))}" for name, shape in shapes.items())


def _take_parts(start: SegmentationModel, model: SegmentationModel, initial: str) -> list[str]:
    """Give ``model`` the parts of ``start`` that fit, and say which.

    Raises:
        LexisegError: both propose regions, and not in the same way.
    """
    if not isinstance(start, DecoupledModel) or not isinstance(model, DecoupledModel):
        return []
    parts = []
    # SAM comes trained: there is nothing to take over, and the rest may still be of use.
    if any(True for _ in model.generator.parameters()):
        before, now = (one.options.proposals.model_dump(exclude=NO_WEIGHTS) for one in (start, model))
        if before != now:
            key = next(key for key in (*now, *before) if now.get(key) != before.get(key))
            raise LexisegError(
                f"The initial model '{initial}' has other proposals than the recipe: '{key}' is {before.get(key)} in "
                f"the model and {now.get(key)} in the recipe; give both the same."
            )
        model.generator.load_state_dict(start.generator.state_dict())
        model.no_object.data.copy_(start.no_object.data)
        parts.append("proposals")
    if _copy(learned_prompts(start), learned_prompts(model)):
        parts.append("prompts")
    if isinstance(start, RegionModel) and isinstance(model, RegionModel) and _copy(start.student, model.student):
        parts.append("tuned tower")
    return parts


def _copy(source: nn.Module | None, target: nn.Module | None) -> bool:
    """Copy weights if both modules are there and of one form; whether that was so."""
    if source is None or target is None:
        return False
    found = source.state_dict()
    same = {name: value.shape for name, value in found.items()} == {
        name: value.shape for name, value in target.state_dict().items()
    }
    if same:
        target.load_state_dict(found)
    return same
