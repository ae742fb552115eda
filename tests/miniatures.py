"""Each dataset in miniature: a few small pictures in exactly the distribution's folders and file formats."""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy.io import savemat

from lexiseg.data.sets.catalog import data_set, voc_color

SIZE = (36, 48)  # height and width; enough pixels for each of 847 classes
WIDE = 65535
CONTEXT_459 = 459
ADE_847 = 847


def png_header(width: int, height: int) -> bytes:
    """A PNG of a few hundred bytes whose header announces so many pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")


def save_picture(path: Path, seed: int, size: tuple[int, int] = SIZE) -> None:
    """A JPEG (or what the ending says) of smooth noise."""
    path.parent.mkdir(parents=True, exist_ok=True)
    small = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), np.uint8)
    Image.fromarray(small).resize(size[::-1], Image.Resampling.BICUBIC).save(path)


def values_in(choices: Sequence[int], seed: int, size: tuple[int, int] = SIZE) -> NDArray[np.int64]:
    """A label map in which every one of ``choices`` occurs."""
    return np.random.default_rng(seed).permutation(np.resize(np.asarray(choices), size[0] * size[1])).reshape(size)


def save_index(path: Path, values: NDArray[np.integer], *, palette: bool = True) -> None:
    """An 8-bit PNG: palette indices with VOC's colours, or grey values."""
    path.parent.mkdir(parents=True, exist_ok=True)
    picture = Image.fromarray(values.astype(np.uint8))
    if palette:
        picture.putpalette(bytes(part for value in range(256) for part in voc_color(value)))
    picture.save(path)


def save_wide(path: Path, values: NDArray[np.integer]) -> None:
    """A TIFF (or PNG) of 16 bits."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(values.astype(np.uint16)).save(path)


def save_list(path: Path, names: Sequence[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{name}\n" for name in names))


def voc2012(root: Path) -> None:
    """The development kit with train and val, and SBD's release beside it."""
    home = root / "VOCdevkit" / "VOC2012"
    names = {"train": ["2007_000032", "2007_000039"], "val": ["2007_000033", "2007_000042"]}
    for split, members in names.items():
        save_list(home / "ImageSets" / "Segmentation" / f"{split}.txt", members)
        for index, name in enumerate(members):
            save_picture(home / "JPEGImages" / f"{name}.jpg", index)
            save_index(home / "SegmentationClass" / f"{name}.png", values_in([*range(21), 255], index))
    save_list(home / "ImageSets" / "Segmentation" / "trainval.txt", sorted(names["train"] + names["val"]))
    sbd = root / "benchmark_RELEASE" / "dataset"
    extra = ["2008_000002", "2008_000003"]
    save_list(sbd / "train.txt", [extra[0], names["train"][0]])
    save_list(sbd / "val.txt", [extra[1], names["val"][0]])
    for index, name in enumerate([*extra, names["train"][0], names["val"][0]]):
        save_picture(sbd / "img" / f"{name}.jpg", 10 + index)
        if name in extra:
            save_picture(home / "JPEGImages" / f"{name}.jpg", 10 + index)
        (sbd / "cls").mkdir(exist_ok=True)
        values = values_in(range(21), 10 + index).astype(np.uint8)
        inside = {"Segmentation": values, "CategoriesPresent": np.unique(values[values > 0])}
        savemat(sbd / "cls" / f"{name}.mat", {"GTcls": inside}, do_compression=True)


def voc2012_aug(root: Path) -> None:
    """The same with the augmented labels as PNGs and their list, instead of SBD's release."""
    voc2012(root)
    (root / "benchmark_RELEASE").rename(root / "unused")
    home = root / "VOCdevkit" / "VOC2012"
    extra = ["2008_000002", "2008_000003"]
    save_list(home / "ImageSets" / "Segmentation" / "aug.txt", extra)
    for index, name in enumerate(extra):
        save_index(home / "SegmentationClassAug" / f"{name}.png", values_in(range(21), index), palette=False)


def coco_stuff(root: Path) -> None:
    """Pictures in images/, the stuffthingmaps with COCO's own ids beside them."""
    ids = [*data_set("coco-stuff-164k").id_map, 255]
    for split in ("train2017", "val2017"):
        for index in range(2):
            name = f"{index + 1 + 100 * (split == 'val2017'):012d}"
            save_picture(root / "images" / split / f"{name}.jpg", index)
            save_index(root / "stuffthingmaps" / split / f"{name}.png", values_in(ids, index), palette=False)


def coco_stuff_train_ids(root: Path) -> None:
    """Pictures in images/, labels as mmsegmentation converts them, beside the maps they were made of."""
    coco_stuff(root)
    (root / "stuffthingmaps").rename(root / "annotations")
    table = np.full(256, 255)
    for value, index in data_set("coco-stuff-164k").id_map.items():
        table[value] = index
    for path in (root / "annotations").rglob("*.png"):
        ids = table[np.array(Image.open(path))]
        save_index(path.with_name(f"{path.stem}_labelTrainIds.png"), ids, palette=False)


