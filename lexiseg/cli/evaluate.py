"""``lexiseg evaluate``: evaluate a model on a dataset."""

from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from lexiseg.cli import options as shared
from lexiseg.cli.console import say, say_json, say_table, say_written
from lexiseg.words import counted

Dataset = Annotated[
    str,
    Argument(
        metavar="RECIPE|DATASET",
        help="A recipe (its validation data), picture-world, or a folder: your own data, or a protocol's.",
    ),
]
Weights = Annotated[str, Option("--weights", "-w", help="The model: a name that `lexiseg models` lists, or a folder.")]
Output = Annotated[Path, shared.output_option("Folder for the report.")]
Protocol = Annotated[
    str | None,
    Option(
        "--protocol",
        help="Evaluate a folder as the papers do: gzs-voc, gzs-coco, gzs-context, gzs-context-papers, gzs-ade (seen "
        "and unseen classes); voc-20, voc-20b, pc-59, pc-459, a-150, a-847 (cross-dataset); training-free-voc21, "
        "-voc20, -pc60, -pc59, -coco-object, -coco-stuff, -cityscapes, -ade20k.",
    ),
]
Synonyms = Annotated[
    bool | None,
    Option(
        "--synonyms/--no-synonyms",
        help="Score the synonyms in the dataset's list, or names alone. Default: the recipe's or the protocol's "
        "choice; for your own data all words.",
    ),
]
Split = Annotated[str | None, Option("--split", help="Split of a folder. Default: val.")]
Size = Annotated[
    int | None, Option("--size", min=16, help="Side of a picture of picture-world in pixels. Default: 256.")
]
Limit = Annotated[int | None, Option("--limit", min=1, help="Use only this many samples, evenly spaced.")]
BatchSize = Annotated[int, Option("--batch-size", "-b", min=1, help="Pictures per batch.")]
Proposals = Annotated[
    bool,
    Option("--proposals", help="Decoupled models: evaluate the proposals too: recall, DeOP's Table 8, upper bound."),
]
Resume = Annotated[bool, Option("--resume", help="Continue a stopped evaluation into the same folder.")]


def evaluate(
    dataset: Dataset,
    weights: Weights,
    output: Output = Path("out/evaluation"),
    set: Annotated[list[str] | None, shared.set_option("data.root=FOLDER")] = None,
    protocol: Protocol = None,
    classes: shared.Classes = None,
    synonyms: Synonyms = None,
    split: Split = None,
    size: Size = None,
    limit: Limit = None,
    window: shared.Window = None,
    stride: shared.Stride = None,
    batch_size: BatchSize = 1,
    proposals: Proposals = False,
    resume: Resume = False,
    device: shared.Device = "auto",
    dtype: shared.Dtype = "fp32",
    compile: shared.Compile = False,
    template: shared.Template = None,
    background: shared.Background = None,
    refine: shared.Refine = "none",
    json: shared.Json = False,
) -> None:
    """Predict a dataset, compare with its labels, and write a report: pAcc, mIoU, seen, unseen, hIoU.

    The report states its protocol. Under a launcher (torchrun, accelerate) the processes share the pictures.
    """
    from lexiseg import processes
    from lexiseg.evaluation import evaluate as run

    report = run(
        dataset,
        weights,
        output=output,
        overrides=set or (),
        protocol=protocol,
        classes=classes,
        synonyms=synonyms,
        split=split,
        size=size,
        limit=limit,
        window=window,
        stride=stride,
        batch_size=batch_size,
        background=background,
        templates=template or None,
        proposals=proposals,
        resume=resume,
        device=device,
        dtype=dtype,
        compile=compile,
        refine=refine,
    )
    main = processes.is_main()
    processes.destroy()
    if not main:
        return
    paths = [output / name for name in ("report.json", "grid.png", "proposals.json")]
    paths = [path for path in paths if path.exists() and (report.proposals or path.stem != "proposals")]
    judged = report.proposals
    if json:
        more = {} if judged is None else {"proposals": judged.to_dict()}
        files = [str(path) for path in paths]
        say_json({"metrics": report.summary(), "protocol": report.protocol, **more, "files": files})
        return
    facts = report.protocol
    say_table(f"{facts['dataset']}, {facts['split']}, {counted(facts['num_pictures'], 'picture')}", *report.table())
    say(report.summary_line())
    if judged is not None:
        say_table("proposals", *judged.table())
    say_written(paths)
