"""Making a folder of downloaded archives into a dataset that can be opened, without a network."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from lexiseg.data.sets.catalog import data_set
from lexiseg.data.sets.layouts import IMAGE_FOLDERS, every_fifth, own_list, part_of
from lexiseg.data.sets.listing import by_stem, child, entries, first_folder
from lexiseg.data.sets.open import OWN, list_split
from lexiseg.data.sets.papers import aug_names, find_sbd, voc_list
from lexiseg.data.sets.unpack import find_archives, unpack
from lexiseg.data.sets.verify import usable_splits
from lexiseg.errors import DataSetError, LexisegError
from lexiseg.files import make_folder, write_bytes
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
    if not root.is_dir():
        raise LexisegError(f"The folder '{root}' does not exist; put the archives of {name} into it first.")
    steps = [*_unpack_all(name, root, say)]
    lists: dict[Path, list[str]] = {}
    if name == "voc2012":
        lists = _voc_lists(root)
    elif name == OWN:
        lists = _own_lists(root)
    elif name.startswith("pascal-context"):
        lists = _context_lists(name, root)
    for path, names in lists.items():
        make_folder(path.parent)
        write_bytes(path, _listed(names))
        steps.append(Step(f"listed {counted(len(names), 'picture')}", str(path)))
    _check(name, root, classes, steps, say)
    return steps


def _check(name: str, root: Path, classes: str | Path | None, steps: list[Step], say: Callable[[str], None]) -> None:
    complete: list[str] = []
    problems: list[str] = []
    for split in usable_splits(name, root)[0]:
        try:
            files = list_split(name, root, split, classes=classes)
            found = [finding.problem for finding in files.faults() if finding.severity == "error"]
        except LexisegError as error:
            if isinstance(error, DataSetError) and not find_archives(root) and not any(entries(root)):
                raise LexisegError(f"'{root}' holds no archives; put those of {name} into it first.") from error
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
        if done.written:
            what = f"unpacked {archive.name}: {counted(done.written, 'file')}, {done.kept} already there{links}"
            steps.append(Step(what, str(target)))
    return steps


def _voc_lists(root: Path) -> dict[Path, list[str]]:
    home = first_folder((root / "VOCdevkit" / "VOC2012", root / "VOC2012", root))
    if home is None or not voc_list(home, "train").is_file() or voc_list(home, "aug").is_file():
        return {}
    names, findings = aug_names(home, find_sbd(root, home))
    return {voc_list(home, "aug"): names} if names and not findings else {}


def _context_lists(name: str, root: Path) -> dict[Path, list[str]]:
    """Lists of the pictures that Context annotates, out of those of VOC 2010's detection task."""
    home = first_folder((root / "VOCdevkit" / "VOC2010", root / "VOC2010", root))
    lists: dict[Path, list[str]] = {}
    if home is None:
        return lists
    for split in ("train", "val"):
        path = home / "ImageSets" / "SegmentationContext" / f"{split}.txt"
        if not path.is_file() and (home / "ImageSets" / "Main" / f"{split}.txt").is_file():
            with suppress(LexisegError):  # labels or names are not there yet; verify says which
                lists[path] = [item.name for item in list_split(name, root, split).items]
    return {path: names for path, names in lists.items() if names}


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
