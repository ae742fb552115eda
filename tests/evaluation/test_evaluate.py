"""The evaluation: what is counted, what the report says, and the grid."""

import json
import warnings
from contextlib import nullcontext
from dataclasses import asdict

import numpy as np
import pytest
import torch
from PIL import Image

import lexiseg
from lexiseg.clip.model import build_clip
from lexiseg.data.base import Sample
from lexiseg.data.picture_world import write_voc
from lexiseg.errors import LexisegError, LexisegWarning
from lexiseg.evaluation import evaluate
from lexiseg.evaluation.report import Example, draw_grid
from lexiseg.evaluation.run import run_evaluation, spread
from lexiseg.journal import Journal
from lexiseg.models import ZegCLIP
from lexiseg.segmentation import Segmentation
from lexiseg.segmenter import Segmenter
from lexiseg.templates import PAPER_TEMPLATES
from lexiseg.vocabulary import Vocabulary
from lexiseg.weights.hashes import weights_hash
from lexiseg.windows import WindowPolicy

VISION = {"image_size": 32, "patch_size": 8, "width": 64, "layers": 2, "head_width": 32}
TEXT = {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1}
NAMES = ["cat, kitten", "dog", "sky"]


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    clip = build_clip({"model_cfg": {"embed_dim": 32, "vision_cfg": VISION, "text_cfg": TEXT}}, name="tiny")
    return ZegCLIP.build(clip, {"decoder_heads": 2}, seen_names=("cat", "dog"))


class Noise:
    """Random pictures and labels of different sizes."""

    def __init__(self, length=5, flagged=True, bad=None):
        self.vocabulary = Vocabulary.parse(NAMES)
        if flagged:
            self.vocabulary = self.vocabulary.with_seen(["cat", "sky"])
        self.length, self.bad = length, bad
        self.read = []

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        self.read.append(index)
        rng = np.random.default_rng(index)
        height, width = 20 + 3 * index, 30
        label = rng.choice([0, 1, 2, 255], (height, width))
        if index == self.bad:
            label[0, 0] = 9
        image = rng.integers(0, 256, (3, height, width), np.uint8)
        return Sample(torch.from_numpy(image), torch.from_numpy(label), f"noise-{index}")


class Oracle(Segmenter):
    """Knows the answer, but gives pixels of class 1 the id `wrong`."""

    def __init__(self, model, dataset, wrong=None):
        super().__init__(model, disk_cache=False)
        self.dataset, self.wrong, self.asked = dataset, wrong, 0

    def predict(self, images, classes, *, window=None, batch_size=1, background=None):
        results = []
        for image in images:
            label = self.dataset[self.dataset.read[self.asked]].label
            self.dataset.read.pop()
            self.asked += 1
            label = torch.where(label == 255, 0, label)
            if self.wrong is not None:
                label = torch.where(label == 1, self.wrong, label)
            results.append(Segmentation(label, self.vocabulary(classes, background=background), image=image))
        return results


def run(segmenter, dataset, **options):
    return run_evaluation(segmenter, dataset, name="noise", split="val", progress=False, **options)


def test_a_perfect_prediction_scores_100(model):
    data = Noise()
    report = run(Oracle(model, data), data, batch_size=2)
    summary = report.summary()
    assert summary.pop("unseen_to_seen") == 0.0 and set(summary.values()) == {100.0}
    assert report.confusion.labelled.sum() == sum((data[i].label != 255).sum() for i in range(5))
    assert "hIoU 100.00" in report.summary_line()


def test_a_class_that_is_never_found(model):
    data = Noise()
    report = run(Oracle(model, data, wrong=255), data)
    assert report.metrics.iou.tolist() == [1.0, 0.0, 1.0]
    assert report.summary()["miou_seen"] == 100 and report.summary()["miou_unseen"] == 0
    assert report.summary()["hiou"] == 0 and 0 < report.summary()["pacc"] < 100


