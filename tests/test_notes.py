"""Notes about results that are probably not what the user meant."""

from __future__ import annotations

import io
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from lexiseg.clip.model import build_clip
from lexiseg.errors import LexisegWarning
from lexiseg.notes import mark_drawn
from lexiseg.samples import sample_path
from tests.patchwork import WORDS, Patchwork, picture, segmenter
from tests.towers import small_architecture, small_clip


@pytest.mark.parametrize(
    ("classes", "advice"),
    [
        ("giraffe, elephant, grass", "'giraffe; elephant; grass'"),
        ("giraffe. elephant. grass.", "'giraffe; elephant; grass'"),
        ("giraffe . elephant . grass .", "'giraffe; elephant; grass'"),
        ("giraffe | elephant|grass", "'giraffe; elephant; grass'"),
        ("giraffe • elephant؛ grass", "'giraffe; elephant; grass'"),
        ("giraffe and elephant & grass", "'giraffe; elephant; grass'"),
        (["giraffe"], "'giraffe; grass; sky'"),
        ({"classes": [{"name": "giraffe", "synonyms": ["elephant"]}]}, "'giraffe; elephant'"),
    ],
)
def test_one_class_comes_with_a_note_and_any_other_rule_without(classes: Any, advice: str) -> None:
    run, image = segmenter(Patchwork(small_clip())), picture(16, 16)
    with pytest.warns(LexisegWarning, match="every pixel") as caught:
        run.predict(image, classes)
    assert len(caught) == 1 and advice in str(caught[0].message)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run.predict(image, classes, background="background")
        run.predict(image, classes, background=0.1)
        run.predict(image, "giraffe. elephant; sky")


def test_a_threshold_that_leaves_nothing_comes_with_a_note() -> None:
    run, image = segmenter(Patchwork(small_clip())), picture(16, 16)
    largest = float(run.predict(image, "giraffe; sky").scores.max())
    with pytest.warns(LexisegWarning, match="none has a class"):
        assert run.predict(image, "giraffe; sky", background=largest + 0.1).num_ignored == 256
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run.predict(image, "giraffe; sky", background=largest)


def test_a_model_of_the_picture_world_notes_other_pictures_once(tmp_path: Path) -> None:
    scene, photo = tmp_path / "scene.png", tmp_path / "photo.png"
    drawn, taken = Image.fromarray(picture(40, 40)), Image.fromarray(picture(40, 40, seed=1))
    drawn.save(scene, **mark_drawn(".png"))
    drawn.save(tmp_path / "scene.jpg", **mark_drawn(".jpg"))
    taken.save(photo)
    model = Patchwork(build_clip({**small_architecture(), "trained_on": "picture-world"}))
    own = [sample_path("demo"), scene, tmp_path / "scene.jpg", scene.read_bytes(), Image.open(scene), picture(40, 40)]
    with warnings.catch_warnings(), scene.open("rb") as file:
        warnings.simplefilter("error")
        for source in (*own, file, torch.zeros(3, 40, 40)):
            segmenter(model).predict(source, WORDS)
        segmenter(Patchwork(small_clip())).predict(photo, WORDS)
    arrays = picture(40, 50), picture(640, 640)
    for source in (photo, photo.read_bytes(), taken, io.BytesIO(photo.read_bytes()), *arrays):
        run = segmenter(model)
        with pytest.warns(LexisegWarning, match="real weights") as caught:
            run.predict([scene, source, source], WORDS)
            run.predict(source, WORDS)
        assert len(caught) == 1
