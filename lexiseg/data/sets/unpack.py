"""Unpacking archives: no member leaves the folder, no file is ever half there, and a second run does nothing again."""

from __future__ import annotations

import lzma
import os
import re
import shutil
import tarfile
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from lexiseg.data.sets.listing import entries, is_safe
from lexiseg.errors import LexisegError
from lexiseg.files import atomic_write

ARCHIVE_SUFFIXES = (".zip", ".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")

_DAMAGE = (zipfile.BadZipFile, tarfile.TarError, zlib.error, lzma.LZMAError, EOFError, ValueError, RuntimeError)
_LEFTOVER = re.compile(r"\.(.+)\.[0-9a-f]{8}\.tmp(\.[^.]*)?")  # the names of :func:`lexiseg.files.atomic_write`
_Open = Callable[[], IO[bytes]]


@dataclass(frozen=True)
class Unpacked:
    """What became of an archive.

    Attributes:
        archive: its path.
        written: number of files written.
        kept: number of files that were there already, complete.
        skipped: names of members that are no files (links, devices); they are not made.
        folders: how many files the archive has in each folder, by its place below the target.
    """

    archive: Path
    written: int
    kept: int
    skipped: tuple[str, ...] = ()
    folders: Mapping[str, int] = field(default_factory=dict)


def find_archives(folder: Path) -> list[Path]:
    """The archives in a folder, by name."""
    return [folder / name for name in entries(folder) if name.lower().endswith(ARCHIVE_SUFFIXES)]


def unpack(archive: Path, target: Path) -> Unpacked:
    """Unpack a zip or tar archive into a folder.

    Every file is written under a temporary name and renamed when it is complete. A file that is there with the size it
    has in the archive is left alone, so that an interrupted run goes on where it was stopped; what such a run left half
    written is removed.

    Args:
        archive: the file.
        target: the folder; created where it is missing.

    Raises:
        LexisegError: the archive is damaged or no archive, the disk is too small, or a member's name leads outside
            ``target`` or through a link; nothing is written in the last two cases.
    """
    written = kept = 0
    skipped: list[str] = []
    members: set[str] = set()
    swept: set[Path] = set()
    with _members(archive) as (listing, walk):
        names = [name for name, _ in listing()]
        for name in names:
            if not is_safe(name):
                raise LexisegError(
                    f"The archive '{archive}' holds '{name[:80]}', which leads outside its folder; do not use it."
                )
        known = {os.path.normpath(target / name) for name in names}
        needed = sum(size for name, size in listing() if not _is_there(target / name, size))
        _check_space(archive, target, needed)
        for name, size, opened in walk():
            if opened is None:
                skipped.append(name)
                continue
            path = target / name
            members.add(name)
            _refuse_links(archive, target, path)
            if _is_there(path, size):
                kept += 1
                continue
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.parent not in swept:
                swept.add(path.parent)
                _sweep(path.parent, known)
            with atomic_write(path) as temporary, opened() as source, temporary.open("wb") as file:
                shutil.copyfileobj(source, file, 1 << 20)
                if file.tell() != size:
                    raise LexisegError(f"The archive '{archive}' ends early in '{name}'; fetch it again.")
            written += 1
    return Unpacked(archive, written, kept, tuple(skipped), Counter(name.rpartition("/")[0] for name in members))


def is_unpacked(folders: Mapping[str, int], target: Path) -> bool:
    """Whether ``target`` still has as many files in each folder as an archive put there (:attr:`Unpacked.folders`)."""
    return all(_num_files(target / folder) >= number for folder, number in folders.items())


def _num_files(folder: Path) -> int:
    try:
        with os.scandir(folder) as found:
            return sum(not entry.is_dir() for entry in found)
    except OSError:
        return 0


def _sweep(folder: Path, known: set[str]) -> None:
    """Remove the half-written members of this archive that a killed run left in ``folder``."""
    with os.scandir(folder) as found:
        names = [entry.name for entry in found]
    for name in names:
        match = _LEFTOVER.fullmatch(name)
        if match and os.path.normpath(folder / f"{match[1]}{match[2] or ''}") in known:
            with suppress(OSError):
                (folder / name).unlink()


_Listing = Callable[[], Iterator[tuple[str, int]]]
_Walk = Callable[[], Iterator[tuple[str, int, "_Open | None"]]]


@contextmanager
def _members(archive: Path) -> Iterator[tuple[_Listing, _Walk]]:
    """The files of an archive: their names and sizes, and how to read them one after the other."""
    try:
        if zipfile.is_zipfile(archive):
            with zipfile.ZipFile(archive) as packed:
                yield (lambda: _zip_listing(packed)), (lambda: _zip_walk(packed))
        elif tarfile.is_tarfile(archive):
            with tarfile.open(archive) as tar:
                yield (lambda: _tar_listing(tar)), (lambda: _tar_walk(tar))
        else:
            raise LexisegError(f"'{archive}' is neither a zip nor a tar archive, or it is damaged; fetch it again.")
    except LexisegError:
        raise
    except _DAMAGE as error:
        raise LexisegError(f"The archive '{archive}' is damaged ({error}); fetch it again.") from error
    except OSError as error:
        raise LexisegError(f"Cannot unpack '{archive}' ({error.strerror or error}); check the disk.") from error


def _zip_listing(packed: zipfile.ZipFile) -> Iterator[tuple[str, int]]:
    return ((entry.filename, entry.file_size) for entry in packed.infolist() if not entry.is_dir())


def _zip_walk(packed: zipfile.ZipFile) -> Iterator[tuple[str, int, _Open | None]]:
    for entry in packed.infolist():
        if entry.is_dir():
            continue
        is_link = (entry.external_attr >> 16) & 0o170000 == 0o120000
        yield entry.filename, entry.file_size, None if is_link else _opener(packed, entry)


def _opener(packed: zipfile.ZipFile, entry: zipfile.ZipInfo) -> _Open:
    return lambda: packed.open(entry)


def _tar_listing(tar: tarfile.TarFile) -> Iterator[tuple[str, int]]:
    return ((entry.name, entry.size) for entry in tar.getmembers() if not entry.isdir())


def _tar_walk(tar: tarfile.TarFile) -> Iterator[tuple[str, int, _Open | None]]:
    for entry in tar.getmembers():
        if not entry.isdir():
            yield entry.name, entry.size, _extractor(tar, entry) if entry.isfile() else None


def _extractor(tar: tarfile.TarFile, entry: tarfile.TarInfo) -> _Open:
    def opened() -> IO[bytes]:
        file = tar.extractfile(entry)
        if file is None:
            raise tarfile.TarError(f"'{entry.name}' cannot be read")
        return file

    return opened


def _is_there(path: Path, size: int) -> bool:
    try:
        return path.is_file() and path.stat().st_size == size
    except OSError:
        return False


def _refuse_links(archive: Path, target: Path, path: Path) -> None:
    """Refuse to write through a link that lies in the folder: it may lead anywhere."""
    place = path
    while place != target and place != place.parent:
        if place.is_symlink():
            raise LexisegError(f"Unpacking '{archive}' would write through the link '{place}'; remove the link.")
        place = place.parent


def _check_space(archive: Path, target: Path, needed: int) -> None:
    place = target
    while not place.exists() and place != place.parent:
        place = place.parent
    free = shutil.disk_usage(place).free
    if needed > free:
        raise LexisegError(
            f"Unpacking '{archive}' needs {needed / 1e9:.1f} GB and the disk of '{target}' has {free / 1e9:.1f} GB; "
            "make room first."
        )
