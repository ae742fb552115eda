"""The recipes against a table of the numbers that the papers print (papers.yaml)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from lexiseg.recipes import load_recipe
from lexiseg.training.init import system_of
from tests.recipes.texts import recipe_text

TABLE = yaml.safe_load((Path(__file__).parent / "papers.yaml").read_text(encoding="utf-8"))
ROWS = [(entry, recipe) for entry in TABLE for recipe in entry["recipes"]]


def look_up(name: str, key: str) -> Any:
    """A value of a recipe, the defaults of its system's options included."""
    recipe = load_recipe(name)
    values = recipe.model_dump(mode="json")
    values["model"]["options"] = system_of(recipe)[1].model_dump(mode="json")
    for part in key.split("."):
        values = values[part]
    return values


@pytest.mark.parametrize(("entry", "recipe"), ROWS, ids=[f"{entry['source'][:14]}-{recipe}" for entry, recipe in ROWS])
def test_the_recipe_has_the_papers_numbers(entry: dict[str, Any], recipe: str) -> None:
    departs = entry.get("departs", {}).get(recipe, {})
    for key, value in entry.get("values", {}).items():
        assert look_up(recipe, key) == departs.get(key, {}).get("value", value), f"{key}: {entry['source']}"
    text = " ".join(recipe_text(recipe).replace("#", " ").split())
    for key, departure in departs.items():
        assert departure["said"] in text, f"{recipe} does not say that {key} departs from {entry['source']}"
    if "same" in entry:
        other = entry["same"]["as"][entry["recipes"].index(recipe)]
        for key in entry["same"]["keys"]:
            assert look_up(recipe, key) == look_up(other, key), f"{key}: {entry['source']}"
