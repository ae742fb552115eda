"""Text prompts that were learned offline, in a folder: their vectors, and how they were learned."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from lexiseg.clip.prompt_learner import PromptLearner
from lexiseg.errors import LexisegError
from lexiseg.files import atomic_write, make_folder, read_json, write_json

PROMPTS_NAME = "prompts.safetensors"
_CARD_NAME = "prompts.json"
_COUNTS = ("prefix", "suffix", "task")
_PARTS = tuple(f"{part}_prompt" for part in _COUNTS)


def save_prompts(learner: PromptLearner, folder: str | Path, card: Mapping[str, Any] | None = None) -> Path:
    """Write prompts into ``folder/prompts.safetensors``, and how they were learned, ``card``, into ``prompts.json``.

    A folder that cannot be written is a `LexisegError`.
    """
    path = make_folder(folder) / PROMPTS_NAME
    with atomic_write(path) as temporary:
        save_file({name: value.detach().cpu().contiguous() for name, value in learner.state_dict().items()}, temporary)
    if card is not None:
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


def load_prompts(folder: str | Path) -> PromptLearner:
    """Read what `save_prompts` wrote; how many vectors there are shows in the file.

    A file that is not there or holds something else is a `LexisegError`.
    """
    path = Path(folder) / PROMPTS_NAME
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise LexisegError(
            f"'{path}' is not a readable file of prompts; give the folder they were trained in."
        ) from error
    if not tensors or set(tensors) - set(_PARTS) or len({value.shape[-1] for value in tensors.values()}) != 1:
        raise LexisegError(
            f"'{path}' holds no prompts but {', '.join(sorted(tensors)) or 'nothing'}; give another folder."
        )
    counts = {part: len(tensors[f"{part}_prompt"]) if f"{part}_prompt" in tensors else 0 for part in _COUNTS}
    learner = PromptLearner(next(iter(tensors.values())).shape[-1], **counts)
    learner.load_state_dict(tensors)
    return learner
