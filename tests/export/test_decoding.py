"""The numpy decode and resizing against torch's, and the rules of ``export.json``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import lexiseg
from lexiseg.errors import LexisegError
from lexiseg.export.decoding import Part, decode
from lexiseg.export.exporting import export
from lexiseg.export.runtime import ExportedModel, open_graph
from lexiseg.export.spec import FILE, Decode, Fit, is_export, read_spec
from lexiseg.resampling import resize_bytes, resize_floats
from lexiseg.scores import GridScores, WindowScores

FIT = Fit(kind="resize", unit=8)


def grids(count: int, words: int, size: tuple[int, int]) -> torch.Tensor:
    return 3 * torch.randn(count, 1, words, *size, generator=torch.Generator().manual_seed(5))


def in_numpy(logits: torch.Tensor, boxes: Any, canvas: Any, size: Any, rule: Decode, fit: Fit = FIT) -> Any:
    offsets = None
    if rule.seen_offset:
        offsets = rule.seen_offset * (np.arange(logits.shape[2]) % 2).astype(np.float32)
    parts = [Part(grid[0].numpy(), box, rule, fit, offsets, box) for grid, box in zip(logits, boxes, strict=True)]
    return decode(parts, canvas, size)


@pytest.mark.parametrize("words", [1, 3, 600])
@pytest.mark.parametrize("size", [(40, 52), (150, 90), (17, 200)])
def test_windows_are_decoded_as_torch_does(words: int, size: tuple[int, int]) -> None:
    boxes = [(0, 0, 48, 48), (0, 12, 48, 48), (16, 0, 48, 48), (16, 12, 48, 48)]
    logits = grids(4, words, (6, 6))
    seen = 0.1 * (torch.arange(words) % 2).float()
    parts = [GridScores(one, resize_to=(48, 48), sigmoid=True, offsets=seen) for one in logits]
    want, best = WindowScores(parts, boxes, (64, 60)).label_and_score(size)
    rule = Decode(resize_to="window", sigmoid=True, seen_offset=0.1)
    labels, scores = in_numpy(logits, boxes, (64, 60), size, rule)
    assert (labels == want[0].numpy()).mean() > 0.9999
    np.testing.assert_allclose(scores, best[0].numpy(), atol=1e-5)


@pytest.mark.parametrize(
    ("rule", "fit", "more"),
    [
        (Decode(resize_to="none", sigmoid=False), FIT, {}),
        (Decode(resize_to="window", square_side=20, sigmoid=True), FIT, {"resize_to": (20, 20), "sigmoid": True}),
        (
            Decode(resize_to="frame", sigmoid=False),
            Fit(kind="pad", unit=16),
            {"resize_to": (64, 64), "crop": (50, 50), "crop_place": (7, 7)},
        ),
    ],
)
def test_a_whole_picture_is_decoded_as_torch_does(rule: Decode, fit: Fit, more: dict[str, Any]) -> None:
    logits = grids(1, 20, (8, 8))
    want, best = GridScores(logits[0], **more).label_and_score((131, 77))
    part = Part(logits[0, 0].numpy(), (0, 0, 131, 77), rule, fit, None, (0, 0, 50, 50))
    labels, scores = decode([part], (131, 77), (131, 77))
    assert (labels == want[0].numpy()).mean() > 0.9999
    np.testing.assert_allclose(scores, best[0].numpy(), atol=1e-5)


def test_windows_and_the_whole_picture_count_alike() -> None:
    boxes, logits = [(0, 0, 32, 32), (0, 16, 32, 32)], grids(3, 7, (4, 4))
    windows = WindowScores([GridScores(one) for one in logits[:2]], boxes, (32, 48))
    both = WindowScores([windows, GridScores(logits[2])], [(0, 0, 32, 48)] * 2, (32, 48))
    rule = Decode(resize_to="none", sigmoid=False)
    parts = [Part(one[0].numpy(), box, rule, FIT, None, box) for one, box in zip(logits, boxes, strict=False)]
    whole = Part(logits[2, 0].numpy(), (0, 0, 32, 48), rule, FIT, None, (-1, -1, 32, 32))
    labels, scores = decode(parts, (32, 48), (70, 70), whole)
    want, best = both.label_and_score((70, 70))
    assert (labels == want[0].numpy()).mean() > 0.9999
    np.testing.assert_allclose(scores, best[0].numpy(), atol=1e-5)


def test_of_equal_scores_the_first_word_wins_however_many_there_are() -> None:
    rule, box = Decode(resize_to="none", sigmoid=False), (0, 0, 8, 8)
    part = Part(np.ones((1200, 2, 2), np.float32), box, rule, FIT, None, box)
    labels, scores = decode([part], (8, 8), (8, 8))
    assert not labels.any() and (scores == 1).all()


def test_scores_that_are_not_finite_are_refused() -> None:
    with pytest.raises(LexisegError, match="NaN or infinite"):
        rule = Decode(resize_to="none", sigmoid=False)
        in_numpy(torch.full((1, 1, 2, 4, 4), torch.nan), [(0, 0, 8, 8)], (8, 8), (8, 8), rule)


@pytest.mark.parametrize("antialias", [True, False])
@pytest.mark.parametrize("size", [(40, 30), (130, 200), (64, 48), (64, 20)])
def test_bytes_are_resized_as_torch_does(size: tuple[int, int], antialias: bool) -> None:
    image = np.random.default_rng(0).integers(0, 256, (64, 48, 3), np.uint8).transpose(2, 0, 1)
    want = F.interpolate(torch.from_numpy(image)[None], size=size, mode="bilinear", antialias=antialias)[0].numpy()
    difference = np.abs(resize_bytes(image, size, antialias).astype(int) - want)
    assert difference.max() <= 1 + (not antialias)
    assert (difference > 0).mean() < (0.05 if antialias else 0.1)
    floats = F.interpolate(torch.from_numpy(image)[None].float(), size=size, mode="bilinear")[0].numpy()
    np.testing.assert_allclose(resize_floats(image, size), floats, atol=1e-3)


@pytest.mark.parametrize(
    ("fit", "size", "want"),
    [
        (Fit(kind="resize", unit=8), (41, 3), (40, 16)),
        (Fit(kind="crop", unit=8), (47, 16), (40, 16)),
        (Fit(kind="crop", unit=8), (47, 7), (48, 16)),
        (Fit(kind="pad", unit=16), (33, 32), (48, 32)),
        (Fit(kind="resize", unit=8, size=(24, 24)), (100, 200), (24, 24)),
    ],
)
def test_windows_are_brought_to_a_size(fit: Fit, size: tuple[int, int], want: tuple[int, int]) -> None:
    assert fit.to(size) == want


VALUES: dict[str, Any] = {
    **{"format": 1, "lexiseg": "0.1.0", "kind": "onnx", "precision": "fp32", "system": "zegclip", "name": "small"},
    **{"options": {}, "parameters": 1, "sha256": "0" * 64, "mean": [0.5] * 3, "std": [0.2] * 3},
    **{"graphs": ["image.onnx"], "fit": {"kind": "resize", "unit": 8}, "window": {}},
    "decode": {"resize_to": "window", "sigmoid": True},
    "text": {"graph": "text.onnx", "tokenizer": "tokenizer.json", "context_length": 77, "templates": ["a {}"]},
}


def folder_of(folder: Path, **changes: Any) -> Path:
    (folder / FILE).write_text(json.dumps({**VALUES, **changes}))
    for name in ("image.onnx", "text.onnx", "tokenizer.json"):
        (folder / name).write_bytes(b"")
    return folder


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"format": 2}, "format 2 and this lexiseg reads 1"),
        ({"colour": 1}, "unknown key 'colour'"),
        ({"std": [0, 1, 1]}, "wrong value for 'std"),
        ({"mean": [0.5, 0.5]}, "mean"),
        ({"graphs": ["../image.onnx"]}, "wrong value for 'graphs"),
        ({"graphs": ["image.onnx", "b.onnx"]}, "2 graphs are named for 0 sizes"),
        ({"graphs": ["other.onnx"]}, "has no other.onnx"),
        ({"window": {"size": 8, "stride": 9}}, "stride of 9"),
        ({"fit": {"kind": "resize", "unit": 0}}, "fit.unit"),
        ({"fit": {"kind": "resize", "unit": 10**12}}, "fit.unit"),
        ({"decode": {"resize_to": "moon", "sigmoid": True}}, "decode.resize_to"),
        ({"text": None}, "text"),
        ({"sha256": "x"}, "sha256"),
        ({}, "tokenizer .* cannot be read"),
    ],
)
def test_a_damaged_folder_is_one_sentence(tmp_path: Path, changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(LexisegError, match=sentence) as raised:
        lexiseg.load(folder_of(tmp_path, **changes))
    assert str(raised.value).count("\n") == 0


def test_a_graph_sees_windows_padded_around_or_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tokenizers import Tokenizer, models

    monkeypatch.setattr("lexiseg.export.runtime.open_graph", lambda *_: lambda pixels, _: pixels)
    pixels = np.random.default_rng(0).random((1, 3, 21, 18), np.float32)
    padded = np.zeros((1, 3, 24, 24), np.float32)
    padded[:, :, 1:22, 3:21] = pixels
    for kind, expected in (("pad", padded), ("crop", pixels[:, :, :16, :16])):
        folder_of(tmp_path, fit={"kind": kind, "unit": 8})
        Tokenizer(models.WordLevel({"a": 0}, unk_token="a")).save(str(tmp_path / "tokenizer.json"))
        np.testing.assert_array_equal(ExportedModel(tmp_path, "cpu").grids(pixels, np.zeros((1, 4))), expected)


@pytest.mark.parametrize(("said", "count"), [("3", 3), ("", 0), ("4,2", 0)])
def test_graphs_take_the_threads_they_are_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: str, count: int
) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    told: list[int] = []

    def session(_: str, options: Any, **__: Any) -> None:
        told.append(options.intra_op_num_threads)
        raise LexisegError("This is enough.")

    monkeypatch.setenv("OMP_NUM_THREADS", said)
    monkeypatch.setattr(onnxruntime, "InferenceSession", session)
    with pytest.raises(LexisegError, match="enough"):
        open_graph(tmp_path, read_spec(folder_of(tmp_path)), "cpu")
    assert told == [count]


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "[" * 100_000, '{"a": 1}', "\udcff"])
def test_json_that_is_none_is_one_sentence(tmp_path: Path, text: str) -> None:
    (tmp_path / FILE).write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(LexisegError, match="export the model again"):
        read_spec(tmp_path)


def test_a_folder_whose_name_is_not_utf8_is_one_sentence(tmp_path: Path) -> None:
    (odd := tmp_path / "caf\udce9").mkdir()
    with pytest.raises(LexisegError, match="is not called in UTF-8"):
        lexiseg.load(folder_of(odd))
    with pytest.raises(LexisegError, match="is not called in UTF-8"):
        export(lexiseg.load("zegclip-emoji"), odd)


def test_other_names_are_no_exports(tmp_path: Path) -> None:
    for name in (tmp_path, "zegclip-emoji", "a\0b", "x" * 5000, "~nobody-of-that-name/x", 3, None):
        assert not is_export(name)
