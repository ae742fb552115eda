"""The papers' protocols on miniatures and on hand-made labels."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from scipy.io import savemat

from lexiseg.cli import main
from lexiseg.data.sets.catalog import data_set
from lexiseg.errors import LexisegError
from lexiseg.evaluation import evaluate
from lexiseg.evaluation.protocols import PROTOCOLS, find_protocol
from lexiseg.evaluation.run import run_evaluation
from lexiseg.models import DenseCLIP, ZegCLIP
from lexiseg.recipes import CatalogData, load_recipe
from lexiseg.segmentation import Segmentation
from lexiseg.segmenter import Segmenter
from lexiseg.templates import PAPER_TEMPLATES, SINGLE_TEMPLATE
from lexiseg.training.run import identity
from lexiseg.weights.folder import save_model
from lexiseg.windows import WindowPolicy
from tests.miniatures import MINIATURES, WIDE, save_index, save_list, save_picture, save_wide
from tests.models.test_region_models import make
from tests.towers import small_clip


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
    return run_evaluation(
        segmenter, data, name=protocol.data_set, split="val", offsets=protocol.offsets,
        window=protocol.windows.get("zegclip"), card=protocol.card(), seen_split=protocol.seen_split, progress=False,
        num_examples=1,
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
    (home / "ADE20K_572_pure_class.json").write_text(json.dumps([f"object {number}" for number in range(572)]))


# protocol: what writes the set, the label file's values, the prediction, and by class id (pixels that are judged,
# predicted among them, right). The third column is never judged.
BY_HAND = {
    "voc-20": (_voc, [[1, 1, 0], [20, 20, 255]], [[0, 3, 0], [19, 19, 19]],
               {0: (2, 1, 1), 3: (0, 1, 0), 19: (2, 2, 2)}),
    "voc-20b": (_voc, [[1, 1, 0], [20, 20, 255]], [[0, 20, 20], [19, 19, 19]],
                {0: (2, 1, 1), 19: (2, 2, 2), 20: (1, 2, 1)}),
    "gzs-voc": (_voc, [[1, 1, 0], [20, 20, 255]], [[0, 3, 0], [19, 0, 19]],
                {0: (2, 2, 1), 3: (0, 1, 0), 19: (2, 1, 1)}),
    "gzs-coco": (_coco, [[0, 12, 255], [181, 20, 255]], [[0, 11, 5], [170, 0, 170]],
                 {0: (1, 2, 1), 11: (1, 1, 1), 19: (1, 0, 0), 170: (1, 1, 1)}),
    "pc-59": (_context59, [[1, 59, 0], [59, 59, 255]], [[0, 58, 0], [0, 58, 58]], {0: (1, 2, 1), 58: (3, 2, 2)}),
    "gzs-context": (_context59, [[1, 59, 0], [59, 59, 255]], [[0, 58, 0], [0, 58, 58]], {0: (1, 2, 1), 58: (3, 2, 2)}),
    "pc-459": (_context459, [[1, 256, 0], [459, 257, WIDE]], [[0, 255, 255], [458, 255, 0]],
               {0: (1, 1, 1), 255: (1, 2, 1), 256: (1, 0, 0), 458: (1, 1, 1)}),
    "a-150": (_ade150, [[1, 150, 0], [150, 150, 255]], [[0, 149, 0], [0, 149, 149]], {0: (1, 2, 1), 149: (3, 2, 2)}),
    "a-847": (_ade847, [[0, 255, WIDE], [846, 256, WIDE]], [[0, 255, 255], [846, 255, 0]],
              {0: (1, 1, 1), 255: (1, 2, 1), 256: (1, 0, 0), 846: (1, 1, 1)}),
    "gzs-ade": (_ade847, [[0, 255, WIDE], [846, 256, WIDE]], [[0, 255, 255], [846, 255, 0]],
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


def test_background_is_what_context_has_beyond_voc(clean):
    protocol = find_protocol("voc-20b")
    classes = protocol.open(clean("voc2012")).vocabulary.classes
    assert [entry.name for entry in classes[:20]] == list(data_set("voc2012").classes)
    assert classes[20].name == "background" and {"sky", "grass", "wall"} < set(classes[20].words)
    assert not set(classes[20].words) & {*data_set("voc2012").classes, "table"} and len(classes[20].words) == 40
    assert protocol.card()["protocol"]["not_judged"] == "values 255 of the label files"


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
        rows = {row["name"]: row["seen"] for row in report.class_rows()}
        assert rows[unseen] is False and sum(seen is False for seen in rows.values()) == 10
    # Across datasets no class counts as seen to the model, whatever its name.
    _, segmenter = judge(find_protocol("pc-59"), tmp_path, [[[0, 58, 0]]])
    assert {entry.seen for entry in segmenter.asked[0][0].classes} == {False}


def test_ade_with_seen_and_unseen_classes(tmp_path):
    _ade847(tmp_path, np.array([[0, 571, 572]]))
    report, _ = judge(find_protocol("gzs-ade"), tmp_path, [[[0, 571, 0]]])
    assert (report.protocol["num_seen"], report.protocol["num_unseen"]) == (572, 275)
    assert report.summary()["miou_seen"] == 75.0 and report.summary()["miou_unseen"] == 0.0
    (tmp_path / "ADE20K_2021_17_01/classes.json").write_text(json.dumps(["bar", "bar", *map(str, range(845))]))
    with pytest.raises(LexisegError, match="names the class 'bar' twice"):
        find_protocol("gzs-ade").open(tmp_path)
    (tmp_path / "ADE20K_2021_17_01/ADE20K_572_pure_class.json").unlink()
    (tmp_path / "ADE20K_2021_17_01/classes.json").write_text(json.dumps([str(number) for number in range(847)]))
    with pytest.raises(LexisegError, match="572 seen classes is missing"):
        find_protocol("gzs-ade").open(tmp_path)


def test_nothing_is_seen_or_unseen_across_data_sets(clean, tmp_path):
    """Names that the model was trained on by accident make no class a seen one."""
    model = ZegCLIP.build(small_clip(), {"decoder_heads": 2}, seen_names=("person", "cat"))
    protocol = find_protocol("voc-20")
    data = protocol.open(clean("voc2012"), system="zegclip")
    options = {"name": "voc2012", "split": "val", "limit": 1, "progress": False, "num_examples": 0,
               "window": WindowPolicy(32, 32)}  # fmt: skip
    across = run_evaluation(Segmenter(model, disk_cache=False), data, offsets=protocol.offsets,
                      seen_split=protocol.seen_split, **options)  # fmt: skip
    found = across.to_dict()
    for key in ("miou_seen", "miou_unseen", "hiou"):
        assert found["metrics"][key] is None
    assert found["protocol"]["num_seen"] is None and found["protocol"]["num_unseen"] is None
    assert {row["seen"] for row in found["classes"]} == {None}
    assert "mIoU(U)" not in across.summary_line() and "hIoU" not in across.summary_line()
    titles, rows = across.table()
    assert "masks in training" not in titles and {len(row) for row in rows} == {len(titles)}
    assert find_protocol("gzs-voc").seen_split


@pytest.mark.parametrize("name", PROTOCOLS)
def test_every_system_of_the_papers_has_a_window(name):
    protocol = PROTOCOLS[name]
    for system in ("zegclip", "cascade-clip", "spt-seg", "deop", "zsseg", "zegformer", "freeseg"):
        window = protocol.windows.get(system)
        assert window is not None and window.short_side in (512, 640), system
    for system in ("deop", "zsseg", "zegformer"):
        side = 640 if name == "gzs-coco" and system != "deop" else 512
        window = protocol.windows.get(system)
        assert (window.size, window.short_side) == (None, side)
        assert window.long_side == (2560 if name == "gzs-coco" else 2048)


def test_windows_of_the_authors():
    for name, protocol in PROTOCOLS.items():
        assert protocol.name == name and data_set(protocol.data_set).num_classes
        for system in ("zegclip", "cascade-clip", "spt-seg"):
            window = protocol.windows.get(system)
            assert (window.size, window.stride, window.short_side, window.antialias) == (512, 426, 512, False)
        assert protocol.windows.get("dense-clip") is None
    whole = find_protocol("a-847").windows.get("freeseg")
    assert (whole.size, whole.short_side, whole.long_side) == (None, 640, 2560)
    assert find_protocol("a-847").windows.get("deop").long_side == 2048
    assert find_protocol("gzs-coco").windows.get("zsseg").short_side == 640
    assert find_protocol("gzs-voc").windows.get("zsseg").short_side == 512
    with pytest.raises(LexisegError, match="did you mean 'voc-20'"):
        find_protocol("voc20")


def test_names_of_the_authors(clean):
    protocol = find_protocol("voc-20")
    assert protocol.open(clean("voc2012"), system="freeseg").vocabulary.names[19] == "tv"
    assert protocol.open(clean("voc2012"), system="zegclip").vocabulary.names[19] == "tvmonitor"
    assert find_protocol("gzs-voc").open(clean("voc2012"), system="zegformer").vocabulary.names[15] == "potted plant"


def test_words_of_the_authors(clean):
    """ADE20K's synonyms are scored where somebody asks for them, and the card says what was done."""
    protocol, root = find_protocol("a-150"), clean("ade150")
    own, more = protocol.open(root).vocabulary, protocol.open(root, synonyms=True).vocabulary
    assert own.names == more.names and own.words == own.names
    assert more.classes[1].words == ("building", "edifice") and len(more.words) > 250
    card = protocol.card()["protocol"]
    assert card["synonyms"] is False and "objectInfo150.txt" in card["words"] and "not known" in card["words"]
    card = protocol.card(synonyms=True)["protocol"]
    assert card["synonyms"] is True and "chosen by the user" in card["words"]
    for protocol in PROTOCOLS.values():
        assert ("as one name" in protocol.card()["protocol"]["words"]) == (protocol.data_set == "ade20k-847")
    with pytest.raises(LexisegError, match="voc2012 gives its classes no synonyms"):
        find_protocol("voc-20").open(clean("voc2012"), synonyms=True)


