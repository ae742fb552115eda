"""The decoupled systems of the picture world: which there are, and how they share one training of proposals.

`benchmarks.picture_world` trains and judges them like all others. Proposals are trained once, with seed 0, and every
system of every seed takes them over; what a seed changes is the training after that, so a host, which has none, has one
run.

    python -m benchmarks.decoupled_world --runs runs/picture-world    # times of finished runs
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median

import torch

import lexiseg
from benchmarks.timing import alternate, machine
from lexiseg.clip.load import load_clip
from lexiseg.data.base import Sample
from lexiseg.data.picture_world import PictureWorld
from lexiseg.errors import LexisegError
from lexiseg.models.decoupled import DecoupledModel
from lexiseg.proposals.given import GroundTruth
from lexiseg.recipes import SegmentationRecipe, load_recipe
from lexiseg.segmenter import Segmenter
from lexiseg.training.init import system_of
from lexiseg.training.run import train
from lexiseg.vocabulary import Vocabulary


@dataclass(frozen=True)
class Variant:
    """A decoupled system as it is benchmarked.

    Attributes:
        recipe: a packaged one.
        changes: what differs from it, as ``lexiseg train --set`` takes it.
        start: the system whose weights it starts from, or "" to train from nothing.
        ground_truth: the labels' masks take the place of the proposals.
    """

    recipe: str
    changes: tuple[str, ...] = ()
    start: str = "proposals alone"
    ground_truth: bool = False

    @property
    def seeded(self) -> bool:
        """Whether a seed changes anything: all share the proposals, so there must be a training after them."""
        return bool(self.start) and recipe_of(self, 0).train.steps > 0


_LABELS = ("model.options.proposals={kind: ground-truth}", "model.options.ensemble={rule: region}")
_UNTUNED = ("train.steps=0", "model.options.maft=null", "model.options.regions=mask-attention")
_LEFTOVER = "model.options.leftover={count: 8}"
_DEOP = "deop-picture-world"
_BARE = "deop-baseline-picture-world"

DECOUPLED: dict[str, Variant] = {
    "proposals alone": Variant("proposals-picture-world", start=""),
    "zsseg": Variant("zsseg-picture-world"),
    "zsseg with mask attention": Variant("zsseg-maft-picture-world", _UNTUNED),
    "zsseg + maft": Variant("zsseg-maft-picture-world"),
    "zegformer": Variant("zegformer-picture-world"),
    "zegformer + maft": Variant("zegformer-maft-picture-world"),
    "freeseg": Variant("freeseg-picture-world"),
    "freeseg + maft": Variant("freeseg-maft-picture-world"),
    "deop baseline": Variant(_BARE),
    "deop baseline with mps": Variant(_BARE, ("model.options.severance=mps",)),
    "deop baseline with gps": Variant(_BARE, ("model.options.severance=gps",)),
    "deop without severance": Variant(_DEOP, ("model.options.severance=none",)),
    "deop with mps": Variant(_DEOP, ("model.options.severance=mps",)),
    "deop with released severance": Variant(_DEOP, ("model.options.severance=released",)),
    "deop without anchors": Variant(_DEOP, ("model.options.heatmaps=none",)),
    "deop with conv anchors": Variant(_DEOP, ("model.options.heatmaps=conv",)),
    "deop with 0 layers": Variant(_DEOP, ("model.options.anchor_layers=0",)),
    "deop with 2 layers": Variant(_DEOP, ("model.options.anchor_layers=2",)),
    "deop without visual prompts": Variant(_DEOP, ("model.options.visual_prompts=none",)),
    "deop": Variant(_DEOP),
    "zsseg + maft with leftover proposals": Variant(
        "zsseg-maft-picture-world", (_LEFTOVER, "train.steps=0"), start="zsseg + maft"
    ),
    "deop baseline with gps and leftover proposals": Variant(_BARE, ("model.options.severance=gps", _LEFTOVER)),
    "deop with leftover proposals": Variant(_DEOP, (_LEFTOVER, "train.steps=0"), start="deop"),
    "ground truth, crops": Variant("zsseg-picture-world", _LABELS, "", True),
    "ground truth, mask attention": Variant("zsseg-maft-picture-world", (*_LABELS, *_UNTUNED), "", True),
    "ground truth, pooled": Variant(_BARE, _LABELS[:1], "", True),
}
"""The systems, in the order of the table."""


def folder_of(system: str, seed: int, runs: Path) -> Path:
    """The folder of a run."""
    slug = system.replace(" (", "-").replace(")", "").replace(" + ", "-").replace(", ", "-").replace(" ", "-")
    return runs / f"{slug}-{seed}"


def recipe_of(variant: Variant, seed: int) -> SegmentationRecipe:
    """The recipe of a system, with its changes and a seed."""
    recipe = load_recipe(variant.recipe, list(variant.changes), seed=seed)
    if not isinstance(recipe, SegmentationRecipe):
        raise LexisegError(f"The recipe '{variant.recipe}' does not train a segmentation system.")
    return recipe


def trained(system: str, seed: int, runs: Path) -> Path:
    """The folder of a system's model, which is trained first, together with what it starts from, if need be."""
    variant, folder = DECOUPLED[system], folder_of(system, seed, runs)
    model = folder / "model"
    if (model / "config.json").is_file():
        return model
    recipe = recipe_of(variant, seed)
    if variant.start:
        recipe = recipe.model_copy(update={"initial": str(trained(variant.start, 0, runs))})
    return train(recipe, folder, resume=True)


