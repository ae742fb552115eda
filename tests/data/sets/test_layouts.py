"""The layouts people have: each gives the same pictures and the same labels, and ``verify`` has nothing to say."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from lexiseg.cli import main
from lexiseg.data.sets.open import open_data_set
from lexiseg.data.sets.verify import verify
from lexiseg.errors import LexisegError, LexisegWarning
from lexiseg.segmentation import Segmentation
from lexiseg.vocabulary import Vocabulary
from tests.miniatures import save_index, save_picture

SIZE = (32, 48)
BOX = (4, 8, 20, 24)  # left, top, right, bottom of the cat; everything else is no class
PARTS = {"train": ("a", "b"), "val": ("c", "d")}
LABEL = np.full(SIZE, 255)
LABEL[8:24, 4:20] = 0
CORNERS = [4, 8, 20, 8, 20, 24, 4, 24]


def _pictures(folder: Path, names: tuple[str, ...], ending: str = ".jpg") -> None:
    for seed, name in enumerate(names):
        save_picture(folder / f"{name}{ending}", seed, SIZE)


def _masks(folder: Path, names: tuple[str, ...], pattern: str = "{}.png", values: np.ndarray = LABEL) -> None:
    for name in names:
        save_index(folder / pattern.format(name), values, palette=False)


def _coco(names: tuple[str, ...], file_name: str = "{}.jpg") -> str:
    images = [{"id": i, "file_name": file_name.format(name), "height": SIZE[0], "width": SIZE[1]}
              for i, name in enumerate(names)]  # fmt: skip
    annotations = [{"id": 7 + i, "image_id": i, "category_id": 18, "iscrowd": 0, "segmentation": [CORNERS]}
                   for i in range(len(names))]  # fmt: skip
    return json.dumps({"images": images, "annotations": annotations, "categories": [{"id": 18, "name": "cat"}]})


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def coco_2017(root: Path) -> None:
    for split, names in PARTS.items():
        _pictures(root / f"{split}2017", names)
        _write(root / f"annotations/instances_{split}2017.json", _coco(names))
        _write(root / f"annotations/captions_{split}2017.json", "{}")
        _write(root / f"annotations/person_keypoints_{split}2017.json", "{}")


def capital_coco(root: Path) -> None:
    coco_2017(root)
    (root / "annotations").rename(root / "Annotations")


def coco_in_parts(name: str, root: Path) -> None:
    for split, names in PARTS.items():
        part = "valid" if split == "val" else split
        _pictures(root / part, names)
        _write(root / part / name.format(part), _coco(names))


def paths_of(file_name: str, root: Path) -> None:
    """JSON as it was written on another machine."""
    for split, names in PARTS.items():
        _pictures(root / "images", names)
        _write(root / f"annotations/instances_{split}.json", _coco(names, file_name))


def one_json(root: Path) -> None:
    """CVAT's export: one file for all pictures; a list says what is held back."""
    _pictures(root / "images", ("a", "b", "c", "d"))
    _write(root / "annotations/instances_default.json", _coco(("a", "b", "c", "d")))
    _write(root / "val.txt", "c\nd\n")


def _shapes(path: Path, shape: dict[str, Any] | None = None) -> None:
    shape = shape or {"label": "cat", "shape_type": "polygon", "points": np.reshape(CORNERS, (4, 2)).tolist()}
    _write(path, json.dumps({"version": "5.0", "shapes": [shape], "imagePath": f"{path.stem}.jpg", "imageData": None}))


def labelme(root: Path) -> None:
    for split, names in PARTS.items():
        _pictures(root / split, names)
        _shapes(root / split / f"{names[0]}.json")
        _shapes(root / split / f"{names[1]}.json",
                {"label": "cat", "shape_type": "rectangle", "points": [[4, 8], [20, 24]]})  # fmt: skip


def yolo(root: Path) -> None:
    text = "0 " + " ".join(str(number / (48, 32)[i % 2]) for i, number in enumerate(CORNERS)) + "\n"
    for split, names in PARTS.items():
        _pictures(root / "images" / split, names)
        for name in names:
            _write(root / "labels" / split / f"{name}.txt", text)
    _write(root / "data.yaml", "path: .\ntrain: images/train\nval: images/val\nnames:\n  0: cat\n")


def roboflow_yolo(root: Path) -> None:
    yolo(root)
    for split, part in (("train", "train"), ("val", "valid")):
        (root / part).mkdir()
        for kind in ("images", "labels"):
            (root / kind / split).rename(root / part / kind)
    (root / "images").rmdir()
    (root / "labels").rmdir()
    _write(root / "data.yaml", "train: ../train/images\nval: ../valid/images\nnc: 1\nnames: ['cat']\n")


