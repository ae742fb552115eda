"""``verify`` finds every planted fault and nothing on clean data."""

from __future__ import annotations

import json
import re
import shutil
import struct
import threading
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat

from lexiseg.cli import main
from lexiseg.data.sets.labels import LabelKind, png_fault, read_values
from lexiseg.data.sets.open import open_data_set, splits_of
from lexiseg.data.sets.verify import verify
from lexiseg.errors import LexisegError
from tests.miniatures import MINIATURES, SIZE, save_index, save_picture, save_wide, values_in

VOC = "VOCdevkit/VOC2012"
NAME = "2007_000032"


@pytest.mark.parametrize("name", MINIATURES)
def test_nothing_on_clean_data(clean, name):
    found = verify(MINIATURES[name][0], clean(name), workers=1)
    assert found.findings == ()
    assert len(found.splits) == 2 and all(split.samples and split.labelled for split in found.splits)
    assert all(all(split.class_pixels) for split in found.splits) or name == "context59-mat"


def _cut(path: Path, keep: int) -> None:
    path.write_bytes(path.read_bytes()[:keep])


def _change(path: Path, old: str, new: str) -> None:
    path.write_text(path.read_text().replace(old, new))


def _edit_json(path: Path, change) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def _png(root: Path) -> Path:
    return root / VOC / "SegmentationClass" / f"{NAME}.png"


def _voc_list(root: Path, split: str = "train") -> Path:
    return root / VOC / "ImageSets" / "Segmentation" / f"{split}.txt"


def _flip_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-20] ^= 255
    path.write_bytes(bytes(data))


def _without_class(root: Path) -> None:
    for path in (root / "ADEChallengeData2016/annotations/validation").glob("*.png"):
        values = np.array(Image.open(path))
        save_index(path, np.where(values == 7, 8, values), palette=False)


def _without_tree(content) -> None:
    content["categories"] = [entry for entry in content["categories"] if entry["name"] != "tree"]
    content["annotations"] = [entry for entry in content["annotations"] if entry["category_id"] != 3]


def _first(**values):
    """Change the first annotation."""
    return lambda content: content["annotations"][0].update(values)


# Faults of own-json's annotations: what breaks their JSON, the kind `verify` must call it, and words of its sentence.
JSON_FAULTS = {
    "a category that is none": (_first(category_id=5), "unknown-id", "category_id 5"),
    "an outline that is none": (_first(segmentation=[[1, 2]]), "damaged-label", "outline"),
    "no outline": (lambda c: c["annotations"][0].pop("segmentation"), "wrong-record", "annotation 0"),
    "an image listed twice": (lambda c: c["images"].append(c["images"][0]), "duplicate-entry", "val0.jpg"),
    "two images of one id": (lambda c: c["images"].append({**c["images"][0], "file_name": "other.jpg"}),
                             "duplicate-entry", "gives two images the id"),
    "a category without a name": (lambda c: c["categories"][0].update(name=" "), "wrong-record", "ids and names"),
    "images that are no list": (lambda c: c.update(images=3), "wrong-record", "not COCO-style JSON"),
    "annotations that are no list": (lambda c: c.update(annotations=5), "wrong-record", "not COCO-style JSON"),
    "a category_id that is a list": (_first(category_id=[7]), "unknown-id", "a list"),
    "an image_id that is a list": (_first(image_id=[0]), "wrong-record", "annotation 0"),
    "an id that is a list": (lambda c: c["images"][0].update(id=[0]), "wrong-record", "entry 0 of images"),
    "a picture of a billion pixels": (lambda c: c["images"][0].update(height=10**6, width=10**6), "wrong-record",
                                      "entry 0 of images"),
    "an outline of another size": (lambda c: c["annotations"][2]["segmentation"].update(size=[10**6, 10**6]),
                                   "damaged-label", "outline"),
    "an outline without end": (_first(segmentation=[[0, 0, 1e300, 0, 0, 1e300]]), "damaged-label", "outline"),
    "an outline of no picture": (lambda c: c["annotations"].append({**c["annotations"][0], "image_id": 12}),
                                 "wrong-record", "1 image_id of annotations, such as 12, so"),
    "other categories": (_without_tree, "class-list", "class 0 is 'tree' in one and 'cat' in the other"),
}  # fmt: skip

