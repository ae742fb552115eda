"""What several trainings start from."""

from __future__ import annotations

from pathlib import Path

import pytest

from lexiseg.clip.model import save_clip
from tests.towers import small_clip


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a small CLIP."""
    return save_clip(small_clip(), tmp_path_factory.mktemp("clip"))