def parts_in_kinds(root: Path) -> None:
    """``images/valid`` beside a wanted ``val``."""
    for part, names in (("Train", PARTS["train"]), ("valid", PARTS["val"])):
        _pictures(root / "images" / part, names, ".webp" if part == "valid" else ".bmp")
        _masks(root / "masks" / part, names)
    _write(root / "classes.yaml", "classes: [cat]\nignore: 255\n")


def camvid(root: Path) -> None:
    values = np.where(LABEL == 255, 11, 0)
    for split, names in PARTS.items():
        _pictures(root / split, names, ".png")
        _masks(root / f"{split}annot", names, values=values)
    _write(root / "classes.txt", "0: cat\n11: (ignore)\n")


def suffix(root: Path) -> None:
    for name in "abcd":
        _pictures(root / "images", (name,), ".tif")
        _masks(root / "masks", (name,), "{}_mask.png")
    _write(root / "val.txt", "images\\c.tif\nd.tif\n")
    _write(root / "classes.names", "cat\n")
    _write(root / "lexiseg.yaml", "ignore: 255\n")


def predicted(root: Path) -> None:
    """What `lexiseg predict -o masks` writes."""
    suffix(root)
    for name in "abcd":
        (root / f"masks/{name}_mask.png").rename(root / f"masks/{name}_labels.png")
        save_picture(root / f"masks/{name}_overlay.png", 0, SIZE)


def predicted_outlines(kind: str, root: Path) -> None:
    """What `lexiseg predict images -o .` writes."""
    _pictures(root / "images", ("a", "b", "c", "d"))
    for name in "abcd":
        Segmentation(torch.from_numpy(LABEL.astype(np.uint8)), Vocabulary.parse("cat")).save(root, name, (kind,))
    _write(root / "val.txt", "c\nd\n")


def side_by_side(root: Path) -> None:
    """Roboflow's masks: everything of a split in one folder."""
    for split, names in PARTS.items():
        _pictures(root / split, names)
        _masks(root / split, names, "{}_mask.png", np.where(LABEL == 255, 0, 1))
        _write(root / split / "_classes.csv", "Pixel Value, Class\n0, (ignore)\n1, cat\n")


def black_and_white(root: Path) -> None:
    for split, names in PARTS.items():
        _pictures(root / "images" / split, names)
        _masks(root / "masks" / split, names, values=np.where(LABEL == 255, 0, 255))
        for path in (root / "masks" / split).iterdir():
            Image.open(path).convert("RGB").save(path)  # grey values saved as colours
    _write(root / "classes.txt", "255: cat\n")


LAYOUTS: list[Callable[[Path], None]] = [
    *(
        partial(paths_of, name)
        for name in ("images\\{}.jpg", "D:\\data\\{}.jpg", "/elsewhere/{}.jpg", "../media/1/{}.jpg")
    ),
    *(partial(coco_in_parts, name) for name in ("_annotations.coco.json", "{}.json")),
    *(coco_2017, capital_coco, one_json, labelme, yolo, roboflow_yolo, parts_in_kinds, camvid, suffix),
    *(predicted, side_by_side, black_and_white),
    *(partial(predicted_outlines, "yolo"), partial(predicted_outlines, "labelme")),
]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(tmp_path: Path, layout: Callable[[Path], None]) -> None:
    layout(tmp_path)
    found = verify("own", tmp_path, workers=1)
    assert found.findings == () and [check.samples for check in found.splits] == [2, 2]
    for split, names in PARTS.items():
        data = open_data_set("own", tmp_path, split)
        assert data.names == names and data.vocabulary.names == ("cat",)
        for sample in data:
            assert sample.image.shape == (3, *SIZE)
            np.testing.assert_array_equal(sample.label.numpy(), LABEL)


def test_two_records_of_one_picture(tmp_path: Path) -> None:
    _pictures(tmp_path / "images", ("a",))
    records = json.loads(_coco(("a", "a")))
    records["images"][0]["file_name"], records["images"][1]["file_name"] = "/here/a.jpg", "/there/a.jpg"
    _write(tmp_path / "annotations/instances_train.json", json.dumps(records))
    (finding,) = verify("own", tmp_path, splits=["train"], workers=1).errors
    assert finding.kind == "duplicate-entry" and "'/there/a.jpg' twice" in finding.problem