def context_names() -> list[str]:
    known = data_set("pascal-context-59").classes
    # Names that no list has: only the 59 must be right, and in alphabetical order as in the distribution's file.
    return sorted([*known, *(f"thing{number:03d}" for number in range(CONTEXT_459 - len(known)))])


def _context_pictures(root: Path) -> tuple[Path, dict[str, list[str]]]:
    home = root / "VOCdevkit" / "VOC2010"
    names = {"train": ["2008_000002", "2008_000015"], "val": ["2008_000003", "2008_000021"]}
    for members in names.values():
        for index, name in enumerate(members):
            save_picture(home / "JPEGImages" / f"{name}.jpg", index)
    return home, names


def context59(root: Path) -> None:
    """Palette PNGs of 59 classes and background, with the lists that belong to them."""
    home, names = _context_pictures(root)
    for split, members in names.items():
        save_list(home / "ImageSets" / "SegmentationContext" / f"{split}.txt", members)
        for index, name in enumerate(members):
            save_index(home / "SegmentationClassContext" / f"{name}.png", values_in(range(60), index))


def context459(root: Path) -> None:
    """The distribution: trainval/*.mat with 16-bit LabelMap, labels.txt, and VOC's own lists of the detection task."""
    home, names = _context_pictures(root)
    lines = [f"{number}: {name}" for number, name in enumerate(context_names(), 1)]
    (home / "labels.txt").write_text("\n".join(lines) + "\n")
    (home / "trainval").mkdir()
    for split, members in names.items():
        save_list(home / "ImageSets" / "Main" / f"{split}.txt", members)
        for index, name in enumerate(members):
            values = values_in(range(CONTEXT_459 + 1), index).astype(np.uint16)
            savemat(home / "trainval" / f"{name}.mat", {"LabelMap": values}, do_compression=True)


def context459_tiff(root: Path) -> None:
    """The same as 16-bit TIFFs of class ids from 0."""
    context459(root)
    home = root / "VOCdevkit" / "VOC2010"
    (home / "trainval").rename(root / "unused")
    for split in ("train", "val"):
        for index, name in enumerate((home / "ImageSets" / "Main" / f"{split}.txt").read_text().split()):
            ids = values_in([*range(CONTEXT_459), WIDE], index)
            save_wide(home / "annotations_detectron2" / f"pc459_{split}" / f"{name}.tif", ids)


def ade150(root: Path) -> None:
    """ADEChallengeData2016 with its list of objects."""
    home = root / "ADEChallengeData2016"
    for part, short in (("training", "train"), ("validation", "val")):
        for index in range(2):
            name = f"ADE_{short}_{index + 1:08d}"
            save_picture(home / "images" / part / f"{name}.jpg", index)
            save_index(home / "annotations" / part / f"{name}.png", values_in(range(151), index), palette=False)
    info = data_set("ade20k-150")
    rows = [
        f"{number}\t0.1\t1\t1\t0\t{', '.join((name, *info.synonyms.get(name, ())))}  "
        for number, name in enumerate(info.classes, 1)
    ]
    (home / "objectInfo150.txt").write_text("\n".join(["Idx\tRatio\tTrain\tVal\tStuff\tName", *rows]) + "\n")


def _ade_classes() -> list[dict[str, object]]:
    # Ids of the full set are scattered over about 3,000; what they are does not matter to a reader.
    return [{"name": f"object {number}, thing {number}", "id": 3 * number + 1} for number in range(ADE_847)]


def ade847(root: Path) -> None:
    """16-bit TIFFs of class ids from 0, and a class list beside them."""
    home = root / "ADE20K_2021_17_01"
    for part, short in (("training", "train"), ("validation", "val")):
        for index in range(2):
            name = f"ADE_{short}_{index + 1:08d}"
            save_picture(home / "images_detectron2" / part / f"{name}.jpg", index)
            ids = values_in([*range(ADE_847), WIDE], index)
            save_wide(home / "annotations_detectron2" / part / f"{name}.tif", ids)
    (home / "classes.json").write_text(json.dumps(_ade_classes()))


