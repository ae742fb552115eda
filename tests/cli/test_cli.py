"""The command line: most of it in this process through its entry point, the essential through a real one."""

from __future__ import annotations

import io
import json
import os
import shutil
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file, save_file

import lexiseg
import lexiseg.training.run
from lexiseg.cli import main
from lexiseg.clip.model import build_clip, save_clip
from lexiseg.models import CascadeCLIPOptions, ZegCLIP, ZegCLIPOptions
from lexiseg.recipes import SegmentationRecipe, load_recipe
from lexiseg.training.init import system_of
from lexiseg.weights import save_model

ARCHITECTURE = {
    "model_cfg": {
        "embed_dim": 16,
        "vision_cfg": {"image_size": 32, "layers": 2, "width": 16, "patch_size": 8, "head_width": 8},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
    }
}
WORDS = "dog; grass, lawn; giraffe"

Call = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="session")
def tiny_clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    return save_clip(build_clip(ARCHITECTURE), tmp_path_factory.mktemp("clips") / "tiny")


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    options = ZegCLIPOptions(num_prompts=2, decoder_layers=1, decoder_heads=2)
    model = ZegCLIP(build_clip(ARCHITECTURE), options, ["dog", "grass"])
    return save_model(model, tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    path = tmp_path / "photo.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 56, 3), dtype=np.uint8)).save(path)
    return path


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Call:
    """Run the command in this process, in a folder of its own: exit code, stdout, stderr."""
    monkeypatch.chdir(tmp_path)

    def run(*args: object) -> tuple[int, str, str]:
        capsys.readouterr()
        code = main([str(arg) for arg in args])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


def command(folder: Path, *args: object) -> subprocess.CompletedProcess[str]:
    """Run the command as a user does."""
    return subprocess.run(
        [sys.executable, "-m", "lexiseg", *(str(arg) for arg in args)],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(Path(lexiseg.__file__).parents[1]), "COLUMNS": "100"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def bomb(path: Path, side: int = 40_000) -> Path:
    """A PNG of a few hundred bytes whose header announces ``side`` x ``side`` pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    pixels = zlib.compress(bytes(1000))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b""))
    return path


def bad_pictures(folder: Path) -> dict[str, Path]:
    """Pictures that cannot be segmented, by what the sentence about each must say."""
    folder.mkdir(exist_ok=True)
    text = folder / "text.jpg"
    text.write_text("This is no picture.")
    whole = folder / "whole.bin"
    Image.fromarray(np.random.default_rng(1).integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(whole, "JPEG")
    truncated = folder / "truncated.jpeg"
    truncated.write_bytes(whole.read_bytes()[:900])
    whole.unlink()
    pixel = folder / "pixel.png"
    Image.new("RGB", (1, 1)).save(pixel)
    empty = folder / "empty.png"
    empty.touch()
    return {
        "not a picture": text,
        "truncated": truncated,
        "1 x 1": pixel,
        "megapixels": bomb(folder / "bomb.png"),
        "empty file": empty,
    }


def assert_sentence(code: int, out: str, err: str, *parts: str) -> None:
    """Exit code 2 and one line on stderr, which says ``parts``."""
    assert code == 2, err
    assert "Traceback" not in err
    assert len(err.strip().splitlines()) == 1, err
    assert err.strip()[-1] in ".?", err
    assert "wrote" not in out
    for part in parts:
        assert part.casefold() in err.casefold(), err


def results(folder: Path) -> set[str]:
    """Names of the files in a folder of results, without the run's hidden record."""
    return {path.name for path in folder.iterdir() if path.name != ".lexiseg-predict"}


def leftovers(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if ".tmp" in path.name]


# --- through a real process -------------------------------------------------------------------------------------


def test_real_folder_with_bad_pictures(tmp_path: Path, tiny_model: Path, picture: Path) -> None:
    folder = tmp_path / "pictures"
    bad = bad_pictures(folder)
    shutil.copy(picture, folder / "good.png")
    grey = Image.fromarray(np.random.default_rng(2).integers(0, 256, (30, 40, 2), dtype=np.uint8), "LA")
    grey.save(folder / "grey-alpha.png")
    result = command(tmp_path, "predict", folder, WORDS, "--model", tiny_model, "-o", "out")
    assert result.returncode == 1, result.stderr
    lines = result.stderr.strip().splitlines()
    assert len(lines) == len(bad) + 1
    for said, path in bad.items():
        line = next(line for line in lines if path.name in line)
        assert said.casefold() in line.casefold()
    assert lines[-1] == "2 of 7 pictures segmented"
    assert results(tmp_path / "out") == {
        f"{stem}{ending}" for stem in ("good", "grey-alpha") for ending in ("_overlay.png", "_labels.png", ".json")
    }
    assert "good_overlay.png" in result.stdout


def test_real_missing_file_and_version(tmp_path: Path, tiny_model: Path) -> None:
    result = command(tmp_path, "predict", "nowhere.jpg", WORDS, "--model", tiny_model)
    assert_sentence(result.returncode, result.stdout, result.stderr, "nowhere.jpg")
    assert not (tmp_path / "out").exists()
    assert command(tmp_path, "--version").stdout == f"lexiseg {lexiseg.__version__}\n"


def test_real_json_is_all_there_is_on_stdout(tmp_path: Path, tiny_model: Path, picture: Path) -> None:
    result = command(tmp_path, "predict", picture, WORDS, "--model", tiny_model, "--json", "--save", "overlay,png,rle")
    assert result.returncode == 0, result.stderr
    entry = json.loads(result.stdout)["images"][0]
    assert {row["class"] for row in entry["classes"]} == {"dog", "grass", "giraffe"}
    assert sum(row["fraction"] for row in entry["classes"]) == pytest.approx(1)
    assert [row["seen"] for row in sorted(entry["classes"], key=lambda row: row["class"])] == [True, False, True]
    assert set(entry["files"]) == {"overlay", "labels", "coco"}
    assert all((tmp_path / path).is_file() for path in entry["files"].values())


@pytest.mark.slow
def test_real_bad_input_one_by_one(tmp_path: Path, tiny_model: Path, picture: Path) -> None:
    for said, path in bad_pictures(tmp_path / "bad").items():
        result = command(tmp_path, "predict", path, WORDS, "--model", tiny_model)
        assert_sentence(result.returncode, result.stdout, result.stderr, path.name, said)
    for words, said in (("", "empty"), ("cat; Cat", "given twice"), (" ".join(["word"] * 100), "tokens")):
        result = command(tmp_path, "predict", picture, words, "--model", tiny_model)
        assert_sentence(result.returncode, result.stdout, result.stderr, said)
    result = command(tmp_path, "predict", picture, WORDS, "--model", "zegclip-emoij")
    assert_sentence(result.returncode, result.stdout, result.stderr, "zegclip-emoij")
    result = command(tmp_path, "predict", picture, WORDS, "--model", tiny_model, "-o", picture / "out")
    assert_sentence(result.returncode, result.stdout, result.stderr, "photo.png")


# --- predict ----------------------------------------------------------------------------------------------------


def test_predict_prints_a_table_and_says_where(call: Call, tiny_model: Path, picture: Path, tmp_path: Path) -> None:
    code, out, _ = call("predict", picture, WORDS, "-m", tiny_model, "-o", "results", "--save", "labels,json")
    assert code == 0
    assert "unseen" in out and "giraffe" in out and "56 x 40" in out
    labels = Image.open(tmp_path / "results" / "photo_labels.png")
    assert labels.mode == "P" and labels.size == (56, 40)
    assert json.loads((tmp_path / "results" / "photo.json").read_text())["vocabulary"]["classes"][1]["synonyms"] == [
        "lawn"
    ]
    for name in ("photo_labels.png", "photo.json"):
        assert f"wrote {Path('results') / name}" in out
    assert not leftovers(tmp_path)


def test_predict_takes_classes_from_files(call: Call, tiny_model: Path, picture: Path, tmp_path: Path) -> None:
    (tmp_path / "classes.txt").write_text("dog\ngrass, lawn\n")
    (tmp_path / "words").write_text("dog; cat")
    for arguments, names in (
        ((picture, "classes.txt"), {"dog", "grass"}),
        ((picture, "@words"), {"dog", "cat"}),
        ((picture, "--classes-file", "classes.txt"), {"dog", "grass"}),
    ):
        code, out, err = call("predict", *arguments, "-m", tiny_model, "--save", "json", "--json")
        assert code == 0, err
        assert {row["class"] for row in json.loads(out)["images"][0]["classes"]} == names


def test_names_in_any_script_on_any_terminal(
    call: Call, tiny_model: Path, picture: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = "キリン; café"
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding="ascii"))
        assert main(["predict", str(picture), words, "-m", str(tiny_model), "--save", "json"]) == 0
    assert "キリン" in (tmp_path / "out" / "photo.json").read_text(encoding="utf-8")
    _, out, _ = call("predict", picture, words, "-m", tiny_model, "--save", "json", "--json")
    assert out.isascii()
    assert {row["class"] for row in json.loads(out)["images"][0]["classes"]} == {"キリン", "café"}


def test_predict_many_pictures_and_equal_names(call: Call, tiny_model: Path, picture: Path, tmp_path: Path) -> None:
    Image.open(picture).save(tmp_path / "photo.jpg")
    code, out, err = call("predict", "photo.jpg", "photo.png", "*.png", WORDS, "-m", tiny_model, "--save", "labels")
    assert code == 0
    assert "2 of 2" in err
    assert results(tmp_path / "out") == {"photo_labels.png", "photo_png_labels.png"}
    assert out.count("wrote") == 2


def test_a_clusters_manifest_is_kept_up_by_one_machine(
    call: Call, tiny_model: Path, picture: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lexiseg.labelling import ray_data

    def stopped(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    Image.open(picture).save(tmp_path / "photo.jpg")
    words = ("predict", "photo.jpg", "photo.png", WORDS, "-m", tiny_model, "--save", "labels")
    manifest = tmp_path / "out" / "manifest.jsonl"
    with monkeypatch.context() as patch:
        patch.setattr(ray_data, "label_on_ray", stopped)
        assert call(*words, "--cluster", "ray")[0] == 130
    assert not manifest.exists()
    for _ in range(2):  # the run that was stopped, and one more
        assert call(*words, "--resume")[0] == 0
        lines = [json.loads(line) for line in manifest.read_text().splitlines()]
        assert [Path(line["image"]).name for line in lines] == ["photo.jpg", "photo.png"]
        manifest.unlink()
    assert call(*words)[0] == 0  # a run of its own has none
    assert not manifest.exists()
    assert call(*words, "--resume")[0] == 0
    assert not manifest.exists()


def test_predict_options(call: Call, tiny_model: Path, picture: Path) -> None:
    options = ("-m", tiny_model, "--save", "json", "--json", "--device", "cpu")
    windows = ("--window", 32, "--stride", 16, "-b", 2)
    code, out, err = call("predict", picture, WORDS, *options, *windows, "--template", "paper", "--background", "0.99")
    assert code == 0, err
    entry = json.loads(out)["images"][0]
    assert sum(row["fraction"] for row in entry["classes"]) == 0
    assert call("predict", picture, WORDS, *options, "--dtype", "auto")[0] == 0
    assert_sentence(*call("predict", picture, WORDS, *options, "--window", 16, "--stride", 17), "stride of 17")
    assert_sentence(*call("predict", picture, WORDS, *options, "--stride", 17), "window's side")
    assert_sentence(*call("predict", picture, WORDS, *options, "--window", -5), "--window", "equal to 0")
    assert_sentence(*call("predict", picture, WORDS, *options, "--window", 16, "--stride", 0), "--stride", "equal to 1")
    assert_sentence(*call("predict", picture, WORDS, *options, "--template", "no place"), "no place")
    assert_sentence(*call("predict", picture, WORDS, *options, "--save", "gif"), "gif", "overlay")
    assert_sentence(*call("predict", picture, WORDS, *options[:-1], "warp"), "device", "warp")
    assert_sentence(*call("predict", picture, WORDS, *options, "--max-pixels", 100), "photo.png", "limit")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("", "empty"),
        ("  ; ", "empty"),
        ("cat; Cat", "given twice"),
        ("cat, dog; dog", "dog"),
        (" ".join(["word"] * 100), "tokens"),
        ("absent.txt", "absent.txt"),
        ("@absent", "absent"),
        ("other.png", "classes after the pictures"),
    ],
)
def test_predict_bad_classes(call: Call, tiny_model: Path, picture: Path, words: str, said: str) -> None:
    assert_sentence(*call("predict", picture, words, "-m", tiny_model), said)


def test_predict_bad_pictures(call: Call, tiny_model: Path, tmp_path: Path) -> None:
    for said, path in bad_pictures(tmp_path / "bad").items():
        assert_sentence(*call("predict", path, WORDS, "-m", tiny_model), path.name, said)
    assert_sentence(*call("predict", tmp_path / "nowhere.jpg", WORDS, "-m", tiny_model), "nowhere.jpg")
    assert_sentence(*call("predict", "http://example.org/a.jpg", WORDS, "-m", tiny_model), "URL")
    assert_sentence(*call("predict", "photo.jpg"), "classes")
    assert not leftovers(tmp_path)
    code, _, err = call("predict", tmp_path / "bad", WORDS, "-m", tiny_model)
    assert code == 2 and "0 of 5" in err


def test_predict_unwritable_output(call: Call, tiny_model: Path, picture: Path) -> None:
    assert_sentence(*call("predict", picture, WORDS, "-m", tiny_model, "-o", picture / "out"), "photo.png")
    assert_sentence(*call("predict", picture, WORDS, "-m", tiny_model, "-o", picture), "photo.png")


def test_unknown_and_wrong_models(call: Call, tiny_model: Path, picture: Path, tmp_path: Path) -> None:
    assert_sentence(*call("predict", picture, WORDS, "-m", "zegclip-emoij"), "zegclip-emoij")
    assert_sentence(*call("predict", picture, WORDS, "-m", "dense-clip/ViT-B-16/opnai"), "opnai")
    assert_sentence(*call("predict", picture, WORDS, "-m", picture), "photo.png")
    torch.save({"state_dict": {}}, tmp_path / "model.pth")
    assert_sentence(*call("predict", picture, WORDS, "-m", "model.pth"), "lexiseg convert")

    changed = tmp_path / "changed"
    shutil.copytree(tiny_model, changed)
    tensors = load_file(changed / "model.safetensors")
    tensors["query_proj.weight"] = torch.zeros(3, 5)
    save_file(tensors, changed / "model.safetensors")
    assert_sentence(*call("predict", picture, WORDS, "-m", changed), "query_proj.weight", "(3, 5)")
    (changed / "model.safetensors").write_bytes(b"no weights")
    assert_sentence(*call("predict", picture, WORDS, "-m", changed), "model.safetensors")
    (changed / "config.json").write_text("{}")
    assert_sentence(*call("predict", picture, WORDS, "-m", changed), "config.json")


# --- train, evaluate, convert -----------------------------------------------------------------------------------


def write_recipe(path: Path, clip: Path, **changes: object) -> Path:
    recipe = {
        "kind": "segmentation",
        "model": {
            "system": "zegclip",
            "clip": str(clip),
            "options": {"num_prompts": 2, "decoder_layers": 1, "decoder_heads": 2},
        },
        "data": {"source": "picture-world", "size": 32, "length": 4, "val_size": 32, "val_length": 2},
        "train": {"steps": 2, "batch_size": 2, "lr": 0.001, "workers": 0, "checkpoint_every": 1},
        **changes,
    }
    path.write_text(yaml.safe_dump(recipe))
    return path


def test_train_evaluate_predict(call: Call, tiny_clip: Path, picture: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path / "small.yaml", tiny_clip)
    options = ("--device", "cpu", "--no-tensorboard", "--set", "train.log_every=1")
    code, out, err = call("train", recipe, *options)
    assert code == 0, err
    assert f"wrote {Path('runs') / 'small' / 'model'}" in out
    assert_sentence(*call("train", recipe, *options), "--resume")
    assert call("train", recipe, *options, "--resume", "--json")[0] == 0

    code, out, err = call("evaluate", recipe, "--weights", "runs/small", "-o", "report", "--device", "cpu")
    assert code == 0, err
    assert "hIoU" in out and "wrote report" in out.replace("\\", "/")
    assert json.loads((tmp_path / "report" / "report.json").read_text())["protocol"]["num_pictures"] == 2
    code, out, _ = call("evaluate", "picture-world", "-w", "runs/small", "--size", 32, "--limit", 1, "--json")
    assert code == 0
    assert json.loads(out)["metrics"]["miou"] is not None
    assert call("predict", picture, WORDS, "-m", "runs/small/model", "--save", "json")[0] == 0


def test_train_mistakes(call: Call, tiny_clip: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path / "wrong.yaml", tiny_clip, lerning_rate=1)
    assert_sentence(*call("train", recipe), "wrong.yaml", "lerning_rate")
    recipe = write_recipe(tmp_path / "right.yaml", tiny_clip)
    assert_sentence(*call("train", recipe, "--set", "train.stebs=3"), "train.stebs")
    assert_sentence(*call("train", recipe, "--set", "train.steps=many"), "train.steps")
    assert_sentence(*call("train", recipe, "--set", "nothing"), "nothing")
    assert_sentence(*call("train", recipe, "-o", recipe / "run"), "right.yaml")
    assert_sentence(*call("train", "no-such-recipe"), "no-such-recipe")
    assert_sentence(*call("train"), "recipe")
    assert_sentence(*call("train", recipe, "--device", "cuda:7"), "--device")
    assert not (tmp_path / "runs").exists()


def test_dry_run_and_until(call: Call, tiny_clip: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path / "small.yaml", tiny_clip)
    code, out, _ = call("train", recipe, "--dry-run")
    assert code == 0 and "trainable" in out and "picture-world" in out and not (tmp_path / "runs").exists()
    code, out, _ = call("train", recipe, "--dry-run", "--json", "--set", "train.steps=7")
    found = json.loads(out)
    assert found["system"] == "zegclip" and found["train"]["steps"] == 7 and len(found["unseen"]) == 17
    code, _, _ = call("train", recipe, "-o", "half", "--until", 1, "--device", "cpu", "--no-tensorboard")
    assert code == 0 and json.loads((Path("half") / "model" / "config.json").read_text())["metadata"]["steps"] == 1
    assert_sentence(*call("train", recipe, "-o", "new", "--until", 5, "--device", "cpu"), "2 steps", "5")
    assert_sentence(*call("train", recipe, "--dry-run", "--set", "model.clip=nonsense"), "nonsense")


@pytest.mark.parametrize("groups", ["{6-8},{9-11},{12}", "{12}", "{6-8}", '"{9-11},{12}"', "[[6, 7], [12]]"])
def test_groups_of_blocks_can_be_typed(groups: str) -> None:
    recipe = load_recipe("cascade-clip-voc2012", [f"model.options.groups={groups}"])
    assert isinstance(recipe, SegmentationRecipe)
    options = system_of(recipe)[1]
    assert isinstance(options, CascadeCLIPOptions)
    assert options.groups == ("{6-7},{12}" if groups[0] == "[" else groups.strip('"'))


@pytest.mark.parametrize("value", ["[1", "{6-8},{12}", "'"])
def test_what_is_no_yaml_is_text_and_judged_as_such(call: Call, value: str) -> None:
    assert_sentence(*call("train", "tiny", "--dry-run", "--set", f"train.lr={value}"), "train.lr", "number")


def test_train_lists_recipes(call: Call) -> None:
    code, out, _ = call("train", "--list", "--json")
    assert code == 0
    assert "tiny" in {entry["name"] for entry in json.loads(out)}


def test_evaluate_mistakes(call: Call, tiny_model: Path, tmp_path: Path) -> None:
    assert_sentence(*call("evaluate", "no-such-recipe", "-w", tiny_model), "no-such-recipe")
    assert_sentence(*call("evaluate", "picture-world", "-w", tiny_model, "--split", "train"), "test split")
    assert_sentence(*call("evaluate", "picture-world"), "--weights")
    assert_sentence(*call("evaluate", "tiny", "-w", tiny_model, "--size", 32), "--size")
    assert_sentence(*call("evaluate", "tiny", "-w", tiny_model, "--split", "train"), "--split")
    assert_sentence(*call("evaluate", "clip-emoji", "-w", tiny_model), "captions")
    (tmp_path / "empty").mkdir()
    assert_sentence(*call("evaluate", "empty", "-w", tiny_model), "no folder of pictures")


def test_convert(call: Call, tiny_clip: Path, picture: Path, tmp_path: Path) -> None:
    state = load_file(tiny_clip / "open_clip_model.safetensors")
    torch.save(state, tmp_path / "clip.pt")
    code, out, err = call("convert", "clip.pt", "-o", "clip", "--gelu", "--half", "--transductive")
    assert code == 0, err
    assert "--transductive makes no difference" in err
    assert "wrote clip" in out and "--model naclip/clip" in out
    assert call("predict", picture, WORDS, "-m", "naclip/clip", "--save", "json")[0] == 0

    (tmp_path / "garbage.pth").write_bytes(b"garbage")
    assert_sentence(*call("convert", "garbage.pth", "-o", "other"), "garbage.pth")
    torch.save({"weight": torch.zeros(2)}, tmp_path / "other.pth")
    assert_sentence(*call("convert", "other.pth", "-o", "other"), "other.pth")
    assert_sentence(*call("convert", "nowhere.pth", "-o", "other"), "nowhere.pth")
    assert not (tmp_path / "other").exists()


# --- the rest ---------------------------------------------------------------------------------------------------


def test_data(call: Call, tiny_model: Path, tmp_path: Path) -> None:
    code, out, _ = call("data", "world", "world", "--train", 1, "--val", 2, "--size", 32)
    assert code == 0 and "wrote world" in out
    assert call("data", "verify", "world")[0] == 0
    code, out, _ = call("evaluate", "world", "-w", tiny_model, "--json")
    assert code == 0
    assert json.loads(out)["protocol"]["dataset"] == "world"
    label = next((tmp_path / "world" / "SegmentationClass").glob("val_*.png"))
    label.write_bytes(b"")
    code, out, _ = call("data", "verify", "world", "--json")
    assert code == 1
    errors = [entry for entry in json.loads(out)["findings"] if entry["severity"] == "error"]
    assert [(entry["kind"], entry["sample"]) for entry in errors] == [("empty-file", label.stem)]
    code, out, _ = call("data", "show", "-o", "sheet.png", "--rows", 1, "--columns", 2, "--size", 32)
    assert code == 0 and "wrote sheet.png" in out
    assert Image.open(tmp_path / "sheet.png").width > 64
    assert_sentence(*call("data", "show", "-o", "sheet.txt"), "sheet.txt")
    assert_sentence(*call("data", "world", tmp_path / "sheet.png"), "sheet.png")


def test_models(call: Call) -> None:
    code, out, _ = call("models", "--json")
    assert code == 0
    assert {entry["name"] for entry in json.loads(out)} == {entry.name for entry in lexiseg.list_models()}
    assert "METHOD/ARCHITECTURE/TAG" in call("models")[1]
    code, out, _ = call("models", "--weights", "--json")
    assert code == 0 and {"name", "licence", "size", "source", "best"} <= json.loads(out)[0].keys()
    assert "Apache-2.0" in call("models", "--weights")[1]


def test_usage_errors_are_sentences(call: Call) -> None:
    assert_sentence(*call("predcit"), "predcit", "lexiseg --help")
    assert_sentence(*call("predict", "--modle", "x"), "--modle", "lexiseg predict --help")
    assert_sentence(*call("predict", "a", "b", "--batch-size", "0"), "--batch-size")
    assert_sentence(*call("convert", "a.pth"), "--output")
    assert_sentence(
        *call("predict", "a", "b", "--refine", "x"), "Invalid value for '--refine': 'x' is not one of 'none'"
    )
    for arguments in ((), ("--help",), ("data",), ("predict", "-h")):
        code, out, err = call(*arguments)
        assert code == 0 and "Usage" in out and not err


def test_interruption_and_memory(call: Call, picture: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    def burst(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(lexiseg, "load", stop)
    code, _, err = call("predict", picture, WORDS)
    assert code == 130 and "Traceback" not in err
    assert err == "Stopped.\n"

    def stop_and_say(*_: object, **__: object) -> None:
        raise KeyboardInterrupt("Stopped after step 3; --resume goes on.")  # as the trainer does

    monkeypatch.setattr(lexiseg.training.run, "train", stop_and_say)
    assert call("train", "tiny") == (130, "", "Stopped after step 3; --resume goes on.\n")
    monkeypatch.setattr(lexiseg, "load", burst)
    assert_sentence(*call("predict", picture, WORDS), "memory")


def test_defects_keep_their_traceback(call: Call, picture: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("a defect")

    monkeypatch.setattr(lexiseg, "load", fail)
    with pytest.raises(RuntimeError, match="a defect"):
        call("predict", picture, WORDS)