def test_words_of_the_847_classes(tmp_path):
    _ade847(tmp_path, np.array([[0, 1, 2]]))
    names = ["door, gate", "gate, barrier", "wall", *(f"object {number}" for number in range(844))]
    (tmp_path / "ADE20K_2021_17_01/classes.json").write_text(json.dumps(names))
    (tmp_path / "ADE20K_2021_17_01/ADE20K_572_pure_class.json").write_text(json.dumps(names[:572]))
    protocol = find_protocol("gzs-ade")
    assert protocol.open(tmp_path).vocabulary.words == tuple(names)
    more = protocol.open(tmp_path, synonyms=True).vocabulary
    # "gate" belongs to two classes.
    assert [entry.words for entry in more.classes[:3]] == [("door, gate", "door"), ("gate, barrier", "barrier"),
                                                           ("wall",)]  # fmt: skip
    assert more.names == tuple(names) and more.classes[571].seen and more.classes[572].seen is False


def test_synonyms_of_a_recipe(clean, tmp_path):
    root = str(clean("ade150"))
    for synonyms, count in ((None, 1), (False, 1), (True, 2)):
        data = CatalogData(source="ade20k-150", root=root, synonyms=synonyms)
        for vocabulary in (data.vocabulary(), data.open("val").vocabulary):
            assert len(vocabulary.classes[1].words) == count
    # A run that was begun when there was no such key can be gone on with.
    assert "synonyms" not in identity(load_recipe("zegclip-voc2012"), None)["data"]
    MINIATURES["own-folders"][1](tmp_path)
    (tmp_path / "classes.txt").write_text("road\ncar, auto\nsky, heaven\n")
    words = [len(CatalogData(source="own", root=tmp_path, synonyms=told).open("val").vocabulary.words)
             for told in (None, True, False)]  # fmt: skip
    assert words == [5, 5, 3]


