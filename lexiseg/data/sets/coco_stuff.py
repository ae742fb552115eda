"""COCO-Stuff 164K on disk."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from lexiseg.data.sets.archive import Place, zipped
from lexiseg.data.sets.catalog import data_set
from lexiseg.data.sets.dataset import SplitFiles
from lexiseg.data.sets.labels import LabelKind
from lexiseg.data.sets.listing import by_stem, find_home, first_folder
from lexiseg.data.sets.pairing import by_folder, label_folder, plain_table, table_of, zipped_labels

_MAPS = "stuffthingmaps_trainval2017.zip"


def list_coco(root: Path, split: str, unseen: str | None) -> SplitFiles:
    """COCO-Stuff 164K: ``train`` or ``val``.

    Labels are the distribution's stuffthingmaps (values 0..181 with gaps, 255 = unlabelled), or, where they were made,
    mmsegmentation's ``*_labelTrainIds.png`` (0..170). They may lie in stuffthingmaps/, stuffthingmaps_trainval2017/,
    annotations/ or, as the archives unpack, beside the pictures in train2017/ and val2017/. Where pictures or labels
    are not unpacked, they are read out of the archives (train2017.zip, val2017.zip, stuffthingmaps_trainval2017.zip).

    Raises:
        LexisegError: ``root`` holds no such data set, or there is no list ``unseen`` of unseen classes.
    """
    info = data_set("coco-stuff-164k")
    year = {"train": "train2017", "val": "val2017"}.get(split, split)
    marks = ("images", "train2017", "val2017", "stuffthingmaps")
    home = find_home(root, ("coco_stuff164k", "coco"), marks, "COCO-Stuff 164K", ("train2017.zip", "val2017.zip"))
    packed = (home, home / "images", home / "stuffthingmaps", root)
    image_folder = first_folder((home / "images" / year, home / year), (".jpg",)) or home / "images" / year
    images: Mapping[str, Place] = by_stem(image_folder, (".jpg",))
    images = images or zipped([place / f"{year}.zip" for place in packed], year, (".jpg",))
    places = ("annotations", "stuffthingmaps", "stuffthingmaps_trainval2017", ".")
    folder = first_folder((home / place / year for place in places), (".png",)) or home / "stuffthingmaps" / year
    ending = "_labelTrainIds"
    labels = [
        label_folder(folder, (f"{ending}.png",), LabelKind.index, plain_table(info)),
        label_folder(folder, (".png",), LabelKind.index, table_of(info), without=ending),
    ]
    if not any(source.files for source in labels):
        labels.append(zipped_labels([place / _MAPS for place in packed], year, LabelKind.index, table_of(info)))
    return by_folder(info, split, unseen, images, image_folder, labels)
