"""What has another name now: options, arguments and methods of the release before still work, and say so.

Whoever renames any of them notes it here; what has stood here for a release can go.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lexiseg.errors import LexisegError, warn

Change = str | Callable[[Any], dict[str, Any]]


def _gone(name: str, usual: Any, instead: str) -> Callable[[Any], dict[str, Any]]:
    """For an option that is gone: its usual value says nothing, and another one has no successor."""

    def change(value: Any) -> dict[str, Any]:
        if value != usual:
            raise LexisegError(f"'{name}' is {value!r}, which this release no longer has; {instead}.")
        return {}

    return change


def _leftover(value: Any) -> dict[str, Any]:
    """The option ``leftover`` of an old ``remainder``."""
    known = value if isinstance(value, dict) else {}
    return {"leftover": {"min_fraction" if key == "min_share" else key: each for key, each in known.items()}}


_ONE_STAGE: dict[str, Change] = {
    "start": lambda value: {"init": "clip-similarity" if value == "matching" else value},
    "decoder_dim": lambda value: {},
    "project_memory": lambda value: {},
}
_SPECTRAL = {"filter_blocks", "filter_grid", "train_filter"}
_HOSTS = {
    "zegclip": {"base": "zegclip", "backbone": "prompt"},
    "frozen": {"base": "zegclip", "backbone": "fixed"},
    "finetune": {"base": "zegclip", "backbone": "finetune"},
    "spt-seg": {"base": "spt-seg", "backbone": "prompt"},
}

_TOWER = "load the tower itself as 'maskclip/...' or 'clip/...'"
_RELEASE_BEFORE = "use the release before"
_REGION_MODELS: dict[str, Change] = {
    # Of these two prediction takes no notice.
    "stage": lambda value: {},
    "label_void": lambda value: {},
    "regions": lambda value: (
        {"regions": value} if value != "pooled" else _gone("regions", None, _RELEASE_BEFORE)(value)
    ),
    "crops.min_score": _gone("crops.min_score", 0.0, _RELEASE_BEFORE),
}

RENAMED_OPTIONS: dict[str, dict[str, Change]] = {
    "zegclip": _ONE_STAGE,
    "spt-seg": _ONE_STAGE,
    "cascade-clip": {**_ONE_STAGE, "host": lambda value: dict(_HOSTS.get(value, {"base": value}))},
    "second-look": {**_ONE_STAGE, "second_look": "half_patch_shift", "distances": "smoothing_distances"},
    "deop": {
        "remainder": _leftover,
        # "query" was the released form, and is the paper's now.
        "anchors": lambda value: {"heatmaps": "query-released" if value == "query" else value},
        "anchor_activation": _gone("anchor_activation", "sigmoid", _RELEASE_BEFORE),
        "position_interpolation": _gone("position_interpolation", "bicubic", _RELEASE_BEFORE),
    },
    "zsseg": _REGION_MODELS,
    "zegformer": _REGION_MODELS,
    "freeseg": _REGION_MODELS,
    "recipe": {
        "data.cut": "data.top_left_crop",
        "data.keep": "data.cache_dir",
        "data.longest": "data.max_size",
        "data.short_sides": "data.short_edge_length",
        "evaluation.scored": "evaluation.num_samples",
    },
    "dense-clip": {
        "severance": _gone("severance", 1.0, _TOWER),
        "residual": _gone("residual", 1.0, _TOWER),
        "position_interpolation": "positions",
    },
}
"""Of each system, and of recipes, what became of an old option: its new name (``"proposals.new"`` for one inside
``proposals``), or a function from its value to the new options, which gives ``{}`` where there is nothing left to say.
An old name inside another option is written ``"proposals.old"``."""


RENAMED_ARGUMENTS = {"--at": "--point", "--by": "--scores", "--until": "--stop-after"}
"""The new names of options of commands."""


def _say(what: str, changes: Sequence[str], then: str = "use the new one") -> None:
    old = f"{what}, which the next release will not read ({'; '.join(changes)}); {then}."
    warn(old, stacklevel=3)


def renamed_arguments(words: Sequence[str]) -> list[str]:
    """The words of a command line, its options under today's names; a `LexisegWarning` names what was old."""
    found = []
    for word in words:
        name, equals, value = word.partition("=")
        if name in RENAMED_ARGUMENTS:
            _say("An option has an old name", [f"{name} is {RENAMED_ARGUMENTS[name]}"])
        found.append(f"{RENAMED_ARGUMENTS.get(name, name)}{equals}{value}")
    return found


def renamed_key(key: str, *, quiet: bool = False) -> str:
    """A recipe's dotted key under today's name; a `LexisegWarning` names an old one, unless ``quiet``."""
    now = str(RENAMED_OPTIONS["recipe"].get(key, key))
    if now != key and not quiet:
        _say("A key of the recipe has an old name", [f"'{key}' is '{now}'"])
    return now


def renamed_method(old: str, new: str) -> Callable[..., Any]:
    """A method under its old name, which says so."""

    def call(self: Any, *given: Any, **named: Any) -> Any:
        _say(f"'{old}' is an old name", [f"it is '{new}'"])
        return getattr(self, new)(*given, **named)

    call.__doc__ = f"The old name of `{new}`."
    return call


def renamed_options(
    system: str, options: Mapping[str, Any], where: str, then: str = "load the model and save it again"
) -> dict[str, Any]:
    """Bring the options of a model folder, or the keys of a recipe, to today's names.

    ``options``: as its ``config.json``, or the recipe, has them. ``where``: what the note calls the file, and ``then``
    what to do with it. Returns a copy under the new names; where both are given the new one stands. A `LexisegWarning`
    names what was old.
    """
    found = {key: dict(value) if isinstance(value, dict) else value for key, value in options.items()}
    said = []
    if system == "cascade-clip" and found.get("base", "zegclip") == "zegclip":
        for spare in _SPECTRAL & found.keys():  # named whatever the base was
            del found[spare]
    for old, change in RENAMED_OPTIONS.get(system, {}).items():
        inside, _, key = old.rpartition(".")
        place = found.get(inside) if inside else found
        if not isinstance(place, dict) or key not in place:
            continue
        value = place.pop(key)
        fresh = {change: value} if isinstance(change, str) else change(value)
        if fresh == {old: value}:  # of this name only some values are old
            place[key] = value
            continue
        for name, new in fresh.items():
            part, _, last = name.rpartition(".")
            home = found.setdefault(part, {}) if part else found
            if isinstance(home, dict):
                home.setdefault(last, new)
        said.append(f"'{old}' is {' and '.join(repr(name) for name in fresh) or 'gone'}")
    if said:
        _say(f"{where} has old names of options", said, then)
    return found
