"""Pictures and words in, results out: windows, batches, backgrounds, threads, mistakes."""

from __future__ import annotations

import copy
import io
import pickle
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import lexiseg
from lexiseg.clip.model import CLIP
from lexiseg.errors import LexisegError
from lexiseg.models.base import ImageFeatures, SegmentationModel
from lexiseg.models.dense_clip import DenseCLIP
from lexiseg.models.zegclip import ZegCLIP
from lexiseg.scores import GridScores
from lexiseg.segmentation import Segmentation
from lexiseg.segmenter import Segmenter, pick_device
from lexiseg.vocabulary import PAPER_TEMPLATES, SINGLE_TEMPLATE, Vocabulary
from lexiseg.windows import WindowPolicy, check_proportions
from tests.patchwork import WORDS, Patchwork, picture, segmenter
from tests.towers import small_clip


@pytest.fixture(scope="module")
def clip() -> CLIP:
    return small_clip()


@pytest.fixture(scope="module")
def zegclip(clip: CLIP) -> SegmentationModel:
    torch.manual_seed(1)
    options = {"num_prompts": 2, "decoder_heads": 2, "decoder_layers": 1, "window_size": 32, "window_stride": 24}
    return ZegCLIP.build(clip, {**options, "short_side": 32, "mask_size": None}).eval()


@pytest.fixture(scope="module")
def dense(clip: CLIP) -> SegmentationModel:
    return DenseCLIP.build(clip, {}).eval()


@pytest.fixture()
def folder(tmp_path: Path) -> Path:
    for index, size in enumerate([(40, 50), (40, 50), (30, 60)]):
        Image.fromarray(picture(*size, seed=index)).save(tmp_path / f"p{index}.png")
    (tmp_path / "p0b.jpg").write_text("I am text.")
    (tmp_path / "p3.png").write_bytes((tmp_path / "p2.png").read_bytes()[:60])
    Image.new("RGB", (1, 1)).save(tmp_path / "p4.png")
    return tmp_path


def same(a: Segmentation, b: Segmentation) -> None:
    assert torch.equal(a.label_map, b.label_map)
    assert a.scores is not None and b.scores is not None
    torch.testing.assert_close(a.scores, b.scores)


@pytest.mark.parametrize("name", ["patchwork", "zegclip", "dense"])
def test_a_prediction(name: str, clip: CLIP, request: pytest.FixtureRequest) -> None:
    model = Patchwork(clip) if name == "patchwork" else request.getfixturevalue(name)
    for height, width in ((33, 47), (5, 30), (2, 2)):
        result = segmenter(model).predict(picture(height, width), WORDS)
        assert result.size == (height, width)
        assert result.classes == ("cat", "tree", "sky")
        assert result.scores is not None and bool(result.scores.isfinite().all())
        assert result.image is not None and result.metadata["system"] == model.system
        assert abs(sum(row.fraction for row in result.table()) - 1) < 1e-6


def test_every_holder_of_a_picture_gives_the_same_result(zegclip: SegmentationModel, tmp_path: Path) -> None:
    array = picture(17, 23)
    path = tmp_path / "a.png"
    Image.fromarray(array).save(path)
    run = segmenter(zegclip)
    expected = run.predict(path, WORDS)
    assert expected.name == str(path)
    tensor = torch.from_numpy(array).permute(2, 0, 1)
    for source in (str(path), path.read_bytes(), io.BytesIO(path.read_bytes()), Image.open(path), array, tensor):
        same(run.predict(source, WORDS), expected)
    for result in run.predict([path, array], WORDS):
        same(result, expected)
    same(run.predict(torch.stack([tensor, tensor]), WORDS)[0], expected)  # type: ignore[index]


