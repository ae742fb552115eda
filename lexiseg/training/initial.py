"""Starting a training from a model that is trained already."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from lexiseg.clip.load import check_state
from lexiseg.errors import LexisegError
from lexiseg.evaluation.report import weights_hash
from lexiseg.models.base import ModelOptions, SegmentationModel
from lexiseg.models.decoupled import DecoupledModel
from lexiseg.models.region_host import RegionHost
from lexiseg.vocabulary import Vocabulary
from lexiseg.weights import load_model
from lexiseg.words import word_key

_log = logging.getLogger("lexiseg")


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
    offset of seen classes, may differ from the trained model's. Of two decoupled systems with the same generator the
    proposals are taken where the rest does not fit, so that one training of proposals serves them all.

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
    inside = Path(initial) / "model"
    start = load_model(inside if (inside / "config.json").is_file() else initial)
    before, now = ({word_key(name) for name in names} for names in (start.seen_names, seen_names))
    leaked = [name for name in vocabulary.names if word_key(name) in before - now]
    if leaked:
        raise LexisegError(
            f"The initial model '{initial}' was trained on masks of '{leaked[0]}', which is unseen in this training; "
            "start from a model that never had them."
        )
    model = system(start.clip, options, tuple(seen_names))
    state = start.state_dict()
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    alike = type(start) is system and {name: tuple(value.shape) for name, value in state.items()} == shapes
    only_proposals = not alike and _same_proposals(start, model)
    if only_proposals:
        _log.info("Of '%s' only the proposals are taken: the rest is of another form.", initial)
    elif type(start) is not system:
        raise LexisegError(
            f"The initial model '{initial}' is of the system '{start.system}', but the recipe trains "
            f"'{system.system}'; start from a model of that system."
        )
    else:
        check_state(state, shapes, initial)
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
    if only_proposals:
        model.metadata["initial"]["part"] = "proposals"
    return model


def _same_proposals(start: SegmentationModel, model: SegmentationModel) -> bool:
    """Give ``model`` the proposals of ``start``, "no object" included, if both have the same generator."""
    if not isinstance(start, DecoupledModel) or not isinstance(model, DecoupledModel):
        return False
    if start.options.proposals != model.options.proposals:
        return False
    model.generator.load_state_dict(start.generator.state_dict())
    model.no_object.data.copy_(start.no_object.data)
    if (
        isinstance(start, RegionHost)
        and isinstance(model, RegionHost)
        and start.options.prompts == model.options.prompts
    ):
        own = {name: value for name, value in start.state_dict().items() if name.startswith("prompts.")}
        model.load_state_dict(own, strict=False)
    return True
