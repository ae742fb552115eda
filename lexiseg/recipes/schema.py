"""What a recipe may say: the keys, their values and their defaults.

:mod:`lexiseg.recipes.reading` reads recipes; nothing here needs torch.
"""

from __future__ import annotations

import difflib
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from lexiseg.checking import Policy
from lexiseg.files import is_folder
from lexiseg.recipes.data import Data, PictureWorldData
from lexiseg.strict import StrictModel
from lexiseg.templates import TEMPLATE_SETS

HELD_OUT_SEED = 900_001
"""First integer of the seeds of the scenes on which zero-shot accuracy is measured."""

Setting: TypeAlias = Literal["inductive", "transductive", "supervised"]
"""What is known of the unseen classes in training: nothing, their names, or their masks as well."""

Unlabelled: TypeAlias = Literal["marked", "ignored"]
"""How self-training learns where pixels without a label are; see `self_training_labels`."""


Beta: TypeAlias = Annotated[float, Field(ge=0, lt=1)]


class Multiplier(StrictModel):
    """Factors on learning rate and weight decay for the parameters whose name contains the rule's key."""

    lr: float = Field(default=1.0, ge=0)  # factor on the base learning rate; 0 keeps the parameters where they are
    decay: float = Field(default=1.0, ge=0)  # factor on the weight decay


class TrainSettings(StrictModel):
    """Everything the loop needs to know, apart from the task."""

    # number of optimizer steps. 0 trains nothing: the model is put together, from CLIP and what it starts from, and
    # written.
    steps: int = Field(ge=0)
    batch_size: int = Field(ge=1)  # samples in one forward pass of all processes together; each takes its part of them
    accumulate: int = Field(default=1, ge=1)  # forward passes whose mean gradient makes one optimizer step
    lr: float = Field(gt=0)  # base learning rate, before multipliers
    # decoupled decay of AdamW; of SGD the usual one, added to the gradient
    weight_decay: float = Field(default=0.01, ge=0)
    optimizer: Literal["adamw", "sgd"] = "adamw"  # "adamw" or "sgd"
    betas: tuple[Beta, Beta] = (0.9, 0.999)  # AdamW's averaging factors
    momentum: float = Field(default=0.9, ge=0, lt=1)  # of SGD
    # kinds of layers whose parameters do not decay, whatever rule applies to them: "norm" layers and tables of
    # "embedding" (the decoupled papers' rule)
    no_decay: tuple[Literal["norm", "embedding"], ...] = ()
    # rules by name; the longest key contained in a parameter's name wins, then the alphabetically first, and only that
    # one applies
    multipliers: dict[str, Multiplier] = Field(default_factory=dict)
    # "poly" decays by ``power`` to ``min_lr``, "cosine" follows half a cosine to it, "constant" stays
    schedule: Literal["poly", "cosine", "constant"] = "poly"
    warmup_steps: int = Field(default=0, ge=0)  # length of the warm-up
    warmup_ratio: float = Field(default=1e-6, ge=0, le=1)  # fraction of the rate at step 0
    # "linear" climbs from that fraction; "constant" keeps it to the end of the warm-up
    warmup: Literal["linear", "constant"] = "linear"
    power: float = Field(default=0.9, ge=0)  # exponent of the polynomial decay
    min_lr: float = Field(default=1e-6, ge=0)  # rate at the end
    clip_norm: float | None = Field(default=None, gt=0)  # largest gradient norm; None leaves gradients alone
    precision: Literal["fp32", "bf16"] = "fp32"  # "fp32", or "bf16" for autocast
    # "fsdp" spreads weights, gradients and optimizer over the processes instead of giving each a copy, for towers that
    # are too large; with one process it does nothing. Does not change results.
    sharding: Literal["none", "fsdp"] = "none"
    seed: int = Field(default=0, ge=0, lt=2**32)  # of the initial weights, data and dropout
    # background processes that prepare batches; 0 prepares them in the loop. Does not change results.
    workers: int = Field(default=1, ge=0)
    log_every: int = Field(default=10, ge=1)  # steps between two lines of the log
    checkpoint_every: int = Field(default=500, ge=1)  # steps between two checkpoints; the end always makes one
    keep_checkpoints: int = Field(default=2, ge=1)  # number of checkpoints kept
    # steps between two evaluations on a sample of the validation data, with sample pictures; 0 makes none
    snapshot_every: int = Field(default=0, ge=0)
    # a metric of these evaluations, such as "val/hiou"; the model at its largest value is kept in the run's folder
    # ``best``, beside the last one in ``model``. None keeps the last one only.
    keep_best: str | None = None
    # stop after so many evaluations in a row without a larger value of ``keep_best``; None never does
    patience: int | None = Field(default=None, ge=1)
    # factors on the losses of the classes, by name (classes that are not named have 1), or "frequency": 1 over the
    # square root of a class's fraction of the labelled pixels of up to 2,000 training pictures, scaled to a mean of 1
    # and cut at 10. None treats all alike.
    class_weights: Literal["frequency"] | dict[str, Annotated[float, Field(gt=0)]] | None = None

    @model_validator(mode="after")
    def _check(self) -> TrainSettings:
        if self.keep_best is not None and not self.snapshot_every:
            raise ValueError("'keep_best' needs evaluations to choose by; set 'snapshot_every'")
        if self.schedule != "constant" and self.min_lr > self.lr:
            raise ValueError(f"the rate would rise from 'lr', {self.lr:g}, to 'min_lr', {self.min_lr:g}; lower that")
        if self.patience is not None and self.keep_best is None:
            raise ValueError("'patience' waits for a better value of 'keep_best', which is missing; name a metric")
        return self


