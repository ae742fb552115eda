"""The decoupled family's trainings one after the other: prompts, proposals, the last stage, self-training, and SAM."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from lexiseg.cli import main
from lexiseg.clip.load import load_clip
from lexiseg.clip.model import digest_of
from lexiseg.errors import LexisegError
from lexiseg.models.deop import DeOP
from lexiseg.models.region_base import RegionModel
from lexiseg.normalisation import pixels_of
from lexiseg.recipes import is_recipe, load_recipe
from lexiseg.recipes.reading import merge
from lexiseg.segmenter import Segmenter
from lexiseg.training.dry_run import dry_run
from lexiseg.training.prompts import read_prompts
from lexiseg.training.run import build_task, train
from lexiseg.training.segmentation import UNLABELLED, SegmentationTask, Teacher
from lexiseg.vocabulary import Vocabulary
from lexiseg.weights import load_model
from tests.models.test_region_models import LINEAR, MASKFORMER
from tests.proposals.test_sam_proposals import tiny_sam
from tests.towers import small_clip
from tests.training.runs import OPTIONS, quietly, same

DATA = {"source": "picture-world", "size": 32, "length": 2, "val_size": 32, "val_length": 1}
TRAIN = {"steps": 1, "batch_size": 2, "lr": 1e-3, "workers": 0, "checkpoint_every": 1, "min_lr": 0.0}
TRAIN |= {"no_decay": ["norm", "embedding"], "clip_norm": 0.01}


def write(folder: Path, clip: Path) -> None:
    """The recipes of a chain: each names the one before it, by its file."""
    sgd = {"optimizer": "sgd", "schedule": "cosine", "warmup": "constant", "warmup_steps": 1, "warmup_ratio": 0.005}
    own = {"steps": 1, "batch_size": 2, "lr": 0.02, "workers": 0, "min_lr": 0.0, **sgd}
    recipes: dict[str, dict[str, Any]] = {
        "prompts": {"kind": "prompts", "model": {"clip": str(clip), "prefix": 2}, "data": DATA, "train": own},
        "baseline": {
            "kind": "segmentation",
            "prompts_from": str(folder / "prompts.yaml"),
            "model": {
                "system": "deop",
                "clip": str(clip),
                "options": {
                    "proposals": MASKFORMER,
                    **{"train": "proposals", "severance": "none", "heatmaps": "none", "visual_prompts": "none"},
                    **{"text_prompts": "offline", "prompt_prefix": 2, "class_scores": "cosine"},
                },
            },
            "data": DATA,
            "train": {**TRAIN, "multipliers": {"backbone": {"lr": 0.1}}},
        },
        "deop": {
            "base": "baseline.yaml",
            "initial": str(folder / "baseline.yaml"),
            "prompts_from": None,
            "model": {
                "options": {
                    **{"train": "regions", "severance": "gps", "heatmaps": "query", "visual_prompts": "added"},
                    **{"text_prompts": "end-to-end", "class_scores": "softmax", "anchor_heads": 2, "table_side": 2},
                    "prompt_blocks": [1],
                }
            },
            "train": {"multipliers": {"backbone": None}},
        },
        "table": {
            "base": "baseline.yaml",
            "initial": str(folder / "baseline.yaml"),
            "prompts_from": None,
            "train": {"steps": 0},
            "variants": {
                "gps": {"model": {"options": {"severance": "gps", "alpha": 0.5}}},
                "mps": {"model": {"options": {"severance": "mps"}}},
            },
        },
        "zsseg": {
            "model": {
                "system": "zsseg",
                "options": {
                    **dict.fromkeys(("train", "severance", "heatmaps", "visual_prompts", "text_prompts")),
                    **dict.fromkeys(("prompt_prefix", "class_scores")),
                    **{"prompts": {"prefix": 2, "frozen": True}, "attention": {"image_size": 32}},
                },
            },
        },
        "maft": {
            "base": "zsseg.yaml",
            "initial": str(folder / "zsseg.yaml"),
            "prompts_from": None,
            "model": {"options": {"maft": {"normalise": "matrix", "distillation": 1.0}}},
            "train": {"multipliers": {"backbone": None}},
        },
        "self-training": {
            "base": "zsseg.yaml",
            "setting": "transductive",
            "prompts_from": None,
            "initial": None,
            "teacher": str(folder / "zsseg.yaml"),
        },
    }
    recipes["zsseg"] = merge(recipes["baseline"], recipes["zsseg"])  # a base is flat
    for name, content in recipes.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(content))


def run(folder: Path, name: str, **changes: Any) -> Path:
    recipe = load_recipe(folder / f"{name}.yaml")
    return quietly(recipe.model_copy(update=changes), folder / "runs" / name)


def test_deop_stage_by_stage(tmp_path: Path, clip_folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    write(tmp_path, clip_folder)
    assert is_recipe(str(tmp_path / "prompts.yaml")) and not is_recipe(str(tmp_path)) and is_recipe("tiny")

    prompts = run(tmp_path, "prompts")
    learned, card = read_prompts(prompts)
    assert learned["prefix_prompt"].shape == (2, 16)
    with pytest.raises(LexisegError, match="learned text prompts: name it as 'prompts_from'"):
        load_model(tmp_path / "runs" / "prompts")
    assert "giraffe" not in card["seen_names"] and len(card["seen_names"]) == 81
    assert card["clip_fingerprint"] == load_clip(clip_folder).fingerprint()

    baseline = run(tmp_path, "baseline", prompts_from=str(tmp_path / "runs" / "prompts"))
    first = load_model(baseline)
    assert isinstance(first, DeOP) and first.prompt is not None
    assert torch.equal(first.prompt.state_dict()["prefix_prompt"], learned["prefix_prompt"])
    assert first.metadata["prompts"]["sha256"] == digest_of(sorted(learned.items()))

    last = load_model(run(tmp_path, "deop", initial=str(tmp_path / "runs" / "baseline")))
    assert isinstance(last, DeOP) and last.prompt is not None
    assert last.metadata["initial"]["part"] == "proposals, prompts"
    assert "only the proposals and prompts are used" in caplog.text  # nobody is shown what is logged as information
    for name, value in first.generator.state_dict().items():
        assert torch.equal(last.generator.state_dict()[name], value)
    assert not torch.equal(last.prompt.state_dict()["prefix_prompt"], learned["prefix_prompt"])  # trained on

    # A row of a table runs the same weights otherwise.
    gps = train(
        load_recipe(f"{tmp_path / 'table.yaml'}:gps").model_copy(update={"initial": str(baseline)}),
        tmp_path / "gps",
    )
    row = load_model(gps)
    assert isinstance(row, DeOP) and (row.options.severance, row.options.alpha) == ("gps", 0.5)
    assert same(row.state_dict(), first.state_dict())
    assert row.default_templates == first.default_templates
    assert not (tmp_path / "gps" / "checkpoints").exists() and (tmp_path / "gps" / "recipe.yaml").is_file()
    with pytest.raises(LexisegError, match="consists of variants; name one after a colon: gps, mps"):
        load_recipe(tmp_path / "table.yaml")
    with pytest.raises(LexisegError, match="has no variant 'gsp'"):
        load_recipe(f"{tmp_path / 'table.yaml'}:gsp")


def test_stages_that_are_named_are_trained_first_and_resumed(tmp_path: Path, clip_folder: Path) -> None:
    write(tmp_path, clip_folder)
    folder = run(tmp_path, "maft")
    runs = tmp_path / "runs" / "maft"
    assert (runs / "initial" / "prompts" / "model" / "prompts.safetensors").is_file()
    tuned, host = load_model(folder), load_model(runs / "initial" / "model")
    assert isinstance(tuned, RegionModel) and isinstance(host, RegionModel)
    assert tuned.prompts is not None and host.prompts is not None
    assert tuned.prompts.fingerprint() == host.prompts.fingerprint()
    assert yaml.safe_load((runs / "recipe.yaml").read_text())["initial"].endswith("zsseg.yaml")
    before = tuned.state_dict()
    quietly(load_recipe(tmp_path / "maft.yaml"), runs, resume=True)
    assert same(load_model(folder).state_dict(), before)


def test_a_teacher_labels_what_has_no_label(tmp_path: Path, clip_folder: Path) -> None:
    write(tmp_path, clip_folder)
    host = run(tmp_path, "zsseg")
    recipe = load_recipe(tmp_path / "self-training.yaml").model_copy(update={"teacher": str(host)})
    task = build_task(recipe)
    assert isinstance(task, SegmentationTask) and task.teacher is not None
    batch = task.batch(0)
    assert bool((batch.labels == UNLABELLED).any())
    labels = task.teacher.label(batch.images, batch.labels, task.model.mean, task.model.std)
    filled = labels[batch.labels == UNLABELLED]
    assert bool((filled >= 0).all()) and not bool(task.seen_classes[filled].any())
    assert torch.equal(labels[batch.labels != UNLABELLED], batch.labels[batch.labels != UNLABELLED])
    # It looks at the pictures as it was trained to, however they are normalised for the other model.
    white = [(0.0,) * 3, (1.0,) * 3]
    pixels = pixels_of(batch.images, task.model.mean, task.model.std)
    assert torch.equal(task.teacher.label(pixels, batch.labels, *white), labels)
    assert torch.isfinite(task.losses(batch)["loss"])
    assert dry_run(recipe).teacher == str(host)
    with pytest.raises(LexisegError, match="nowhere"):
        dry_run(recipe.model_copy(update={"teacher": "./nowhere"}))
    with pytest.raises(LexisegError, match="nothing for a teacher to label"):
        build_task(recipe.model_copy(update={"setting": "supervised", "data": recipe.data}))


def test_prompts_that_do_not_fit(tmp_path: Path, clip_folder: Path) -> None:
    write(tmp_path, clip_folder)
    folder = run(tmp_path, "prompts")

    def baseline(source: Path = folder, **options: Any) -> None:
        recipe = load_recipe(tmp_path / "baseline.yaml")
        model = recipe.model.model_copy(update={"options": {**recipe.model.options, **options}})
        recipe = recipe.model_copy(update={"prompts_from": str(source), "model": model})
        try:
            build_task(recipe)
        except LexisegError as error:
            with pytest.raises(LexisegError, match=re.escape(str(error))):
                dry_run(recipe)
            raise
        dry_run(recipe)

    baseline()
    with pytest.raises(LexisegError, match=r"no prompts\.safetensors in 'nowhere'"):
        baseline(Path("nowhere"))
    with pytest.raises(
        LexisegError, match=r"prefix_prompt is \(2, 16\) instead of \(3, 16\); give both the same numbers"
    ):
        baseline(prompt_prefix=3)
    with pytest.raises(LexisegError, match="this deop has no learned prompts"):
        baseline(text_prompts="templates")
    card = json.loads((folder / "prompts.json").read_text())
    (folder / "prompts.json").write_text(json.dumps({**card, "seen_names": ["giraffe", "cat"]}))
    with pytest.raises(LexisegError, match="was trained on masks of 'giraffe', which is unseen"):
        baseline()
    (folder / "prompts.json").write_text(json.dumps({**card, "clip_fingerprint": "0"}))
    with pytest.raises(LexisegError, match="learned with another CLIP"):
        baseline()
    (folder / "prompts.json").write_text("[")
    with pytest.raises(LexisegError, match="is not readable JSON"):
        baseline()


def test_teacher_of_any_system(clip_folder: Path) -> None:
    """One-stage models teach as well: their scores are a grid."""
    from lexiseg.models import SYSTEMS

    vocabulary = Vocabulary.parse("cat; dog; sky").with_seen(["cat"])
    model = SYSTEMS["zegclip"].build(small_clip(), OPTIONS["zegclip"], seen_names=("cat",))
    labels = torch.full((1, 8, 8), UNLABELLED)
    labels[0, 0] = 0
    found = Teacher(model, vocabulary).label(torch.randn(1, 3, 32, 32), labels, model.mean, model.std)
    assert set(found[0, 1:].unique().tolist()) <= {1, 2} and bool((found[0, 0] == 0).all())


def sam_recipe(folder: Path, clip: Path) -> Path:
    model, processor = tiny_sam()
    model.save_pretrained(folder / "sam")
    processor.save_pretrained(folder / "sam")
    options = {
        "proposals": {
            **{"kind": "sam", "weights": str(folder / "sam"), "points_per_side": 2},
            **{"pred_iou": -10.0, "stability": -1.0, "nms": 1.0, "overlaps": "largest"},
        },
        "ensemble": {"rule": "region"},
        "regions": "mask-attention",
        "attention": {"image_size": 32},
    }
    path = folder / "sam.yaml"
    path.write_text(
        yaml.safe_dump(
            {
                "kind": "segmentation",
                "model": {"system": "zsseg", "clip": str(clip), "options": options},
                "templates": "vild",
                "data": DATA,
                "train": {"steps": 0, "batch_size": 1, "lr": 1.0},
            }
        )
    )
    return path


def test_sam_from_a_folder_segments_pictures(
    tmp_path: Path, clip_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`lexiseg train` puts CLIP and SAM together, `lexiseg predict` runs them; nothing is trained."""
    recipe = sam_recipe(tmp_path, clip_folder)
    picture = tmp_path / "picture.png"
    from PIL import Image

    Image.radial_gradient("L").convert("RGB").resize((64, 48)).save(picture)
    assert main(["train", str(recipe), "-o", str(tmp_path / "run")]) == 0
    assert len(load_model(tmp_path / "run" / "model").default_templates) == 14
    words = ["predict", str(picture), "cat; sky", "--model", str(tmp_path / "run"), "-o", str(tmp_path / "out")]
    assert main([*words[:4], str(tmp_path / "run" / "model"), *words[5:]]) == 0
    assert (tmp_path / "out" / "picture_labels.png").is_file()
    capsys.readouterr()
    # Its weights are not in the model's folder; where they are gone, one sentence says what to do.
    (tmp_path / "sam" / "config.json").unlink()
    assert main([*words[:4], str(tmp_path / "run" / "model"), *words[5:]]) == 2
    told = capsys.readouterr()
    assert "The SAM model" in told.out + told.err and "give a local folder" in told.out + told.err


