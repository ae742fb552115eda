"""Recipes: the shipped ones are right, and every mistake is one sentence that names the key and the file."""

from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from lexiseg.errors import LexisegError
from lexiseg.recipes import (
    CatalogData,
    SegmentationRecipe,
    as_yaml,
    describe_recipes,
    list_recipes,
    load_recipe,
    parse_recipe,
)
from lexiseg.training.init import system_of
from lexiseg.windows import WindowPolicy
from tests.recipes.texts import recipe_text

TINY = recipe_text("tiny")
EXCLUSIVE = {"mask_loss": "cross-entropy", "mask_weight": 1.0, "dice_weight": 0.0}
FOLDER = {"source": "own", "root": "data/voc", "synonyms": True}


@pytest.mark.parametrize("name", list_recipes())
def test_shipped_recipes_are_right(name):
    recipe = load_recipe(name)
    assert recipe.description
    if isinstance(recipe, SegmentationRecipe):
        system, options = system_of(recipe)
        assert type(options) is system.options_class
    assert parse_recipe(as_yaml(recipe), "again") == recipe


def test_the_promised_recipes_are_there():
    promised = {"tiny", "zegclip-picture-world", "zegclip-picture-world-no-descriptor"}
    promised |= {"clip-fixed-picture-world", "clip-finetune-picture-world"}
    assert promised <= set(list_recipes())


def test_the_ablations_differ_in_the_model_only():
    main = load_recipe("zegclip-picture-world")
    options = main.model.options
    for name, changed in {
        "zegclip-picture-world-no-descriptor": {"descriptor": False},
        "zegclip-picture-world-no-prompts": {"backbone": "fixed"},
        "zegclip-picture-world-exclusive": EXCLUSIVE,
        "zegclip-picture-world-prompts": {**EXCLUSIVE, "descriptor": False},
        "clip-fixed-picture-world-exclusive": {**EXCLUSIVE, "backbone": "fixed", "descriptor": False},
        "clip-finetune-picture-world-exclusive": {**EXCLUSIVE, "backbone": "finetune", "descriptor": False},
        "clip-fixed-picture-world": {"backbone": "fixed", "descriptor": False},
        "clip-finetune-picture-world": {"backbone": "finetune", "descriptor": False},
    }.items():
        other = load_recipe(name)
        assert other.data == main.data and other.evaluation == main.evaluation and other.templates == main.templates
        assert other.train.model_dump(exclude={"multipliers"}) == main.train.model_dump(exclude={"multipliers"})
        assert {**options, **changed} == {**options, **other.model.options}