def _with_steps(train: TrainSettings) -> TrainSettings:
    if not train.steps:
        raise ValueError("'train.steps' is 0, which only a recipe of the kind 'segmentation' can have")
    return train


Training: TypeAlias = Annotated[TrainSettings, AfterValidator(_with_steps)]
"""Settings of a training that there is."""


class ModelRecipe(StrictModel):
    """What is built."""

    system: str  # a segmentation system, such as "zegclip"
    clip: str  # name of the towers, as ``load_clip`` takes it
    options: dict[str, Any] = Field(default_factory=dict)  # of the system; the system checks them


class SnapshotRecipe(StrictModel):
    """How the trained model is judged while training; the full evaluation is the ``evaluate`` command's."""

    pictures: int = Field(default=4, ge=0)  # number of overlays at each snapshot
    num_samples: int = Field(default=40, ge=0)  # number of validation samples scored at each snapshot; 0 scores none


def _known_set(templates: Any) -> Any:
    if not isinstance(templates, str) or templates in ("single", "paper"):
        return templates
    return list(TEMPLATE_SETS.get(templates, ())) or templates


Templates: TypeAlias = Annotated[str | list[str], BeforeValidator(_known_set)]


IMAGENET = "imagenet"
"""The start of proposals from a ResNet's ImageNet weights."""


def is_resnet(source: str) -> bool:
    """Whether a start of proposals is a ResNet alone, ImageNet's or a file's, and no generator that has seen masks."""
    return source == IMAGENET or source.endswith((".safetensors", ".pth", ".pt", ".bin"))


def _known_start(source: str) -> str:
    # A colon is in the name of a recipe's variant.
    if is_resnet(source) or "/" in source or ":" in source or is_folder(source):
        return source
    near = difflib.get_close_matches(source.lower(), [IMAGENET], cutoff=0.5)
    hint = f"; did you mean '{IMAGENET}'?" if near else f"; give '{IMAGENET}', a ResNet's file or the folder of a run"
    raise ValueError(f"'{source}' is nothing that proposals can start from{hint}")


