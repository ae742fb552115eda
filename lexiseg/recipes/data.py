"""What a recipe's data are: the keys, and how they are opened and augmented.

Torch is imported where pictures are, so that recipes can be read and listed without it.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, TypeAlias

from pydantic import Field, model_validator

from lexiseg.strict import StrictModel

if TYPE_CHECKING:
    from lexiseg.data.base import SegmentationDataset
    from lexiseg.data.sets.dataset import FileDataset
    from lexiseg.data.transforms import Pipeline
    from lexiseg.vocabulary import Vocabulary

Triple: TypeAlias = tuple[float, float, float]


class PictureWorldData(StrictModel):
    """Scenes of a picture world, rendered while training."""

    # the world's name; or "shapes", pictures whose regions no word means, to train proposals on
    source: Literal["picture-world", "picture-world-2", "picture-world-2-twemoji", "shapes"]
    size: int = Field(default=256, ge=16)  # side of a training picture in pixels
    crop: int | None = Field(default=None, ge=16)  # side of the crop that is trained on; None takes the whole picture
    flip: float = Field(default=0.5, ge=0, le=1)  # probability of mirroring a picture
    # distance of the label pixels the loss sees; more than 1 makes a step cheaper
    label_stride: int = Field(default=1, ge=1, le=8)
    length: int | None = Field(default=None, ge=1)  # number of training scenes; None takes the benchmark's
    val_size: int = Field(default=256, ge=16)  # side of a validation picture
    val_length: int = Field(default=200, ge=1)  # number of validation scenes
    # whether training scenes show unseen classes, with their pixels hidden; "drop" draws none (strictly inductive)
    unseen_pictures: Literal["hide", "drop"] = "hide"
    cache_dir: Path | None = None  # a folder in which rendered scenes are kept, for trainings that share them

    @property
    def title(self) -> str:
        """What reports call it."""
        return self.source

    def open(self, split: str) -> SegmentationDataset:
        """The "train" or the "val" split."""
        from lexiseg.data.picture_world import PictureWorld, find_world
        from lexiseg.data.picture_world.shapes import Shapes

        if self.source == "shapes":
            training = split == "train"
            size, length = (self.size, self.length) if training else (self.val_size, self.val_length)
            return Shapes(split, size=size, length=length)
        world = find_world(self.source)
        if split == "train":
            shown = self.unseen_pictures == "hide"
            return PictureWorld(
                "train", world=world, size=self.size, length=self.length, unseen=shown, cache_dir=self.cache_dir
            )
        return PictureWorld("val", world=world, size=self.val_size, length=self.val_length, cache_dir=self.cache_dir)

    def vocabulary(self) -> Vocabulary:
        """The classes."""
        return self.open("train").vocabulary

    def pipeline(self, mean: Triple, std: Triple, *, pad_label: int = 255, ignored: int = 255) -> Pipeline:
        """The augmentation, ending in normalisation; see `_Augmented.pipeline`."""
        from lexiseg.data.transforms import light_pipeline

        return light_pipeline(mean, std, crop=self.crop or self.size, flip=self.flip, pad_label=pad_label)


class _Augmented(StrictModel):
    """How pictures on disk become crops, and which are left out."""

    # "paper" for the one-stage papers' pipeline, "short-edge" for the decoupled papers', "light" for crop and flip
    # only; see :mod:`lexiseg.data.transforms`
    augment: Literal["paper", "short-edge", "light"] = "paper"
    crop: int = Field(default=512, ge=16)  # side of the crop that is trained on
    label_stride: int = Field(default=1, ge=1, le=8)  # distance of the label pixels the loss sees
    # of "short-edge": lengths of the shorter side, one of which is drawn for a picture; None is 0.5 to 1.5 times
    # ``crop`` in tenths
    short_edge_length: tuple[Annotated[int, Field(ge=1)], ...] | None = None
    max_size: int | None = Field(default=None, ge=16)  # of "short-edge": the longer side becomes no longer than this
    # of "short-edge": so many pixels a side of the crop are kept, from the top left (DeOP's last stage)
    top_left_crop: int | None = Field(default=None, ge=16)

    @model_validator(mode="after")
    def _check(self) -> _Augmented:
        for key in ("short_edge_length", "max_size", "top_left_crop"):
            if getattr(self, key) is not None and self.augment != "short-edge":
                raise ValueError(f"'{key}' belongs to augment 'short-edge', not to '{self.augment}'")
        if self.top_left_crop is not None and self.top_left_crop > self.crop:
            kept = f"'top_left_crop' keeps {self.top_left_crop} pixels of a crop of {self.crop}"
            raise ValueError(f"{kept}; give a smaller one, or null")
        return self

    def pipeline(self, mean: Triple, std: Triple, *, pad_label: int = 255, ignored: int = 255) -> Pipeline:
        """The augmentation, ending in the model's normalisation; ``mean`` and ``std`` are of its images, in 0..1.

        ``pad_label``: label of padding pixels. ``ignored``: label of pixels without a class.
        """
        from lexiseg.data.transforms import light_pipeline, paper_pipeline, short_edge_pipeline

        if self.augment == "paper":
            return paper_pipeline(mean, std, crop=self.crop, pad_label=pad_label, ignored=ignored)
        if self.augment == "light":
            return light_pipeline(mean, std, crop=self.crop, pad_label=pad_label)
        how = {key: getattr(self, key) for key in ("crop", "short_edge_length", "max_size", "top_left_crop")}
        return short_edge_pipeline(mean, std, **how, pad_label=pad_label)


AUGMENTATION = tuple(_Augmented.model_fields)
"""The keys of data on disk that say how it is augmented."""


class CatalogData(_Augmented):
    """A dataset of the papers, as it is distributed, or a folder of one's own; see :mod:`lexiseg.data.sets`."""

    # which; it says the classes, their order and the meaning of label values. "own" is a folder in one of the layouts
    # of :mod:`lexiseg.data.sets.own`.
    source: Literal[
        "voc2012",
        "coco-stuff-164k",
        "coco-object",
        "pascal-context-59",
        "pascal-context-459",
        "ade20k-150",
        "ade20k-847",
        "cityscapes",
        "own",
    ]
    root: Path  # the folder; a relative path starts at the working directory
    # what becomes of training pictures that show an unseen class: "hide" its pixels, as the papers' code does, or
    # "drop" the pictures (the strict inductive setting of Cascade-CLIP's Table 2 and DeOP's Sec. 5.1). To drop them,
    # every training label is read once when a run begins.
    unseen_pictures: Literal["hide", "drop"] = "hide"
    # which of its lists of unseen classes, "none" for no split; None takes its first. PASCAL Context has two:
    # "released" is what Cascade-CLIP's released configuration amounts to, "papers" the names its paper and ZegCLIP's
    # print.
    unseen: str | None = None
    # the split that is trained on; None takes the papers' (of VOC 2012 "trainaug", the augmented set)
    train: str | None = None
    classes: Path | None = None  # the class list, of a dataset whose distribution carries it in a file of its own
    # the paper whose names of the classes are used, where it calls some otherwise (VOC: "zegformer", "maft")
    names_of: str | None = None
    # whether a class has the further words of the dataset's list beside its name, where it is judged; training takes
    # names alone. None: of the papers' datasets the names, of one's own data all words.
    synonyms: bool | None = None

    @property
    def title(self) -> str:
        """What reports call it."""
        return self.root.resolve().name if self.source == "own" else self.source

    def open(self, split: str) -> SegmentationDataset:
        """The "train" or the "val" split. Raises LexisegError if a file of it is missing or wrong."""
        dataset = self._open(split)
        return dataset.without_unseen() if split == "train" and self.unseen_pictures == "drop" else dataset

    def _open(self, split: str) -> FileDataset:
        from lexiseg.data.sets.open import open_data_set, train_split

        chosen = self.train or train_split(self.source) if split == "train" else "val"
        kept = self.model_dump(include={"unseen", "classes", "names_of", "synonyms"})
        return open_data_set(self.source, self.root, chosen, **kept)

    def vocabulary(self) -> Vocabulary:
        """The classes; the data need not be on disk where the package knows them.

        Raises LexisegError if the list of classes is on disk and cannot be read.
        """
        from lexiseg.data.sets.catalog import data_set
        from lexiseg.data.sets.open import synonyms_of

        if self.source == "own" or not data_set(self.source).classes:
            return self._open("train").vocabulary
        known = data_set(self.source).vocabulary(unseen=self.unseen, names_of=self.names_of)
        return synonyms_of(self.source, known, self.synonyms)


Data: TypeAlias = Annotated[PictureWorldData | CatalogData, Field(discriminator="source")]
