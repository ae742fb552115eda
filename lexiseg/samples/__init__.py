"""Sample pictures that the package carries, drawn by its own generator: what ``make demo`` and ``doctor`` segment."""

from pathlib import Path

from lexiseg.errors import LexisegError

_SUFFIXES = {".png", ".jpg"}


def list_samples() -> list[str]:
    """Return the names of the sample pictures, in order, without their suffix."""
    return sorted(path.stem for path in _FOLDER.iterdir() if path.suffix in _SUFFIXES)


def sample_path(name: str) -> Path:
    """Return the path of the sample picture ``name``.

    Raises LexisegError if there is no such sample; the message lists those there are.
    """
    for path in sorted(_FOLDER.iterdir()):
        if path.suffix in _SUFFIXES and path.stem == name:
            return path
    raise LexisegError(f"There is no sample picture '{name}'; choose one of: {', '.join(list_samples())}.")


def sample_classes(name: str) -> Path:
    """Return the path of the text file with the classes to look for in the sample ``name``, one per line."""
    return sample_path(name).with_suffix(".txt")


_FOLDER = Path(__file__).parent
