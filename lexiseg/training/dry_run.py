"""What a recipe would train, without data and without a step: the model at its full size, the classes, the schedule."""

import json
from dataclasses import asdict, dataclass
from typing import Any

from lexiseg.clip.load import count_parameters, load_clip, random_clip
from lexiseg.clip.model import CLIP
from lexiseg.clip.prompt_learner import PromptLearner
from lexiseg.errors import LexisegError
from lexiseg.files import local
from lexiseg.journal import flat
from lexiseg.models.base import SegmentationModel
from lexiseg.recipes import (
    ContrastiveRecipe,
    EvaluationRecipe,
    PromptRecipe,
    Recipe,
    SegmentationRecipe,
    TrainSettings,
    is_recipe,
)
from lexiseg.training.contrastive import build_towers
from lexiseg.training.init import build_model, first_stage, proposals_of, stages_of, take_prompts
from lexiseg.training.prompts import Prompted
from lexiseg.training.proposals import describe_start
from lexiseg.training.segmentation import masked_names, teacher_model, training_vocabulary
from lexiseg.training.trainer import group_parameters, learning_rate
from lexiseg.vocabulary import Vocabulary


@dataclass(frozen=True)
class DryRun:
    """What :func:`dry_run` found."""

    system: str  # what is trained
    clip: str  # the towers, by name
    parameters: int  # of the model, its text tower included
    trainable: int  # those that training changes
    options: dict[str, Any]  # of the system, defaults included
    train: TrainSettings  # the numbers of the loop
    # peak learning rate and weight decay of each group of parameters, with its number of parameters
    rates: tuple[dict[str, Any], ...]
    random_weights: str | None = None  # why the towers have random weights; None where they are the named ones
    setting: str | None = None  # of the training; None for a CLIP
    data: str | None = None  # name of the data; None for a CLIP
    seen: tuple[str, ...] = ()  # names of the classes with masks in training
    unseen: tuple[str, ...] = ()  # names of the others
    text: int = 0  # number of classes whose text takes part in training
    starts_from: str | None = None  # the model or recipe whose weights the run starts from
    prompts_from: str | None = None  # the folder or recipe whose learned text prompts it takes over
    proposals_from: str | None = None  # what its proposals start from, and whether that is on this machine
    teacher: str | None = None  # the model or recipe that labels pixels in self-training

    def to_dict(self) -> dict[str, Any]:
        """Everything, as JSON holds it."""
        return {**asdict(self), "train": self.train.model_dump(mode="json")}

    def rows(self) -> list[tuple[str, str]]:
        """Title and text of each line that people are shown."""
        train = self.train
        rows = [("system", self.system), ("CLIP", self.clip)]
        if self.random_weights:
            rows.append(("weights", f"random: {self.random_weights}"))
        if self.data is not None:
            more = ", ..." if len(self.seen) > 8 else ""
            rows += [
                ("data", self.data),
                ("setting", f"{self.setting}, the text of {self.text} classes"),
                ("classes with masks", f"{len(self.seen)}: {', '.join(self.seen[:8])}{more}"),
                ("classes without", f"{len(self.unseen)}: {', '.join(self.unseen)}" if self.unseen else "none"),
            ]
        for title in ("starts from", "prompts from", "proposals from", "teacher"):
            if source := getattr(self, title.replace(" ", "_")):
                rows.append((title, source))
        rows += [
            ("parameters", f"{self.parameters:,}"),
            ("trainable", f"{self.trainable:,}"),
            ("options", ", ".join(f"{key} {_as_written(value)}" for key, value in flat(self.options).items())),
        ]
        if not train.steps:
            return [*rows, ("steps", "0: the model is only assembled and written")]
        rows += [
            ("steps", f"{train.steps:,}, batches of {train.batch_size * train.accumulate} on one process"),
            ("schedule", _schedule(train)),
        ]
        for rate in self.rates:
            name = "SGD" if train.optimizer == "sgd" else "AdamW"
            name = f"{name}, {rate['key']}" if rate["key"] else name
            peak = f"peak rate {rate['lr']:g}, decay {rate['weight_decay']:g}"
            betas = f"betas {train.betas[0]:g} and {train.betas[1]:g}"
            how = f"momentum {train.momentum:g}" if train.optimizer == "sgd" else betas
            rows.append((name, f"{peak}, {how}, {rate['parameters']:,} values"))
        return rows


def _as_written(value: object) -> str:
    """A value as a recipe has it."""
    return value if isinstance(value, str) else json.dumps(value)


def _schedule(train: TrainSettings) -> str:
    first, last = (learning_rate(step, train.lr, train) for step in (0, train.steps - 1))
    warmup = f"{train.warmup} warm-up over {train.warmup_steps:,} steps, then " if train.warmup_steps else ""
    shapes = {"constant": "constant", "cosine": f"half a cosine to {train.min_lr:g}"}
    shape = shapes.get(train.schedule, f"(1 - t/T)^{train.power:g} to {train.min_lr:g}")
    return f"{warmup}{shape}; rate {first:.3g} at the first step, {last:.3g} at the last"


