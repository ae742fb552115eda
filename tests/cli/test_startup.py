"""Nothing heavy is imported before it is needed: what a command has loaded when it is done, in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

import lexiseg
from lexiseg.samples import sample_path

HEAVY = {"torch", "torchvision", "transformers", "timm", "open_clip", "accelerate", "scipy", "matplotlib", "fastapi"}
# What segmenting a picture with a packaged model has no use for: rare kinds of pictures.
UNWANTED = {"PIL.PdfParser", "PIL.WebPImagePlugin"}
SCRIPT = """
import sys
from lexiseg.cli import main
code = main(sys.argv[2:])
print(code, *sorted(set(sys.argv[1].split(",")) & set(sys.modules)), file=sys.stderr)
"""


def loaded(folder: Path, *words: object) -> set[str]:
    environment = {**os.environ, "PYTHONPATH": str(Path(lexiseg.__file__).parents[1])}
    names = ",".join([*HEAVY, "torch._dynamo", *UNWANTED])
    command = [sys.executable, "-c", SCRIPT, names, *(str(word) for word in words)]
    process = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=True)
    code, *modules = process.stderr.splitlines()[-1].split()
    assert code == "0", process.stderr
    return set(modules)


@pytest.mark.parametrize(
    "words", ["--help", "models", "models --json", "train --list", "doctor --quick", "serve --help", "data verify own"]
)
def test_commands_that_need_no_model_import_no_torch(tmp_path: Path, words: str) -> None:
    for kind in ("images", "masks"):
        (tmp_path / "own" / kind).mkdir(parents=True)
        for name in ("a.png", "b.png"):
            Image.new("RGB" if kind == "images" else "L", (32, 32)).save(tmp_path / "own" / kind / name)
    (tmp_path / "own" / "classes.txt").write_text("cat\ndog\n")
    assert not loaded(tmp_path, *words.split())


def test_predict_imports_torch_and_open_clip_alone(tmp_path: Path) -> None:
    words = ["predict", sample_path("demo"), "giraffe; grass", "--model", "zegclip-emoji", "--window", "128"]
    assert loaded(tmp_path, *words) == {"torch", "torchvision", "open_clip"}


def test_an_ending_process_does_not_look_through_what_was_imported() -> None:
    script = (
        "import atexit, gc; atexit.register(lambda: print(len(gc.get_objects()), gc.get_freeze_count())); "
        "from lexiseg.cli import main; main(['--version'])"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(lexiseg.__file__).parents[1])}
    process = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True
    )
    left, frozen = map(int, process.stdout.splitlines()[-1].split())
    assert left < 100 < 1000 < frozen


def test_what_was_left_out_can_be_imported_afterwards() -> None:
    script = (
        "from lexiseg.startup import start_quickly as lean; lean(); import open_clip, sys; "
        "assert not {'timm', 'transformers', 'torch._dynamo'} & set(sys.modules); "
        "import timm, transformers, torch, torchvision.ops; from torch._dynamo.utils import is_compile_supported; "
        "assert torch.compile(lambda x: x + 1, backend='eager')(torch.ones(1)) == 2; "
        "assert torchvision.ops.nms(torch.tensor([[0., 0, 1, 1]]), torch.ones(1), 0.5).tolist() == [0]"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(lexiseg.__file__).parents[1])}
    subprocess.run([sys.executable, "-c", script], env=environment, check=True)