# Each fault: the miniature, what breaks it, the kind `verify` must call it, and words of its sentence.
FAULTS = {
    "a picture is missing": ("voc2012", lambda r: (r / VOC / f"JPEGImages/{NAME}.jpg").unlink(),
                             "missing-picture", NAME),
    "a label is missing": ("voc2012", lambda r: _png(r).unlink(), "missing-label", NAME),
    "another size": ("voc2012", lambda r: save_index(_png(r), values_in(range(21), 0, (48, 36))),
                     "size-mismatch", NAME),
    "an unknown id": ("voc2012", lambda r: save_index(_png(r), values_in(range(22), 0)), "unknown-id", "the value 21"),
    "a colour mask": ("voc2012", lambda r: Image.open(_png(r)).convert("RGB").save(_png(r)), "color-label", "mode RGB"),
    "a 16-bit mask": ("voc2012", lambda r: save_wide(_png(r), values_in(range(21), 0)), "wide-label", "16-bit"),
    "a class without a pixel": ("ade150", _without_class, "empty-class", "'road'"),
    "a corrupt picture": ("voc2012", lambda r: _cut(r / VOC / f"JPEGImages/{NAME}.jpg", 300), "damaged-picture", NAME),
    "a picture that is text": (
        "coco-stuff",
        lambda r: (r / "images/val2017/000000000101.jpg").write_text("<html>not found</html>"),
        "damaged-picture",
        "000000000101",
    ),
    "a name listed twice": ("voc2012", lambda r: _voc_list(r).write_text(f"{NAME}\n{NAME}\n2007_000039\n"),
                            "duplicate-entry", "twice"),
    "a truncated PNG": ("voc2012", lambda r: _cut(_png(r), 200), "damaged-label", NAME),
    "a PNG without its end": ("coco-stuff", lambda r: _cut(p := r / "stuffthingmaps/val2017/000000000101.png",
                                                            p.stat().st_size - 12), "damaged-label", "truncated"),
    "a flipped byte": ("coco-stuff", lambda r: _flip_byte(r / "stuffthingmaps/val2017/000000000101.png"),
                       "damaged-label", "000000000101"),
    "a list of another name": ("voc2012", lambda r: _voc_list(r, "val").rename(_voc_list(r, "validation")),
                               "missing-list", "validation.txt"),
    "an empty list": ("voc2012", lambda r: _voc_list(r, "val").write_text("\n"), "empty-list", "val.txt"),
    "a name that leads outside": ("voc2012", lambda r: _voc_list(r).write_text(f"../{NAME}\n2007_000039\n"),
                                  "wrong-name", "leads outside"),
    "judged and trained on": ("voc2012", lambda r: _voc_list(r).write_text(f"{NAME}\n2007_000033\n"),
                              "split-overlap", "2007_000033"),
    "an empty file": ("ade150", lambda r: (r / "ADEChallengeData2016/annotations/validation/ADE_val_00000001.png")
                      .write_bytes(b""), "empty-file", "ADE_val_00000001"),
    "a label without a picture": ("ade150", lambda r: (
        r / "ADEChallengeData2016/images/training/ADE_train_00000002.jpg").unlink(),
                                  "label-without-picture", "ADE_train_00000002"),
    "a missing folder": ("ade150", lambda r: shutil.rmtree(r / "ADEChallengeData2016/images/validation"),
                         "missing-folder", "validation"),
    "another list of objects": ("ade150", lambda r: _change(r / "ADEChallengeData2016/objectInfo150.txt", "building",
                                                            "castle"), "class-list", "'castle' where 'building'"),
    "a label with nothing": ("coco-stuff", lambda r: save_index(r / "stuffthingmaps/val2017/000000000101.png",
                                                                np.full(SIZE, 255)), "empty-label", "000000000101"),
    "an id of COCO's gaps": ("coco-stuff", lambda r: save_index(r / "stuffthingmaps/train2017/000000000001.png",
                                                                values_in([0, 11], 0)), "unknown-id", "the value 11"),
    "another MATLAB file": ("context459", lambda r: savemat(r / "VOCdevkit/VOC2010/trainval/2008_000003.mat",
                                                            {"Other": np.zeros((3, 3), np.uint8)}),
                            "damaged-label", "'LabelMap'"),
    "no list of classes": ("context459", lambda r: (r / "VOCdevkit/VOC2010/labels.txt").unlink(), "class-list",
                           "labels.txt"),
    "too few classes": ("ade847", lambda r: (r / "ADE20K_2021_17_01/classes.json").write_text('["a", "b"]'),
                        "class-list", "847 classes"),
    "a class named twice": ("own-folders", lambda r: (r / "classes.txt").write_text("cat\ntree\nsky\nCat\n"),
                            "class-list", "twice"),
    "an unseen class that is none": ("own-folders", lambda r: (r / "unseen.txt").write_text("dog\n"), "class-list",
                                     "'dog'"),
    "an unknown colour": ("own-colors", lambda r: Image.new("RGB", SIZE[::-1], (1, 2, 3))
                          .save(r / "masks/val/val0.png"), "unknown-color", "#010203"),
    "ids instead of colours": ("own-colors", lambda r: save_index(r / "masks/val/val0.png", values_in(range(3), 0)),
                               "index-label", "single numbers"),
    "JSON of no split": ("own-json", lambda r: _unnamed(r), "missing-list", "a.json' says no split"),
    "synonyms that are no texts": ("own-folders", lambda r: _classes(r, "- {name: cat, synonyms: [[4]]}\n- a\n- b"),
                                   "class-list", "a list of texts"),
    "a link to itself": ("own-folders", lambda r: _loop(r / "images/photo 1.jpg"), "damaged-picture", "photo 1"),
    "a file for a folder": ("voc2012", lambda r: _file_for(r / VOC / "JPEGImages"), "missing-folder", "is a file"),
    "two pictures of a name": ("own-folders", lambda r: save_picture(r / "images/photo 1.png", 1), "duplicate-entry",
                               "photo 1.jpg and photo 1.png"),
    "two masks of a name": ("own-folders", lambda r: save_index(r / "masks/photo 1.tif", values_in([0, 1], 1)),
                            "duplicate-entry", "photo 1.png and photo 1.tif"),
    "no seen class": ("own-folders", lambda r: (r / "unseen.txt").write_text("sky\ntree\ncat\n"), "class-list",
                      "every class"),
    "a synonym that is a class": ("own-folders", lambda r: (r / "classes.txt").write_text("cat\ntree, cat\nsky\n"),
                                  "class-list", "the word 'cat' to 'tree'"),
    "a mask that is a JPEG": ("own-folders", lambda r: (r / "masks/photo 1.png").rename(r / "masks/photo 1.jpg"),
                              "missing-label", "'photo 1.jpg' is there, but JPEG"),
    "a mask that is an array": ("own-folders", lambda r: (r / "masks/photo 1.png").rename(r / "masks/photo 1.npy"),
                                "missing-label", "'photo 1.npy' is there, but labels of this kind"),
    "a list with a name and its ending": ("own-folders", lambda r: _lists(r, "photo 0\nphoto 0.jpg\nphoto 1"),
                                          "duplicate-entry", "'photo 0' twice"),
    "a label beside its picture": ("ade847-full", lambda r: next(r.rglob("ADE_val_00000001_seg.png")).unlink(),
                                   "missing-label", "urban/street0/ADE_val_00000001_seg.png"),
    "a turned picture": ("own-folders", lambda r: _turned(r / "images/photo 0.jpg"), "open-orientation", "'exif: raw'"),
    "no class file": ("own-folders", lambda r: (r / "classes.txt").unlink(), "class-list", "classes.txt"),
    "a list that is no text": ("own-folders", lambda r: (r / "unseen.txt").write_bytes(b"\xff\xfe\x00"), "missing-list",
                               "unseen.txt"),
    "a name too long for a file": ("own-folders", lambda r: _lists(r, "x" * 5000), "wrong-name", "train.txt"),
    "a name from the root": ("own-folders", lambda r: _lists(r, "/etc/passwd"), "wrong-name", "leads outside"),
    "a picture too narrow": ("own-folders", lambda r: _narrow(r), "odd-proportions", "photo 0"),
}  # fmt: skip


