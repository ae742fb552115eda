"""What pydantic finds wrong with values that people wrote, as one sentence that names the key."""

from __future__ import annotations

import types
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError

from lexiseg.errors import LexisegError
from lexiseg.words import near_names, shorten

_Model = TypeVar("_Model", bound=BaseModel)
_UNKNOWN = ("extra_forbidden", "unexpected_keyword_argument")


def check(schema: type[_Model], values: Mapping[str, Any], what: str, *, noun: str = "key") -> _Model:
    """Check values against a schema.

    ``what``: begins the sentence, such as "The recipe 'mine.yaml'". Raises LexisegError if a key is unknown, missing or
    has a wrong value, or two do not go together.
    """
    try:
        return schema.model_validate(values)
    except ValidationError as error:
        raise LexisegError(f"{what} {_fault(error, schema, values, noun)}") from error
    except UnicodeEncodeError as error:  # what YAML and JSON can write, and a validator's own sentence repeats
        raise LexisegError(f"{what} holds a character that cannot be read; type it again.") from error


def _fault(error: ValidationError, schema: type[BaseModel], values: Mapping[str, Any], noun: str) -> str:
    problems = error.errors(include_url=False)
    first = problems[0]["loc"][:1]

    def meant(problem: Any) -> tuple[bool, bool, int]:
        # A misspelt key is often reported as a missing one, too; and of a value that may have several forms each form
        # complains, where the one that got furthest is what was meant.
        loc = problem["loc"]
        return problem["type"] in _UNKNOWN and len(loc) == 1, loc[:1] == first, len(_written(loc, values))

    problem = max(problems, key=meant)
    keys = _written(problem["loc"], values)
    key = ".".join(map(shorten, keys))
    if problem["type"] in _UNKNOWN:
        known = _fields(schema, keys[:-1], values)
        others = f"the {noun}s there are {', '.join(known)}."
        return f"has the unknown {noun} '{key}'; {near_names(keys[-1], known, others, 1)}"
    if problem["type"] == "missing":
        return f"lacks the {noun} '{'.'.join(map(shorten, [*keys, str(problem['loc'][-1])]))}'."
    message = shorten(problem["msg"].removeprefix("Value error, ").rstrip("."), 1000)
    if not key:  # a check of several together, which its own sentence names
        return f"contradicts itself: {message}."
    return f"has a wrong value for '{key}': {message[:1].lower()}{message[1:]}."


def _written(loc: Sequence[str | int], values: Any) -> list[str]:
    """The keys of a location of pydantic that are there in the values, without its names of a union's members."""
    written: list[str] = []
    for part in loc:
        listed = isinstance(values, list | tuple) and isinstance(part, int) and part < len(values)
        if listed or (isinstance(values, Mapping) and part in values):
            values = values[part]
            written.append(str(part))
    return written


def _fields(schema: type[BaseModel], keys: Sequence[str], values: Any) -> list[str]:
    """The keys that a schema has below ``keys``; of the members of a union those that the values choose."""
    models: list[Any] = [schema]
    for key in keys:
        values = values[int(key)] if isinstance(values, list | tuple) else values[key]
        inner = [one for model in models if key in _own(model) for one in _models(_own(model)[key])]
        # Keys of a mapping, such as the rules of `multipliers`, are names that people choose.
        models = [one for one in inner or models if _chosen(one, values)] or inner or models
    return list(dict.fromkeys(field for model in models for field in _own(model)))


def _own(model: Any) -> dict[str, Any]:
    """The fields of a model, or of a dataclass, with their types."""
    if isinstance(model, type) and issubclass(model, BaseModel):
        return {name: field.annotation for name, field in model.model_fields.items()}
    return dict.fromkeys(getattr(model, "__dataclass_fields__", {}))


def _models(annotation: Any) -> list[Any]:
    if isinstance(annotation, type) and (issubclass(annotation, BaseModel) or hasattr(annotation, "__match_args__")):
        return [annotation]
    if get_origin(annotation) in (Union, types.UnionType, Annotated, dict, list, tuple):
        return [model for part in get_args(annotation) for model in _models(part)]
    return []


def _chosen(model: Any, values: Any) -> bool:
    """Whether the values name this member of a union by its ``source`` or ``kind``."""
    if not isinstance(values, Mapping):
        return True
    tags = {key: get_args(_own(model).get(key)) for key in ("source", "kind")}
    return all(values[key] in allowed for key, allowed in tags.items() if allowed and key in values)
