"""The models that come with the package; listing them needs nothing but their configurations."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PACKAGED_FOLDER = Path(__file__).resolve().parent / "pretrained"
CONFIG_NAME = "config.json"
"""In a model's folder; a CLIP's has `CLIP_CONFIG_NAME`."""
CLIP_CONFIG_NAME = "open_clip_config.json"
DENSE_CLIP = "dense-clip"
"""The training-free system, which runs on any CLIP: ``METHOD/NAME``."""


@dataclass(frozen=True)
class ModelEntry:
    """A model that `lexiseg.load` knows by name."""

    name: str  # what to load it by
    system: str  # the system it is of
    description: str  # one line for people


def packaged_models() -> dict[str, Path]:
    """The folders of the models that come with lexiseg, by their names."""
    return {path.parent.name: path.parent for path in sorted(PACKAGED_FOLDER.glob(f"*/{CONFIG_NAME}"))}


def packaged_clips() -> list[str]:
    """Names of the CLIPs that come with lexiseg."""
    return sorted(path.parent.name for path in PACKAGED_FOLDER.glob(f"*/{CLIP_CONFIG_NAME}"))


def clip_config(name: str) -> dict[str, Any]:
    """The configuration of a CLIP that comes with lexiseg."""
    return json.loads((PACKAGED_FOLDER / name / CLIP_CONFIG_NAME).read_text("utf-8"))


def list_models() -> list[ModelEntry]:
    """All models that come with lexiseg, and the training-free one on each CLIP that comes with it."""
    entries = []
    for name, folder in packaged_models().items():
        config = json.loads((folder / CONFIG_NAME).read_text("utf-8"))
        entries.append(ModelEntry(name, config["system"], config.get("metadata", {}).get("description", "")))
    entries += [
        ModelEntry(f"{method}/{name}", DENSE_CLIP, f"training-free, on the packaged {name}")
        for name in packaged_clips()
        for method in ("maskclip", "naclip")
    ]
    return entries