def test_seed_and_file(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(TINY)
    assert load_recipe(path, seed=7).train.seed == 7 and load_recipe(str(path)).train.seed == 0
    with pytest.raises(LexisegError, match="input should be less than"):  # more than torch takes
        load_recipe(path, seed=2**64)


def test_folder_data():
    content = {**yaml.safe_load(TINY), "data": FOLDER}
    recipe = parse_recipe(yaml.safe_dump(content), "x")
    assert isinstance(recipe.data, CatalogData) and recipe.data.crop == 512


@pytest.mark.parametrize(
    ("before", "after", "words"),
    [
        ("val_size", "val_siz", "unknown key 'data.val_siz'; did you mean 'val_size'?"),
        ("  lr:", "  learning_rate: 1\n  lr:", "unknown key 'train.learning_rate'; the keys there are steps,"),
        ("clip: ", "clipp: ", "unknown key 'model.clipp'; did you mean 'clip'?"),
        (
            "  steps: 4",
            "  steps: 4\n  multipliers: {head: {lrr: 2}}",
            "'train.multipliers.head.lrr'; did you mean 'lr'",
        ),
        ("description:", "descripton:", "unknown key 'descripton'; did you mean 'description'?"),
        ("steps: 4", "steps: -4", "wrong value for 'train.steps'"),
        ("  steps: 4\n", "", "lacks the key 'train.steps'"),
        ("lr: 1.0e-3", "lr: fast", "wrong value for 'train.lr'"),
        ("lr: 1.0e-3", "lr: 1.0e-3\n  betas: [0.9, 1.5]", "train.betas.1': input should be less than 1"),
        ("templates: single", "templates: 3", "wrong value for 'templates'"),
        ("source: picture-world", "source: moon", "wrong value for 'data'"),
        (
            "kind: segmentation",
            "kind: sculpture",
            "needs 'kind', one of contrastive, evaluation, prompts, segmentation",
        ),
        ("  size: 64", "  size: 64\n  size: 3", "the key 'size' is given twice"),
        ("train:", "train: [", "not valid YAML in line"),
        ("model:", "? [1]\n: 2\nmodel:", "not valid YAML"),
        ("steps: 4", "steps: !!python/object/apply:os.getcwd []", "not valid YAML"),
    ],
)
def test_mistakes(before, after, words):
    assert before in TINY
    with pytest.raises(LexisegError) as caught:
        parse_recipe(TINY.replace(before, after, 1), "mine.yaml")
    assert words in str(caught.value) and "'mine.yaml'" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_unknown_name_and_unreadable_file(tmp_path):
    with pytest.raises(LexisegError, match="did you mean 'zegclip-picture-world"):
        load_recipe("zegclip-picture-word")
    (tmp_path / "x.yaml").write_bytes(b"\xff\xfe\x00")
    for path in (tmp_path / "x.yaml", tmp_path, "a\x00b"):
        with pytest.raises(LexisegError):
            load_recipe(path)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_any_text_is_a_recipe_or_a_sentence(data):
    position = data.draw(st.integers(0, len(TINY)))
    length = data.draw(st.integers(0, 30))
    text = TINY[:position] + data.draw(st.text(max_size=12)) + TINY[position + length :]
    try:
        parse_recipe(text, "x.yaml")
    except LexisegError as error:
        assert "x.yaml" in str(error)


@pytest.mark.parametrize(
    "text", ["", "- 1", "3", "null", "[" * 200, "a: &a [*a]", "kind: segmentation", "2020-99-99: 1"]
)
def test_odd_documents(text):
    with pytest.raises(LexisegError, match=r"x\.yaml"):
        parse_recipe(text, "x.yaml")


def test_the_window_of_an_evaluation():
    def window(**values):
        data = {"source": "picture-world"}
        return parse_recipe(yaml.safe_dump({"kind": "evaluation", "data": data, "window": values}), "x.yaml").window

    assert window(size=64) == WindowPolicy(64, 64) and window() == WindowPolicy()
    given = {"size": 512, "stride": 426, "short_side": 512, "long_side": 2048, "antialias": False}
    assert window(**given) == WindowPolicy(**given)
    for wrong, words in (
        ({"long_side": 640}, "'long_side' limits the resize"),
        ({"size": 8, "stride": 9}, "a stride of 9 leaves gaps"),
        ({"size": 0}, "sides must be from 1 to 65536 pixels"),
        ({"sise": 8}, "unknown key 'window.sise'; did you mean 'size'"),
    ):
        with pytest.raises(LexisegError, match=words):
            window(**wrong)


def test_the_list_of_recipes_is_what_the_files_say():
    assert describe_recipes() == {name: load_recipe(name).description for name in list_recipes()}
    names = {path.stem for path in Path("lexiseg/recipes").rglob("*.yaml")}
    assert {name.partition(":")[0] for name in list_recipes()} == names


def test_overrides_by_mapping_and_by_text():
    given = load_recipe("tiny", {"train.steps": 7, "model.options.num_prompts": 2})
    assert given == load_recipe("tiny", ["train.steps=7", "model.options.num_prompts=2"])
    assert given.train.steps == 7 and load_recipe("tiny").train.steps == 4
    for text, steps in (("1e3", 1000), ("1.5e+3", 1500), ("1.0e+3", 1000)):
        assert load_recipe("tiny", [f"train.steps={text}"]).train.steps == steps
