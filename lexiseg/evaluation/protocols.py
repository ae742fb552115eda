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

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import BeforeValidator, Field

from lexiseg.data.sets.catalog import data_set
from lexiseg.data.sets.dataset import FileDataset
from lexiseg.data.sets.open import open_data_set, with_background
from lexiseg.errors import LexisegError
from lexiseg.evaluation.run import Offsets
from lexiseg.models.base import SegmentationModel
from lexiseg.models.dense_clip import DenseCLIP
from lexiseg.models.region_base import RegionModel
from lexiseg.strict import StrictModel
from lexiseg.templates import TEMPLATE_SETS
from lexiseg.windows import WindowPolicy
from lexiseg.words import near_names

Sentences = Annotated[tuple[str, ...], BeforeValidator(TEMPLATE_SETS.__getitem__)]


class Protocol(StrictModel):
    """An evaluation by name."""

    name: str  # as a user writes it
    title: str  # one line for people
    source: str  # where the numbers come from
    data_set: str  # what is evaluated on, always its val split
    unseen: str = "none"  # which list of unseen classes; "none" for cross-dataset evaluations
    # by system, how its authors run it over a picture. A system that is not there is run its own way.
    windows: dict[str, WindowPolicy]
    # by system, whose names of the classes its authors use; see :attr:`lexiseg.data.sets.catalog.DataSetInfo.renamed`
    names: dict[str, str] = Field(default_factory=dict)
    # by system, the sentences its authors put the words into here. A system that is not there has its own, and one with
    # learned prompts uses none.
    templates: dict[str, Sentences] = Field(default_factory=dict)
    # by system, how regions are shown and scored here where its authors do it otherwise than in training; see
    # `RegionModelOptions`, whose ``crops`` and ``ensemble`` no weight depends on
    settings: dict[str, dict[str, dict[str, Any]]] = Field(default_factory=dict)
    # what a class is called, and on whose word
    words: str = "the names alone, as the authors' code puts them into sentences; this dataset has no synonyms"
    # further words of one more class, "background", which is the label files' 0; None where that is not evaluated
    background: tuple[str, ...] | None = None
    benchmark: str = ""  # what the training-free papers' settings call it; none where they have none

    @property
    def seen_split(self) -> bool:
        """Whether classes count as seen and unseen; across datasets they do not."""
        return self.unseen != "none"

    @property
    def offsets(self) -> Offsets:
        """Which classes lose the score that a model takes off seen ones, see :func:`run_evaluation`: those of the data.

        Across datasets none does, and none counts as seen in an ensemble of two opinions, so that none is favoured for
        its name being among those of the training: there the authors' code knows of no seen class either (ZSSeg,
        FreeSeg, MAFT), or takes the score off all, which changes no label (ZegCLIP, Cascade-CLIP).
        """
        return "data" if self.seen_split else "none"

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
        list, where the distribution does not carry one. ``synonyms``: whether classes have further words; None is no,
        as in all protocols. Raises LexisegError if files are missing; the sentence names the first. Or synonyms are
        asked for and there are none.
        """
        names = self.names.get(system)
        data = open_data_set(
            self.data_set, root, "val", unseen=self.unseen, classes=classes, names_of=names, synonyms=bool(synonyms)
        )
        return data if self.background is None else with_background(data, self.background)

    def card(self, *, synonyms: bool | None = None, settings: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """What a report says of the protocol.

        ``synonyms``: whether classes have further words. ``settings``: what :meth:`set_up` changed.
        """
        info = data_set(self.data_set)
        void = [value for value in info.void if value or self.background is None]
        outside = {
            "pascal-context-59": "; of .mat files all outside the 59 classes",
            "ade20k-847": " in TIFFs; all outside the class list",
        }
        return {
            "protocol": {
                "name": self.name,
                "title": self.title,
                "source": self.source,
                "unseen_list": self.unseen,
                "class_list": info.source,
                "not_judged": f"values {', '.join(map(str, void))} of the label files" + outside.get(self.data_set, ""),
                "synonyms": bool(synonyms),
                "words": f"chosen by the user; the protocol has {self.words}" if synonyms else self.words,
                "settings": dict(settings or {}),
            }
        }


PROTOCOLS: Mapping[str, Protocol] = {
    name: Protocol(name=name, **values)
    for name, values in yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text("utf-8"))["protocols"].items()
}
"""All of them by name."""


def find_protocol(name: str) -> Protocol:
    """The protocol called ``name``. Raises LexisegError if there is none of that name."""
    if name not in PROTOCOLS:
        raise LexisegError(f"There is no protocol '{name}'; {near_names(name, PROTOCOLS)}")
    return PROTOCOLS[name]
