"""Readers, class lists and label values of the real datasets, on their miniatures."""

from __future__ import annotations

import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image

from lexiseg.data.base import SegmentationDataset, unseen_ids
from lexiseg.data.sets.catalog import NAMES, data_set, voc_color
from lexiseg.data.sets.labels import LabelKind, read_values
from lexiseg.data.sets.open import open_data_set, splits_of, synonyms_of, with_background
from lexiseg.data.sets.verify import verify
from lexiseg.errors import LexisegError
from tests import miniatures
from tests.miniatures import ADE_847, CONTEXT_459, MINIATURES, SIZE, WIDE, save_index, save_wide, values_in


@pytest.mark.parametrize("name", NAMES)
def test_catalog(name):
    info = data_set(name)
    sizes = {"voc2012": 20, "coco-stuff-164k": 171, "coco-object": 81, "cityscapes": 19, "pascal-context-59": 59}
    sizes |= {"pascal-context-459": 459, "ade20k-150": 150, "ade20k-847": 847}
    assert info.num_classes == sizes[name]
    assert info.ignore == (255 if info.num_classes <= 255 else WIDE) and info.ignore in info.void
    assert sorted(info.id_map.values()) == list(range(info.num_classes))
    assert not set(info.void) & set(info.id_map)
    if info.classes:
        assert len(info.classes) == info.num_classes
        vocabulary = info.vocabulary()
        assert vocabulary.names == info.classes
        assert {vocabulary.names[index] for index in unseen_ids(vocabulary)} == set(info.unseen_names())
        assert info.vocabulary(unseen="none").classes[0].seen is None
    else:
        with pytest.raises(LexisegError, match="beside its pictures"):
            info.vocabulary()


def test_unseen_ids_of_the_papers():
    coco = [19, 23, 28, 29, 36, 51, 76, 88, 94, 112, 133, 136, 137, 157, 160]
    assert unseen_ids(data_set("coco-stuff-164k").vocabulary()) == coco
    # MAFT's list by COCO's category ids, which the stuffthingmaps hold less 1.
    raw = [21, 25, 33, 34, 41, 57, 87, 100, 106, 124, 145, 148, 149, 169, 172]
    assert [data_set("coco-stuff-164k").id_map[value - 1] for value in raw] == coco
    context = data_set("pascal-context-59")
    assert unseen_ids(context.vocabulary()) == [0, 2, 3, 7, 9, 13, 17, 19, 31, 37]
    assert unseen_ids(context.vocabulary(unseen="papers")) == [0, 6, 7, 14, 19, 24, 31, 33, 48, 54]
    assert unseen_ids(data_set("voc2012").vocabulary()) == [15, 16, 17, 18, 19]
    with pytest.raises(LexisegError, match="released, papers"):
        context.unseen_names("other")


def test_names_of_single_papers_and_colors():
    voc = data_set("voc2012")
    assert "potted plant" in voc.vocabulary(names_of="zegformer").names
    assert voc.vocabulary(names_of="maft").names[19] == "tv"
    assert voc.vocabulary().classes[0].color == voc_color(1) == (128, 0, 0)
    assert [voc_color(value) for value in (0, 15, 255)] == [(0, 0, 0), (192, 128, 128), (224, 224, 192)]
    words = synonyms_of("ade20k-150", data_set("ade20k-150").vocabulary(), True).words
    assert len(set(words)) == len(words) and "someone" in words
    with pytest.raises(LexisegError, match="did you mean 'voc2012'"):
        data_set("voc2021")


