"""Finding files: the folder a dataset is in, its lists, and the labels that stand beside its pictures."""

import os
import unicodedata
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from lexiseg.data.sets.archive import Place, zipped
from lexiseg.data.sets.catalog import DataSetInfo
from lexiseg.data.sets.dataset import Finding, Item, SplitFiles
from lexiseg.data.sets.labels import LabelKind, ValueTable
from lexiseg.errors import DataSetError, LexisegError
from lexiseg.files import is_folder
from lexiseg.label_ids import ignore_index
from lexiseg.vocabulary import Vocabulary
from lexiseg.words import shorten, word_key

_LONGEST = 1024


def key(name: str) -> str:
    """A file's name as it is compared: the two spellings of an accented letter (NFC and NFD) are one."""
    return unicodedata.normalize("NFC", name)


def find_home(
    root: str | Path, inside: Sequence[str], marks: Sequence[str], what: str, archives: Sequence[str] = ()
) -> Path:
    """The folder a dataset's own folders are in: ``root`` itself or a place below it.

    ``inside``: places below it to look at as well, such as "VOCdevkit/VOC2012". ``marks``: the folder is right where
    one of these is in it. ``what``: the dataset, for the sentence. ``archives``: where nothing is unpacked, the folder
    is right that has one of these. Raises DataSetError if there is none.
    """
    root = Path(root)
    if not is_folder(root):
        raise DataSetError(f"The dataset folder '{root}' does not exist; give the folder that {what} was unpacked in.")
    homes = [root, *(root / place for place in inside)]
    for wanted in (marks, archives):
        for home in homes:
            if any((home / mark).exists() for mark in wanted):
                return home
    raise DataSetError(
        f"'{root}' holds no {what}: none of {', '.join(marks)} is in it; give the folder it was unpacked in, or put "
        "its archives there and run `lexiseg data prepare`."
    )


def first_folder(candidates: Iterable[Path], suffixes: Sequence[str] = ()) -> Path | None:
    """The first of ``candidates`` that is a folder, and holds a file with one of ``suffixes`` where any are given."""
    for folder in candidates:
        if folder.is_dir() and (
            not suffixes or any(name.lower().endswith(tuple(suffixes)) for name in entries(folder))
        ):
            return folder
    return None


def entries(folder: Path) -> list[str]:
    """Names of the files in ``folder``, sorted; hidden ones are left out. Empty where there is no such folder.

    Raises DataSetError if it is a file, or may not be read.
    """
    if folder.is_file():
        raise DataSetError(f"'{folder}' is a file, but must be a folder; move the file away.")
    return _inside(folder)[1]


def folders_in(folder: Path) -> list[Path]:
    """The folders in ``folder``, by name; hidden ones are left out. Empty where there is no such folder.

    Raises DataSetError if it may not be read.
    """
    return [folder / name for name in _inside(folder)[0]]


def _inside(folder: Path) -> tuple[list[str], list[str]]:
    """Names of the folders and of the files in ``folder``, sorted, without hidden ones."""

    def failed(error: OSError) -> None:
        if not isinstance(error, FileNotFoundError | NotADirectoryError):
            raise unreadable(folder, error) from error

    _, *found = next(os.walk(folder, onerror=failed), ("", [], []))
    folders, files = (sorted(name for name in names if not name.startswith(".")) for names in found)
    return folders, files


def child(folder: Path | None, names: Iterable[str]) -> Path | None:
    """The first of ``names`` that is a folder in ``folder``, whatever the case."""
    there = {} if folder is None else {inner.name.lower(): inner for inner in folders_in(folder)}
    return next((there[name.lower()] for name in names if name.lower() in there), None)


def files_in(folder: Path, names: Iterable[str]) -> list[Path]:
    """Those of ``names`` that are files in ``folder``; of each one in another case where there is none in this."""
    there = _inside(folder)[1]
    spelling = {**{name.lower(): name for name in there}, **{name: name for name in there}}
    return [folder / spelling[name] for name in names if name in spelling]


def unreadable(place: Path, error: OSError) -> DataSetError:
    """The error for a file or folder that the system does not let us look at; ``place`` is said where it names none."""
    where = error.filename if isinstance(error.filename, str) else place
    return DataSetError(f"'{where}' cannot be read ({error.strerror or error}); check its name and its permissions.")


def by_stem(folder: Path, suffixes: Iterable[str]) -> dict[str, Path]:
    """The files of ``folder`` that end in one of ``suffixes``, by their names without it, sorted; see :func:`key`."""
    return {stem: folder / names[0] for stem, names in _by_stem(folder, suffixes).items()}


