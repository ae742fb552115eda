"""Precision that is chosen by the processor, what it changes, and graphs that are compiled once."""

from __future__ import annotations

import shutil
from functools import partial

import pytest
import torch
from torch._dynamo.utils import counters

import lexiseg
from lexiseg import devices
from lexiseg.errors import LexisegError
from lexiseg.models import SYSTEMS
from lexiseg.samples import list_samples, sample_path
from lexiseg.segmenter import Segmenter
from tests.towers import small_clip


@pytest.mark.parametrize(
    ("amx", "avx", "dtype"), [(True, False, "bf16"), (False, True, "bf16"), (False, False, "fp32")]
)
def test_auto_asks_the_processor(monkeypatch: pytest.MonkeyPatch, amx: bool, avx: bool, dtype: str) -> None:
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx)
    expected = devices.pick_dtype(dtype, torch.device("cpu"))
    assert devices.pick_dtype("auto", torch.device("cpu")) == expected
    assert devices.pick_dtype("auto", torch.device("cuda")) == torch.float32
    found = lexiseg.load("zegclip-emoji", device="cpu", dtype="auto")
    name = str(expected).removeprefix("torch.")
    assert found.predict(sample_path("demo"), "tree; grass").metadata["dtype"] == name
    with pytest.raises(LexisegError, match="or auto"):
        devices.pick_dtype("int8", torch.device("cpu"))


@pytest.mark.parametrize(
    "name", ["zegclip-emoji", "cascade-clip-emoji", "second-look-emoji", "deop-emoji", "naclip/clip-emoji"]
)
def test_bf16_changes_few_labels_of_the_samples(name: str) -> None:
    exact, rough = (lexiseg.load(name, device="cpu", dtype=dtype) for dtype in ("fp32", "bf16"))
    changed = []
    for sample in list_samples():
        words = sample_path(sample).with_suffix(".txt")
        labels = [one.predict(sample_path(sample), words).label_map for one in (exact, rough)]
        changed.append((labels[0] != labels[1]).float().mean())
    assert 0 < float(torch.stack(changed).mean()) < 0.005


@torch.no_grad()
def test_a_compiled_model_is_compiled_for_any_number_of_windows_and_words(monkeypatch: pytest.MonkeyPatch) -> None:
    # Without a C++ compiler behind it: what is counted are the graphs, which do not depend on it.
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    torch._dynamo.reset()
    counters.clear()
    model = lexiseg.load("zegclip-emoji", device="cpu").model.eval()
    compiled = devices.Compiled(model)
    width = model.clip.embed_dim
    for windows, words in ((4, 6), (2, 6), (5, 3), (3, 40), (1, 40), (1, 5), (4, 7)):
        images, text = torch.randn(windows, 3, 64, 64), torch.nn.functional.normalize(torch.randn(words, width), dim=-1)
        scores = [run(images, text, word_to_class=None, seen=None) for run in (compiled, model)]
        assert torch.allclose(scores[0].logits, scores[1].logits, atol=1e-5)
    # One for several windows, one for a single one; and none of them is broken into pieces.
    assert counters["stats"]["unique_graphs"] == 2 and not counters["graph_break"]


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor compiles C++")
@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_pictures_of_any_size_are_run_by_the_same_graphs(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    torch._dynamo.reset()
    counters.clear()
    windows = {"window_size": 32, "window_stride": 24, "short_side": 32}
    options = {"num_prompts": 2, "decoder_heads": 2, "decoder_layers": 1, **windows}
    plain, compiled = (
        Segmenter(SYSTEMS["zegclip"].build(small_clip(vision_cfg={"layers": 1}), options), disk_cache=False, compile=on)
        for on in (False, True)
    )
    compiled.model.load_state_dict(plain.model.state_dict())
    graphs = []
    # Windows: 4 + 1, 3 * 4 + 1, 1, 2, 4 + 3, 1.
    for height, width in ((32, 128), (32, 300), (48, 48), (30, 41), (57, 300), (32, 32)):
        image = torch.randint(
            0, 256, (3, height, width), dtype=torch.uint8, generator=torch.Generator().manual_seed(width)
        )
        for classes in ("cat; sky; a tree", "; ".join(f"thing {index}" for index in range(7))):
            labels = [one.predict(image, classes).label_map for one in (plain, compiled)]
            assert float((labels[0] == labels[1]).float().mean()) >= 0.999
        graphs.append(counters["stats"]["unique_graphs"])
    # One for several windows and one for a single one, both made for the first picture and its first words.
    assert graphs == [2] * 6 and not counters["graph_break"]