@pytest.mark.parametrize("name", ["patchwork", "zegclip"])
@pytest.mark.parametrize("stride", [13, 32])
def test_batched_windows_equal_single_ones(name: str, stride: int, clip: CLIP, request: pytest.FixtureRequest) -> None:
    model = Patchwork(clip) if name == "patchwork" else request.getfixturevalue(name)
    policy = WindowPolicy(24, stride - 8, 24)
    images = [picture(24, 45), picture(30, 24, seed=1)]
    run = segmenter(model)
    single = [run.predict(image, WORDS, window=policy, batch_size=1) for image in images]
    for batch_size in (3, 64):
        for one, many in zip(single, run.predict(images, WORDS, window=policy, batch_size=batch_size), strict=True):
            assert one.scores is not None and many.scores is not None
            torch.testing.assert_close(many.scores, one.scores, atol=1e-5, rtol=1e-4)
            assert (one.label_map != many.label_map).float().mean() < 0.005


def test_windows_of_several_pictures_share_a_batch(clip: CLIP) -> None:
    model = Patchwork(clip, WindowPolicy(32, 32, None))
    results = segmenter(model).predict([picture(32, 64, seed) for seed in range(3)], WORDS, batch_size=4)
    assert model.batch_sizes == [4, 2]
    for seed, result in enumerate(results):
        same(result, segmenter(model).predict(picture(32, 64, seed), WORDS))


def test_overlapping_windows_are_averaged(clip: CLIP) -> None:
    model = Patchwork(clip, WindowPolicy(16, 8, None))
    image = picture(24, 16)
    run = segmenter(model)
    vocabulary = run.vocabulary("cat; sky")
    text = run.embedder(vocabulary)
    pixels = torch.from_numpy(image).permute(2, 0, 1)[None].float() / 255
    normalised = (pixels - torch.tensor(model.mean).view(1, 3, 1, 1)) / torch.tensor(model.std).view(1, 3, 1, 1)
    total, count = torch.zeros(2, 24, 16), torch.zeros(24, 16)
    for top in (0, 8):
        total[:, top : top + 16] += model(normalised[:, :, top : top + 16], text).dense((16, 16))[0]
        count[top : top + 16] += 1
    mean = total / count
    result = run.predict(image, "cat; sky")
    assert result.scores is not None
    torch.testing.assert_close(result.scores, mean.amax(0))
    assert torch.equal(result.label_map.long(), mean.argmax(0))


def test_pictures_without_anything_to_see(clip: CLIP) -> None:
    run = segmenter(Patchwork(clip, WindowPolicy(32, 24, 32)))
    with pytest.raises(LexisegError, match=r"1 x 1 pixels, too few"):
        run.predict(picture(2, 2)[:1, :1], WORDS)
    for array in (np.zeros((1, 5000, 3), np.uint8), np.zeros((5000, 2, 3), np.uint8)):
        with pytest.raises(LexisegError, match=r"too few|too narrow"):
            run.predict(array, WORDS)
    assert run.predict(np.zeros((2, 128, 3), np.uint8), WORDS).size == (2, 128)
    check_proportions(2, 128)


def test_a_folder_with_bad_files_goes_on(clip: CLIP, folder: Path) -> None:
    run = segmenter(Patchwork(clip))
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
    listed = list(run.predict_folder(paths, WORDS))
    assert [path for path, _ in listed] == paths
    assert "missing.png" in str(listed[1][1])
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


def test_a_file_of_classes_is_read_anew(clip: CLIP, tmp_path: Path) -> None:
    segmenter, path = Segmenter(Patchwork(clip)), tmp_path / "classes.txt"
    name = str(path)
    for names in (("cat",), ("dog", "sky")):
        path.write_text("\n".join(names))
        assert segmenter.vocabulary(name).names == names


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
def test_any_number_of_classes_in_the_users_order(num_classes: int, clip: CLIP) -> None:
    names = [f"thing {index}" for index in range(num_classes)]
    names.reverse()
    result = segmenter(Patchwork(clip)).predict(picture(40, 40), names)
    assert result.classes == tuple(names)
    assert result.label_map.dtype == (torch.uint8 if num_classes < 256 else torch.int32)
    assert result.num_ignored == 0
    single = {name: segmenter(Patchwork(clip)).predict(picture(40, 40), [name]).scores for name in names[:3]}
    assert result.scores is not None
    for scores in single.values():
        assert scores is not None and bool((result.scores >= scores - 1e-5).all())


