"""What others depend on: the package's metadata, its pages, and the page of models."""

from __future__ import annotations

import inspect
from importlib import import_module
from importlib.metadata import metadata
from pathlib import Path
from types import FunctionType

import pytest
import yaml

import lexiseg
from scripts.model_page import PAGE, page

ROOT = Path(__file__).parents[1]


def test_the_package_is_typed_and_says_whose_it_is() -> None:
    about = metadata("lexiseg")
    assert (Path(lexiseg.__file__).parent / "py.typed").is_file()
    urls = {value.split(",")[0] for value in about.get_all("Project-URL") or ()}
    assert {"Source", "Issues", "Changelog", "Documentation"} <= urls
    assert about["Author"] and "Typing :: Typed" in (about.get_all("Classifier") or ())
    assert about["Version"] == lexiseg.__version__
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == lexiseg.__version__


def test_the_page_of_models_is_that_of_the_packaged_weights() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(), "run python -m scripts.model_page"


@pytest.mark.parametrize("part", ["clip", "models", "proposals", "scores"])
def test_public_methods_are_described_here_or_by_what_they_override(part: str) -> None:
    """In these folders ruff does not ask, since it asks of overriding methods too."""
    kinds = property | classmethod | staticmethod | FunctionType
    missing = []
    for path in sorted((Path(lexiseg.__file__).parent / part).glob("[!_]*.py")):
        for owner in vars(import_module(f"lexiseg.{part}.{path.stem}")).values():
            if inspect.isclass(owner) and owner.__module__.startswith("lexiseg."):
                public = [name for name in vars(owner) if not name.startswith("_")]
                methods = [name for name in public if isinstance(vars(owner)[name], kinds)]
                missing += [
                    f"{owner.__qualname__}.{name}" for name in methods if not inspect.getdoc(getattr(owner, name))
                ]
    assert not missing
