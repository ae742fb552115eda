"""What others depend on: the package's metadata, its pages, and the page of models."""

from __future__ import annotations

from importlib.metadata import metadata
from pathlib import Path

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