def test_the_tuned_tower_serves_sam(tmp_path: Path, clip_folder: Path) -> None:
    write(tmp_path, clip_folder)
    tuned = load_model(run(tmp_path, "maft"))
    recipe = load_recipe(sam_recipe(tmp_path, clip_folder))
    options = {**recipe.model.options, "maft": {}, "prompts": {"prefix": 2, "frozen": True}}
    model = recipe.model.model_copy(update={"options": options})
    changes = {"model": model, "initial": str(tmp_path / "runs" / "maft")}
    folder = train(recipe.model_copy(update=changes), tmp_path / "sam-maft")
    joined = load_model(folder)
    assert joined.metadata["initial"]["part"] == "prompts, tuned tower"
    assert isinstance(joined, RegionModel) and isinstance(tuned, RegionModel)
    assert joined.student is not None and tuned.student is not None
    for name, value in tuned.student.state_dict().items():
        assert torch.equal(joined.student.state_dict()[name], value)


def test_deop_takes_sam_as_well(tmp_path: Path, clip_folder: Path) -> None:
    """Training-free, as in the demonstration of its authors: what no score depends on does not matter."""
    host = load_recipe(sam_recipe(tmp_path, clip_folder))
    options = {
        **{"proposals": host.model.options["proposals"], "text_prompts": "templates", "released_residual": True},
        **{"heatmaps": "none", "visual_prompts": "none", "class_scores": "cosine"},
    }
    model = host.model.model_copy(update={"system": "deop", "options": options})
    segmenter = Segmenter(load_model(train(host.model_copy(update={"model": model}), tmp_path / "run")))
    picture = torch.randint(0, 255, (3, 48, 64), dtype=torch.uint8)
    found = segmenter.predict(picture, "cat; sky")
    assert found.label_map.shape == (48, 64)
    segmenter.model.no_object.data.fill_(7.0)  # type: ignore[operator, union-attr]
    assert torch.equal(segmenter.predict(picture, "cat; sky").label_map, found.label_map)


