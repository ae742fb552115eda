"""The picture world's decoupled recipes build, share their proposals, and differ only in what they say they do."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks.decoupled_world import DECOUPLED, Variant, WithMasks, folder_of, recipe_of
from benchmarks.picture_world import SYSTEMS as BENCHMARKED
from benchmarks.picture_world import has_seeds
from lexiseg.clip.load import load_clip
from lexiseg.data.picture_world import FIRST, PictureWorld
from lexiseg.errors import LexisegError
from lexiseg.models.decoupled import DecoupledModel
from lexiseg.models.maft import MaskAttention
from lexiseg.models.region_base import RegionModel
from lexiseg.proposals.given import GroundTruth
from lexiseg.recipes import list_recipes
from lexiseg.segmenter import Segmenter
from lexiseg.training.init import build_model, first_stage, system_of
from lexiseg.training.run import build_task
from lexiseg.training.segmentation import SegmentationTask
from lexiseg.weights import load_model, save_model
from tests.recipes.texts import recipe_of as recipe

PARTS = ("proposals", "zsseg", "zegformer", "freeseg", "deop")
NAMES = [name for name in list_recipes() if name.startswith(PARTS) and name.endswith("-picture-world")]


@pytest.fixture(scope="module")
def proposals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of the shared proposals that was not trained."""
    task = build_task(recipe("proposals-picture-world"))
    assert isinstance(task, SegmentationTask)
    return save_model(task.model, tmp_path_factory.mktemp("proposals") / "model")


def host(name: str, proposals: Path) -> RegionModel:
    task = build_task(recipe(name).model_copy(update={"initial": str(proposals)}))
    assert isinstance(task, SegmentationTask) and isinstance(task.model, RegionModel)
    return task.model


def test_which_there_are() -> None:
    hosts = {f"{name}{more}-picture-world" for name in ("zsseg", "zegformer", "freeseg") for more in ("", "-maft")}
    assert {"proposals-picture-world", "deop-picture-world", "deop-baseline-picture-world"} | hosts <= set(NAMES)
    assert {variant.recipe for variant in DECOUPLED.values()} <= set(NAMES)
    assert set(DECOUPLED) <= set(BENCHMARKED)
    folders = [folder_of(system, 0, Path()) for system in BENCHMARKED]
    assert len(set(folders)) == len(folders)


@pytest.mark.parametrize("name", NAMES)
def test_builds_from_the_shared_proposals(name: str, proposals: Path) -> None:
    given = recipe(name)
    shared = load_model(proposals)
    assert isinstance(shared, DecoupledModel)
    task = build_task(given.model_copy(update={"initial": str(proposals)}))
    assert isinstance(task, SegmentationTask)
    model = task.model
    assert isinstance(model, DecoupledModel) and model.options.proposals == shared.options.proposals
    mine = model.generator.state_dict()
    assert all(torch.equal(value, mine[key]) for key, value in shared.generator.state_dict().items())
    trained = model.trainable_names()
    trains_proposals = any(key.startswith("generator.") for key in trained)
    # A system that trains nothing more shows what of it was trained.
    assert trained and trains_proposals == (given.initial is None or given.train.steps == 0)
    assert not any(key.startswith("clip.") for key in trained)
    if given.initial is not None:
        first = first_stage(given)
        assert first.train.steps > 0 and first.data == given.data
        assert system_of(first)[1].model_dump()["proposals"] == shared.options.proposals.model_dump()


@pytest.mark.parametrize("name", ["zsseg", "zegformer", "freeseg"])
def test_maft_is_one_key_and_what_goes_with_it(name: str) -> None:
    plain, tuned = recipe(f"{name}-picture-world"), recipe(f"{name}-maft-picture-world")
    assert tuned.initial == plain.initial == "proposals-picture-world" and tuned.model.options["maft"] == {}
    assert plain.train.steps == 0 < tuned.train.steps
    assert plain.data == tuned.data and plain.templates == tuned.templates
    added = {"maft", "attention"}
    kept = {key: value for key, value in tuned.model.options.items() if key not in added}
    assert kept == plain.model.options


