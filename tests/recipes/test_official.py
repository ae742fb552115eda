"""The papers' trainings as recipes: every number against a table of its own, and every model at its full size.

The table is written from the papers' training sections and from what their released code does where it says more.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import lexiseg.training.dry_run
from lexiseg.clip.load import random_clip
from lexiseg.clip.model import CLIP
from lexiseg.errors import LexisegError
from lexiseg.evaluation.protocols import find_protocol
from lexiseg.models import SYSTEMS
from lexiseg.recipes import (
    ContrastiveRecipe,
    EvaluationRecipe,
    list_recipes,
    load_recipe,
)
from lexiseg.training.dry_run import clip_or_random, dry_run
from lexiseg.training.init import first_stage, system_of
from lexiseg.training.trainer import learning_rate
from tests.recipes.texts import recipe_of, recipe_text
from tests.towers import small_clip

# data: source, classes, seen classes, steps of a whole training, templates, folder of the recipes
DATA: dict[str, tuple[str, int, int, int, str, str]] = {
    "voc2012": ("voc2012", 20, 15, 20_000, "single", "voc2012"),
    "coco-stuff": ("coco-stuff-164k", 171, 156, 80_000, "paper", "coco-stuff"),
    "pascal-context": ("pascal-context-59", 59, 49, 40_000, "paper", "pascal-context"),
}
# system: prompts a block on VOC, COCO-Stuff, Context
PROMPTS = {
    "zegclip": {"voc2012": 10, "coco-stuff": 100, "pascal-context": 35},
    "cascade-clip": {"voc2012": 10, "coco-stuff": 50, "pascal-context": 35},
    "spt-seg": {"voc2012": 10, "coco-stuff": 100, "pascal-context": 35},
}
SETTINGS = {"": "inductive", "-transductive": "transductive", "-supervised": "supervised"}
OFFICIAL = [
    (f"{system}-{data}{suffix}", system, data, setting)
    for system in PROMPTS
    for data in DATA
    for suffix, setting in SETTINGS.items()
]
RELEASED = {
    *("zegclip-voc2012", "zegclip-voc2012-transductive", "zegclip-voc2012-supervised"),
    *("zegclip-coco-stuff", "zegclip-coco-stuff-transductive", "zegclip-coco-stuff-supervised"),
    *("cascade-clip-voc2012", "cascade-clip-voc2012-transductive"),
    *("cascade-clip-coco-stuff", "cascade-clip-coco-stuff-transductive"),
}
# All parameters and those that train, counted in the authors' own models at 512 x 512, and how many of them stand in
# parts of the decoders that no computation uses, which are left out here.
AUTHORS = {
    "zegclip-coco-stuff": (164_907_264, 14_650_624, 3_154_944 + 2_627_072),
    "zegclip-voc2012": (164_077_824, 13_821_184, 3_154_944 + 2_627_072),
    "cascade-clip-coco-stuff": (193_088_774, 40_463_622, 9_464_832 + 7_881_216),
    "cascade-clip-voc2012": (192_720_134, 40_094_982, 9_464_832 + 7_881_216),
    "cascade-clip-pascal-context": (192_950_534, 40_325_382, 9_464_832 + 7_881_216),
}
# Their position table has 32 x 32 rows for patches, ours the tower's own 14 x 14; only ours keeps CLIP's logit scale.
FEWER_POSITIONS = (32 * 32 - 14 * 14) * 768
LOGIT_SCALE = 1


@pytest.mark.parametrize(("name", "system", "data", "setting"), OFFICIAL)
def test_numbers(name: str, system: str, data: str, setting: str) -> None:
    recipe = recipe_of(name)
    source, classes, seen, steps, templates, _ = DATA[data]
    half = setting == "transductive"
    assert (recipe.model.system, recipe.setting, recipe.model.clip) == (system, setting, "ViT-B-16/openai")
    assert (recipe.data.source, recipe.templates) == (source, templates)
    assert recipe.data.crop == 512 and recipe.data.augment == "paper" and recipe.data.label_stride == 1

    train = recipe.train
    batch = 32 if name == "cascade-clip-voc2012-transductive" else 16
    assert (train.steps, train.batch_size, train.accumulate) == (steps // 2 if half else steps, batch, 1)
    assert (train.lr, train.weight_decay, train.betas) == (2e-4, 0.01, (0.9, 0.999))
    assert (train.schedule, train.power, train.min_lr) == ("poly", 0.9, 1e-6)
    assert (train.warmup_steps, train.warmup_ratio) == (1500, 1e-6)
    assert (train.multipliers, train.clip_norm, train.precision) == ({}, None, "fp32")
    assert train.checkpoint_every == train.steps // 10
    assert learning_rate(1500, train.lr, train) == pytest.approx(
        (2e-4 - 1e-6) * (1 - 1500 / train.steps) ** 0.9 + 1e-6, rel=1e-12
    )

    _, options = system_of(recipe)
    values: dict[str, Any] = options.model_dump()
    expected = {
        "num_prompts": PROMPTS[system][data],
        "prompt_depth": None,
        "prompt_dropout": 0.1,
        "descriptor": True,
        "decoder_layers": 3,
        "decoder_heads": 8,
        "ffn_ratio": 4.0,
        "dropout": 0.1,
        "init": "random",
        "class_embedding_twice": True,
        "position_interpolation": "bilinear",
        "seen_offset": 0.0 if half else 0.1,
        "mask_size": 512,
        "mask_weight": 100.0,
        "dice_weight": 1.0,
        "window_size": 512,
        "window_stride": 426,
        "short_side": 512,
        "antialias": False,
    }
    if system == "zegclip":
        expected |= {"backbone": "prompt"}
    elif system == "cascade-clip":
        expected |= {"base": "zegclip", "groups": "{6-8},{9-11},{12}", "aggregation": "nga", "sigma": 1.0}
        expected |= {"text_projection": "independent", "level_projection": "released"}
    else:
        expected |= {"filter_blocks": 2, "filter_grid": 32, "train_filter": True}
    assert {key: values[key] for key in expected} == expected
    assert values["mean"] == pytest.approx([123.675 / 255, 116.28 / 255, 103.53 / 255])
    assert values["std"] == pytest.approx([58.395 / 255, 57.12 / 255, 57.375 / 255])

    vocabulary = recipe.data.vocabulary()
    assert len(vocabulary) == classes and sum(entry.seen is True for entry in vocabulary.classes) == seen
    if half:
        assert (recipe.initial, recipe.initial_steps) == (name.removesuffix("-transductive"), steps // 2)
        first = first_stage(recipe)
        assert first.setting == "inductive" and first.train.steps == steps and first.data == recipe.data
    else:
        assert recipe.initial is None and recipe.initial_steps is None


@pytest.mark.parametrize(("name", "system", "data", "setting"), OFFICIAL)
def test_the_first_line_says_whose_numbers_they_are(name: str, system: str, data: str, setting: str) -> None:
    text = recipe_text(name)
    assert text.startswith("# As released by" if name in RELEASED else "# Not released by")
    path = Path(lexiseg.__file__).parent / "recipes" / DATA[data][-1] / f"{name}.yaml"
    assert path.read_text() == text and max(len(line) for line in text.splitlines()) <= 120


CONTEXT = ("-pascal-context", "-pascal-context-transductive")
CASCADE = "{6-8},{9-11},{12}"
# The rows of the papers' tables: recipe, its base, the option that a row changes, and the values in the rows' order.
TABLES: list[tuple[str, str, str, list[Any]]] = [
    ("cascade-table-4-coco-stuff", "cascade-clip-coco-stuff", "groups", ["{12}", "{8},{11},{12}", CASCADE]),
    ("cascade-table-5-coco-stuff", "cascade-clip-coco-stuff", "groups",
     ["{4-6},{7-9},{10-12}", "{6-8},{9-10},{11-12}", CASCADE]),
    ("cascade-table-6-coco-stuff", "cascade-clip-coco-stuff", "groups",
     ["{12}", "{9-11},{12}", CASCADE, "{3-5},{6-8},{9-11},{12}", "{8-9},{10-11},{12}", CASCADE, "{4-7},{8-11},{12}"]),
    ("cascade-table-8-coco-stuff", "cascade-clip-coco-stuff", "aggregation",
     ["concat", "self-attention", "sum", "nga-fixed", "trainable-sum", "nga"]),
    ("cascade-table-9-coco-stuff", "cascade-clip-coco-stuff", "text_projection", ["shared", "independent"]),
    ("cascade-table-14-coco-stuff", "cascade-clip-coco-stuff", "num_prompts", [35, 50, 100]),
    ("cascade-table-15-coco-stuff", "cascade-clip-coco-stuff", "groups",
     ["{9-11},{12}", "{6-8},{12}", "{6-8},{9-11}", CASCADE]),
    ("cascade-table-16-voc2012", "cascade-clip-voc2012", "sigma", [0.8, 1.0, 1.2]),
    ("cascade-table-18-voc2012", "cascade-clip-voc2012", "mask_weight", [10.0, 50.0, 100.0, 150.0]),
    ("zegclip-table-8-voc2012", "zegclip-voc2012", "prompt_depth", [0, 2, 5, 8, None, -3, -6, -9]),
    ("zegclip-figure-6-voc2012", "zegclip-voc2012", "num_prompts", [10, 35, 50, 100]),
    ("zegclip-figure-6-coco-stuff", "zegclip-coco-stuff", "num_prompts", [10, 35, 50, 100]),
    ("zegclip-figure-6-pascal-context", "zegclip-pascal-context", "num_prompts", [10, 35, 50, 100]),
]  # fmt: skip
# Those whose rows change more than one option, and how many rows there are.
OTHERS = {
    "cascade-table-1-coco-stuff": 3, "cascade-table-1-voc2012": 3, "cascade-table-7-coco-stuff": 3,
    "cascade-table-10-coco-stuff": 4, "cascade-table-10-voc2012": 4,
    "cascade-equation-4-coco-stuff": 3, "cascade-equation-4-voc2012": 3,
    "zegclip-table-9-coco-stuff": 2, "zegclip-table-9-pascal-context": 2,
}  # fmt: skip


VARIANTS: dict[str, list[str]] = {}
for _name in list_recipes():
    if _name.startswith(("cascade-table", "cascade-equation", "zegclip-table", "zegclip-figure")):
        VARIANTS.setdefault(_name.partition(":")[0], []).append(_name)


@pytest.mark.parametrize(("name", "base", "option", "values"), TABLES)
def test_a_table_changes_one_option(name: str, base: str, option: str, values: list[Any]) -> None:
    rows = [load_recipe(row) for row in VARIANTS[name]]
    whole = load_recipe(base).model_dump(exclude={"name", "description"})
    for row, value in zip(rows, values, strict=True):
        expected = {**whole, "model": {**whole["model"], "options": {**whole["model"]["options"], option: value}}}
        assert row.model_dump(exclude={"name", "description"}) == expected
        system_of(row)  # the options are those of the system


def test_every_table_is_there() -> None:
    assert {name: len(rows) for name, rows in VARIANTS.items()} == OTHERS | {row[0]: len(row[3]) for row in TABLES}
    for name in OTHERS:
        for row in VARIANTS[name]:
            system_of(load_recipe(row))
    single, multiple = (load_recipe(row).templates for row in VARIANTS["zegclip-table-9-coco-stuff"])  # type: ignore[union-attr]
    assert (single, multiple) == ("single", "paper")


def test_context_has_both_lists_of_unseen_classes() -> None:
    recipe = recipe_of("zegclip-pascal-context")
    assert recipe.data.source == "pascal-context-59"
    names = {
        which: {entry.name for entry in recipe.data.model_copy(update={"unseen": which}).vocabulary().classes
                if not entry.seen}
        for which in ("released", "papers")
    }  # fmt: skip
    assert names["papers"] == {
        *("cow", "motorbike", "sofa", "cat", "boat", "fence", "bird", "tvmonitor", "keyboard", "aeroplane")
    }
    assert names["released"] == {
        *("aeroplane", "bed", "bedclothes", "boat", "bottle", "car", "cloth", "cow", "keyboard", "plate")
    }
    lists = {name: load_recipe(name).data.unseen for name in list_recipes() if name.endswith(CONTEXT)}  # type: ignore[union-attr]
    released = {name for name, unseen in lists.items() if unseen == "released"}
    assert released == {
        "cascade-clip-released-pascal-context",
        "cascade-clip-released-pascal-context-transductive",
        "zegclip-released-split-pascal-context",
    }
    assert {lists[f"{system}-pascal-context"] for system in PROMPTS} == {"papers"}
    with pytest.raises(LexisegError, match="no list of unseen classes"):
        recipe.data.model_copy(update={"unseen": "mine"}).vocabulary()


@pytest.mark.parametrize(
    ("name", "source", "templates"),
    [("coco-to-voc2012", "voc2012", "single"), ("coco-to-pascal-context", "pascal-context-59", "paper")],
)
def test_cross_dataset_evaluation(name: str, source: str, templates: str) -> None:
    recipe = load_recipe(name)
    assert isinstance(recipe, EvaluationRecipe) and recipe.window is not None
    assert (recipe.data.source, recipe.templates, recipe.offsets) == (source, templates, "none")
    assert recipe.window == find_protocol("gzs-voc").windows["zegclip"]  # what `lexiseg evaluate --protocol` does
    assert all(entry.seen is None for entry in recipe.data.vocabulary().classes)
    with pytest.raises(LexisegError, match="only evaluates"):
        dry_run(recipe)


def test_dry_run_of_a_small_recipe() -> None:
    result = dry_run(load_recipe("tiny"))
    assert (result.system, result.setting, len(result.seen), len(result.unseen)) == ("zegclip", "inductive", 81, 17)
    assert result.random_weights is None and 0 < result.trainable < result.parameters
    assert sum(rate["parameters"] for rate in result.rates) == result.trainable
    shown = dict(result.rows())
    assert "81" in shown["classes with masks"] and "cow" in shown["classes without"] and "warm-up" in shown["schedule"]
    contrastive = load_recipe("clip-emoji")
    assert isinstance(contrastive, ContrastiveRecipe)
    clip = dry_run(contrastive)
    assert clip.starts_from == contrastive.model.initial and clip.data is None and clip.rows()


def test_templates_are_looked_at_before_the_training() -> None:
    recipe = load_recipe("tiny").model_copy(update={"templates": "nope"})
    with pytest.raises(LexisegError, match="nope"):
        dry_run(recipe)


def test_dry_run_names_the_first_stage() -> None:
    recipe = recipe_of("zegclip-picture-world-transductive")
    steps = first_stage(recipe).train.steps
    assert recipe.initial_steps == steps // 2
    assert dry_run(recipe).starts_from == f"{recipe.initial}, {steps // 2} of its {steps} steps"


def test_a_clip_that_cannot_be_had_is_random_and_an_unknown_one_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(name: str) -> CLIP:
        raise LexisegError(f"'{name}' is out of reach; check the network.")

    small = small_clip()
    monkeypatch.setattr(lexiseg.training.dry_run, "load_clip", unreachable)
    for name in ("ViT-B-61/openai", "ViT-B-16/opnai", "hf-hub:someone/something"):
        with pytest.raises(LexisegError, match="out of reach"):
            clip_or_random(name)
    monkeypatch.setattr(lexiseg.training.dry_run, "random_clip", lambda name: small)
    assert clip_or_random("ViT-B-16/openai") == (small, "'ViT-B-16/openai' is out of reach")


def test_every_model_at_its_full_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without values, which no count asks for; one CLIP serves all, for the systems keep it as it is."""
    monkeypatch.setattr(lexiseg.training.dry_run, "clip_or_random", lambda name: (clip, "it is a test"))
    with torch.device("meta"):
        clip = random_clip("ViT-B-16/openai")
        count_every_model()


