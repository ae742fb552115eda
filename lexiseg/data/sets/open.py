"""From a dataset's name and folder to its samples."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from lexiseg.data.sets.catalog import NAMES, data_set
from lexiseg.data.sets.dataset import FileDataset, SplitFiles
from lexiseg.data.sets.labels import LabelKind
from lexiseg.data.sets.layouts import SPLITS, own_list, own_splits
from lexiseg.data.sets.listing import listed_as, read_list, unreadable
from lexiseg.data.sets.own import list_own
from lexiseg.data.sets.papers import LAYOUTS
from lexiseg.errors import LexisegError, warn
from lexiseg.vocabulary import Vocabulary, VocabularyClass
from lexiseg.words import counted, near_names

OWN = "own"
"""Name of a folder of one's own among the datasets."""

_TAKES_CLASSES = ("pascal-context-459", "ade20k-847", OWN)


def open_data_set(
    name: str,
    root: str | Path,
    split: str,
    *,
    unseen: str | None = None,
    classes: str | Path | None = None,
    names_of: str | None = None,
    synonyms: bool | None = None,
) -> FileDataset:
    """Open a split of a dataset.

    Args:
        name: one of :data:`lexiseg.data.sets.catalog.NAMES`, or "own" for a folder of one's own; see
            :mod:`lexiseg.data.sets.own`.
        root: the folder it was unpacked in; a relative path starts at the working directory.
        split: "train" or "val"; of VOC also "aug", "trainaug" and "trainval".
        unseen: which list of unseen classes; None takes the dataset's first, "none" none.
        classes: the class list, where the distribution does not carry one.
        names_of: the paper whose names to use for the classes it calls otherwise; see
            :attr:`lexiseg.data.sets.catalog.DataSetInfo.renamed`.
        synonyms: whether a class has the further words of the dataset's list beside its name; see
            :func:`synonyms_of`.

    Raises LexisegError if there is no such dataset, split, list or paper, synonyms are asked for where there are none,
    or files are missing; the sentence names the first.
    """
    files = list_split(name, root, split, unseen=unseen, classes=classes)
    notes = [one.problem for one in files.findings if one.kind == "class-list"]
    for text in (*notes, *(_overlap(Path(root), files) if name == OWN else ())):
        warn(text)
    if names_of is not None:
        files = replace(files, vocabulary=data_set(name).vocabulary(unseen=unseen, names_of=names_of))
    return FileDataset(replace(files, vocabulary=synonyms_of(name, files.vocabulary, synonyms)))


def _overlap(root: Path, files: SplitFiles) -> list[str]:
    """What there is to say of pictures that the lists of both splits name."""
    lists = [path for split in SPLITS if (path := own_list(root, split)) is not None]
    names = {item.name for item in files.items}
    shared = names.intersection(*([listed_as(one, names) for one in read_list(path, "")[0]] for path in lists))
    if len(lists) < 2 or not shared:
        return []
    return [
        f"'{lists[0]}' and '{lists[1].name}' share {counted(len(shared), 'picture')}, such as '{min(shared)}', so "
        "models are evaluated on pictures they were trained on; remove them from one list."
    ]


def with_background(data: FileDataset, words: Sequence[str] = ()) -> FileDataset:
    """The same pictures with one more class, "background", as the last: what VOC and PASCAL Context label 0.

    Of PASCAL Context's .mat files it is the other 400 classes, too. The border of VOC's objects (255) stays ignored.

    ``data``: a split of VOC 2012 or PASCAL Context 59.
    """
    last = len(data.vocabulary)
    classes = (*data.vocabulary.classes, VocabularyClass("background", tuple(words)))
    items = []
    for item in data.items:
        # In .mat files 255 is one of the other 400 classes.
        kept = () if item.kind is LabelKind.context_mat else (item.table.ignore,)
        items.append(replace(item, table=item.table.with_rest(last, kept)))
    vocabulary = replace(data.vocabulary, classes=classes)
    return FileDataset(SplitFiles(data.split, tuple(items), vocabulary))


def synonyms_of(name: str, vocabulary: Vocabulary, wanted: bool | None) -> Vocabulary:
    """The vocabulary with, or without, the further words of the dataset's list.

    A word that belongs to two classes is left out, because it could not say which of them it means.

    ``wanted``: None leaves the vocabulary as it is: of the papers' datasets the names alone, of one's own data all
    words of its list. Raises LexisegError if synonyms are asked for and the dataset gives none.
    """
    if wanted is None:
        return vocabulary
    if not wanted:
        return replace(vocabulary, classes=tuple(replace(entry, synonyms=()) for entry in vocabulary.classes))
    if name in NAMES:
        words = data_set(name).further_words(vocabulary.names)
        classes = (replace(one, synonyms=one.synonyms or words.get(one.name, ())) for one in vocabulary.classes)
        vocabulary = replace(vocabulary, classes=tuple(classes))
    if not any(entry.synonyms for entry in vocabulary.classes):
        raise LexisegError(f"{name} gives its classes no synonyms, so there are none to use; leave synonyms out.")
    return vocabulary


def list_split(
    name: str, root: str | Path, split: str, *, unseen: str | None = None, classes: str | Path | None = None
) -> SplitFiles:
    """Find the files of a split without opening a picture; the arguments are those of :func:`open_data_set`.

    Raises LexisegError if the folder is not there or may not be read, the classes cannot be known, or there is no such
    list of unseen classes. Files that are missing are findings.
    """
    if name not in (*NAMES, OWN):
        raise LexisegError(f"There is no dataset '{name}'; {near_names(name, (*NAMES, OWN))}")
    if classes is not None and name not in _TAKES_CLASSES:
        raise LexisegError(f"The classes of {name} are known, so a list of them cannot be given; leave it out.")
    if name in NAMES and split not in data_set(name).splits:
        raise LexisegError(f"{name} has no split '{split}'; there are {', '.join(data_set(name).splits)}.")
    try:
        listed = None if classes is None else Path(classes)
        if name == OWN:
            return list_own(Path(root), split, unseen, listed)
        info = replace(data_set(name), unseen=unseen)
        return LAYOUTS[name](info, Path(root), split, *([listed] if name in _TAKES_CLASSES else []))
    except OSError as error:  # any look at a folder may fail: no permission, a name too long, a disk that is gone
        raise unreadable(Path(root), error) from error


def train_split(name: str) -> str:
    """The split that is trained on: that of the papers ("trainaug" of VOC), of one's own data "train"."""
    return "train" if name == OWN else data_set(name).train_split


def splits_of(name: str, root: str | Path) -> tuple[str, ...]:
    """The splits for training and evaluation: the papers' training split and "val".

    Raises LexisegError if there is no such dataset, or a folder of one's own may not be read.
    """
    try:
        return own_splits(Path(root)) if name == OWN else (train_split(name), "val")
    except OSError as error:
        raise unreadable(Path(root), error) from error
