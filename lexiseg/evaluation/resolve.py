"""From a recipe, a dataset's name or a folder, and a model, to a report: what ``lexiseg evaluate`` does."""

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import lexiseg
from lexiseg import processes
from lexiseg.background import BackgroundSource
from lexiseg.data.base import SegmentationDataset
from lexiseg.data.sets.dataset import nothing_labelled
from lexiseg.errors import LexisegError, warn
from lexiseg.evaluation.protocols import Protocol, find_protocol
from lexiseg.evaluation.report import Report
from lexiseg.evaluation.run import Offsets, run_evaluation, with_masks
from lexiseg.files import is_folder, local, new_folder
from lexiseg.journal import Journal
from lexiseg.pictures import WindowSource, window_policy
from lexiseg.recipes import CatalogData, ContrastiveRecipe, EvaluationRecipe, is_recipe, list_recipes, load_recipe
from lexiseg.refine import Refinement
from lexiseg.segmenter import Segmenter
from lexiseg.vocabulary import TemplateSource, Vocabulary
from lexiseg.windows import WindowPolicy
from lexiseg.words import near_names, shorten, whole_number

PICTURE_WORLD = "picture-world"
DEFAULT_SIZE = 256
PARTS = "evaluation-parts"
PATIENCE = timedelta(hours=12)
"""How long processes that are done wait for the slowest one."""


@dataclass(frozen=True)
class Question:
    """What is evaluated, and how, where a recipe or a protocol says it."""

    name: str  # of the data
    data: SegmentationDataset | None  # pictures with labels; None where they depend on the system that is evaluated
    split: str = "val"  # of the data
    protocol: Protocol | None = None  # of the papers, if one was named
    offsets: Offsets | None = None  # which classes the score offset is subtracted from
    seen_split: bool = True  # whether classes count as seen and unseen; across datasets they do not
    window: WindowPolicy | None = None  # how the model is run over a picture; a protocol says it by system
    templates: TemplateSource = None  # what words are put into; a protocol says it by system


