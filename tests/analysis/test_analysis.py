"""What the figures show: measures by their definitions, towers as the models run them, pictures a person can read."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

import lexiseg
from lexiseg.analysis.figures import (
    cka_figure,
    compare_figure,
    curves_figure,
    nga_figure,
    nga_weights,
    scores_figure,
    similarity_figure,
)
from lexiseg.analysis.panels import Panel, Scale, compose
from lexiseg.analysis.regions import attention_maps
from lexiseg.analysis.towers import (
    has_own_clip,
    learnt_in_tower,
    linear_cka,
    patch_similarity,
    plain_blocks,
    system_blocks,
)
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


def test_attention_is_the_mean_over_heads_without_the_class_token() -> None:
    model = lexiseg.load("deop-emoji").model
    rows = attention_maps(model, torch.rand(1, 3, 64, 64)).sum(dim=1)
    assert len(rows) == 64 and float(rows.min()) > 0.0 and float(rows.max()) < 1.0


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


def drawn(figure: Figure) -> np.ndarray:
    """The figure's pixels, (H, W, 3)."""
    stream = io.BytesIO()
    figure.savefig(stream, format="png")
    return np.asarray(Image.open(stream).convert("RGB"))


def test_a_figure_holds_all_panels_and_one_scale() -> None:
    green = np.full((8, 10, 3), (9, 200, 9), np.uint8)
    panel = Panel(
        green, "costs $5 or $6, in a caption that is long", "note", bars=(("cat", 0.5, "black"), ("dog", 0.2, "red"))
    )
    heat = Panel(np.linspace(-3, 3, 80).reshape(8, 10), "heat", box=(0.1, 0.1, 0.2, 0.2))
    figure = compose("Title", [[panel] * 3, [heat]], scale=Scale(-1, 1, "label"), subtitle="sub")
    pictures = [axes for axes in figure.axes if axes.images]
    assert len(pictures) == 4
    assert (pictures[-1].images[0].norm.vmin, pictures[-1].images[0].norm.vmax) == (-1, 1)
    assert [axes.get_ylabel() for axes in figure.axes][-1] == "label"
    green_share = (np.abs(drawn(figure).astype(int) - (9, 200, 9)).max(-1) < 8).mean()
    assert green_share > 0.1


def test_without_matplotlib_a_sentence_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(LexisegError, match=r"pip install 'lexiseg\[plots\]'"):
        compose("Title", [[Panel(np.zeros((2, 2, 3), np.uint8), "p")]])


# --- figures ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("system", ["dense-clip", "cascade-clip"])
def test_figures_of_a_system(system: str, photo: Path) -> None:
    model = segmenter(system)
    for figure in (
        similarity_figure(model, photo, [(0, 0), (55, 39)], [1, 4]),
        scores_figure(model, photo, "cat; dog, hound; sky"),
        cka_figure(model, [photo, photo]),
        compare_figure([model, segmenter("zegclip")], photo, "cat; dog"),
    ):
        pixels = drawn(figure)
        assert min(pixels.shape[:2]) > 200
        assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 50
    model.model.train()
    similarity_figure(model, photo)
    assert model.model.training


def test_two_models_or_runs_of_one_name_are_told_apart(photo: Path, tmp_path: Path) -> None:
    """Two runs of one system had the same title, and two runs in folders of one name the same line in the legend."""
    models = [segmenter("zegclip"), segmenter("zegclip")]
    figure = compare_figure(models, photo, "cat; dog", ["runs/a", "runs/b"])
    titles = [axes.get_title().partition("\n")[0] for axes in figure.axes]
    assert titles[:3] == ["picture", "runs/a", "runs/b"]
    runs = [str(tmp_path / name / "run") for name in "ab"]
    for run in runs:
        Path(run).mkdir(parents=True)
        (Path(run) / "metrics.jsonl").write_text('{"step": 1, "val/hiou": 30.0}\n')
    figure = curves_figure(runs, ["hiou"])
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == runs
    assert all(tick == int(tick) for tick in figure.axes[0].get_xticks())  # there is no step 0.96