def test_seen_comes_from_the_dataset_and_else_from_the_model(model):
    flagged, plain = Noise(), Noise(flagged=False)
    rows = run(Oracle(model, flagged), flagged).class_rows()
    assert [(row["name"], row["seen"]) for row in rows] == [("cat", True), ("dog", False), ("sky", True)]
    rows = run(Oracle(model, plain), plain).class_rows()
    assert [row["seen"] for row in rows] == [True, True, False]


def test_the_real_segmenter_and_the_protocol_card(model, tmp_path):
    data = Noise()
    segmenter = Segmenter(model, templates="paper", disk_cache=False)
    window = WindowPolicy(16, 8, 24)
    report = run(segmenter, data, window=window, batch_size=3, limit=4, num_examples=2, seed=11)
    expected = np.zeros(3, np.int64)
    for index in spread(5, 4):
        sample = data[index]
        label = segmenter.predict(sample.image, data.vocabulary, window=window).label_map.numpy()
        judged = sample.label.numpy() != 255
        expected += np.bincount(label[judged & (label == sample.label.numpy())], minlength=3)
    assert (report.confusion.intersection == expected).all()

    paths = report.save(tmp_path / "report")
    assert [path.name for path in paths] == ["report.json", "grid.png"]
    saved = json.loads(paths[0].read_text())
    card = saved["protocol"]
    assert card["dataset"] == "noise" and card["split"] == "val" and card["num_pictures"] == 4
    assert card["window"] == asdict(window) and card["templates"] == list(PAPER_TEMPLATES)
    assert card["background"]["kind"] == "none"
    assert card["seed"] == 11
    assert card["model"]["system"] == "zegclip" and card["model"]["clip"] == "tiny"
    assert card["model"]["weights_sha256"] == weights_hash(model) and len(weights_hash(model)) == 64
    assert card["dtype"] == "float32" and card["device"] == "cpu" and card["versions"]["torch"] == torch.__version__
    assert saved["metrics"] == report.summary() and len(saved["classes"]) == 3
    assert Image.open(paths[1]).width > 3 * 256
    titles, rows = report.table()
    assert len(titles) == len(rows[0]) and rows[1][:2] == ["dog", "unseen"]


def test_a_background_class_counts_as_no_class(model):
    data = Noise(2)
    segmenter = Segmenter(model, disk_cache=False)
    report = run(segmenter, data, background="something else entirely")
    assert len(report.class_rows()) == 3 and report.protocol["background"]["kind"] == "class"
    threshold = run(segmenter, data, background=2.0)  # no score is that large
    assert threshold.confusion.predicted.sum() == 0 and threshold.summary()["pacc"] == 0


def test_nan_is_null_in_json(model, tmp_path):
    data = Noise()
    data.vocabulary = Vocabulary.parse(NAMES).with_seen(["cat", "dog", "sky"])
    report = run(Oracle(model, data), data, num_examples=0)
    assert report.grid() is None and report.summary()["hiou"] is None
    assert [path.name for path in report.save(tmp_path)] == ["report.json"]
    assert "NaN" not in (tmp_path / "report.json").read_text() and "hIoU -" in report.summary_line()


def test_a_label_that_is_no_class_names_the_sample(model):
    data = Noise(bad=3)
    with pytest.raises(LexisegError, match=r"'noise-3' cannot be evaluated: the label 9 "):
        run(Segmenter(model, disk_cache=False), data)
    with pytest.raises(LexisegError, match="'val' of 'noise' is empty"):
        run(Segmenter(model, disk_cache=False), Noise(0))


def test_weights_hash_sees_every_bit(model):
    layer = torch.nn.Linear(3, 2).to(torch.bfloat16)
    before = weights_hash(layer)
    assert before == weights_hash(layer)
    with torch.no_grad():
        layer.weight[1, 2] += 1
    assert weights_hash(layer) != before


def test_spread():
    assert spread(5, None) == spread(5, 9) == [0, 1, 2, 3, 4]
    assert spread(10, 4) == [0, 2, 5, 7] and spread(3, 0) == [] and spread(0, 3) == []


