"""``lexiseg models``: the names that ``--model`` takes."""

from __future__ import annotations

from dataclasses import asdict

import typer

import lexiseg
from lexiseg.cli.console import say_json, say_table
from lexiseg.cli.options import Json

_OTHERS = (
    ("FOLDER", "a model that `lexiseg train` or `lexiseg convert` wrote"),
    ("dense-clip/ARCHITECTURE/TAG", "training-free, on any ViT of open_clip, such as dense-clip/ViT-B-16/openai"),
    ("dense-clip/FOLDER", "training-free, on a CLIP in a folder"),
    ("OWNER/NAME", "a model folder on the Hugging Face hub"),
)


def models(json: Json = False) -> None:
    """List the models that come with the package and the ways to name others."""
    entries = lexiseg.list_models()
    if json:
        say_json([asdict(entry) for entry in entries])
        return
    rows = [[entry.name, entry.system, entry.description] for entry in entries]
    if rows:
        say_table("These come with the package:", ["name", "system", "what it is"], rows)
        typer.echo()
    say_table("And --model takes:", ["name", "what it is"], _OTHERS)