# Faults and kinds of which only `verify` knows: what it compares with other splits, and what no decoder minds.
UNREAD = ("split-overlap", "odd-proportions", "other categories", "a PNG without its end")


def _turned(path: Path) -> None:
    """Programs that ignore the camera's orientation draw the label for the picture on its side."""
    with Image.open(path) as picture:
        exif = picture.getexif()
        exif[0x0112] = 6
        picture.copy().save(path, exif=exif)


def _narrow(root: Path) -> None:
    save_picture(root / "images/photo 0.jpg", 0, (1, 40))
    save_index(root / "masks/photo 0.png", values_in([0, 1], 0, (1, 40)))


def _unnamed(root: Path) -> None:
    (root / "annotations/instances_val.json").rename(root / "annotations/a.json")
    (root / "annotations/instances_train.json").rename(root / "annotations/b.json")


def _classes(root: Path, text: str) -> None:
    (root / "classes.txt").unlink()
    (root / "classes.yaml").write_text(text)


def _loop(path: Path) -> None:
    path.unlink()
    path.symlink_to(path)


def _file_for(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.write_text("")


def _lists(root: Path, train: str) -> None:
    (root / "train.txt").write_text(f"{train}\n")
    (root / "val.txt").write_text("photo 2\n")


@pytest.mark.parametrize("fault", [*FAULTS, *JSON_FAULTS])
def test_planted_faults(clean, tmp_path, fault):
    name, plant, kind, words = FAULTS.get(fault) or ("own-json", *JSON_FAULTS[fault])
    root = tmp_path / "data"
    shutil.copytree(clean(name), root)
    if fault in JSON_FAULTS:
        _edit_json(root / "annotations/instances_val.json", plant)
    else:
        plant(root)
    found = verify(MINIATURES[name][0], root, workers=1)
    kinds = {finding.kind for finding in found.findings}
    assert kind in kinds, found.findings
    finding = next(finding for finding in found.findings if finding.kind == kind)
    assert words in f"{finding.sample} {finding.problem}"
    assert "\n" not in finding.problem and finding.problem.rstrip().endswith((".", "?"))
    # Nothing is called wrong that is not; a fault may leave a class without a pixel or a sample without its partner.
    follows = {"missing-list": {"split-overlap"}, "label-without-picture": {"missing-label"}}
    assert kinds - {kind} <= follows.get(kind, set()) | {"empty-class"}, found.findings
    # What makes a training fail fails where its data are opened or read, with the same words.
    if finding.severity == "error" and kind not in UNREAD and fault not in UNREAD:
        with pytest.raises(LexisegError) as caught:
            for split in splits_of(MINIATURES[name][0], root):
                list(open_data_set(MINIATURES[name][0], root, split))
        assert str(caught.value) in {one.problem for one in found.errors} or "file" in kind


def test_there_are_twenty_kinds():
    assert len(FAULTS) >= 20 and len({found[-2] for found in (*FAULTS.values(), *JSON_FAULTS.values())}) >= 20


def test_several_faults_at_once(clean, tmp_path):
    """Many faults in one folder hide none of each other."""
    root = tmp_path / "data"
    shutil.copytree(clean("voc2012"), root)
    (root / VOC / "JPEGImages/2008_000002.jpg").write_bytes(b"")
    save_index(_png(root), values_in(range(30), 0))
    save_index(root / VOC / "SegmentationClass/2007_000039.png", values_in(range(21), 0, (10, 10)))
    Image.open(p := root / VOC / "SegmentationClass/2007_000033.png").convert("RGB").save(p)
    _cut(root / VOC / "SegmentationClass/2007_000042.png", 100)
    found = verify("voc2012", root, workers=3)
    assert [(f.kind, f.sample) for f in found.errors] == [
        ("unknown-id", NAME),
        ("size-mismatch", "2007_000039"),
        ("empty-file", "2008_000002"),
        ("color-label", "2007_000033"),
        ("damaged-label", "2007_000042"),
    ]
    with pytest.raises(LexisegError, match="colours"):
        open_data_set("voc2012", root, "val")[0]


def test_voc_without_augmentation_is_a_warning(clean, tmp_path):
    shutil.copytree(clean("voc2012") / "VOCdevkit", tmp_path / "VOCdevkit")
    found = verify("voc2012", tmp_path, workers=1)
    assert [(f.kind, f.severity) for f in found.findings] == [("no-augmented-labels", "warning")]
    assert [split.split for split in found.splits] == ["train", "val"]
    missing = verify("voc2012", tmp_path / "missing")
    assert [finding.kind for finding in missing.findings] == ["missing-folder"]


def test_a_folder_that_may_not_be_read_is_a_finding(clean, monkeypatch):
    def refused(folder):
        raise PermissionError(13, "Permission denied", str(folder))

    roots = {name: clean(name) for name in ("voc2012", "coco-stuff", "ade847-full", "own-folders", "own-json")}
    monkeypatch.setattr("os.scandir", refused)
    for name, root in roots.items():
        findings = verify(MINIATURES[name][0], root, workers=1).findings
        assert findings and all("Permission denied" in finding.problem for finding in findings), findings
        with pytest.raises(LexisegError, match="Permission denied"):
            open_data_set(MINIATURES[name][0], root, "val")


def test_splits_share_what_is_said_once(clean, tmp_path):
    root = tmp_path / "my"
    shutil.copytree(clean("own-folders"), root)
    (root / "classes.txt").write_text("cat\ntree, cat\nsky\n")
    found = verify("own", root, workers=1).findings
    assert [(finding.kind, finding.severity) for finding in found] == [("class-list", "warning")]
    assert open_data_set("own", root, "val").vocabulary.classes[1].synonyms == ()


def test_no_outline_belongs_to_any_picture(clean, tmp_path):
    """Some pictures may be left out on purpose; ids of which none fits are a fault."""
    for chosen, severity in (([0], "warning"), ([0, 1], "error")):
        root = tmp_path / severity
        shutil.copytree(clean("own-json"), root)
        _edit_json(
            root / "annotations/instances_val.json",
            lambda c: [entry.update(image_id="x") for entry in c["annotations"] if entry["image_id"] in chosen],  # noqa: B023
        )
        found = {finding.kind: finding.severity for finding in verify("own", root, splits=["val"], workers=1).findings}
        empty = {"empty-label": "warning"} if severity == "warning" else {"no-labels": "error"}
        assert found == {"wrong-record": severity, **empty}


def test_ids_as_programs_write_them(clean, tmp_path):
    """The same ids as text and as fractions without a remainder."""
    root = tmp_path / "my"
    shutil.copytree(clean("own-json"), root)

    def change(content) -> None:
        for entry in content["annotations"]:
            entry.update(image_id=str(entry["image_id"]), category_id=float(entry["category_id"]))

    _edit_json(root / "annotations/instances_val.json", change)
    assert verify("own", root, workers=1).findings == ()


def test_png_fault(tmp_path):
    path = tmp_path / "a.png"
    save_index(path, values_in(range(5), 0))
    assert png_fault(path) is None
    data = path.read_bytes()
    for damaged, says in ((data[:-12], "truncated"), (data[:-13] + b"x" + data[-12:], "IDAT")):
        (tmp_path / "b.png").write_bytes(damaged)
        assert says in (png_fault(tmp_path / "b.png") or "")
    (tmp_path / "c.jpg").write_bytes(b"no PNG")
    assert png_fault(tmp_path / "c.jpg") is None


def test_labels_up_to_the_own_limit_are_read(tmp_path, monkeypatch):
    path = tmp_path / "a.png"
    save_index(path, values_in(range(5), 0))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)  # Pillow's own is below ours
    assert read_values(path, LabelKind.index).shape == SIZE and png_fault(path) is None


