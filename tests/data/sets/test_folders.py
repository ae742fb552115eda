"""Folders in VOC's layout: what it reads, and one sentence naming the file for each thing that can be wrong."""

import base64
import io
import json

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from lexiseg.data.base import SegmentationDataset, remap_to_seen, seen_ids, unseen_ids
from lexiseg.data.sets.labels import UNKNOWN, LabelKind, ValueTable, read_values
from lexiseg.data.sets.open import open_data_set
from lexiseg.data.sets.verify import verify
from lexiseg.errors import LexisegError
from tests import miniatures
from tests.data.sets.test_layouts import LABEL, SIZE, labelme, yolo


def open_voc_folder(root, split):
    return open_data_set("own", root, split)


CLASSES = "cat\ntree, bush\nsky\n"


def save_label(path, ids, mode="P"):
    picture = Image.fromarray(np.asarray(ids, np.uint8))
    if mode == "P":
        picture.putpalette(bytes(range(255, -1, -1)) * 3)
    picture.save(path)


@pytest.fixture
def root(tmp_path):
    for folder in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "classes.txt").write_text(CLASSES)
    (tmp_path / "unseen.txt").write_text("SKY\n")
    (tmp_path / "ImageSets/Segmentation/val.txt").write_text("one\n\ntwo\n")
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 255, (4, 6, 3), np.uint8)).save(tmp_path / "JPEGImages/one.jpg")
    Image.fromarray(rng.integers(0, 255, (5, 3, 3), np.uint8)).save(tmp_path / "JPEGImages/two.png")
    save_label(tmp_path / "SegmentationClass/one.png", np.arange(24).reshape(4, 6) % 3)
    two = np.full((5, 3), 255)
    two[0] = [0, 1, 2]
    save_label(tmp_path / "SegmentationClass/two.png", two, mode="L")
    return tmp_path


def test_reads_palette_indices(root):
    data = open_voc_folder(root, "val")
    assert isinstance(data, SegmentationDataset) and len(data) == 2 and data.names == ("one", "two")
    sample = data[0]
    assert sample.image.shape == (3, 4, 6) and sample.image.dtype == torch.uint8
    assert sample.label.dtype == torch.int64 and torch.equal(sample.label, torch.arange(24).reshape(4, 6) % 3)
    assert data[1].label[0].tolist() == [0, 1, 2] and (data[1].label[1:] == 255).all()
    assert data.vocabulary.names == ("cat", "tree", "sky")
    assert seen_ids(data.vocabulary) == [0, 1] and unseen_ids(data.vocabulary) == [2]


def test_without_unseen_nothing_is_flagged(root):
    (root / "unseen.txt").unlink()
    vocabulary = open_voc_folder(root, "val").vocabulary
    assert seen_ids(vocabulary) == [] and unseen_ids(vocabulary) == []


def test_a_split_without_its_list_is_one_mistake(root):
    found = verify("own", root, splits=["test"]).findings
    assert [(one.kind, one.split) for one in found] == [("missing-list", "test")]


def test_ones_own_data_has_one_list_of_unseen_classes(root):
    assert unseen_ids(open_data_set("own", root, "val", unseen="none").vocabulary) == []
    with pytest.raises(LexisegError, match="no list 'papers' of unseen classes but"):
        open_data_set("own", root, "val", unseen="papers")


def test_the_class_file_may_flag_unseen_classes_itself(root):
    (root / "unseen.txt").unlink()
    (root / "classes.txt").write_text('[{"name": "cat"}, {"name": "tree", "seen": false}, {"name": "sky"}]')
    vocabulary = open_voc_folder(root, "val").vocabulary
    assert seen_ids(vocabulary) == [0, 2] and unseen_ids(vocabulary) == [1]
    (root / "unseen.txt").write_text("sky\n")
    vocabulary = open_voc_folder(root, "val").vocabulary
    assert seen_ids(vocabulary) == [0] and unseen_ids(vocabulary) == [1, 2]
    (root / "classes.txt").write_text('[{"name": "cat"}, {"name": "tree"}, {"name": "sky", "seen": true}]')
    with pytest.raises(LexisegError, match="'sky', which the class file flags as seen; fix one of them"):
        open_voc_folder(root, "val")


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda path: save_label(path, np.full((4, 6), 3)), "the value 3 "),
        (lambda path: path.write_text("hello"), "SegmentationClass/one.png"),
        (lambda path: path.unlink(), "SegmentationClass/one.png"),
    ],
)
def test_bad_samples_are_named_and_others_go_on(root, damage, words):
    data = open_voc_folder(root, "val")
    damage(root / "SegmentationClass/one.png")
    with pytest.raises(LexisegError) as caught:
        data[0]
    assert words in str(caught.value)
    assert data[1].name == "two"


def test_no_such_folder(tmp_path):
    with pytest.raises(LexisegError, match="nowhere"):
        open_voc_folder(tmp_path / "nowhere", "val")


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_any_bytes_as_a_label_are_a_label_or_a_sentence(root, data):
    path = root / "SegmentationClass/two.png"
    good = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        position = data.draw(st.integers(0, len(good) - 1))
        good[position] = data.draw(st.integers(0, 255))
    broken = root / "broken.png"
    broken.write_bytes(bytes(good[: data.draw(st.integers(0, len(good)))]))
    try:
        label = read_values(broken, LabelKind.index)
    except LexisegError as error:
        assert "broken.png" in str(error)
    else:
        assert label.ndim == 2


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=st.binary(max_size=80))
def test_any_bytes_as_a_list_are_a_sentence(root, content):
    for name in ("ImageSets/Segmentation/other.txt", "classes.txt", "unseen.txt"):
        (root / "classes.txt").write_text(CLASSES)
        (root / "unseen.txt").write_text("sky\n")
        (root / "ImageSets/Segmentation/other.txt").write_text("one\n")
        (root / name).write_bytes(content)
        try:
            assert len(open_voc_folder(root, "other")) >= 1
        except LexisegError as error:
            assert str(error)


