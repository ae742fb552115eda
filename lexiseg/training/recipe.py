"""Recipes: a training run as a YAML file, checked before anything is loaded.

A recipe names what is trained, on what, and with which numbers; :mod:`lexiseg.training.recipe_schema` has the keys. An
unknown key is an error that names the key, the file and the nearest key there is, because a misspelt option that is
silently ignored costs a night of training. A recipe may build on another one; see :mod:`lexiseg.training.inherit`.
"""

from __future__ import annotations

import difflib
import types
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError

from lexiseg.errors import LexisegError
from lexiseg.training.inherit import Content, choose_variant, variants_of, with_base
from lexiseg.training.recipe_schema import (
    KINDS,
    CatalogData,
    ContrastiveRecipe,
    Data,
    EvaluationRecipe,
    FolderData,
    PictureWorldData,
    PromptRecipe,
    Recipe,
    SegmentationRecipe,
)

__all__ = [
    "CatalogData",
    "ContrastiveRecipe",
    "Data",
    "EvaluationRecipe",
    "FolderData",
    "PictureWorldData",
    "PromptRecipe",
    "Recipe",
    "SegmentationRecipe",
    "as_yaml",
    "find_recipe",
    "list_recipes",
    "load_recipe",
    "parse_recipe",
]

_FOLDER = Path(__file__).resolve().parent.parent / "recipes"


class _Loader(yaml.SafeLoader):
    """Safe YAML in which a key given twice is an error, not a silent overwrite."""


def _mapping(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    keys: set[Any] = set()
    for key_node, _ in node.value:
        key = loader.construct_object(key_node, deep=True)
        if not isinstance(key, str | int | float | bool | None):
            raise yaml.constructor.ConstructorError(None, None, "a key must be a word", key_node.start_mark)
        if key in keys:
            raise yaml.constructor.ConstructorError(None, None, f"the key '{key}' is given twice", key_node.start_mark)
        keys.add(key)
    return loader.construct_mapping(node, deep=True)


_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)


def _files() -> dict[str, Path]:
    """The files of the recipes in the package by name, which says nothing of the folder they are in."""
    return {path.stem: path for path in sorted(_FOLDER.rglob("*.yaml"), key=lambda path: path.stem)}


@lru_cache(maxsize=4)
def _packaged(files: tuple[Path, ...]) -> tuple[str, ...]:
    """Names of the recipes in these files, variants included."""
    names: list[str] = []
    for path in files:
        text = path.read_text(encoding="utf-8")
        # Only a file that has variants is parsed to list its recipes.
        variants = variants_of(_read(text, path.name), path.name) if "\nvariants:" in text else {}
        names += [f"{path.stem}:{variant}" for variant in variants] or [path.stem]
    return tuple(names)


def list_recipes() -> list[str]:
    """Names of the recipes that come with the package."""
    return list(_packaged(tuple(_files().values())))


def find_recipe(name: str | Path) -> tuple[str, str]:
    """The text of the file a recipe is in and what to call that in messages.

    Args:
        name: of a recipe in the package, or the path of a YAML file; behind a colon a variant in it.

    Raises:
        LexisegError: there is neither.
    """
    path, where, _ = _find(str(name))
    return _text(path, str(name)), where


def _find(name: str) -> tuple[Path, str, str | None]:
    """The file of a recipe, what to call it in messages, and which variant in it is meant."""
    files = _files()
    if name in files:
        return files[name], files[name].name, None
    stem, _, variant = name.rpartition(":")
    if stem and not Path(name).exists():  # a path may hold colons itself
        if stem in files:
            return files[stem], files[stem].name, variant
        if Path(stem).is_file():
            return Path(stem), stem, variant
    return Path(name), name, None


def _text(path: Path, name: str) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        near = difflib.get_close_matches(str(name), list_recipes(), n=3)
        hint = f"did you mean {' or '.join(near)}?" if near else "`lexiseg train --list` shows those there are."
        raise LexisegError(f"There is no recipe or file '{name}'; {hint}") from error
    except (OSError, UnicodeDecodeError, ValueError) as error:
        raise LexisegError(f"The recipe '{name}' cannot be read as text; give a YAML file.") from error


def load_recipe(name: str | Path, *, seed: int | None = None) -> Recipe:
    """Read and check a recipe.

    Args:
        name: of a recipe in the package, or the path of a YAML file; behind a colon a variant in it.
        seed: replaces the recipe's seed.

    Raises:
        LexisegError: it does not exist, is not YAML, or has an unknown, missing or wrong key; the sentence names the
            file and the key.
    """
    return _checked(*_content(str(name)), seed)


def parse_recipe(text: str, where: str, *, seed: int | None = None) -> Recipe:
    """Check a recipe's text; ``where`` is what to call it in messages. See :func:`load_recipe`."""
    return _checked(choose_variant(_read(text, where), None, where), where, seed)