def test_a_mask_of_too_many_pixels_among_colour_masks_is_a_finding(tmp_path):
    save_picture(tmp_path / "images" / "a.png", 0)
    save_index(tmp_path / "masks" / "a.png", values_in([0, 1], 0))
    (tmp_path / "classes.csv").write_text("name,r,g,b\ncat,255,0,0\n")
    (tmp_path / "val.txt").write_text("a\n")
    path = tmp_path / "masks" / "a.png"
    data = bytearray(path.read_bytes())
    data[16:24] = struct.pack(">II", 30_000, 30_000)
    data[29:33] = struct.pack(">I", zlib.crc32(bytes(data[12:29])))
    path.write_bytes(bytes(data))
    found = verify("own", tmp_path, splits=["val"], workers=1).findings
    assert any("more than 200 megapixels" in one.problem for one in found)


def test_reading_labels_in_threads_leaves_the_warnings_as_they_were(tmp_path, monkeypatch):
    path = tmp_path / "a.png"
    save_index(path, values_in(range(5), 0))
    inside = [threading.Event(), threading.Event()]

    def first_in_first_out(*_: object) -> Image.Image:
        second = inside[0].is_set()
        inside[second].set()
        assert second or inside[1].wait(10)
        if second:
            first.join(10)
        return Image.new("L", (4, 4))

    monkeypatch.setattr("lexiseg.data.sets.labels.open_header", first_in_first_out)
    before = list(warnings.filters)
    first, second = (threading.Thread(target=read_values, args=(path, LabelKind.index)) for _ in range(2))
    first.start()
    assert inside[0].wait(10)
    second.start()
    second.join(10)
    assert list(warnings.filters) == before


