from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageFont
from pycocotools import mask as coco

from lexiseg.errors import LexisegError
from lexiseg.label_ids import ignore_index
from lexiseg.overlay import LegendEntry, draw_legend
from lexiseg.segmentation import Segmentation
from lexiseg.vocabulary import Vocabulary

LABELS = torch.tensor([[0, 0, 2, 2], [0, 0, 2, 255]])


def small(**options: object) -> Segmentation:
    fields: dict = {
        "label_map": LABELS,
        "vocabulary": Vocabulary.parse("cat; tree, bush; sky").with_seen(["cat", "tree"]),
        "scores": torch.tensor([[1.0, 0.5, 0.25, 0.25], [0.5, 0.0, 0.25, -3.0]]),
        "image": torch.arange(24, dtype=torch.uint8).view(3, 2, 4),
        "name": "a.png",
        "metadata": {"model": "test"},
    }
    return Segmentation(**(fields | options))


def test_fractions_in_the_legend_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    entries: list[LegendEntry] = []
    monkeypatch.setattr("lexiseg.segmentation.draw_legend", lambda image, found, **_: entries.extend(found) or image)
    small().overlay()
    assert entries[-1].text.startswith("(no class)") and sum(one.fraction for one in entries) == pytest.approx(1.0)


def test_facts() -> None:
    result = small()
    assert result.label_map.dtype == torch.uint8
    assert result.classes == ("cat", "tree", "sky")
    assert result.size == (2, 4) and result.ignore_index == 255 and result.num_ignored == 1
    assert result.mask("sky").tolist() == (LABELS == 2).tolist()
    assert result.mask(1).sum() == 0
    assert result.mask(np.uint8(2)).sum() == 3  # as np.unique(label_map) gives it
    for wrong, said in (("dog", "no class"), (3, "no class"), (-1, "at least 0")):
        with pytest.raises(LexisegError, match=said):
            result.mask(wrong)


def test_table() -> None:
    rows = small().table()
    assert [(row.name, row.seen, row.fraction, row.score, row.index) for row in rows] == [
        ("cat", True, 0.5, 0.5, 0),
        ("sky", False, 0.375, 0.25, 2),
    ]
    halves = small(scores=torch.full((2, 4), 0.5, dtype=torch.bfloat16))
    assert halves.scores is not None and halves.scores.dtype == torch.float32 and halves.table()[0].score == 0.5
    everything = small(scores=None).table(include_absent=True)
    assert [(row.name, row.fraction, row.score) for row in everything] == [
        ("cat", 0.5, None),
        ("sky", 0.375, None),
        ("tree", 0.0, None),
    ]


def test_segments_have_the_shape_of_the_hugging_face_pipeline() -> None:
    segments = small().segments
    assert [(segment["label"], segment["score"]) for segment in segments] == [("cat", 0.5), ("sky", 0.25)]
    mask = segments[0]["mask"]
    assert isinstance(mask, Image.Image) and mask.mode == "L" and mask.size == (4, 2)
    assert np.asarray(mask).tolist() == [[255, 255, 0, 0], [255, 255, 0, 0]]


def test_wrong_parts_are_refused() -> None:
    for label in (7, 256, -1, 2**32):  # the last three would be classes, or ignored, in fewer bits
        with pytest.raises(LexisegError, match="outside the 3 classes"):
            small(label_map=torch.full((2, 4), label))
    with pytest.raises(LexisegError, match="a list and a Vocabulary"):
        small(label_map=[[0, 1]])
    for shape in ((3, 3), (1, 2, 4)):
        with pytest.raises(LexisegError, match=r"scores must have the shape \(2, 4\)"):
            small(scores=torch.zeros(shape))
    for shape in ((3, 3, 3), (1, 2, 4), (2, 4), (2, 4, 3)):
        with pytest.raises(LexisegError, match=r"image must have the shape \(3, 2, 4\)"):
            small(image=torch.zeros(shape, dtype=torch.uint8))
    with pytest.raises(LexisegError, match=r"image must be uint8, not torch\.float32"):
        small(image=torch.zeros(3, 2, 4))
    for wrong in (torch.zeros(2, 4), torch.zeros(1, 2, 4, dtype=torch.int64), torch.zeros(0, 4, dtype=torch.int64)):
        with pytest.raises(LexisegError, match="label map"):
            small(label_map=wrong)