def ade847_full(root: Path) -> None:
    """The full set as distributed: scenes, and colour PNGs whose red and green hold the class."""
    home = root / "ADE20K_2021_17_01"
    ids = [entry["id"] for entry in _ade_classes()]
    for part, short in (("training", "train"), ("validation", "val")):
        for index in range(2):
            folder = home / "images" / "ADE" / part / "urban" / f"street{index}"
            name = f"ADE_{short}_{index + 1:08d}"
            save_picture(folder / f"{name}.jpg", index)
            values = values_in([*(int(str(number)) for number in ids), 0, 2], index)
            instances = np.random.default_rng(index).integers(0, 256, SIZE)
            pixels = np.stack([values // 256 * 10, values % 256, instances], axis=-1).astype(np.uint8)
            Image.fromarray(pixels).save(folder / f"{name}_seg.png")
            Image.fromarray(pixels).save(folder / f"{name}_parts_1.png")
    (home / "classes.json").write_text(json.dumps(_ade_classes()))


def coco_object(root: Path) -> None:
    """COCO-Stuff's files, read with other classes."""
    coco_stuff(root)


def coco_object_made(root: Path) -> None:
    """Labels as GroupViT's script converts them."""
    coco_stuff(root)
    for path in (root / "stuffthingmaps").rglob("*.png"):
        save_index(path.with_name(f"{path.stem}_instanceTrainIds.png"), values_in(range(81), 0), palette=False)


def cityscapes(root: Path) -> None:
    """leftImg8bit and gtFine, a folder a city, with the other files that lie beside the labels."""
    for split, city in (("train", "aachen"), ("train", "bochum"), ("val", "frankfurt")):
        for index in range(2):
            frame = f"{city}_000000_{index:06d}"
            save_picture(root / "leftImg8bit" / split / city / f"{frame}_leftImg8bit.png", index)
            truth = root / "gtFine" / split / city
            save_index(truth / f"{frame}_gtFine_labelIds.png", values_in([*range(34), 255], index), palette=False)
            save_index(truth / f"{frame}_gtFine_color.png", values_in(range(34), index))
            (truth / f"{frame}_gtFine_polygons.json").write_text("{}")


def cityscapes_made(root: Path) -> None:
    """The same with the train ids that cityscapesScripts makes."""
    cityscapes(root)
    for path in (root / "gtFine").rglob("*_labelIds.png"):
        ids = values_in([*range(19), 255], 1)
        save_index(path.with_name(path.name.replace("labelIds", "labelTrainIds")), ids, palette=False)


NAMES = ["cat", "tree, bush", "sky"]


def own_folders(root: Path) -> None:
    """Pictures and masks in two folders, a class file, and no lists."""
    for index in range(6):
        save_picture(root / "images" / f"photo {index}.jpg", index)
        save_index(root / "masks" / f"photo {index}.png", values_in([0, 1, 2, 255], index), palette=index % 2 == 0)
    save_list(root / "classes.txt", NAMES)
    save_list(root / "unseen.txt", ["sky"])


def own_colors(root: Path) -> None:
    """One class a colour, splits as folders."""
    colors = {"cat": (255, 128, 0), "tree": (0, 128, 0), "sky": (0, 0, 255)}
    table = np.array([*colors.values(), (0, 0, 0)], np.uint8)
    for split in ("train", "val"):
        for index in range(2):
            save_picture(root / "images" / split / f"{split}{index}.png", index)
            (root / "masks" / split).mkdir(parents=True, exist_ok=True)
            pixels = table[values_in(range(4), index)]
            Image.fromarray(pixels).save(root / "masks" / split / f"{split}{index}.png")
    rows = [f"{name},{red},{green},{blue}" for name, (red, green, blue) in colors.items()]
    (root / "classes.csv").write_text("\n".join(["name,r,g,b", *rows]) + "\n")


def own_json(root: Path) -> None:
    """COCO-style JSON with polygons, an uncompressed run length, and a small thing before a large one."""
    height, width = SIZE
    for split in ("train", "val"):
        images, annotations = [], []
        for index in range(2):
            name = f"{split}{index}.jpg"
            save_picture(root / "images" / split / name, index)
            images.append({"id": index, "file_name": name, "height": height, "width": width})
            everything = [[0, 0, width, 0, width, height, 0, height]]
            box = [[4, 4, 20, 4, 20, 20, 4, 20]]
            column = {"size": [height, width], "counts": [height * (width - 4), height * 3, height]}
            for number, (category, outline) in enumerate(((7, box), (3, everything), (9, column))):
                annotations.append(
                    {"id": 10 * index + number, "image_id": index, "category_id": category, "iscrowd": 0,
                     "segmentation": outline}
                )  # fmt: skip
        categories = [{"id": 9, "name": "sky"}, {"id": 3, "name": "tree"}, {"id": 7, "name": "cat"}]
        (root / "annotations").mkdir(exist_ok=True)
        content = {"images": images, "annotations": annotations, "categories": categories}
        (root / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))


MINIATURES: dict[str, tuple[str, Callable[[Path], None]]] = {
    "voc2012": ("voc2012", voc2012),
    "voc2012-aug": ("voc2012", voc2012_aug),
    "coco-stuff": ("coco-stuff-164k", coco_stuff),
    "coco-stuff-train-ids": ("coco-stuff-164k", coco_stuff_train_ids),
    "coco-object": ("coco-object", coco_object),
    "coco-object-made": ("coco-object", coco_object_made),
    "cityscapes": ("cityscapes", cityscapes),
    "cityscapes-made": ("cityscapes", cityscapes_made),
    "context59": ("pascal-context-59", context59),
    "context59-mat": ("pascal-context-59", context459),
    "context459": ("pascal-context-459", context459),
    "context459-tiff": ("pascal-context-459", context459_tiff),
    "ade150": ("ade20k-150", ade150),
    "ade847": ("ade20k-847", ade847),
    "ade847-full": ("ade20k-847", ade847_full),
    "own-folders": ("own", own_folders),
    "own-colors": ("own", own_colors),
    "own-json": ("own", own_json),
}
"""By name: the dataset a miniature is of, and what writes it into a folder."""
