"""The decoupled papers' trainings as recipes: numbers, chains of stages, and every model at its full size.

The tables are written from the papers' training sections and from what their released settings say where they say more.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from lexiseg.clip.load import random_clip
from lexiseg.errors import LexisegError
from lexiseg.models.decoupled_init import NO_WEIGHTS
from lexiseg.models.deop import DeOPOptions
from lexiseg.models.region_base import RegionModelOptions
from lexiseg.proposals.options import QueryOptions, SamOptions
from lexiseg.recipes import (
    PromptRecipe,
    SegmentationRecipe,
    list_recipes,
    load_recipe,
    parse_recipe,
)
from lexiseg.training.dry_run import dry_run
from lexiseg.training.init import build_model, first_stage, prompt_stage, system_of
from lexiseg.training.trainer import learning_rate
from tests.miniatures import ade847
from tests.recipes.texts import recipe_of, recipe_text

FAMILY = ("deop", "zsseg", "zegformer", "freeseg")
NAMES = [
    name
    for name in list_recipes()
    if "picture-world" not in name
    and not name.startswith(("zegclip", "cascade"))
    and (name.startswith((*FAMILY, "maft", "prompts")) or "table" in name)
]
TENTHS = {640: tuple(range(320, 961, 64)), 512: tuple(int(x * 0.1 * 512) for x in range(5, 21))}

# Of the generator's stage. name: steps, batch, rate, decay, crop, base of the shorter sides, shorter side in tests
STAGE_ONE = {
    "zsseg-coco-stuff": (60_000, 32, 1e-4, 1e-4, 640, 640, 640),
    "zsseg-voc2012": (20_000, 16, 1e-4, 1e-4, 512, 640, 512),
    "zegformer-coco-stuff": (60_000, 32, 1e-4, 1e-4, 640, 640, 640),
    "zegformer-voc2012": (10_000, 32, 1e-4, 1e-4, 512, 512, 512),
    "zegformer-ade20k-847": (60_000, 32, 1e-4, 1e-4, 512, 512, 512),
    "freeseg-coco-stuff": (60_000, 32, 1.5e-4, 1.5e-4, 640, 640, 640),
    "freeseg-voc2012": (20_000, 32, 2e-5, 1.5e-4, 512, 640, 512),
    "freeseg-all-classes-coco-stuff": (60_000, 32, 1.5e-4, 1.5e-4, 640, 640, 640),
    "maft-released-freeseg-coco-stuff": (60_000, 16, 1.5e-4, 1.5e-4, 640, 640, 640),
    "deop-baseline-coco-stuff": (60_000, 32, 1e-4, 1e-4, 640, 640, 512),
    "deop-baseline-voc2012": (20_000, 32, 1e-4, 1e-4, 512, 640, 512),
}
# Parameters of the authors' models in millions, all and those that train, and where they were counted otherwise: a
# prompt that is loaded does not train, and MAFT's released model holds a third image tower that nothing uses.
PARAMETERS = {
    "zsseg-coco-stuff": (210.70, 61.07),
    "zegformer-coco-stuff": (209.91, 60.29),
    "freeseg-coco-stuff": (218.17, 68.55),
    "deop-released-coco-stuff": (218.40, 7.714),
    # Without the class head of the proposals and the projections of the heatmaps, which the paper does not have.
    "deop-coco-stuff": (218.40 - 0.788 - 0.788, 7.714 - 0.788),
    "deop-table-5:query-3": (218.40 - 2 * 0.788 + 2 * 3.154, 7.714 - 0.788 + 2 * 3.154),
    "maft-released-coco-stuff": (390.54 - 86.193, 28.387),
    # Five prompts in each of five blocks, and "no object".
    "deop-table-7:vision-prepended": (210.70 - 0.788 + 0.0192, (5 * 5 * 768 + 512) / 1e6),
    "deop-table-7:vision-added": (210.70 - 0.788 + 2.659, 2.659 + 0.0005),
}


def options_of(name: str) -> dict[str, Any]:
    return system_of(recipe_of(name))[1].model_dump()


@pytest.mark.parametrize("name", STAGE_ONE)
def test_numbers_of_the_proposals(name: str) -> None:
    recipe = recipe_of(name)
    steps, batch, rate, decay, crop, sides, short_side = STAGE_ONE[name]
    train, data = recipe.train, recipe.data
    assert (train.steps, train.batch_size, train.lr, train.weight_decay) == (steps, batch, rate, decay)
    assert (train.schedule, train.power, train.min_lr, train.warmup_steps, train.clip_norm) == ("poly", 0.9, 0, 0, 0.01)
    assert train.no_decay == ("norm", "embedding") and train.optimizer == "adamw"
    assert {key: rule.lr for key, rule in train.multipliers.items()} == {"backbone": 0.1}
    assert learning_rate(0, rate, train) == rate
    assert learning_rate(steps // 2, rate, train) == pytest.approx(rate * 0.5**0.9)
    assert not isinstance(data, type(None)) and data.source != "picture-world"
    coco = data.source == "coco-stuff-164k"
    assert (data.augment, data.crop, data.short_edge_length, data.top_left_crop) == (
        "short-edge",
        crop,
        TENTHS[sides],
        None,
    )
    assert data.max_size == (2560 if coco else 2048)
    options = system_of(recipe)[1]
    assert isinstance(options, DeOPOptions | RegionModelOptions)
    assert (options.short_side, options.long_side) == (short_side, 2560 if coco else 2048)
    if isinstance(options, RegionModelOptions):
        weights = options.criterion
        assert (weights.mask_weight, weights.dice_weight) == (20.0, 5.0 if "freeseg" in name else 1.0)


def test_numbers_of_the_other_stages() -> None:
    for name, steps, per_class, decay, task in (
        ("prompts-coco-stuff", 16_000, 32, 5e-4, 0),
        ("prompts-voc2012", 3_200, 128, 5e-4, 0),
        ("prompts-freeseg-coco-stuff", 16_000, 32, 1e-3, 8),
        ("prompts-freeseg-voc2012", 3_200, 128, 1e-3, 8),
    ):
        prompts = load_recipe(name)
        assert isinstance(prompts, PromptRecipe)
        train, model = prompts.train, prompts.model
        assert (train.steps, train.batch_size, train.lr, train.weight_decay) == (steps, 32, 0.02, decay)
        assert (train.optimizer, train.momentum, train.schedule, train.clip_norm) == ("sgd", 0.9, "cosine", 0.01)
        assert (model.prefix, model.suffix, model.task, model.per_class) == (16, 0, task, per_class)
        assert [learning_rate(step, 0.02, train) for step in (0, 99)] == pytest.approx([1e-4, 1e-4], rel=1e-2)
        assert learning_rate(steps // 2, 0.02, train) == pytest.approx(0.01)
    for name, steps, sides in (("deop-coco-stuff", 60_000, 11), ("deop-voc2012", 20_000, 11)):
        recipe = recipe_of(name)
        assert (recipe.train.steps, recipe.train.batch_size, recipe.train.lr) == (steps, 32, 2e-4)
        assert recipe.data.source != "picture-world" and recipe.data.short_edge_length == TENTHS[512][:sides]
        assert (recipe.data.crop, recipe.data.top_left_crop) == (640, 512)
    assert recipe_of("deop-released-coco-stuff").train.batch_size == 16
    for data, steps in (("coco-stuff", 1000), ("voc2012", 100), ("ade20k-847", 5000)):
        for host in ("zegformer", "zsseg", "freeseg"):
            train, options = recipe_of(f"{host}-maft-{data}").train, options_of(f"{host}-maft-{data}")
            assert (train.steps, train.batch_size, train.lr, train.weight_decay) == (steps, 16, 1e-5, 1e-5)
            assert (options["attention"]["start_block"], options["attention"]["image_size"]) == (8, 480)
            tuned = options["maft"]
            assert (tuned["distillation"], tuned["distance"], tuned["normalise"]) == (1.0, "smooth-l1", "matrix")
            assert set(tuned["frozen"]) == {"conv", "cls", "pos", "mlp"}
    released = options_of("maft-released-coco-stuff")
    assert (released["maft"]["distillation"], released["maft"]["normalise"]) == (0.1, "row")
    assert recipe_of("maft-released-coco-stuff").train.weight_decay == 1e-4
    assert released["ensemble"]["rule"] == "region" and released["proposals"]["frozen_dropout"]


@pytest.mark.parametrize(
    ("name", "rule", "weight"),
    [
        ("zsseg-coco-stuff", "released", 0.8),
        ("zsseg-voc2012", "released", 0.7),
        ("freeseg-coco-stuff", "released", 0.8),
        ("freeseg-voc2012", "released", 0.8),
        ("zegformer-coco-stuff", "released", 2 / 3),
        ("zsseg-maft-ade20k-847", "released", 0.7),
        ("maft-table-2-voc2012:zsseg-maft", "region", 0.7),
        ("maft-table-2-coco-stuff:zegformer", "region", 2 / 3),
        ("maft-table-2-ade20k-847:zegformer-maft", "region", 2 / 3),
        ("maft-table-5-coco-stuff:sam", "region", 0.8),
    ],
)
def test_ensembles(name: str, rule: str, weight: float) -> None:
    options = options_of(name)
    assert (options["ensemble"]["rule"], options["ensemble"]["weight"]) == (rule, pytest.approx(weight))
    # ZegFormer's calibration belongs to its ensemble.
    assert options["seen_offset"] == (0.1 if rule == "released" and "zegformer" in name else 0.0)


# What a thing with a name in the papers' tables consists of; a training of one's own belongs to it.
TRAINING = {"description", "initial", "prompts_from", "proposals_from", "train"}
MAFT = {"maft", "attention"}
SEVERANCE = {"severance", "severed_blocks", "alpha"}
HEATMAPS = {"heatmaps", "anchor_layers"}
PROMPTS = {"visual_prompts", "text_prompts", "num_prompts", "prompt_dropout"}
TUNED = [
    (name.replace("-maft", ""), name, MAFT)
    for name in list_recipes()
    if "-maft" in name and "table-4" not in name and name.replace("-maft", "") in list_recipes()
]
STEPS = [
    *TUNED,
    ("maft-released-freeseg-coco-stuff", "maft-released-coco-stuff", {"maft", "proposals.frozen_dropout"}),
    ("maft-table-4:a-freeseg", "maft-table-4:a-ip-clip", {"regions", "attention"}),
    ("maft-table-4:a-ip-clip", "maft-table-4:a-maft", {"regions", "maft"}),
    ("maft-table-4:a-mask-aware", "maft-table-4:a-maft", {"maft.distillation"}),
    ("freeseg-coco-stuff", "maft-table-4:a-freeseg", {"ensemble.rule"}),
    *(
        (f"deop-table-3-{data}:{before}", after, changed)
        for data in ("coco-stuff", "voc2012")
        for before, after, changed in (
            ("baseline-plus", f"deop-table-3-{data}:severance", SEVERANCE),
            ("baseline-plus", f"deop-table-3-{data}:anchors", HEATMAPS),
            ("severance", f"deop-{data}", HEATMAPS),
            ("anchors", f"deop-{data}", SEVERANCE),
        )
    ),
    *(
        ("deop-baseline-coco-stuff", n, SEVERANCE)
        for n in list_recipes()
        if n.startswith(("deop-table-4", "deop-table-9"))
    ),
    *(("deop-coco-stuff", name, HEATMAPS) for name in list_recipes() if name.startswith("deop-table-5:")),
    *(("deop-table-7:both", name, PROMPTS) for name in list_recipes() if name.startswith("deop-table-7:")),
    ("deop-table-3-coco-stuff:baseline-plus", "deop-table-7:both", set()),
    ("deop-coco-stuff", "deop-table-6:deop", {"clip"}),
    (
        "deop-coco-stuff",
        "deop-released-coco-stuff",
        {"severance", "heatmaps", "proposals.class_head", "proposals.frozen_dropout"},
    ),
]


def everything(name: str) -> dict[str, Any]:
    """All that a recipe says, options by their whole names and with their defaults."""
    recipe = recipe_of(name)
    found = {key: value for key, value in recipe.model_dump().items() if key not in TRAINING | {"model"}}
    options = system_of(recipe)[1].model_dump()
    found |= {"system": recipe.model.system, "clip": recipe.model.clip}
    for key, value in options.items():
        found |= {f"{key}.{inner}": each for inner, each in value.items()} if isinstance(value, dict) else {key: value}
    return found


@pytest.mark.parametrize(("base", "name", "changed"), STEPS, ids=lambda value: value if isinstance(value, str) else "")
def test_a_comparison_changes_one_thing(base: str, name: str, changed: set[str]) -> None:
    """The two sides of every row of MAFT's and DeOP's tables differ in what the row is about, and in nothing else."""
    before, after = everything(base), everything(name)
    keys = before.keys() | after.keys()
    differ = {key for key in keys if before.get(key, "-") != after.get(key, "-")}
    assert {key for key in differ if key not in changed and key.split(".")[0] not in changed} == set()


@pytest.mark.parametrize("name", NAMES)
def test_every_stage_fits_the_next(name: str) -> None:
    """What a recipe starts from has the same proposals and prompts, classes and crops of its own."""
    recipe = load_recipe(name)
    text = recipe_text(name)
    assert text.startswith("#") and max(len(line) for line in text.splitlines()) <= 120
    if not isinstance(recipe, SegmentationRecipe):
        return
    options = system_of(recipe)[1]
    learned = learned_counts(options)
    if recipe.prompts_from is not None:
        stage = prompt_stage(recipe)
        # It would be given what it lacks; a recipe of the package says it itself.
        assert stage.model == load_recipe(recipe.prompts_from).model.model_copy(update={"clip": recipe.model.clip})
        assert learned == (stage.model.prefix, stage.model.suffix, stage.model.task)
        assert stage.data.source == recipe.data.source and stage.model.clip == recipe.model.clip
    elif recipe.initial is None:
        assert learned is None
    if recipe.initial is not None:
        first = first_stage(recipe)
        assert first.model.options == recipe_of(str(recipe.initial)).model.options
        assert first.setting == recipe.setting and first.model.clip == recipe.model.clip
        own, before = options.proposals, system_of(first)[1].proposals
        if not isinstance(own, SamOptions):
            assert own.model_dump(exclude=NO_WEIGHTS) == before.model_dump(exclude=NO_WEIGHTS)
        assert learned == learned_counts(system_of(first)[1])
        assert first.data == load_recipe(str(recipe.initial)).data
        # What is trained in this stage was not trained in the one before.
        assert recipe.train.steps == 0 or set(recipe.train.multipliers) == set()
    if recipe.teacher is not None:
        assert recipe.setting == "transductive" and recipe_of(recipe.teacher).setting == "inductive"


def learned_counts(options: Any) -> tuple[int, int, int] | None:
    """Numbers of learned vectors in front of a name, behind it and behind the task."""
    if isinstance(options, DeOPOptions):
        return None if options.text_prompts == "templates" else (options.prompt_prefix, options.prompt_suffix, 0)
    assert isinstance(options, RegionModelOptions)
    return options.prompts and (options.prompts.prefix, options.prompts.suffix, options.prompts.task)


def test_every_row_of_the_ablations_is_there() -> None:
    tables = {
        "deop-table-3-coco-stuff": 3,
        "deop-table-3-voc2012": 3,
        "deop-table-4": 6,
        "deop-table-5": 7,
        "deop-table-6": 3,
        "deop-table-7": 4,
        "deop-table-9": 3,
        "maft-table-2-coco-stuff": 6,
        "maft-table-2-voc2012": 6,
        "maft-table-2-ade20k-847": 6,
        "maft-table-4": 4 + 3 + 5 + 6 + 6,
        "maft-table-5-coco-stuff": 5,
        "maft-table-5-voc2012": 2,
        "maft-table-6": 4,
        "maft-table-8-coco-stuff": 2,
        "maft-table-8-voc2012": 2,
    }
    for table, rows in tables.items():
        assert sum(name.startswith(f"{table}:") for name in list_recipes()) == rows, table
    with pytest.raises(LexisegError, match="consists of variants; name one after a colon: mps, mps-sum"):
        load_recipe("deop-table-4")
    assert options_of("deop-table-4:gps-0.5-1")["alpha"] == (0.5, 1.0)
    assert options_of("deop-table-9:gps-1-6")["severed_blocks"] == (0, 1, 2, 3, 4, 5)
    assert [recipe_of(f"maft-table-4:c-{steps}").train.steps for steps in (500, 5000)] == [500, 5000]
    assert {options_of(f"maft-table-4:b-{name}")["maft"]["distance"] for name in ("l1", "l2", "kl")} == {
        *("l1", "l2", "kl")
    }
    kinds = {name: options_of(f"deop-table-7:{name}") for name in ("text", "vision-added", "vision-prepended", "both")}
    assert {name: (values["visual_prompts"], values["text_prompts"]) for name, values in kinds.items()} == {
        "text": ("none", "end-to-end"),
        "vision-added": ("added", "offline"),
        "vision-prepended": ("prepended", "offline"),
        "both": ("added", "end-to-end"),
    }


def test_sam_takes_the_generators_place() -> None:
    for name in ("maft-table-5-coco-stuff:sam", "maft-table-5-voc2012:sam-maft", "maft-table-5-coco-stuff:sam-ip-clip"):
        options = system_of(recipe_of(name))[1]
        assert isinstance(options, RegionModelOptions)
        sam = options.proposals
        assert isinstance(sam, SamOptions)
        assert (sam.points_per_side, sam.pred_iou, sam.stability, sam.nms) == (32, 0.88, 0.95, 0.7)
        assert (sam.overlaps, sam.weights) == ("largest", "facebook/sam-vit-huge")
        assert (options.maft is not None) == name.endswith("maft")
    severed = system_of(recipe_of("deop-sam"))[1]
    assert isinstance(severed, DeOPOptions) and isinstance(severed.proposals, SamOptions) and severed.released_residual


@pytest.mark.parametrize("name", list_recipes())
def test_new_proposals_start_from_imagenet(name: str) -> None:
    """As the papers' do; the picture world knows nothing of other pictures, and an initial model brings its own."""
    recipe = load_recipe(name)
    if not isinstance(recipe, SegmentationRecipe):
        return
    trained = isinstance(getattr(system_of(recipe)[1], "proposals", None), QueryOptions)
    new = trained and recipe.initial is None and recipe.data.source not in ("picture-world", "shapes")
    shapes = name.startswith(tuple(f"decoupled-picture-world:{part}" for part in ("proposals", "pooled", "deop")))
    assert recipe.proposals_from == ("imagenet" if new else "shapes:mask2former" if shapes else None)