def test_letters_that_no_font_has_are_announced(
    tmp_path: Path, photo: Path, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    monkeypatch.setattr("lexiseg.fonts.font_files", list)
    figure = scores_figure(lexiseg.load("zegclip-emoji", device="cpu"), photo, "\u0e0a\u0e35; grass")
    figure.savefig(tmp_path / "a.png")
    said = [str(one.message) for one in recwarn if "font" in str(one.message)]  # and nothing of the mark on the letter
    assert said == ["No font on this machine has the letters '\u0e0a', so the figure has ? for each; install one."]


def test_names_that_are_not_utf_8(tmp_path: Path) -> None:
    picture = tmp_path / "caf\udce9.png"
    Image.new("RGB", (64, 64)).save(picture)
    compare_figure([lexiseg.load("zegclip-emoji", device="cpu")], picture, "giraffe; grass").savefig(tmp_path / "a.png")


def test_narrow_pictures_have_figures_too(tmp_path: Path) -> None:
    path = tmp_path / "narrow.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 300, 3), dtype=np.uint8)).save(path)
    model = segmenter("zegclip")
    assert drawn(similarity_figure(model, path)).shape[1] > 300
    assert drawn(scores_figure(model, path, "cat; dog")).shape[1] > 300


def test_cka_has_one_map_where_nothing_was_learnt_and_two_where_something_was(photo: Path) -> None:
    frozen, prompted = segmenter("zegclip", backbone="fixed"), segmenter("zegclip")
    for figure, maps in (
        (cka_figure(prompted, [photo]), 2),
        (cka_figure(frozen, [photo]), 1),
        (cka_figure(frozen, [photo], prompted), 2),
    ):
        assert sum(axes.get_xlabel() == "block" for axes in figure.axes) == maps
    with pytest.raises(LexisegError, match="trained together with its CLIP"):
        cka_figure(segmenter("zegclip", backbone="finetune"), [photo])
    with pytest.raises(LexisegError, match="at least one picture"):
        cka_figure(prompted, [])


def test_nga_weights_before_and_after() -> None:
    model = segmenter("cascade-clip").model
    with torch.no_grad():
        model.aggregations[0].weights.add_(0.25)  # type: ignore[operator, union-attr]
    found = nga_weights(model)
    (before, after), second = found.values()
    assert next(iter(found)) == (1, 2)
    assert before == pytest.approx([0.6065, 1.0], abs=1e-4)
    assert after == pytest.approx([0.8565, 1.25], abs=1e-4)
    assert second[0] == pytest.approx(second[1])
    figure = nga_figure(Segmenter(model, disk_cache=False))
    figure.canvas.draw()
    title = figure.texts[0].get_window_extent()
    assert title.x0 >= 0 and title.x1 <= figure.bbox.x1, "the title is cut off"
    heights = [bar.get_height() for axes in figure.axes for bar in axes.patches]
    assert heights == pytest.approx([*before, *after, *second[0], *second[1]])


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
    arguments = ["similarity", "zegclip-emoji", str(photo), "--point", "3, 5", "--blocks", "1,11-12", "-o", str(output)]
    assert main(["draw", *arguments]) == 0
    assert f"wrote {output}" in capsys.readouterr().out
    assert Image.open(output).width > 300
    assert [path.name for path in output.parent.iterdir()] == ["similarity.png"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["similarity", "MODEL", "PHOTO", "--point", "3"], "--point takes the column and the row"),
        (["similarity", "MODEL", "PHOTO", "--point", "-3,2"], "lies outside"),
        (["similarity", "MODEL", "PHOTO", "--blocks", "1,x"], "--blocks takes numbers"),
        (["similarity", "MODEL", "PHOTO", "--blocks", ","], "--blocks takes numbers"),
        (["similarity", "MODEL", "PHOTO", "--blocks", "3-1"], "--blocks takes numbers"),
        (["similarity", "MODEL", "nothing.png"], "nothing.png"),
        (["scores", "MODEL", "PHOTO", "words.txt"], "words.txt"),
        (["scores", "MODEL", "PHOTO", "cat; cat"], "cat"),
        (["scores", "no-such-model", "PHOTO", "cat"], "no-such-model"),
        (["cka", "MODEL", "nothing-*.png"], "nothing"),
        (["nga", "MODEL", "-o", "weights.jpg"], "must end in .png"),
        *(([name, "GRAPHS", "PHOTO"], "is an exported model") for name in ("similarity", "cka", "anchors")),
    ],
)
def test_command_says_what_is_wrong(
    arguments: list[str], says: str, photo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    Path("export.json").write_text("{}")
    names = {"MODEL": "zegclip-emoji", "PHOTO": str(photo), "GRAPHS": str(tmp_path)}
    assert main(["draw", *(names.get(word, word) for word in arguments)]) == 2
    error = capsys.readouterr().err
    assert len(error.strip().splitlines()) == 1 and says in error, error


def test_every_system_with_a_vision_transformer_has_blocks() -> None:
    assert set(OPTIONS) <= set(SYSTEMS)
    assert all(issubclass(system, SegmentationModel) for system in SYSTEMS.values())
