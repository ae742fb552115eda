"""What is mutated of a folder of one's own: any file of any layout, and the names of files."""

from __future__ import annotations

import os
import random
import shutil
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch  # noqa: F401 (its import takes longer than a case may)

from lexiseg.data.sets.dataset import FileDataset
from lexiseg.data.sets.open import open_data_set
from lexiseg.data.sets.verify import verify
from lexiseg.errors import LexisegError
from tests.data.sets.test_layouts import LAYOUTS
from tests.fuzz.mutations import NASTY_TEXTS, spoil_bytes

_SETTINGS = ("exif: raw\n", "exif: apply\n", "ignore: [1, 255]\n", "masks: NAME_mask\n", "masks: m_NAME\n", "exif: x\n")
_NAMES = (*NASTY_TEXTS, "cafe\u0301", "CAFÉ", "train", "val", "a_mask")
_LINES = (*NASTY_TEXTS, "a", "b.jpg", "images\\c.jpg", "../a", "", "nobody")
# What verify calls a fault although a sample can be read, because something would be learned or judged wrongly.
_STRICTER = {"damaged-picture", "damaged-label", "odd-proportions", "split-overlap", "no-labels", "class-list"}


@cache
def clean() -> list[Path]:
    """A folder of each layout."""
    whole = Path(tempfile.mkdtemp(prefix="lexiseg-fuzz-data-"))
    for number, layout in enumerate(LAYOUTS):
        layout(whole / f"{number:02}")
    return sorted(whole.iterdir())


def data_folders(rng: random.Random, folder: Path) -> Callable[[], object]:
    """Spoil a folder; reading it compares what ``verify`` says with what reading the samples says."""
    root = folder / "data"
    shutil.rmtree(root, ignore_errors=True)
    shutil.copytree(rng.choice(clean()), root, symlinks=True)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        _spoil(root, rng)
    return lambda: compare(root)


def _spoil(root: Path, rng: random.Random) -> None:
    files = sorted(path for path in root.rglob("*") if path.is_file())
    if not files:
        return
    # As often a text as a picture, of which there are many more.
    texts = [path for path in files if path.suffix in (".txt", ".json", ".yaml", ".csv", ".names")]
    path = rng.choice(texts if texts and rng.random() < 0.5 else files)
    kind = rng.randrange(8)
    if kind < 3:
        path.write_bytes(spoil_bytes(path.read_bytes(), rng))
    elif kind == 3:
        path.unlink()
        if rng.random() < 0.3:
            path.symlink_to(rng.choice((path.name, "/nonexistent")))
        elif rng.random() < 0.2:
            path.mkdir()
    elif kind == 4:
        name = rng.choice(_NAMES).replace("/", "_").replace("\0", "")[:60]
        target = path.parent / f"{name or 'x'}{rng.choice((path.suffix, '.png', '.heic', '.JPG', ''))}"
        if not os.path.lexists(target):
            path.rename(target)
    elif kind == 5:
        _put(root / "lexiseg.yaml", rng.choice(_SETTINGS))
    elif kind == 6:
        path.write_bytes(rng.choice(files).read_bytes())
    else:
        text = "\n".join(rng.choice(_LINES) for _ in range(3))
        _put(root / rng.choice(("train.txt", "val.txt", "unseen.txt")), text)


def _put(path: Path, text: str) -> None:
    if not path.is_dir():
        path.unlink(missing_ok=True)  # it may be a link to itself or out of the folder
        path.write_text(text, errors="surrogateescape")


def compare(root: Path) -> None:
    """Both directions of what ``verify`` promises.

    Raises:
        LexisegError: the folder cannot be used, and ``verify`` says so.
        AssertionError: the two say different things.
    """
    found = verify("own", root, workers=1)
    refused = [said for split in ("train", "val") for said in _refusals(root, split)]
    assert not refused or found.findings, f"training says {refused[0]!r} and verify says nothing"
    stricter = all(finding.kind in _STRICTER for finding in found.errors)
    assert refused or stricter, f"verify says {found.errors[0]} and training says nothing"
    if refused:
        raise LexisegError(refused[0])


def _refusals(root: Path, split: str) -> list[str]:
    try:
        data = open_data_set("own", root, split)
    except LexisegError as error:
        return [str(error)]
    return [said for index in range(len(data)) if (said := _refusal(data, index)) is not None]


def _refusal(data: FileDataset, index: int) -> str | None:
    try:
        data[index]
    except LexisegError as error:
        return str(error)
    return None