# What each miniature's first validation sample must be, from the values that were written.
def _expected(name: str) -> np.ndarray:
    reduced = {"voc2012": [*range(21), 255], "voc2012-aug": [*range(21), 255], "context59": range(60),
               "ade150": range(151)}  # fmt: skip
    if name in reduced:
        values = values_in(list(reduced[name]), 0)
        return np.where((values == 0) | (values == 255), 255, values - 1)
    if name.startswith("coco-stuff"):
        info = data_set("coco-stuff-164k")
        values = values_in([*info.id_map, 255], 0)
        return np.vectorize({**info.id_map, 255: 255}.get)(values)
    if name in ("context459", "context59-mat"):
        values = values_in(range(CONTEXT_459 + 1), 0)
        if name == "context459":
            return np.where(values == 0, WIDE, values - 1)
        from tests.miniatures import context_names

        names, known = context_names(), data_set("pascal-context-59").classes
        table = {0: 255, **{k + 1: known.index(n) if n in known else 255 for k, n in enumerate(names)}}
        return np.vectorize(table.get)(values)
    if name == "coco-object":
        values = values_in([*data_set("coco-stuff-164k").id_map, 255], 0)
        things = list(data_set("coco-stuff-164k").id_map)[:80]
        return np.vectorize(lambda value: things.index(value) + 1 if value in things else 0)(values)
    if name == "coco-object-made":
        return values_in(range(81), 0)
    if name == "cityscapes":
        values = values_in([*range(34), 255], 0)
        ids = data_set("cityscapes").id_map
        return np.vectorize(lambda value: ids.get(value, 255))(values)
    if name == "cityscapes-made":
        return values_in([*range(19), 255], 1)
    if name == "context459-tiff":
        return values_in([*range(CONTEXT_459), WIDE], 0)
    if name == "ade847":
        return values_in([*range(ADE_847), WIDE], 0)
    if name == "ade847-full":
        values = values_in([*(3 * number + 1 for number in range(ADE_847)), 0, 2], 0)
        return np.where(values % 3 == 1, values // 3, WIDE)
    if name == "own-folders":
        return values_in([0, 1, 2, 255], 4)
    if name == "own-colors":
        values = values_in(range(4), 0)
        return np.where(values == 3, 255, values)
    label = np.full(SIZE, 0)  # own-json: classes by category id: tree 3, cat 7, sky 9
    label[4:20, 4:20] = 1
    label[:, 44:47] = 2
    return label


@pytest.mark.parametrize("name", MINIATURES)
def test_readers(clean, name):
    data_name = MINIATURES[name][0]
    data = open_data_set(data_name, clean(name), "val")
    assert isinstance(data, SegmentationDataset) and len(data) == (1 if name == "own-folders" else 2)
    sample = data[0]
    assert sample.image.shape == (3, *SIZE) and sample.image.dtype == torch.uint8
    assert sample.label.dtype == torch.int64
    np.testing.assert_array_equal(sample.label.numpy(), _expected(name))
    train, _ = splits_of(data_name, clean(name))
    other = open_data_set(data_name, clean(name), train)
    assert not set(other.names) & set(data.names)
    assert [sample.name for sample in other] == list(other.names)
    assert other.vocabulary == data.vocabulary


def test_voc_training_is_train_and_aug(clean):
    for name in ("voc2012", "voc2012-aug"):
        assert open_data_set("voc2012", clean(name), "aug").names == ("2008_000002", "2008_000003")
        names = open_data_set("voc2012", clean(name), "trainaug").names
        assert names == ("2007_000032", "2007_000039", "2008_000002", "2008_000003")
    assert len(open_data_set("voc2012", clean("voc2012"), "trainval")) == 4
    # SBD's own picture of VOC's val split must not be trained on.
    assert "2007_000033" not in names


def test_the_home_may_be_given_itself(clean):
    root = clean("voc2012") / "VOCdevkit" / "VOC2012"
    assert len(open_data_set("voc2012", root, "trainaug")) == 4
    assert len(open_data_set("ade20k-150", clean("ade150") / "ADEChallengeData2016", "val")) == 2


def test_coco_as_its_archives_unpack(tmp_path):
    """train2017.zip and stuffthingmaps_trainval2017.zip both hold train2017/: pictures and maps side by side."""
    MINIATURES["coco-stuff"][1](tmp_path)
    for split in ("train2017", "val2017"):
        (tmp_path / "images" / split).rename(tmp_path / split)
        for path in (tmp_path / "stuffthingmaps" / split).iterdir():
            path.rename(tmp_path / split / path.name)
    (tmp_path / "stuffthingmaps" / "train2017").rmdir()
    (tmp_path / "stuffthingmaps" / "val2017").rmdir()
    data = open_data_set("coco-stuff-164k", tmp_path, "train")
    assert len(data) == 2 and not verify("coco-stuff-164k", tmp_path).findings


def test_unseen_lists_reach_the_vocabulary(clean):
    root = clean("context59")
    assert unseen_ids(open_data_set("pascal-context-59", root, "val", unseen="papers").vocabulary)[1] == 6
    assert unseen_ids(open_data_set("pascal-context-59", root, "val", unseen="none").vocabulary) == []
    assert unseen_ids(open_data_set("own", clean("own-folders"), "val").vocabulary) == [2]
    assert unseen_ids(open_data_set("own", clean("own-folders"), "val", unseen="none").vocabulary) == []


def test_seen_classes_of_ade847(tmp_path):
    """ZegFormer's list of the 572 seen classes, where it lies beside the data, says which are unseen."""
    import json

    MINIATURES["ade847"][1](tmp_path)
    names = [f"object {number}, thing {number}" for number in range(572)]
    (tmp_path / "ADE20K_2021_17_01" / "ADE20K_572_pure_class.json").write_text(json.dumps(names))
    data = open_data_set("ade20k-847", tmp_path, "val")
    assert unseen_ids(data.vocabulary) == list(range(572, 847))
    assert data.vocabulary.names[0] == "object 0, thing 0"


def test_background_as_a_class(clean):
    """VOC's 21 classes and PASCAL Context's 60; of Context's .mat files the other 400 classes are background too."""
    for name, miniature, classes in (("voc2012", "voc2012", 21), ("pascal-context-59", "context59", 60),
                                     ("pascal-context-59", "context59-mat", 60)):  # fmt: skip
        plain = open_data_set(name, clean(miniature), "val")
        data = with_background(plain, ["backdrop"])
        assert data.vocabulary.classes[-1].words == ("background", "backdrop") and len(data.vocabulary) == classes
        void = (plain.items[0].values() == 255) & (miniature != "context59-mat")
        before = plain[0].label.numpy()
        expected = np.where(before != 255, before, np.where(void, 255, classes - 1))
        np.testing.assert_array_equal(data[0].label.numpy(), expected)


def test_palette_indices_not_colors(clean):
    """The palette PNGs of VOC must not be read by their colours: 15 stays 15 and is no brightness."""
    path = next((clean("voc2012") / "VOCdevkit/VOC2012/SegmentationClass").glob("*.png"))
    with Image.open(path) as picture:
        assert picture.mode == "P" and np.array(picture.convert("L")).max() > 100
    label = open_data_set("voc2012", clean("voc2012"), "val")[0].label
    assert set(label.unique().tolist()) == {*range(20), 255}


def test_numbers_of_a_class_list_are_those_of_the_masks(tmp_path):
    """They may start anywhere; 0 has no class where no line has it."""
    root = tmp_path / "my"
    for index in range(2):
        miniatures.save_picture(root / "images" / f"{index}.png", index)
        save_index(root / "masks" / f"{index}.png", values_in([0, 1, 3, 255], index))
    (root / "classes.txt").write_text("3: sky\n1: cat\n")
    label = open_data_set("own", root, "val")[0].label.numpy()
    values = values_in([0, 1, 3, 255], 1)
    np.testing.assert_array_equal(label, np.select([values == 3, values == 1], [0, 1], 255))


@pytest.mark.parametrize("text", ["7: sky\n300: cat\n", "7: sky\n8: cat\n300: (ignore)\n"])
def test_masks_of_a_few_classes_have_16_bits_where_a_number_needs_them(tmp_path: Path, text: str) -> None:
    root = tmp_path / "my"
    for index in range(2):
        miniatures.save_picture(root / "images" / f"{index}.png", index)
        save_wide(root / "masks" / f"{index}.png", values_in([0, 7, 300, 255, 65535], index))
    (root / "classes.txt").write_text(text)
    assert not [one for one in verify("own", root, workers=1).findings if one.severity == "error"]
    values = values_in([0, 7, 300, 255, 65535], 1)
    cat = 255 if "ignore" in text else 1
    np.testing.assert_array_equal(
        open_data_set("own", root, "val")[0].label.numpy(), np.select([values == 7, values == 300], [0, cat], 255)
    )


@pytest.mark.parametrize("name", ["own-folders", "own-colors"])
def test_masks_may_be_tiff(clean, tmp_path, name):
    root = tmp_path / "data"
    shutil.copytree(clean(name), root)
    for path in (root / "masks").rglob("*.png"):
        with Image.open(path) as picture:
            picture.save(path.with_suffix(".tif"))
        path.unlink()
    assert verify("own", root, workers=1).findings == ()
    for ours, theirs in zip(open_data_set("own", root, "val"), open_data_set("own", clean(name), "val"), strict=True):
        assert torch.equal(ours.label, theirs.label)


def test_wrong_requests(tmp_path, clean):
    cases = [
        ("voc2021", tmp_path, "val", {}, "did you mean 'voc2012'"),
        ("voc2012", tmp_path / "none", "val", {}, "does not exist"),
        ("voc2012", tmp_path, "val", {}, "holds no PASCAL VOC 2012"),
        ("voc2012", clean("voc2012"), "test", {}, "no split 'test'"),
        ("voc2012", clean("voc2012"), "val", {"classes": "x.txt"}, "are known"),
        ("own", tmp_path, "val", {}, "no folder of pictures"),
        ("own", clean("own-folders"), "test", {}, "no such split"),
        ("own", clean("own-folders"), "val", {"classes": tmp_path / "no.txt"}, "does not exist"),
        ("pascal-context-59", clean("context59"), "val", {"unseen": "all"}, "released, papers"),
    ]
    for name, root, split, options, words in cases:
        with pytest.raises(LexisegError, match=words):
            open_data_set(name, root, split, **options)


@pytest.mark.parametrize("name", MINIATURES)
def test_data_sets_can_be_pickled(name: str, tmp_path: Path) -> None:
    source, make = MINIATURES[name]
    make(tmp_path)
    data = open_data_set(source, tmp_path, "val")
    again = pickle.loads(pickle.dumps(data))
    assert len(again) == len(data)
    assert torch.equal(again[0].label, data[0].label) and torch.equal(again[0].image, data[0].image)


def test_a_label_of_two_pages_is_refused_and_overviews_are_none(tmp_path: Path) -> None:
    first, second = (Image.fromarray(np.full((8, 6), value, np.uint8)) for value in (1, 2))
    first.save(tmp_path / "two.tif", save_all=True, append_images=[second])
    with pytest.raises(LexisegError, match="holds several pages; save the one that counts alone"):
        read_values(tmp_path / "two.tif", LabelKind.index)
    smaller = second.resize((3, 4))
    smaller.encoderinfo = {"tiffinfo": {ExifTags.Base.NewSubfileType.value: 1}}  # as GDAL writes overviews
    first.save(tmp_path / "overview.tif", save_all=True, append_images=[smaller])
    assert (read_values(tmp_path / "overview.tif", LabelKind.index) == 1).all()


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("compression", [None, "tiff_lzw"])
def test_the_orientation_of_a_label_in_a_tiff_turns_nothing(tmp_path, orientation, compression):
    values = np.arange(12, dtype=np.uint8).reshape(3, 4)
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    Image.fromarray(values).save(tmp_path / "label.tif", exif=exif, compression=compression)
    assert read_values(tmp_path / "label.tif", LabelKind.index).tolist() == values.tolist()
