"""What the tests of the command line share."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

import lexiseg
from tests.miniatures import png_header
from tests.towers import small_architecture

ARCHITECTURE = small_architecture(vision_cfg={"layers": 2, "width": 16, "head_width": 8}, text_cfg={"layers": 1})
WORDS = "dog; grass, lawn; giraffe"

Call = Callable[..., tuple[int, str, str]]


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
    bomb = folder / "bomb.png"
    bomb.write_bytes(png_header(40_000, 40_000))
    empty = folder / "empty.png"
    empty.touch()
    return {
        "not a picture": text,
        "truncated": truncated,
        "1 x 1": pixel,
        "= 1,600,000,000 pixels": bomb,
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
