"""``lexiseg draw``: the papers' figures, for any model and picture."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from typer import Argument, Option

import lexiseg
from lexiseg.cli.console import waiting
from lexiseg.cli.options import DEFAULT_MAX_PIXELS, Device, Png, show_help, write_png
from lexiseg.errors import LexisegError
from lexiseg.words import shorten

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from lexiseg.segmenter import Segmenter

app = typer.Typer(
    help="Draw the papers' figures: similarity of patches, scores of classes, alignment of blocks, proposals and more."
)
app.callback(invoke_without_command=True)(show_help)

Model = Annotated[str, Argument(metavar="MODEL", help="A name that `lexiseg models` lists, or a folder.")]
Picture = Annotated[Path, Argument(metavar="IMAGE", help="A picture.")]
Classes = Annotated[
    str,
    Argument(
        metavar="CLASSES",
        help="The classes: 'giraffe; tree, bush; sky' (a semicolon separates classes, a comma joins synonyms) or a "
        "file of them.",
    ),
]
Points = Annotated[
    list[str] | None, Option("--point", help="Pixel of the patch as COLUMN,ROW; may be repeated. Default: the centre.")
]


@app.command("similarity")
def similarity(
    model: Model,
    image: Picture,
    point: Points = None,
    blocks: Annotated[
        str | None, Option("--blocks", help="Blocks to show, counted from 1, such as 6,9,12 or 6-12. Default: all.")
    ] = None,
    output: Png = Path("out/similarity.png"),
    device: Device = "auto",
) -> None:
    """Draw how similar every patch is to a chosen one, block by block (Cascade-CLIP, Fig. 1 and 6)."""
    points = [_point(text) for text in point or ()]
    numbers = _numbers(blocks)
    from lexiseg.analysis.figures import similarity_figure

    _draw(output, lambda: similarity_figure(_load(model, device), image, points, numbers))


@app.command("scores")
def scores(
    model: Model, image: Picture, classes: Classes, output: Png = Path("out/scores.png"), device: Device = "auto"
) -> None:
    """Draw the score of each class at every pixel (ZegCLIP, Fig. 8); unseen classes are red."""
    vocabulary = lexiseg.Vocabulary.parse(classes)
    from lexiseg.analysis.figures import scores_figure

    _draw(output, lambda: scores_figure(_load(model, device, inside=False), image, vocabulary))


@app.command("compare")
def compare(
    image: Picture,
    classes: Classes,
    model: Annotated[list[str], Option("--model", "-m", help="A model; may be repeated.")],
    output: Png = Path("out/compare.png"),
    device: Device = "auto",
) -> None:
    """Draw the predictions of several models for one picture (Cascade-CLIP, Fig. 5 and 8; MAFT, Fig. 4)."""
    vocabulary = lexiseg.Vocabulary.parse(classes)
    from lexiseg.analysis.figures import compare_figure

    _draw(
        output, lambda: compare_figure([_load(name, device, inside=False) for name in model], image, vocabulary, model)
    )


@app.command("cka")
def cka(
    model: Model,
    images: Annotated[list[str], Argument(metavar="IMAGE...", help="Pictures, folders or patterns.")],
    before: Annotated[
        str | None, Option("--before", help="Model to compare with. Default: the model's CLIP alone.")
    ] = None,
    output: Png = Path("out/cka.png"),
    device: Device = "auto",
) -> None:
    """Draw how similar the blocks of the image tower are, before and after training (Cascade-CLIP, Fig. 4)."""
    from lexiseg.analysis.figures import cka_figure
    from lexiseg.images import list_images

    paths = list(dict.fromkeys(path for image in images for path in list_images(image)))
    _draw(output, lambda: cka_figure(_load(model, device), paths, None if before is None else _load(before, device)))


@app.command("anchors")
def anchors(
    model: Model, image: Picture, point: Points = None, output: Png = Path("out/anchors.png"), device: Device = "auto"
) -> None:
    """Draw a patch's self-attention, its proposal and that proposal's anchors, for a deop model (DeOP, Fig. 5)."""
    points = [_point(text) for text in point or ()]
    from lexiseg.analysis.regions import anchor_figure

    _draw(output, lambda: anchor_figure(_load(model, device), image, points))


@app.command("proposals")
def proposals(
    model: Model,
    image: Picture,
    classes: Classes,
    count: Annotated[int, Option("--count", min=1, help="Maximum number of proposals.")] = 8,
    scores: Annotated[
        Literal["clip", "ensemble"],
        Option(
            "--scores",
            help="Scores to show: CLIP's for the region alone (clip), as in the paper, or the prediction's (ensemble).",
        ),
    ] = "clip",
    against: Annotated[
        list[str] | None, Option("--against", help="Another model that classifies the same proposals; may be repeated.")
    ] = None,
    output: Png = Path("out/proposals.png"),
    device: Device = "auto",
) -> None:
    """Draw the proposals that decide most of a picture and their five best classes (MAFT, Fig. 1 and 3)."""
    vocabulary = lexiseg.Vocabulary.parse(classes)
    from lexiseg.analysis.regions import top_classes_figure

    names = [model, *(against or ())]
    _draw(
        output,
        lambda: top_classes_figure(
            [_load(name, device) for name in names], image, vocabulary, proposals=count, by=scores, names=names
        ),
    )


@app.command("nga")
def nga(model: Model, output: Png = Path("out/nga.png")) -> None:
    """Draw the weights that Cascade-CLIP gives the blocks of a group, before and after training (its Table 17)."""
    from lexiseg.analysis.figures import nga_figure

    _draw(output, lambda: nga_figure(_load(model, "cpu")))


@app.command("curves")
def curves(
    runs: Annotated[list[Path], Argument(metavar="RUN...", help="Folders of training runs.")],
    metrics: Annotated[
        str, Option("--metrics", help="Metrics to draw, separated by commas, named as in metrics.jsonl after val/.")
    ] = "miou_seen,miou_unseen,hiou",
    output: Png = Path("out/curves.png"),
) -> None:
    """Draw metrics of runs over their steps, such as S, U and hIoU (Cascade-CLIP, Fig. 7; ZegCLIP, Fig. 6)."""
    from lexiseg.analysis.figures import curves_figure

    _draw(output, lambda: curves_figure(runs, [name.strip() for name in metrics.split(",") if name.strip()]))


def _load(model: str, device: str, *, inside: bool = True) -> Segmenter:
    """Load a model; ``inside``: what happens in it is drawn, and not its scores alone."""
    from lexiseg.export.spec import is_export

    if inside and is_export(model):
        raise LexisegError(
            f"'{model}' is an exported model, whose layers cannot be inspected; give the original model."
        )
    return lexiseg.load(model, device=device, max_pixels=DEFAULT_MAX_PIXELS)


def _point(text: str) -> tuple[int, int]:
    parts = re.fullmatch(r"\s*(-?\d{1,9})\s*,\s*(-?\d{1,9})\s*", text)
    if parts is None:
        raise LexisegError(f"--point takes the column and the row of a pixel, such as 120,80, not '{shorten(text)}'.")
    return int(parts[1]), int(parts[2])


def _numbers(text: str | None) -> list[int]:
    """Read ``6,9,12`` or ``6-12``; no tower has more blocks than three digits count."""
    found: list[int] = []
    for part in [] if text is None else text.split(","):
        ends = re.fullmatch(r"\s*(\d{1,3})\s*(?:-\s*(\d{1,3})\s*)?", part)
        if ends is None or int(ends[2] or ends[1]) < int(ends[1]):
            raise LexisegError(f"--blocks takes numbers such as 6,9,12 or 6-12, not '{text}'.")
        found.extend(range(int(ends[1]), int(ends[2] or ends[1]) + 1))
    return found


def _draw(output: Path, make: Callable[[], Figure]) -> None:
    with waiting("drawing"):
        figure = make()
    write_png(output, lambda path: figure.savefig(path, format="png"))
