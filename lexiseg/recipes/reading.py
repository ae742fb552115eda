"""From a recipe's name to its checked values: YAML, one base, variants, and values replaced by hand.

``base`` takes a flat recipe's keys over, ``variants`` puts several recipes into one file; merging is all there is. An
unknown key is an error that names the key, the file and the nearest key there is, because a misspelt option that is
silently ignored costs a night of training.
"""

import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeAlias

import yaml

from lexiseg.checking import check
from lexiseg.errors import LexisegError
from lexiseg.files import is_folder, local
from lexiseg.recipes.data import AUGMENTATION
from lexiseg.recipes.schema import KINDS, Recipe
from lexiseg.renames import renamed_key, renamed_options
from lexiseg.words import is_deep, near_names, shorten

Content: TypeAlias = dict[str, Any]

_FOLDER = Path(__file__).resolve().parent
_CHOICES = ("kind", "source")


class _Loader(yaml.SafeLoader):
    """Safe YAML in which a key given twice is an error, not a silent overwrite."""


def _mapping(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    keys: set[Any] = set()
    for key_node, _ in node.value:
        if key_node.tag == "tag:yaml.org,2002:merge":  # "<<": what comes from elsewhere may be replaced
            continue
        key = loader.construct_object(key_node, deep=True)
        if not isinstance(key, str | int | float | bool | None):
            raise yaml.constructor.ConstructorError(None, None, "a key must be a word", key_node.start_mark)
        if key in keys:
            raise yaml.constructor.ConstructorError(None, None, f"the key '{key}' is given twice", key_node.start_mark)
        keys.add(key)
    return loader.construct_mapping(node, deep=True)


_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)
# 1e3 is a number to everyone but YAML 1.1, which wants 1.0e+3.
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("+-0123456789")
)


@lru_cache(maxsize=1)
def _files() -> dict[str, Path]:
    """The files of the recipes in the package by name, which says nothing of the folder they are in."""
    return {path.stem: path for path in sorted(_FOLDER.rglob("*.yaml"), key=lambda path: path.stem)}


@lru_cache(maxsize=1)
def describe_recipes() -> dict[str, str]:
    """What each recipe that comes with the package is, in one line."""
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # that in Python takes seconds for all of them
    found: dict[str, str] = {}
    for stem, path in _files().items():
        content = yaml.load(path.read_text(encoding="utf-8"), loader)
        for variant, said in content.get("variants", {"": content}).items():
            found[f"{stem}:{variant}" if variant else stem] = said.get("description", "")
    return found


def list_recipes() -> list[str]:
    """Names of the recipes that come with the package."""
    return list(describe_recipes())


def is_recipe(name: str | None) -> bool:
    """Whether ``name`` is a recipe of the package or a YAML file, whatever variant it names; None is neither."""
    try:
        path = _find(name or "")[0]
        return path.suffix in (".yaml", ".yml") and path.is_file()
    except (OSError, ValueError):  # no usable file name
        return False


def load_recipe(
    name: str | Path,
    overrides: Sequence[str] | Mapping[str, Any] = (),
    *,
    seed: int | None = None,
    data: str | Path | None = None,
) -> Recipe:
    """Read and check a recipe.

    ``name``: of a recipe in the package, or the path of a YAML file; after a colon a variant in it. ``overrides``:
    values by keys such as "train.steps", or texts ``KEY=VALUE`` whose values are YAML, or plain text where they are
    none. An ``initial`` given so takes the place of ``proposals_from``. ``seed``: in the place of the recipe's.
    ``data``: a folder of one's own that replaces the recipe's data; crop and augmentation stay the recipe's. Raises
    LexisegError if the recipe does not exist, is not YAML, or has an unknown, missing or wrong key, which it names.
    """
    own, where, folder = _content(str(name))
    content = _with_base(own, where, folder)
    if data is not None:
        content["data"] = _own_data(str(name), content.get("data"), Path(data))
    given = overrides.items() if isinstance(overrides, Mapping) else [_read_override(text) for text in overrides]
    for key, value in given:
        _replace(content, renamed_key(key), value, where, as_text=not isinstance(overrides, Mapping))
    where = f"{where} with --set" if overrides else where
    return _checked(_named(content, where), where, seed)  # a whole section may have been set, under old names


