"""Results as other tools read them: each form is read back by a tool of its own kind."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image, ImageDraw
from pycocotools import mask as coco
from pycocotools.coco import COCO

from lexiseg import formats
from lexiseg.class_forms import ListedClass
from lexiseg.class_list import read_class_list
from lexiseg.errors import LexisegError, LexisegWarning
from lexiseg.segmentation import Segmentation
from lexiseg.vocabulary import Vocabulary, VocabularyClass

NAMES = ("giraffe", "grass & <soil>", "长颈鹿", "no such thing")


def ring_with_a_dot(size: int = 40) -> np.ndarray:
    """A frame whose hole holds a square: a region with a hole, and a second region in it."""
    mask = np.zeros((size, size + 7), bool)
    mask[5:35, 6:36] = True
    mask[12:28, 12:28] = False
    mask[18:22, 18:22] = True
    return mask


def result() -> Segmentation:
    labels = np.ones((40, 47), np.uint8)
    labels[ring_with_a_dot()] = 0
    labels[:3] = 2
    labels[38:, 44:] = 255
    return Segmentation(torch.from_numpy(labels), Vocabulary.parse(list(NAMES)), name="some/where/a.png")


def painted(rings: list[list[list[float]]], shape: tuple[int, ...], scale: int = 4) -> np.ndarray:
    """Fill rings on a finer grid and sample the pixels' middles."""
    image = Image.new("L", (shape[1] * scale, shape[0] * scale))
    for ring in rings:
        layer = Image.new("L", image.size)
        ImageDraw.Draw(layer).polygon([(x * scale - 0.5, y * scale - 0.5) for x, y in ring], fill=1)
        image = Image.fromarray(np.asarray(image) ^ np.asarray(layer))
    return np.asarray(image)[scale // 2 :: scale, scale // 2 :: scale].astype(bool)


@settings(max_examples=60, deadline=None)
@given(hnp.arrays(bool, st.tuples(st.integers(1, 9), st.integers(1, 9))))
def test_exact_outlines_are_the_mask(mask: np.ndarray) -> None:
    polygons = formats.polygons_of(mask, tolerance=0)
    assert np.array_equal(painted([ring for polygon in polygons for ring in polygon], mask.shape), mask)


def test_outlines_keep_holes_and_are_simplified() -> None:
    mask = ring_with_a_dot()
    polygons = sorted(formats.polygons_of(mask), key=len)
    assert [len(polygon) for polygon in polygons] == [1, 2]
    assert sorted(map(tuple, polygons[1][0])) == [(6, 5), (6, 35), (36, 5), (36, 35)]
    rows, columns = np.mgrid[:90, :90]
    disc = (rows - 45) ** 2 + (columns - 45) ** 2 < 40**2
    (rough,), (exact,) = formats.polygons_of(disc), formats.polygons_of(disc, 0)
    assert len(rough[0]) < len(exact[0]) / 4
    overlap = painted(rough, disc.shape)
    assert (overlap & disc).sum() / (overlap | disc).sum() > 0.97
    assert formats.polygons_of(np.zeros((3, 3), bool)) == []


@pytest.mark.parametrize("tolerance", [1e2, 1e9, 1e300])
def test_a_very_large_tolerance_leaves_the_simplest_polygon(tolerance: float) -> None:
    rows, columns = np.mgrid[:90, :90]
    for mask in ((rows - 45) ** 2 + (columns - 45) ** 2 < 40**2, rows == columns, rows == 3):
        ((ring,),) = formats.polygons_of(mask, tolerance)
        assert 3 <= len(ring) <= 6
        assert (painted([ring], mask.shape) & mask).sum() >= mask.sum() / 2


@settings(max_examples=40, deadline=None)
@given(hnp.arrays(bool, st.tuples(st.integers(1, 9), st.integers(1, 9))))
def test_run_lengths_are_read_back(mask: np.ndarray) -> None:
    assert np.array_equal(coco.decode(formats.encode_rle(mask)), mask)


@pytest.mark.parametrize("instances", [(), ("giraffe",)])
def test_coco_loads_the_data_set_and_its_annotations(tmp_path: Path, instances: tuple[str, ...]) -> None:
    dataset = formats.to_coco([result(), result()], instances)
    path = tmp_path / "annotations.json"
    path.write_text(json.dumps(dataset))
    truth = COCO(str(path))
    assert [category["id"] for category in truth.loadCats(truth.getCatIds())] == [1, 2, 3, 4]
    assert len(truth.imgs) == 2 and truth.loadImgs([2])[0]["file_name"] == "a.png"
    count = 4 if instances else 3
    assert len(truth.anns) == 2 * count and sorted(truth.anns) == list(range(1, 2 * count + 1))
    labels = np.full(result().size, 255)
    for annotation in truth.loadAnns(truth.getAnnIds(imgIds=[2])):
        mask = truth.annToMask(annotation).astype(bool)
        assert annotation["area"] == mask.sum() and annotation["iscrowd"] == 0
        labels[mask] = annotation["category_id"] - 1
    assert np.array_equal(labels, result().label_map)
    detections = truth.loadRes(dataset["annotations"])
    assert len(detections.anns) == 2 * count
    with pytest.raises(LexisegError, match="no class 'girafe'"):
        formats.to_coco([result()], ["girafe"])
    back = Segmentation.from_coco(dataset, image_id=2)
    assert torch.equal(back.label_map, result().label_map) and back.classes == NAMES


def test_coco_of_others_is_read(tmp_path: Path) -> None:
    dataset = {
        "images": [{"id": 7, "file_name": "x.jpg", "width": 10, "height": 8}],
        "categories": [{"id": 3, "name": "cat"}, {"id": 90, "name": "dog"}],
        "annotations": [
            {"image_id": 7, "category_id": 90, "segmentation": [[1, 1, 6, 1, 6, 5, 1, 5]]},
            {"image_id": 7, "category_id": 3, "segmentation": {"size": [8, 10], "counts": [0, 8, 72]}},
        ],
    }
    read = Segmentation.from_coco(dataset)
    assert read.label_map[:, 0].tolist() == [0] * 8 and read.label_map[2:4, 2:5].unique().tolist() == [1]
    runs = coco.encode(np.asfortranarray(read.mask("dog").numpy().astype(np.uint8)))  # bytes
    annotation = {"image_id": 7, "category_id": 90, "segmentation": runs}
    packed = Segmentation.from_coco({**dataset, "annotations": [annotation]})
    assert torch.equal(packed.mask("dog"), read.mask("dog"))
    for change, words in (
        ({"images": []}, "0 pictures"),
        ({"categories": None}, "not a COCO dataset"),
        ({"annotations": [{"image_id": 7}]}, "not a COCO dataset"),
        ({"categories": [{"id": 3, "name": "cat"}]}, "not a COCO dataset"),
    ):
        with pytest.raises(LexisegError, match=words):
            Segmentation.from_coco({**dataset, **change})
    for outline, words in (
        ([[1, 1]], "three corners"),
        ([[1, 1, 6, 1, 6, 1e12]], "far out"),
        ([], "damaged"),
        ({"size": [9, 9], "counts": [81]}, "another size"),
        ({"size": [8, 10], "counts": [-8, 8, 80]}, "has run lengths that do not add up"),
    ):
        annotation = {"id": 5, "image_id": 7, "category_id": 3, "segmentation": outline}
        with pytest.raises(LexisegError, match=f"Annotation 5 .*{words}"):
            Segmentation.from_coco({**dataset, "annotations": [annotation]})


def test_geojson_yolo_and_labelme_cover_the_masks() -> None:
    one = result()
    features = formats.to_geojson(one, tolerance=0)["features"]
    assert [feature["properties"]["name"] for feature in features] == list(NAMES[:3])
    assert features[0]["properties"].keys() == {"id", "name", "score", "fraction"}
    rings = [ring for polygon in features[0]["geometry"]["coordinates"] for ring in polygon]
    assert all(ring[0] == ring[-1] for ring in rings)
    assert np.array_equal(painted([ring[:-1] for ring in rings], one.size), ring_with_a_dot())

    lines = [line.split() for line in formats.to_yolo(one, tolerance=0).splitlines()]
    rings = [(np.array(line[1:], float).reshape(-1, 2) * (47, 40)).tolist() for line in lines if line[0] == "0"]
    assert np.array_equal(painted(rings, one.size), ring_with_a_dot())
    assert all(0 <= float(number) <= 1 for line in lines for number in line[1:])

    label = formats.to_labelme(one, tolerance=0)
    assert (label["imagePath"], label["imageHeight"], label["imageWidth"]) == ("a.png", 40, 47)
    rings = [shape["points"] for shape in label["shapes"] if shape["label"] == "giraffe"]
    assert len(rings) == 2 and np.array_equal(painted(rings, one.size), ring_with_a_dot())


def test_thousands_of_holes_do_not_go_through_all_points_each(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each hangs on the ring by a cut, whose place a tree of points finds; only the newest are compared one by one."""
    compared, square = [0], np.square

    def counted(values: np.ndarray) -> np.ndarray:
        compared[0] += values.size
        return square(values)

    mask = np.ones((200, 200), bool)
    mask[1::3, 1::3] = False
    one = Segmentation(np.where(mask, 0, 1), Vocabulary.parse("sieve; holes"))
    monkeypatch.setattr(np, "square", counted)
    (shape,) = (shape for shape in formats.to_labelme(one, tolerance=0)["shapes"] if shape["label"] == "sieve")
    assert 0 < compared[0] < 100_000_000, compared  # all with all are well over a billion
    assert np.array_equal(painted([shape["points"]], one.size), mask)


def test_cvat_keeps_every_pixel() -> None:
    root = ElementTree.fromstring(formats.to_cvat(result()))
    labels = np.full((40, 47), 255)
    for mask in root.iter("mask"):
        left, top, width, height = (int(mask.attrib[key]) for key in ("left", "top", "width", "height"))
        runs = [int(run) for run in mask.attrib["rle"].split(",")]
        inside = np.repeat(np.arange(len(runs)) % 2 == 1, runs).reshape(height, width)
        labels[top : top + height, left : left + width][inside] = NAMES.index(mask.attrib["label"])
    assert np.array_equal(labels, result().label_map)


def test_cvat_is_xml_whatever_the_picture_is_called() -> None:
    one = replace(result(), name="esc\x1b[31m \udce9.png")
    (image,) = ElementTree.fromstring(formats.to_cvat(one).encode()).iter("image")
    assert image.attrib["name"] == r"esc\x1b[31m \xe9.png"


def test_supervision() -> None:
    pytest.importorskip("supervision")
    found = result().to_supervision(instances=["giraffe"])
    assert found.class_id.tolist() == [0, 0, 1, 2] and found.data["class_name"].tolist()[0] == "giraffe"
    assert found.mask.shape == (4, 40, 47) and found.xyxy[0].tolist() == [6, 5, 35, 34]
    empty = Segmentation(torch.full((4, 4), 255, dtype=torch.uint8), Vocabulary.parse("cat"))
    assert len(empty.to_supervision()) == 0 and formats.to_coco([empty])["annotations"] == []


def test_instances_may_be_any_names_and_nothing_else() -> None:
    names = formats.to_coco([result()], iter(["giraffe"]))["annotations"]
    assert names == formats.to_coco([result()], "giraffe")["annotations"] and len(names) == 4
    with pytest.raises(LexisegError, match="a list of class names, not None"):
        result().to_coco(None)  # type: ignore[arg-type]


def test_every_kind_is_saved(tmp_path: Path) -> None:
    kinds = ("labels", "overlay", "json", "coco", "geojson", "yolo", "labelme", "cvat", "masks")
    paths = result().save(tmp_path, "photo", kinds, instances=["giraffe"])
    assert tuple(paths) == kinds and all(path.exists() for path in paths.values())
    assert (tmp_path / "yolo" / "classes.txt").read_text(encoding="utf-8").splitlines() == list(NAMES)
    assert [path.name for path in sorted(paths["masks"].iterdir())] == [
        "000_giraffe.png",
        "001_grass-soil.png",
        "002.png",
    ]
    assert np.array_equal(np.asarray(Image.open(paths["masks"] / "000_giraffe.png")) > 0, ring_with_a_dot())
    other = Segmentation(torch.zeros((4, 4), dtype=torch.uint8), Vocabulary.parse("sky; sea"))
    Image.new("L", (4, 4)).save(paths["masks"] / "007_mine.png")  # a user's own
    with pytest.warns(LexisegWarning, match="replaced a list of other classes"):
        other.save(tmp_path, "photo", ("yolo", "masks"))
    assert (tmp_path / "yolo" / "classes.txt").read_text(encoding="utf-8") == "sky\nsea\n"
    assert sorted(path.name for path in paths["masks"].iterdir()) == ["000_sky.png", "007_mine.png"]
    with pytest.raises(LexisegError, match="no class 'cat'"):
        result().save(tmp_path, "photo", instances=["cat"])
    with pytest.raises(LexisegError, match="same classes"):
        formats.to_coco([])


@pytest.mark.parametrize(
    "names", [["a, b", "c"], ['"x"', "y"], ["red; blue", "z"], ["#tag", "w"], ["name", "cat"], ["7 up", "8 ball"]]
)
def test_the_classes_beside_yolo_are_read_as_they_are(tmp_path: Path, names: list[str]) -> None:
    labels = torch.zeros((4, 4), dtype=torch.uint8)
    Segmentation(labels, Vocabulary.parse("sky; sea")).save(tmp_path, "photo", ["yolo"])
    odd = Segmentation(labels, Vocabulary(tuple(map(VocabularyClass, names))))
    with pytest.warns(LexisegWarning, match="replaced a list of other classes"):
        odd.save(tmp_path, "photo", ["yolo"])
    odd.save(tmp_path, "other", ["yolo"])
    (listed,) = (tmp_path / "yolo").glob("classes.*")
    assert read_class_list(listed).classes == tuple(ListedClass(name, value=index) for index, name in enumerate(names))
    assert yaml.safe_load(listed.read_text(encoding="utf-8"))["names"] == dict(enumerate(names))


def test_a_notebook_shows_the_overlay() -> None:
    assert result()._repr_png_().startswith(b"\x89PNG")


def test_many_specks_cost_no_more_than_their_own_pixels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each was found in the whole picture: the time grew with the number of specks times the picture's pixels."""
    labels = np.full((60, 90), 255, np.uint8)
    labels[::4, ::3] = 0
    labels[1:3, 80:] = 0
    labels[:, 70:72] = 1  # from the head of one column to the foot of the next
    many = Segmentation(torch.from_numpy(labels), Vocabulary.parse("cat; dog"))
    masks = [mask for _, mask in formats.objects_of(many, ("cat",))]
    found = formats.to_coco([many], ("cat",))["annotations"]
    assert [one["segmentation"] for one in found] == [formats.encode_rle(mask) for mask in masks]
    assert [one["bbox"] for one in found] == [formats.bounding_box(mask) for mask in masks]
    whole, seen = formats.polygons_of, []

    def outlines(mask: np.ndarray, *given: object) -> object:
        seen.append(mask.size)
        return whole(mask, *given)  # type: ignore[arg-type]

    monkeypatch.setattr(formats, "polygons_of", outlines)
    features = formats.to_geojson(many, ("cat",))["features"]
    assert [features[0]["geometry"]["coordinates"][0][0]] == [[*whole(masks[0])[0][0], whole(masks[0])[0][0][0]]]
    assert features[0]["properties"]["fraction"] == 1 / labels.size
    assert len(seen) == len(masks) > 400 and sum(seen) < labels.size
