"""The base of all options: immutable, and strict about names and numbers."""

from collections.abc import Collection, Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, field_validator, model_validator
from pydantic_core import PydanticCustomError

UNKNOWN = "unknown_key"
"""Type of pydantic's error about a key that there is not; its context lists the ``known`` ones."""


# Seeds go up to the first; float32, in which models compute, to the second.
_LARGEST: dict[type, float] = {int: 2**32, float: 3.4e38}


def refuse_unknown(values: Any, known: Collection[str]) -> Any:
    """Give back values for a pydantic model. A mapping with other keys than the ``known`` ones is an error."""
    if isinstance(values, Mapping) and not values.keys() <= set(known):
        raise PydanticCustomError(UNKNOWN, "it has an unknown key", {"known": list(known)})
    return values


class StrictModel(BaseModel):
    """A pydantic model that cannot be changed; an unknown key, or a number that no tensor could have, is an error."""

    model_config = ConfigDict(frozen=True, allow_inf_nan=False, defer_build=True)

    @model_validator(mode="before")
    @classmethod
    def _refuse_unknown(cls, values: Any) -> Any:
        return refuse_unknown(values, cls.model_fields)

    @field_validator("*")
    @classmethod
    def _refuse_huge(cls, value: Any) -> Any:
        largest = _LARGEST.get(type(value))
        if largest is not None and abs(value) > largest:
            raise ValueError(f"input should be at most {largest}")
        return value