@pytest.mark.parametrize("name", ["zsseg", "zegformer", "freeseg"])
def test_maft_plugs_into_a_host(name: str, proposals: Path, tmp_path: Path) -> None:
    """The host's recipe and one key, and steps to train for, where the host has none."""
    given = recipe(f"{name}-picture-world").model_copy(update={"initial": str(proposals)})
    model = given.model.model_copy(update={"options": {**given.model.options, "maft": {}}})
    tuned = given.model_copy(update={"model": model})
    with pytest.raises(LexisegError, match=r"nothing would be tuned; set train\.steps"):
        build_model(tuned, given.data.vocabulary())
    trains = tuned.model_copy(update={"train": given.train.model_copy(update={"steps": 1})})
    built = build_model(trains, given.data.vocabulary())
    assert isinstance(built, RegionModel) and built.student is not None
    assert isinstance(built.region_encoder, MaskAttention)
    # A tower that is tuned already needs no steps.
    built.student.state_dict()["proj"].mul_(2.0)
    folder = save_model(built, tmp_path / "model")
    build_model(tuned.model_copy(update={"initial": str(folder)}), given.data.vocabulary())


@pytest.mark.parametrize("system", DECOUPLED)
def test_variants_are_right(system: str) -> None:
    variant = DECOUPLED[system]
    changed = recipe_of(variant, 3)
    kind, options = system_of(changed)
    assert issubclass(kind, DecoupledModel) and changed.train.seed == 3
    assert variant.ground_truth == (options.model_dump()["proposals"]["kind"] == "ground-truth")
    if variant.start:
        assert DECOUPLED[variant.start].start in ("", "proposals alone")
        assert not DECOUPLED[variant.start].ground_truth
    assert has_seeds(system) == (changed.train.steps > 0 and variant.start != "")
    if not variant.changes:
        assert changed.model == recipe(variant.recipe).model


def test_a_host_takes_the_proposals_over(proposals: Path) -> None:
    model, shared = host("freeseg-picture-world", proposals), load_model(proposals)
    assert isinstance(shared, RegionModel) and model.seen_names == FIRST.seen
    assert torch.equal(model.no_object, shared.no_object)
    assert model.metadata["initial"]["model"] == str(proposals)


def test_ground_truth_masks_of_the_picture_asked_for() -> None:
    generator = GroundTruth()
    data = WithMasks(PictureWorld("val", size=64), generator, 32)
    sample = data[3]
    assert generator.labels is not None and generator.labels.shape == (1, 32, 32)
    assert torch.equal(generator.labels[0], sample.label[1::2, 1::2])
    assert len(data) == 200 and data.vocabulary.names == PictureWorld("val").vocabulary.names


def test_ground_truth_masks_are_put_to_use() -> None:
    variant = Variant("deop-baseline-picture-world", ("model.options.proposals={kind: ground-truth}",), "", True)
    kind, options = system_of(recipe_of(variant, 0))
    model = kind(load_clip("clip-emoji"), options, FIRST.seen).eval()
    assert isinstance(model, DecoupledModel) and isinstance(model.generator, GroundTruth)
    data = WithMasks(PictureWorld("val", size=128), model.generator, 128)
    sample = data[0]
    found = Segmenter(model, disk_cache=False).predict(sample.image, data.vocabulary).label_map
    # One region has one class.
    for label in sample.label.unique():
        assert len(found[sample.label == label].unique()) == 1


def test_region_temperature_is_of_the_regions_alone(proposals: Path) -> None:
    model = host("zsseg-picture-world", proposals)
    text, regions = torch.eye(64)[:3], torch.eye(64)[None, :2]
    assert model.options.region_temperature == 26.0
    expected = (26.0 * torch.eye(3)[None, :2]).softmax(dim=-1)
    torch.testing.assert_close(model.region_probabilities(regions, text, None), expected)
    assert model.proposal_scale() == model.options.temperature == 100.0
