"""``python -m benchmarks.cost``, which is also ``lexiseg benchmark cost``."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from lexiseg.cli.console import say_json, say_note, say_table, say_written, waiting
from lexiseg.cli.options import Json
from lexiseg.errors import LexisegError

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command("cost")
def cost(
    system: Annotated[
        list[str] | None,
        typer.Option("--system", "-s", help="A row; may be repeated. Default: all.", show_default=False),
    ] = None,
    side: Annotated[int, typer.Option("--side", help="Side of the picture in pixels.")] = 512,
    classes: Annotated[int, typer.Option("--classes", help="Number of classes; COCO-Stuff has 171.")] = 171,
    threads: Annotated[
        int | None,
        typer.Option("--threads", min=1, help="Number of torch threads. Default: torch's choice.", show_default=False),
    ] = None,
    repeats: Annotated[
        int,
        typer.Option(
            "--repeats",
            min=1,
            help="Speed measurements per system, of which the median is taken; slow systems get one.",
        ),
    ] = 3,
    no_speed: Annotated[bool, typer.Option("--no-speed", help="Count only; do not measure frames/s.")] = False,
    device: Annotated[str, typer.Option("--device", help="cpu, or an accelerator such as cuda.")] = "cpu",
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Also write the table as a page, a .md.", show_default=False),
    ] = None,
    json: Json = False,
) -> None:
    """Count parameters and multiply-adds of every system at its paper's size, and time it.

    ViT-B/16 with random weights, whose values do not affect the cost.

    Next to lexiseg's own count is the paper's figure, with the counting convention that reproduces it.
    """
    if output is not None and output.suffix.lower() != ".md":
        raise LexisegError(f"'{output}' must end in .md.")
    import torch

    from benchmarks.cost.page import explanation, page, short_table, speed_lines
    from benchmarks.cost.table import measure_cost
    from lexiseg.devices import pick_device
    from lexiseg.files import make_folder, write_text

    place = str(pick_device(device))
    if threads is not None:
        torch.set_num_threads(threads)
    command = shlex.join(["lexiseg", *sys.argv[1:]])
    with waiting("measuring"):
        table = measure_cost(
            system or (), side=side, classes=classes, speed=not no_speed, repeats=repeats, device=place
        )
    if output is not None:
        make_folder(output.parent)
        write_text(output, page(table, command))
    if json:
        say_json({"command": command, **table.to_dict()})
        return
    threads_used = table.machine["threads"]
    say_table(
        f"{side} x {side}, {classes} classes, {threads_used} threads; parameters in millions, all / trained",
        *short_table(table),
    )
    for line in speed_lines(table.rows):
        say_note(line)
    for row in table.rows:
        for line in explanation(row):
            say_note(line)
    if output is not None:
        say_written([output])


if __name__ == "__main__":
    app()
