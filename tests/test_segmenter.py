"""Pictures in, results out: holders, windows, batches, devices, threads, copies."""

from __future__ import annotations

import copy
import io
import pickle
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import lexiseg
from lexiseg.clip.model import CLIP
from lexiseg.errors import LexisegError
from lexiseg.models.base import SegmentationModel
from lexiseg.models.dense_clip import DenseCLIP
from lexiseg.models.zegclip import ZegCLIP
from lexiseg.segmentation import Segmentation
from lexiseg.segmenter import Segmenter, pick_device
from lexiseg.vocabulary import Vocabulary
from lexiseg.windows import WindowPolicy, check_proportions
from tests.patchwork import WORDS, Patchwork, picture, same, segmenter


@pytest.fixture(scope="module")
def zegclip(clip: CLIP) -> SegmentationModel:
    torch.manual_seed(1)
    options = {"num_prompts": 2, "decoder_heads": 2, "decoder_layers": 1, "window_size": 32, "window_stride": 24}
    return ZegCLIP.build(clip, {**options, "short_side": 32, "mask_size": None}).eval()


@pytest.fixture(scope="module")
def dense(clip: CLIP) -> SegmentationModel:
    return DenseCLIP.build(clip, {}).eval()


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
    text = run.embedder(run.vocabulary("cat; sky"))
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
    with pytest.raises(LexisegError, match="set_image first"):  # which has its own refinement
        run.with_refinement("edges").predict(classes=WORDS)
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
    with pytest.raises(LexisegError, match="No classes"):
        segmenter(model).predict(picture(8, 8))
    with pytest.raises(LexisegError, match="8 x 8 = 64 pixels, more than the limit of 63;"):
        segmenter(model, max_pixels=63).predict(picture(8, 8), "cat")
    assert segmenter(model).predict([], "cat") == []


def test_a_model_in_training_stays_in_training(zegclip: SegmentationModel) -> None:
    zegclip.train()
    zegclip.clip.eval()
    modes = {name: module.training for name, module in zegclip.named_modules()}
    run = segmenter(zegclip)
    same(run.predict(picture(32, 32), WORDS), run.predict(picture(32, 32), WORDS))  # dropout would differ
    assert {name: module.training for name, module in zegclip.named_modules()} == modes
    zegclip.eval()


@pytest.mark.slow
def test_compiled_model_gives_the_same(zegclip: SegmentationModel) -> None:
    image = picture(40, 40)
    compiled, plain = (segmenter(zegclip, compile=on).predict(image, WORDS).scores for on in (True, False))
    torch.testing.assert_close(compiled, plain, atol=1e-4, rtol=1e-4)


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


@pytest.mark.parametrize("name", ["zegclip", "dense"])
@pytest.mark.parametrize(
    "around", [lambda: torch.autocast("cpu", torch.bfloat16), lambda: torch.device("meta"), torch.inference_mode]
)
def test_modes_of_the_caller(name: str, around: Callable[[], Any], request: pytest.FixtureRequest) -> None:
    model, image = request.getfixturevalue(name), picture(40, 50)
    expected = segmenter(model).predict(image, WORDS)
    run, vocabulary = segmenter(model), Vocabulary.parse(WORDS)
    with around():
        found = [run.predict(image, vocabulary), run.set_image(image).predict(WORDS)]
    for result in (*found, run.predict(image, vocabulary)):  # nothing of the mode is remembered
        same(result, expected)
    assert not run.embedder(run.vocabulary(vocabulary)).is_inference()  # which no training could use


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
    random = torch.get_rng_state()
    with torch.inference_mode():
        model = lexiseg.load(name, device="cpu")
        found = model.predict(picture(64, 64), WORDS)
    assert not any(weight.is_inference() for weight in model.model.parameters())
    expected = lexiseg.load(name, device="cpu").predict(picture(64, 64), WORDS)
    assert torch.equal(found.label_map, expected.label_map)
    assert torch.equal(torch.get_rng_state(), random)