def test_command(clean, tmp_path, capsys):
    root = tmp_path / "my"
    shutil.copytree(clean("own-folders"), root)
    assert main(["data", "verify", str(root)]) == 0
    out = capsys.readouterr().out
    assert "0 errors, 0 warnings" in out and "own, 3 classes" in out
    checks = verify("own", root, workers=1).splits
    shares = [check.ignored / (check.ignored + check.labelled) for check in checks]
    assert re.findall(r"([\d.]+) %", out) == [f"{100 * share:.1f}" for share in shares] and max(shares) > 0.01
    (root / "masks" / "photo 1.png").unlink()
    assert main(["data", "verify", "own", str(root), "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["kinds"] == {"missing-label": 1} and found["findings"][0]["sample"] == "photo 1"
    assert found["splits"][1]["class_pixels"] and found["classes"] == ["cat", "tree", "sky"]
    assert main(["data", "verify", "own", str(root), "--split", "val"]) == 0
    assert main(["data", "verify", "voc2012"]) == 2
    assert "needs its folder" in capsys.readouterr().err
    assert main(["data", "verify", "voc2112", str(root)]) == 2


def test_what_keeps_both_splits_from_being_listed_is_said_once(tmp_path: Path) -> None:
    save_picture(tmp_path / "images" / "a.png", 0)
    save_index(tmp_path / "masks" / "a.png", values_in([0, 1], 0))
    (tmp_path / "classes.txt").write_text("cat\ntree\n")
    (tmp_path / "train.txt").write_text("a\n")
    (tmp_path / "unseen.txt").write_text("zebra\n")
    (finding,) = verify("own", tmp_path).findings
    assert finding.kind == "class-list" and "'zebra'" in finding.problem
