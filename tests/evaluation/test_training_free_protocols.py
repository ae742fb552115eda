"""The training-free papers' protocols: settings of each method, background by probability, and a whole evaluation."""

from __future__ import annotations

import pytest
import torch

from lexiseg.errors import LexisegError
from lexiseg.evaluation.protocols import PROTOCOLS, find_protocol
from lexiseg.models import DenseCLIP
from lexiseg.refine import Refinement
from lexiseg.scores.words import Postprocessing, words_to_classes
from lexiseg.segmenter import Segmenter
from tests.towers import small_clip


def test_each_benchmark_is_there_and_a_method_follows_it() -> None:
    names = {"voc21", "voc20", "pc60", "pc59", "coco-object", "coco-stuff", "cityscapes", "ade20k"}
    assert {protocol.benchmark for protocol in PROTOCOLS.values()} - {""} == names
    model = DenseCLIP.build(small_clip(), {"method": "naclip"})
    assert find_protocol("training-free-voc21").set_up(model) == {"window_size": None, "threshold": 0.1, "area": 0.0}
    assert model.postprocessing == Postprocessing(40, 0.1)
    window = model.window
    assert (window.size, window.short_side, window.long_side, window.antialias) == (None, 336, 2048, False)
    model = DenseCLIP.build(small_clip(), {"method": "clearclip"})
    find_protocol("training-free-cityscapes").set_up(model)
    assert (model.window.size, model.window.stride, model.postprocessing) == (224, 224, None)
    model = DenseCLIP.build(small_clip(), {"method": "sclip"})
    find_protocol("training-free-voc21").set_up(model)
    assert model.postprocessing == Postprocessing(65, 0.1, 0.1)


def test_the_best_word_of_a_class_counts_after_the_softmax() -> None:
    cosines = torch.tensor([0.1, 0.3, 0.31, 0.2])[:, None, None].expand(-1, 2, 3)
    owners = torch.tensor([0, 1, 2, 2])
    labels, probabilities = words_to_classes(cosines, owners, Postprocessing(40))
    words = (40 * cosines[:, 0, 0]).softmax(0)
    torch.testing.assert_close(probabilities[:, 0, 0], torch.stack([words[0], words[1], words[2:].max()]))
    assert bool((labels == 2).all())
    labels, _ = words_to_classes(cosines, owners, Postprocessing(40, threshold=0.9), background=1)
    assert bool((labels == 1).all())


def test_small_segments_are_given_up_but_not_the_background() -> None:
    cosines = torch.zeros(3, 1, 10)
    cosines[0, 0, :1], cosines[1, 0, 1:9], cosines[2, 0, 9:] = 1.0, 1.0, 1.0
    cosines[1, 0, 9:] = 0.9
    labels, _ = words_to_classes(cosines, torch.arange(3), Postprocessing(40, 1e-6, 0.2))
    assert labels[0].tolist() == [0] + [1] * 9


def test_pixels_below_the_threshold_become_background_in_a_prediction() -> None:
    picture = torch.randint(0, 255, (3, 40, 56), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    model = DenseCLIP.build(small_clip(), {"method": "maskclip", "short_side": 32})
    model.postprocessing = Postprocessing(1, threshold=0.99)
    classes = ["cat", "sky", "background"]
    result = Segmenter(model, disk_cache=False).predict(picture, classes)
    assert bool((result.label_map == 2).all())
    model.postprocessing = Postprocessing(40, threshold=1e-6)
    by_words = Segmenter(model, disk_cache=False, refine=Refinement("pamr", steps=1)).predict(picture, classes)
    model.postprocessing = None
    by_scores = Segmenter(model, disk_cache=False, refine=Refinement("pamr", steps=1)).predict(picture, classes)
    assert float((by_words.label_map == by_scores.label_map).float().mean()) > 0.99
    model.postprocessing = Postprocessing(40)
    with pytest.raises(LexisegError, match="no refinement 'edges'"):
        Segmenter(model, disk_cache=False, refine="edges").predict(picture, classes)
