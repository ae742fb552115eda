"""``lexiseg models``: the names that ``--model`` takes."""

from dataclasses import asdict
from typing import Annotated

import typer

import lexiseg
from lexiseg.cli.console import say, say_json, say_table
from lexiseg.cli.options import Json

_OTHERS = (
    ("auto", "the best permissive weights that this machine has or can get; the default"),
    ("FOLDER", "a model that `lexiseg train`, `convert` or `export` wrote"),
    ("METHOD/ARCHITECTURE/TAG", "training-free, on any ViT of open_clip, such as naclip/ViT-B-16/openai"),
    ("METHOD/transformers:OWNER/NAME", "training-free, on TIPSv2, SigLIP, SigLIP 2 or MetaCLIP 2"),
    ("METHOD/FOLDER", "training-free, on a CLIP in a folder"),
    ("sam3", "SAM 3, prompted by each word; its weights are gated, and auto never uses them"),
    ("OWNER/NAME", "a model folder on the Hugging Face hub"),
)


def models(
    weights: Annotated[
        bool, typer.Option("--weights", help="List published weights: licence, size, best method.")
    ] = False,
    json: Json = False,
) -> None:
    """List the packaged models and how to name others."""
    if weights:
        list_weights(json)
        return
    entries = lexiseg.list_models()
    if json:
        say_json([asdict(entry) for entry in entries])
        return
    rows = [[entry.name, entry.system, entry.description] for entry in entries]
    if rows:
        say_table("Packaged models:", ["name", "system", "what it is"], rows)
        say()
    say_table("--model also takes:", ["name", "what it is"], _OTHERS)


def list_weights(json: bool) -> None:
    """List the known published weights of towers."""
    from lexiseg.weights.auto import known_weights

    entries = known_weights()
    if json:
        say_json([{**asdict(one), "model": one.model, "here": one.here} for one in entries])
        return
    say("Published weights, each with its best method; auto takes the first one available:")
    for one in sorted(entries, key=lambda one: one.auto or len(entries)):
        place = "on this machine" if one.here else f"about {one.size} MB to download"
        say(one.model)
        say(f"    {one.licence}; {place}; {one.source}")
