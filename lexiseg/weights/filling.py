"""Where tensors lie in another program's file, whether they fit, and how they are taken from it."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn

from lexiseg.clip.load import check_state, shapes_of, sketch

_Model = TypeVar("_Model", bound=nn.Module)


@dataclass(frozen=True)
class Source:
    """Where one of our tensors lies in another program's file."""

    keys: tuple[str, ...]  # its key there; several are parts whose rows follow each other in ours
    block: int | None = None  # which third of its rows it is (query, key or value); None: all of it
    transposed: bool = False  # rows there are columns here


SourceOf = Callable[[str], Source | None]
"""The key map of a format: the source of a tensor by our name, None where its files have no such tensor."""


def expected_shapes(shapes: Mapping[str, tuple[int, ...]], source_of: SourceOf) -> dict[str, tuple[int, ...]]:
    """The shapes that another program's tensors should have, by its keys, for ours of ``shapes``."""
    found: dict[str, tuple[int, ...]] = {}
    for name, shape in shapes.items():
        source = source_of(name)
        if source is None:
            continue
        shape = shape[::-1] if source.transposed else shape
        rows = shape[:1] if source.block is None else (3 * shape[0],)
        if len(source.keys) > 1:
            rows = (shape[0] // len(source.keys),)
        found |= dict.fromkeys(source.keys, (*rows, *shape[1:]))
    return found


def take_tensors(
    shapes: Mapping[str, tuple[int, ...]],
    source_of: SourceOf,
    state: Mapping[str, Tensor],
    what: str,
    *,
    optional: Collection[str] = (),
) -> dict[str, Tensor]:
    """Take our tensors from another program's.

    ``shapes``: of our tensors, by our names. ``state``: its tensors by its keys, none beside those that are wanted.
    ``what``: whose tensors they are, for messages. ``optional``: keys that may be missing; what lies there is left out.
    Returns tensors by our names, in float32. Raises LexisegError if tensors are missing, left over, of another shape or
    not finite, see `check_state`.
    """
    check_state(state, expected_shapes(shapes, source_of), what, optional=optional)
    found: dict[str, Tensor] = {}
    for name in shapes:
        source = source_of(name)
        if source is None or any(key not in state for key in source.keys):
            continue
        tensor = torch.cat([state[key] for key in source.keys]) if len(source.keys) > 1 else state[source.keys[0]]
        tensor = tensor if source.block is None else tensor.chunk(3)[source.block]
        found[name] = (tensor.T if source.transposed else tensor).to(torch.float32)
    return found


def filled(build: Callable[[], _Model], source_of: SourceOf, state: Mapping[str, Tensor], what: str) -> _Model:
    """What ``build`` builds with another program's tensors, once they are seen to fit; see `take_tensors`."""
    tensors = take_tensors(shapes_of(sketch(build, len(state), what)), source_of, state, what)
    model = build()
    model.load_state_dict({**model.state_dict(), **tensors})
    return model


def renamed(name: str, rules: Iterable[tuple[str, str]]) -> str | None:
    """What the first rule makes of a name, of those whose pattern is all of it; None if no rule's is."""
    for pattern, replacement in rules:
        if found := re.fullmatch(pattern, name):
            return found.expand(replacement)
    return None
