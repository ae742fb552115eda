"""COCO-Stuff 164K and COCO-Object on disk: two sets of classes for the same pictures."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from lexiseg.data.sets.archive import Place, zipped
from lexiseg.data.sets.catalog import DataSetInfo, data_set
from lexiseg.data.sets.dataset import SplitFiles
from lexiseg.data.sets.labels import LabelKind, ValueTable
from lexiseg.data.sets.listing import by_stem, find_home, first_folder
from lexiseg.data.sets.pairing import by_folder, label_folder, plain_table, table_of, zipped_labels

_MAPS = "stuffthingmaps_trainval2017.zip"
_ENDINGS = {"coco-stuff-164k": "_labelTrainIds", "coco-object": "_instanceTrainIds"}
_THINGS = 80


def list_coco(info: DataSetInfo, root: Path, split: str) -> SplitFiles:
    """COCO-Stuff 164K or COCO-Object: ``train`` or ``val``.

    Labels are the distribution's stuffthingmaps (values 0..181 with gaps, 255 = unlabelled), or what was made of them:
    mmsegmentation's ``*_labelTrainIds.png`` (0..170) for COCO-Stuff, ``*_instanceTrainIds.png`` (0 = background, 1..80)
    for COCO-Object. Out of the stuffthingmaps, COCO-Object's background is whatever is no thing, unlabelled pixels too.
    They may lie in stuffthingmaps/, stuffthingmaps_trainval2017/, annotations/ or, as the archives unpack, beside the
    pictures in train2017/ and val2017/. Where pictures or labels are not unpacked, they are read out of the archives
    (train2017.zip, val2017.zip, stuffthingmaps_trainval2017.zip). Raises LexisegError if ``root`` holds no such data
    set.
    """
    year = {"train": "train2017", "val": "val2017"}.get(split, split)
    marks = ("images", "train2017", "val2017", "stuffthingmaps")
    home = find_home(root, ("coco_stuff164k", "coco"), marks, info.title, ("train2017.zip", "val2017.zip"))
    packed = (home, home / "images", home / "stuffthingmaps", root)
    image_folder = first_folder((home / "images" / year, home / year), (".jpg",)) or home / "images" / year
    images: Mapping[str, Place] = by_stem(image_folder, (".jpg",))
    images = images or zipped([place / f"{year}.zip" for place in packed], year, (".jpg",))
    places = ("annotations", "stuffthingmaps", "stuffthingmaps_trainval2017", ".")
    folder = first_folder((home / place / year for place in places), (".png",)) or home / "stuffthingmaps" / year
    raw = table_of(info)
    if info.name == "coco-object":
        things = list(data_set("coco-stuff-164k").id_map)[:_THINGS]
        raw = ValueTable({**dict.fromkeys(range(256), 0), **{v: i for i, v in enumerate(things, 1)}}, (), info.ignore)
    labels = [
        label_folder(folder, (f"{_ENDINGS[info.name]}.png",), LabelKind.index, plain_table(info.num_classes)),
        label_folder(folder, (".png",), LabelKind.index, raw, without=tuple(_ENDINGS.values())),
    ]
    if not any(source.files for source in labels):
        labels.append(zipped_labels([place / _MAPS for place in packed], year, raw))
    return by_folder(info, split, images, image_folder, labels)