def test_synonyms_join(clip: CLIP) -> None:
    run, image = segmenter(Patchwork(clip)), picture(40, 40)
    joined = run.predict(image, "cat; tree, bush")
    apart = run.predict(image, "cat; tree; bush")
    assert torch.equal(joined.label_map, apart.label_map.clamp(max=1))
    same(joined, Segmentation(apart.label_map.clamp(max=1), joined.vocabulary, apart.scores))


def test_backgrounds(clip: CLIP) -> None:
    run, image = segmenter(Patchwork(clip)), picture(40, 40)
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
    assert segmenter(model).vocabulary("cat").templates == PAPER_TEMPLATES
    assert segmenter(model).vocabulary(Vocabulary.parse("cat")).templates == PAPER_TEMPLATES
    assert segmenter(model).vocabulary(Vocabulary.parse("cat", templates="a {}")).templates == ("a {}",)
    assert segmenter(model, templates="the {}").vocabulary(Vocabulary.parse("cat", templates="a {}")).templates == (
        "the {}",
    )
    with pytest.raises(LexisegError, match="exactly one"):
        segmenter(model, templates=["nothing"])


def test_a_long_name_is_named(clip: CLIP) -> None:
    with pytest.raises(LexisegError, match=r"class 'very very.*tokens"):
        segmenter(Patchwork(clip)).predict(picture(16, 16), ["cat", "very " * 100 + "long"])


@pytest.mark.parametrize("name", ["patchwork", "zegclip", "dense"])
def test_set_image_once_predict_many(name: str, clip: CLIP, request: pytest.FixtureRequest) -> None:
    model = Patchwork(clip, WindowPolicy(16, 12, 20)) if name == "patchwork" else request.getfixturevalue(name)
    run, image = segmenter(model), picture(20, 39)
    with pytest.raises(LexisegError, match="set_image"):
        run.predict(classes=WORDS)
    run.set_image(image, batch_size=2)
    encoded = getattr(model, "num_encoded", 0)
    results = [run.predict(classes=classes) for classes in (WORDS, "dog; hat", WORDS)]
    assert getattr(model, "num_encoded", 0) == encoded
    for result, classes in zip(results, (WORDS, "dog; hat", WORDS), strict=True):
        expected = run.predict(image, classes, batch_size=2)
        assert result.scores is not None and expected.scores is not None
        torch.testing.assert_close(result.scores, expected.scores, atol=1e-5, rtol=1e-4)
    with pytest.raises(LexisegError, match="set_image instead"):
        run.predict(classes=WORDS, window=WindowPolicy(16, 16, None))
    with pytest.raises(LexisegError, match="too few"):
        run.set_image(np.zeros((1, 1, 3), np.uint8))


def test_bf16_stays_close(zegclip: SegmentationModel) -> None:
    image = picture(40, 40)
    exact, rough = segmenter(zegclip).predict(image, WORDS), segmenter(zegclip, dtype="bf16").predict(image, WORDS)
    assert rough.scores is not None and exact.scores is not None and rough.scores.dtype == torch.float32
    torch.testing.assert_close(rough.scores, exact.scores, atol=0.03, rtol=0.03)
    assert rough.metadata["dtype"] == "bfloat16"
    assert next(zegclip.parameters()).dtype == torch.float32