def evaluate(
    what: str | Path,
    weights: str | Path | Segmenter,
    *,
    output: str | Path | None = None,
    overrides: Sequence[str] | Mapping[str, Any] = (),
    protocol: str | None = None,
    classes: str | Path | None = None,
    synonyms: bool | None = None,
    split: str | None = None,
    size: int | None = None,
    limit: int | None = None,
    window: WindowSource = None,
    stride: int | None = None,
    batch_size: int = 1,
    background: BackgroundSource = None,
    templates: TemplateSource = None,
    proposals: bool = False,
    resume: bool = False,
    device: str | None = None,
    dtype: str | None = None,
    compile: bool = False,
    refine: str | Refinement | None = None,
    progress: bool = True,
) -> Report:
    """Predict a dataset's pictures, compare them with its labels, and report.

    Under a launcher the processes share the pictures, and each gets the whole report; the first one writes.

    ``what``: a recipe (its validation data), a picture world's name, or a folder: one's own data, or a protocol's.
    ``weights``: a model as `lexiseg.load` takes it, a training's folder included; or as it returns it, which brings its
    own device, dtype, templates and refinement, and is afterwards what it was. ``output``: a folder for ``report.json``
    and ``grid.png``; None writes nothing. ``overrides``: of the recipe's values, see
    `lexiseg.recipes.load_recipe`. ``protocol``: evaluate the folder as the papers do, see
    `lexiseg.evaluation.protocols`. ``classes``: a list of them, where the folder carries none. ``synonyms``: score the
    further words of the dataset's list, or not. ``split``: of a folder or of picture-world; None is "val". ``size``:
    side of a picture of picture-world; None is 256. ``limit``: take only so many samples, spread evenly. ``window``,
    ``stride``, ``templates``, ``synonyms``: None is the recipe's, the protocol's or the model's. ``proposals``:
    evaluate a decoupled model's proposals, too; in one process. ``resume``: continue an evaluation into the same
    ``output`` that was stopped. The others are as in `lexiseg.load` and `lexiseg.Segmenter.predict`.

    Raises LexisegError if something of this is not there, does not fit together or cannot be read.
    """
    if proposals and processes.launched():
        raise LexisegError("Proposals are evaluated in one process; drop --proposals, or start without a launcher.")
    if resume and output is None:
        raise LexisegError("--resume needs the output folder with the earlier counts; name it.")
    processes.init(device, patience=PATIENCE)
    how: dict[str, Any] = {"device": device, "dtype": dtype, "compile": compile, "refine": refine}
    with ExitStack() as stack:
        with processes.together(), nullcontext() if output is None else new_folder(output) as folder:
            asked = _question(str(what), overrides, protocol, split, size, classes, synonyms)
            segmenter = stack.enter_context(_segmenter(weights, asked, templates, how))
            data, card, told = asked.data, None, asked.window
            if asked.protocol is not None:
                system = segmenter.model.system
                data = asked.protocol.open(str(what), system=system, classes=classes, synonyms=synonyms)
                segmenter.templates = segmenter.templates or asked.protocol.templates.get(system)
                card = asked.protocol.card(synonyms=synonyms, settings=asked.protocol.set_up(segmenter.model))
                told = asked.protocol.windows.get(system)
            assert data is not None
            if window is not None or stride is not None:
                told = window_policy(told or segmenter.model.window, window, stride)
            settings: dict[str, Any] = {"name": asked.name, "split": asked.split, "offsets": asked.offsets}
            settings |= {"seen_split": asked.seen_split, "card": card, "seed": segmenter.model.metadata.get("seed")}
            settings |= {"window": told, "background": background}
            settings |= {"batch_size": batch_size, "limit": limit, "progress": progress, "resume": resume}
        journal = None if folder is None else Journal(folder / PARTS)
        report = _judged(segmenter, data, journal, settings)
        if proposals:
            from lexiseg.evaluation.proposals import evaluate_proposals

            same: dict[str, Any] = {"limit": limit, "window": told, "background": background, "offsets": asked.offsets}
            report = replace(report, proposals=evaluate_proposals(segmenter, data, released=True, **same))
    if folder is not None and journal is not None and processes.is_main():
        report.save(folder)
        journal.remove()
    return report


def _judged(
    segmenter: Segmenter, data: SegmentationDataset, journal: Journal | None, settings: dict[str, Any]
) -> Report:
    try:
        report = run_evaluation(segmenter, data, shared=True, journal=journal, **settings)
    except KeyboardInterrupt as stop:
        folder = None if journal is None else journal.folder.parent
        kept = f"the counts so far are in '{folder}', and the same command with --resume continues"
        stop.args = (f"Stopped; {'nothing is kept' if folder is None else kept}.",)
        raise
    if not report.confusion.labelled.any():
        with processes.together():
            raise LexisegError(nothing_labelled(settings["split"]))
    known = with_masks(segmenter, [entry.name for entry in report.vocabulary.classes if entry.seen is False])
    if known and processes.is_main():
        warn(
            f"The unseen classes include {len(known)} that this model had masks of in training, '{known[0]}' first, so "
            "mIoU(U) and hIoU are not zero-shot.",
            stacklevel=3,
        )
    return report


@contextmanager
def _segmenter(weights: Any, asked: Question, templates: TemplateSource, how: dict[str, Any]) -> Iterator[Segmenter]:
    """The segmenter that is evaluated; one that was given is afterwards what it was, whatever a protocol sets."""
    words = templates or asked.templates
    if hasattr(weights, "predict"):
        for name, value in {"templates": templates, **how}.items():
            if value:
                raise LexisegError(f"The model is already loaded; pass {name} to lexiseg.load instead.")
        segmenter = copy.copy(weights)
        if words and segmenter.templates is None:
            segmenter.templates = Vocabulary.parse("any", templates=words).templates
    else:
        place = processes.device_name(how["device"] or "auto")
        segmenter = lexiseg.load(weights, templates=words, **{**how, "device": place})
    before = dict(vars(segmenter.model))
    try:
        yield segmenter
    finally:
        vars(segmenter.model).update(before)


