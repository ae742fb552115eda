"""What a recipe may say: the keys, their values and their defaults.

:mod:`lexiseg.training.recipe` reads recipes and turns mistakes into sentences.
"""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from lexiseg.clip.templates import TEMPLATE_SETS
from lexiseg.models.base import WindowPolicy
from lexiseg.proposals.pretrained import IMAGENET, WEIGHT_FILES
from lexiseg.training.contrastive import ContrastiveSettings
from lexiseg.training.labels import Setting, Unlabelled
from lexiseg.training.settings import TrainSettings


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class PictureWorldData(_Strict):
    """Scenes of the picture world, rendered while training.

    Attributes:
        source: names this kind of data.
        size: side of a training picture in pixels.
        crop: side of the crop that is trained on; None takes the whole picture.
        flip: probability of mirroring a picture.
        label_stride: distance of the label pixels the loss sees; more than 1 makes a step cheaper.
        length: number of training scenes; None takes the benchmark's.
        val_size: side of a validation picture.
        val_length: number of validation scenes.
    """

    source: Literal["picture-world"]
    size: int = Field(default=256, ge=16)
    crop: int | None = Field(default=None, ge=16)
    flip: float = Field(default=0.5, ge=0, le=1)
    label_stride: int = Field(default=1, ge=1, le=8)
    length: int | None = Field(default=None, ge=1)
    val_size: int = Field(default=256, ge=16)
    val_length: int = Field(default=200, ge=1)


class _Augmented(_Strict):
    """How pictures on disk become crops.

    Attributes:
        augment: "paper" for the one-stage papers' pipeline, "short-edge" for the decoupled papers', "light" for crop
            and flip only; see :mod:`lexiseg.data.transforms`.
        crop: side of the crop that is trained on.
        label_stride: distance of the label pixels the loss sees.
        short_sides: of "short-edge": lengths of the shorter side, one of which is drawn for a picture; None is 0.5 to
            1.5 times ``crop`` in tenths.
        longest: of "short-edge": the longer side becomes no longer than this.
        cut: of "short-edge": so many pixels a side of the crop are kept, from the top left (DeOP's last stage).
    """

    augment: Literal["paper", "short-edge", "light"] = "paper"
    crop: int = Field(default=512, ge=16)
    label_stride: int = Field(default=1, ge=1, le=8)
    short_sides: tuple[Annotated[int, Field(ge=1)], ...] | None = None
    longest: int | None = Field(default=None, ge=16)
    cut: int | None = Field(default=None, ge=16)

    @model_validator(mode="after")
    def _check(self) -> _Augmented:
        for key in ("short_sides", "longest", "cut"):
            if getattr(self, key) is not None and self.augment != "short-edge":
                raise ValueError(f"'{key}' belongs to augment 'short-edge', not to '{self.augment}'")
        return self


AUGMENTATION = tuple(_Augmented.model_fields)
"""The keys of data on disk that say how it is augmented."""


class FolderData(_Augmented):
    """A dataset on disk in the VOC layout; see :class:`lexiseg.data.folders.VocFolder`. See :class:`_Augmented`, too.

    Attributes:
        source: names this kind of data.
        root: the dataset's folder; a relative path starts at the working directory.
        train: name of the training list.
        val: name of the validation list.
        labels: folder of the labels.
        splits: folder of the lists.
        reduce_zero_label: ids count from 1 and 0 is background.
    """

    source: Literal["voc-folder"]
    root: Path
    train: str = "train"
    val: str = "val"
    labels: str = "SegmentationClass"
    splits: str = "ImageSets/Segmentation"
    reduce_zero_label: bool = False


class CatalogData(_Augmented):
    """A data set of the papers, as it is distributed, or a folder of one's own; see :mod:`lexiseg.data.sets`.

    See :class:`_Augmented`, too.

    Attributes:
        source: which; it says the classes, their order and the meaning of label values. "own" is a folder in one of
            the layouts of :mod:`lexiseg.data.sets.own`.
        root: its folder; a relative path starts at the working directory.
        unseen: which of its lists of unseen classes, "none" for no split; None takes its first. PASCAL Context has
            two: "released" is what Cascade-CLIP's released configuration amounts to, "papers" the names its paper and
            ZegCLIP's print.
        train: the split that is trained on; None takes the papers' (of VOC 2012 "trainaug", the augmented set).
        classes: the class list, of a data set whose distribution carries it in a file of its own.
        names_of: the paper whose names of the classes are used, where it calls some otherwise (VOC: "zegformer",
            "maft").
        synonyms: whether a class has the further words of the data set's list beside its name, where it is judged;
            training takes names alone. None: of the papers' data sets the names, of one's own data all words.
    """

    source: Literal[
        "voc2012", "coco-stuff-164k", "pascal-context-59", "pascal-context-459", "ade20k-150", "ade20k-847", "own"
    ]
    root: Path
    unseen: str | None = None
    train: str | None = None
    classes: Path | None = None
    names_of: str | None = None
    synonyms: bool | None = None


