"""``lexiseg train``: from a recipe to a model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from typer import Argument, Option

from lexiseg.cli.console import say, say_json, say_table, say_written, waiting
from lexiseg.cli.options import Json, output_option, set_option
from lexiseg.errors import LexisegError

if TYPE_CHECKING:
    from lexiseg.recipes import Recipe


def train(
    recipe: Annotated[str | None, Argument(metavar="RECIPE", help="Name of a packaged recipe, or a YAML file.")] = None,
    output: Annotated[Path | None, output_option("Folder of the run. Default: runs/RECIPE.")] = None,
    resume: Annotated[bool, Option("--resume", help="Continue from the newest checkpoint in the folder.")] = False,
    stop_after: Annotated[
        int | None, Option("--stop-after", min=1, help="Stop after this step and write the model; --resume continues.")
    ] = None,
    dry_run: Annotated[
        bool, Option("--dry-run", help="Build the model, print what would be trained, and stop; needs no data.")
    ] = False,
    data: Annotated[
        Path | None, Option("--data", help="Train on a folder of your own instead of the recipe's data.")
    ] = None,
    initial: Annotated[
        str | None, Option("--initial", help="Start from this run, model or recipe instead of the recipe's `initial`.")
    ] = None,
    seed: Annotated[int | None, Option("--seed", min=0, help="Override the recipe's seed.")] = None,
    set: Annotated[list[str] | None, set_option("train.steps=100")] = None,
    device: Annotated[
        str | None, Option("--device", help="cpu: do not use an accelerator. Default: an accelerator if there is one.")
    ] = None,
    tensorboard: Annotated[bool, Option(help="Write TensorBoard files.")] = True,
    list_: Annotated[bool, Option("--list", help="List the packaged recipes, and stop.")] = False,
    json: Json = False,
) -> None:
    """Train a model from a recipe; --resume continues a stopped run, bit for bit on a CPU."""
    from json import dumps as quoted  # a JSON string is YAML

    from lexiseg.recipes import describe_recipes, load_recipe

    if list_:
        entries = list(describe_recipes().items())
        if json:
            say_json([{"name": name, "description": description} for name, description in entries])
        else:
            width = max(len(name) for name, _ in entries)
            for name, description in entries:  # not as a table: rich lays hundreds of rows out for a fifth of a second
                say(f"{name:{width}}  {description}")
        return
    if recipe is None:
        raise LexisegError("No recipe was given; name one that `lexiseg train --list` shows, or a YAML file.")
    if device not in (None, "cpu"):
        raise LexisegError(f"Training uses an accelerator if there is one; --device can only be cpu, not '{device}'.")
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
        folder = run(chosen, run_dir, resume=resume, stop_after=stop_after, device=device, tensorboard=tensorboard)
    except KeyboardInterrupt as stop:
        if not str(stop):  # before the first step, or between two stages
            stop.args = (f"Stopped; the same command with --resume continues the run in '{run_dir}'.",)
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
    """The folder of a run: the recipe's name, followed by a hyphen and its variant."""
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