def _question(
    what: str,
    overrides: Sequence[str] | Mapping[str, Any],
    protocol: str | None,
    split: str | None,
    size: int | None,
    classes: Any,
    synonyms: bool | None,
) -> Question:
    if overrides and (protocol is not None or what.startswith(PICTURE_WORLD) or is_folder(what)):
        raise LexisegError(f"--set overrides a recipe's values, and '{what}' is not a recipe; leave it out.")
    if protocol is not None:
        chosen = find_protocol(protocol)
        for option, value in {"split": split, "size": size}.items():
            if value is not None:
                raise LexisegError(f"The protocol {protocol} already defines this; drop --{option} {value}.")
        if not is_folder(what):
            raise LexisegError(
                f"'{what}' is not a folder; with --protocol {protocol} give the one {chosen.data_set} is in."
            )
        return Question(chosen.data_set, None, protocol=chosen, offsets=chosen.offsets, seen_split=chosen.seen_split)
    place = local(what)
    if what.startswith(PICTURE_WORLD) and place is None:
        _refuse_synonyms(synonyms, what)
        if classes is not None:
            raise LexisegError(f"--classes is for folders, not for '{what}'; leave it out.")
        from lexiseg.data.picture_world import PictureWorld, find_world

        if split not in (None, "val", "test"):
            # Its train split hides the unseen classes, so a number made there would look like a result and be none.
            raise LexisegError(f"{what} is evaluated on its val or its test split; leave out --split {split}.")
        part: Literal["val", "test"] = "test" if split == "test" else "val"
        side = DEFAULT_SIZE if size is None else whole_number(size, "The side of a picture", 16)
        return Question(what, PictureWorld(part, world=find_world(what), size=side), part)
    if size is not None:
        raise LexisegError(
            f"--size is for {PICTURE_WORLD}, which is drawn at any size, not for '{what}'; leave it out."
        )
    if place is not None and place.is_dir():
        from lexiseg.data.sets.open import OWN, open_data_set

        data = open_data_set(OWN, place, split or "val", classes=classes, synonyms=synonyms)
        return Question(place.resolve().name, data, split or "val")
    if place is None and not is_recipe(what):
        raise _neither(what)
    if classes is not None:
        raise LexisegError(f"--classes is for folders, not for '{what}'; leave it out.")
    recipe = load_recipe(what, overrides)
    if isinstance(recipe, ContrastiveRecipe):
        raise LexisegError(
            f"The recipe '{what}' trains a CLIP on captions and has no labels; choose one that trains a segmentation "
            "system."
        )
    if split is not None:
        raise LexisegError(f"The recipe '{what}' already defines its evaluation data; drop --split.")
    said = recipe.data
    if synonyms is not None:
        if not isinstance(said, CatalogData):
            _refuse_synonyms(synonyms, what)
        said = said.model_copy(update={"synonyms": synonyms})
    asked = Question(said.title, said.open("val"))
    if not isinstance(recipe, EvaluationRecipe):
        return asked
    across = isinstance(said, CatalogData) and said.unseen == "none"
    return replace(
        asked, offsets=recipe.offsets, seen_split=not across, window=recipe.window, templates=recipe.templates
    )


def _neither(what: str) -> LexisegError:
    """The sentence about a name of nothing, with the nearest names of folders, recipes and picture worlds."""
    from lexiseg.data.picture_world import WORLDS

    folders: list[str] = []
    with suppress(OSError, ValueError):  # no usable file name
        folders = [str(path) for path in Path(what).parent.iterdir() if path.is_dir()]
    hint = near_names(what, [*folders, *WORLDS, *list_recipes()], "`lexiseg train --list` shows the recipes.")
    return LexisegError(f"There is neither a data folder nor a recipe '{shorten(what, 200)}'; {hint}")


def _refuse_synonyms(synonyms: bool | None, text: str) -> None:
    if synonyms is not None:
        option = "--synonyms" if synonyms else "--no-synonyms"
        raise LexisegError(f"{option} is for datasets with a list of classes, not for '{text}'; leave it out.")
