"""``lexiseg convert``: convert checkpoints of other programs to folders that lexiseg loads."""

from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from lexiseg.cli.console import say, say_json, say_note, say_written, waiting
from lexiseg.cli.options import Json, Template, output_option
from lexiseg.words import counted

# What the arguments of `lexiseg.weights.convert` are called here.
_OPTIONS = {
    "class_names": "--seen",
    "templates": "--template",
    "transductive": "--transductive",
    "quick_gelu": "--quick-gelu or --gelu",
    "clip": "--clip",
    "dtype": "--half",
}


Weights = Annotated[
    Path,
    Argument(
        metavar="WEIGHTS",
        help="A .pth, .pt, .ckpt, .bin, .pkl or .safetensors file, or a CLIPModel folder of transformers.",
    ),
]
Output = Annotated[Path, output_option("Folder to write.")]
Seen = Annotated[
    Path | None,
    Option(
        "--seen",
        help="Segmenters: a file of the classes with masks in training, one per line; checkpoints do not list them.",
    ),
]
Transductive = Annotated[
    bool,
    Option(
        "--transductive", help="One-stage systems and ZegFormer: trained with self-training; no offset on seen classes."
    ),
]
QuickGelu = Annotated[bool | None, Option("--quick-gelu/--gelu", help="CLIP: its activation. Default: detected.")]
Clip = Annotated[
    str | None,
    Option(
        "--clip", help="Decoupled systems without a CLIP in their file (ZegFormer): the CLIP, such as ViT-B-16/openai."
    ),
]
Ema = Annotated[
    bool | None,
    Option("--ema/--no-ema", help="Use the moving average of the weights, or not. Default: not, if a file has both."),
]
Half = Annotated[bool, Option("--half", help="Store the weights in 16 bits.")]


def convert(
    weights: Weights,
    output: Output,
    seen: Seen = None,
    template: Template = None,
    transductive: Transductive = False,
    quick_gelu: QuickGelu = None,
    clip: Clip = None,
    ema: Ema = None,
    half: Half = False,
    json: Json = False,
) -> None:
    """Convert a checkpoint to a folder for --model.

    Reads the authors' checkpoints of ZegCLIP, Cascade-CLIP, SPT-SEG, CAT-Seg, DeOP, ZSSeg, ZegFormer, FreeSeg and MAFT.

    Also OpenAI's, open_clip's and transformers' CLIPs, and Segment Anything. Nothing in a pickle is executed.
    """
    import torch

    from lexiseg.vocabulary import Vocabulary
    from lexiseg.weights import convert as run

    names = None if seen is None else Vocabulary.load(seen).names
    templates = Vocabulary.parse("any", templates=template).templates if template else None
    with waiting(f"converting {weights}"):
        report = run(
            weights,
            output,
            class_names=names,
            templates=templates,
            transductive=transductive,
            quick_gelu=quick_gelu,
            clip=clip,
            ema=ema,
            dtype=torch.float16 if half else None,
        )
    for argument in report.ignored:
        say_note(f"{_OPTIONS[argument]} has no effect on a {report.kind} checkpoint.")
    if json:
        say_json(
            {
                "kind": report.kind,
                "folder": str(report.folder),
                "tensors": report.num_tensors,
                "parameters": report.num_parameters,
                "unused": list(report.unused),
                "notes": list(report.notes),
            }
        )
        return
    say(f"{report.kind}: {counted(report.num_tensors, 'tensor')}, {report.num_parameters / 1e6:.1f} M parameters")
    for remark in report.remarks:
        say_note(remark)
    uses = {"clip": f"--model naclip/{report.folder}", "sam": f"--set model.options.proposals.weights={report.folder}"}
    say_written([report.folder])
    say(f"use it with {uses.get(report.kind, f'--model {report.folder}')}")
