"""``lexiseg evaluate``: how good a model is on a dataset."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

import lexiseg
from lexiseg.cli.console import say, say_json, say_table, say_written, waiting
from lexiseg.cli.options import (
    Background,
    Cleaning,
    Compile,
    Device,
    Dtype,
    Json,
    Precision,
    Refine,
    Stride,
    Template,
    Window,
    templates_of,
    window_of,
)
from lexiseg.errors import LexisegError

if TYPE_CHECKING:
    from lexiseg.data.base import SegmentationDataset
    from lexiseg.evaluation.protocols import Protocol
    from lexiseg.recipes import EvaluationRecipe

PICTURE_WORLD = "picture-world"
DEFAULT_SIZE = 256
PARTS = "evaluation-parts"
# Processes that are done wait for the slowest one.
PATIENCE = timedelta(hours=12)


def evaluate(
    dataset: Annotated[
        str,
        typer.Argument(
            metavar="RECIPE|DATASET",
            help="A recipe (its validation data), picture-world, or a folder: your own data, or a protocol's.",
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
    protocol: Annotated[
        str | None,
        typer.Option(
            "--protocol",
            help="Judge a folder as the papers do: gzs-voc, gzs-coco, gzs-context, gzs-context-papers, gzs-ade (seen "
            "and unseen classes); voc-20, voc-20b, pc-59, pc-459, a-150, a-847 (across data sets).",
            show_default=False,
        ),
    ] = None,
    classes: Annotated[
        Path | None,
        typer.Option("--classes", help="A list of the classes, where the folder carries none.", show_default=False),
    ] = None,
    synonyms: Annotated[
        bool | None,
        typer.Option(
            "--synonyms/--no-synonyms",
            help="Score the further words of the data set's list as well, or names alone. Default: the recipe's or the "
            "protocol's choice; of your own data all words.",
            show_default=False,
        ),
    ] = None,
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
    proposals: Annotated[
        bool,
        typer.Option(
            "--proposals",
            help="Decoupled models: judge the proposals too: recall, DeOP's Table 8, the best they allow.",
        ),
    ] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with an evaluation into the same folder that was stopped.")
    ] = False,
    device: Device = "auto",
    dtype: Dtype = Precision.fp32,
    compile: Compile = False,
    template: Template = None,
    background: Background = None,
    refine: Refine = Cleaning.none,
    json: Json = False,
) -> None:
    """Predict a dataset, compare with its labels, and write a report: pAcc, mIoU, seen, unseen, hIoU.

    The report says by which protocol it was made, down to the hash of the weights. Under a launcher (torchrun,
    accelerate) the processes share the pictures; the numbers are the same.
    """
    from lexiseg import processes
    from lexiseg.files import make_folder

    if proposals and processes.launched():
        raise LexisegError("--proposals is judged in one process; leave it out, or start without a launcher.")
    processes.init(device, patience=PATIENCE)
    with processes.together():
        make_folder(output)
        chosen = _protocol(protocol, dataset, split, size)
        found = _dataset(dataset, split, size, classes, synonyms) if chosen is None else None
        recipe = found[3] if found else None
        from lexiseg.evaluation.evaluate import evaluate as run
        from lexiseg.evaluation.parts import clear

        with waiting(f"loading {weights}"):
            segmenter = lexiseg.load(
                weights,
                device=processes.device_name(device),
                dtype=dtype.value,
                compile=compile,
                templates=templates_of(template) or (recipe.templates if recipe else None),
                refine=refine.value,
            )
        system = segmenter.model.system
        data: SegmentationDataset
        seen_split, card = not _across(recipe), None
        if chosen is not None:
            data = chosen.open(dataset, system=system, classes=classes, synonyms=synonyms)
            name, shown, seen_split = chosen.data_set, "val", chosen.seen_split
            segmenter.templates = segmenter.templates or chosen.templates_for(system)
            card = chosen.card(synonyms=synonyms, settings=chosen.set_up(segmenter.model))
        elif found is not None:
            data, name, shown, _ = found
        policy = segmenter.model.window
        if recipe is not None and recipe.window is not None:
            policy = recipe.window
        given = chosen.window_for(system) if chosen else policy if recipe else None
        given = window_of(given or policy, window, stride) or given
    report = run(
        segmenter,
        data,
        name=name,
        split=shown,
        background=background,
        window=given,
        batch_size=batch_size,
        limit=limit,
        offsets=recipe.offsets if recipe else chosen.offsets if chosen else None,
        seen_split=seen_split,
        card=card,
        seed=segmenter.model.metadata.get("seed"),
        shared=True,
        parts=output / PARTS,
        resume=resume,
    )
    if not processes.is_main():
        processes.destroy()
        return
    paths = report.save(output)
    clear(output / PARTS)
    processes.destroy()
    judged = None
    if proposals:
        from lexiseg.evaluation.proposal_report import evaluate_proposals
        from lexiseg.files import write_json

        with waiting("judging the proposals"):
            judged = evaluate_proposals(segmenter, data, released=True, limit=limit)
        paths.append(write_json(output / "proposals.json", judged.to_dict()))
    if json:
        more = {} if judged is None else {"proposals": judged.to_dict()}
        files = [str(path) for path in paths]
        say_json({"metrics": report.summary(), "protocol": report.protocol, **more, "files": files})
        return
    titles, rows = report.table()
    say_table(f"{name}, {shown}, {report.protocol['num_pictures']} pictures", titles, rows)
    say(report.summary_line())
    if judged is not None:
        say_table("proposals", *judged.table())
    say_written(paths)


def _protocol(name: str | None, folder: str, split: str | None, size: int | None) -> Protocol | None:
    """The protocol that is asked for; it says itself which data, split and size."""
    if name is None:
        return None
    from lexiseg.evaluation.protocols import find_protocol

    chosen = find_protocol(name)
    for option, value in (("--split", split), ("--size", size)):
        if value is not None:
            raise LexisegError(f"The protocol {name} says itself what is judged; leave out {option} {value}.")
    if not Path(folder).is_dir():
        raise LexisegError(f"'{folder}' is no folder; with --protocol {name} give the one {chosen.data_set} is in.")
    return chosen


def _across(recipe: EvaluationRecipe | None) -> bool:
    """Whether a recipe judges on another data set than the training's, where no class counts as seen or unseen."""
    from lexiseg.recipes import CatalogData

    return recipe is not None and isinstance(recipe.data, CatalogData) and recipe.data.unseen == "none"


