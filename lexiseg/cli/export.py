"""``lexiseg export``: a model as graphs that run without PyTorch."""

from pathlib import Path
from typing import Annotated, Literal

from typer import Argument, Option

from lexiseg.cli.console import say, say_json, say_table, say_written, waiting
from lexiseg.cli.options import Json, Template, output_option


def export(
    model: Annotated[
        str, Argument(metavar="MODEL", help="A name that `lexiseg models` lists, or a folder.", show_default=False)
    ],
    output: Annotated[Path, output_option("Folder to write.", show_default=False)],
    format: Annotated[
        Literal["onnx", "torch", "openvino"],
        Option("--format", "-f", help="onnx; openvino; or torch (torch.export with AOTInductor)."),
    ] = "onnx",
    size: Annotated[
        list[int] | None,
        Option(
            "--size",
            min=8,
            help="Side of a graph's windows; may be repeated. Default: any size, if the system allows it.",
            show_default=False,
        ),
    ] = None,
    dtype: Annotated[
        Literal["fp32", "fp16", "int8"],
        Option("--dtype", help="fp16 halves the files; int8 quantises matrix products, for CPUs."),
    ] = "fp32",
    template: Template = None,
    json: Json = False,
) -> None:
    """Export a model as graphs for ONNX Runtime, OpenVINO or torch.

    The folder is a model for --model and `lexiseg.load`; ONNX and OpenVINO predict without PyTorch.

    Labels are compared with the model's own on sample pictures; the result is in report.json.
    """
    import lexiseg
    from lexiseg.export.exporting import REPORT, measure
    from lexiseg.export.exporting import export as write

    with waiting(f"loading {model}"):
        segmenter = lexiseg.load(model, device="cpu", templates=template or None)
    with waiting(f"exporting {model}"):
        spec = write(segmenter, output, kind=format, sizes=size or (), precision=dtype)
    with waiting("comparing labels"):
        report = measure(segmenter, output.expanduser(), spec)
    if json:
        say_json({"folder": str(output), **report})
        return
    rows = [
        (row["picture"], f"{100 * row['equal']:.3f} %", f"{row['largest_score_difference']:.2g}")
        for row in report["pictures"]
    ]
    say_table("Compared with the model in float32:", ["picture", "equal labels", "largest difference of a score"], rows)
    if format == "torch":
        say("compiled by AOTInductor" if spec.compiled else "not compiled: this machine has no C++ compiler")
    sizes = ", ".join(f"{side[1]} x {side[0]}" for side in spec.sizes) or "any size"
    say(f"{sum(report['bytes'].values()) / 2**20:,.1f} MiB, for windows of {sizes}")
    say_written([output / REPORT, output])
