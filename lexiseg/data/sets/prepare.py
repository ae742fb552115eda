"""Making a folder of downloaded archives into a dataset that can be opened, without a network.

No member of an archive leaves the folder, no file is ever half there, and a second run does nothing again.
"""

from __future__ import annotations

import fnmatch
import lzma
import os
import shutil
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import TypeAlias

from lexiseg.data.sets.catalog import data_set
from lexiseg.data.sets.layouts import IMAGE_FOLDERS, every_fifth, own_list, part_of
from lexiseg.data.sets.listing import by_stem, child, entries, first_folder, is_safe
from lexiseg.data.sets.open import OWN, list_split
from lexiseg.data.sets.papers import aug_names, find_sbd, voc_list
from lexiseg.data.sets.verify import usable_splits
from lexiseg.errors import DataSetError, LexisegError
from lexiseg.files import is_folder, make_folder, write_bytes
from lexiseg.images import IMAGE_SUFFIXES
from lexiseg.words import counted

# Where an archive belongs, below the root, by the names they are distributed under; all others are unpacked into the
# root, because they bring their own top folder (VOCdevkit, benchmark_RELEASE, ADEChallengeData2016 ...).
_PLACES: dict[str, tuple[tuple[str, str], ...]] = {
    "coco-stuff-164k": (("stuffthingmaps*", "stuffthingmaps"), ("train2017.*", "images"), ("val2017.*", "images")),
    "voc2012": (("SegmentationClassAug*", "VOCdevkit/VOC2012"),),
    "pascal-context-59": (("SegmentationClassContext*", "VOCdevkit/VOC2010"), ("trainval.*", "VOCdevkit/VOC2010")),
    "pascal-context-459": (("trainval.*", "VOCdevkit/VOC2010"),),
}
ARCHIVE_SUFFIXES = (".zip", ".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")

_DAMAGE = (zipfile.BadZipFile, tarfile.TarError, zlib.error, lzma.LZMAError, EOFError, ValueError, RuntimeError)
_LONG = b"LKxgX"  # the types of headers that are followed by a long name, or by other texts
_MAX_HEADER = 1 << 20
_PART = ".lexiseg-unpacking"  # a folder in the target, on the same disk, out of which whole files are moved
_Member: TypeAlias = "tuple[str, int, Callable[[Path], object] | None]"


@dataclass(frozen=True)
class Step:
    """Something that was done."""

    what: str  # one line for people
    path: str  # what it was done to, or what was written


def prepare(
    name: str, root: str | Path, *, classes: str | Path | None = None, say: Callable[[str], None] = lambda _: None
) -> list[Step]:
    """Unpack the archives that lie in ``root`` and write the lists that the reader needs.

    A run that was stopped continues where it was; a run on a folder that is ready does nothing. Archives are kept. At
    the end the splits are listed, without opening a picture, so that what is missing is said here.

    ``name``: as in :func:`lexiseg.data.sets.open.open_data_set`. ``root``: the folder with the archives, which becomes
    the dataset's folder. ``classes``: the class list, where the distribution does not carry one. Returns what was
    done, in order; empty where there was nothing to do. Raises LexisegError if there is no such dataset or folder, an
    archive is damaged or unsafe, or something of the dataset is missing after all; what was done stays and ``say`` was
    told of it.
    """
    root = Path(root)
    if name != OWN:
        data_set(name)
    if not is_folder(root):
        raise LexisegError(f"The folder '{root}' does not exist; put {_parts(name)} into it first.")
    steps = [*_unpack_all(name, root, say)]
    lists: dict[Path, list[str]] = {}
    if name == "voc2012":
        lists = _voc_lists(root)
    elif name == OWN:
        lists = _own_lists(root)
    for path, names in lists.items():
        make_folder(path.parent)
        write_bytes(path, _listed(names))
        steps.append(Step(f"listed {counted(len(names), 'picture')}", str(path)))
    _check(name, root, classes, steps, say)
    return steps


def _parts(name: str) -> str:
    return "your pictures and masks, or archives of them," if name == OWN else f"the archives of {name}"


def _check(name: str, root: Path, classes: str | Path | None, steps: list[Step], say: Callable[[str], None]) -> None:
    complete: list[str] = []
    problems: list[str] = []
    for split in usable_splits(name, root)[0]:
        try:
            files = list_split(name, root, split, classes=classes)
            found = [finding.problem for finding in files.faults() if finding.severity == "error"]
        except LexisegError as error:
            if isinstance(error, DataSetError) and not find_archives(root) and not any(entries(root)):
                raise LexisegError(f"The folder '{root}' is empty; put {_parts(name)} into it first.") from error
            found = [str(error)]
        problems += [problem for problem in found if problem not in problems]
        if not found:
            complete.append(split)
    if not problems:
        return
    for step in steps:
        say(f"{step.what}: {step.path}")
    notes = [f"the split '{split}' is" for split in complete]
    if len(problems) > 1:
        notes.append(f"the first of {len(problems)} problems that `lexiseg data verify` lists")
    note = f" ({'; '.join(notes)})" if notes else ""
    raise LexisegError(f"{name} in '{root}' is not complete{note}: {problems[0]}")


def _unpack_all(name: str, root: Path, say: Callable[[str], None]) -> list[Step]:
    steps = []
    for archive in find_archives(root):
        places = (place for pattern, place in _PLACES.get(name, ()) if fnmatch.fnmatch(archive.name, pattern))
        target = root / next(places, ".")
        say(f"unpacking {archive.name}")
        done = unpack(archive, target)
        links = f", {counted(len(done.skipped), 'link')} skipped" if done.skipped else ""
        if done.changed:
            links += f", {len(done.changed)} that differ left as they are (remove '{done.changed[0]}' to restore it)"
        if done.written or done.changed:
            what = f"unpacked {archive.name}: {counted(done.written, 'file')}, {done.kept} already there{links}"
            steps.append(Step(what, str(target)))
    return steps


