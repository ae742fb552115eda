"""Writing files so that a reader never sees half of one."""

import errno
import json
import os
import re
import tempfile
import unicodedata
import uuid
from collections.abc import Generator, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from lexiseg.errors import LexisegError
from lexiseg.words import kind, shorten

# Read once: the process's mask can only be read by setting it, which is no thing to do while threads write files.
_UMASK = os.umask(0)
os.umask(_UMASK)


def default_cache_folder() -> Path:
    """Where text embeddings are kept: ``$LEXISEG_CACHE``, or ``~/.cache/lexiseg``."""
    given = os.environ.get("LEXISEG_CACHE")
    return Path(given) if given else Path.home() / ".cache" / "lexiseg"


def as_path(value: object, what: str) -> Path:
    """A path of text or of a path object. Raises LexisegError if it is something else; ``what`` begins the sentence."""
    if not isinstance(value, str | os.PathLike) or isinstance(os.fspath(value), bytes):
        raise LexisegError(f"{what} must be a path, not {kind(value)}.")
    return Path(value)


def local(name: str | Path) -> Path | None:
    """The file or folder that a name is the path of; None where there is none, or no such path could be."""
    try:
        path = Path(name).expanduser()
        return path if path.exists() else None
    except (OSError, ValueError, RuntimeError):  # over-long, with a zero byte, of a user who is not there
        return None


def is_folder(name: str | Path) -> bool:
    """Whether a name is the path of a folder."""
    place = local(name)
    return place is not None and place.is_dir()


def is_full(error: OSError) -> bool:
    """Whether an error says that the disk, or the user's share of it, is full."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT)


@contextmanager
def writing(
    what: str, advice: str = "choose a place you may write to", *, full: str = "free disk space"
) -> Iterator[None]:
    """Turn an error of the disk into a sentence: "Cannot ``what`` (the reason); ``advice``, or ``full`` if it is so."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise LexisegError(f"Cannot {what} ({reason}); {full if is_full(error) else advice}.") from error


def make_folder(folder: str | Path) -> Path:
    """Create ``folder`` with its parents and return it.

    Raises LexisegError if the folder cannot be created or is a file.
    """
    folder = as_path(folder, "A folder")
    with writing(f"create the folder '{folder}'", "choose an output folder you may write to"):
        folder.mkdir(parents=True, exist_ok=True)
    return folder


@contextmanager
def new_folder(folder: str | Path) -> Iterator[Path]:
    """`make_folder` for a block; what it made is removed if the block fails and has left nothing in it."""
    folder = as_path(folder, "A folder")
    made = [place for place in (folder, *folder.parents) if not os.path.lexists(place)]
    try:
        yield make_folder(folder)
    except BaseException:
        with suppress(OSError):  # it is not empty
            for place in made:
                place.rmdir()
        raise


def spelled(path: str | Path) -> Path:
    """``path`` as the disk spells it: where there is no such name, its composed or decomposed form if that is there.

    Accented letters have two spellings (NFC and NFD) that look the same; disks, archives and keyboards differ in which
    they give.
    """
    path = Path(path)
    if not str(path).isascii() and not os.path.lexists(path):
        for form in ("NFC", "NFD"):
            other = Path(unicodedata.normalize(form, str(path)))
            if os.path.lexists(other):
                return other
    return path


@contextmanager
def utf8_path(path: Path) -> Iterator[Path]:
    """``path`` itself; where it is not UTF-8, which safetensors cannot open, a link to it for a block."""
    if _is_utf8(path):
        yield path
        return
    with tempfile.TemporaryDirectory() as folder:
        link = Path(folder, "link")
        link.symlink_to(path.absolute())
        yield link


def need_utf8(folder: Path, library: str) -> None:
    """Raise LexisegError if a folder's path is not UTF-8, and so none that ``library`` can use."""
    if not _is_utf8(folder):
        raise LexisegError(f"The folder '{folder}' is not called in UTF-8, which {library} needs; rename it.")


def _is_utf8(path: Path) -> bool:
    try:
        return bool(str(path).encode())
    except UnicodeEncodeError:
        return False


def refuse_url(text: str) -> None:
    """Say that nothing is fetched from the network. Raises LexisegError if ``text`` is a URL."""
    if re.match(r"[A-Za-z][A-Za-z0-9+.\-]+://|data:image", text):
        raise LexisegError(
            f"'{shorten(text, 100)}' is a URL, and nothing is fetched from the network; download it and give the path."
        )


@contextmanager
def atomic_write(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; on success it is renamed to ``path``, on failure it is removed.

    The temporary name keeps the suffix of ``path``, so that libraries which choose a format by it choose the same.
    Raises LexisegError if the file cannot be written (missing folder, no permission, full disk).
    """
    path = Path(path)
    temporary = path.with_name(f".{path.stem}.{uuid.uuid4().hex[:8]}.tmp{path.suffix}")
    try:
        with writing(f"write '{path}'"):
            yield temporary
            temporary.chmod(0o666 & ~_UMASK)  # some writers (safetensors) leave files that only their owner may read
            os.replace(temporary, path)
    finally:
        with suppress(OSError):
            temporary.unlink()


def write_bytes(path: str | Path, data: bytes) -> Path:
    """Write ``data`` to ``path`` atomically and return the path."""
    with atomic_write(path) as temporary:
        temporary.write_bytes(data)
    return Path(path)


def write_text(path: str | Path, text: str) -> Path:
    r"""Write ``text`` as UTF-8 to ``path`` atomically and return the path.

    What UTF-8 has no bytes for, such as the rest of a file name that is not UTF-8, is written as ``\udce9``, which
    JSON and YAML read back.
    """
    return write_bytes(path, text.encode("utf-8", "backslashreplace"))


def write_json(path: str | Path, value: Any) -> Path:
    """Write ``value`` as indented JSON to ``path`` atomically and return the path."""
    return write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_json(path: str | Path, advice: str = "copy the original again") -> dict[str, Any]:
    """The JSON object in a file.

    Raises LexisegError, which ends with ``advice``, if it is missing, damaged or holds something else.
    """
    try:
        value = json.loads(Path(path).read_text("utf-8"))
    except FileNotFoundError as error:
        raise LexisegError(f"There is no '{path}'; give the whole folder.") from error
    except (OSError, ValueError, RecursionError) as error:
        raise LexisegError(f"'{path}' is not readable JSON ({error}); {advice}.") from error
    if not isinstance(value, dict):
        raise LexisegError(f"'{path}' should hold a mapping; {advice}.")
    return value


def read_lines(path: str | Path) -> Generator[dict[str, Any], None, None]:
    """The JSON objects of a file with one per line; any other line, such as one cut short by a kill, is skipped."""
    with Path(path).open(encoding="utf-8", errors="replace", newline="\n") as file:
        for line in file:
            with suppress(ValueError, RecursionError):
                value = json.loads(line)
                if isinstance(value, dict):
                    yield value
