"""A picture as a class: how it is written, that it finds its like, and that it is remembered."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from lexiseg.class_forms import split_classes
from lexiseg.errors import LexisegError
from lexiseg.exemplar_vectors import read_mask
from lexiseg.exemplars import Exemplar
from lexiseg.journal import changed
from lexiseg.models import SYSTEMS, DenseCLIP
from lexiseg.segmenter import Segmenter
from lexiseg.vocabulary import Vocabulary, VocabularyClass
from tests.towers import small_clip


def scene(colour: tuple[int, int, int], left: int) -> tuple[Tensor, Tensor]:
    """A picture (3, 64, 96) with a striped square of a colour on noise, and where it is (64, 96)."""
    generator = torch.Generator().manual_seed(left)
    image = torch.randint(90, 130, (3, 64, 96), generator=generator)
    where = torch.zeros(64, 96, dtype=torch.bool)
    where[16:48, left : left + 32] = True
    stripes = (torch.arange(96) // 4 % 2)[None].expand(64, -1)
    for channel, value in enumerate(colour):
        image[channel][where] = (value * (0.5 + 0.5 * stripes))[where].long()
    return image.to(torch.uint8), where


@pytest.fixture
def files(tmp_path: Path) -> Path:
    image, where = scene((250, 20, 20), 16)
    Image.fromarray(image.permute(1, 2, 0).numpy()).save(tmp_path / "mug.png")
    Image.fromarray(where.numpy().astype(np.uint8) * 255).save(tmp_path / "mask.png")
    return tmp_path


@pytest.fixture
def segmenter(tmp_path: Path) -> Segmenter:
    return Segmenter(DenseCLIP.build(small_clip(), {"short_side": 64}), cache_dir=tmp_path / "cache")


@pytest.mark.parametrize("where", ["mask.png", "16 16 48 48"])
def test_it_finds_its_like_in_another_picture(files: Path, segmenter: Segmenter, where: str) -> None:
    classes = f"mug = photo:{files / 'mug.png'}#{files / where if where.endswith('png') else where}; sky; grass"
    other, truth = scene((250, 20, 20), 56)
    result = segmenter.predict(other, classes)
    assert result.classes == ("mug", "sky", "grass")
    found = result.label_map == 0
    inside, outside = float(found[truth].float().mean()), float(found[~truth].float().mean())
    assert inside > 0.8 and inside > outside + 0.4


def test_a_box_is_left_top_right_and_bottom() -> None:
    where = torch.zeros(20, 30, dtype=torch.bool)
    where[2:5, 8:19] = True
    image = torch.zeros(3, 20, 30, dtype=torch.uint8)
    assert torch.equal(read_mask(Exemplar("mug.png", box=[8, 2, 19, 5]), image, 1e6), where)


def test_masks_and_pictures_in_memory_may_be_of_any_layout_and_type() -> None:
    where = torch.zeros(20, 30, dtype=torch.bool)
    where[2:5, 8:19] = True
    image, array = torch.zeros(3, 20, 30, dtype=torch.uint8), where.numpy()
    arrays = (np.ascontiguousarray(array[::-1])[::-1], np.asfortranarray(array), array.astype(">i2"))
    tensors = (where.bfloat16(), where.float().requires_grad_(), where[None], where.byte()[None].repeat(3, 1, 1))
    for mask in (*arrays, *tensors):
        assert torch.equal(read_mask(Exemplar(image, mask), image, 1e6), where)
        assert Exemplar(image, mask).word == Exemplar(image, mask).word
    assert Exemplar(image.half().requires_grad_(), box=[8, 2, 19, 5]).word.endswith("#8 2 19 5")


def test_several_and_words_may_be_mixed(files: Path, segmenter: Segmenter) -> None:
    one, two = f"photo:{files / 'mug.png'}#{files / 'mask.png'}", f"photo:{files / 'mug.png'}#16 16 48 48"
    vocabulary = Vocabulary.parse(f"mug = cup, {one}, {two}; sky")
    assert vocabulary.words == ("cup", one, two, "sky") and vocabulary.names == ("mug", "sky")
    assert vocabulary.word_to_class.tolist() == [0, 0, 0, 1]
    assert [place for place, _ in vocabulary.exemplars] == [1, 2]
    assert vocabulary.with_placeholders().words == ("cup", "exemplar 0", "exemplar 1", "sky")
    assert Vocabulary.parse(vocabulary.to_dict()) == vocabulary
    assert segmenter.predict(files / "mug.png", vocabulary).label_map.shape == (64, 96)


def test_a_class_file_names_files_beside_it(files: Path) -> None:
    (files / "classes.txt").write_text("mug = photo:mug.png#mask.png\nsky\n")
    vocabulary = Vocabulary.parse(files / "classes.txt")
    assert vocabulary.exemplars[0][1].image == str(files / "mug.png")
    (files / "classes.json").write_text(json.dumps([{"name": "mug", "synonyms": ["photo:mug.png#1 2 3 4"]}, "sky"]))
    assert Vocabulary.parse(files / "classes.json").words[0] == "mug"
    assert Vocabulary.parse("mug = cup, tumbler; sky").words == ("cup", "tumbler", "sky")


def test_pictures_in_memory_serve_as_well_and_text_alone_opens_no_file(files: Path, segmenter: Segmenter) -> None:
    image, where = scene((250, 20, 20), 16)
    entry = VocabularyClass("mug", exemplars=(Exemplar(image, where),), scored=False)
    by_file = Vocabulary.parse(f"mug = photo:{files / 'mug.png'}#{files / 'mask.png'}; sky")
    other, _ = scene((250, 20, 20), 56)
    ours = segmenter.predict(other, [entry, VocabularyClass("sky")])
    mixed = segmenter.predict(other, [entry, "sky"])
    assert torch.equal(mixed.label_map, ours.label_map)
    with pytest.raises(LexisegError, match="'mug' is in memory"):
        mixed.vocabulary.save(files / "classes.json")
    assert torch.equal(ours.label_map, segmenter.predict(other, by_file).label_map)
    listed = split_classes("mug = photo:/etc/hostname#1 2 3 4")  # what a service makes of a stranger's text
    for name, synonyms in ((listed[0].name, listed[0].synonyms), ("photo:mug.png#1 2 3 4", ())):
        with pytest.raises(LexisegError, match="is a picture and needs a name"):
            VocabularyClass(name, synonyms)


def test_it_is_remembered_on_disk_until_the_picture_changes(files: Path, tmp_path: Path) -> None:
    classes = f"mug = photo:{files / 'mug.png'}#{files / 'mask.png'}; sky"
    model = DenseCLIP.build(small_clip(), {"short_side": 64})
    calls: list[int] = []
    run = model.dense_features
    model.dense_features = lambda images: calls.append(1) or run(images)  # type: ignore[func-returns-value,method-assign]
    for _ in range(2):
        Segmenter(model, cache_dir=tmp_path / "cache").predict(files / "mug.png", classes)
    assert len(calls) == 1
    image, _ = scene((20, 20, 250), 16)
    Image.fromarray(image.permute(1, 2, 0).numpy()).save(files / "mug.png")
    Segmenter(model, cache_dir=tmp_path / "cache").predict(files / "mug.png", classes)
    assert len(calls) == 2


@pytest.mark.parametrize("name", ["mug.png", "mask.png"])
def test_work_done_by_a_picture_that_changes_is_not_resumed(files: Path, segmenter: Segmenter, name: str) -> None:
    words = segmenter.vocabulary(f"mug = photo:{files / 'mug.png'}#{files / 'mask.png'}; sky")
    before = segmenter.identity(words)
    assert segmenter.identity(words) == before
    Image.new("RGB", (96, 64)).save(files / name)
    assert changed(before, segmenter.identity(words)).startswith("'exemplars.photo:")


@pytest.mark.parametrize("system", ["zegclip", "second-look"])
def test_other_patch_wise_systems_take_it(files: Path, system: str) -> None:
    model = SYSTEMS[system].build(small_clip(), {"decoder_heads": 4})
    classes = f"mug = photo:{files / 'mug.png'}#{files / 'mask.png'}; sky"
    assert Segmenter(model, disk_cache=False).predict(files / "mug.png", classes).label_map.shape == (64, 96)


def test_what_is_wrong_is_said(files: Path, segmenter: Segmenter) -> None:
    picture = files / "mug.png"
    for classes, problem in {
        f"photo:{picture}#1 2 3 4": "needs a name",
        f"mug = photo:{picture}": "a mask or a box after a #",
        f"mug = photo:{picture}#40 2 3 4": "not left, top, right, bottom",
        f"mug = photo:{picture}#0 0 96 64": "everywhere",
        f"mug = photo:{picture}#200 0 300 10": "nowhere",
        f"mug = photo:{files / 'no.png'}#1 2 3 4": "no.png",
        f"mug = photo:{picture}#1 2 3 \u00b2": "no picture '1 2 3 \u00b2'",
        f"mug = photo:{picture}#1 2 3 {'4' * 5000}": "Cannot read the picture",
    }.items():
        with pytest.raises(LexisegError, match=problem):
            segmenter.predict(picture, classes)
    Image.new("L", (5, 5), 255).save(files / "small.png")
    with pytest.raises(LexisegError, match="5 x 5 and its picture 96 x 64"):
        segmenter.predict(picture, f"mug = photo:{picture}#{files / 'small.png'}")
    with pytest.raises(LexisegError, match="a mask or a box"):
        Exemplar(picture)
