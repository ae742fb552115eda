"""The papers' evaluations by name: which data, which classes are seen, how a picture is run, and what is not evaluated.

Two kinds. *Generalised zero-shot* (``gzs-...``): a model trained on the seen classes of a dataset chooses among all of
them; mIoU over seen, over unseen, and their harmonic mean. *Cross-dataset* (``voc-20`` and so on): a model trained on
COCO-Stuff chooses among another dataset's classes; one mIoU.

In all of them every pixel gets one of the dataset's classes: there is no background class and no score threshold
(ZegCLIP, Cascade-CLIP, DeOP, MAFT), but for ``voc-20b``, in which VOC's background is a class. Pixels whose truth is no
class are not evaluated, whatever is predicted there:

========================  =============================================================================================
dataset                  values of the label file that are not evaluated
========================  =============================================================================================
voc2012                   0, the background, and 255, the border of objects
coco-stuff-164k           255, unlabelled
pascal-context-59         0, everything outside the 59 classes, and 255; of .mat files 0 and the other 400 classes
pascal-context-459        0 and 65535 of the .mat files; 65535 of 16-bit TIFFs; in both 255 is a class like any other
ade20k-150                0, everything outside the 150 classes, and 255
ade20k-847                65535 of 16-bit TIFFs, where 255 is a class like any other; in the full set's PNGs every class
                          outside the 847
========================  =============================================================================================

:mod:`lexiseg.data.sets.catalog` holds these values, :class:`lexiseg.data.sets.labels.ValueTable` turns them into the
ignored label, and :class:`lexiseg.evaluation.metrics.Confusion` leaves those pixels out. Predictions are resized to the
size of the label file; labels are never resized.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from lexiseg.clip.templates import IN_THE_SCENE
from lexiseg.data.sets.catalog import data_set
from lexiseg.data.sets.dataset import FileDataset
from lexiseg.data.sets.open import open_data_set, with_background
from lexiseg.errors import LexisegError
from lexiseg.evaluation.run import Offsets
from lexiseg.models.base import SegmentationModel
from lexiseg.models.dense_clip import DenseCLIP
from lexiseg.models.region_base import RegionModel
from lexiseg.vocabulary import PAPER_TEMPLATES, SINGLE_TEMPLATE
from lexiseg.windows import WindowPolicy
from lexiseg.words import near_names

ONE_STAGE = WindowPolicy(size=512, stride=426, short_side=512, antialias=False)
"""ZegCLIP's and Cascade-CLIP's code (mmsegmentation): sliding windows on a picture whose shorter side is 512."""

WHOLE_512 = WindowPolicy(short_side=512, long_side=2048)
"""Whole pictures, the shorter side 512, the longer at most 2048 (detectron2): DeOP; ZSSeg and ZegFormer but on COCO."""

WHOLE_512_COCO = WindowPolicy(short_side=512, long_side=2560)
"""The same with the longer side at most 2560: DeOP on COCO-Stuff."""

WHOLE_640 = WindowPolicy(short_side=640, long_side=2560)
"""Whole pictures, the shorter side 640, the longer at most 2560: MAFT everywhere; its base models on COCO-Stuff."""

_ONE_STAGE = ("zegclip", "cascade-clip", "spt-seg", "second-look")
_HOSTS_512: Mapping[str, WindowPolicy] = dict.fromkeys(("deop", "zsseg", "zegformer"), WHOLE_512)

_BARE = "the names alone, as the authors' code puts them into sentences; this dataset has no synonyms"
_OWN_LIST = "the names as labels.txt has them; what the authors used is not known"
_FIRST = (
    "the first word of each line of objectInfo150.txt; whether the authors used its synonyms is not known, and "
    "synonyms adds them"
)
_WHOLE = (
    "all words of a class as one name, such as 'building, edifice', as in the code of DeOP and ZSSeg; ZegFormer splits "
    "it at the commas and takes the mean of the words' vectors"
)
_BACKGROUND = (
    "the names alone; 'background' is also what PASCAL Context's 59 classes have beyond these 20, as CAT-Seg's paper "
    "says, whose own list of words is not at hand"
)
_WORDS = {"pascal-context-459": _OWN_LIST, "ade20k-150": _FIRST, "ade20k-847": _WHOLE}

# ZegCLIP and Cascade-CLIP print their templates for these three datasets; no paper does for the others.
_ONE_STAGE_TEMPLATES: Mapping[str, tuple[str, ...]] = {
    "voc2012": SINGLE_TEMPLATE,
    "coco-stuff-164k": PAPER_TEMPLATES,
    "pascal-context-59": PAPER_TEMPLATES,
}

# ZSSeg across datasets: the weight of the ensemble and the threshold of masks that are cropped, as its release has
# them. It has none for the others.
_ZSSEG_ACROSS: Mapping[str, tuple[float, float]] = {
    "pascal-context-59": (0.4, 0.5),
    "ade20k-150": (0.5, 0.4),
    "ade20k-847": (0.7, 0.3),
}


@dataclass(frozen=True)
class Protocol:
    """An evaluation by name."""

    name: str  # as a user writes it
    title: str  # one line for people
    source: str  # where the numbers come from
    data_set: str  # what is evaluated on, always its val split
    unseen: str  # which list of unseen classes; "none" for cross-dataset evaluations
    # which classes lose the score that a model takes off seen ones; see :func:`lexiseg.evaluation.run.run_evaluation`.
    # Across datasets none does, and none counts as seen in an ensemble of two opinions, so that none is favoured for
    # its name being among those of the training: there the authors' code knows of no seen class either (ZSSeg, FreeSeg,
    # MAFT), or takes the score off all, which changes no label (ZegCLIP, Cascade-CLIP).
    offsets: Offsets
    # by system, how its authors run it over a picture. A system that is not there is run its own way.
    windows: Mapping[str, WindowPolicy]
    # by system, whose names of the classes its authors use; see :attr:`lexiseg.data.sets.catalog.DataSetInfo.renamed`
    names: Mapping[str, str] = field(default_factory=dict)
    # by system, the sentences its authors put the words into here. A system that is not there has its own, and one with
    # learned prompts uses none.
    templates: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    # by system, how regions are shown and scored here where its authors do it otherwise than in training; see
    # `RegionModelOptions`, whose ``crops`` and ``ensemble`` no weight depends on
    settings: Mapping[str, Mapping[str, Mapping[str, Any]]] = field(default_factory=dict)
    synonyms: bool = False  # whether classes have further words; see :func:`lexiseg.data.sets.open.synonyms_of`
    words: str = _BARE  # what a class is called, and on whose word
    # words of one more class, "background", which is the label files' 0; none where that is not evaluated
    rest: tuple[str, ...] = ()
    benchmark: str = ""  # what the training-free papers' settings call it; none where they have none
    background: bool = False  # the label files' 0 is one more class, called "background" alone

    @property
    def seen_split(self) -> bool:
        """Whether classes count as seen and unseen; across datasets they do not."""
        return self.unseen != "none"

    def set_up(self, model: SegmentationModel) -> dict[str, Any]:
        """Let ``model`` show and score regions as its authors do in this protocol; the changes come back.

        MAFT's Table 3 is without an ensemble. ZSSeg's weights and thresholds are those of its crops, so that with MAFT,
        which makes none, its own stay.
        """
        if self.benchmark and isinstance(model, DenseCLIP):
            return model.follow(self.benchmark)
        changes = self.settings.get(model.system, {})
        if not isinstance(model, RegionModel) or (model.system == "zsseg" and model.options.maft is not None):
            return {}
        model.options = model.options.with_values(changes)
        return {key: dict(values) for key, values in changes.items()}

    def open(
        self, root: str | Path, *, system: str = "", classes: str | Path | None = None, synonyms: bool | None = None
    ) -> FileDataset:
        """The pictures that are evaluated.

        ``system``: the system that is evaluated, whose authors may name a class differently. ``classes``: the class
        list, where the distribution does not carry one. ``synonyms``: whether classes have further words; None takes
        the protocol's choice. Raises LexisegError if files are missing; the sentence names the first. Or synonyms are
        asked for and there are none.
        """
        data = open_data_set(
            self.data_set,
            root,
            "val",
            unseen=self.unseen,
            classes=classes,
            names_of=self.names.get(system),
            synonyms=self.synonyms if synonyms is None else synonyms,
        )
        return with_background(data, self.rest) if self.rest or self.background else data

    def card(self, *, synonyms: bool | None = None, settings: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """What a report says of the protocol.

        ``synonyms``: the choice, where it is not the protocol's. ``settings``: what :meth:`set_up` changed.
        """
        info = data_set(self.data_set)
        void = [value for value in info.void if value or not (self.rest or self.background)]
        outside = {
            "pascal-context-59": "; of .mat files all outside the 59 classes",
            "ade20k-847": " in TIFFs; all outside the class list",
        }
        changed = synonyms is not None and synonyms != self.synonyms
        return {
            "protocol": {
                "name": self.name,
                "title": self.title,
                "source": self.source,
                "unseen_list": self.unseen,
                "class_list": info.source,
                "not_judged": f"values {', '.join(map(str, void))} of the label files" + outside.get(self.data_set, ""),
                "synonyms": synonyms if changed else self.synonyms,
                "words": f"chosen by the user; the protocol has {self.words}" if changed else self.words,
                "settings": dict(settings or {}),
            }
        }


def _generalised(name: str, title: str, data: str, unseen: str, source: str, **windows: WindowPolicy) -> Protocol:
    templates = _one_stage_templates(data)
    if data == "coco-stuff-164k":
        # The released evaluation has one sentence where the training had eight.
        templates["zegformer"] = IN_THE_SCENE
    return Protocol(
        name,
        f"generalised zero-shot on {title}",
        source,
        data,
        unseen,
        "data",
        {**dict.fromkeys(_ONE_STAGE, ONE_STAGE), **windows},
        names={"zegformer": "zegformer"} if data == "voc2012" else {},
        templates=templates,
        words=_WORDS.get(data, _BARE),
    )


def _across(name: str, title: str, data: str, rest: tuple[str, ...] = ()) -> Protocol:
    # MAFT's released configurations have a shorter side of 640 on every dataset, and its Table 3 is by CLIP alone.
    settings: dict[str, Mapping[str, Mapping[str, Any]]] = {"freeseg": {"ensemble": {"rule": "region"}}}
    if data in _ZSSEG_ACROSS:
        weight, threshold = _ZSSEG_ACROSS[data]
        settings["zsseg"] = {"ensemble": {"weight": weight}, "crops": {"threshold": threshold}}
    return Protocol(
        name,
        f"cross-dataset on {title}",
        "CAT-Seg, Table 1" if rest else "MAFT, Table 3; DeOP, Table 2; Cascade-CLIP, Table 13; CAT-Seg, Table 1",
        data,
        "none",
        "none",
        {**dict.fromkeys(_ONE_STAGE, ONE_STAGE), **_HOSTS_512, "freeseg": WHOLE_640},
        names={"freeseg": "maft", "zegformer": "zegformer"} if data == "voc2012" else {},
        templates=_one_stage_templates(data),
        settings=settings,
        words=_BACKGROUND if rest else _WORDS.get(data, _BARE),
        rest=rest,
    )


def _training_free(benchmark: str, title: str, data: str, background: bool = False) -> Protocol:
    return replace(
        _across(f"training-free-{benchmark}", title, data),
        title=f"training-free on {title}",
        source="the released settings of SCLIP, ClearCLIP, NACLIP, ProxyCLIP and ResCLIP; ResCLIP's were chosen on the "
        "test sets",
        words="the names alone; the lists of the authors, with synonyms and words of stuff, are not at hand",
        benchmark=benchmark,
        background=background,
    )


def _one_stage_templates(data: str) -> dict[str, tuple[str, ...]]:
    return dict.fromkeys(_ONE_STAGE, _ONE_STAGE_TEMPLATES[data]) if data in _ONE_STAGE_TEMPLATES else {}


# What Context calls a table is VOC's dining table.
_BEYOND_VOC = tuple(
    name for name in data_set("pascal-context-59").classes if name not in {*data_set("voc2012").classes, "table"}
)
_PAPERS = "ZegCLIP and Cascade-CLIP (Sec. 4); DeOP, MAFT"
PROTOCOLS: Mapping[str, Protocol] = {
    protocol.name: protocol
    for protocol in (
        _generalised("gzs-voc", "PASCAL VOC 2012, 15 seen and 5 unseen classes", "voc2012", "papers", _PAPERS,
                     **_HOSTS_512, freeseg=WHOLE_512),
        _generalised("gzs-coco", "COCO-Stuff 164K, 156 seen and 15 unseen classes", "coco-stuff-164k", "papers",
                     _PAPERS, deop=WHOLE_512_COCO, zsseg=WHOLE_640, zegformer=WHOLE_640, freeseg=WHOLE_640),
        # No paper judges a decoupled system here; the sizes are those of the same pictures across datasets.
        _generalised("gzs-context", "PASCAL Context, unseen classes of Cascade-CLIP's released settings",
                     "pascal-context-59", "released", "Cascade-CLIP's released settings",
                     **_HOSTS_512, freeseg=WHOLE_640),
        _generalised("gzs-context-papers", "PASCAL Context, unseen classes as the papers name them",
                     "pascal-context-59", "papers", "ZegCLIP, Table 10; Cascade-CLIP, Table 11",
                     **_HOSTS_512, freeseg=WHOLE_640),
        # ZegFormer's sizes for all: the others' were not released.
        _generalised("gzs-ade", "ADE20K, 572 seen and 275 unseen classes", "ade20k-847", "papers",
                     "MAFT, Tables 1 and 2; the classes are ZegFormer's", **_HOSTS_512, freeseg=WHOLE_512),
        _across("voc-20", "PASCAL VOC 2012, 20 classes", "voc2012"),
        _across("voc-20b", "PASCAL VOC 2012, 20 classes and background", "voc2012", _BEYOND_VOC),
        _across("pc-59", "PASCAL Context, 59 classes", "pascal-context-59"),
        _across("pc-459", "PASCAL Context, 459 classes", "pascal-context-459"),
        _across("a-150", "ADE20K, 150 classes", "ade20k-150"),
        _across("a-847", "ADE20K, 847 classes", "ade20k-847"),
        _training_free("voc21", "PASCAL VOC 2012, 20 classes and background", "voc2012", True),
        _training_free("voc20", "PASCAL VOC 2012, 20 classes", "voc2012"),
        _training_free("pc60", "PASCAL Context, 59 classes and background", "pascal-context-59", True),
        _training_free("pc59", "PASCAL Context, 59 classes", "pascal-context-59"),
        _training_free("coco-object", "COCO, 80 things and background", "coco-object"),
        _training_free("coco-stuff", "COCO-Stuff 164K, 171 classes", "coco-stuff-164k"),
        _training_free("cityscapes", "Cityscapes, 19 classes", "cityscapes"),
        _training_free("ade20k", "ADE20K, 150 classes", "ade20k-150"),
    )
}  # fmt: skip
"""All of them by name."""


def find_protocol(name: str) -> Protocol:
    """The protocol called ``name``. Raises LexisegError if there is none of that name."""
    if name not in PROTOCOLS:
        raise LexisegError(f"There is no protocol '{name}'; {near_names(name, PROTOCOLS)}")
    return PROTOCOLS[name]
