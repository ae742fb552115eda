"""Where tensors lie in another program's file, whether they fit, and how they are taken from it.

``keys.yaml`` says what every such program calls our tensors.
"""

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import TypeVar

import torch
import yaml
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


@cache
def _replacements() -> dict[str, list[tuple[re.Pattern[str], str | None]]]:
    """The tables of ``keys.yaml``: patterns, and what is put in their place."""

    def pattern(ours: str) -> re.Pattern[str]:
        parts = re.escape(ours.removeprefix("^")).replace(r"\#", r"(\d+)")
        return re.compile(rf"{'^' if ours[0] == '^' else '(?<![^.])'}{parts}(?![^.])")

    tables = yaml.safe_load(Path(__file__).with_name("keys.yaml").read_text("utf-8"))
    return {name: [(pattern(ours), theirs) for ours, theirs in table.items()] for name, table in tables.items()}


def _numbered(found: re.Match[str], theirs: str) -> str:
    numbers = iter(found.groups())
    return re.sub(r"#(\+1)?", lambda place: str(int(next(numbers)) + bool(place[1])), theirs)


def authors_key(name: str, *tables: str) -> str | None:
    """What a tensor of ours is called by these tables of ``keys.yaml``; None where their files do not have it."""
    for pattern, theirs in (line for table in tables for line in _replacements()[table]):
        if theirs is not None:
            name = pattern.sub(partial(_numbered, theirs=theirs), name)
        elif pattern.search(name):
            return None
    return name


def key_map(*tables: str, inside: str = "") -> SourceOf:
    """The key map of a format, by its tables in ``keys.yaml``; without any, its names are ours.

    ``inside``: where in a model the names are that it is asked for, such as "clip.model.".
    """

    def source_of(name: str) -> Source | None:
        key = authors_key(inside + name, *tables)
        if key is None:
            return None
        if third := re.fullmatch(r"(.+\.in_proj)\.([qkv])\.(weight|bias)", key):
            return Source((f"{third[1]}_{third[3]}",), "qkv".index(third[2]))
        if ".qkv_proj." in key:
            return Source(tuple(key.replace(".qkv_proj.", f".{part}_proj.") for part in "qkv"))
        return Source((key.removesuffix(".T"),), transposed=key.endswith(".T"))

    return source_of


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


def filled(
    build: Callable[[], _Model],
    source_of: SourceOf,
    state: Mapping[str, Tensor],
    what: str,
    *,
    is_unused: Callable[[str, _Model], bool] = lambda key, model: False,
    optional: Collection[str] = (),
) -> tuple[_Model, list[str]]:
    """What ``build`` builds with another program's tensors, once they are seen to fit; see `take_tensors`.

    ``is_unused``: whether a key that nothing of ours asks for takes part in no computation of such a model. Returns the
    model in evaluation mode, and these keys.
    """
    plan = sketch(build, len(state), what)
    shapes = shapes_of(plan)
    wanted = expected_shapes(shapes, source_of)
    unused = {key for key in state if key not in wanted and is_unused(key, plan)}
    used = {key: tensor for key, tensor in state.items() if key not in unused}
    tensors = take_tensors(shapes, source_of, used, what, optional=optional)
    model = build()
    model.load_state_dict({**model.state_dict(), **tensors})
    return model.eval(), [key for key in state if key in unused]
