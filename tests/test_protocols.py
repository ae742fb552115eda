"""The papers' protocols on miniatures and on hand-made labels, and training and evaluation on every data set."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.io import savemat

from lexiseg.cli import main
from lexiseg.data.sets.catalog import data_set
from lexiseg.data.sets.open import open_data_set, splits_of
from lexiseg.data.transforms import light_pipeline
from lexiseg.errors import LexisegError
from lexiseg.evaluation.evaluate import evaluate
from lexiseg.evaluation.protocols import PROTOCOLS, find_protocol
from lexiseg.models import DenseCLIP, ZegCLIP
from lexiseg.segmentation import Segmentation
from lexiseg.segmenter import Segmenter
from lexiseg.training.segmentation import SegmentationTask
from lexiseg.training.settings import TrainSettings
from lexiseg.training.trainer import Trainer
from lexiseg.weights.folder import save_model
from tests.miniatures import MINIATURES, SIZE, WIDE, save_index, save_list, save_picture, save_wide
from tests.towers import small_clip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    written: dict[str, Path] = {}

    def of(name: str) -> Path:
        if name not in written:
            written[name] = tmp_path_factory.mktemp(name)
            MINIATURES[name][1](written[name])
        return written[name]

    return of


OF_DATA = {"voc2012": "voc2012", "coco-stuff-164k": "coco-stuff", "pascal-context-59": "context59",
           "pascal-context-459": "context459", "ade20k-150": "ade150", "ade20k-847": "ade847"}  # fmt: skip


class Fixed(Segmenter):
    """Predicts the label maps it is given, one after the other."""

    def __init__(self, answers):
        super().__init__(DenseCLIP.build(small_clip()), disk_cache=False)
        self.answers, self.asked = list(answers), []

    def predict(self, images, classes, *, window=None, batch_size=1, background=None):
        self.asked.append((classes, window))
        vocabulary = self.vocabulary(classes, background=background)
        return [Segmentation(torch.as_tensor(self.answers.pop(0)), vocabulary, image=image) for image in images]


def judge(protocol, root, answers, **options):
    data = protocol.open(root, **options)
    segmenter = Fixed(answers)
    return evaluate(
        segmenter, data, name=protocol.data_set, split="val", offsets=protocol.offsets,
        window=protocol.window_for("zegclip"), card=protocol.card(), progress=False, num_examples=1,
    ), segmenter  # fmt: skip


# What becomes of a label 255 and of background, on labels of 2 x 3 pixels written by hand.


def _voc(root, label):
    home = root / "VOCdevkit/VOC2012"
    save_picture(home / "JPEGImages/a.jpg", 0, label.shape)
    save_index(home / "SegmentationClass/a.png", label)
    save_list(home / "ImageSets/Segmentation/val.txt", ["a"])


def _coco(root, label):
    save_picture(root / "images/val2017/a.jpg", 0, label.shape)
    save_index(root / "stuffthingmaps/val2017/a.png", label, palette=False)


def _context59(root, label):
    home = root / "VOCdevkit/VOC2010"
    save_picture(home / "JPEGImages/a.jpg", 0, label.shape)
    save_index(home / "SegmentationClassContext/a.png", label)
    save_list(home / "ImageSets/SegmentationContext/val.txt", ["a"])


def _context459(root, label):
    home = root / "VOCdevkit/VOC2010"
    save_picture(home / "JPEGImages/a.jpg", 0, label.shape)
    (home / "trainval").mkdir()
    savemat(home / "trainval/a.mat", {"LabelMap": label.astype(np.uint16)})
    save_list(home / "ImageSets/Main/val.txt", ["a"])
    save_list(home / "labels.txt", [f"{number}: thing {number}" for number in range(1, 460)])


def _ade150(root, label):
    home = root / "ADEChallengeData2016"
    save_picture(home / "images/validation/a.jpg", 0, label.shape)
    save_index(home / "annotations/validation/a.png", label, palette=False)


def _ade847(root, label):
    home = root / "ADE20K_2021_17_01"
    save_picture(home / "images_detectron2/validation/a.jpg", 0, label.shape)
    save_wide(home / "annotations_detectron2/validation/a.tif", label)
    (home / "classes.json").write_text(json.dumps([f"object {number}" for number in range(847)]))


# protocol: what writes the set, the label file's values, the prediction, and by class id (pixels that are judged,
# predicted among them, right). The third column is never judged.
BY_HAND = {
    "voc-20": (_voc, [[1, 1, 0], [20, 20, 255]], [[0, 3, 0], [19, 19, 19]],
               {0: (2, 1, 1), 3: (0, 1, 0), 19: (2, 2, 2)}),
    "gzs-voc": (_voc, [[1, 1, 0], [20, 20, 255]], [[0, 3, 0], [19, 0, 19]],
                {0: (2, 2, 1), 3: (0, 1, 0), 19: (2, 1, 1)}),
    "gzs-coco": (_coco, [[0, 12, 255], [181, 20, 255]], [[0, 11, 5], [170, 0, 170]],
                 {0: (1, 2, 1), 11: (1, 1, 1), 19: (1, 0, 0), 170: (1, 1, 1)}),
    "pc-59": (_context59, [[1, 59, 0], [59, 59, 0]], [[0, 58, 0], [0, 58, 58]], {0: (1, 2, 1), 58: (3, 2, 2)}),
    "gzs-context": (_context59, [[1, 59, 0], [59, 59, 255]], [[0, 58, 0], [0, 58, 58]], {0: (1, 2, 1), 58: (3, 2, 2)}),
    "pc-459": (_context459, [[1, 256, 0], [459, 257, 0]], [[0, 255, 255], [458, 255, 0]],
               {0: (1, 1, 1), 255: (1, 2, 1), 256: (1, 0, 0), 458: (1, 1, 1)}),
    "a-150": (_ade150, [[1, 150, 0], [150, 150, 0]], [[0, 149, 0], [0, 149, 149]], {0: (1, 2, 1), 149: (3, 2, 2)}),
    "a-847": (_ade847, [[0, 255, WIDE], [846, 256, WIDE]], [[0, 255, 255], [846, 255, 0]],
              {0: (1, 1, 1), 255: (1, 2, 1), 256: (1, 0, 0), 846: (1, 1, 1)}),
}  # fmt: skip


@pytest.mark.parametrize("name", BY_HAND)
def test_what_is_not_judged(tmp_path, name):
    write, label, answer, counts = BY_HAND[name]
    write(tmp_path, np.array(label))
    report, _ = judge(find_protocol(name), tmp_path, [answer])
    found = report.confusion
    for what, place in (("labelled", 0), ("predicted", 1), ("intersection", 2)):
        values = getattr(found, what)
        expected = {index: count[place] for index, count in counts.items() if count[place]}
        assert {int(index): int(values[index]) for index in np.flatnonzero(values)} == expected, what
    card = report.protocol
    assert card["protocol"]["name"] == name and card["ignore_index"] == data_set(PROTOCOLS[name].data_set).ignore
    assert card["background"]["kind"] == "none"
    # IoU of a class that is only predicted is 0 and counts; one that is in neither is left out.
    ious = [right / (pixels + seen - right) for pixels, seen, right in counts.values()]
    assert report.summary()["miou"] == round(100 * float(np.mean(ious)), 2)


def test_labels_stay_at_their_size(tmp_path):
    """A label is judged pixel by pixel at its own size; no resize can make a class of a border pixel."""
    label = np.array([[1, 255, 2, 2, 0, 1, 1]] * 3)
    _voc(tmp_path, label)
    report, _ = judge(find_protocol("voc-20"), tmp_path, [np.where(label == 2, 1, 0)])
    assert report.confusion.labelled.sum() == 15 and report.summary()["pacc"] == 100.0


def test_seen_and_unseen_lists(tmp_path):
    _context59(tmp_path, np.array([[1, 59, 0]]))
    for name, unseen in (("gzs-context", "bed"), ("gzs-context-papers", "bird")):
        report, _ = judge(find_protocol(name), tmp_path, [[[0, 58, 0]]])
        rows = {row.name: row.seen for row in report.class_rows()}
        assert rows[unseen] is False and sum(seen is False for seen in rows.values()) == 10
    # Across data sets every class is treated alike, whatever its name.
    _, segmenter = judge(find_protocol("pc-59"), tmp_path, [[[0, 58, 0]]])
    assert {entry.seen for entry in segmenter.asked[0][0].classes} == {True}


def test_windows_of_the_authors():
    for name, protocol in PROTOCOLS.items():
        assert protocol.name == name and data_set(protocol.data_set).num_classes
        for system in ("zegclip", "cascade-clip", "spt-seg"):
            window = protocol.window_for(system)
            assert (window.size, window.stride, window.short_side, window.antialias) == (512, 426, 512, False)
        assert protocol.window_for("dense-clip") is None
    whole = find_protocol("a-847").window_for("freeseg")
    assert (whole.size, whole.short_side, whole.long_side) == (None, 640, 2560)
    assert find_protocol("a-847").window_for("deop").long_side == 2048
    assert find_protocol("gzs-coco").window_for("zsseg").short_side == 640
    assert find_protocol("gzs-voc").window_for("zsseg").short_side == 512
    with pytest.raises(LexisegError, match="did you mean 'voc-20'"):
        find_protocol("voc20")


def test_names_of_the_authors(folder):
    protocol = find_protocol("voc-20")
    assert protocol.open(folder("voc2012"), system="freeseg").vocabulary.names[19] == "tv"
    assert protocol.open(folder("voc2012"), system="zegclip").vocabulary.names[19] == "tvmonitor"
    assert find_protocol("gzs-voc").open(folder("voc2012"), system="zegformer").vocabulary.names[15] == "potted plant"


def test_command(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = ZegCLIP.build(small_clip(), {"decoder_heads": 2}, seen_names=("person", "cat"))
    save_model(model, tmp_path / "model")
    monkeypatch.setattr("lexiseg.evaluation.protocols.ONE_STAGE", None)
    small = ["--window", "64", "--stride", "64", "--limit", "1", "-w", "model", "--json"]
    monkeypatch.setattr("lexiseg.windows.working_size", lambda *sizes: sizes[:2])
    monkeypatch.setattr("lexiseg.pictures.working_size", lambda *sizes: sizes[:2])
    root = str(folder("voc2012"))
    assert main(["evaluate", root, "--protocol", "gzs-voc", *small]) == 0
    card = json.loads(capsys.readouterr().out)["protocol"]
    assert card["protocol"]["name"] == "gzs-voc" and (card["num_seen"], card["num_unseen"]) == (15, 5)
    assert card["window"]["size"] == 64 and card["window"]["short_side"] == 512 and not card["window"]["antialias"]
    assert main(["evaluate", str(folder("ade847")), "--protocol", "a-847", *small]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["protocol"]["num_classes"] == 847 and found["protocol"]["offsets"] == "all"
    assert main(["evaluate", root, "--protocol", "voc-20", "--split", "train", *small]) == 2
    assert "leave out --split" in capsys.readouterr().err
    assert main(["evaluate", "nowhere", "--protocol", "voc-20", *small]) == 2
    assert "voc2012" in capsys.readouterr().err


# Training and evaluation for real on every miniature.


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
def test_train_and_evaluate(folder, tmp_path, name):
    model, val = _train(name, folder(name), tmp_path / "run")
    report = evaluate(Segmenter(model, disk_cache=False), val, name=name, split="val", progress=False, num_examples=1)
    labels = [sample.label for sample in val]
    assert report.confusion.labelled.sum() == sum(int((label != 255).sum()) for label in labels)
    assert report.summary()["pacc"] is not None and report.save(tmp_path / "report")


@pytest.mark.parametrize("name", ["context459", "context459-tiff", "ade847", "ade847-full"])
def test_evaluate_many_classes(folder, tmp_path, name):
    """More than 255 classes: class 255 counts as any other, 65535 is ignored, and no tensor is classes x H x W."""
    val = open_data_set(MINIATURES[name][0], folder(name), "val")
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
        report = evaluate(segmenter, _Enlarged(val, big), name=name, split="val", progress=False, num_examples=1)
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
        from dataclasses import replace

        sample = self._data[index]
        image, label = (
            value.repeat_interleave(self._factor, -1).repeat_interleave(self._factor, -2)
            for value in (sample.image, sample.label)
        )
        return replace(sample, image=image, label=label)


def test_training_on_many_classes(folder, tmp_path):
    _train("ade847", folder("ade847"), tmp_path / "run")
    assert (tmp_path / "run" / "model" / "model.safetensors").is_file()


def test_own_data_with_the_recipe_option(tmp_path, capsys, monkeypatch):
    """``train RECIPE --data``: the recipe's crop and augmentation stay, its data are the folder's."""
    from lexiseg.cli.train import read_recipe

    MINIATURES["own-folders"][1](tmp_path / "my")
    recipe = read_recipe("zegclip-voc2012", ["train.steps=3"], None, tmp_path / "my")
    assert recipe.data.source == "own" and recipe.data.crop == 512 and recipe.data.augment == "paper"
    assert recipe.train.steps == 3
    recipe = read_recipe("zegclip-picture-world", [], None, tmp_path / "my")
    assert recipe.data.source == "own" and recipe.data.crop == 128 and recipe.data.label_stride == 2
    for wrong, words in ((["clip-emoji", tmp_path / "my"], "captions"), (["tiny", tmp_path / "no"], "does not exist")):
        with pytest.raises(LexisegError, match=words):
            read_recipe(wrong[0], [], None, wrong[1])
    shutil.rmtree(tmp_path / "my")
