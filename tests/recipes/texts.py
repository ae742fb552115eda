"""The files of the recipes in the package, as they are written."""

from __future__ import annotations

from pathlib import Path

from lexiseg import recipes


def recipe_text(name: str) -> str:
    """The text of the file that a packaged recipe is in; its variant may be named."""
    folder = Path(recipes.__file__).parent
    return next(folder.rglob(f"{name.partition(':')[0]}.yaml")).read_text("utf-8")