def test_devices_and_types_are_checked(clip: CLIP) -> None:
    model = Patchwork(clip)
    assert segmenter(model, device="cpu").device.type == "cpu"
    assert pick_device("auto").type in ("cpu", "cuda", "mps")
    for wrong in ("tpu9", "cuda:99", "meta"):
        with pytest.raises(LexisegError, match=wrong):
            segmenter(model, device=wrong)
    for wrong_type in ("int8", torch.int64):
        with pytest.raises(LexisegError, match="int"):
            segmenter(model, dtype=wrong_type)
    with pytest.raises(LexisegError, match="batch size"):
        segmenter(model).predict(picture(8, 8), "cat", batch_size=0)
    with pytest.raises(LexisegError, match="No classes"):
        segmenter(model).predict(picture(8, 8))
    with pytest.raises(LexisegError, match="8 x 8 = 64 pixels, more than the limit of 63;"):
        segmenter(model, max_pixels=63).predict(picture(8, 8), "cat")
    assert segmenter(model).predict([], "cat") == []


def test_a_model_in_training_stays_in_training(zegclip: SegmentationModel) -> None:
    zegclip.train()
    frozen = zegclip.clip
    frozen.eval()
    modes = {name: module.training for name, module in zegclip.named_modules()}
    run = segmenter(zegclip)
    same(run.predict(picture(32, 32), WORDS), run.predict(picture(32, 32), WORDS))  # dropout would differ
    assert {name: module.training for name, module in zegclip.named_modules()} == modes
    zegclip.eval()


class Broken(Patchwork):
    def score(self, features: ImageFeatures, text: Tensor, **options: Any) -> GridScores:
        features.values["pooled"][features.values["pooled"].mean((1, 2, 3)) > -9] *= float("nan")
        return super().score(features, text, **options)


def test_scores_that_are_not_numbers_name_the_picture(clip: CLIP, folder: Path) -> None:
    run = segmenter(Broken(clip))
    with pytest.raises(LexisegError, match=r"p0\.png.*NaN"):
        run.predict(folder / "p0.png", WORDS)
    assert all(isinstance(result, LexisegError) for _, result in run.predict_folder(folder, WORDS))


@pytest.mark.slow
def test_compiled_model_gives_the_same(zegclip: SegmentationModel) -> None:
    image = picture(40, 40)
    torch.testing.assert_close(
        segmenter(zegclip, compile=True).predict(image, WORDS).scores,
        segmenter(zegclip).predict(image, WORDS).scores,
        atol=1e-4,
        rtol=1e-4,
    )


@pytest.mark.slow
def test_twenty_megapixels_in_bounded_memory(clip: CLIP) -> None:
    resource = pytest.importorskip("resource")
    model = Patchwork(clip, WindowPolicy(512, 426, None))
    image = np.asarray(Image.fromarray(picture(365, 548)).resize((5480, 3650)))
    run = segmenter(model)
    names = [f"thing {index}" for index in range(100)]
    run.predict(picture(64, 64), names)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    result = run.predict(image, names)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    assert result.size == (3650, 5480)
    assert model.num_encoded > 100
    # All classes at all pixels would take 8 GB; labels, scores and the picture take 0.4.
    assert grown < 1500, grown


def test_the_shape_of_a_hugging_face_pipeline(clip: CLIP) -> None:
    run, image = segmenter(Patchwork(clip)), picture(40, 50)
    found = run(image, candidate_labels=["cat", "tree, bush", "sky"], batch_size=2)
    expected = run.predict(image, WORDS)
    assert [one["label"] for one in found] == [row.name for row in sorted(expected.table(), key=lambda row: row.index)]
    for one in found:
        assert set(one) == {"label", "score", "mask"} and isinstance(one["score"], float)
        assert one["mask"].mode == "L" and one["mask"].size == (50, 40)
        assert np.array_equal(np.asarray(one["mask"]) == 255, expected.mask(one["label"]).numpy())
    assert [len(result) for result in run([image, image], WORDS)] == [len(found)] * 2


