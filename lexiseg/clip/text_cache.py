"""A cache of text embeddings, by word and by the templates it was put into.

A shelf holds the vectors of all words that one text tower met in one set of templates. On disk a shelf is one file,
read whole and replaced whole, so that several processes may share a folder: the worst that can happen is that two of
them add words at once, and that one word is encoded again.
"""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import KW_ONLY, asdict, dataclass
from functools import partial
from pathlib import Path
from time import time
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from lexiseg.errors import LexisegError
from lexiseg.files import atomic_write, make_folder, utf8_path

DISK_BYTES = 1 << 30
"""What all shelves of a folder take on disk, at most; those that were not used for longest are removed."""
MEMORY_BYTES = 1 << 29
"""What all shelves of a process take in memory, at most; a single request may take more."""

_SHELVES = 64
_HALF_WRITTEN_SECONDS = 3600


@dataclass(eq=False)
class TextCache:
    """Vectors by shelf and word."""

    folder: Path | None  # of the shelves' files; None remembers in memory only
    width: int  # D, of the vectors
    _: KW_ONLY
    disk_bytes: int = DISK_BYTES  # the most that the folder may hold
    memory_bytes: int = MEMORY_BYTES  # the most that is remembered in memory

    def __post_init__(self) -> None:
        self._shelves: OrderedDict[str, _Shelf] = OrderedDict()
        self._lock = threading.RLock()

    def __reduce__(self) -> tuple[Any, ...]:
        return partial(TextCache, **asdict(self)), ()  # a copy remembers nothing yet

    def get(
        self, shelf: str, words: Sequence[str], encode: Callable[[list[int]], Tensor], *, disk: bool = True
    ) -> Tensor:
        """The vectors of words, of which the unknown ones are made and remembered: float32 (W, D) on the CPU.

        Args:
            shelf: its name, a part of a file name.
            words: W keys.
            encode: takes the indices of the unknown ones, n of them, each key once, and gives (n, D).
            disk: also look and keep on disk.
        """
        path = self.folder / f"{shelf}.safetensors" if disk and self.folder is not None else None
        with self._lock:
            known = self._shelves.get(shelf, _Shelf([], torch.zeros(0, self.width)))
            if path is not None and any(word not in known.rows for word in words):
                known = _merged(known, self._read(path))
            first = {word: index for index, word in reversed(list(enumerate(words)))}
            unknown = sorted(index for word, index in first.items() if word not in known.rows)
            if unknown:
                known = _merged(known, _Shelf([words[index] for index in unknown], encode(unknown).float().cpu()))
                if path is not None:
                    self._write(path, known.newest(self.disk_bytes, words))
            self._shelves[shelf] = known.newest(self.memory_bytes, words)
            self._shelves.move_to_end(shelf)
            while len(self._shelves) > 1 and (
                len(self._shelves) > _SHELVES or sum(s.bytes for s in self._shelves.values()) > self.memory_bytes
            ):
                self._shelves.popitem(last=False)
        rows = [known.rows[word] for word in words]
        return known.vectors if rows == list(range(len(known.rows))) else known.vectors[rows]

    def _read(self, path: Path) -> _Shelf | None:
        # A damaged file, or one that another process replaces meanwhile (a RuntimeError), costs a text forward, never
        # an error: it is ignored here and written anew.
        with suppress(SafetensorError, OSError, KeyError, ValueError, TypeError, RuntimeError):
            with utf8_path(path) as place:
                content = load_file(place)
            words, vectors = json.loads(bytes(content["words"].tolist())), content["vectors"]
            fits = vectors.dtype == torch.float32 and vectors.shape == (len(words), self.width)
            if fits and all(type(word) is str for word in words) and bool(torch.isfinite(vectors).all()):
                path.touch()  # which shelf was not used for longest shows in the files' times
                return _Shelf(words, vectors)
        return None

    def _write(self, path: Path, shelf: _Shelf) -> None:
        # A full or read-only disk must not stop a prediction.
        with suppress(LexisegError, OSError):
            make_folder(path.parent)
            words = torch.frombuffer(bytearray(json.dumps(list(shelf.rows)).encode()), dtype=torch.uint8)
            with atomic_write(path) as temporary:
                save_file({"words": words, "vectors": shelf.vectors.contiguous()}, temporary)
            found = []
            for file in path.parent.iterdir():
                if file.suffix == ".safetensors":
                    status = file.stat()
                    if file.name.startswith(".") and status.st_mtime < time() - _HALF_WRITTEN_SECONDS:
                        file.unlink()  # of a process that was killed
                    elif file != path and not file.name.startswith("."):
                        found.append((status.st_mtime, status.st_size, file))
            free = self.disk_bytes - path.stat().st_size
            for _, size, file in sorted(found, reverse=True):
                free -= size
                if free < 0:
                    file.unlink(missing_ok=True)


class _Shelf:
    """Words and their vectors, the oldest first."""

    def __init__(self, words: Sequence[str], vectors: Tensor) -> None:
        self.rows = {word: row for row, word in enumerate(words)}
        self.vectors = vectors

    @property
    def bytes(self) -> int:
        """What the vectors take."""
        return self.vectors.numel() * self.vectors.element_size()

    def newest(self, limit: int, wanted: Sequence[str]) -> _Shelf:
        """This shelf, or where it is larger than ``limit`` bytes what fits, the ``wanted`` words first."""
        if self.bytes <= limit:
            return self
        fit = max(limit // (self.bytes // len(self.rows)), 1)
        asked = dict.fromkeys(wanted)
        ordered = [*(word for word in self.rows if word not in asked), *asked][-fit:]
        return _Shelf(ordered, self.vectors[[self.rows[word] for word in ordered]])


def _merged(first: _Shelf, second: _Shelf | None) -> _Shelf:
    """Both shelves in one; a word that is in both keeps its first vector."""
    fresh = [row for word, row in second.rows.items() if word not in first.rows] if second is not None else []
    if second is None or not fresh:
        return first
    words = list(second.rows)
    return _Shelf([*first.rows, *(words[row] for row in fresh)], torch.cat([first.vectors, second.vectors[fresh]]))
