"""The papers' evaluations by name: which data, which classes are seen, how a picture is run, and what is not judged.

Two kinds. *Generalised zero-shot* (``gzs-...``): a model trained on the seen classes of a data set chooses among all of
them; mIoU over seen, over unseen, and their harmonic mean. *Cross-dataset* (``voc-20`` and so on): a model trained on
COCO-Stuff chooses among another data set's classes; one mIoU.

In all of them every pixel gets one of the data set's classes: there is no background class and no score threshold
(ZegCLIP, Cascade-CLIP, DeOP, MAFT). Pixels whose truth is no class are not judged, whatever is predicted there:

========================  =============================================================================================
data set                  values of the label file that are not judged
========================  =============================================================================================
voc2012                   0, the background, and 255, the border of objects
coco-stuff-164k           255, unlabelled
pascal-context-59         0, everything outside the 59 classes (of .mat files: the other 400 classes and 0)
pascal-context-459        0 of the .mat files; 65535 of 16-bit TIFFs made of them
ade20k-150                0, everything outside the 150 classes
ade20k-847                65535 of 16-bit TIFFs; in the full set's PNGs every class outside the 847
========================  =============================================================================================

:mod:`lexiseg.data.sets.catalog` holds these values, :class:`lexiseg.data.sets.labels.ValueTable` turns them into the
ignored label, and :class:`lexiseg.evaluation.metrics.Confusion` leaves those pixels out. Predictions are resized to the
size of the label file; labels are never resized.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lexiseg.data.sets.catalog import data_set
from lexiseg.data.sets.dataset import FileDataset
from lexiseg.data.sets.open import open_data_set
from lexiseg.errors import LexisegError
from lexiseg.evaluation.evaluate import Offsets
from lexiseg.models.base import WindowPolicy

ONE_STAGE = WindowPolicy(size=512, stride=426, short_side=512, antialias=False)
"""ZegCLIP's and Cascade-CLIP's code (mmsegmentation): sliding windows on a picture whose shorter side is 512."""

WHOLE_512 = WindowPolicy(short_side=512, long_side=2048)
"""Whole pictures, the shorter side 512, the longer at most 2048 (detectron2): DeOP; ZSSeg and ZegFormer but on COCO."""

WHOLE_512_COCO = WindowPolicy(short_side=512, long_side=2560)
"""The same with the longer side at most 2560: DeOP on COCO-Stuff."""

WHOLE_640 = WindowPolicy(short_side=640, long_side=2560)
"""Whole pictures, the shorter side 640, the longer at most 2560: MAFT on all data sets; its hosts on COCO-Stuff."""

_ONE_STAGE = dict.fromkeys(("zegclip", "cascade-clip", "spt-seg", "second-look"), ONE_STAGE)


@dataclass(frozen=True)
class Protocol:
    """An evaluation by name.

    Attributes:
        name: as a user writes it.
        title: one line for people.
        source: where the numbers come from.
        data_set: what is judged on, always its val split.
        unseen: which list of unseen classes; "none" for cross-dataset evaluations.
        offsets: which classes lose the score that a model takes off seen ones; see
            :func:`lexiseg.evaluation.evaluate.evaluate`. Across data sets all do, so that none is favoured for its
            name being among those of the training.
        windows: by system, how its authors run it over a picture. A system that is not there is run its own way.
        names: by system, whose names of the classes its authors use; see
            :attr:`lexiseg.data.sets.catalog.DataSetInfo.renamed`.
    """

    name: str
    title: str
    source: str
    data_set: str
    unseen: str
    offsets: Offsets
    windows: Mapping[str, WindowPolicy]
    names: Mapping[str, str] = field(default_factory=dict)

    def window_for(self, system: str) -> WindowPolicy | None:
        """How the authors of ``system`` run it in this protocol; None where no paper says."""
        return self.windows.get(system)

    def open(self, root: str | Path, *, system: str = "", classes: str | Path | None = None) -> FileDataset:
        """The pictures that are judged.

        Args:
            root: the data set's folder.
            system: the system that is judged, whose authors may call a class otherwise.
            classes: the class list, where the distribution does not carry one.

        Raises:
            LexisegError: files are missing; the sentence names the first.
        """
        return open_data_set(
            self.data_set, root, "val", unseen=self.unseen, classes=classes, names_of=self.names.get(system)
        )

    def card(self) -> dict[str, Any]:
        """What a report says of the protocol."""
        info = data_set(self.data_set)
        return {
            "protocol": {
                "name": self.name,
                "title": self.title,
                "source": self.source,
                "unseen_list": self.unseen,
                "not_judged": f"values {', '.join(map(str, info.void))} of the label files"
                + (" and all outside the class list" if self.data_set == "ade20k-847" else ""),
            }
        }


def _generalised(name: str, title: str, data: str, unseen: str, source: str, **windows: WindowPolicy) -> Protocol:
    return Protocol(name, f"generalised zero-shot on {title}", source, data, unseen, "data", {**_ONE_STAGE, **windows},
                    {"zegformer": "zegformer"} if data == "voc2012" else {})  # fmt: skip


def _across(name: str, title: str, data: str) -> Protocol:
    windows = {**_ONE_STAGE, "deop": WHOLE_512, "zsseg": WHOLE_512, "freeseg": WHOLE_640}
    names = {"freeseg": "maft", "zegformer": "zegformer"} if data == "voc2012" else {}
    source = "MAFT, Table 3; DeOP, Table 2; Cascade-CLIP, Table 13"
    return Protocol(name, f"cross-dataset on {title}", source, data, "none", "all", windows, names)


_PAPERS = "ZegCLIP and Cascade-CLIP (Sec. 4); DeOP, MAFT"
PROTOCOLS: Mapping[str, Protocol] = {
    protocol.name: protocol
    for protocol in (
        _generalised("gzs-voc", "PASCAL VOC 2012, 15 seen and 5 unseen classes", "voc2012", "papers", _PAPERS,
                     deop=WHOLE_512, zsseg=WHOLE_512, zegformer=WHOLE_512, freeseg=WHOLE_512),
        _generalised("gzs-coco", "COCO-Stuff 164K, 156 seen and 15 unseen classes", "coco-stuff-164k", "papers",
                     _PAPERS, deop=WHOLE_512_COCO, zsseg=WHOLE_640, zegformer=WHOLE_640, freeseg=WHOLE_640),
        _generalised("gzs-context", "PASCAL Context, unseen classes of Cascade-CLIP's released settings",
                     "pascal-context-59", "released", "Cascade-CLIP's released settings"),
        _generalised("gzs-context-papers", "PASCAL Context, unseen classes as the papers name them",
                     "pascal-context-59", "papers", "ZegCLIP, appendix E, Table 10"),
        _across("voc-20", "PASCAL VOC 2012, 20 classes", "voc2012"),
        _across("pc-59", "PASCAL Context, 59 classes", "pascal-context-59"),
        _across("pc-459", "PASCAL Context, 459 classes", "pascal-context-459"),
        _across("a-150", "ADE20K, 150 classes", "ade20k-150"),
        _across("a-847", "ADE20K, 847 classes", "ade20k-847"),
    )
}  # fmt: skip
"""All of them by name."""


def find_protocol(name: str) -> Protocol:
    """The protocol called ``name``.

    Raises:
        LexisegError: there is none of that name.
    """
    if name not in PROTOCOLS:
        near = difflib.get_close_matches(name, PROTOCOLS, n=1)
        hint = f"did you mean '{near[0]}'?" if near else f"there are {', '.join(PROTOCOLS)}."
        raise LexisegError(f"There is no protocol '{name}'; {hint}")
    return PROTOCOLS[name]