def parse_recipe(text: str, where: str, *, seed: int | None = None) -> Recipe:
    """Check a recipe's text; ``where`` is what to call it in messages. See `load_recipe`."""
    own = _choose_variant(_read(text, where), None, where)
    return _checked(_with_base(own, where, Path(where).parent), where, seed)


def as_yaml(recipe: Recipe) -> str:
    """The recipe with every default written out, as YAML that `load_recipe` reads."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


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


def _find(name: str) -> tuple[Path, str, str | None]:
    """The file of a recipe, what to call it in messages, and which variant in it is meant."""
    files = _files()
    if name in files:
        return files[name], files[name].name, None
    stem, _, variant = name.rpartition(":")
    if stem and local(name) is None:  # a path may hold colons itself
        if stem in files:
            return files[stem], files[stem].name, variant
        if (file := local(stem)) is not None and file.is_file():
            return file, stem, variant
    return Path(name), name, None


def _text(path: Path, name: str) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        hint = near_names(str(name), list_recipes(), "`lexiseg train --list` shows those there are.")
        raise LexisegError(f"There is no recipe or file '{name}'; {hint}") from error
    except (OSError, UnicodeDecodeError, ValueError) as error:
        raise LexisegError(f"The recipe '{name}' cannot be read as text; give a YAML file.") from error


def _read(text: str, where: str) -> Content:
    if is_deep(text):
        raise LexisegError(f"The recipe '{where}' has too many nested lists; write 'key: value' lines.")
    try:
        content = yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f" in line {mark.line + 1}" if mark is not None else ""
        problem = getattr(error, "problem", None) or "it cannot be parsed"
        raise LexisegError(f"The recipe '{where}' is not valid YAML{line}: {problem}.") from error
    except (ValueError, RecursionError) as error:
        raise LexisegError(f"The recipe '{where}' is not valid YAML: a value cannot be read.") from error
    if not isinstance(content, dict):
        raise LexisegError(f"The recipe '{where}' must be a list of 'key: value' lines.")
    return content


def _content(name: str) -> tuple[Content, str, Path]:
    """A recipe's own keys, without those of its base, what to call it in messages, and the folder it is in."""
    path, where, variant = _find(name)
    content = _choose_variant(_read(_text(path, name), where), variant, where)
    return content, where if variant is None else f"{where}:{variant}", path.parent


def _named(content: Content, where: str) -> Content:
    return renamed_options("recipe", content, f"The recipe '{where}'", "rename them")


def _choose_variant(content: Content, variant: str | None, where: str) -> Content:
    """The keys of one variant, merged with those that all variants of the file share."""
    shared = _named({key: value for key, value in content.items() if key != "variants"}, where)
    variants = content.get("variants")
    if variants is None and variant is None:
        return shared
    if variants is not None and (not isinstance(variants, dict) or not variants):
        raise LexisegError(f"'variants' of the recipe '{where}' must be names with the keys that each one changes.")
    if variants is None or variant is None or variant not in variants:
        what = "consists of variants; name one" if variant is None else f"has no variant '{variant}'; choose one"
        raise LexisegError(
            f"The recipe '{where}' {what} after a colon: {', '.join(map(str, variants or ())) or 'none'}."
        )
    if not isinstance(variants[variant], dict):
        raise LexisegError(
            f"The variant '{variant}' of the recipe '{where}' must be keys and the values they change to."
        )
    return merge(shared, _named(variants[variant], where))


