"""``auto``: the best permissive weights that this machine can get; and what is known of weights that others publish."""

import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import yaml

from lexiseg.errors import LexisegError
from lexiseg.hub import cached, unreachable

AUTO = "auto"
_FILE = Path(__file__).with_name("known_weights.yaml")


@dataclass(frozen=True)
class KnownWeights:
    """Weights that others publish."""

    name: str  # of the towers, as `lexiseg.clip.load.load_clip` takes it; with ``+PROXY`` for ProxyCLIP
    licence: str  # of the weights
    permissive: bool  # whether it lets anybody use them for anything
    size: int  # of the download in MB, about
    source: str  # who made them and where they are
    repositories: dict[str, str]  # hub repositories and the file of each that holds the weights
    best: str  # the training-free method that does best with them by published figures
    auto: int | None = None  # place in the order of ``auto``; None is never taken by itself

    @property
    def model(self) -> str:
        """What to load: the best method on these weights."""
        return f"{self.best}/{self.name}"

    @property
    def here(self) -> bool:
        """Whether the hub's cache on this machine has all of it."""
        return all(cached(repository, (file,)) is not None for repository, file in self.repositories.items())


@cache
def known_weights() -> tuple[KnownWeights, ...]:
    """All weights that lexiseg knows of, as ``known_weights.yaml`` has them."""
    return tuple(KnownWeights(**entry) for entry in yaml.safe_load(_FILE.read_text("utf-8"))["weights"])


def auto_order() -> list[KnownWeights]:
    """What ``auto`` tries, best first."""
    return sorted((one for one in known_weights() if one.auto is not None), key=lambda one: one.auto or 0)


def pick_auto() -> str:
    """The model that ``auto`` means here: the first of `auto_order` in the cache, else the first that the hub gives.

    It says on stderr which it took, and never takes a model of the picture world. Raises LexisegError if nothing is in
    the cache and the hub is out of reach.
    """
    order = auto_order()
    found = next((one for one in order if one.here), None)
    if found is not None:
        print(f"auto: {found.model} ({found.licence}), from this machine's cache", file=sys.stderr)
        return found.model
    reason = unreachable()
    if reason:
        raise LexisegError(
            f"No weights for photographs are on this machine, and the hub cannot be reached ({reason}); fetch "
            f"{order[-2].name} elsewhere and give it with --model (see docs/photographs.md), or use --model "
            "zegclip-emoji for drawn pictures."
        )
    best = order[0]
    print(f"auto: {best.model} ({best.licence}), to be downloaded once ({best.size} MB)", file=sys.stderr)
    return best.model