@pytest.mark.parametrize("num_classes", [1, 255, 256, 65_535, 65_536])
def test_ids_and_ignored_pixels_never_meet(num_classes: int, tmp_path: Path) -> None:
    ignored = ignore_index(num_classes)
    assert ignored >= num_classes
    vocabulary = Vocabulary.parse([f"c{index}" for index in range(num_classes)])
    labels = torch.tensor([[0, num_classes - 1, ignored]])
    result = Segmentation(labels, vocabulary)
    assert result.label_map.tolist() == labels.tolist()
    assert result.num_ignored == 1
    if num_classes > 65_535:
        with pytest.raises(LexisegError, match="PNG"):
            result.save_png(tmp_path / "a.png")
        return
    with Image.open(result.save_png(tmp_path / "a.png")) as saved:
        assert saved.mode == ("P" if num_classes <= 255 else "I;16")
        assert np.asarray(saved).tolist() == labels.tolist()
        if num_classes == 255:
            palette = np.array(saved.getpalette()).reshape(-1, 3)
            assert palette[:255].tolist() == result.palette().tolist()
    assert result.overlay().mode == "RGB"


def test_overlay_without_a_legend_has_the_pictures_pixels() -> None:
    result = small(vocabulary=Vocabulary.parse("cat; tree", background="sky"))
    plain = result.overlay(alpha=0, legend=False)
    assert np.array_equal(np.asarray(plain), result.image.permute(1, 2, 0).numpy())  # type: ignore[union-attr]
    covered = np.asarray(result.overlay(alpha=1, legend=False))
    assert covered[0, 0].tolist() == result.palette()[0].tolist()
    assert covered[0, 2].tolist() == result.image[:, 0, 2].tolist()  # type: ignore[index]
    assert small(image=None).overlay(legend=False).size == (4, 2)
    with pytest.raises(LexisegError, match="alpha"):
        result.overlay(alpha=2)
    with pytest.raises(LexisegError, match="font"):
        result.overlay(font="missing.ttf")