@pytest.mark.slow
def test_the_whole_chain_by_the_command_line(tmp_path: Path, clip_folder: Path) -> None:
    write(tmp_path, clip_folder)

    def lexiseg(*words: str) -> None:
        done = subprocess.run([sys.executable, "-m", "lexiseg", *words], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr + done.stdout

    for name, more in (
        ("prompts", []),
        ("baseline", ["--set", "prompts_from=runs/prompts"]),
        ("deop", ["--initial", "runs/baseline"]),
        ("table.yaml:mps", ["--initial", "runs/baseline"]),
        ("zsseg", ["--set", "prompts_from=runs/prompts"]),
        ("maft", ["--initial", "runs/zsseg"]),
        ("self-training", ["--set", "teacher=runs/maft"]),
    ):
        file = name if ":" in name else f"{name}.yaml"
        lexiseg("train", file, "--device", "cpu", "--no-tensorboard", *more)
    assert (tmp_path / "runs" / "table-mps" / "model" / "config.json").is_file()
    lexiseg("train", "deop.yaml", "--dry-run", "--initial", "runs/baseline")
    lexiseg("evaluate", "picture-world", "--size", "32", "--limit", "1", "--weights", "runs/deop", "-o", "report")
    assert (tmp_path / "report" / "report.json").is_file()


def test_zegformer_has_maft_too(clip_folder: Path, tmp_path: Path) -> None:
    """The host without learned prompts: both stages, the second from the first."""
    options = {"proposals": LINEAR, "attention": {"image_size": 32}}
    content = {
        "kind": "segmentation",
        "model": {"system": "zegformer", "clip": str(clip_folder), "options": options},
        "templates": "in-the-scene",
        "data": DATA,
        "train": {**TRAIN, "steps": 1},
    }
    (tmp_path / "host.yaml").write_text(yaml.safe_dump(content))
    tuned = {"base": "host.yaml", "initial": str(tmp_path / "host.yaml"), "model": {"options": {"maft": {}}}}
    (tmp_path / "tuned.yaml").write_text(yaml.safe_dump(tuned))
    model = load_model(run(tmp_path, "tuned"))
    assert isinstance(model, RegionModel) and model.student is not None
    assert model.default_templates == ("A photo of a {} in the scene",)
