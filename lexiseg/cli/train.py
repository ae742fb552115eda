"""``lexiseg train``: from a recipe to a model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lexiseg.cli.console import say_json, say_table, say_written, waiting
from lexiseg.cli.options import Json
from lexiseg.errors import LexisegError

if TYPE_CHECKING:
    from lexiseg.recipes import Recipe


RecipeName = Annotated[str | None, typer.Argument(help="Name of a recipe that comes with the package, or a YAML file.")]
Output = Annotated[
    Path | None, typer.Option("--output", "-o", help="Folder of the run. Default: runs/ and the recipe's name.")
]
Resume = Annotated[bool, typer.Option("--resume", help="Go on from the newest checkpoint in the folder.")]
Until = Annotated[
    int | None, typer.Option("--until", min=1, help="Stop after this step and write the model; --resume goes on.")
]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Build the model, say what would be trained, and stop; needs no data.")
]
Data = Annotated[
    Path | None, typer.Option("--data", help="Train on a folder of your own instead of the recipe's data.")
]
Initial = Annotated[
    str | None, typer.Option("--initial", help="Start from this run, model or recipe, not the recipe's `initial`.")
]
Seed = Annotated[int | None, typer.Option("--seed", min=0, help="Replace the recipe's seed.")]
Values = Annotated[
    list[str] | None,
    typer.Option("--set", help="Replace a value: KEY=VALUE, such as train.steps=100; may be repeated."),
]
Device = Annotated[str | None, typer.Option("--device", help="cpu keeps off an accelerator. Default: what there is.")]
Tensorboard = Annotated[bool, typer.Option(help="Write TensorBoard files.")]
Listing = Annotated[bool, typer.Option("--list", help="List the recipes that come with the package, and stop.")]


def train(
    recipe: RecipeName = None,
    output: Output = None,
    resume: Resume = False,
    until: Until = None,
    dry_run: DryRun = False,
    data: Data = None,
    initial: Initial = None,
    seed: Seed = None,
    set: Values = None,
    device: Device = None,
    tensorboard: Tensorboard = True,
    list_: Listing = False,
    json: Json = False,
) -> None:
    """Train what a recipe says; --resume goes on where a run was stopped, bit for bit on a CPU."""
    from json import dumps as quoted  # a JSON string is YAML

    from lexiseg.recipes import describe_recipes, load_recipe

    if list_:
        entries = list(describe_recipes().items())
        if json:
            say_json([{"name": name, "description": description} for name, description in entries])
        else:
            say_table(None, ["recipe", "what it is"], entries)
        return
    if recipe is None:
        raise LexisegError("No recipe is given; name one of `lexiseg train --list`, or a YAML file.")
    if device not in (None, "cpu"):
        raise LexisegError(f"Training takes the accelerator there is; --device can only be cpu, not '{device}'.")
    from lexiseg import processes

    if not dry_run:
        processes.init(device)
    with processes.together():
        start = [] if initial is None else [f"initial={quoted(initial)}"]
        chosen = load_recipe(recipe, [*start, *(set or [])], seed=seed, data=data)
    if dry_run:
        _say_dry_run(chosen, recipe, json)
        return
    run_dir = output or Path("runs") / run_name(recipe)
    from lexiseg.training.run import train as run

    try:
        folder = run(chosen, run_dir, resume=resume, until=until, device=device, tensorboard=tensorboard)
    except KeyboardInterrupt as stop:
        if not str(stop):  # before the first step, or between two stages
            stop.args = (f"Stopped; the same command with --resume goes on with what '{run_dir}' holds.",)
        raise
    speaks = processes.is_main()
    processes.destroy()
    if not speaks:
        return
    if json:
        say_json({"recipe": recipe, "run": str(run_dir), "model": str(folder)})
    else:
        say_written([run_dir, folder])


def run_name(recipe: str) -> str:
    """The folder of a run: the recipe's name, its variant behind a hyphen."""
    file, _, variant = Path(recipe).name.partition(":")
    return "-".join(part for part in (Path(file).stem, variant) if part)


def _say_dry_run(recipe: Recipe, name: str, json: bool) -> None:
    from lexiseg.training.dry_run import dry_run

    with waiting(f"building what {name} trains"):
        result = dry_run(recipe)
    if json:
        say_json({"recipe": name, **result.to_dict()})
    else:
        say_table(f"{name}: {recipe.description}", ["what", "value"], result.rows())