def _by_stem(folder: Path, suffixes: Iterable[str]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for name in entries(folder):
        ending = next((suffix for suffix in suffixes if name.lower().endswith(suffix.lower())), None)
        if ending is not None:
            found.setdefault(key(name[: -len(ending)]), []).append(name)
    return found


def same_stems(names: Iterable[str], folder: Path, suffixes: Iterable[str]) -> list[Finding]:
    """A finding for each of ``names`` that several files of ``folder`` have, of which :func:`by_stem` takes one."""
    found = _by_stem(folder, suffixes)
    return [
        Finding(
            "duplicate-entry",
            f"{' and '.join(found[name])} in '{folder}' differ only in extension or spelling, so it is "
            f"unclear which of them belongs to '{name}'; remove or rename the others.",
            str(folder),
            name,
        )
        for name in names
        if len(found.get(name, ())) > 1
    ]


def read_lines(path: Path, what: str) -> list[str]:
    """The lines of a text file, stripped, without empty ones and comments (``# ...``), as in class lists.

    Names that are not UTF-8 are kept as the disk has them.

    Raises FileNotFoundError if there is none. Raises DataSetError if it cannot be read as text; ``what`` says what it
    must hold.
    """
    try:
        data = path.read_bytes()
        wide = data[:2] in (b"\xff\xfe", b"\xfe\xff")
        text = data.decode("utf-16") if wide else data.decode("utf-8-sig", "surrogateescape")
        if "\0" in text:
            raise ValueError
    except FileNotFoundError:
        raise
    except (OSError, ValueError) as error:
        raise DataSetError(f"'{path}' cannot be read as text; it must {what}.", "missing-list") from error
    lines = (line.strip() for line in text.splitlines())
    return [line for line in lines if line and not line.startswith("#")]


def read_list(path: Path, split: str) -> tuple[list[str], list[Finding]]:
    """The names in a list, in order and once each, and what is wrong with it.

    A second column, as the class lists of PASCAL VOC have it, is left out.
    """
    try:
        lines = read_lines(path, "name a picture a line")
    except FileNotFoundError:
        return [], [_missing_list(path, split)]
    except DataSetError as error:
        return [], [Finding(error.kind, str(error), str(path))]
    names: dict[str, None] = {}
    findings: list[Finding] = []
    for line in lines:
        name = key(line.split("\t")[0].strip().replace("\\", "/"))
        if name in names:
            problem = f"The list '{path}' names '{name}' twice; remove one line."
            findings.append(Finding("duplicate-entry", problem, str(path), name))
        elif not is_safe(name) or len(name) > _LONGEST:
            why = "is too long for a file" if is_safe(name) else "leads outside the dataset's folder"
            problem = f"The list '{path}' names '{name[:80]}', which {why}; fix the line."
            findings.append(Finding("wrong-name", problem, str(path), name[:80]))
        else:
            names[name] = None
    if not names and not findings:
        problem = f"The list '{path}' is empty; it must name one picture per line, without its extension."
        findings.append(Finding("empty-list", problem, str(path)))
    return list(names), findings


def listed_as(name: str, known: Container[str]) -> str:
    """The name among ``known`` that a list means, which may write it with its ending and folders."""
    last = name.rpartition("/")[2]
    return next((one for one in (name, name.rpartition(".")[0], last, last.rpartition(".")[0]) if one in known), name)


def _missing_list(path: Path, split: str) -> Finding:
    there = [name for name in entries(path.parent) if name.endswith(".txt")]
    hint = f"there are {', '.join(there[:6])}" if there else "the folder holds no list at all"
    return Finding("missing-list", f"The list '{path}' of the split '{split}' does not exist; {hint}.", str(path))


def is_safe(name: str) -> bool:
    """Whether a name from a list or an archive stays inside the folder it is read from."""
    path = PurePosixPath(name)
    return not (path.is_absolute() or ".." in path.parts or "\x00" in name or "\\" in name)


def with_unseen(vocabulary: Vocabulary, root: Path, unseen: str | None, source: str) -> Vocabulary:
    """The classes with the flags that unseen.txt gives them, beside those the class file flags itself as unseen.

    ``root``: the folder that may hold unseen.txt, with the name of one unseen class per line. ``unseen``: "none" leaves
    the file aside, and there is no other list. ``source``: where the classes come from, for the sentence. Where any
    class is unseen, those that nobody flags are seen. Raises LexisegError if ``unseen`` is another list; the file
    cannot be read; or it names a class that there is not, that the class file flags as seen, or every one there is.
    """
    path = next(iter(files_in(root, ("unseen.txt",))), root / "unseen.txt")
    if unseen not in (None, "none"):
        raise LexisegError(f"There is no list '{shorten(unseen)}' of unseen classes but '{path}'; leave 'unseen' out.")
    there = unseen != "none" and path.is_file()
    lines = read_lines(path, "name the unseen classes, one per line") if there else []
    hidden = {word_key(line): line for line in lines}
    flags = {word_key(entry.name): entry.seen for entry in vocabulary.classes}
    for key, name in hidden.items():
        if key not in flags:
            raise LexisegError(f"'{path}' names '{shorten(name)}', which {source} does not; fix one of them.")
        if flags[key]:
            raise LexisegError(f"'{path}' names '{shorten(name)}', which {source} flags as seen; fix one of them.")
    if len(hidden) == len(flags):
        raise LexisegError(f"'{path}' names every class, which leaves none to train on; name only the unseen ones.")
    unseen_keys = hidden.keys() | {key for key, seen in flags.items() if seen is False}
    if not unseen_keys:
        return vocabulary
    return vocabulary.with_seen(name for name in vocabulary.names if word_key(name) not in unseen_keys)


@dataclass(frozen=True)
class LabelFolder:
    """Label files of one kind, by the name of their sample."""

    files: Mapping[str, Place]
    folder: Path
    kind: LabelKind
    table: ValueTable
    ending: str = ".png"


def table_of(info: DataSetInfo) -> ValueTable:
    """What the values of the distribution's label files stand for."""
    return ValueTable(info.id_map, info.void, info.ignore)


def plain_table(num_classes: int) -> ValueTable:
    """For labels that hold class ids as they are, and the ignored value."""
    ignore = ignore_index(num_classes)
    return ValueTable({index: index for index in range(num_classes)}, (ignore,), ignore)


def pair(
    names: Iterable[str], split: str, images: Mapping[str, Place], image_folder: Path, labels: Sequence[LabelFolder]
) -> tuple[list[Item], list[Finding]]:
    """The items of ``names``, and a finding for each that lacks its picture or its label.

    The first of ``labels`` that has a name gives its label.
    """
    items: list[Item] = []
    findings: list[Finding] = []
    others: dict[str, str] | None = None
    taken: set[str] = set()
    for listed in names:
        name = listed_as(listed, images)
        if name in taken:
            problem = f"The split '{split}' names '{name}' twice; remove one line of its list."
            findings.append(Finding("duplicate-entry", problem, str(image_folder), name))
            continue
        taken.add(name)
        image = images.get(name)
        source = next((source for source in labels if name in source.files), None)
        if image is None:
            problem = f"The picture '{image_folder / name}.jpg' (or .png) of the split '{split}' is missing."
            findings.append(Finding("missing-picture", problem, str(image_folder), name))
        if source is None:
            # The full ADE20K keeps a label beside its picture, in a folder of the scene.
            ade = image is not None and labels[0].kind is LabelKind.ade_full
            folder = image.parent if image is not None and ade else labels[0].folder
            problem = f"The label '{folder / name}{labels[0].ending}' of the split '{split}' is missing"
            others = _unread(labels[0].folder) if others is None else others
            problem += f"; {others[name]}." if name in others else "."
            findings.append(Finding("missing-label", problem, str(labels[0].folder), name))
        if image is not None and source is not None:
            items.append(Item(name, image, source.files[name], source.kind, source.table))
    return items, findings


def _unread(folder: Path) -> dict[str, str]:
    """What to say of the files of a folder of labels whose ending no reader takes, by the name of their sample."""
    said = {}
    for file in entries(folder) if folder.is_dir() else ():
        stem, _, ending = file.rpartition(".")
        if stem and ending.lower() in ("jpg", "jpeg"):
            said[stem] = f"'{file}' is there, but JPEG changes the numbers of a label; save it again as PNG"
        elif stem and ending.lower() in ("npy", "npz", "webp"):
            said[stem] = f"'{file}' is there, but labels of this kind are not read; save it as PNG"
    return said


def orphans(labels: Sequence[LabelFolder], images: Mapping[str, Place]) -> list[Finding]:
    """A warning for each label without a picture, in datasets that have no lists."""
    return [
        Finding(
            "label-without-picture",
            f"The label '{path}' has no picture, so it is never used; add the picture or remove the label.",
            str(path),
            name,
            severity="warning",
        )
        for source in labels
        for name, path in source.files.items()
        if name not in images
    ]


def label_folder(
    folder: Path, suffixes: Sequence[str], kind: LabelKind, table: ValueTable, without: str | tuple[str, ...] = ()
) -> LabelFolder:
    """The label files of a folder that end in one of ``suffixes``, but for names that end in ``without``."""
    files = by_stem(folder, suffixes)
    if without:
        files = {name: path for name, path in files.items() if not name.endswith(without)}
    return LabelFolder(files, folder, kind, table, suffixes[0])


def zipped_labels(archives: Sequence[Path], inner: str, table: ValueTable) -> LabelFolder:
    """The PNGs in the folder ``inner`` of a zip archive, which may be at any of ``archives``."""
    return LabelFolder(zipped(archives, inner, (".png",)), archives[0] / inner, LabelKind.index, table)


def by_folder(
    info: DataSetInfo, split: str, images: Mapping[str, Place], image_folder: Path, labels: Sequence[LabelFolder]
) -> SplitFiles:
    """A split that is every picture of a folder."""
    if images:
        items, findings = pair(images, split, images, image_folder, labels)
        findings += orphans(labels, images)
    else:
        problem = (
            f"The folder '{image_folder}' of the split '{split}' is missing or holds no pictures; unpack them there."
        )
        items, findings = [], [Finding("missing-folder", problem, str(image_folder))]
    return SplitFiles(split, tuple(items), info.vocabulary(), tuple(findings))
