"""What counts as background."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from numbers import Real
from typing import Any, Literal, TypeAlias, cast

from lexiseg.errors import LexisegError
from lexiseg.words import clean_word, describe, finite, null, refuse_unknown

BackgroundSource: TypeAlias = "Background | str | float | Mapping[str, Any] | None"


@dataclass(frozen=True)
class Background:
    """What happens to pixels that none of the classes fits.

    Raises LexisegError if a field that the kind needs is missing, one it does not use is given, or the name is not
    a class's.
    """

    # "none" gives every pixel one of the classes; "class" has a class of its own whose words are scored like any
    # other's; "threshold" leaves pixels out (255) whose winning score is below a value
    kind: Literal["none", "class", "threshold"] = "none"
    name: str | None = None  # the background class where ``kind`` is "class". A comma joins synonyms.
    # the lowest winning score that keeps a pixel where ``kind`` is "threshold", in the units of the model's scores
    threshold: float | None = None

    def __post_init__(self) -> None:
        if self.kind not in ("none", "class", "threshold"):
            raise LexisegError(f"Unknown background policy '{describe(self.kind)}'; use none, class or threshold.")
        for kind, needed, value in (("class", "name", self.name), ("threshold", "threshold", self.threshold)):
            if (value is not None) != (self.kind == kind):
                raise LexisegError(f"A background of kind '{kind}' needs a {needed}, and only that kind takes one.")
        if self.name is not None:
            object.__setattr__(self, "name", clean_word(self.name, "The background's name"))
            if ";" in str(self.name):
                raise LexisegError(
                    f"The background is one class, so '{describe(self.name)}' cannot be its name; join its words by "
                    "commas."
                )
        if self.threshold is not None:
            object.__setattr__(self, "threshold", finite(self.threshold, "The background threshold"))

    @classmethod
    def parse(cls, source: BackgroundSource) -> Background:
        """Read a policy: None or "none"; a number or its text (a threshold); any other text (a class's words).

        A mapping takes the keys kind, name and threshold; without ``kind`` it follows from the other two. Raises
        LexisegError if the source is none of these.
        """
        if isinstance(source, Background):
            return source
        if source is None:
            return cls()
        if isinstance(source, Real) and not isinstance(source, bool):  # numpy's too
            return cls("threshold", threshold=cast("float", source))
        if isinstance(source, str):
            if not source or source.strip().casefold() in ("none", "null", "~"):  # forms send "" for nothing
                return cls()
            with suppress(ValueError):
                return cls("threshold", threshold=float(source))
            with suppress(ValueError):
                number = float(source.replace(",", "."))
                raise LexisegError(f"'{source}' is not a threshold; write {number:g}, with a point.")
            return cls("class", name=source)
        if isinstance(source, Mapping):
            refuse_unknown(source, ("kind", "name", "threshold"), "a background")
            name, threshold = null(source.get("name")), null(source.get("threshold"))
            guess = "class" if name is not None else "threshold" if threshold is not None else "none"
            kind = null(source.get("kind")) or guess
            return cls(cast("Any", kind), name, threshold)
        raise LexisegError(f"A background is 'none', a class name or a threshold, not {describe(source)}.")

    def to_dict(self) -> dict[str, Any]:
        """A mapping that JSON can hold; what is not set is left out."""
        return {key: value for key, value in vars(self).items() if value is not None}