def test_grid_holds_rows_of_different_shapes():
    vocabulary = Vocabulary.parse(NAMES).with_seen(["cat", "dog"])
    rng = np.random.default_rng(0)

    def example(height, width):
        image = rng.integers(0, 256, (height, width, 3), np.uint8)
        return Example(image, rng.integers(0, 3, (height, width)), np.full((height, width), 255, np.uint8), "x")

    grid = draw_grid([example(40, 60), example(60, 40)], vocabulary, width=120)
    assert grid.mode == "RGB" and grid.width >= 3 * 126 and grid.height > 80 + 180
    first, last = (Example(np.zeros((8, 8, 3), np.uint8), np.full((8, 8), at), np.full((8, 8), at)) for at in (0, 1))
    legends = [np.asarray(draw_grid([one], vocabulary)).shape for one in (first, last)]
    assert legends[0] == legends[1]  # the first class has a legend like any other
    widths = {draw_grid([example(100, 100)] * count, vocabulary).width for count in (5, 10, 20)}
    assert len(widths) == 1  # its letters do not grow with the number of rows


def counts(report):
    return [getattr(report.confusion, name).tolist() for name in ("intersection", "predicted", "labelled")]


@pytest.mark.parametrize("batch_size", [1, 2])
def test_an_evaluation_goes_on_from_its_parts(model, tmp_path, batch_size):
    segmenter, journal = Segmenter(model, disk_cache=False), Journal(tmp_path / "parts")
    options = {"journal": journal, "batch_size": batch_size, "num_examples": 3}
    whole = run(segmenter, Noise(), batch_size=batch_size, num_examples=3)
    with pytest.raises(LexisegError, match="noise-3"):
        run(segmenter, Noise(bad=3), **options)
    assert [line["batches"] for line in journal.lines() if "batches" in line] == [[n] for n in range(3 // batch_size)]
    with journal.files()[0].open("a") as file:
        file.write('{"batches": [')  # what a kill in the middle of a write leaves
    left = Noise()
    resumed = run(segmenter, left, resume=True, **options)
    assert counts(resumed) == counts(whole) and resumed.summary() == whole.summary()
    assert [example.name for example in resumed.examples] == [example.name for example in whole.examples]
    # What was counted is not predicted again, but for the pictures that are shown.
    shown = {int(example.name.split("-")[1]) for example in whole.examples}
    assert left.read[: 5 - 3 // batch_size * batch_size] == list(range(3 // batch_size * batch_size, 5))
    assert shown <= set(left.read)

    finished = Noise()
    again = run(segmenter, finished, resume=True, **{**options, "num_examples": 0})
    assert counts(again) == counts(whole) and finished.read == []
    anew = Noise()
    assert counts(run(segmenter, anew, **options)) == counts(whole) and len(anew.read) == 5
    journal.remove()
    assert not journal.folder.exists()


def test_parts_that_do_not_fit_are_named(model, tmp_path):
    journal = Journal(tmp_path / "parts")
    segmenter, options = Segmenter(model, disk_cache=False), {"journal": journal, "num_examples": 0}
    run(segmenter, Noise(3), **options)
    with pytest.raises(LexisegError, match="other settings: 'num_pictures' was 3 and is now 4"):
        run(segmenter, Noise(4), resume=True, **options)
    others, larger = Noise(3), Noise(3)
    others.names, larger.size = ("a", "b", "c"), 64
    with pytest.raises(LexisegError, match="other settings: 'pictures' was 3"):
        run(segmenter, others, resume=True, **options)
    with pytest.raises(LexisegError, match="other settings: 'size' was not set and is now 64"):
        run(segmenter, larger, resume=True, **options)
    with pytest.raises(LexisegError, match="other settings: 'batch_size' was 1 and is now 2"):  # numbers of batches
        run(segmenter, Noise(3), resume=True, batch_size=2, **options)
    shown = Noise(3)
    for step in range(2):  # the picture that shows a class changes under its name
        Image.new("L", (32, 32), 80 * step).save(tmp_path / "cat.png")
        shown.vocabulary = Vocabulary.parse([f"cat = photo:{tmp_path}/cat.png#8 8 16 16", *NAMES[1:]])
        other = {**options, "journal": Journal(tmp_path / "shown"), "resume": step == 1}
        with pytest.raises(LexisegError, match="other settings: 'exemplars") if step else nullcontext():
            run(segmenter, shown, **other)
    (path,) = journal.files()
    (journal.folder / "copy.0.jsonl").write_bytes(path.read_bytes())
    with pytest.raises(LexisegError, match="counted twice"):
        run(segmenter, Noise(3), resume=True, **options)


def test_the_function_of_the_command_in_python(tmp_path):
    data = write_voc(tmp_path / "data", num_train=1, num_val=2, size=32)
    report = evaluate(data, "zegclip-emoji", output=tmp_path / "out", window=32, stride=16, progress=False)
    assert report.protocol["window"]["stride"] == 16 and report.protocol["num_pictures"] == 2
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"report.json", "grid.png"}
    again = evaluate("tiny", lexiseg.load("zegclip-emoji"), limit=1, progress=False)
    assert again.protocol["dataset"] == "picture-world" and again.protocol["num_pictures"] == 1
    again = evaluate("tiny", lexiseg.load("zegclip-emoji"), overrides=["data.val_length=3"], progress=False)
    assert again.protocol["num_pictures"] == 3
    for wrong, words in (
        ({"what": "picture-world", "split": "train"}, "its val or its test split"),
        ({"what": "picture-world", "classes": "classes.txt"}, "--classes is for folders, not for 'picture-world'"),
        ({"what": data, "size": 64}, "--size is for picture-world"),
        ({"what": "clip-emoji"}, "has no labels"),
        ({"what": "tiny", "split": "val"}, "already defines its evaluation data"),
        ({"what": "picture-world", "overrides": ["data.size=32"]}, "'picture-world' is not a recipe"),
        ({"what": "nowhere", "protocol": "gzs-voc"}, "is not a folder"),
        ({"what": data, "resume": True}, "with the earlier counts"),
        ({"what": data, "batch_size": 0}, "batch size must be a whole number of at least 1"),
        ({"what": data, "limit": 0}, "limit must be a whole number of at least 1"),
        ({"what": "picture-world", "size": 0}, "side of a picture must be a whole number of at least 16"),
    ):
        with pytest.raises(LexisegError, match=words):
            evaluate(weights="zegclip-emoji", **wrong)


def test_a_recipe_says_how_but_keeps_the_templates_of_a_loaded_model(tmp_path):
    data = {"source": "picture-world", "size": 32, "length": 1, "val_size": 32, "val_length": 1}
    said = {"kind": "evaluation", "data": data, "templates": ["one {}"], "offsets": "none"}
    (tmp_path / "mine.yaml").write_text(json.dumps({**said, "window": {"size": 32, "stride": 16}}))
    for own, templates in ((None, ["one {}"]), (["two {}"], ["two {}"])):
        segmenter = lexiseg.load("zegclip-emoji", templates=own)
        facts = evaluate(tmp_path / "mine.yaml", segmenter, progress=False).protocol
        assert (facts["templates"], facts["offsets"], facts["window"]["stride"]) == (templates, "none", 16)
        other = evaluate(tmp_path / "mine.yaml", segmenter, window=0, background="sea", progress=False).protocol
        assert other["window"]["size"] is None and other["background"]["name"] == "sea"


def test_unseen_classes_that_the_model_had_masks_of_are_noted(tmp_path):
    data = write_voc(tmp_path / "data", num_train=1, num_val=1, size=32)
    with warnings.catch_warnings():
        warnings.simplefilter("error", LexisegWarning)
        evaluate(data, "zegclip-emoji", progress=False)
    (data / "unseen.txt").write_text("banana\ngiraffe\ndog\n")  # of which giraffe had no masks
    with pytest.warns(LexisegWarning, match="include 2 that this model had masks of in training, 'dog' first"):
        evaluate(data, "zegclip-emoji", progress=False)
