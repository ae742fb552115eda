"""From a recipe to a trained model: what ``lexiseg train`` does once it has read the recipe.

`train` first trains the recipes that this one starts from (`lexiseg.training.init.with_stages`). Then `build_task`
makes one task of data, model and loss, and `lexiseg.training.trainer.Trainer` runs the loop; its `run_step` is a step.
"""

from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

from lexiseg import processes
from lexiseg.clip.load import load_clip
from lexiseg.clip.prompt_learner import PromptLearner
from lexiseg.data.base import fingerprint
from lexiseg.errors import LexisegError
from lexiseg.files import default_cache_folder, new_folder, write_text
from lexiseg.label_ids import ignore_index
from lexiseg.recipes import (
    ContrastiveRecipe,
    EvaluationRecipe,
    PictureWorldData,
    PromptRecipe,
    Recipe,
    SegmentationRecipe,
    as_yaml,
    load_recipe,
)
from lexiseg.training.contrastive import ContrastiveTask
from lexiseg.training.engine import Task
from lexiseg.training.init import build_model, with_stages
from lexiseg.training.prompts import PromptTask
from lexiseg.training.segmentation import PADDING, SegmentationTask, class_weights, load_teacher, training_vocabulary
from lexiseg.training.trainer import Trainer, seed_everything
from lexiseg.weights.folder import save_model
from lexiseg.weights.hashes import weights_hash
from lexiseg.weights.runs import find_checkpoints


def train(
    recipe: Recipe | str | Path,
    run_dir: str | Path,
    *,
    resume: bool = False,
    stop_after: int | None = None,
    device: str | None = None,
    tensorboard: bool = True,
    progress: bool = True,
) -> Path:
    """Train what ``recipe`` says.

    Args:
        recipe: or its name or file, as `lexiseg.recipes.load_recipe` takes them.
        run_dir: folder of the run; see `lexiseg.training.trainer.Trainer`.
        resume: continue from the newest checkpoint in ``run_dir``.
        stop_after: how many steps to train, as in `lexiseg.training.trainer.Trainer.run`; None trains to the end.
        device: "cpu" to stay off an accelerator; None takes what there is.
        tensorboard: whether to write TensorBoard event files.
        progress: whether to show a bar.

    Returns the folder of the trained model. Raises LexisegError if the data, the CLIP, the system or an option is not
    there or wrong, the run has no step ``stop_after``, ``run_dir`` holds another run, or the loss is not finite.
    """
    recipe = load_recipe(recipe) if isinstance(recipe, str | Path) else recipe
    if isinstance(recipe, EvaluationRecipe):
        raise LexisegError("This recipe only evaluates, so there is nothing to train; give it to `lexiseg evaluate`.")
    processes.init(device)
    with ExitStack() as stack:
        with processes.together():
            if stop_after is not None and not 1 <= stop_after <= (steps := recipe.train.steps):
                then = f"choose a step from 1 to {steps}" if steps else "leave out --stop-after"
                raise LexisegError(f"The run has {steps} steps, so it cannot stop after {stop_after}; {then}.")
            run_dir = stack.enter_context(new_folder(run_dir))
        stage = partial(train, resume=resume, device=device, tensorboard=tensorboard, progress=progress)
        built = with_stages(recipe, run_dir, stage)
        if isinstance(built, SegmentationRecipe) and not built.train.steps:
            return _put_together(recipe, built, run_dir)
        with processes.together():
            task = build_task(built)
        with processes.together():
            trainer = Trainer(
                task,
                recipe.train,
                run_dir,
                identity=identity(recipe, task),
                recipe=as_yaml(recipe),
                device=device,
                tensorboard=tensorboard,
                progress=progress,
            )
        return trainer.run(resume=resume, stop_after=stop_after)