def test_cat_seg_as_released(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its rates, decays and what of CLIP is tuned; see the golden case of its groups for every name."""
    with torch.device("meta"):
        monkeypatch.setattr(
            lexiseg.training.dry_run, "clip_or_random", lambda name: (random_clip(name), "it is a test")
        )
        parts = [f"finetune-coco-stuff:{part}" for part in ("full", "prompt", "frozen")]
        base, large, full, *_ = (
            dry_run(load_recipe(f"cat-seg-{name}")) for name in ("coco-stuff", "large-coco-stuff", *parts)
        )
    assert (base.setting, base.text, len(base.seen), len(base.unseen)) == ("supervised", 171, 171, 0)
    rates = {(rate["key"], rate["lr"], rate["weight_decay"]): rate["parameters"] for rate in base.rates}
    assert rates == {("clip.", 2e-4 * 0.01, 1e-4): 20_447_232, ("", 2e-4, 1e-4): 4_664_673, ("", 2e-4, 0.0): 3_968}
    assert (base.parameters, base.trainable) == (154_289_378, 25_115_873)
    assert base.trainable < full.trainable < full.parameters < large.parameters
    recipe = recipe_of("cat-seg-large-coco-stuff")
    assert (recipe.model.options["resolution"], recipe.model.options["window_size"]) == (336, 384)
    assert (recipe.train.schedule, recipe.train.clip_norm, recipe.templates) == (
        "cosine", 0.01, "A photo of a {} in the scene",
    )  # fmt: skip


def count_every_model() -> None:
    counts = {}
    for name, system, data, setting in OFFICIAL:
        recipe = recipe_of(name)
        assert recipe.model.system in SYSTEMS
        result = dry_run(recipe)
        classes, seen = DATA[data][1:3]
        assert (result.system, result.text) == (system, seen if setting == "inductive" else classes)
        assert len(result.seen) == (classes if setting == "supervised" else seen)
        assert len(result.seen) + len(result.unseen) == classes
        assert result.rates == ({"key": "", "lr": 2e-4, "weight_decay": 0.01, "parameters": result.trainable},)
        assert dict(result.rows())["weights"].startswith("random: ")
        counts[name] = (result.parameters, result.trainable)
    for name, (total, trainable, unused) in AUTHORS.items():
        assert counts[name] == (total - unused - FEWER_POSITIONS + LOGIT_SCALE, trainable - unused)
    for system in PROMPTS:
        # the number of parameters knows neither the setting nor the classes, only the prompts
        for data in DATA:
            assert len({counts[f"{system}-{data}{suffix}"] for suffix in SETTINGS}) == 1
