"""Files of the Hugging Face hub, and the error messages if it cannot be reached."""

import re
import ssl
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import huggingface_hub  # which imports what is asked of it when it is: most runs need no hub
from huggingface_hub import constants

from lexiseg.errors import LexisegError
from lexiseg.words import first_line, shorten

_TIMEOUT_SECONDS = 5.0
GIVE_FOLDER = "give the folder with all its files instead of the name"
INTO_CACHE = "put the whole repository into the hub's cache folder"
"""What to do with files that were fetched elsewhere; the second where no option takes their place."""


def cached(repository: str, filenames: tuple[str, ...]) -> Path | None:
    """The first of ``filenames`` that the local cache has of a hub repository; None if it has none. It asks no server.

    Raises LexisegError if no repository could be called so.
    """
    from huggingface_hub.errors import HFValidationError

    try:
        paths = [huggingface_hub.try_to_load_from_cache(repository, filename) for filename in filenames]
    except HFValidationError as error:
        raise LexisegError(
            f"'{shorten(repository)}' is neither on this machine nor a valid hub repository name; check the name."
        ) from error
    return next((Path(path) for path in paths if isinstance(path, str)), None)


def download(repository: str, filenames: tuple[str, ...], name: str, *, then: str = GIVE_FOLDER) -> Path:
    """Fetch the first of ``filenames`` that a hub repository has; a cached copy is used without asking the hub.

    ``repository``: ``owner/name``. ``name``: what the user asked for, for messages. ``then``: what the user is to do
    once the file is here. Raises LexisegError if the hub is out of reach, the repository is not there, or it has none
    of the files.
    """
    found = cached(repository, filenames)
    if found is not None:
        return found
    advice = (
        f"fetch {filenames[0]} from {constants.ENDPOINT}/{repository} on a machine with a connection, copy it here "
        f"and {then}"
    )
    if reason := unreachable():
        raise LexisegError(
            f"Cannot download '{name}': {constants.ENDPOINT} cannot be reached ({reason}); fix that, or {advice}."
        )
    from huggingface_hub.errors import EntryNotFoundError

    with _explained(repository, name, advice):
        for filename in filenames:
            with suppress(EntryNotFoundError):
                return Path(huggingface_hub.hf_hub_download(repository, filename))
    raise LexisegError(f"The hub repository '{repository}' has no {' or '.join(filenames)}; choose another one.")


def download_folder(repository: str, name: str, beside: str = "*token*", *, then: str = GIVE_FOLDER) -> Path:
    """Fetch a whole model of a hub repository: its settings, tokenizer and safetensors, and nothing that is a pickle.

    ``repository``: ``owner/name``. ``name``: what the user asked for, for messages. ``beside``: the pattern of a file
    that the model needs beside its weights. ``then``: as in `download`. Raises LexisegError as that does; or only a
    part of it is here and the rest cannot be had.
    """
    if not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", repository):
        raise LexisegError(f"'{repository}' is neither a folder nor OWNER/NAME on the hub; check the name.")
    folder = download(repository, ("config.json",), name, then=then).parent
    if any(folder.glob("*.safetensors")) and any(folder.glob(beside)):
        return folder
    advice = f"fetch {repository} on a machine with a connection, copy it here and {then}"
    if reason := unreachable():
        raise LexisegError(f"Only a part of '{name}' is on this machine ({reason}); {advice}.")
    with _explained(repository, name, advice):
        kept = ["*.json", "*.safetensors", "*.model", "*.txt"]
        return Path(huggingface_hub.snapshot_download(repository, allow_patterns=kept))


@contextmanager
def _explained(repository: str, name: str, advice: str) -> Iterator[None]:
    """Turn what the hub's client raises into a sentence."""
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError

    try:
        yield
    except GatedRepoError as error:
        raise LexisegError(
            f"'{name}' is gated: accept its licence at {constants.ENDPOINT}/{repository}, log in with `hf auth login`, "
            "and run again."
        ) from error
    except RepositoryNotFoundError as error:
        raise LexisegError(
            f"The hub has no repository '{repository}' that you may read; check the name, or log in with "
            "`hf auth login` if it is private."
        ) from error
    except (*HfHubHTTPError.__bases__, OSError, ValueError) as error:  # type: ignore[misc]  # a broken connection is of its base
        raise LexisegError(
            f"Downloading '{name}' from the hub failed ({first_line(error)}); try again later, or {advice}."
        ) from error


def unreachable() -> str | None:
    """Why nothing can be fetched from the hub now, or None; the client would retry for most of a minute to find out."""
    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    request = urllib.request.Request(constants.ENDPOINT, method="HEAD")
    try:
        with urllib.request.urlopen(request, timeout=_TIMEOUT_SECONDS):
            return None
    except urllib.error.HTTPError:
        return None
    except OSError as error:
        reason = error.reason if isinstance(error, urllib.error.URLError) else error
        # What is wrong with a certificate, the client says.
        return first_line(reason) if isinstance(reason, OSError) and not isinstance(reason, ssl.SSLError) else None