def test_templates_of_the_authors():
    for name, templates in {"gzs-voc": SINGLE_TEMPLATE, "voc-20": SINGLE_TEMPLATE, "gzs-coco": PAPER_TEMPLATES,
                            "gzs-context": PAPER_TEMPLATES, "pc-59": PAPER_TEMPLATES, "pc-459": None, "a-150": None,
                            "a-847": None}.items():  # fmt: skip
        assert find_protocol(name).templates.get("cascade-clip") == templates, name
        assert find_protocol(name).templates.get("deop") is None
    assert find_protocol("gzs-coco").templates.get("zegformer") == ("A photo of a {} in the scene",)


@pytest.mark.parametrize(
    ("system", "name", "rule", "weight", "threshold"),
    [
        ("zsseg", "a-847", "released", 0.7, 0.3),
        ("zsseg", "a-150", "released", 0.5, 0.4),
        ("zsseg", "pc-59", "released", 0.4, 0.5),
        ("zsseg", "voc-20", "released", 0.8, 0.5),
        ("zsseg", "gzs-coco", "released", 0.8, 0.5),
        ("freeseg", "a-847", "region", 0.8, 0.5),
        ("freeseg", "gzs-ade", "released", 0.8, 0.5),
        ("zegformer", "a-847", "released", 2 / 3, 0.5),
    ],
)
def test_how_authors_join_the_two_opinions(system, name, rule, weight, threshold):
    model = make(system)
    protocol = find_protocol(name)
    changes = protocol.set_up(model)
    assert (model.options.ensemble.rule, model.options.ensemble.weight) == (rule, weight)
    assert model.options.crops.threshold == model.region_encoder.crops.threshold == threshold
    assert protocol.card(settings=changes)["protocol"]["settings"] == changes
    assert bool(changes) == (name in ("a-847", "a-150", "pc-59") and system != "zegformer")


