"""From a recipe to a trained model: builds the data, the model and the task, and runs the loop."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lexiseg.clip import load_clip
from lexiseg.clip.text import default_cache_folder
from lexiseg.data.base import SegmentationDataset
from lexiseg.data.folders import VocFolder
from lexiseg.data.picture_world import PictureWorld
from lexiseg.data.transforms import Pipeline, light_pipeline, paper_pipeline
from lexiseg.errors import LexisegError
from lexiseg.files import make_folder, write_text
from lexiseg.models import SYSTEMS
from lexiseg.training.checkpoint import find_checkpoints
from lexiseg.training.contrastive import ContrastiveTask
from lexiseg.training.recipe import (
    Data,
    FolderData,
    PictureWorldData,
    Recipe,
    SegmentationRecipe,
    as_yaml,
    list_recipes,
    load_recipe,
)
from lexiseg.training.segmentation import SegmentationTask, training_vocabulary
from lexiseg.training.task import Task
from lexiseg.training.trainer import Trainer, seed_everything


def train(
    recipe: Recipe,
    run_dir: str | Path,
    *,
    resume: bool = False,
    device: str | None = None,
    tensorboard: bool = True,
    progress: bool = True,
) -> Path:
    """Train what ``recipe`` says.

    Args:
        recipe: see :func:`lexiseg.training.recipe.load_recipe`.
        run_dir: folder of the run; see :class:`lexiseg.training.trainer.Trainer`.
        resume: continue from the newest checkpoint in ``run_dir``.
        device: "cpu" to stay off an accelerator; None takes what there is.
        tensorboard: whether to write TensorBoard event files.
        progress: whether to show a bar.

    Returns:
        The folder of the trained model.

    Raises:
        LexisegError: the data, the CLIP, the system or an option is not there or wrong, ``run_dir`` holds another run,
            or the loss is not finite.
    """
    run_dir = make_folder(run_dir)
    settings = {"resume": resume, "device": device, "tensorboard": tensorboard, "progress": progress}
    task = build_task(_with_first_stage(recipe, run_dir, settings))
    trainer = Trainer(
        task,
        recipe.train,
        run_dir,
        identity=recipe.model_dump(mode="json", exclude={"train", "description", "evaluation"}),
        device=device,
        tensorboard=tensorboard,
        progress=progress,
    )
    if not find_checkpoints(trainer.checkpoint_dir):
        write_text(run_dir / "recipe.yaml", as_yaml(recipe))
    return trainer.run(resume=resume)


def _with_first_stage(recipe: Recipe, run_dir: Path, settings: dict[str, Any]) -> Recipe:
    """Train the recipe that a contrastive one starts from, in ``run_dir/initial``, and name its model instead."""
    if isinstance(recipe, SegmentationRecipe) or recipe.model.initial not in list_recipes():
        return recipe
    first = load_recipe(recipe.model.initial, seed=recipe.train.seed)
    model = train(first, run_dir / "initial", **settings)  # a finished run that is resumed only exports again
    return recipe.model_copy(update={"model": recipe.model.model_copy(update={"initial": str(model)})})


def build_task(recipe: Recipe) -> Task:
    """Model, data and loss of a recipe; the initial weights depend on its seed only.

    Raises:
        LexisegError: as :func:`train`.
    """
    seed_everything(recipe.train.seed)
    if not isinstance(recipe, SegmentationRecipe):
        return ContrastiveTask(recipe.model, recipe.train)
    system = SYSTEMS.get(recipe.model.system)
    if system is None:
        raise LexisegError(f"There is no system '{recipe.model.system}' to train; there are {', '.join(SYSTEMS)}.")
    options = system.parse_options(recipe.model.options)
    dataset = dataset_of(recipe.data, "train")
    seen = training_vocabulary(dataset.vocabulary).names
    model = system(load_clip(recipe.model.clip), options, seen)
    model.set_trainable()
    model.metadata = {
        "description": recipe.description,
        "data": recipe.data.model_dump(mode="json"),
        "steps": recipe.train.steps,
        "batch_size": recipe.train.batch_size * recipe.train.accumulate,
        "seed": recipe.train.seed,
    }
    looks = recipe.train.snapshot_every > 0
    return SegmentationTask(
        model,
        dataset,
        pipeline_of(recipe.data, model.mean, model.std),
        batch_size=recipe.train.batch_size,
        seed=recipe.train.seed,
        templates=recipe.templates,
        validation=dataset_of(recipe.data, "val") if looks else None,
        num_pictures=recipe.evaluation.pictures,
        num_scored=recipe.evaluation.scored,
        label_stride=recipe.data.label_stride,
        cache_dir=default_cache_folder(),
    )


def dataset_of(data: Data, split: str) -> SegmentationDataset:
    """The "train" or the "val" split of a recipe's data.

    Raises:
        LexisegError: a file of it is missing or wrong.
    """
    if isinstance(data, PictureWorldData):
        if split == "train":
            return PictureWorld("train", size=data.size, length=data.length)
        return PictureWorld("val", size=data.val_size, length=data.val_length)
    return VocFolder(
        data.root,
        data.train if split == "train" else data.val,
        labels=data.labels,
        splits=data.splits,
        reduce_zero_label=data.reduce_zero_label,
    )


def pipeline_of(data: Data, mean: tuple[float, float, float], std: tuple[float, float, float]) -> Pipeline:
    """The augmentation of a recipe's data, ending in the model's normalisation (``mean`` and ``std`` in 0..1)."""
    if isinstance(data, PictureWorldData):
        return light_pipeline(mean, std, crop=data.crop or data.size, flip=data.flip)
    if data.augment == "paper":
        return paper_pipeline(mean, std, crop=data.crop)
    return light_pipeline(mean, std, crop=data.crop)


def name_of(data: Data) -> str:
    """What reports call a recipe's data."""
    return data.root.resolve().name if isinstance(data, FolderData) else data.source