def test_outside_of_outlines_is_background_where_there_is_such_a_class(tmp_path: Path) -> None:
    labelme(tmp_path)
    _write(tmp_path / "classes.txt", "_background_\ncat\n")
    label = open_data_set("own", tmp_path, "val")[0].label.numpy()
    np.testing.assert_array_equal(label, np.where(LABEL == 255, 0, 1))


@pytest.mark.parametrize("layout", [labelme, yolo])
def test_outlines_are_of_the_class_whose_number_or_name_they_have(
    tmp_path: Path, layout: Callable[[Path], None]
) -> None:
    layout(tmp_path)
    (tmp_path / "data.yaml").unlink(missing_ok=True)
    for text, index in (("0: dog\n1: cat\n", 1), ("1: dog\n7: cat\n", 1), ("cat\ndog\n", 0)):
        _write(tmp_path / "classes.txt", text)
        for path in (tmp_path / "labels").rglob("*.txt"):
            number = re.search(r"(\d+): cat", text)
            path.write_text(re.sub(r"^\d+", number[1] if number else "0", path.read_text()))
        label = open_data_set("own", tmp_path, "val")[0].label.numpy()
        np.testing.assert_array_equal(label, np.where(LABEL == 255, 255, index))


def test_other_shapes_of_labelme(tmp_path: Path) -> None:
    labelme(tmp_path)
    _shapes(tmp_path / "val/c.json", {"label": "cat", "shape_type": "circle", "points": [[24, 16], [34, 16]]})
    area = int((open_data_set("own", tmp_path, "val")[0].label == 0).sum())
    assert abs(area - np.pi * 100) < 15
    for shape, words in (({"shape_type": "line", "points": [[1, 2], [3, 4]]}, "is a line, which has no area"),
                         ({"points": [[1, 2]]}, "three corners need 6"), ({"points": "x"}, "damaged")):  # fmt: skip
        _shapes(tmp_path / "val/c.json", {"label": "cat", **shape})
        (finding,) = verify("own", tmp_path, splits=["val"], workers=1).errors
        assert "c.json': shape 0" in finding.problem and words in finding.problem


def test_shapes_that_were_drawn_before_the_picture_was_resized(tmp_path: Path) -> None:
    labelme(tmp_path)
    path = tmp_path / "val/c.json"
    content = json.loads(path.read_text())
    for height, width, kinds in ((32, 48, []), (48, 32, []), (None, 0, []), (64, 96, ["size-mismatch"])):
        path.write_text(json.dumps({**content, "imageHeight": height, "imageWidth": width}))
        assert [one.kind for one in verify("own", tmp_path, splits=["val"], workers=1).errors] == kinds
    with pytest.raises(LexisegError, match=r"drawn on a picture of 96 x 64 pixels, but '.*c\.jpg' has 48 x 32"):
        open_data_set("own", tmp_path, "val")[0]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("0 .5 .5 .2 .2", "is a box"),
        ("1 .1 .1 .5 .1 .5 .5", "the class 1"),
        ("0 .1 .1 .5 .1 .5", "5 coordinates, an odd number"),
        ("cat .1 .1 .5 .1 .5 .5", "not a class id"),
        ("0 10 10 50 10 50 50", "fractions of the picture"),
    ],
)
def test_lines_of_yolo_that_are_wrong(tmp_path: Path, line: str, words: str) -> None:
    yolo(tmp_path)
    (tmp_path / "labels/val/c.txt").write_text(f"\n{line}\n")
    (finding,) = verify("own", tmp_path, splits=["val"], workers=1).errors
    assert "c.txt': line 2" in finding.problem and words in finding.problem
    with pytest.raises(LexisegError) as caught:
        open_data_set("own", tmp_path, "val")[0]
    assert str(caught.value) == finding.problem


def test_an_outline_of_an_odd_number_of_coordinates_is_named(tmp_path: Path) -> None:
    coco_2017(tmp_path)
    path = tmp_path / "annotations/instances_val2017.json"
    path.write_text(path.read_text().replace("[[4, 8, 20, 8,", "[[8, 20, 8,", 1))
    (finding,) = verify("own", tmp_path, workers=1).errors
    assert "annotation 7" in finding.problem and "7 coordinates, an odd number" in finding.problem


def test_what_is_ignored_wins_over_a_class(tmp_path: Path) -> None:
    camvid(tmp_path)
    for text in ("cat\n11: (ignore)\n", "classes: [cat, b, c, d, e, f, g, h, i, j, k, Void]\nignore: [11]\n"):
        _write(tmp_path / "classes.txt", text)
        np.testing.assert_array_equal(open_data_set("own", tmp_path, "val")[0].label.numpy(), LABEL)


