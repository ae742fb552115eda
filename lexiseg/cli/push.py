"""``lexiseg push``: a model folder on the Hugging Face hub."""

from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from lexiseg.cli.console import say, waiting


def push(
    folder: Annotated[Path, Argument(metavar="FOLDER", help="A model or a run that train or convert wrote.")],
    repository: Annotated[str, Argument(metavar="OWNER/NAME", help="Repository on the hub.")],
    private: Annotated[bool, Option("--private", help="Make the repository private.")] = False,
    card: Annotated[bool, Option("--card", help="Print the model card and upload nothing.")] = False,
) -> None:
    """Upload a model folder to the Hugging Face hub, with a card made from its run.

    The token comes from HF_TOKEN or `hf auth login`.
    """
    from lexiseg.weights.publish import model_card, push_folder

    if card:
        for line in model_card(folder, repository).splitlines():
            say(line)
        return
    with waiting(f"uploading {folder}"):
        address = push_folder(folder, repository, private=private)
    say(f"it is at {address}")