def test_remap_to_seen():
    label = torch.tensor([[0, 1, 2], [3, 255, 2]])
    assert remap_to_seen(label, [2, 0]).tolist() == [[1, 255, 0], [255, 255, 0]]


def test_without_unseen_leaves_whole_pictures_out(tmp_path):
    root = tmp_path / "my"
    for index, values in enumerate(([0, 1], [0, 2], [1, 255], [2])):
        miniatures.save_picture(root / "images" / f"{index}.png", index)
        miniatures.save_index(root / "masks" / f"{index}.png", miniatures.values_in(values, index))
    (root / "classes.txt").write_text("cat\ntree\nsky\n")
    (root / "train.txt").write_text("0\n1\n2\n3\n")
    (root / "unseen.txt").write_text("cat\nsky\n")
    assert [sample.name for sample in open_data_set("own", root, "train").without_unseen()] == ["2"]
    (root / "train.txt").write_text("# without the second\n0\n1\n\n  # and the last\n3\n")
    with pytest.raises(LexisegError, match="nothing is left"):
        open_data_set("own", root, "train").without_unseen()
    (root / "train.txt").write_text("0\n1\n2\n3\n")
    (root / "unseen.txt").write_text("sky\n")
    assert [sample.name for sample in open_data_set("own", root, "train").without_unseen()] == ["0", "2"]


@pytest.mark.parametrize("layout", [labelme, yolo])
def test_outlines_lie_on_turned_pictures_where_the_folder_says_so(tmp_path, layout):
    layout(tmp_path)
    exif, pictures = Image.Exif(), sorted(tmp_path.rglob("*.jpg"))
    for orientation, stored in ((4, SIZE), (5, SIZE[::-1])):  # upside down; on its side
        exif[0x0112] = orientation
        for path in pictures:
            Image.new("RGB", stored[::-1]).save(path, exif=exif)
        for said, size in (("apply", SIZE), ("raw", stored)):
            (tmp_path / "lexiseg.yaml").write_text(f"exif: {said}\n")
            assert verify("own", tmp_path, workers=1).findings == ()
            sample = open_data_set("own", tmp_path, "train")[0]
            assert sample.image.shape[1:] == sample.label.shape == size
            assert size != SIZE or (sample.label.numpy() == LABEL).all()


@pytest.mark.parametrize("name", ["captions_val2017.json", "panoptic_val2017.json"])
def test_json_of_coco_without_outlines_is_named(tmp_path, name):
    miniatures.save_picture(tmp_path / "val2017/a.jpg", 0, SIZE)
    (tmp_path / "annotations").mkdir()
    (tmp_path / "annotations" / name).write_text("{}")
    with pytest.raises(LexisegError, match=rf"{name}' holds no outlines of classes; add COCO's instances_val.json"):
        open_voc_folder(tmp_path, "val")


def test_what_labelme_ignores_is_no_class(tmp_path):
    """labelme's own labels.txt begins with it."""
    labelme(tmp_path)
    (tmp_path / "labels.txt").write_text("__ignore__\n_background_\ncat\n")
    data = open_data_set("own", tmp_path, "val")
    assert data.vocabulary.names == ("_background_", "cat")
    np.testing.assert_array_equal(data[0].label.numpy(), np.where(LABEL == 255, 0, 1))


def test_a_mask_of_labelme_is_cut_at_the_edge_of_its_picture(tmp_path):
    labelme(tmp_path)
    expected = np.full(SIZE, 255)
    expected[25:, 40:] = 0
    for side in (30, 50):
        stream = io.BytesIO()
        Image.new("L", (side, 20), 255).save(stream, "PNG")
        mask = {
            "shape_type": "mask",
            "points": [[40, 25], [69, 44]],
            "mask": base64.b64encode(stream.getvalue()).decode(),
        }
        shapes = [{"label": "cat", **mask}]
        (tmp_path / "val/c.json").write_text(json.dumps({"shapes": shapes, "imagePath": "c.jpg"}))
        if side == 30:
            assert (open_data_set("own", tmp_path, "val")[0].label.numpy() == expected).all()
    with pytest.raises(
        LexisegError, match="shape 0: the outline cannot be drawn, it is damaged"
    ):  # wider than all of it
        open_data_set("own", tmp_path, "val")[0]


@pytest.mark.parametrize("far", [9, 1 << 17])
def test_values_that_stand_for_nothing_are_told_from_all_others(far):
    values = np.array([[0, 1, 2, far], [far + 1, 3, -1, 1 << 20]])
    table = ValueTable({1: 0, far: 1}, (0,), 255)
    assert table.look_up(values).tolist() == [[255, 0, UNKNOWN, 1], [UNKNOWN] * 4]
    assert ValueTable({1: 0, far: 1}, (), 255, rest_is_void=True).look_up(values).tolist() == [
        [255, 0, 255, 1],
        [255] * 4,
    ]
    assert table.with_rest(7, keep=[2]).look_up(values).tolist() == [[7, 0, 255, 1], [UNKNOWN] * 4]


def test_a_class_list_beside_the_labels_that_says_something_else_is_named(root):
    (root / "SegmentationClass/classes.txt").write_text("sky\ncat\ntree\n")
    assert any(
        "which may be those of the labels" in one.problem for one in verify("own", root, splits=["val"]).findings
    )
    (root / "SegmentationClass/classes.txt").write_text("cat\ntree\nsky\n")
    assert not any(one.kind == "class-list" for one in verify("own", root, splits=["val"]).findings)
