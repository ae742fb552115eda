"""Recipes made of others: ``base`` takes a flat recipe's keys over, ``variants`` puts several recipes into one file.

An ablation then says what it changes and nothing else, and a table of a paper is one file. Merging is all there is: the
result is checked like any recipe, so a misspelt key is an error wherever it stands.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from lexiseg.errors import LexisegError

Content = dict[str, Any]
Reader = Callable[[str, str], tuple[Content, str]]
"""From a recipe's name and the recipe that names it to its own keys, unmerged, and what to call it in messages."""

_CHOICES = ("kind", "source")


def merge(base: Mapping[str, Any], changes: Mapping[str, Any]) -> Content:
    """``base`` with ``changes``: mappings are merged key by key, everything else takes the base's place.

    ``null`` takes a key of the base away, so that its default holds. A mapping that names another ``kind`` or
    ``source`` than the base's is another thing with other keys, such as SAM instead of a trained generator: it takes
    the base's place as a whole.
    """
    merged = dict(base)
    for key, value in changes.items():
        if value is None and key in merged:
            del merged[key]
            continue
        before = merged.get(key)
        if not isinstance(value, dict) or not isinstance(before, dict):
            merged[key] = value
            continue
        same = all(value[choice] == before.get(choice) for choice in _CHOICES if choice in value)
        merged[key] = merge(before, value) if same else value
    return merged


def variants_of(content: Content, where: str) -> dict[str, Content]:
    """The variants of a file, by name; none where it is a recipe itself.

    Raises:
        LexisegError: ``variants`` holds something else.
    """
    variants = content.get("variants")
    if variants is None:
        return {}
    if not isinstance(variants, dict) or not variants:
        raise LexisegError(f"'variants' of the recipe '{where}' must be names with the keys that each one changes.")
    for name, changes in variants.items():
        if not isinstance(name, str) or not isinstance(changes, dict):
            raise LexisegError(
                f"The variant '{name}' of the recipe '{where}' must be a name with the keys that it changes."
            )
    return dict(variants)


def choose_variant(content: Content, variant: str | None, where: str) -> Content:
    """The keys of one variant, merged with those that all variants of the file share.

    Raises:
        LexisegError: there is no such variant, or none is asked for and the file consists of them.
    """
    variants = variants_of(content, where)
    shared = {key: value for key, value in content.items() if key != "variants"}
    if variant is None and not variants:
        return shared
    if variant is None or variant not in variants:
        names = ", ".join(variants) or "none"
        what = "consists of variants; name one" if variant is None else f"has no variant '{variant}'; choose one"
        raise LexisegError(f"The recipe '{where}' {what} behind a colon: {names}.")
    return merge(shared, variants[variant])


def with_base(content: Content, where: str, read: Reader) -> Content:
    """Merge a recipe with its base, which is flat: it has no base itself, so that two files say everything.

    Args:
        content: the recipe's own keys.
        where: what to call it in messages.
        read: finds a base.

    Raises:
        LexisegError: the base cannot be read, is of another kind, or has a base itself.
    """
    own = {key: value for key, value in content.items() if key != "base"}
    if "base" not in content:
        return own
    if not isinstance(content["base"], str):
        raise LexisegError(f"'base' of the recipe '{where}' must be the name of a recipe.")
    base, name = read(content["base"], where)
    if "base" in base:
        raise LexisegError(
            f"The base '{name}' of the recipe '{where}' has a base itself, '{base['base']}'; write '{name}' out in "
            "full, or take its base and the keys it changes over."
        )
    if own.get("kind", base.get("kind")) != base.get("kind"):
        raise LexisegError(f"The recipe '{where}' is of the kind '{own['kind']}' and its base '{base.get('kind')}'.")
    base.pop("description", None)  # what a recipe is in one line, nobody inherits
    return merge(base, own)