Data: TypeAlias = Annotated[PictureWorldData | FolderData | CatalogData, Field(discriminator="source")]


class ModelRecipe(_Strict):
    """What is built.

    Attributes:
        system: a segmentation system, such as "zegclip".
        clip: name of the towers, as ``load_clip`` takes it.
        options: of the system; the system checks them.
    """

    system: str
    clip: str
    options: dict[str, Any] = Field(default_factory=dict)


class SnapshotRecipe(_Strict):
    """How the trained model is judged while training; the full evaluation is the ``evaluate`` command's.

    Attributes:
        pictures: number of overlays at each snapshot.
        scored: number of validation samples scored at each snapshot; 0 scores none.
    """

    pictures: int = Field(default=4, ge=0)
    scored: int = Field(default=40, ge=0)


def _known_set(templates: Any) -> Any:
    named = TEMPLATE_SETS.get(templates) if isinstance(templates, str) else None
    return templates if named is None else list(named)


Templates: TypeAlias = Annotated[str | list[str], BeforeValidator(_known_set)]


def _known_start(source: str) -> str:
    if source == IMAGENET or "/" in source or source.endswith(WEIGHT_FILES) or Path(source).is_dir():
        return source
    near = difflib.get_close_matches(source.lower(), [IMAGENET], cutoff=0.5)
    hint = (
        f"; did you mean '{IMAGENET}'?" if near else f"; give '{IMAGENET}', a file, a folder or OWNER/NAME on the hub"
    )
    raise ValueError(f"'{source}' is nothing that proposals can start from{hint}")


class SegmentationRecipe(_Strict):
    """Training of a segmentation system.

    Attributes:
        kind: names this kind of recipe.
        description: one line for people.
        setting: what is known of the unseen classes: "inductive" nothing, "transductive" their names (self-training),
            "supervised" their masks. The picture world is never supervised.
        unlabelled: for self-training, how it learns where pixels without a label are: "marked" as the authors' code,
            which takes the place of unseen classes, though not their names, from the ground truth; "ignored" takes
            every pixel that has no seen label and is no padding. In the picture world, which hides the unseen classes
            and has no void, both are the same. See :func:`lexiseg.training.labels.self_training_labels`.
        initial: a trained model whose weights, CLIP's included, the run starts from, with a fresh optimizer and
            schedule: its folder, or the name of a recipe, which is then trained first, in the run's folder, on this
            recipe's data and ``model.clip``.
        initial_steps: stop the training of ``initial`` after this many steps of its schedule; None trains it to its
            end. The authors start self-training from half of the inductive training.
        prompts_from: learned text prompts that the model takes over: the folder of a run of the kind "prompts", or the
            name of such a recipe, which is then trained first, in the run's folder, on this recipe's data and CLIP.
        proposals_from: what the proposals of a decoupled system start from when a training begins: "imagenet" for a
            ResNet's ImageNet weights from the hub, a file of such weights, or a MaskFormer or Mask2Former of
            `transformers`, a folder or ``OWNER/NAME`` on the hub; see
            :func:`lexiseg.proposals.pretrained.start_proposals`. None starts from random weights. A model that
            ``initial`` names brings its own proposals, so both cannot be given.
        teacher: for self-training, a trained model that labels the pixels without a label; None lets the model itself
            do so. Its folder, or the name of a recipe, which is then trained first like ``initial``.
        model: what is built.
        templates: "single", "paper", the name of a set in :mod:`lexiseg.clip.templates`, a sentence with one ``{}``, or
            a list of such sentences.
        data: what it is trained on.
        evaluation: how it is judged while training.
        train: the numbers of the loop.
    """

    kind: Literal["segmentation"]
    description: str = ""
    setting: Setting = "inductive"
    unlabelled: Unlabelled = "marked"
    initial: str | None = None
    initial_steps: int | None = Field(default=None, ge=1)
    prompts_from: str | None = None
    proposals_from: Annotated[str, AfterValidator(_known_start)] | None = None
    teacher: str | None = None
    model: ModelRecipe
    templates: Templates = "single"
    data: Data
    evaluation: SnapshotRecipe = Field(default_factory=SnapshotRecipe)
    train: TrainSettings

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
        return self