def test_a_class_file_that_is_passed_over_is_named(tmp_path: Path) -> None:
    camvid(tmp_path)
    _write(tmp_path / "classes.txt", "cat\n11: (ignore)\n")
    _write(tmp_path / "classes.yaml", "classes: [cat]\nignore: [11]\n")
    with warnings.catch_warnings():
        warnings.simplefilter("error", LexisegWarning)
        open_data_set("own", tmp_path, "val")
    _write(tmp_path / "classes.yaml", "classes: [dog]\nignore: [11]\n")
    _write(tmp_path / "data.yaml", "path: nothing of classes\n")
    with pytest.warns(LexisegWarning, match=r"classes\.txt' lists the classes; 'classes\.yaml' beside it") as caught:
        assert open_data_set("own", tmp_path, "val").vocabulary.names == ("cat",)
    assert len(caught) == 1
    assert [one.severity for one in verify("own", tmp_path, workers=1).findings] == ["warning"]
    with warnings.catch_warnings():
        warnings.simplefilter("error", LexisegWarning)
        open_data_set("own", tmp_path, "val", classes=tmp_path / "classes.txt")


@pytest.mark.parametrize("split", ["train", "val"])
def test_lists_that_share_a_picture_are_noted(tmp_path: Path, split: str) -> None:
    _pictures(tmp_path / "images", ("a", "b", "c"))
    _masks(tmp_path / "masks", ("a", "b", "c"), values=np.where(LABEL == 255, 1, 0))
    for name, lines in (("classes", "cat\ndog\nsky"), ("train", "a\nb\nc.jpg"), ("val", "c")):
        _write(tmp_path / f"{name}.txt", f"{lines}\n")
    with pytest.warns(LexisegWarning, match=r"train\.txt' and 'val\.txt' share 1 picture, such as 'c'"):
        open_data_set("own", tmp_path, split)


# One line a kind, in both directions.