def dry_run(recipe: Recipe) -> DryRun:
    """Build a recipe's model at its full size and describe it; the data need not be on disk.

    If the named CLIP is not available, the model gets random weights of the same architecture. What its proposals start
    from is not downloaded; files on this machine are checked to fit.

    Raises LexisegError if the recipe only evaluates; its system, options or data, or a model or prompts that it takes
    over, are wrong.
    """
    if isinstance(recipe, EvaluationRecipe):
        raise LexisegError("This recipe only evaluates, so there is nothing to train; give it to `lexiseg evaluate`.")
    if isinstance(recipe, ContrastiveRecipe):
        model: CLIP | Prompted | SegmentationModel = build_towers(recipe.model)
        facts: dict[str, Any] = {"system": "CLIP", "clip": "from the recipe", "starts_from": recipe.model.initial}
        facts["options"] = recipe.model.model_dump(mode="json", exclude={"model_cfg", "initial"})
    else:
        vocabulary = recipe.data.vocabulary()
        templates = recipe.templates if isinstance(recipe, SegmentationRecipe) else None
        trained = training_vocabulary(vocabulary, setting=recipe.setting, templates=templates)
        model, facts = (
            _prompts(recipe) if isinstance(recipe, PromptRecipe) else _segmentation(recipe, vocabulary, trained)
        )
        seen = masked_names(trained)
        facts |= {"clip": model.clip.name, "setting": recipe.setting, "data": recipe.data.title, "text": len(trained)}
        facts |= {"seen": seen, "unseen": tuple(name for name in vocabulary.names if name not in seen)}
    rates = [
        {"key": group["key"], "lr": group["initial_lr"], "weight_decay": group["weight_decay"]}
        | {"parameters": sum(parameter.numel() for parameter in group["params"])}
        for group in group_parameters(model, recipe.train)
    ]
    facts |= {"parameters": count_parameters(model), "trainable": count_parameters(model, trainable=True)}
    return DryRun(**facts, train=recipe.train, rates=tuple(rates))


def _segmentation(
    recipe: SegmentationRecipe, vocabulary: Vocabulary, trained: Vocabulary
) -> tuple[SegmentationModel, dict[str, Any]]:
    reason = None
    # What is still to be trained cannot be started from, and what is there already should be.
    later = {key: None for key in ("initial", "prompts_from") if is_recipe(getattr(recipe, key))}
    if recipe.initial is not None and "initial" not in later:
        model = build_model(recipe.model_copy(update=later), vocabulary)
    else:
        clip, reason = clip_or_random(recipe.model.clip)
        stages_of(recipe)
        model = build_model(recipe, vocabulary, clip=clip)
        if recipe.prompts_from is not None and "prompts_from" not in later:
            unknown = reason is not None or recipe.initial is not None
            take_prompts(model, recipe.prompts_from, vocabulary, any_clip=unknown)
    if recipe.teacher is not None and not is_recipe(recipe.teacher):
        teacher_model(recipe.teacher, trained)
    start, described = recipe.proposals_from, None
    if start is not None:
        generator = proposals_of(model, start)
        described = f"the recipe '{start}', trained first" if is_recipe(start) else describe_start(generator, start)
    return model, {
        "system": model.system,
        "random_weights": reason,
        "starts_from": _initial(recipe),
        "prompts_from": recipe.prompts_from,
        "proposals_from": described,
        "teacher": recipe.teacher,
        "options": model.options.model_dump(mode="json"),
    }


def _prompts(recipe: PromptRecipe) -> tuple[Prompted, dict[str, Any]]:
    said = recipe.model
    clip, reason = clip_or_random(said.clip)
    model = Prompted(clip, PromptLearner(clip.text_width, said.prefix, said.suffix, said.task))
    options = said.model_dump(mode="json", exclude={"clip"})
    return model, {"system": "text prompts", "random_weights": reason, "options": options}


def _initial(recipe: SegmentationRecipe) -> str | None:
    if not is_recipe(recipe.initial):
        return recipe.initial
    first = first_stage(recipe)
    return f"{recipe.initial}, {recipe.initial_steps or first.train.steps:,} of its {first.train.steps:,} steps"


def clip_or_random(name: str) -> tuple[CLIP, str | None]:
    """The named CLIP; or its architecture with random weights, and why.

    Raises LexisegError if the name is unknown, or its files are damaged.
    """
    try:
        return load_clip(name), None
    except LexisegError as error:
        if local(name) is not None:
            raise
        try:
            return random_clip(name), str(error).partition(";")[0].rstrip(".")  # the advice after it is for a training
        except LexisegError:
            raise error from None
