"""Files inside zip archives, read where they are: nothing is unpacked, so no name can lead anywhere.

Zip archives have an index, so any member can be read by itself. Tar archives have none, and compressed ones can only be
read from the beginning: those are unpacked (`lexiseg data prepare`).
"""

import io
import os
import stat
import zipfile
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import IO, TypeAlias

from lexiseg.errors import DataSetError, LexisegError

MAX_BYTES = 256 << 20
"""Members that unpack to more than this are refused before a byte is unpacked; a picture has a few megabytes."""

_DAMAGE = (zipfile.BadZipFile, zlib.error, EOFError, ValueError, RuntimeError, NotImplementedError, OSError)


@dataclass(frozen=True)
class Member:
    """A file in a zip archive; it offers what the readers ask of a path."""

    archive: Path  # the zip file
    name: str  # of the file in it
    size: int  # in bytes, unpacked, as the archive's index says

    def __str__(self) -> str:
        return f"{self.archive}/{self.name}"

    @property
    def parent(self) -> Path:
        """The folder it would be in if the archive were one."""
        return self.archive / self.name.rpartition("/")[0]

    def read_bytes(self) -> bytes:
        """The file's contents, whose checksum is looked at.

        Raises LexisegError if it is damaged, encrypted, or too large to be a picture.
        """
        if self.size > MAX_BYTES:
            raise LexisegError(
                f"'{self}' unpacks to {self.size / 1e6:,.0f} MB, more than the {MAX_BYTES / 1e6:,.0f} MB that a "
                "picture may have; do not use this archive."
            )
        try:
            with _opened(self.archive, os.getpid()).open(self.name) as file:
                # Not more than the index says, whatever the file holds.
                data = file.read(self.size + 1)
        except KeyError as error:
            raise LexisegError(
                f"'{self}' is no longer in the archive; unpack the dataset or restore the archive."
            ) from error
        except _DAMAGE as error:
            raise LexisegError(f"'{self}' cannot be read ({error}); download the archive again.") from error
        if len(data) != self.size:
            raise LexisegError(f"'{self}' does not have the size that the archive states; download the archive again.")
        return data

    def open(self) -> IO[bytes]:
        """The file's contents as a file object that says what it is called."""
        file = io.BytesIO(self.read_bytes())
        file.name = str(self)
        return file


Place: TypeAlias = "Path | Member"
"""Where a picture or a label is."""


def readable(place: Place) -> Path | IO[bytes]:
    """What Pillow and `lexiseg.images.read_image` read."""
    return place.open() if isinstance(place, Member) else place


def zipped(archives: Iterable[Path], folder: str, suffixes: Sequence[str]) -> dict[str, Place]:
    """The files directly in ``folder`` of the first archive that is there, by their names without the suffix.

    ``folder``: in the archive, with ``/``. ``suffixes``: the files that count end in one of them, whatever the case.
    Raises DataSetError if the archive's index cannot be read.
    """
    archive = next((path for path in archives if path.is_file()), None)
    if archive is None:
        return {}
    facts = archive.stat()
    found: dict[str, Place] = {}
    for member in _index(archive, facts.st_size, facts.st_mtime_ns).get(folder, ()):
        name = member.name.rpartition("/")[2]
        ending = next((suffix for suffix in suffixes if name.lower().endswith(suffix)), None)
        if ending is not None and not name.startswith("."):
            found.setdefault(name[: -len(ending)], member)
    return dict(sorted(found.items()))


@lru_cache(maxsize=8)
def _index(archive: Path, size: int, changed: int) -> dict[str, tuple[Member, ...]]:
    """The files of an archive by their folder. Size and time of change are there to make a new archive a new entry."""
    folders: dict[str, list[Member]] = {}
    try:
        with zipfile.ZipFile(archive) as packed:
            for entry in packed.infolist():
                if not entry.is_dir() and not stat.S_ISLNK(entry.external_attr >> 16):
                    folder = entry.filename.rpartition("/")[0]
                    folders.setdefault(folder, []).append(Member(archive, entry.filename, entry.file_size))
    except _DAMAGE as error:
        problem = f"The archive '{archive}' cannot be read ({error}); download it again."
        raise DataSetError(problem, "damaged-archive") from error
    return {folder: tuple(members) for folder, members in folders.items()}


@lru_cache(maxsize=8)
def _opened(archive: Path, process: int) -> zipfile.ZipFile:
    """The archive, opened once per process: a forked loader process must not share its file position with others."""
    return zipfile.ZipFile(archive)