def test_maft_keeps_its_own_settings_on_other_hosts():
    model = make("zsseg", maft={})
    assert find_protocol("a-847").set_up(model) == {} and model.options.ensemble.weight == 0.8
    assert find_protocol("a-847").set_up(DenseCLIP.build(small_clip())) == {}
    model = make("freeseg", maft={})
    assert find_protocol("a-847").set_up(model) == {"ensemble": {"rule": "region"}}


def test_a_segmenter_that_is_evaluated_keeps_its_own_settings(clean):
    """The next evaluation of the same segmenter would else go by this protocol's templates, windows and threshold."""
    model = DenseCLIP.build(small_clip(), {"method": "naclip"})
    segmenter, before = Segmenter(model, disk_cache=False, templates=["my {}"]), (model.options, model.window)
    report = evaluate(clean("voc2012"), segmenter, protocol="training-free-voc21", limit=1, progress=False)
    assert report.protocol["templates"] == ["my {}"]
    assert (
        report.protocol["protocol"]["settings"]["threshold"] == 0.1 and report.protocol["window"]["short_side"] == 336
    )
    assert (model.options, model.window) == before and model.postprocessing is None
    model = ZegCLIP.build(small_clip(), {"decoder_heads": 2})
    segmenter = Segmenter(model, disk_cache=False)
    report = evaluate(clean("voc2012"), segmenter, protocol="gzs-voc", limit=1, window=0, progress=False)
    assert report.protocol["templates"] == list(SINGLE_TEMPLATE) and segmenter.templates is None
    for late in ({"templates": "paper"}, {"refine": "edges"}, {"device": "cpu"}, {"dtype": "bf16"}):
        with pytest.raises(LexisegError, match="already loaded"):
            evaluate("picture-world", segmenter, **late)


def test_an_ensemble_knows_of_no_seen_class_across_data_sets(clean):
    """ZSSeg's two opinions are joined as for unseen classes, though the model was trained on some of the names."""
    model = make("zsseg")
    told: list[object] = []
    real = model.score
    model.score = lambda *args, seen=None, **more: (
        told.append(seen), real(*args, seen=seen, **more))[1]  # fmt: skip
    evaluate(clean("voc2012"), Segmenter(model, disk_cache=False), protocol="voc-20", limit=1, window=0,
             proposals=True, progress=False)  # fmt: skip
    assert told == [None, None]  # the second time for the counters of DeOP's Table 8


