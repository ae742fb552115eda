"""The error of a split that cannot be listed at all."""

from __future__ import annotations

from lexiseg.errors import LexisegError


class DataSetError(LexisegError):
    """What keeps a whole split from being listed: a folder, a class list, or a file of annotations.

    ``kind``: of the finding it amounts to; see :class:`lexiseg.data.sets.dataset.Finding`.
    """

    def __init__(self, problem: str, kind: str = "missing-folder") -> None:
        super().__init__(problem)
        self.kind = kind
