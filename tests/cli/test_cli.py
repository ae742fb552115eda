"""The command line as a whole: data and models, mistakes in it, stops and defects."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import lexiseg
import lexiseg.training.run
from lexiseg.cli.console import say_note, with_progress
from lexiseg.data.picture_world import find_world
from lexiseg.errors import LexisegError
from lexiseg.weights.auto import auto_order
from tests.cli.calling import WORDS, Call, assert_sentence


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
    said = call("models", "--weights")[1]
    assert "Apache-2.0" in said and said.splitlines()[1] == auto_order()[0].model


def test_options_of_an_evaluation_reach_it(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}

    def run(*what: str, **how: Any) -> None:
        asked.update(how, what=what)
        raise LexisegError("This is enough.")

    monkeypatch.setattr("lexiseg.evaluation.evaluate", run)
    given = {"output": "out", "protocol": "voc-20", "classes": "list.txt", "split": "test", "background": "sky"}
    given |= {"size": 64, "limit": 3, "window": 48, "stride": 24, "batch_size": 2}
    given |= {"device": "cpu", "dtype": "bf16", "refine": "edges"}
    words = [word for key, value in given.items() for word in (f"--{key.replace('_', '-')}", value)]
    words += ["--set", "a=1", "--template", "a {}", "--no-synonyms", "--proposals", "--resume", "--compile"]
    assert_sentence(*call("evaluate", "data", "-w", "model", *words), "enough")
    plain = {key: str(value) if key in ("output", "classes") else value for key, value in asked.items()}
    more = {"what": ("data", "model"), "overrides": ["a=1"], "templates": ["a {}"], "synonyms": False}
    assert plain == {**given, **more, "proposals": True, "resume": True, "compile": True}


@pytest.mark.parametrize(
    ("words", "runs", "args", "options"),
    [
        (
            "convert a.pth -o out --seen list.txt --template a{} --transductive --gelu --clip ViT --ema --half",
            "weights.convert",
            ["a.pth", "out"],
            {"class_names": ("cat", "sky"), "templates": ("a{}",), "transductive": True, "quick_gelu": False}
            | {"clip": "ViT", "ema": True, "dtype": torch.float16},
        ),
        (
            "train mine --data folder --initial ../run --seed 3 --set train.steps=5",
            "recipes.load_recipe",
            ["mine", ['initial="../run"', "train.steps=5"]],
            {"seed": 3, "data": "folder"},
        ),
        (
            "export naclip/small -o out -f torch --size 32 --size 48 --dtype fp16 --template a{}",
            "export.exporting.export",
            [("naclip/small", {"device": "cpu", "templates": ["a{}"]}), "out"],
            {"kind": "torch", "sizes": [32, 48], "precision": "fp16"},
        ),
        (
            "data world out --train 3 --val 2 --size 32 --world picture-world-2",
            "data.picture_world.write_voc",
            ["out"],
            {"world": find_world("picture-world-2"), "num_train": 3, "num_val": 2, "size": 32},
        ),
        (
            "data show --split test --rows 1 --columns 2 --size 32 --world picture-world-2",
            "data.picture_world.contact_sheet",
            ["test"],
            {"world": find_world("picture-world-2"), "rows": 1, "columns": 2, "size": 32},
        ),
        (
            "data prepare own folder --classes list.txt",
            "data.sets.prepare.prepare",
            ["own", "folder"],
            {"classes": "list.txt", "say": say_note},
        ),
        (
            "data verify own folder --split a --split b --classes list.txt --workers 2",
            "data.sets.verify.verify",
            ["own", "folder"],
            {"splits": ["a", "b"], "classes": "list.txt", "workers": 2, "progress": with_progress},
        ),
        ("push folder a/b --private", "weights.publish.push_folder", ["folder", "a/b"], {"private": True}),
    ],
)
def test_options_reach_what_a_command_runs(
    call: Call, monkeypatch: pytest.MonkeyPatch, words: str, runs: str, args: list[Any], options: dict[str, Any]
) -> None:
    Path("list.txt").write_text("cat\nsky\n")
    asked: dict[str, Any] = {}

    def run(*what: Any, **how: Any) -> None:
        asked.update(how, what=what)
        raise LexisegError("This is enough.")

    monkeypatch.setattr("lexiseg.load", lambda name, **how: (name, how))
    monkeypatch.setattr(f"lexiseg.{runs}", run)
    assert_sentence(*call(*words.split()), "enough")
    found = {key: str(value) if isinstance(value, Path) else value for key, value in asked.items()}
    found["what"] = [str(value) if isinstance(value, Path) else value for value in found["what"]]
    assert found == {**options, "what": args}


def test_doctor_where_this_user_may_not_look(call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache, stat = tmp_path / "locked" / "text", os.stat

    def refuse(path: Any, *args: Any, **more: Any) -> os.stat_result:
        if str(path).startswith(str(cache.parent)):
            raise PermissionError(13, "Permission denied")
        return stat(path, *args, **more)

    monkeypatch.setenv("LEXISEG_CACHE", str(cache))
    monkeypatch.setattr(os, "stat", refuse)
    code, out, _ = call("doctor", "--quick", "--json")
    assert code in (0, 1) and json.loads(out)["folders"]["text cache"]["exists"] is False


def test_a_current_folder_that_was_deleted(call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    assert_sentence(*call("predict", "a.png", WORDS), "current folder", "deleted")


def test_usage_errors_are_sentences(call: Call) -> None:
    assert_sentence(*call("predcit"), "predcit", "lexiseg --help")
    assert_sentence(*call("predict", "--modle", "x"), "--modle", "lexiseg predict --help")
    assert_sentence(*call("predict", "a", "b", "--batch-size", "0"), "--batch-size")
    assert_sentence(*call("draw", "similarity", "no-model", "a.png", "--point", "1" * 5000 + ",1"), "--point takes")
    assert_sentence(*call("draw", "proposals", "no-model", "a.png", "cat", "--count", "0"), "--count")
    assert_sentence(*call("convert", "a.pth"), "--output")
    assert_sentence(
        *call("predict", "a", "b", "--refine", "x"), "Invalid value for '--refine': 'x' is not one of 'none'"
    )
    for verb in (
        *(("predict", "a", "b"), ("convert", "a.pth"), ("evaluate", "tiny", "-w", "a"), ("export", "a")),
        *(("train", "tiny"), ("data", "show"), ("draw", "nga", "a")),
    ):
        assert_sentence(*call(*verb, "--output= "), "(-o) is empty", "place to write")
        assert_sentence(*call(*verb, "-o", ""), "argument is empty")
    # As a path "" is the current folder, whose pictures nobody asked for.
    for arguments in (("predict", "", "cat; grass"), ("predict", "a", "b", "-m", ""), ("data", "verify", "")):
        assert_sentence(*call(*arguments), "argument is empty", "unset shell variable")
    for arguments in ((), ("--help",), ("data",), ("predict", "-h")):
        code, out, err = call(*arguments)
        assert code == 0 and "Usage" in out and not err


def test_interruption_and_memory(call: Call, picture: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    def burst(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    def burst_on_cpu(*_: object, **__: object) -> None:
        torch.empty(2**60, dtype=torch.uint8)

    def overflow(*_: object, **__: object) -> None:
        torch.empty(2**60, 2**60)

    monkeypatch.setattr(lexiseg, "load", stop)
    code, _, err = call("predict", picture, WORDS)
    assert code == 130 and "Traceback" not in err
    assert err == "Stopped.\n"

    def stop_and_say(*_: object, **__: object) -> None:
        raise KeyboardInterrupt("Stopped after step 3; --resume continues.")  # as the trainer does

    monkeypatch.setattr(lexiseg.training.run, "train", stop_and_say)
    assert call("train", "tiny") == (130, "", "Stopped after step 3; --resume continues.\n")
    for full in (burst, burst_on_cpu, overflow):
        monkeypatch.setattr(lexiseg, "load", full)
        assert_sentence(*call("predict", picture, WORDS), "memory")


def test_defects_keep_their_traceback(call: Call, picture: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("a defect")

    monkeypatch.setattr(lexiseg, "load", fail)
    with pytest.raises(RuntimeError, match="a defect"):
        call("predict", picture, WORDS)
