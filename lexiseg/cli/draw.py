"""``lexiseg draw``: the papers' figures of what a model does, for any model and picture."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

import lexiseg
from lexiseg.cli.console import say_written, waiting
from lexiseg.cli.options import DEFAULT_MAX_PIXELS, Device
from lexiseg.errors import LexisegError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from lexiseg.segmenter import Segmenter

app = typer.Typer(
    help="Draw what a model sees: similarity of patches, alignment of blocks, scores of classes, weights of blocks.",
    no_args_is_help=False,
)

Model = Annotated[str, typer.Argument(help="A name that `lexiseg models` lists, or a folder.", show_default=False)]
Picture = Annotated[Path, typer.Argument(metavar="IMAGE", help="A picture.", show_default=False)]
At = Annotated[
    list[str] | None,
    typer.Option(
        "--at", help="Pixel of the patch as COLUMN,ROW; repeat it for several. Default: the middle.", show_default=False
    ),
]
Output = Annotated[Path, typer.Option("--output", "-o", help="The picture to write, a .png.")]


class By(str, Enum):
    """Whose scores of a proposal are drawn."""

    clip = "clip"
    ensemble = "ensemble"


@app.callback(invoke_without_command=True)
def _draw(context: typer.Context) -> None:
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


@app.command("similarity")
def similarity(
    model: Model,
    image: Picture,
    at: At = None,
    blocks: Annotated[
        str | None,
        typer.Option(
            "--blocks", help="Blocks to show, counted from 1, such as 6,9,12 or 6-12. Default: all.", show_default=False
        ),
    ] = None,
    output: Output = Path("out/similarity.png"),
    device: Device = "auto",
) -> None:
    """Draw how similar every patch is to a chosen one, block by block (Cascade-CLIP, Fig. 1 and 6)."""
    points = [_point(text) for text in at or ()]
    numbers = _numbers(blocks)
    _check(output)
    from lexiseg.analysis import similarity_figure

    segmenter = _load(model, device)
    with waiting("drawing"):
        figure = similarity_figure(segmenter, image, points, numbers)
    _write(figure, output)


@app.command("scores")
def scores(
    model: Model,
    image: Picture,
    classes: Annotated[
        str,
        typer.Argument(
            help="The classes: 'giraffe; tree, bush; sky' (a semicolon separates classes, a comma joins synonyms) or "
            "a file of them.",
            show_default=False,
        ),
    ],
    output: Output = Path("out/scores.png"),
    device: Device = "auto",
) -> None:
    """Draw the score of each class at every pixel (ZegCLIP, Fig. 8); unseen classes are red."""
    _check(output)
    vocabulary = lexiseg.Vocabulary.parse(classes)
    from lexiseg.analysis import scores_figure

    segmenter = _load(model, device)
    with waiting("drawing"):
        figure = scores_figure(segmenter, image, vocabulary)
    _write(figure, output)


@app.command("compare")
def compare(
    image: Picture,
    classes: Annotated[str, typer.Argument(help="The classes, as for `lexiseg draw scores`.", show_default=False)],
    model: Annotated[
        list[str], typer.Option("--model", "-m", help="A model; repeat it for several.", show_default=False)
    ],
    output: Output = Path("out/compare.png"),
    device: Device = "auto",
) -> None:
    """Draw what several models make of one picture, side by side (Cascade-CLIP, Fig. 5 and 8; MAFT, Fig. 4)."""
    _check(output)
    vocabulary = lexiseg.Vocabulary.parse(Path(classes[1:]) if classes.startswith("@") else classes)
    from lexiseg.analysis import compare_figure

    segmenters = [_load(name, device) for name in model]
    with waiting("drawing"):
        figure = compare_figure(segmenters, image, vocabulary)
    _write(figure, output)


@app.command("cka")
def cka(
    model: Model,
    images: Annotated[
        list[str], typer.Argument(metavar="IMAGE...", help="Pictures, folders or patterns.", show_default=False)
    ],
    before: Annotated[
        str | None,
        typer.Option(
            "--before", help="Model to compare with. Default: the CLIP inside the model alone.", show_default=False
        ),
    ] = None,
    output: Output = Path("out/cka.png"),
    device: Device = "auto",
) -> None:
    """Draw how alike the blocks of the image tower are, before and after training (Cascade-CLIP, Fig. 4)."""
    _check(output)
    from lexiseg.analysis import cka_figure
    from lexiseg.images import list_images

    paths = list(dict.fromkeys(path for image in images for path in list_images(image)))
    segmenter = _load(model, device)
    other = None if before is None else _load(before, device)
    with waiting("drawing"):
        figure = cka_figure(segmenter, paths, other)
    _write(figure, output)


@app.command("anchors")
def anchors(
    model: Model,
    image: Picture,
    at: At = None,
    output: Output = Path("out/anchors.png"),
    device: Device = "auto",
) -> None:
    """Draw a patch's self-attention, its proposal and that proposal's anchors, of a deop model (DeOP, Fig. 5)."""
    points = [_point(text) for text in at or ()]
    _check(output)
    from lexiseg.analysis.regions import anchor_figure

    segmenter = _load(model, device)
    with waiting("drawing"):
        figure = anchor_figure(segmenter, image, points)
    _write(figure, output)


@app.command("proposals")
def proposals(
    model: Model,
    image: Picture,
    classes: Annotated[str, typer.Argument(help="The classes, as for `lexiseg draw scores`.", show_default=False)],
    count: Annotated[int, typer.Option("--count", help="Proposals to show at most.")] = 8,
    by: Annotated[
        By,
        typer.Option(
            "--by", help="Whose scores: clip's of the region alone, as in the paper, or the prediction's (ensemble)."
        ),
    ] = By.clip,
    against: Annotated[
        list[str] | None,
        typer.Option(
            "--against", help="Another model that judges the same proposals; repeat it for several.", show_default=False
        ),
    ] = None,
    output: Output = Path("out/proposals.png"),
    device: Device = "auto",
) -> None:
    """Draw the proposals that decide most of a picture and their five best classes (MAFT, Fig. 1 and 3)."""
    _check(output)
    vocabulary = lexiseg.Vocabulary.parse(classes)
    from lexiseg.analysis.regions import top_classes_figure

    segmenters = [_load(name, device) for name in (model, *(against or ()))]
    with waiting("drawing"):
        figure = top_classes_figure(segmenters, image, vocabulary, proposals=count, by=by.value)
    _write(figure, output)


@app.command("nga")
def nga(
    model: Model,
    output: Output = Path("out/nga.png"),
) -> None:
    """Draw the weights that Cascade-CLIP gives the blocks of a group, before and after training (its Table 17)."""
    _check(output)
    from lexiseg.analysis import nga_figure

    segmenter = _load(model, "cpu")
    with waiting("drawing"):
        figure = nga_figure(segmenter)
    _write(figure, output)


@app.command("curves")
def curves(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Folders of trainings.", show_default=False)],
    metrics: Annotated[
        str, typer.Option("--metrics", help="What to draw, separated by commas, as metrics.jsonl names it after val/.")
    ] = "miou_seen,miou_unseen,hiou",
    output: Output = Path("out/curves.png"),
) -> None:
    """Draw what runs measured over their steps, such as S, U and hIoU (Cascade-CLIP, Fig. 7; ZegCLIP, Fig. 6)."""
    _check(output)
    from lexiseg.analysis.curves import curves_figure

    _write(curves_figure(runs, [name.strip() for name in metrics.split(",") if name.strip()]), output)


def _load(model: str, device: str) -> Segmenter:
    with waiting(f"loading {model}"):
        return lexiseg.load(model, device=device, max_pixels=DEFAULT_MAX_PIXELS)


def _point(text: str) -> tuple[int, int]:
    parts = [part.strip() for part in text.split(",")]
    if len(parts) != 2 or not all(part.lstrip("-").isdigit() for part in parts):
        raise LexisegError(f"--at takes the column and the row of a pixel, such as 120,80, not '{text}'.")
    return int(parts[0]), int(parts[1])


def _numbers(text: str | None) -> list[int]:
    """Read ``6,9,12`` or ``6-12``."""
    found: list[int] = []
    for part in (text or "").split(","):
        if not part.strip() and text is None:
            continue
        first, dash, last = (piece.strip() for piece in part.partition("-"))
        if not first.isdigit() or (dash and not last.isdigit()):
            raise LexisegError(f"--blocks takes numbers such as 6,9,12 or 6-12, not '{text}'.")
        end = int(last) if dash else int(first)
        if end - int(first) > 1000:
            raise LexisegError(f"--blocks {text} names more blocks than any tower has; count from 1.")
        found.extend(range(int(first), end + 1))
    return found


def _check(output: Path) -> None:
    if output.suffix.lower() != ".png":
        raise LexisegError(f"'{output}' must end in .png.")


def _write(figure: Figure, output: Path) -> None:
    from lexiseg.files import atomic_write, make_folder

    make_folder(output.parent)
    with atomic_write(output) as temporary:
        figure.savefig(temporary, format="png")
    say_written([output])