def _with_base(content: Content, where: str, folder: Path) -> Content:
    """Merge a recipe in a folder with its base, which has no base itself, so that two files say everything."""
    own = {key: value for key, value in content.items() if key != "base"}
    if "base" not in content:
        return own
    if not isinstance(content["base"], str):
        raise LexisegError(f"'base' of the recipe '{where}' must be the name of a recipe.")
    # In the package, else a file beside the recipe's own.
    packaged = content["base"].partition(":")[0] in _files()
    base, name, _ = _content(content["base"] if packaged else str(folder / content["base"]))
    if "base" in base:
        raise LexisegError(
            f"The base '{name}' of the recipe '{where}' has a base of its own, '{base['base']}'; write '{name}' out in "
            "full, or take its base and the keys it changes over."
        )
    if own.get("kind", base.get("kind")) != base.get("kind"):
        raise LexisegError(f"The recipe '{where}' is of the kind '{own['kind']}' and its base '{base.get('kind')}'.")
    base.pop("description", None)  # what a recipe is in one line, nobody inherits
    return merge(base, own)


def _checked(content: Content, where: str, seed: int | None) -> Recipe:
    kind = content.get("kind")
    if not isinstance(kind, str) or kind not in KINDS:
        raise LexisegError(f"The recipe '{where}' needs 'kind', one of {', '.join(sorted(KINDS))}.")
    if isinstance(content.get("data"), dict):  # null takes a key away, so that its default counts
        content = {**content, "data": {key: value for key, value in content["data"].items() if value is not None}}
    if seed is not None and isinstance(content.get("train"), dict):
        content = {**content, "train": {**content["train"], "seed": seed}}
    return check(KINDS[kind], content, f"The recipe '{where}'")


def _read_override(text: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise LexisegError(f"--set takes KEY=VALUE, such as train.steps=100, not '{shorten(text)}'.")
    return key.strip(), value


def _replace(content: Content, key: str, value: Any, where: str, *, as_text: bool) -> None:
    *parents, last = key.split(".")
    place = content
    for parent in parents:
        inner = place.get(parent)
        if inner is not None and not isinstance(inner, dict):
            raise LexisegError(
                f"--set cannot reach '{key}' in '{where}': '{parent}' holds a value, not keys; set that one."
            )
        place[parent] = dict(inner or {})  # a copy: the base's content may be shared
        place = place[parent]
    place[last] = _value(value, parents, last, content) if as_text else value
    if key == "initial" and place[last] is not None:
        content.pop("proposals_from", None)  # the initial model brings its own


def _value(text: str, parents: Sequence[str], key: str, recipe: Content) -> Any:
    """What a value given as text says: YAML, or else the text itself.

    The shell has taken the quotes that YAML needs around such values as ``{6-8},{12}``; ``{12}`` is a mapping to it.
    """
    try:
        value = yaml.load(text, _Loader)
    except (yaml.YAMLError, ValueError, RecursionError):
        return text
    if list(parents) == ["model", "options"] and isinstance(value, dict | int | float):
        from lexiseg.models import SYSTEMS

        system = SYSTEMS.get(str(recipe["model"].get("system")))
        option = None if system is None else system.options_class.model_fields.get(key)
        if option is not None and option.annotation is str:
            return text
    return value


def _own_data(name: str, said: Any, folder: Path) -> Content:
    """The recipe's data replaced by a folder: how pictures are cropped and augmented stays."""
    if not isinstance(said, dict):
        raise LexisegError(f"The recipe '{name}' trains a CLIP on captions, not on masks; leave out --data.")
    if not is_folder(folder):
        raise LexisegError(f"The data folder '{folder}' does not exist; check the path.")
    own: Content = {"source": "own", "root": str(folder)}
    if str(said.get("source")).startswith(("picture-world", "shapes")):  # drawn at the size that is trained on
        own |= {"augment": "light", "crop": said.get("crop") or said.get("size", 256)}
    kept = (*AUGMENTATION, "unseen_pictures")
    return {key: said[key] for key in kept if said.get(key) is not None} | own
