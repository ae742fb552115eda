"""Unpacking archives: no member leaves the folder, no file is ever half there, and a second run does nothing again."""

from __future__ import annotations

import lzma
import os
import shutil
import tarfile
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import TypeAlias

from lexiseg.data.sets.listing import entries, is_safe
from lexiseg.errors import LexisegError

ARCHIVE_SUFFIXES = (".zip", ".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")

_DAMAGE = (zipfile.BadZipFile, tarfile.TarError, zlib.error, lzma.LZMAError, EOFError, ValueError, RuntimeError)
_PART = ".lexiseg-unpacking"  # a folder in the target, on the same disk, out of which whole files are moved
_Member: TypeAlias = "tuple[str, int, Callable[[Path], object] | None]"


@dataclass(frozen=True)
class Unpacked:
    """The result of unpacking an archive."""

    archive: Path  # its path
    written: int  # number of files written
    kept: int  # number of files that were there already, complete
    skipped: tuple[str, ...] = ()  # names of members that are no files (links, devices); they are not made


def find_archives(folder: Path) -> list[Path]:
    """The archives in a folder, by name."""
    return [folder / name for name in entries(folder) if name.lower().endswith(ARCHIVE_SUFFIXES)]


def unpack(archive: Path, target: Path) -> Unpacked:
    """Unpack a zip or tar archive into a folder.

    Every file is unpacked aside and moved when it is complete. A file that is there with the size it has in the archive
    is left alone, so that an interrupted run continues where it stopped; what such a run left is removed.

    ``target``: the folder; created where it is missing. Raises LexisegError if the archive is damaged or no archive,
    the disk is too small, or a member's name leads outside ``target`` or through a link; nothing is written in the last
    two cases.
    """
    part = target / _PART
    try:
        if zipfile.is_zipfile(archive):
            with zipfile.ZipFile(archive) as zipped:
                return _unpack(archive, target, part, _zip_members(zipped))
        if tarfile.is_tarfile(archive):
            with tarfile.open(archive) as tar:
                return _unpack(archive, target, part, _tar_members(tar))
    except _DAMAGE as error:
        raise LexisegError(f"The archive '{archive}' is damaged ({error}); download it again.") from error
    except OSError as error:
        raise LexisegError(f"Cannot unpack '{archive}' ({error.strerror or error}); check the disk.") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)
    raise LexisegError(f"'{archive}' is neither a zip nor a tar archive, or it is damaged; download it again.")


def _unpack(archive: Path, target: Path, part: Path, members: list[_Member]) -> Unpacked:
    for name, _, _ in members:
        if not is_safe(name):
            raise LexisegError(
                f"The archive '{archive}' holds '{name[:80]}', which leads outside its folder; do not use it."
            )
    files = [(name, size, extract) for name, size, extract in members if extract is not None]
    missing = [entry for entry in files if not _is_there(target / entry[0], entry[1])]
    _check_space(archive, target, sum(size for _, size, _ in missing))
    for name, size, extract in missing:
        _refuse_links(archive, target, target / name)
        extract(part)
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        if (part / name).stat().st_size != size:
            raise LexisegError(f"The archive '{archive}' ends early in '{name}'; download it again.")
        os.replace(part / name, target / name)
    skipped = tuple(name for name, _, extract in members if extract is None)
    return Unpacked(archive, len(missing), len(files) - len(missing), skipped)


def _zip_members(zipped: zipfile.ZipFile) -> list[_Member]:
    def extracted(entry: zipfile.ZipInfo) -> Callable[[Path], object] | None:
        is_link = (entry.external_attr >> 16) & 0o170000 == 0o120000
        return None if is_link else lambda part: zipped.extract(entry, part)

    return [(entry.filename, entry.file_size, extracted(entry)) for entry in zipped.infolist() if not entry.is_dir()]


def _tar_members(tar: tarfile.TarFile) -> list[_Member]:
    def extracted(entry: tarfile.TarInfo) -> Callable[[Path], object] | None:
        return (lambda part: tar.extract(entry, part, filter="data")) if entry.isfile() else None

    return [(entry.name, entry.size, extracted(entry)) for entry in tar.getmembers() if not entry.isdir()]


def _is_there(path: Path, size: int) -> bool:
    try:
        return path.is_file() and path.stat().st_size == size
    except OSError:
        return False


def _refuse_links(archive: Path, target: Path, path: Path) -> None:
    """Refuse to write through a link that lies in the folder: it may lead anywhere."""
    for place in takewhile(lambda place: place != target, (path, *path.parents)):
        if place.is_symlink():
            raise LexisegError(f"Unpacking '{archive}' would write through the link '{place}'; remove the link.")


def _check_space(archive: Path, target: Path, needed: int) -> None:
    free = shutil.disk_usage(next(place for place in (target, *target.parents) if place.exists())).free
    if needed > free:
        raise LexisegError(
            f"Unpacking '{archive}' needs {needed / 1e9:.1f} GB and the disk of '{target}' has {free / 1e9:.1f} GB; "
            "make room first."
        )