class SegmentationRecipe(StrictModel):
    """Training of a segmentation system."""

    kind: Literal["segmentation"]  # names this kind of recipe
    description: str = ""  # one line for people
    # what is known of the unseen classes: "inductive" nothing, "transductive" their names (self-training), "supervised"
    # their masks. The picture world is never supervised.
    setting: Setting = "inductive"
    # for self-training, how it learns where pixels without a label are: "marked" as the authors' code, which takes the
    # place of unseen classes, though not their names, from the ground truth; "ignored" takes every pixel that has no
    # seen label and is no padding. In the picture world, which hides the unseen classes and has no void, both are the
    # same. See :func:`lexiseg.training.segmentation.self_training_labels`.
    unlabelled: Unlabelled = "marked"
    # a trained model whose weights, CLIP's included, the run starts from, with a fresh optimizer and schedule: its
    # folder, or the name of a recipe, which is then trained first, in the run's folder, on this recipe's data and
    # ``model.clip``
    initial: str | None = None
    # stop the training of ``initial`` after this many steps of its schedule; None trains it to its end. The authors
    # start self-training from half of the inductive training.
    initial_steps: int | None = Field(default=None, ge=1)
    # learned text prompts that the model takes over: the folder of a run of the kind "prompts", or the name of such a
    # recipe, which is then trained first, in the run's folder, on this recipe's data and CLIP
    prompts_from: str | None = None
    # what the proposals of a decoupled system start from when a training begins: "imagenet" for a ResNet's ImageNet
    # weights from the hub, a file of such weights, the folder of a run that trained some, or the recipe of one, such as
    # "shapes:mask2former", which is then trained first; see :func:`lexiseg.training.proposals.proposals_start`. None
    # starts from random weights. A model that ``initial`` names brings its own proposals, so both cannot be given.
    proposals_from: Annotated[str, AfterValidator(_known_start)] | None = None
    # for self-training, a trained model that labels the pixels without a label; None lets the model itself do so. Its
    # folder, or the name of a recipe, which is then trained first like ``initial``.
    teacher: str | None = None
    model: ModelRecipe  # what is built
    # the name of a set in :mod:`lexiseg.templates`, such as "single", a sentence with one ``{}``, or a list of such
    templates: Templates = "single"
    data: Data  # what it is trained on
    evaluation: SnapshotRecipe = Field(default_factory=SnapshotRecipe)  # how it is judged while training
    train: TrainSettings  # the numbers of the loop

    @model_validator(mode="after")
    def _check(self) -> SegmentationRecipe:
        if self.setting == "supervised" and isinstance(self.data, PictureWorldData):
            raise ValueError(
                "picture-world has no masks of its unseen classes to train on, so its setting cannot be 'supervised'; "
                "choose 'inductive' or 'transductive'"
            )
        if self.initial_steps is not None and self.initial is None:
            raise ValueError("'initial_steps' says how long 'initial' is trained, which is missing; name it")
        if self.proposals_from is not None and self.initial is not None:
            raise ValueError(
                "'initial' brings its proposals, so 'proposals_from' would do nothing; set one of the two to null"
            )
        if self.teacher is not None and self.setting != "transductive":
            raise ValueError("'teacher' labels pixels for self-training, whose setting is 'transductive'")
        if self.setting != "inductive" and getattr(self.data, "unseen_pictures", "hide") == "drop":
            raise ValueError(f"'data.unseen_pictures' is 'drop', which the setting '{self.setting}' contradicts")
        return self


class PromptSettings(StrictModel):
    """Learned text prompts."""

    clip: str  # name of the towers, as ``load_clip`` takes it
    prefix: int = Field(default=16, ge=0)  # vectors in front of a class name
    suffix: int = Field(default=0, ge=0)  # vectors behind it
    task: int = Field(default=0, ge=0)  # vectors behind the name of the task (FreeSeg); 0 leaves the task out
    size: int | None = Field(default=None, ge=16)  # side of a crop; None takes the side CLIP was trained at
    per_class: int = Field(default=32, ge=1)  # at most so many pictures of each class


class PromptRecipe(StrictModel):
    """Learning text prompts offline: CLIP classifies masked crops of the classes with masks."""

    kind: Literal["prompts"]  # names this kind of recipe
    description: str = ""  # one line for people
    # "inductive" learns from seen classes alone, "supervised" from all
    setting: Literal["inductive", "supervised"] = "inductive"
    model: PromptSettings  # the prompts
    data: Data  # whose masks are cropped; its augmentation is not used
    train: Training  # the numbers of the loop


def _ascending(pair: tuple[float, float]) -> tuple[float, float]:
    if pair[0] > pair[1]:
        raise ValueError(f"the smallest, {pair[0]:g}, is above the largest, {pair[1]:g}")
    return pair


_Number: TypeAlias = Annotated[int, Field(ge=0, le=84)]  # the first world has so many things
_Part: TypeAlias = Annotated[float, Field(gt=0, le=1)]
_Numbers: TypeAlias = Annotated[tuple[_Number, _Number], AfterValidator(_ascending)]
_Parts: TypeAlias = Annotated[tuple[_Part, _Part], AfterValidator(_ascending)]


