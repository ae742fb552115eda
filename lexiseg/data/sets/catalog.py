"""What is known of each dataset before a file of it is opened: classes, splits into seen and unseen, label values.

The lists are YAML files beside this module, each with its source. Where a list cannot be known for certain
(PASCAL Context 459, ADE20K 847) it is read from the distribution's own file; see
:func:`lexiseg.class_list.read_class_list`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from importlib import resources
from typing import Any

import yaml

from lexiseg.errors import LexisegError
from lexiseg.label_ids import IGNORE_INDEX, ignore_index
from lexiseg.vocabulary import Vocabulary, VocabularyClass
from lexiseg.words import near_names, word_key

NAMES = (
    *("voc2012", "coco-stuff-164k", "coco-object", "pascal-context-59", "pascal-context-459"),
    *("ade20k-150", "ade20k-847", "cityscapes"),
)
"""The datasets there are."""


@dataclass(frozen=True)
class DataSetInfo:
    """One dataset."""

    name: str  # as a user writes it, such as "voc2012"
    title: str  # as a report writes it
    source: str  # where the lists come from
    num_classes: int  # their number, known even where the names are not
    # the names in the papers' order, which is the order of the class ids. Empty where the distribution carries the
    # list, until :meth:`with_classes` puts it in.
    classes: tuple[str, ...] = ()
    # by name, the classes that have no masks in zero-shot training. The first is the default.
    unseen_lists: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    # by class, further words that the distribution gives
    synonyms: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    # by paper, the classes which that paper's text embeddings name otherwise
    renamed: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    # a colour for each class, or None where the distribution has none
    palette: tuple[tuple[int, int, int], ...] | None = None
    ignore: int = IGNORE_INDEX  # label of pixels without a class: 255, or 65535 where there are more than 255 classes
    # the values of the distribution's label files and the class id each stands for
    id_map: Mapping[int, int] = field(default_factory=dict)
    # the values of the label files that stand for no class; they become ``ignore``. Any value that is in neither is a
    # fault of the file.
    void: tuple[int, ...] = (IGNORE_INDEX,)
    splits: tuple[str, ...] = ("train", "val")  # the splits there are
    unseen: str | None = None  # which of the lists of unseen classes is meant; None is the default, "none" none

    @property
    def train_split(self) -> str:
        """The split the papers train on."""
        return "trainaug" if "trainaug" in self.splits else "train"

    def unseen_names(self, which: str | None = None) -> tuple[str, ...]:
        """The list of unseen classes called ``which``; None takes the default, empty where the papers have none.

        Raises LexisegError if there is no such list.
        """
        if which is None:
            return next(iter(self.unseen_lists.values()), ())
        if which not in self.unseen_lists:
            known = ", ".join(self.unseen_lists) or "none"
            raise LexisegError(f"{self.name} has no list of unseen classes called '{which}'; there are: {known}.")
        return self.unseen_lists[which]

    def with_classes(self, classes: tuple[str, ...]) -> DataSetInfo:
        """The same dataset with the list of classes that its distribution carries.

        Raises LexisegError if the list has another length than the dataset has classes.
        """
        if len(classes) != self.num_classes:
            raise LexisegError(
                f"{self.name} has {self.num_classes} classes, but the list holds {len(classes)}; name another list."
            )
        return replace(self, classes=classes)

    def vocabulary(self, *, unseen: str | None = None, names_of: str | None = None) -> Vocabulary:
        """The classes with their seen and unseen flags, without synonyms.

        ``unseen``: which list of unseen classes; None takes :attr:`unseen`, "none" flags no class at all. ``names_of``:
        a paper in :attr:`renamed`, whose names to use. Raises LexisegError if the names are not known without the
        distribution's list, or there is no such unseen list or paper.
        """
        if not self.classes:
            raise LexisegError(
                f"The class names of {self.name} come from a file beside its pictures; open the dataset to read them."
            )
        if names_of is not None and names_of not in self.renamed:
            known = ", ".join(self.renamed) or "none"
            raise LexisegError(f"{self.name} has no names of '{names_of}'; there are: {known}.")
        renamed = self.renamed[names_of] if names_of else {}
        which = unseen or self.unseen
        hidden = () if which == "none" else self.unseen_names(which)
        return Vocabulary(
            tuple(
                VocabularyClass(
                    renamed.get(name, name),
                    seen=name not in hidden if hidden else None,
                    color=self.palette[index] if self.palette else None,
                )
                for index, name in enumerate(self.classes)
            )
        )

    def further_words(self, names: Sequence[str]) -> dict[str, tuple[str, ...]]:
        """The distribution's synonyms of each class, each word once, without those that two classes have.

        A class that is called by all its words ("building, edifice") has these as synonyms: its name stays whole,
        because many classes share their first word. ``names``: of the classes, where :attr:`classes` has none.
        """
        names = self.classes or names
        words = {name: self.synonyms.get(name) or (name.split(", ") if ", " in name else ()) for name in names}
        count = Counter(key for name, further in words.items() for key in {word_key(word) for word in (name, *further)})
        found = {}
        for name, further in words.items():
            once = {word_key(word): word for word in reversed(further) if count[word_key(word)] == 1}
            once.pop(word_key(name), None)
            found[name] = tuple(reversed(once.values()))
        return found


@cache
def data_set(name: str) -> DataSetInfo:
    """What is known of the dataset called ``name``. Raises LexisegError if there is none of that name."""
    if name not in NAMES:
        raise LexisegError(f"There is no dataset '{name}'; {near_names(name, NAMES)}")
    text = (resources.files("lexiseg") / "data" / "sets" / f"{name}.yaml").read_text(encoding="utf-8")
    return _read(name, yaml.safe_load(text))


def _read(name: str, said: Mapping[str, Any]) -> DataSetInfo:
    # "floor, flooring" is a name and its synonyms, as in the distributions' own lists.
    words = [tuple(part.strip() for part in entry.split(",")) for entry in said.get("classes", ())]
    classes = tuple(entry[0] for entry in words)
    num_classes = len(classes) or int(said["num_classes"])
    ignore = ignore_index(num_classes)
    if said.get("reduce_zero"):
        id_map = {index + 1: index for index in range(num_classes)}
        void: tuple[int, ...] = (0, ignore)
    else:
        missing = set(said.get("missing_ids", ()))
        values = said.get("ids") or [value for value in range(num_classes + len(missing)) if value not in missing]
        id_map = {value: index for index, value in enumerate(values)}
        void = (*said.get("void", ()), ignore)
    return DataSetInfo(
        name=name,
        title=said["title"],
        source=said["source"],
        num_classes=num_classes,
        classes=classes,
        unseen_lists={key: tuple(names) for key, names in said.get("unseen", {}).items()},
        synonyms={entry[0]: entry[1:] for entry in words if len(entry) > 1},
        renamed=said.get("renamed", {}),
        palette=_palette(said.get("palette"), num_classes),
        ignore=ignore,
        id_map=id_map,
        void=void,
        splits=tuple(said.get("splits", ("train", "val"))),
    )


def _palette(said: Any, num_classes: int) -> tuple[tuple[int, int, int], ...] | None:
    if said == "voc":
        return tuple(voc_color(index + 1) for index in range(num_classes))
    return None if said is None else tuple((red, green, blue) for red, green, blue in said)


def voc_color(value: int) -> tuple[int, int, int]:
    """Red, green, blue that PASCAL VOC's palette gives the label ``value``, 0..255; 0 is black, 255 nearly white.

    Source: the colour map of the VOC development kit: the bits of the value go round the three channels, each time one
    place lower, from the highest bit on.
    """
    red, green, blue = (
        sum((value >> (3 * place + channel) & 1) << (7 - place) for place in range(8)) for channel in range(3)
    )
    return red, green, blue