@pytest.mark.parametrize(("name", "key"), [("zsseg-coco-stuff", "maft"), ("deop-coco-stuff", None)])
def test_random_proposals_are_nothing_to_build_on(name: str, key: str | None) -> None:
    given = recipe_of(name)
    options = {**given.model.options, **({key: {}} if key else {})}
    alone = given.model_copy(
        update={"model": given.model.model_copy(update={"options": options}), "initial": None, "prompts_from": None}
    )
    with torch.device("meta"):
        clip, vocabulary = random_clip(given.model.clip), given.data.vocabulary()
        # ImageNet weights are the backbone's alone.
        for source in (None, "imagenet", "resnet.pth"):
            with pytest.raises(LexisegError, match="builds on proposals that it does not train itself"):
                build_model(alone.model_copy(update={"proposals_from": source}), vocabulary, clip=clip)
        # A whole generator brings masks, and SAM comes trained.
        build_model(alone.model_copy(update={"proposals_from": "somebody/run"}), vocabulary, clip=clip)
        sam = given.model.model_copy(update={"options": {**options, "proposals": {"kind": "sam"}}})
        build_model(alone.model_copy(update={"model": sam}), vocabulary, clip=clip)


def test_dry_run_names_the_stages() -> None:
    text = recipe_text("tiny").replace("kind: segmentation", "base: tiny\nkind: segmentation").split("model:")[0]
    recipe = parse_recipe(text + "initial: tiny\ntrain: {steps: 0}", "mine.yaml")
    shown = dict(dry_run(recipe).rows())
    assert shown["starts from"].startswith("tiny") and shown["steps"].startswith("0: ")


