"""What words and folders become on their way to a model and back: names, backgrounds, templates, mistakes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from lexiseg.clip.model import CLIP
from lexiseg.errors import LexisegError
from lexiseg.models.base import ImageFeatures
from lexiseg.scores import GridScores
from lexiseg.segmentation import Segmentation
from lexiseg.segmenter import Segmenter
from lexiseg.templates import PAPER_TEMPLATES, SINGLE_TEMPLATE
from lexiseg.vocabulary import Vocabulary
from tests.patchwork import WORDS, Patchwork, picture, same, segmenter


@pytest.fixture()
def folder(tmp_path: Path) -> Path:
    for index, size in enumerate([(40, 50), (40, 50), (30, 60)]):
        Image.fromarray(picture(*size, seed=index)).save(tmp_path / f"p{index}.png")
    (tmp_path / "p0b.jpg").write_text("I am text.")
    (tmp_path / "p3.png").write_bytes((tmp_path / "p2.png").read_bytes()[:60])
    Image.new("RGB", (1, 1)).save(tmp_path / "p4.png")
    return tmp_path


@pytest.fixture()
def run(clip: CLIP) -> Segmenter:
    return segmenter(Patchwork(clip))


def test_a_folder_with_bad_files_goes_on(run: Segmenter, folder: Path) -> None:
    results = list(run.predict_folder(folder, WORDS, batch_size=2))
    assert [path.name for path, _ in results] == ["p0.png", "p0b.jpg", "p1.png", "p2.png", "p3.png", "p4.png"]
    kinds = [isinstance(result, Segmentation) for _, result in results]
    assert kinds == [True, False, True, True, False, False]
    for path, result in results:
        if isinstance(result, LexisegError):
            assert path.name in str(result) and "\n" not in str(result)
        else:
            same(result, run.predict(path, WORDS))
    paths = [folder / "p2.png", folder / "missing.png", folder / "p0.png"]
    listed = dict(run.predict_folder(paths, WORDS))
    assert list(listed) == paths and "missing.png" in str(listed[paths[1]])
    with pytest.raises(LexisegError, match="bad"):
        run.predict([folder / "p0.png", folder / "bad.png"], WORDS)
    with pytest.raises(LexisegError, match="given twice"):
        run.predict_folder(folder, "cat; cat")
    with pytest.raises(LexisegError, match="no file or folder"):
        run.predict_folder(folder / "nothing", WORDS)


def test_sam_is_loaded_for_a_picture_that_can_be_read(
    clip: CLIP, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing() -> None:
        raise LexisegError("SAM cannot be had.")

    monkeypatch.setattr("lexiseg.refine.sam", missing)
    run = segmenter(Patchwork(clip), refine="regions")
    results = run.predict_folder([folder / "p3.png", folder / "p0.png", folder / "p1.png"], WORDS, batch_size=1)
    assert "p3.png" in str(next(results)[1])
    with pytest.raises(LexisegError, match="SAM cannot"):
        next(results)


def test_a_folder_is_read_as_it_is_consumed(clip: CLIP, folder: Path) -> None:
    model = Patchwork(clip)
    results: Iterator[Any] = segmenter(model).predict_folder(folder, WORDS, batch_size=1)
    assert model.num_encoded == 0
    next(results)
    assert model.num_encoded == 1


def test_a_file_of_classes_is_read_anew(run: Segmenter, tmp_path: Path) -> None:
    name = str(tmp_path / "classes.txt")
    for names in (("cat",), ("dog", "sky")):
        Path(name).write_text("\n".join(names))
        assert run.vocabulary(name).names == names


def test_the_same_words_are_embedded_once(clip: CLIP, tmp_path: Path) -> None:
    run = Segmenter(Patchwork(clip), cache_dir=tmp_path)
    run.predict(picture(16, 16), WORDS)
    forwards = run.embedder.num_forwards
    assert forwards > 0
    run.predict(picture(24, 16), ["cat", "tree, bush", "sky"])
    run.predict(picture(24, 16), Vocabulary.parse(WORDS), background=0.1)
    assert run.embedder.num_forwards == forwards
    again = Segmenter(Patchwork(clip), cache_dir=tmp_path)
    again.predict(picture(16, 16), WORDS)
    assert again.embedder.num_forwards == 0


@pytest.mark.parametrize("num_classes", [1, 255, 256, 1000])
def test_any_number_of_classes_in_the_users_order(num_classes: int, run: Segmenter) -> None:
    names = [f"thing {index}" for index in reversed(range(num_classes))]
    result = run.predict(picture(40, 40), names)
    assert result.classes == tuple(names) and result.num_ignored == 0
    assert result.label_map.dtype == (torch.uint8 if num_classes < 256 else torch.int32)
    for name in names[:3]:
        alone = run.predict(picture(40, 40), [name]).scores
        assert result.scores is not None and alone is not None and bool((result.scores >= alone - 1e-5).all())


def test_synonyms_join(run: Segmenter) -> None:
    image = picture(40, 40)
    joined = run.predict(image, "cat; tree, bush")
    apart = run.predict(image, "cat; tree; bush")
    assert torch.equal(joined.label_map, apart.label_map.clamp(max=1))
    same(joined, Segmentation(apart.label_map.clamp(max=1), joined.vocabulary, apart.scores))


def test_backgrounds(run: Segmenter) -> None:
    image = picture(40, 40)
    plain = run.predict(image, "cat; tree")
    assert plain.scores is not None
    threshold = float(plain.scores.median())
    cut = run.predict(image, "cat; tree", background=threshold)
    assert torch.equal(cut.label_map == 255, plain.scores < threshold)
    assert 0 < cut.num_ignored < 1600
    named = run.predict(image, "cat; tree", background="wall")
    assert named.classes == ("cat", "tree", "wall")
    same(named, run.predict(image, "cat; tree; wall"))
    many = run.predict(image, [f"c{index}" for index in range(300)], background=1e9)
    assert many.num_ignored == 1600 and many.ignore_index == 65535
    with pytest.raises(LexisegError, match="finite"):
        run.predict(image, "cat", background=float("inf"))


def test_seen_names_reach_the_model_and_the_table(clip: CLIP) -> None:
    model = Patchwork(clip, seen_names=("Cat", "bush"))
    result = segmenter(model).predict(picture(24, 24), WORDS)
    assert [entry.seen for entry in result.vocabulary.classes] == [True, True, False]
    assert model.last_seen_words is not None and model.last_seen_words.tolist() == [True, True, True, False]
    free = Patchwork(clip)
    assert segmenter(free).predict(picture(24, 24), WORDS).vocabulary.classes[0].seen is None
    assert free.last_seen_words is None


def test_templates(clip: CLIP) -> None:
    model = Patchwork(clip)
    assert segmenter(model).vocabulary("cat").templates == SINGLE_TEMPLATE
    model.default_templates = PAPER_TEMPLATES
    for classes in ("cat", Vocabulary.parse("cat")):
        assert segmenter(model).vocabulary(classes).templates == PAPER_TEMPLATES
    stated = Vocabulary.parse("cat", templates="a {}")
    assert segmenter(model).vocabulary(stated).templates == ("a {}",)
    assert segmenter(model, templates="the {}").vocabulary(stated).templates == ("the {}",)
    with pytest.raises(LexisegError, match="exactly one"):
        segmenter(model, templates=["nothing"])


def test_a_long_name_is_named(run: Segmenter) -> None:
    with pytest.raises(LexisegError, match=r"class 'very very.*tokens"):
        run.predict(picture(16, 16), ["cat", "very " * 100 + "long"])


class Broken(Patchwork):
    def score(self, features: ImageFeatures, text: Tensor, **options: Any) -> GridScores:
        features.values["pooled"][features.values["pooled"].mean((1, 2, 3)) > -9] *= float("nan")
        return super().score(features, text, **options)


def test_scores_that_are_not_numbers_name_the_picture(clip: CLIP, folder: Path) -> None:
    run = segmenter(Broken(clip))
    with pytest.raises(LexisegError, match=r"p0\.png.*NaN"):
        run.predict(folder / "p0.png", WORDS)
    assert all(isinstance(result, LexisegError) for _, result in run.predict_folder(folder, WORDS))


def test_the_shape_of_a_hugging_face_pipeline(run: Segmenter) -> None:
    image = picture(40, 50)
    found = run(image, candidate_labels=["cat", "tree, bush", "sky"], batch_size=2)
    expected = run.predict(image, WORDS)
    assert [one["label"] for one in found] == [row.name for row in sorted(expected.table(), key=lambda row: row.index)]
    for one in found:
        assert set(one) == {"label", "score", "mask"} and isinstance(one["score"], float)
        assert one["mask"].mode == "L" and one["mask"].size == (50, 40)
        assert np.array_equal(np.asarray(one["mask"]) == 255, expected.mask(one["label"]).numpy())
    assert [len(result) for result in run([image, image], WORDS)] == [len(found)] * 2


@pytest.mark.parametrize(
    ("options", "words"),
    [
        *(({"window": side}, "whole number") for side in (-3, 512.0, True)),
        *(({"batch_size": count}, "whole number of at least 1") for count in (0, 2.5, None)),
        *(({key: "64"}, "not '64'") for key in ("batch_size", "window")),
        ({"window": 1}, "at least 8 pixels"),
        ({"window": "512"}, "its side and stride"),
        ({"window": (16, 17)}, "stride of 1 to 16"),
        ({"window": (0, 8)}, "give the window's side"),
        ({"window": (1, 2, 3)}, "its side and stride"),
        ({"window": (8, 1)}, "more than 10,000"),
    ],
)
def test_wrong_options_are_one_sentence(run: Segmenter, options: dict[str, Any], words: str) -> None:
    for call in (run.predict, run.scores, lambda image, classes, **more: run.set_image(image, **more)):
        with pytest.raises(LexisegError, match=words) as caught:
            call(picture(120, 130), WORDS, **options)
        assert "\n" not in str(caught.value)
