"""What has another name now is read under its old one, with a note; models' options are in tests/weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from lexiseg.cli import main
from lexiseg.clip.model import save_clip
from lexiseg.data.picture_world import write_voc
from lexiseg.errors import LexisegWarning
from lexiseg.recipes import load_recipe
from lexiseg.renames import RENAMED_ARGUMENTS, RENAMED_OPTIONS, renamed_arguments
from lexiseg.vocabulary import Vocabulary
from lexiseg.weights.runs import STATE, find_checkpoints, read_state, seal
from tests.towers import small_clip
from tests.training.runs import quietly, recipe_of


def test_a_recipe_under_old_names_is_the_same(tmp_path: Path) -> None:
    old = {"cut": 512, "longest": None, "short_sides": [500]}  # null takes the base's away
    new = {"top_left_crop": 512, "max_size": None, "short_edge_length": [500]}
    for name, data in (("old", old), ("new", new)):
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump({"base": "deop-voc2012", "data": data}))
    expected = load_recipe(tmp_path / "new.yaml")
    with pytest.warns(LexisegWarning, match=r"old\.yaml' has old names .*'data\.cut' is 'data\.top_left_crop'"):
        assert load_recipe(tmp_path / "old.yaml") == expected
    variants = {"base": "deop-voc2012", "data": new, "variants": {"small": {"data": {"cut": 256}}}}
    (tmp_path / "several.yaml").write_text(yaml.safe_dump(variants))
    with pytest.warns(LexisegWarning, match=r"several\.yaml' has old names"):
        assert load_recipe(f"{tmp_path / 'several.yaml'}:small").data.top_left_crop == 256
    for overrides in (["data.cut=128", "evaluation.scored=7"], {"data.cut": 128, "evaluation.scored": 7}):
        with pytest.warns(LexisegWarning, match=r"'evaluation\.scored' is 'evaluation\.num_samples'"):
            recipe = load_recipe(tmp_path / "new.yaml", overrides)
        assert (recipe.data.top_left_crop, recipe.evaluation.num_samples) == (128, 7)
    for section in (["evaluation={scored: 7}"], {"evaluation": {"scored": 7}}):
        with pytest.warns(LexisegWarning, match=r"with --set' has old names .*'evaluation\.scored'"):
            assert load_recipe("tiny", section).evaluation.num_samples == 7


def test_a_run_under_old_names_goes_on(tmp_path: Path) -> None:
    save_clip(small_clip(), tmp_path / "clip")
    write_voc(tmp_path / "data", num_train=2, num_val=1, size=32)
    data = {"source": "own", "root": str(tmp_path / "data"), "augment": "short-edge", "crop": 32}
    recipe = recipe_of(tmp_path / "clip", data=data | {"short_edge_length": [40], "max_size": 64, "top_left_crop": 24})
    quietly(recipe, tmp_path / "run", stop_after=2)
    (checkpoint,) = find_checkpoints(tmp_path / "run/checkpoints")
    state = read_state(checkpoint)
    before = {str(new): old for old, new in RENAMED_OPTIONS["recipe"].items()}
    renamed = {before.get(key, key): value for key, value in state["settings"].items()}
    assert renamed.keys() >= {"data.cut", "data.longest", "data.short_sides"}
    (checkpoint / STATE).unlink()
    seal(checkpoint, state | {"settings": renamed})
    assert quietly(recipe, tmp_path / "run", resume=True).is_dir()


def test_arguments_and_methods_under_old_names(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "tiny", "--until=0"]) == 2
    assert "--until is --stop-after" in (said := capsys.readouterr().err) and "--stop-after" in said.splitlines()[-1]
    for old, new in RENAMED_ARGUMENTS.items():
        with pytest.warns(LexisegWarning, match=f"{old} is {new}"):
            assert renamed_arguments(["draw", old, "1"]) == ["draw", new, "1"]
    words = Vocabulary.parse("cat; dog")
    with pytest.warns(LexisegWarning, match="'spoken' is an old name.*it is 'with_placeholders'"):
        assert words.spoken() == words