def test_verify_speaks_once_a_kind(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    camvid(tmp_path)
    _write(tmp_path / "classes.txt", "cat\ndog\n")
    assert main(["data", "verify", str(tmp_path)]) == 1
    said = capsys.readouterr().out
    assert said.count("the value 11 in 2 of 2 labels (83.3 % of the pixels), first in") == 2
    assert "no class has it: list it as ignored or add a class" in said and "4 errors" in said
    assert main(["data", "verify", str(tmp_path), "--all"]) == 1
    assert capsys.readouterr().out.count("holds the value 11 at 1280 pixels; no class has it") == 4
    with pytest.raises(LexisegError, match="holds the value 11 at 1280 pixels; no class has it: list it as ignored"):
        open_data_set("own", tmp_path, "val")[0]


def test_black_and_white_masks_are_asked_about(tmp_path: Path) -> None:
    for classes in ("cat\n", "background\ncat\n", "0: background\n1: cat\n"):
        black_and_white(tmp_path)
        _write(tmp_path / "classes.txt", classes)
        (finding, *_) = verify("own", tmp_path, workers=1).errors
        assert finding.kind == "black-and-white" and "write '0: background' and '255: cat'" in finding.problem
        with pytest.raises(LexisegError) as caught:
            open_data_set("own", tmp_path, "train")
        assert str(caught.value) == finding.problem
    mask = next((tmp_path / "masks").rglob("*.png"))
    save_index(mask, np.arange(2).repeat(SIZE[0] * SIZE[1] // 2).reshape(SIZE))
    with pytest.raises(LexisegError, match="write '0: background' and '255: cat'"):  # one of 0 and 1 hides nothing
        open_data_set("own", tmp_path, "train")
    _write(tmp_path / "classes.txt", "0: background\n255: cat\n")
    assert sorted(open_data_set("own", tmp_path, "val")[0].label.unique().tolist()) == [0, 1]
    _write(tmp_path / "classes.txt", "background\ncat\ndog\n")
    assert len(open_data_set("own", tmp_path, "train").vocabulary) == 3
    black_and_white(tmp_path)  # alone they say nothing of three classes
    _write(tmp_path / "classes.txt", "background\ncat\ndog\n")
    with pytest.raises(LexisegError, match=r"number the 3 classes in .*, 255 being what white is, or write"):
        open_data_set("own", tmp_path, "train")
    _write(tmp_path / "lexiseg.yaml", "ignore: 255\n")
    _write(tmp_path / "classes.txt", "background\n")
    assert sorted(open_data_set("own", tmp_path, "val")[0].label.unique().tolist()) == [0, 255]


@pytest.mark.parametrize("suffix", ["png", "tif"])
@pytest.mark.parametrize("orientation", range(2, 9))
def test_the_cameras_orientation_is_asked_about(tmp_path: Path, orientation: int, suffix: str) -> None:
    raw = np.zeros((*SIZE, 3), np.uint8)
    raw[:16, 24:] = 255
    exif = Image.Exif()
    exif[0x0112] = orientation
    for name in "abcde":
        (tmp_path / "images").mkdir(exist_ok=True)
        Image.fromarray(raw).save(tmp_path / f"images/{name}.{suffix}", exif=exif)
        save_index(tmp_path / f"masks/{name}.png", (raw[..., 0] > 0).astype(int))
    _write(tmp_path / "classes.txt", "dark\nbright\n")
    finding = verify("own", tmp_path, workers=1).errors[0]
    assert finding.kind == "open-orientation" and f"({orientation})" in finding.problem
    with pytest.raises(LexisegError) as caught:
        open_data_set("own", tmp_path, "train")[0]
    assert str(caught.value) == finding.problem
    _write(tmp_path / "lexiseg.yaml", "exif: raw\n")
    assert verify("own", tmp_path, workers=1).findings == ()
    sample = open_data_set("own", tmp_path, "train")[0]
    assert ((sample.image[0] > 127).long() == sample.label).all()


def test_masks_on_the_turned_picture(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    (tmp_path / "images").mkdir()
    for name in "ab":
        Image.new("RGB", (48, 32)).save(tmp_path / f"images/{name}.jpg", exif=exif)
        save_index(tmp_path / f"masks/{name}.png", np.zeros((48, 32)))
    _write(tmp_path / "classes.txt", "cat\n")
    assert verify("own", tmp_path, workers=1).findings == ()
    assert open_data_set("own", tmp_path, "val")[0].image.shape == (3, 48, 32)


def _same_words(root: Path, split: str, kind: str) -> None:
    finding = next(finding for finding in verify("own", root, workers=1).findings if finding.kind == kind)
    with pytest.raises(LexisegError) as caught:
        open_data_set("own", root, split)
    assert str(caught.value) == finding.problem


def test_one_picture_in_all(tmp_path: Path) -> None:
    _pictures(tmp_path / "images", ("a",))
    _masks(tmp_path / "masks", ("a",))
    _write(tmp_path / "classes.txt", "cat\n")
    _write(tmp_path / "lexiseg.yaml", "ignore: 255\n")
    _same_words(tmp_path, "train", "empty-split")


def test_no_pixel_of_any_class(tmp_path: Path) -> None:
    parts_in_kinds(tmp_path)
    _masks(tmp_path / "masks/Train", PARTS["train"], values=np.full(SIZE, 255))
    (finding,) = verify("own", tmp_path, workers=1).errors
    assert finding.kind == "no-labels" and "nothing to train on" in finding.problem


def test_a_split_of_another_name(tmp_path: Path) -> None:
    parts_in_kinds(tmp_path)
    for kind in ("images", "masks"):
        (tmp_path / kind / "valid").rename(tmp_path / kind / "holdout")
    _same_words(tmp_path, "val", "missing-list")
    with pytest.raises(LexisegError, match="only Train, holdout"):
        open_data_set("own", tmp_path, "val")


def test_pictures_of_kinds_that_are_not_read_and_broken_links(tmp_path: Path) -> None:
    parts_in_kinds(tmp_path)
    (tmp_path / "images/Train/phone.heic").write_bytes(b"\0\0\0\30ftypheic")
    (tmp_path / "images/Train/gone.png").symlink_to("/nonexistent.png")
    _masks(tmp_path / "masks/Train", ("gone",))
    found = {finding.kind: finding for finding in verify("own", tmp_path, workers=1).findings}
    assert "phone.heic" in found["unread-picture"].problem and "gone.png" in found["damaged-picture"].problem
    assert len(found) == 2


def test_the_case_of_file_names_does_not_matter(tmp_path: Path) -> None:
    suffix(tmp_path)
    _write(tmp_path / "classes.names", "cat\ndog\n")
    before = open_data_set("own", tmp_path, "val")
    for name in ("classes.names", "val.txt", "lexiseg.yaml"):
        (tmp_path / name).rename(tmp_path / name.title())
    _write(tmp_path / "Unseen.TXT", "dog\n")
    after = open_data_set("own", tmp_path, "val")
    assert after.names == before.names and [entry.seen for entry in after.vocabulary.classes] == [True, False]
