"""From a recipe to a trained model: builds the data, the model and the task, and runs the loop."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lexiseg.clip import load_clip
from lexiseg.clip.text import default_cache_folder
from lexiseg.data.base import IGNORE_INDEX, SegmentationDataset
from lexiseg.data.folders import VocFolder
from lexiseg.data.picture_world import PictureWorld
from lexiseg.data.picture_world import vocabulary as picture_world_vocabulary
from lexiseg.data.sets.catalog import data_set
from lexiseg.data.sets.open import OWN, open_data_set, train_split
from lexiseg.data.transforms import Pipeline, light_pipeline, paper_pipeline
from lexiseg.errors import LexisegError
from lexiseg.files import make_folder, write_text
from lexiseg.models import SYSTEMS
from lexiseg.models.base import ModelOptions, SegmentationModel
from lexiseg.training.checkpoint import find_checkpoints
from lexiseg.training.contrastive import ContrastiveTask
from lexiseg.training.initial import start_from
from lexiseg.training.labels import PADDING, masked_names, training_vocabulary
from lexiseg.training.recipe import (
    CatalogData,
    ContrastiveRecipe,
    Data,
    EvaluationRecipe,
    FolderData,
    PictureWorldData,
    Recipe,
    SegmentationRecipe,
    as_yaml,
    list_recipes,
    load_recipe,
)
from lexiseg.training.segmentation import SegmentationTask
from lexiseg.training.task import Task
from lexiseg.training.trainer import Trainer, seed_everything
from lexiseg.vocabulary import Vocabulary


def train(
    recipe: Recipe,
    run_dir: str | Path,
    *,
    resume: bool = False,
    until: int | None = None,
    device: str | None = None,
    tensorboard: bool = True,
    progress: bool = True,
) -> Path:
    """Train what ``recipe`` says.

    Args:
        recipe: see :func:`lexiseg.training.recipe.load_recipe`.
        run_dir: folder of the run; see :class:`lexiseg.training.trainer.Trainer`.
        resume: continue from the newest checkpoint in ``run_dir``.
        until: stop after this many steps, as :meth:`lexiseg.training.trainer.Trainer.run` does; None trains to the end.
        device: "cpu" to stay off an accelerator; None takes what there is.
        tensorboard: whether to write TensorBoard event files.
        progress: whether to show a bar.

    Returns:
        The folder of the trained model.

    Raises:
        LexisegError: the data, the CLIP, the system or an option is not there or wrong, ``run_dir`` holds another run,
            or the loss is not finite.
    """
    if isinstance(recipe, EvaluationRecipe):
        raise LexisegError("This recipe only evaluates, so there is nothing to train; give it to `lexiseg evaluate`.")
    run_dir = make_folder(run_dir)
    settings = {"resume": resume, "device": device, "tensorboard": tensorboard, "progress": progress}
    task = build_task(_with_first_stage(recipe, run_dir, settings))
    if until is not None and isinstance(task, SegmentationTask):
        task.model.metadata["steps"] = until
    trainer = Trainer(
        task,
        recipe.train,
        run_dir,
        identity=_identity(recipe, task),
        device=device,
        tensorboard=tensorboard,
        progress=progress,
    )
    if not find_checkpoints(trainer.checkpoint_dir):
        write_text(run_dir / "recipe.yaml", as_yaml(recipe))
    return trainer.run(resume=resume, until=until)


def _identity(recipe: Recipe, task: Task) -> dict[str, Any]:
    """What must be the same when a run is resumed, beside the numbers of the loop."""
    values = recipe.model_dump(mode="json", exclude={"train", "description", "evaluation"})
    if isinstance(recipe, SegmentationRecipe):
        # Left out where they say nothing new, so that a run begun before there were such keys can be resumed.
        for key in ("setting", "unlabelled", "initial", "initial_steps"):
            if values[key] == SegmentationRecipe.model_fields[key].default:
                del values[key]
    if isinstance(task, SegmentationTask) and "initial" in task.model.metadata:
        values["initial_weights"] = task.model.metadata["initial"]["weights_sha256"]
    return values


def _with_first_stage(recipe: Recipe, run_dir: Path, settings: dict[str, Any]) -> Recipe:
    """Train the recipe that another one starts from, in ``run_dir/initial``, and name its model instead."""
    if isinstance(recipe, ContrastiveRecipe) and recipe.model.initial in list_recipes():
        first = load_recipe(recipe.model.initial, seed=recipe.train.seed)
        model = train(first, run_dir / "initial", **settings)  # a finished run that is resumed only exports again
        return recipe.model_copy(update={"model": recipe.model.model_copy(update={"initial": str(model)})})
    if isinstance(recipe, SegmentationRecipe) and recipe.initial in list_recipes():
        model = train(first_stage(recipe), run_dir / "initial", until=recipe.initial_steps, **settings)
        return recipe.model_copy(update={"initial": str(model)})
    return recipe


def first_stage(recipe: SegmentationRecipe) -> SegmentationRecipe:
    """The packaged recipe that ``recipe.initial`` names, on the data and the CLIP of ``recipe`` and with its seed.

    Raises:
        LexisegError: it trains no segmentation system, or for fewer steps than ``initial_steps``.
    """
    first = load_recipe(str(recipe.initial), seed=recipe.train.seed)
    if not isinstance(first, SegmentationRecipe):
        raise LexisegError(f"'initial' names '{recipe.initial}', which trains no segmentation system; name one.")
    if recipe.initial_steps is not None and recipe.initial_steps > first.train.steps:
        raise LexisegError(
            f"'initial_steps' is {recipe.initial_steps}, but '{recipe.initial}' has only {first.train.steps} steps."
        )
    model = first.model.model_copy(update={"clip": recipe.model.clip})
    return first.model_copy(update={"data": recipe.data, "model": model})


def system_of(recipe: SegmentationRecipe) -> tuple[type[SegmentationModel], ModelOptions]:
    """The system a recipe trains and its options.

    A model trained transductively takes nothing off the scores of seen classes unless the recipe says so.

    Raises:
        LexisegError: there is no such system, or an option is unknown or wrong.
    """
    system = SYSTEMS.get(recipe.model.system)
    if system is None:
        raise LexisegError(f"There is no system '{recipe.model.system}' to train; there are {', '.join(SYSTEMS)}.")
    options = dict(recipe.model.options)
    if recipe.setting == "transductive" and "seen_offset" in system.options_class.model_fields:
        options.setdefault("seen_offset", 0.0)
    return system, system.parse_options(options)


def build_task(recipe: Recipe) -> Task:
    """Model, data and loss of a recipe; the initial weights depend on its seed, and on ``initial``, only.

    Raises:
        LexisegError: as :func:`train`.
    """
    if isinstance(recipe, EvaluationRecipe):
        raise LexisegError("This recipe only evaluates, so there is nothing to train; give it to `lexiseg evaluate`.")
    seed_everything(recipe.train.seed)
    if isinstance(recipe, ContrastiveRecipe):
        return ContrastiveTask(recipe.model, recipe.train)
    system, options = system_of(recipe)
    dataset = dataset_of(recipe.data, "train")
    seen = masked_names(training_vocabulary(dataset.vocabulary, setting=recipe.setting))
    if recipe.initial is None:
        model = system(load_clip(recipe.model.clip), options, seen)
    else:
        model = start_from(recipe.initial, system, options, seen, dataset.vocabulary, steps=recipe.initial_steps)
    model.set_trainable()
    model.metadata |= {
        "description": recipe.description,
        "data": recipe.data.model_dump(mode="json"),
        "setting": recipe.setting,
        "steps": recipe.train.steps,
        "batch_size": recipe.train.batch_size * recipe.train.accumulate,
        "seed": recipe.train.seed,
    }
    looks = recipe.train.snapshot_every > 0
    self_training = recipe.setting == "transductive"
    # In the picture world the unseen classes are void before they leave the dataset, and nothing else is.
    hidden = isinstance(recipe.data, PictureWorldData)
    return SegmentationTask(
        model,
        dataset,
        pipeline_of(recipe.data, model.mean, model.std, pad_label=PADDING if self_training else IGNORE_INDEX),
        batch_size=recipe.train.batch_size,
        seed=recipe.train.seed,
        templates=recipe.templates,
        validation=dataset_of(recipe.data, "val") if looks else None,
        num_pictures=recipe.evaluation.pictures,
        num_scored=recipe.evaluation.scored,
        label_stride=recipe.data.label_stride,
        setting=recipe.setting,
        unlabelled="ignored" if hidden else recipe.unlabelled,
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
    if isinstance(data, CatalogData):
        chosen = data.train or train_split(data.source) if split == "train" else "val"
        return open_data_set(data.source, data.root, chosen, unseen=data.unseen, classes=data.classes)
    return VocFolder(
        data.root,
        data.train if split == "train" else data.val,
        labels=data.labels,
        splits=data.splits,
        reduce_zero_label=data.reduce_zero_label,
    )


def vocabulary_of(data: Data) -> Vocabulary:
    """The classes of a recipe's data; the data need not be on disk where the package knows them.

    Raises:
        LexisegError: the list of classes is on disk and cannot be read.
    """
    if isinstance(data, PictureWorldData):
        return picture_world_vocabulary()
    if isinstance(data, CatalogData) and data.source != OWN and data_set(data.source).classes:
        return data_set(data.source).vocabulary(unseen=data.unseen)
    return dataset_of(data, "train").vocabulary


def pipeline_of(
    data: Data, mean: tuple[float, float, float], std: tuple[float, float, float], *, pad_label: int = IGNORE_INDEX
) -> Pipeline:
    """The augmentation of a recipe's data, ending in the model's normalisation (``mean`` and ``std`` in 0..1).

    Args:
        data: of the recipe.
        mean: of the model's images.
        std: of the model's images.
        pad_label: label of the pixels that fill a picture up.
    """
    if isinstance(data, PictureWorldData):
        return light_pipeline(mean, std, crop=data.crop or data.size, flip=data.flip, pad_label=pad_label)
    if data.augment == "paper":
        return paper_pipeline(mean, std, crop=data.crop, pad_label=pad_label)
    return light_pipeline(mean, std, crop=data.crop, pad_label=pad_label)


def name_of(data: Data) -> str:
    """What reports call a recipe's data."""
    if isinstance(data, FolderData) or (isinstance(data, CatalogData) and data.source == OWN):
        return data.root.resolve().name
    return data.source