def test_threads_that_share_a_segmenter_get_their_own_pictures(zegclip: SegmentationModel) -> None:
    zegclip.train()
    run, pictures = segmenter(zegclip), [picture(40 + index, 50, seed=index) for index in range(4)]
    expected = [run.predict(image, WORDS) for image in pictures]
    start = threading.Barrier(4)

    def work(index: int) -> tuple[Segmentation, Segmentation]:
        held = run.set_image(pictures[index % 4])
        start.wait(30)  # every thread has set its picture before any predicts
        return held.predict(WORDS), run.predict(classes=WORDS)

    with ThreadPoolExecutor(4) as threads:
        for index, results in enumerate(threads.map(work, range(16))):
            for result in results:
                assert torch.equal(result.label_map, expected[index % 4].label_map)
    assert zegclip.training and all(module.training for module in zegclip.modules())
    zegclip.eval()
    with ThreadPoolExecutor(1) as threads, pytest.raises(LexisegError, match="set_image first, in this thread"):
        threads.submit(run.predict, classes=WORDS).result()


@pytest.mark.parametrize("name", ["zegclip", "dense"])
@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16, torch.float16])
def test_any_default_dtype(name: str, default: torch.dtype, request: pytest.FixtureRequest) -> None:
    model, image = request.getfixturevalue(name), picture(40, 50)
    expected = segmenter(model).predict(image, WORDS)
    torch.set_default_dtype(default)
    try:
        run = segmenter(model)
        same(run.predict(image, WORDS), expected)
        same(run.set_image(image).predict(WORDS), expected)
        assert torch.get_default_dtype() == default
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"window": 1}, "at least 8 pixels"),
        ({"window": -3}, "whole number"),
        ({"window": 512.0}, "whole number"),
        ({"window": "512"}, "its side and stride"),
        ({"window": True}, "whole number"),
        ({"window": (16, 17)}, "stride of 1 to 16"),
        ({"window": (0, 8)}, "give the window's side"),
        ({"window": (1, 2, 3)}, "its side and stride"),
        ({"window": (8, 1)}, "more than 10,000"),
        ({"batch_size": 0}, "at least 1"),
        ({"batch_size": 2.5}, "whole number"),
        ({"batch_size": None}, "whole number"),
    ],
)
def test_wrong_options_are_one_sentence(clip: CLIP, options: dict[str, Any], words: str) -> None:
    run, image = segmenter(Patchwork(clip)), picture(120, 130)
    for call in (run.predict, run.scores, lambda image, classes, **more: run.set_image(image, **more)):
        with pytest.raises(LexisegError, match=words) as caught:
            call(image, WORDS, **options)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda run: pickle.loads(pickle.dumps(run))])
def test_a_copy_is_a_segmenter_of_its_own(
    copied: Callable[[Any], Any], zegclip: SegmentationModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "compile", lambda model: model)  # as it is slow
    run, image = segmenter(zegclip, compile=True), picture(40, 50)
    expected = run.predict(image, WORDS)
    run.set_image(image)
    other = copied(run)
    assert other.model is not run.model and other.embedder.clip is other.model.clip
    same(other.predict(image, WORDS), expected)
    with pytest.raises(LexisegError, match="set_image first"):
        other.predict(classes=WORDS)
    with torch.no_grad():
        for weight in other.model.parameters():
            weight.zero_()
    same(run.predict(image, WORDS), expected)


def test_wrong_segmenters_are_one_sentence(clip: CLIP) -> None:
    for model in ("zegclip-emoji", None, clip):
        with pytest.raises(LexisegError, match=r"lexiseg.load"):
            Segmenter(model)  # type: ignore[arg-type]
    for limit in (0, -1, float("nan"), "many", True, None):
        with pytest.raises(LexisegError, match="limit of pixels"):
            Segmenter(Patchwork(clip), max_pixels=limit)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["zegclip-emoji", "deop-emoji", "naclip/clip-emoji"])
def test_a_model_loaded_in_inference_mode_predicts_and_can_be_trained(name: str) -> None:
    with torch.inference_mode():
        model = lexiseg.load(name, device="cpu")
        found = model.predict(picture(64, 64), WORDS)
    assert not any(weight.is_inference() for weight in model.model.parameters())
    expected = lexiseg.load(name, device="cpu").predict(picture(64, 64), WORDS)
    assert torch.equal(found.label_map, expected.label_map)
