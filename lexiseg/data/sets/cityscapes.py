"""Cityscapes on disk."""

from __future__ import annotations

from pathlib import Path

from lexiseg.data.sets.archive import Place
from lexiseg.data.sets.catalog import DataSetInfo
from lexiseg.data.sets.dataset import SplitFiles
from lexiseg.data.sets.labels import LabelKind
from lexiseg.data.sets.listing import by_stem, find_home, folders_in
from lexiseg.data.sets.pairing import LabelFolder, by_folder, plain_table, table_of

_PICTURE = "_leftImg8bit"
_MADE, _RAW = "_gtFine_labelTrainIds", "_gtFine_labelIds"


def list_cityscapes(info: DataSetInfo, root: Path, split: str) -> SplitFiles:
    """Cityscapes: ``train`` or ``val``, with one folder per city: leftImg8bit/SPLIT/CITY and gtFine/SPLIT/CITY.

    Labels are the distribution's ``*_gtFine_labelIds.png`` (ids 0..33, of which 19 are evaluated), or, where they were
    made, ``*_gtFine_labelTrainIds.png`` (0..18, 255 = not evaluated), which come first. Raises LexisegError if ``root``
    holds no such dataset.
    """
    home = find_home(root, ("cityscapes",), ("leftImg8bit",), "Cityscapes")
    pictures, truth = home / "leftImg8bit" / split, home / "gtFine" / split
    images = _cities(pictures, _PICTURE)
    labels = [
        LabelFolder(_cities(truth, _MADE), truth, LabelKind.index, plain_table(info.num_classes), f"{_MADE}.png"),
        LabelFolder(_cities(truth, _RAW), truth, LabelKind.index, table_of(info), f"{_RAW}.png"),
    ]
    return by_folder(info, split, images, pictures, labels if labels[0].files else labels[1:])


def _cities(folder: Path, ending: str) -> dict[str, Place]:
    """The files of all cities by their frame's name, such as aachen_000000_000019."""
    found: dict[str, Place] = {}
    for city in folders_in(folder):
        found.update(by_stem(city, (f"{ending}.png", f"{ending}.jpg")))
    return dict(sorted(found.items()))