def identity(recipe: Recipe, task: Task | None) -> dict[str, Any]:
    """What must be the same when a run is resumed, beside the numbers of the loop: contents, not how paths are written.

    Defaults are left out, so that a run begun before there was a key can be resumed.
    """
    values = recipe.model_dump(mode="json", exclude={"train", "description", "evaluation"}, exclude_defaults=True)
    for key in ("initial", "prompts_from", "proposals_from", "teacher"):
        if Path(str(values.get(key, ""))).exists():
            values.pop(key, None)  # what it holds is told by its hash
    for key in ("root", "classes", "cache_dir"):
        values.get("data", {}).pop(key, None)
    if isinstance(task, ContrastiveTask) and task.initial is not None and Path(values["model"]["initial"]).is_dir():
        values["model"]["initial"] = task.initial
    if isinstance(task, SegmentationTask | PromptTask):
        vocabulary = task.dataset.vocabulary
        classes = f"{len(vocabulary)} ({vocabulary.hash()[:16]})"
        values |= {"classes": classes, "pictures": fingerprint(task.dataset)}
        if Path(task.model.clip.name).exists():
            values["model"]["clip"] = task.model.clip.fingerprint()
    if isinstance(task, SegmentationTask):
        notes = task.model.metadata
        values |= {"initial_weights": notes["initial"]["weights_sha256"]} if "initial" in notes else {}
        values |= {key: notes[key]["sha256"] for key in ("prompts", "proposals") if key in notes}
        values |= {} if task.teacher is None else {"teacher_weights": weights_hash(task.teacher.model)}
    return values


def _put_together(recipe: Recipe, built: SegmentationRecipe, run_dir: Path) -> Path:
    """Write the model of a recipe of 0 steps: nothing is trained, and no picture is needed."""
    folder = run_dir / "model"
    with processes.together():
        if find_checkpoints(run_dir / "checkpoints"):
            raise LexisegError(f"'{run_dir}' already holds a run; choose another output folder.")
        seed_everything(built.train.seed)
        vocabulary = built.data.vocabulary()
        model = build_model(built, vocabulary).eval()
        model.default_templates = training_vocabulary(
            vocabulary, setting=built.setting, templates=built.templates or model.default_templates
        ).templates
        if processes.is_main():
            write_text(run_dir / "recipe.yaml", as_yaml(recipe))
            save_model(model, folder)
    return folder


def build_task(recipe: Recipe) -> Task:
    """Model, data and loss of a recipe; the initial weights depend on its seed, and on what it starts from, only.

    Raises LexisegError as `train` does.
    """
    if isinstance(recipe, EvaluationRecipe):
        raise LexisegError("This recipe only evaluates, so there is nothing to train; give it to `lexiseg evaluate`.")
    seed_everything(recipe.train.seed)
    if isinstance(recipe, ContrastiveRecipe):
        return ContrastiveTask(recipe.model, recipe.train)
    dataset = recipe.data.open("train")
    if isinstance(recipe, PromptRecipe):
        said, train = recipe.model, recipe.train
        clip = load_clip(said.clip)
        learner = PromptLearner(clip.text_width, said.prefix, said.suffix, said.task)
        how: dict[str, Any] = {"batch_size": train.batch_size, "seed": train.seed, "setting": recipe.setting}
        return PromptTask(clip, learner, dataset, per_class=said.per_class, size=said.size, **how)
    model = build_model(recipe, dataset.vocabulary)
    trained = training_vocabulary(dataset.vocabulary, setting=recipe.setting)
    if recipe.train.class_weights is not None:
        if not model.weighs_classes:
            raise LexisegError(
                f"The losses of '{model.system}' take no class weights; set train.class_weights to null, or train a "
                "one-stage system."
            )
        model.class_weights = class_weights(recipe.train.class_weights, dataset, trained)
    teacher = None
    if recipe.teacher is not None:
        teacher = load_teacher(recipe.teacher, trained, cache_dir=default_cache_folder())
        model.metadata["teacher"] = recipe.teacher
    looks = recipe.train.snapshot_every > 0
    self_training, ignored = recipe.setting == "transductive", ignore_index(len(dataset.vocabulary))
    # In the picture world the unseen classes are void before they leave the dataset, and nothing else is.
    hidden = isinstance(recipe.data, PictureWorldData)
    return SegmentationTask(
        model,
        dataset,
        recipe.data.pipeline(model.mean, model.std, pad_label=PADDING if self_training else ignored, ignored=ignored),
        batch_size=recipe.train.batch_size,
        seed=recipe.train.seed,
        templates=recipe.templates,
        validation=recipe.data.open("val") if looks else None,
        num_pictures=recipe.evaluation.pictures,
        num_samples=recipe.evaluation.num_samples,
        label_stride=recipe.data.label_stride,
        setting=recipe.setting,
        unlabelled="ignored" if hidden else recipe.unlabelled,
        cache_dir=default_cache_folder(),
        teacher=teacher,
    )
