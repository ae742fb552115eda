"""``lexiseg predict``: through its entry point, the essential through a real process."""

from __future__ import annotations

import io
import json
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import lexiseg
import lexiseg.training.run
from lexiseg.cli import main
from tests.cli.calling import WORDS, Call, assert_sentence, bad_pictures, command, leftovers, results


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
        *(f"{stem}{end}" for stem in ("good", "grey-alpha") for end in ("_overlay.png", "_labels.png", ".json")),
        "classes.txt",
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


def test_predict_prints_a_table_and_says_where(call: Call, tiny_model: Path, picture: Path, tmp_path: Path) -> None:
    code, out, _ = call("predict", picture, WORDS, "-m", tiny_model, "-o", "results", "--save", "labels,json")
    assert code == 0
    assert "unseen" in out and "giraffe" in out and "56 x 40" in out
    shares = [float(share) for share in re.findall(r"([\d.]+) %", out)]
    assert sum(shares) == pytest.approx(100, abs=0.1 * len(shares))
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


def test_numbers_that_results_do_not_hold_are_noted(
    call: Call, tiny_model: Path, picture: Path, tmp_path: Path
) -> None:
    for text, kind, noted in (
        ("1: dog\n2: grass\n", "labels", True),
        ("1: dog\n2: grass\n", "json", False),
        ("0: dog\n1: grass\n", "labels", False),
        ("dog,255,0,0\ngrass,0,255,0\n", "labels", False),
    ):
        (tmp_path / "classes.txt").write_text(text)
        code, _, err = call("predict", picture, "classes.txt", "-m", tiny_model, "--save", kind)
        assert code == 0 and ("not by the numbers in the list" in err) is noted


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
    assert results(tmp_path / "out") == {"photo_labels.png", "photo_png_labels.png", "classes.txt"}
    assert out.count("wrote") == 3


def test_a_clusters_run_goes_on_on_one_machine(
    call: Call, tiny_model: Path, picture: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lexiseg.labelling import ray_data

    def stopped(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    Image.open(picture).save(tmp_path / "photo.jpg")
    words = ("predict", "photo.jpg", "photo.png", WORDS, "-m", tiny_model, "--save", "labels")
    with monkeypatch.context() as patch:
        patch.setattr(ray_data, "label_on_ray", stopped)
        assert call(*words, "--cluster", "ray")[0] == 130
    assert call(*words, "--resume")[0] == 0
    assert results(tmp_path / "out") == {"photo_labels.png", "photo_png_labels.png", "classes.txt"}


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
    assert_sentence(*call("predict", picture, WORDS, *options, "--every", 2), "for a video", "photo.png")
    assert_sentence(*call("predict", picture, WORDS, *options, "--bands", "1,2,3"), "for a map", "photo.png")


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
        ("./", "is a folder; write the classes after"),
        ("dog; mug = photo:nowhere.png#mask.png", "no picture 'nowhere.png'"),
        ("dog; mug = photo:photo.png#9 9 3 3", "The box 9 9 3 3 is not"),
    ],
)
def test_predict_bad_classes(call: Call, tiny_model: Path, picture: Path, words: str, said: str) -> None:
    assert_sentence(*call("predict", picture, words, "-m", tiny_model), said)


def test_predict_bad_pictures(call: Call, tiny_model: Path, tmp_path: Path) -> None:
    for said, path in bad_pictures(tmp_path / "bad").items():
        assert_sentence(*call("predict", path, WORDS, "-m", tiny_model), path.name, said)
    assert_sentence(*call("predict", tmp_path / "nowhere.jpg", WORDS, "-m", tiny_model), "nowhere.jpg")
    for name in ("a.jpg", "a.mp4", "a.tif"):
        assert_sentence(*call("predict", f"http://example.org/{name}", WORDS, "-m", tiny_model), "is a URL")
    assert_sentence(*call("predict", "photo.jpg"), "classes")
    assert not leftovers(tmp_path)
    code, _, err = call("predict", tmp_path / "bad", WORDS, "-m", tiny_model)
    assert code == 2 and "0 of 5" in err


def test_a_list_of_classes_is_not_fetched(call: Call, tiny_model: Path, picture: Path) -> None:
    assert_sentence(*call("predict", picture, "http://example.org/classes.txt", "-m", tiny_model), "is a URL")


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
    assert not (tmp_path / "out").exists()
