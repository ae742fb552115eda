"""``lexiseg evaluate``: how good a model is on a dataset."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

import lexiseg
from lexiseg.cli.console import say_json, say_table, say_written, waiting
from lexiseg.cli.options import (
    Background,
    Compile,
    Device,
    Dtype,
    Json,
    Precision,
    Stride,
    Template,
    Window,
    templates_of,
    window_of,
)
from lexiseg.errors import LexisegError

if TYPE_CHECKING:
    from lexiseg.data.base import SegmentationDataset

PICTURE_WORLD = "picture-world"
DEFAULT_SIZE = 256


def evaluate(
    dataset: Annotated[
        str,
        typer.Argument(
            metavar="RECIPE|DATASET",
            help="A recipe (its validation data), picture-world, or a folder in the layout of PASCAL VOC.",
            show_default=False,
        ),
    ],
    weights: Annotated[
        str,
        typer.Option(
            "--weights", "-w", help="The model: a name that `lexiseg models` lists, or a folder.", show_default=False
        ),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the report.")] = Path("out/evaluation"),
    split: Annotated[
        str | None, typer.Option("--split", help="Split of a folder. Default: val.", show_default=False)
    ] = None,
    size: Annotated[
        int | None,
        typer.Option(
            "--size", min=16, help="Side of a picture of picture-world in pixels. Default: 256.", show_default=False
        ),
    ] = None,
    limit: Annotated[
        int | None, typer.Option("--limit", min=1, help="Take only so many samples, spread evenly.", show_default=False)
    ] = None,
    window: Window = None,
    stride: Stride = None,
    batch_size: Annotated[int, typer.Option("--batch-size", "-b", min=1, help="Pictures predicted together.")] = 1,
    device: Device = "auto",
    dtype: Dtype = Precision.fp32,
    compile: Compile = False,
    template: Template = None,
    background: Background = None,
    json: Json = False,
) -> None:
    """Predict a dataset, compare with its labels, and write a report: pAcc, mIoU, seen, unseen, hIoU.

    The report says by which protocol it was made, down to the hash of the weights.
    """
    from lexiseg.files import make_folder

    make_folder(output)
    data, name, shown = _dataset(dataset, split, size)
    from lexiseg.evaluation.evaluate import evaluate as run

    with waiting(f"loading {weights}"):
        segmenter = lexiseg.load(
            _model_of(weights),
            device=device,
            dtype=dtype.value,
            compile=compile,
            templates=templates_of(template),
        )
    report = run(
        segmenter,
        data,
        name=name,
        split=shown,
        background=background,
        window=window_of(segmenter.model.window, window, stride),
        batch_size=batch_size,
        limit=limit,
        seed=segmenter.model.metadata.get("seed"),
    )
    paths = report.save(output)
    if json:
        say_json({"metrics": report.summary(), "protocol": report.protocol, "files": [str(path) for path in paths]})
        return
    titles, rows = report.table()
    say_table(f"{name}, {shown}, {report.protocol['num_pictures']} pictures", titles, rows)
    typer.echo(report.summary_line())
    say_written(paths)


def _dataset(text: str, split: str | None, size: int | None) -> tuple[SegmentationDataset, str, str]:
    """The dataset a recipe's name, a dataset's name or a folder stands for, its name and its split."""
    if text == PICTURE_WORLD:
        from lexiseg.data.picture_world import PictureWorld

        if split not in (None, "val"):
            # Its train split hides the unseen classes, so a number made there would look like a result and be none.
            raise LexisegError(f"{PICTURE_WORLD} is evaluated on its val split; leave out --split {split}.")
        return PictureWorld("val", size=size or DEFAULT_SIZE), PICTURE_WORLD, "val"
    if size is not None:
        raise LexisegError(
            f"--size is for {PICTURE_WORLD}, which is drawn at any size, not for '{text}'; leave it out."
        )
    if Path(text).is_dir():
        from lexiseg.data.folders import VocFolder

        return VocFolder(text, split or "val"), Path(text).resolve().name, split or "val"
    from lexiseg.training.recipe import SegmentationRecipe, load_recipe
    from lexiseg.training.run import dataset_of, name_of

    recipe = load_recipe(text)
    if not isinstance(recipe, SegmentationRecipe):
        raise LexisegError(f"The recipe '{text}' trains a CLIP on captions and has no labels to evaluate with.")
    if split is not None:
        raise LexisegError(f"The recipe '{text}' says itself what it is evaluated on; leave out --split.")
    return dataset_of(recipe.data, "val"), name_of(recipe.data), "val"


def _model_of(weights: str) -> str:
    """A run folder stands for the model inside it."""
    inside = Path(weights) / "model"
    return str(inside) if (inside / "config.json").is_file() else weights