def _dataset(
    text: str, split: str | None, size: int | None, classes: Path | None, synonyms: bool | None
) -> tuple[SegmentationDataset, str, str, EvaluationRecipe | None]:
    """What a recipe's name, a dataset's name or a folder stands for: the data, its name, its split, and a recipe."""
    if text == PICTURE_WORLD:
        _refuse_synonyms(synonyms, text)
        from lexiseg.data.picture_world import PictureWorld

        if split not in (None, "val", "test"):
            # Its train split hides the unseen classes, so a number made there would look like a result and be none.
            raise LexisegError(f"{PICTURE_WORLD} is evaluated on its val or its test split; leave out --split {split}.")
        chosen: Literal["val", "test"] = "test" if split == "test" else "val"
        return PictureWorld(chosen, size=size or DEFAULT_SIZE), PICTURE_WORLD, chosen, None
    if size is not None:
        raise LexisegError(
            f"--size is for {PICTURE_WORLD}, which is drawn at any size, not for '{text}'; leave it out."
        )
    if Path(text).is_dir():
        from lexiseg.data.sets.open import OWN, open_data_set

        data = open_data_set(OWN, text, split or "val", classes=classes, synonyms=synonyms)
        return data, Path(text).resolve().name, split or "val", None
    if classes is not None:
        raise LexisegError(f"--classes is for folders, not for '{text}'; leave it out.")
    from lexiseg.recipes import CatalogData, ContrastiveRecipe, EvaluationRecipe, load_recipe

    recipe = load_recipe(text)
    if isinstance(recipe, ContrastiveRecipe):
        raise LexisegError(f"The recipe '{text}' trains a CLIP on captions and has no labels to evaluate with.")
    if split is not None:
        raise LexisegError(f"The recipe '{text}' says itself what it is evaluated on; leave out --split.")
    told = recipe if isinstance(recipe, EvaluationRecipe) else None
    chosen_data = recipe.data
    if synonyms is not None:
        if not isinstance(chosen_data, CatalogData):
            _refuse_synonyms(synonyms, text)
        chosen_data = chosen_data.model_copy(update={"synonyms": synonyms})
    return chosen_data.open("val"), chosen_data.title, "val", told


def _refuse_synonyms(synonyms: bool | None, text: str) -> None:
    if synonyms is not None:
        option = "--synonyms" if synonyms else "--no-synonyms"
        raise LexisegError(f"{option} is for data sets with a list of classes, not for '{text}'; leave it out.")