def test_the_authors_size_for_real(clean, tmp_path, capsys, monkeypatch):
    """The shorter side of 512, windows and all, under --protocol; in the other tests pictures stay small."""
    monkeypatch.chdir(tmp_path)
    clip = small_clip(vision_cfg={"patch_size": 32})
    model = ZegCLIP.build(clip, {"decoder_heads": 2}, seen_names=("person", "cat"))
    model.default_templates = PAPER_TEMPLATES
    save_model(model, tmp_path / "model")
    shapes: list[tuple[int, ...]] = []
    real = ZegCLIP.encode_images
    monkeypatch.setattr(
        ZegCLIP, "encode_images", lambda self, images: (shapes.append(tuple(images.shape)), real(self, images))[1]
    )
    words = ["--protocol", "voc-20", "-w", "model", "--limit", "1", "--json"]
    assert main(["evaluate", str(clean("voc2012")), *words]) == 0
    card = json.loads(capsys.readouterr().out)["protocol"]
    assert card["window"]["size"] == card["window"]["short_side"] == 512 and card["templates"] == list(SINGLE_TEMPLATE)
    # 36 x 48 becomes 512 x 683, which two windows cover.
    assert shapes == [(1, 3, 512, 512)] * 2
    # Somebody's own templates come first.
    words = [*words, "--window", "64", "--stride", "64", "--template", "the {}"]
    monkeypatch.setattr("lexiseg.windows.working_size", lambda *sizes: sizes[:2])
    monkeypatch.setattr("lexiseg.pictures.working_size", lambda *sizes: sizes[:2])
    assert main(["evaluate", str(clean("voc2012")), *words]) == 0
    assert json.loads(capsys.readouterr().out)["protocol"]["templates"] == ["the {}"]


def test_command_without_an_ensemble(clean, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_model(make("freeseg", regions="mask-attention"), tmp_path / "model")
    words = ["--protocol", "voc-20", "-w", "model", "--limit", "1", "--json"]
    assert main(["evaluate", str(clean("voc2012")), *words]) == 0
    card = json.loads(capsys.readouterr().out)["protocol"]
    assert card["protocol"]["settings"] == {"ensemble": {"rule": "region"}}
    assert card["model"]["options"]["ensemble"]["rule"] == "region" and card["window"]["short_side"] == 640


def test_command_with_synonyms(clean, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_model(DenseCLIP.build(small_clip(), {"short_side": 32}), tmp_path / "model")
    words = ["-w", "model", "--limit", "1", "--json"]
    root = str(clean("ade150"))
    counts = {}
    for option in ((), ("--synonyms",), ("--no-synonyms",)):
        assert main(["evaluate", root, "--protocol", "a-150", *words, *option]) == 0
        card = json.loads(capsys.readouterr().out)["protocol"]
        counts[option] = card["num_words"], card["protocol"]["synonyms"]
    assert counts[()] == counts["--no-synonyms",] == (150, False)
    assert counts["--synonyms",][0] > 250 and counts["--synonyms",][1] is True
    assert main(["evaluate", "picture-world", *words, "--synonyms"]) == 2
    assert "leave it out" in capsys.readouterr().err


def test_command(clean, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = ZegCLIP.build(small_clip(), {"decoder_heads": 2}, seen_names=("person", "cat"))
    save_model(model, tmp_path / "model")
    small = ["--window", "64", "--stride", "64", "--limit", "1", "-w", "model", "--json"]
    monkeypatch.setattr("lexiseg.windows.working_size", lambda *sizes: sizes[:2])
    monkeypatch.setattr("lexiseg.pictures.working_size", lambda *sizes: sizes[:2])
    root = str(clean("voc2012"))
    assert main(["evaluate", root, "--protocol", "gzs-voc", *small]) == 0
    card = json.loads(capsys.readouterr().out)["protocol"]
    assert card["protocol"]["name"] == "gzs-voc" and (card["num_seen"], card["num_unseen"]) == (15, 5)
    assert card["window"]["size"] == 64 and card["window"]["short_side"] == 512 and not card["window"]["antialias"]
    assert main(["evaluate", str(clean("ade847")), "--protocol", "a-847", *small]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["protocol"]["num_classes"] == 847 and found["protocol"]["offsets"] == "none"
    assert found["metrics"]["hiou"] is None and "one name" in found["protocol"]["protocol"]["words"]
    assert main(["evaluate", root, "--protocol", "voc-20", "--split", "train", *small]) == 2
    assert "drop --split" in capsys.readouterr().err
    assert main(["evaluate", "nowhere", "--protocol", "voc-20", *small]) == 2
    assert "voc2012" in capsys.readouterr().err


def test_the_background_of_voc_is_what_context_has_beyond_it() -> None:
    """The table writes the words out; the catalogue has both lists. Context's table is VOC's dining table."""
    voc = {*data_set("voc2012").classes, "table"}
    beyond = tuple(name for name in data_set("pascal-context-59").classes if name not in voc)
    assert PROTOCOLS["voc-20b"].background == beyond