class PromptSettings(_Strict):
    """Learned text prompts.

    Attributes:
        clip: name of the towers, as ``load_clip`` takes it.
        prefix: vectors in front of a class name.
        suffix: vectors behind it.
        task: vectors behind the name of the task (FreeSeg); 0 leaves the task out.
        size: side of a crop; None takes the side CLIP was trained at.
        per_class: at most so many pictures of each class.
    """

    clip: str
    prefix: int = Field(default=16, ge=0)
    suffix: int = Field(default=0, ge=0)
    task: int = Field(default=0, ge=0)
    size: int | None = Field(default=None, ge=16)
    per_class: int = Field(default=32, ge=1)


class PromptRecipe(_Strict):
    """Learning text prompts offline: CLIP classifies masked crops of the classes with masks.

    Attributes:
        kind: names this kind of recipe.
        description: one line for people.
        setting: "inductive" learns from seen classes alone, "supervised" from all.
        model: the prompts.
        data: whose masks are cropped; its augmentation is not used.
        train: the numbers of the loop.
    """

    kind: Literal["prompts"]
    description: str = ""
    setting: Literal["inductive", "supervised"] = "inductive"
    model: PromptSettings
    data: Data
    train: TrainSettings

    @model_validator(mode="after")
    def _check(self) -> PromptRecipe:
        _require_steps(self.train)
        return self


def _require_steps(train: TrainSettings) -> None:
    if not train.steps:
        raise ValueError("'train.steps' is 0, which only a recipe of the kind 'segmentation' can have")


class WindowRecipe(_Strict):
    """How a model is run over a picture.

    Attributes:
        size: side of the sliding window in pixels; None runs whole pictures.
        stride: distance of the windows; 0 is their side.
        short_side: what the shorter side of a picture is resized to first; None keeps it.
        long_side: a limit to the longer side, at which the shorter one becomes shorter than ``short_side``; None sets
            none.
        antialias: whether that resize smooths what it shrinks.
    """

    size: int | None = Field(default=None, ge=1)
    stride: int = Field(default=0, ge=0)
    short_side: int | None = Field(default=None, ge=1)
    long_side: int | None = Field(default=None, ge=1)
    antialias: bool = True

    @model_validator(mode="after")
    def _check(self) -> WindowRecipe:
        if self.long_side is not None and self.short_side is None:
            raise ValueError("'long_side' limits the resize to 'short_side', which is missing; name it")
        if self.size is not None and self.stride > self.size:
            raise ValueError(f"a stride of {self.stride} leaves pixels between windows of {self.size} out; shorten it")
        return self

    def policy(self) -> WindowPolicy:
        """The same as the model takes it."""
        return WindowPolicy(self.size, self.stride or self.size or 0, self.short_side, self.long_side, self.antialias)


class EvaluationRecipe(_Strict):
    """An evaluation without a training, such as that of a model on another dataset than its own.

    Attributes:
        kind: names this kind of recipe.
        description: one line for people.
        templates: as in :class:`SegmentationRecipe`; None takes the model's.
        data: what it is judged on: the validation part.
        window: how the model is run over a picture; None takes the model's own way.
        offsets: which classes lose the score that a model takes off those it had masks of: "data" those the data
            flags as seen, "all" every class alike, "none" no class. On another dataset the one-stage papers' code takes
            it off all, which changes no label map; but an ensemble must count no class as seen there, so take "none".
    """

    kind: Literal["evaluation"]
    description: str = ""
    templates: Annotated[str | list[str] | None, BeforeValidator(_known_set)] = None
    data: Data
    window: WindowRecipe | None = None
    offsets: Literal["data", "all", "none"] = "data"


class ContrastiveRecipe(_Strict):
    """Training of a CLIP on captions.

    Attributes:
        kind: names this kind of recipe.
        description: one line for people.
        model: the towers, the scenes and the weights of the loss.
        train: the numbers of the loop.
    """

    kind: Literal["contrastive"]
    description: str = ""
    model: ContrastiveSettings
    train: TrainSettings

    @model_validator(mode="after")
    def _check(self) -> ContrastiveRecipe:
        _require_steps(self.train)
        return self


Recipe: TypeAlias = SegmentationRecipe | PromptRecipe | ContrastiveRecipe | EvaluationRecipe
KINDS: dict[str, type[SegmentationRecipe] | type[PromptRecipe] | type[ContrastiveRecipe] | type[EvaluationRecipe]] = {
    "contrastive": ContrastiveRecipe,
    "evaluation": EvaluationRecipe,
    "prompts": PromptRecipe,
    "segmentation": SegmentationRecipe,
}
"""The kinds of recipe, by the value of their key ``kind``."""