def _voc_lists(root: Path) -> dict[Path, list[str]]:
    home = first_folder((root / "VOCdevkit" / "VOC2012", root / "VOC2012", root))
    if home is None or not voc_list(home, "train").is_file() or voc_list(home, "aug").is_file():
        return {}
    names, findings = aug_names(home, find_sbd(root, home))
    return {voc_list(home, "aug"): names} if names and not findings else {}


def _own_lists(root: Path) -> dict[Path, list[str]]:
    """train.txt and val.txt for a folder without splits: what the reader would take without them, said explicitly."""
    if any(name.endswith(".json") for name in (*entries(root), *entries(root / "annotations"))):
        return {}
    images = child(root, IMAGE_FOLDERS)
    if images is None or any(part_of(folder, "val") is not None for folder in (root, images)):
        return {}
    names = list(by_stem(images, IMAGE_SUFFIXES))
    if any(len(name.splitlines()) != 1 or name != name.strip() or name.startswith("#") for name in names):
        return {}  # a list has a name a line, or a comment, and the rule takes every name there is
    lists = {split: every_fifth(names, split) for split in ("train", "val")}
    written = {split: path for split in lists if (path := own_list(root, split)) is not None}
    if not names or any(path.read_bytes() != _listed(lists[split]) for split, path in written.items()):
        return {}  # the lists that are there are somebody's own
    return {root / f"{split}.txt": names for split, names in lists.items() if split not in written}


def _listed(names: Iterable[str]) -> bytes:
    """A list of names, byte for byte as the disk has them."""
    return "".join(f"{name}\n" for name in names).encode("utf-8", "surrogateescape")


@dataclass(frozen=True)
class Unpacked:
    """The result of unpacking an archive."""

    written: int  # number of files written
    kept: int  # number of files that were there already, complete
    skipped: tuple[str, ...] = ()  # names of members that are no files (links, devices); they are not made
    changed: tuple[str, ...] = ()  # names of files that are there and were changed since; they are left alone


def find_archives(folder: Path) -> list[Path]:
    """The archives in a folder, by name."""
    return [folder / name for name in entries(folder) if name.lower().endswith(ARCHIVE_SUFFIXES)]


def unpack(archive: Path, target: Path) -> Unpacked:
    """Unpack a zip or tar archive into a folder.

    Every file is unpacked aside and moved when it is complete. A file that is there with the size it has in the archive
    is left alone, so that an interrupted run continues where it stopped; what such a run left is removed. So is one of
    another size, a class list or a mask that somebody has corrected, unless it is the beginning of the archive's.

    ``target``: the folder; created where it is missing. Raises LexisegError if the archive is damaged or no archive,
    the disk is too small, or a member's name leads outside ``target`` or through a link; nothing is written in the last
    two cases.
    """
    part = target / _PART
    try:
        if zipfile.is_zipfile(archive):
            with zipfile.ZipFile(archive) as zipped:
                return _unpack(archive, target, part, _zip_members(zipped))
        with tarfile.open(archive, tarinfo=_Header) as tar:
            return _unpack(archive, target, part, _tar_members(tar))
    except tarfile.ReadError as error:
        problem = f"'{archive}' is neither a zip nor a tar archive, or it is damaged; download it again."
        raise LexisegError(problem) from error
    except _DAMAGE as error:
        raise LexisegError(f"The archive '{archive}' is damaged ({error}); download it again.") from error
    except OSError as error:
        raise LexisegError(f"Cannot unpack '{archive}' ({error.strerror or error}); check the disk.") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _unpack(archive: Path, target: Path, part: Path, members: list[_Member]) -> Unpacked:
    for name, _, _ in members:
        if not is_safe(name):
            raise LexisegError(
                f"The archive '{archive}' holds '{name[:80]}', which leads outside its folder; do not use it."
            )
    # Of several members of one name the last counts.
    files = list({name: (name, size, extract) for name, size, extract in members if extract is not None}.values())
    missing = [entry for entry in files if not _is_there(target / entry[0], entry[1])]
    _check_space(archive, target, sum(size for _, size, _ in missing))
    changed = []
    for name, size, extract in missing:
        _refuse_links(archive, target, target / name)
        extract(part)
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        if (part / name).stat().st_size != size:
            raise LexisegError(f"The archive '{archive}' ends early in '{name}'; download it again.")
        old = target / name
        if old.is_file() and not (part / name).read_bytes().startswith(old.read_bytes()):  # more than copying cut short
            changed.append(name)
        else:
            os.replace(part / name, target / name)
    skipped = tuple(name for name, _, extract in members if extract is None)
    return Unpacked(len(missing) - len(changed), len(files) - len(missing), skipped, tuple(changed))


def _zip_members(zipped: zipfile.ZipFile) -> list[_Member]:
    def extracted(entry: zipfile.ZipInfo) -> Callable[[Path], object] | None:
        is_link = (entry.external_attr >> 16) & 0o170000 == 0o120000
        return None if is_link else lambda part: zipped.extract(entry, part)

    return [(entry.filename, entry.file_size, extracted(entry)) for entry in zipped.infolist() if not entry.is_dir()]


class _Header(tarfile.TarInfo):
    """A tar archive's header; one that announces more than a long name is refused, for it is read as a whole."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> _Header:
        """Read one. Raises ReadError if it is refused, and what `tarfile` raises."""
        found = super().frombuf(buf, encoding, errors)
        if found.size > _MAX_HEADER and found.type in _LONG:
            raise tarfile.ReadError("a header of many megabytes")
        return found


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
