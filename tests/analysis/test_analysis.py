"""What the figures show: measures by their definitions, towers as the models run them, pictures a person can read."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import lexiseg
from lexiseg.analysis import (
    cka_figure,
    linear_cka,
    nga_figure,
    patch_similarity,
    plain_blocks,
    scores_figure,
    similarity_figure,
    system_blocks,
)
from lexiseg.analysis.canvas import Panel, Scale, colors, compose, font, heat_map, number, shorten, ticks, wrap
from lexiseg.analysis.charts import Group, bar_chart
from lexiseg.analysis.figures import nga_weights
from lexiseg.analysis.towers import has_own_clip, learnt_in_tower
from lexiseg.cli import main
from lexiseg.errors import LexisegError
from lexiseg.models import SYSTEMS, SegmentationModel
from lexiseg.segmenter import Segmenter
from tests.towers import small_clip

OPTIONS: dict[str, dict[str, object]] = {
    "dense-clip": {},
    "zegclip": {"num_prompts": 2, "decoder_heads": 2, "decoder_layers": 1},
    "cascade-clip": {"num_prompts": 2, "decoder_heads": 2, "decoder_layers": 1, "groups": "{1-2},{2-3},{4}"},
    "spt-seg": {"num_prompts": 2, "decoder_layers": 1},
}


def segmenter(system: str, seed: int = 0, **options: object) -> Segmenter:
    torch.manual_seed(seed)
    model = SYSTEMS[system].build(small_clip(), {**OPTIONS[system], **options}, seen_names=("cat",)).eval()
    return Segmenter(model, disk_cache=False)


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    path = tmp_path / "photo.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 56, 3), dtype=np.uint8)).save(path)
    return path


# --- measures -----------------------------------------------------------------------------------------------------


def test_patch_similarity_is_the_cosine() -> None:
    patches = torch.randn(3, 5, 7)
    found = patch_similarity(patches, 2)
    assert found.shape == (3, 5)
    for level in range(3):
        expected = torch.nn.functional.cosine_similarity(patches[level], patches[level, 2][None], dim=-1)
        torch.testing.assert_close(found[level], expected)
    torch.testing.assert_close(found[:, 2], torch.ones(3))
    torch.testing.assert_close(patch_similarity(patches[0], 2), found[0])


def test_linear_cka_is_kornblith_s() -> None:
    x, y = torch.randn(30, 6, dtype=torch.float64), torch.randn(30, 9, dtype=torch.float64)
    a, b = x - x.mean(0), y - y.mean(0)
    expected = (b.T @ a).norm() ** 2 / ((a.T @ a).norm() * (b.T @ b).norm())
    found = linear_cka([x, y])
    assert found.shape == (2, 2)
    assert float(found[0, 1]) == pytest.approx(float(expected), rel=1e-5)
    torch.testing.assert_close(found.diagonal(), torch.ones(2))
    torch.testing.assert_close(found, found.T)


def test_linear_cka_ignores_rotation_scale_and_shift() -> None:
    x = torch.randn(40, 8)
    rotation = torch.linalg.qr(torch.randn(8, 8)).Q
    assert float(linear_cka([x, 300 * x @ rotation + 5])[0, 1]) == pytest.approx(1.0, abs=1e-4)
    assert float(linear_cka([x * 1e8, x])[0, 1]) == pytest.approx(1.0, abs=1e-4)


def test_linear_cka_takes_some_of_many_samples() -> None:
    x, y = torch.randn(500, 4), torch.randn(500, 4)
    assert linear_cka([x, y], max_samples=100)[0, 1] < 0.2
    assert linear_cka([x, x], max_samples=100)[0, 1] > 0.999


def test_linear_cka_refuses_what_it_cannot_compare() -> None:
    with pytest.raises(LexisegError, match="two patches"):
        linear_cka([torch.ones(1, 3)])
    with pytest.raises(LexisegError, match="all alike"):
        linear_cka([torch.ones(5, 3)])


# --- towers -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("system", sorted(OPTIONS))
def test_blocks_of_every_one_stage_system(system: str) -> None:
    model = segmenter(system).model
    images = torch.randn(1, 3, 24, 40)
    with torch.no_grad():
        own, plain = system_blocks(model, images), plain_blocks(model, images)
    assert own.grid == plain.grid == (3, 5)
    assert own.patches.shape == plain.patches.shape == (4, 15, 24)
    same = torch.allclose(own.patches, plain.patches, atol=1e-5)
    assert same == (system == "dense-clip") == (not learnt_in_tower(model))


def test_blocks_are_those_the_model_predicts_from() -> None:
    model = segmenter("zegclip").model
    images = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        last = system_blocks(model, images).patches[-1]
        features = model.encode_images(images).values["patches"].flatten(1, 2)[0]
        tokens = model.clip.image_tower.project(model.prompts.norm(last))  # type: ignore[union-attr]
    torch.testing.assert_close(torch.nn.functional.normalize(tokens, dim=-1), features)


def test_maft_shows_its_tuned_tower() -> None:
    proposals = {"kind": "ground-truth"}
    model = (
        SYSTEMS["zsseg"]
        .build(small_clip(), {"proposals": proposals, "maft": {}, "ensemble": {"rule": "region"}}, seen_names=())
        .eval()
    )
    with torch.no_grad():
        model.student.conv1.weight.mul_(2)
        images = torch.randn(1, 3, 32, 32)
        own, plain = system_blocks(model, images), plain_blocks(model, images)
    assert learnt_in_tower(model) and not has_own_clip(model)
    assert not torch.allclose(own.patches, plain.patches)


# --- drawing ------------------------------------------------------------------------------------------------------


def test_colors_run_from_dark_to_bright_and_stop_at_the_ends() -> None:
    scale = Scale(-1.0, 1.0, "value")
    ramp = colors(np.linspace(-1, 1, 50), scale).astype(int)
    brightness = ramp @ np.array([299, 587, 114])
    assert (np.diff(brightness) > 0).all()
    assert (colors(np.array([-9.0, 9.0]), scale) == ramp[[0, -1]]).all()
    assert colors(np.full((2, 3), 0.5), Scale(0.5, 0.5, "")).shape == (2, 3, 3)


def test_heat_map_has_the_size_and_the_place_of_the_maximum() -> None:
    values = np.zeros((4, 5))
    values[1, 3] = 1
    picture = np.asarray(heat_map(values, (50, 40), Scale(0, 1, ""))).astype(int)
    assert picture.shape == (40, 50, 3)
    row, column = np.unravel_index((picture @ np.array([1, 2, 0])).argmax(), (40, 50))
    assert (int(row) // 10, int(column) // 10) == (1, 3)


def test_ticks_are_round_and_numbers_short() -> None:
    assert ticks(0, 1, 6) == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1.0])
    assert ticks(0.37, 0.37) == [0.37]
    assert [number(value, 0.25) for value in (0.0, 0.25, -0.0)] == ["0.00", "0.25", "0.00"]
    assert number(3.0, 1.0) == "3"
    for low, high in ((0.0, 1.0), (-0.4, 1.0), (0.123, 0.127), (0.0, 1e-6), (-3.0, 900.0)):
        found = ticks(low, high, 9)
        assert 2 <= len(found) <= 12
        assert all(low - 1e-9 * abs(low) <= value <= high * (1 + 1e-9) for value in found)


def test_text_is_wrapped_and_cut() -> None:
    face = font(16)
    assert all(face.getlength(line) <= 120 for line in wrap("one two three " + "w" * 100, face, 120))
    assert shorten("abc", face, 500) == "abc"
    assert shorten("a" * 100, face, 100).endswith("…")


def test_figure_holds_all_panels() -> None:
    panel = Panel(Image.new("RGB", (100, 80), (9, 200, 9)), "a very long caption that has to be cut somewhere", "note")
    figure = compose("Title", [[panel] * 3, [panel]], scale=Scale(0, 1, "label"), subtitle="sub", footer="foot " * 60)
    pixels = np.asarray(figure)
    assert (pixels == (9, 200, 9)).all(-1).sum() == 4 * 100 * 80
    with pytest.raises(ValueError, match="panel"):
        compose("Title", [])


def test_bars_are_as_high_as_their_values() -> None:
    chart = bar_chart([Group("g", ["a", "b"], [[1.0, 0.5], [0.2, 0.0]])], series=("x", "y"), y_label="w", width=400)
    pixels = np.asarray(chart)
    heights = (pixels[100:] == (176, 186, 197)).all(-1).sum(0)
    tall = sorted({int(height) for height in heights if height > 40})
    assert tall[-1] == pytest.approx(2 * tall[0], rel=0.03)
    bar_chart([Group("g", ["a"], [[-1.0], [0.5]])], series=("x", "y"), y_label="w", width=300)
    with pytest.raises(ValueError, match="group"):
        bar_chart([], series=(), y_label="", width=300)


# --- figures ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("system", ["dense-clip", "cascade-clip"])
def test_figures_of_a_system(system: str, photo: Path) -> None:
    model = segmenter(system)
    for figure in (
        similarity_figure(model, photo, [(0, 0), (55, 39)], [1, 4]),
        scores_figure(model, photo, "cat; dog, hound; sky"),
        cka_figure(model, [photo, photo]),
    ):
        assert figure.mode == "RGB"
        assert min(figure.size) > 300
        assert len(np.unique(np.asarray(figure).reshape(-1, 3), axis=0)) > 50
    model.model.train()
    similarity_figure(model, photo)
    assert model.model.training


def test_narrow_pictures_have_figures_too(tmp_path: Path) -> None:
    path = tmp_path / "narrow.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 300, 3), dtype=np.uint8)).save(path)
    model = segmenter("zegclip")
    assert similarity_figure(model, path).width > 300
    assert scores_figure(model, path, "cat; dog").width > 300


def test_cka_has_one_map_where_nothing_was_learnt_and_two_where_something_was(photo: Path) -> None:
    frozen, prompted = segmenter("zegclip", backbone="fixed"), segmenter("zegclip")
    assert cka_figure(prompted, [photo]).width > 1.5 * cka_figure(frozen, [photo]).width
    assert cka_figure(frozen, [photo], prompted).width > 1.5 * cka_figure(frozen, [photo]).width
    with pytest.raises(LexisegError, match="trained with its CLIP"):
        cka_figure(segmenter("zegclip", backbone="finetune"), [photo])
    with pytest.raises(LexisegError, match="at least one picture"):
        cka_figure(prompted, [])


def test_nga_weights_before_and_after() -> None:
    model = segmenter("cascade-clip").model
    with torch.no_grad():
        model.aggregations[0].weights.add_(0.25)  # type: ignore[operator, union-attr]
    first, second = nga_weights(model)
    assert (first.name, list(first.labels)) == ("{1-2}", ["block 1", "block 2"])
    assert first.values[0] == pytest.approx([0.6065, 1.0], abs=1e-4)
    assert first.values[1] == pytest.approx([0.8565, 1.25], abs=1e-4)
    assert second.values[0] == pytest.approx(second.values[1])
    assert nga_figure(Segmenter(model, disk_cache=False)).width > 300


@pytest.mark.parametrize(
    ("system", "options", "says"),
    [
        ("zegclip", {}, "zegclip has no NGA weights; choose"),
        ("dense-clip", {}, "dense-clip has no NGA weights"),
        ("cascade-clip", {"groups": "{3},{4}"}, "without weights"),
    ],
)
def test_models_without_nga_weights(system: str, options: dict[str, object], says: str) -> None:
    with pytest.raises(LexisegError, match=says):
        nga_figure(segmenter(system, **options))


def test_mistakes_are_sentences(photo: Path) -> None:
    model = segmenter("zegclip")
    with pytest.raises(LexisegError, match=r"56,0 lies outside .*56 x 40"):
        similarity_figure(model, photo, [(56, 0)])
    with pytest.raises(LexisegError, match="no block 5; the image tower has 4"):
        similarity_figure(model, photo, blocks=[5])
    with pytest.raises(LexisegError, match="at most 6"):
        similarity_figure(model, photo, [(0, 0)] * 7)
    with pytest.raises(LexisegError, match="at most 48"):
        scores_figure(model, photo, [f"class {index}" for index in range(49)])


def test_scores_and_pixels_of_the_segmenter(photo: Path) -> None:
    model = segmenter("zegclip", window_size=32, window_stride=16, short_side=40)
    scores = model.scores(photo, "cat; dog")
    result = model.predict(photo, "cat; dog")
    assert torch.equal(scores.label_map((40, 56))[0], torch.as_tensor(result.label_map).long())
    assert model.pixels(photo).shape == (1, 3, 40, 56)


# --- the command --------------------------------------------------------------------------------------------------


def test_command_in_a_process(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "lexiseg", "draw", "nga", "zegclip-emoji", "-o", "nga.png"]
    environment = {**os.environ, "PYTHONPATH": str(Path(lexiseg.__file__).parents[1])}
    found = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert found.returncode == 2
    assert found.stderr.strip() == "zegclip has no NGA weights; choose a cascade-clip model."
    assert not (tmp_path / "nga.png").exists()


def test_command_draws(tmp_path: Path, photo: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "new" / "similarity.png"
    arguments = ["similarity", "zegclip-emoji", str(photo), "--at", "3, 5", "--blocks", "1,11-12", "-o", str(output)]
    assert main(["draw", *arguments]) == 0
    assert f"wrote {output}" in capsys.readouterr().out
    assert Image.open(output).width > 500
    assert [path.name for path in output.parent.iterdir()] == ["similarity.png"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["similarity", "MODEL", "PHOTO", "--at", "3"], "--at takes the column and the row"),
        (["similarity", "MODEL", "PHOTO", "--at", "-3,2"], "lies outside"),
        (["similarity", "MODEL", "PHOTO", "--blocks", "1,x"], "--blocks takes numbers"),
        (["similarity", "MODEL", "PHOTO", "--blocks", ""], "--blocks takes numbers"),
        (["similarity", "MODEL", "nothing.png"], "nothing.png"),
        (["scores", "MODEL", "PHOTO", "words.txt"], "words.txt"),
        (["scores", "MODEL", "PHOTO", "cat; cat"], "cat"),
        (["scores", "no-such-model", "PHOTO", "cat"], "no-such-model"),
        (["cka", "MODEL", "nothing-*.png"], "nothing"),
        (["nga", "MODEL", "-o", "weights.jpg"], "must end in .png"),
    ],
)
def test_command_says_what_is_wrong(
    arguments: list[str], says: str, photo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    names = {"MODEL": "zegclip-emoji", "PHOTO": str(photo)}
    assert main(["draw", *(names.get(word, word) for word in arguments)]) == 2
    error = capsys.readouterr().err
    assert len(error.strip().splitlines()) == 1 and says in error, error


def test_every_system_with_a_vision_transformer_has_blocks() -> None:
    assert set(OPTIONS) <= set(SYSTEMS)
    assert all(issubclass(system, SegmentationModel) for system in SYSTEMS.values())
