"""A tiny model and the command as a function."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from lexiseg.cli import main
from lexiseg.clip.model import build_clip, save_clip
from lexiseg.models import ZegCLIP, ZegCLIPOptions
from lexiseg.weights import save_model
from tests.cli.calling import ARCHITECTURE, Call


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
