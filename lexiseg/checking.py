"""What pydantic finds wrong with values that people wrote, as one sentence that names the key."""

from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Annotated, Any, TypeAlias, TypeVar

from pydantic import AfterValidator, BaseModel, BeforeValidator, ValidationError

from lexiseg.errors import LexisegError
from lexiseg.strict import UNKNOWN, refuse_unknown
from lexiseg.windows import WindowPolicy, check_policy
from lexiseg.words import near_names, shorten

_Model = TypeVar("_Model", bound=BaseModel)
_POLICY = [field.name for field in fields(WindowPolicy)]

Policy: TypeAlias = Annotated[
    WindowPolicy, BeforeValidator(lambda values: refuse_unknown(values, _POLICY)), AfterValidator(check_policy)
]
"""A `WindowPolicy` as somebody wrote it."""


def check(schema: type[_Model], values: Mapping[str, Any], what: str, *, noun: str = "key") -> _Model:
    """Check values against a schema.

    ``what``: begins the sentence, such as "The recipe 'mine.yaml'". Raises LexisegError if a key is unknown, missing or
    has a wrong value, or two do not go together.
    """
    try:
        return schema.model_validate(values)
    except ValidationError as error:
        raise LexisegError(f"{what} {_fault(error, values, noun)}") from error
    except UnicodeEncodeError as error:  # what YAML and JSON can write, and a validator's own sentence repeats
        raise LexisegError(f"{what} holds a character that cannot be read; type it again.") from error


def _fault(error: ValidationError, values: Mapping[str, Any], noun: str) -> str:
    problems = error.errors(include_url=False)
    first = [problem for problem in problems if problem["loc"][:1] == problems[0]["loc"][:1]]
    # Of a value that may have several forms each form complains; the one that got furthest is what was meant.
    problem = max(first, key=lambda one: len(_written(one["loc"], values)[0]))
    keys, value = _written(problem["loc"], values)
    if problem["type"] == UNKNOWN:
        known = problem["ctx"]["known"]
        unknown = next(str(key) for key in value if key not in known)
        others = f"the {noun}s there are {', '.join(known)}."
        return f"has the unknown {noun} '{_key(*keys, unknown)}'; {near_names(unknown, known, others, 1)}"
    if problem["type"] == "missing":
        return f"lacks the {noun} '{_key(*keys, str(problem['loc'][-1]))}'."
    message = shorten(problem["msg"].removeprefix("Value error, ").rstrip("."), 1000)
    if not keys:  # a check of several together, which its own sentence names
        return f"contradicts itself: {message}."
    return f"has a wrong value for '{_key(*keys)}': {message[:1].lower()}{message[1:]}."


def _key(*parts: str) -> str:
    return ".".join(map(shorten, parts))


def _written(loc: Sequence[str | int], values: Any) -> tuple[list[str], Any]:
    """The keys of a location of pydantic that are there in the values, without its names of a union's members.

    The value there comes with them.
    """
    written: list[str] = []
    for part in loc:
        listed = isinstance(values, list | tuple) and isinstance(part, int) and part < len(values)
        if listed or (isinstance(values, Mapping) and part in values):
            values = values[part]
            written.append(str(part))
    return written, values
