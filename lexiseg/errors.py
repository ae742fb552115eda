"""What lexiseg raises: the user can fix this; and what it warns of: this is probably not what you meant."""

import importlib
import warnings
from typing import Any


class LexisegError(Exception):
    """A mistake the user can fix, said in one sentence: what is wrong, where, and what to do.

    The command line prints the sentence without a traceback and exits with code 2; in Python it is an ordinary
    exception, so that a script can catch it.
    """


def need(module: str, what: str, extra: str) -> Any:
    """A library of one of lexiseg's extras. Raises LexisegError if it is not there; ``what`` begins the sentence."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise LexisegError(f"{what}; install it with pip install 'lexiseg[{extra}]'.") from error


class LexisegWarning(UserWarning):
    """A result that is probably not what the user meant, said in one sentence with what to do.

    The command line prints each distinct sentence once, as ``note: ...`` on stderr; ``--quiet`` silences it. In Python
    it is an ordinary warning, so that ``warnings.simplefilter("ignore", LexisegWarning)`` silences it.
    """


def warn(sentence: str, stacklevel: int = 2) -> None:
    """Warn of a result with a `LexisegWarning`; ``stacklevel`` as for ``warnings.warn``."""
    warnings.warn(sentence, LexisegWarning, stacklevel + 1)


class DataSetError(LexisegError):
    """What keeps a whole split from being listed (a folder, a class list, a file of annotations), or a label's form.

    ``kind``: that of the `lexiseg.data.sets.dataset.Finding` it amounts to.
    """

    def __init__(self, problem: str, kind: str = "missing-folder") -> None:
        super().__init__(problem)
        self.kind = kind