def _content(name: str) -> tuple[Content, str]:
    """A recipe's own keys, without those of its base, and what to call it in messages."""
    path, where, variant = _find(name)
    content = choose_variant(_read(_text(path, name), where), variant, where)
    return content, where if variant is None else f"{where}:{variant}"


def _base(name: str, child: str) -> tuple[Content, str]:
    """`_content` of the base that ``child`` names: in the package, else a file beside the child's."""
    beside = Path(child.rpartition(":")[0] or child).parent / name
    return _content(name if name.partition(":")[0] in _files() else str(beside))


def _read(text: str, where: str) -> Content:
    """YAML as keys and values."""
    try:
        content = yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f" in line {mark.line + 1}" if mark is not None else ""
        problem = getattr(error, "problem", None) or "it cannot be parsed"
        raise LexisegError(f"The recipe '{where}' is not right YAML{line}: {problem}.") from error
    except (ValueError, RecursionError) as error:
        raise LexisegError(f"The recipe '{where}' is not right YAML: a value cannot be read.") from error
    if not isinstance(content, dict):
        raise LexisegError(f"The recipe '{where}' must be a list of 'key: value' lines.")
    return content


def _checked(content: Content, where: str, seed: int | None) -> Recipe:
    """A recipe of its own keys and its base's."""
    content = with_base(content, where, _base)
    kind = content.get("kind")
    if not isinstance(kind, str) or kind not in KINDS:
        raise LexisegError(f"The recipe '{where}' needs 'kind', one of {', '.join(sorted(KINDS))}.")
    if seed is not None and isinstance(content.get("train"), dict):
        content["train"]["seed"] = seed
    try:
        return KINDS[kind].model_validate(content)
    except ValidationError as error:
        raise LexisegError(_sentence(error, KINDS[kind], where)) from error


def _sentence(error: ValidationError, schema: type[BaseModel], where: str) -> str:
    # An unknown key first: a misspelt key is often also reported as a missing one.
    problems = error.errors(include_url=False)
    problem = next((entry for entry in problems if entry["type"] == "extra_forbidden"), problems[0])
    loc, _ = _walk(schema, problem["loc"])
    key = ".".join(str(part) for part in loc)
    if problem["type"] == "extra_forbidden":
        _, known = _walk(schema, problem["loc"][:-1])
        near = difflib.get_close_matches(str(loc[-1]), known, n=1)
        hint = f"did you mean '{near[0]}'?" if near else f"the keys there are {', '.join(known)}."
        return f"The recipe '{where}' has the unknown key '{key}'; {hint}"
    if problem["type"] == "missing":
        return f"The recipe '{where}' lacks the key '{key}'."
    message = problem["msg"].removeprefix("Value error, ").rstrip(".")
    if not key:  # a check of the whole, which its own sentence explains
        return f"The recipe '{where}' contradicts itself: {message}."
    return f"The recipe '{where}' has a wrong value for '{key}': {message[:1].lower()}{message[1:]}."


def _choices(annotation: Any) -> list[type[BaseModel]]:
    """The models an annotation may hold."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    if get_origin(annotation) is dict:
        return []
    parts: Sequence[Any] = get_args(annotation) if get_origin(annotation) in (Union, types.UnionType, Annotated) else ()
    return [model for part in parts for model in _choices(part)]


def _tags(model: type[BaseModel]) -> Sequence[Any]:
    source = model.model_fields.get("source")
    return get_args(source.annotation) if source is not None else ()


def _walk(schema: type[BaseModel], loc: Sequence[str | int]) -> tuple[list[str | int], list[str]]:
    """Follow a location of pydantic: the keys as written, without the tags of unions, and the keys there."""
    annotation: Any = schema
    written: list[str | int] = []
    for part in loc:
        models = _choices(annotation)
        tagged = [model for model in models if len(models) > 1 and part in _tags(model)]
        if tagged:
            annotation = tagged[0]
            continue
        if not models and get_origin(annotation) in (Union, types.UnionType):
            break
        written.append(part)
        if get_origin(annotation) is dict:
            annotation = get_args(annotation)[1]
        elif len(models) == 1 and part in models[0].model_fields:
            annotation = models[0].model_fields[str(part)].annotation
        else:
            annotation = None
    models = _choices(annotation)
    return written, list(models[0].model_fields) if len(models) == 1 else []


def as_yaml(recipe: Recipe) -> str:
    """The recipe with every default written out, as YAML that :func:`load_recipe` reads."""
    values: Mapping[str, Any] = recipe.model_dump(mode="json")
    return yaml.safe_dump(dict(values), sort_keys=False, allow_unicode=True)