class SceneSettings(StrictModel):
    """Which scenes a training sees."""

    world: Literal["picture-world", "picture-world-2"] = "picture-world"
    size: int = Field(ge=8)  # pixels a side, a multiple of the patch size
    num_things: _Numbers  # smallest and largest number of things
    extents: _Parts = (0.36, 0.64)  # smallest and largest size of a thing as a fraction of the side
    # smallest and largest area of a random resized crop as a fraction of the scene, whose caption names things that are
    # mostly in it; None shows whole scenes, shifted a little, with a caption of all that is in them
    crops: _Parts | None = None
    mentions: _Numbers = (1, 2)  # of crops: smallest and largest number of things that a caption names
    stuff_mentions: float = Field(default=0.3, ge=0, le=1)  # of crops: how often a caption names stuff beside things
    # first integer of every scene's seed; trainings with different ones share no scene
    seed: int = Field(ge=100, lt=HELD_OUT_SEED)
    repeats: int = Field(default=2, ge=1)  # how often a scene is shown, each time mirrored and moved afresh
    lag: int = Field(default=48, ge=1)  # steps between two showings of a scene


class ContrastiveSettings(StrictModel):
    """A CLIP, the scenes it learns from, and the weights of the three terms; a term of weight 0 is left out."""

    model_cfg: dict[str, Any]  # open_clip's description of the architecture
    # a CLIP to start from: a name, a folder, or a contrastive recipe, which is then trained first; None starts at
    # random. Its position table is resized to the new picture size.
    initial: str | None = None
    scenes: SceneSettings  # what to look at
    # fraction of the patches left out in training, chosen anew for each picture (FLIP, CVPR 2023)
    patch_dropout: float = Field(default=0.0, ge=0, lt=1)
    # how often the class token joins the patches only in one of the later blocks, much as always in CaiT (ICCV 2021):
    # what it reads there must be in the patches' own values, which a small tower does not learn by itself
    late_class_token: float = Field(default=0.0, ge=0, le=1)
    names_weight: float = Field(default=1.0, ge=0)  # weight of the term between pictures and the world's list of names
    caption_weight: float = Field(default=0.5, ge=0)  # weight of the term between pictures and sentences
    patch_weight: float = Field(default=1.0, ge=0)  # weight of the token-wise term
    coverage: float = Field(default=0.04, gt=0, le=1)  # fraction of the patches from which on a phrase counts as found

    @model_validator(mode="after")
    def _check(self) -> ContrastiveSettings:
        if not (self.names_weight or self.caption_weight or self.patch_weight):
            raise ValueError("the loss has no term; set names_weight, caption_weight or patch_weight above 0")
        return self


class EvaluationRecipe(StrictModel):
    """An evaluation without a training, such as that of a model on another dataset than its own."""

    kind: Literal["evaluation"]  # names this kind of recipe
    description: str = ""  # one line for people
    # as in :class:`SegmentationRecipe`; None takes the model's
    templates: Annotated[str | list[str] | None, BeforeValidator(_known_set)] = None
    data: Data  # what it is judged on: the validation part
    # how the model is run over a picture; None takes the model's own way
    window: Policy | None = None
    # which classes lose the score that a model takes off those it had masks of: "data" those the data flags as seen,
    # "all" every class alike, "none" no class. On another dataset the one-stage papers' code takes it off all, which
    # changes no label map; but an ensemble must count no class as seen there, so take "none".
    offsets: Literal["data", "all", "none"] = "data"


class ContrastiveRecipe(StrictModel):
    """Training of a CLIP on captions."""

    kind: Literal["contrastive"]  # names this kind of recipe
    description: str = ""  # one line for people
    model: ContrastiveSettings  # the towers, the scenes and the weights of the loss
    train: Training  # the numbers of the loop


Recipe: TypeAlias = SegmentationRecipe | PromptRecipe | ContrastiveRecipe | EvaluationRecipe
KINDS: dict[str, type[SegmentationRecipe] | type[PromptRecipe] | type[ContrastiveRecipe] | type[EvaluationRecipe]] = {
    "contrastive": ContrastiveRecipe,
    "evaluation": EvaluationRecipe,
    "prompts": PromptRecipe,
    "segmentation": SegmentationRecipe,
}
"""The kinds of recipe, by the value of their key ``kind``."""
