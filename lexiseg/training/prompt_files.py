"""Text prompts that were learned offline, in a folder: their vectors, and how they were learned."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from lexiseg.clip.model import write_tensors
from lexiseg.clip.prompt_learner import PromptLearner
from lexiseg.errors import LexisegError
from lexiseg.files import make_folder, read_json, write_json

PROMPTS_NAME = "prompts.safetensors"
_CARD_NAME = "prompts.json"


def save_prompts(learner: PromptLearner, folder: str | Path, card: Mapping[str, Any]) -> Path:
    """Write prompts into ``folder/prompts.safetensors``, and how they were learned, ``card``, into ``prompts.json``.

    A folder that cannot be written is a `LexisegError`.
    """
    path = make_folder(folder) / PROMPTS_NAME
    write_tensors(path, learner.state_dict())
    write_json(path.with_name(_CARD_NAME), dict(card))
    return path


def prompts_folder(name: str | Path) -> Path:
    """The folder with the prompts in the folder of a run; a folder that has them itself stays."""
    inside = Path(name) / "model"
    return inside if (inside / PROMPTS_NAME).is_file() else Path(name)


def read_card(folder: str | Path) -> dict[str, Any]:
    """What `save_prompts` was told of how prompts were learned; {} where nothing, a `LexisegError` if it is damaged."""
    path = Path(folder) / _CARD_NAME
    return read_json(path, "train the prompts again or remove the file") if path.is_file() else {}


def load_prompts(folder: str | Path) -> dict[str, Tensor]:
    """The vectors that `save_prompts` wrote, by name; a `LexisegError` if the file is not there or damaged."""
    path = Path(folder) / PROMPTS_NAME
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise LexisegError(
            f"'{path}' is not a readable file of prompts; give the folder they were trained in."
        ) from error