@pytest.mark.slow
def test_every_model_at_its_full_size(tmp_path: Path) -> None:
    """Built without memory: the meta device counts parameters and keeps none."""
    clips: dict[str, Any] = {}
    ade847(tmp_path)
    counts: dict[str, tuple[float, float]] = {}
    for name in NAMES:
        recipe = load_recipe(name)
        if not isinstance(recipe, SegmentationRecipe):
            continue
        if recipe.data.source == "ade20k-847":
            recipe = recipe.model_copy(
                update={"data": recipe.data.model_copy(update={"root": tmp_path, "unseen": "none"})}
            )
        with torch.device("meta"):
            clip = clips.setdefault(recipe.model.clip, None) or random_clip(recipe.model.clip)
            clips[recipe.model.clip] = clip
            model = build_model(recipe, recipe.data.vocabulary(), clip=clip)
        counts[name] = (model.num_parameters() / 1e6, model.num_parameters(trainable=True) / 1e6)
        generator = system_of(recipe)[1].proposals
        if isinstance(generator, QueryOptions) and generator.class_head != "none":
            assert generator.embed_dim == clip.embed_dim
    for name, wanted in PARAMETERS.items():
        assert counts[name] == pytest.approx(wanted, rel=1e-3), name
    # What no number of the setting changes does not change the model.
    for host in ("zegformer", "zsseg", "freeseg"):
        for middle in ("", "maft-"):
            assert len({counts[f"{host}-{middle}{data}"] for data in ("coco-stuff", "voc2012", "ade20k-847")}) == 1
