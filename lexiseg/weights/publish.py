"""Model folders for other people: a card made of what the run says, and the way to the Hugging Face hub."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lexiseg.catalog import clip_config, packaged_clips
from lexiseg.errors import LexisegError
from lexiseg.files import is_folder, read_json, write_text
from lexiseg.weights.folder import read_config
from lexiseg.words import first_line, printable

CARD = "README.md"
_DRAWINGS = {
    "picture-world": "Apache-2.0; trained on drawings of Noto Color Emoji (SIL OFL 1.1).",
    "picture-world-2": "Apache-2.0; trained on drawings of Noto Emoji (Apache-2.0) and Fluent Emoji (MIT).",
}
REPORT = "report.json"
"""What ``lexiseg evaluate -o FOLDER`` writes; beside a model, its metrics go into the card."""


def model_card(folder: str | Path, repository: str = "OWNER/NAME") -> str:
    """The card of a model folder: what it is, how it was trained, what was measured, licence, how to use it.

    ``folder``: that `lexiseg.weights.folder.save_model` wrote, or a run's; a ``report.json`` of an evaluation in either
    gives metrics. Raises LexisegError if it is not a whole model folder.
    """
    given, folder = Path(folder), _model_of(folder)
    config = read_config(folder)
    about, clip = config.get("metadata", {}), config["clip"]
    tower = str(clip.get("name", "unknown"))
    card = Path(__file__).with_name("model_card.md").read_text("utf-8")
    return card.format(
        title=printable(str(about.get("description") or config["system"])),
        system=config["system"],
        tower=printable(tower),
        repository=repository,
        training="\n".join(_training(config, about)),
        measured="\n".join(_measured(folder / REPORT if (folder / REPORT).is_file() else given / REPORT)),
        licence=_licence(clip),
    )


def _model_of(folder: str | Path) -> Path:
    """The model's folder, also where the folder of its training is given."""
    model = Path(folder, "model")
    return model if is_folder(model) else Path(folder)


def _training(config: dict[str, Any], about: dict[str, Any]) -> list[str]:
    facts = {
        "data": _mapping(about.get("data")).get("source"),
        "setting": about.get("setting"),
        "steps": about.get("steps"),
        "batch size": about.get("batch_size"),
        "seed": about.get("seed"),
        "converted from": about.get("source"),
        "classes with masks": len(config.get("seen_names") or ()) or None,
    }
    return [f"- {name}: {printable(str(value))}" for name, value in facts.items() if value is not None] or [
        "The folder has no record of its training."
    ]


def _measured(path: Path) -> list[str]:
    if not path.is_file():
        return [f"There is no evaluation in this folder; `lexiseg evaluate ... -o FOLDER` writes a `{REPORT}`."]
    report = read_json(path)
    metrics = _mapping(report.get("metrics"))
    rows = [(name, value) for name, value in metrics.items() if isinstance(value, int | float) and name != "seconds"]
    about = _mapping(report.get("protocol"))
    where = f"On `{printable(str(about.get('dataset')))}`, {printable(str(about.get('split')))}"
    if protocol := _mapping(about.get("protocol")):
        where += f", by the protocol `{printable(str(protocol.get('name')))}`"
    return [
        f"{where}:",
        "",
        "| metric | value |",
        "|---|---|",
        *(f"| {printable(name)} | {value:g} |" for name, value in rows),
    ]


def _mapping(value: Any) -> Mapping[str, Any]:
    """What a file that somebody may have edited holds, if it is a mapping."""
    return value if isinstance(value, Mapping) else {}


def _licence(clip: Mapping[str, Any]) -> str:
    from lexiseg.weights.auto import known_weights

    tower = str(clip.get("name"))
    for one in known_weights():
        if one.name.partition("+")[0] == tower:
            return f"{one.licence} ({one.source})."
    config = _mapping(clip.get("architecture")) or (clip_config(tower) if tower in packaged_clips() else {})
    unknown = "their licence is unknown to lexiseg; check their source."
    return _DRAWINGS.get(str(config.get("trained_on")), unknown)


def push_folder(folder: str | Path, repository: str, *, private: bool = False) -> str:
    """Put a model folder on the Hugging Face hub, with a card if it has none.

    The token comes from ``HF_TOKEN`` or ``hf auth login``, never from an argument.

    ``repository``: ``owner/name``; made if it is not there. Returns where it is. Raises LexisegError if it is not a
    model folder, there is no token, or the hub refuses.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError

    folder = _model_of(folder)
    card = model_card(folder, repository)
    if not (folder / CARD).is_file():
        write_text(folder / CARD, card)
    api = HfApi()
    try:
        api.create_repo(repository, private=private, exist_ok=True)
        patterns = ["config.json", "*.safetensors", CARD, REPORT]
        api.upload_folder(
            repo_id=repository, folder_path=folder, allow_patterns=patterns, commit_message="lexiseg model"
        )
    except LocalTokenNotFoundError as error:
        raise LexisegError("No hub token was found; set HF_TOKEN or run 'hf auth login'.") from error
    except HFValidationError as error:
        raise LexisegError(f"'{printable(repository)}' is not a valid repository name; write OWNER/NAME.") from error
    except (*HfHubHTTPError.__bases__, OSError) as error:  # type: ignore[misc]  # a broken connection is of its base
        raise LexisegError(
            f"'{printable(repository)}' cannot be uploaded ({first_line(error)}); check the connection, the name and "
            "the token in HF_TOKEN, then try again."
        ) from error
    return f"{api.endpoint}/{repository}"
