"""What a training leaves on disk, as far as whoever loads a model has to know it.

A run's folder holds ``model/`` at its end, and ``checkpoints/`` meanwhile: ``base/`` is the whole model as the run
began, and each ``step-NNNNNNNN/`` holds the tensors that training changes. ``state.json`` has the checksums of a
checkpoint's files, so that nothing continues with weights other than those saved.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from lexiseg.errors import LexisegError
from lexiseg.files import utf8_path

FORMAT = 2
BASE = "base"
STATE = "state.json"
STEP = "step-"
TENSORS = "model.safetensors"


def find_checkpoints(root: Path) -> list[Path]:
    """Complete checkpoints below ``root``, oldest first."""
    if not root.is_dir():
        return []
    found = [path for path in root.iterdir() if path.name.startswith(STEP) and (path / STATE).is_file()]
    return sorted(found, key=lambda path: path.name)


def seal(folder: Path, state: Mapping[str, Any]) -> None:
    """Write a checkpoint's ``state.json``, with the checksums of the files that lie in ``folder``."""
    sealed = {"format": FORMAT, **state, "files": {path.name: _digest(path) for path in sorted(folder.iterdir())}}
    sealed["checksum"] = _checksum(sealed)
    with (folder / STATE).open("w", encoding="utf-8") as file:
        json.dump(sealed, file)
        file.flush()
        os.fsync(file.fileno())


def read_state(folder: Path) -> dict[str, Any]:
    """The JSON part of a checkpoint, whose files are all as they were written.

    Raises LexisegError if something in it is damaged, missing, changed or of another format.
    """
    path = folder / STATE
    try:
        state: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if state["format"] != FORMAT or state["checksum"] != _checksum(state):
            raise ValueError("another format, or changed")
        for name, digest in state["files"].items():
            path = folder / name
            if _digest(path) != digest:
                raise ValueError("changed")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise damaged(path) from error
    return state


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors in one file of a checkpoint. Raises LexisegError if it is damaged."""
    try:
        with utf8_path(path) as place:
            return load_file(place)
    except (OSError, SafetensorError, ValueError) as error:
        raise damaged(path) from error


def damaged(path: Path) -> LexisegError:
    """The sentence for a file of a checkpoint that is not as it was written."""
    return LexisegError(
        f"'{path}' is damaged, was changed, or was not written by this version; delete the folder '{path.parent}' to "
        "go on from the checkpoint before it."
    )


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while part := file.read(1 << 20):
            digest.update(part)
    return digest.hexdigest()


def _checksum(state: Mapping[str, Any]) -> str:
    values = {key: value for key, value in state.items() if key != "checksum"}
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
