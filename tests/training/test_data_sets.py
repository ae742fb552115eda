"""Training and evaluation for real on a miniature of every dataset."""

from __future__ import annotations

import shutil
from dataclasses import replace

import pytest
import torch

from lexiseg.data.sets.open import open_data_set, splits_of
from lexiseg.data.transforms import light_pipeline
from lexiseg.errors import LexisegError
from lexiseg.evaluation.run import run_evaluation
from lexiseg.models import DenseCLIP, ZegCLIP
from lexiseg.recipes import TrainSettings, load_recipe
from lexiseg.segmenter import Segmenter
from lexiseg.training.segmentation import SegmentationTask
from lexiseg.training.trainer import Trainer
from tests.miniatures import MINIATURES, SIZE, WIDE
from tests.towers import small_clip


def _train(name, root, run_dir):
    """One step of the real loop on the real reader's samples; the weights must move."""
    data_name = MINIATURES[name][0]
    train, _ = splits_of(data_name, root)
    data, val = open_data_set(data_name, root, train), open_data_set(data_name, root, "val")
    seen = tuple(entry.name for entry in data.vocabulary.classes if entry.seen is not False)
    model = ZegCLIP.build(small_clip(), {"decoder_heads": 2, "short_side": 32, "window_size": 32}, seen_names=seen)
    model.set_trainable()
    pipeline = light_pipeline(model.mean, model.std, crop=32)
    task = SegmentationTask(model, data, pipeline, batch_size=2, templates="single")
    settings = TrainSettings(steps=1, batch_size=2, lr=1e-3)
    before = {key: value.clone() for key, value in model.trainable_parameters()}
    Trainer(task, settings, run_dir, device="cpu", tensorboard=False, progress=False).run()
    assert any(not torch.equal(before[key], value) for key, value in model.trainable_parameters())
    return model, val


@pytest.mark.parametrize("name", [name for name in MINIATURES if "459" not in name and "847" not in name])
def test_train_and_evaluate(clean, tmp_path, name):
    model, val = _train(name, clean(name), tmp_path / "run")
    report = run_evaluation(
        Segmenter(model, disk_cache=False), val, name=name, split="val", progress=False, num_examples=1
    )
    labels = [sample.label for sample in val]
    assert report.confusion.labelled.sum() == sum(int((label != 255).sum()) for label in labels)
    assert report.summary()["pacc"] is not None and report.save(tmp_path / "report")


@pytest.mark.parametrize("name", ["context459", "context459-tiff", "ade847", "ade847-full"])
def test_evaluate_many_classes(clean, tmp_path, name):
    """More than 255 classes: class 255 counts as any other, 65535 is ignored, and no tensor is classes x H x W."""
    val = open_data_set(MINIATURES[name][0], clean(name), "val")
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            found = function(*args, **(kwargs or {}))
            if isinstance(found, torch.Tensor) and found.is_floating_point():
                largest = max(largest, found.numel())
            return found

    model = DenseCLIP.build(small_clip(), {"short_side": 32})
    segmenter = Segmenter(model, disk_cache=False, templates="single")
    segmenter.vocabulary(val.vocabulary)
    segmenter.embedder(segmenter.vocabulary(val.vocabulary))
    big = 8
    with Watch():
        report = run_evaluation(segmenter, _Enlarged(val, big), name=name, split="val", num_examples=1)
    num_classes = len(val.vocabulary)
    pixels = big * big * SIZE[0] * SIZE[1]
    assert largest < num_classes * pixels / 8
    assert report.confusion.labelled.sum() == sum(int((s.label != WIDE).sum()) * big * big for s in val)
    assert report.confusion.labelled[255] > 0 and (report.confusion.labelled > 0).all()


class _Enlarged:
    def __init__(self, data, factor):
        self.vocabulary, self._data, self._factor = data.vocabulary, data, factor

    def __len__(self):
        return len(self._data)

    def __getitem__(self, index):
        sample = self._data[index]
        image, label = (
            value.repeat_interleave(self._factor, -1).repeat_interleave(self._factor, -2)
            for value in (sample.image, sample.label)
        )
        return replace(sample, image=image, label=label)


def test_training_on_many_classes(clean, tmp_path):
    _train("ade847", clean("ade847"), tmp_path / "run")
    assert (tmp_path / "run" / "model" / "model.safetensors").is_file()


def test_own_data_with_the_recipe_option(tmp_path, capsys, monkeypatch):
    """``train RECIPE --data``: the recipe's crop and augmentation stay, its data are the folder's."""

    MINIATURES["own-folders"][1](tmp_path / "my")
    recipe = load_recipe("zegclip-voc2012", ["train.steps=3"], data=tmp_path / "my")
    assert recipe.data.source == "own" and recipe.data.crop == 512 and recipe.data.augment == "paper"
    assert recipe.train.steps == 3
    recipe = load_recipe("zegclip-picture-world", [], data=tmp_path / "my")
    assert recipe.data.source == "own" and recipe.data.crop == 128 and recipe.data.label_stride == 2
    for wrong, words in ((["clip-emoji", tmp_path / "my"], "captions"), (["tiny", tmp_path / "no"], "does not exist")):
        with pytest.raises(LexisegError, match=words):
            load_recipe(wrong[0], [], data=wrong[1])
    shutil.rmtree(tmp_path / "my")
