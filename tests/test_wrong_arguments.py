"""Whatever is wrong with an argument of the Python API is a `LexisegError`, never another exception."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

import lexiseg
from lexiseg.errors import LexisegError
from lexiseg.exemplars import Exemplar
from lexiseg.maps import MapOptions
from lexiseg.refine import Refinement
from lexiseg.samples import sample_path
from lexiseg.video import VideoOptions
from lexiseg.vocabulary import Vocabulary, VocabularyClass
from lexiseg.windows import WindowPolicy

WORDS = "giraffe; grass"
NOT_NUMBERS = ("a", [], object(), None, float("nan"))


@pytest.fixture(scope="module")
def segmenter() -> Any:
    return lexiseg.load("zegclip-emoji", device="cpu")


@pytest.fixture(scope="module")
def result(segmenter: Any) -> Any:
    return segmenter.predict(sample_path("demo"), WORDS)


def what_happens(call: Callable[[], object]) -> str:
    try:
        call()
    except LexisegError as error:
        return "refused" if str(error).endswith(".") else str(error)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "accepted"


def assert_refused(calls: dict[str, Callable[[], object]]) -> None:
    wrong = {name: said for name, call in calls.items() if (said := what_happens(call)) != "refused"}
    assert not wrong, wrong


def test_pictures(segmenter: Any) -> None:
    pictures = {
        "nothing": None, "a number": 3, "complex": np.zeros((4, 4), complex),
        "sparse": torch.zeros(3, 4, 4).to_sparse(),
        "nested": torch.nested.nested_tensor([torch.zeros(3), torch.zeros(2)]), "empty": np.zeros((0, 4, 3)),
        "meta": torch.zeros(3, 4, 4, device="meta"), "letters": np.array([["a"]]), "objects": np.array([[None]]),
        "five axes": np.zeros((1, 1, 1, 1, 1)), "a mapping": {}, "a set": {1}, "a folder": "/",
    }  # fmt: skip
    assert_refused({name: lambda one=one: segmenter.predict(one, WORDS) for name, one in pictures.items()})


def test_classes_and_settings(segmenter: Any) -> None:
    picture = sample_path("demo")
    classes = (None, 3, "", [], [["a"]], b"cat", [1.5], object(), "a\0b;c")
    settings = [
        *({"window": one} for one in ("a", -1, 1.5, (1, 2, 3), [64, 0], float("nan"))),
        *({"batch_size": one} for one in (0, 1.5, "2", None)),
        *({"background": one} for one in (object(), [], True, float("nan"))),
    ]
    assert_refused(
        {f"classes {one!r}": lambda one=one: segmenter.predict(picture, one) for one in classes}
        | {f"{one}": lambda one=one: segmenter.predict(picture, WORDS, **one) for one in settings}
        | {
            "refined": lambda: segmenter.with_refinement("polish"), "vocabulary": lambda: segmenter.vocabulary(3),
            "folder": lambda: segmenter.predict_folder(3, WORDS), "paths": lambda: segmenter.predict_folder([3], WORDS),
            "set_image": lambda: segmenter.set_image(3), "labels": lambda: segmenter(picture, candidate_labels=3),
        }
    )  # fmt: skip


def test_results(result: Any, tmp_path: Any) -> None:
    assert_refused(
        {f"mask {one!r}": lambda one=one: result.mask(one) for one in (1.5, None, -1, 10**30, "zebra")}
        | {f"alpha {one!r}": lambda one=one: result.overlay(alpha=one) for one in (*NOT_NUMBERS, 2)}
        | {f"tolerance {one!r}": lambda one=one: result.polygons(one) for one in (*NOT_NUMBERS, -1)}
        | {
            "kinds": lambda: result.save(tmp_path, "a", 3), "kind": lambda: result.save(tmp_path, "a", ("zip",)),
            "stem": lambda: result.save(tmp_path, 3), "above": lambda: result.save(tmp_path, "../a"),
            "folder": lambda: result.save(3, "a"), "png": lambda: result.save_png(3),
            "instances": lambda: result.save(tmp_path, "a", ("coco",), instances=5), "of": lambda: result.to_coco(5),
            "scores": lambda: replace(result, scores=[[1]]), "font": lambda: result.overlay(font="/no/such.ttf"),
        }
    )  # fmt: skip


def test_classes_by_hand(tmp_path: Any) -> None:
    made, picture = lexiseg.Vocabulary.parse(WORDS), np.zeros((8, 8, 3), np.uint8)
    calls: dict[str, Callable[[], object]] = {
        f"box {one!r}": lambda one=one: Exemplar(picture, box=one) for one in (5, "box", (1, 2), (1.0, 2, 3, 4))
    }
    calls |= {f"synonyms {one!r}": lambda one=one: VocabularyClass("a", one) for one in (5, None, "b")}
    assert_refused(calls | {"load": lambda: made.load(5), "save": lambda: made.save(5)})  # type: ignore[arg-type]


def test_settings_by_hand(segmenter: Any) -> None:
    picture, junk = np.zeros((8, 8, 3), np.uint8), (3.5, "12", [], None, object(), (0,))
    made: list[tuple[Any, str, dict[str, Any]]] = [
        *((Refinement, name, {"kind": "edges"}) for name in ("cells", "distances", "steps", "dilations", "max_pixels")),
        *((VideoOptions, name, {}) for name in ("every", "smooth")),
        *((MapOptions, name, {}) for name in ("tile", "margin", "smallest")),
        (Vocabulary, "classes", {}), (Vocabulary, "background", {"classes": (VocabularyClass("a"),)}),
        (VocabularyClass, "exemplars", {"name": "a"}),
    ]  # fmt: skip
    calls: dict[str, Callable[[], object]] = {
        f"{cls.__name__}({name}={one!r})": lambda cls=cls, name=name, more=more, one=one: cls(**more, **{name: one})
        for cls, name, more in made
        for one in junk
        if (name, one) != ("exemplars", [])
    }
    for number in (3, (1.5, 2), ("a",)):
        calls[f"distances={number!r}"] = lambda number=number: Refinement("edges", distances=number)
    for name, one in (("size", 1.5), ("canvas", []), ("canvas", 0), ("canvas", (64.5, 64)), ("short_side", 1.5)):
        policy = WindowPolicy(**{name: one})  # type: ignore[arg-type]
        calls[f"{policy}"] = lambda policy=policy: segmenter.predict(picture, WORDS, window=policy)
    assert_refused(calls)


def test_loading(segmenter: Any) -> None:
    assert_refused(
        {f"name {one!r}": lambda one=one: lexiseg.load(one) for one in (3, None, "no such", "\0")}
        | {f"{one}": lambda one=one: lexiseg.load("zegclip-emoji", **one) for one in (
            {"device": 3}, {"dtype": 3}, {"max_pixels": "x"}, {"templates": 3},
        )}
        | {"cache": lambda: lexiseg.Segmenter(segmenter.model, cache_dir=3)}  # type: ignore[arg-type]
    )  # fmt: skip