def decoupled_segmenter(system: str, seed: int, runs: Path) -> Segmenter:
    """The segmenter of a system, trained first where that is needed."""
    variant = DECOUPLED[system]
    if not variant.ground_truth:
        return lexiseg.load(str(trained(system, seed, runs)), device="cpu")
    recipe = recipe_of(variant, seed)
    kind, options = system_of(recipe)
    vocabulary = recipe.data.open("train").vocabulary
    seen = tuple(entry.name for entry in vocabulary.classes if entry.seen)
    segmenter = Segmenter(kind(load_clip(recipe.model.clip), options, seen).eval(), disk_cache=False)
    if recipe.templates is not None:
        segmenter.model.default_templates = Vocabulary.parse("any", templates=recipe.templates).templates
    return segmenter


class WithMasks:
    """A dataset that tells a generator the masks of the picture that it was asked for last.

    For predictions one after another. Masks are as large as the model's pictures, so that what they leave out is only
    what a working size of that side leaves out.

    Args:
        base: the pictures.
        generator: proposes the labels' masks.
        side: of the pictures as the model sees them.
    """

    def __init__(self, base: PictureWorld, generator: GroundTruth, side: int) -> None:
        self.base, self.generator, self.side = base, generator, side
        self.vocabulary = base.vocabulary

    def __len__(self) -> int:
        return len(self.base)

    def __iter__(self) -> Iterator[Sample]:
        return (self[index] for index in range(len(self)))

    def __getitem__(self, index: int) -> Sample:
        sample = self.base[index]
        places = (torch.arange(self.side) * 2 + 1) * sample.label.shape[0] // (2 * self.side)
        self.generator.labels = sample.label[places][:, places][None]
        return sample


@contextmanager
def judged_on(segmenter: Segmenter, dataset: PictureWorld) -> Iterator[PictureWorld | WithMasks]:
    """The dataset as a segmenter has to be given it: with the masks, where it takes those of the labels."""
    model = segmenter.model
    generator = model.generator if isinstance(model, DecoupledModel) else None
    if not isinstance(generator, GroundTruth):
        yield dataset
        return
    given = WithMasks(dataset, generator, model.window.short_side or dataset.size)
    try:
        yield given
    finally:
        generator.labels = None


ONE_STAGE = ("zegclip", "cascade-clip")


def times(runs: Path, repeats: int) -> str:
    """Processor time of a prediction of finished systems, one-stage ones too, beside the bare tower's, in one run.

    A picture of 256 pixels, all classes, text remembered. Processor time and not time, so that what else the machine
    does counts less.

    Returns:
        lines of a Markdown table.
    """
    torch.set_num_threads(1)
    picture = PictureWorld("val", size=256)[0].image
    tower = load_clip("clip-emoji").image_tower
    pixels = torch.randn(1, 3, 128, 128)

    def bare() -> None:
        tokens, grid = tower.embed(pixels)
        tower.project(tower.run(tokens, grid).tokens)

    candidates: dict[str, Callable[[], object]] = {"the bare image tower": bare}
    words = PictureWorld("val").vocabulary
    for system in (*ONE_STAGE, *DECOUPLED):
        folder = folder_of(system, 0, runs) / "model"
        if (folder / "config.json").is_file():
            segmenter = lexiseg.load(str(folder), device="cpu")
            candidates[system] = partial(_predict, segmenter, picture, words)
    with torch.inference_mode():
        found = alternate(candidates, repeats, "cpu")
    seconds = {name: median(timing.cpu for timing in timings) for name, timings in found.items()}
    unit = seconds["the bare image tower"]
    lines = ["| system | CPU ms a picture | of the bare tower |", "|---|---|---|"]
    lines += [f"| {name} | {1000 * value:.0f} | {value / unit:.1f} |" for name, value in seconds.items()]
    return "\n".join([*lines, "", str(machine("cpu"))])


def _predict(segmenter: Segmenter, picture: torch.Tensor, words: Vocabulary) -> object:
    return segmenter.predict(picture, words).label_map


def main() -> None:
    """Print the times."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path("runs/picture-world"), help="folder of the runs")
    parser.add_argument("--repeats", type=int, default=7)
    arguments = parser.parse_args()
    print(times(arguments.runs, arguments.repeats))


if __name__ == "__main__":
    main()