@pytest.mark.parametrize("size", [(1, 1), (1, 700), (700, 1), (60, 80), (200, 90), (90, 200)])
@pytest.mark.parametrize("num_classes", [1, 3, 200])
def test_overlay_with_a_legend_holds_the_picture(size: tuple[int, int], num_classes: int) -> None:
    names = [f"class {index} " + "long " * (index % 30) for index in range(num_classes)]
    labels = torch.arange(size[0] * size[1]).view(size) % num_classes
    image = torch.randint(0, 256, (3, *size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    drawn = Segmentation(labels, Vocabulary.parse(names).with_seen(names[::2]), image=image).overlay(outlines=False)
    height, width = size
    assert drawn.width > width or drawn.height > height
    bare = Segmentation(labels, Vocabulary.parse(names), image=image).overlay(legend=False, outlines=False)
    left = (drawn.width - width) // 2 if drawn.height > height else 0
    assert np.array_equal(np.asarray(drawn)[:height, left : left + width], np.asarray(bare))
    assert drawn.width <= max(width, 2000) + 700 and drawn.height <= max(height, 700) + 700


def test_the_legend_can_be_read() -> None:
    face = ImageFont.load_default(14)
    drawn = draw_legend(Image.new("RGB", (300, 300)), [LegendEntry("cat", (255, 255, 255), 0.5)])
    panel = np.asarray(drawn)[:, 300:].astype(int).sum(axis=2)
    assert panel.min() < 200 and panel.max() > 740  # dark ink on a light panel
    assert drawn.width - 300 > face.getlength("cat")


def test_a_fraction_is_nearer_to_its_name_than_to_the_next_colour() -> None:
    entries = [LegendEntry("leaves", (255, 0, 0), 0.59), LegendEntry("grass", (0, 0, 255), 0.41)]
    panel = np.asarray(draw_legend(Image.new("RGB", (1500, 60)), entries))[60:].astype(int)
    second = int((panel == (0, 0, 255)).all(axis=2).any(axis=0).argmax())
    (inked,) = np.nonzero((panel.sum(axis=2) < 600).any(axis=0))
    gaps = np.diff(inked[inked <= second])
    assert gaps[-2:].max() > 1.5 * gaps[:-2].max()


def test_a_large_picture_gets_large_letters() -> None:
    labels = torch.zeros(1500, 2500, dtype=torch.uint8)
    labels[:, 1200:] = 1
    result = Segmentation(labels, Vocabulary.parse("cat; dog"))
    drawn = result.overlay()
    assert drawn.height - 1500 > 80
    outline = np.asarray(drawn)[750, 1195:1203].astype(int).sum(axis=1)
    assert (outline > 620).sum() >= 2


def test_at_a_prompt_it_is_one_line() -> None:
    assert repr(small()) == "<Segmentation of 4 x 2 pixels: cat 50%, sky 38%>"
    assert repr(small(label_map=torch.full((2, 4), 255))) == "<Segmentation of 4 x 2 pixels: no class>"
    assert len(repr(small(vocabulary=Vocabulary.parse(f"class {number}" for number in range(847))))) < 100


def test_json() -> None:
    value = json.loads(small().to_json(masks=True))
    assert value["height"] == 2 and value["width"] == 4
    assert value["metadata"] == {"model": "test"} and value["name"] == "a.png"
    assert value["ignored_fraction"] == 0.125
    assert [segment["label"] for segment in value["segments"]] == ["cat", "sky"]
    assert np.array_equal(coco.decode(value["segments"][0]["segmentation"]), LABELS.numpy() == 0)
    assert Vocabulary.from_dict(value["vocabulary"]) == small().vocabulary
    assert "segmentation" not in small().to_dict()["segments"][0]


def test_save(tmp_path: Path) -> None:
    paths = small().save(tmp_path / "new" / "folder", "photo", ("labels", "overlay", "json", "coco"))
    assert sorted(path.name for path in (tmp_path / "new" / "folder").iterdir()) == [
        "photo.json",
        "photo_coco.json",
        "photo_labels.png",
        "photo_overlay.png",
    ]
    with Image.open(paths["labels"]) as saved:
        assert np.array_equal(np.asarray(saved), LABELS.numpy())
    assert Segmentation.from_coco(json.loads(paths["coco"].read_text())).label_map.tolist() == LABELS.tolist()
    for stem in ("", "..", "a/b", "a\0"):
        with pytest.raises(LexisegError, match="file name"):
            small().save(tmp_path, stem)
    with pytest.raises(LexisegError, match="Unknown output 'pdf'"):
        small().save(tmp_path, "a", ("pdf",))
    (tmp_path / "file").touch()
    with pytest.raises(LexisegError, match="folder"):
        small().save(tmp_path / "file", "a")
    with pytest.raises(LexisegError, match=r"\.png"):
        small().save_png(tmp_path / "a.jpg")
    with pytest.raises(LexisegError, match="Cannot write"):
        small().save_png(tmp_path / "missing" / "a.png")


def test_a_coco_picture_that_is_not_there_is_named() -> None:
    dataset = small().to_coco()
    with pytest.raises(LexisegError, match="has 0 pictures with the id 5; give the id of one"):
        Segmentation.from_coco(dataset, 5)
    with pytest.raises(LexisegError, match="there is no category with the id 1"):
        Segmentation.from_coco({**dataset, "categories": []})
