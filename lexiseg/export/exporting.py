"""Writing a model as a folder of graphs, and comparing the two: what ``lexiseg export`` does.

`lexiseg.export.runtime` reads the folder.
"""

import logging
import os
import re
import shutil
import time
import uuid
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from open_clip.tokenizer import SimpleTokenizer, _clean_lower
from torch import Tensor, nn

import lexiseg
from lexiseg.errors import LexisegError, need
from lexiseg.export.runtime import ExportedPredictor
from lexiseg.export.spec import FILE, FORMAT, ExportSpec
from lexiseg.files import make_folder, need_utf8, write_json, write_text, writing
from lexiseg.models.base import SegmentationModel
from lexiseg.samples import list_samples, sample_classes, sample_path
from lexiseg.scores import GridScores
from lexiseg.segmenter import Segmenter
from lexiseg.vocabulary import Vocabulary
from lexiseg.words import describe, shorten, whole_number

KINDS, PRECISIONS = ("onnx", "torch", "openvino"), ("fp32", "fp16", "int8")
_SUFFIXES = {"onnx": ".onnx", "torch": ".pt2", "openvino": ".xml"}
_OPSET = 20
_MAX_BYTES = 1 << 31  # of one ONNX file; larger ones keep their weights beside them
_SIDES, _WORDS = 4096, 1 << 20
REPORT = "report.json"
_PACKAGES = ("torch", "onnx", "onnxscript", "onnxruntime", "openvino", "numpy", "Pillow")


@dataclass(frozen=True)
class Graph:
    """A module to be traced, with examples of its inputs and which of their axes are free."""

    module: nn.Module
    inputs: dict[str, Tensor]
    free: dict[str, dict[int, Any]]
    output: str


class _Images(nn.Module):
    """The image tower and the head."""

    def __init__(self, model: SegmentationModel) -> None:
        super().__init__()
        self.model = model
        self.beside = nn.ModuleList(getattr(model, "_proxy", ()))  # which the model keeps out of its own state

    def forward(self, images: Tensor, text: Tensor) -> Tensor:
        return self.model.score_grid(self.model.encode_images(images), text)


class _Texts(nn.Module):
    """The text tower, which is read at the end mark."""

    def __init__(self, model: SegmentationModel) -> None:
        super().__init__()
        self.clip = model.clip

    def forward(self, tokens: Tensor) -> Tensor:
        return self.clip.encode_embeddings(self.clip.embed_tokens(tokens), self.clip.text_end(tokens))


def export(
    segmenter: Segmenter, folder: str | Path, *, kind: str = "onnx", sizes: Sequence[int] = (), precision: str = "fp32"
) -> ExportSpec:
    """Write a model as graphs; the folder appears only when it is complete.

    Args:
        segmenter: with the model, on the CPU, and the templates to keep.
        folder: new, empty, or of an earlier export, which is replaced.
        kind: "onnx", "openvino", or "torch" (torch.export, compiled by AOTInductor where there is a compiler).
        sizes: sides of square windows that the graphs take, one graph each; none makes one graph for all sizes where
            the system allows that.
        precision: "fp16" halves the files, "int8" quantises the weights of products (dynamic quantisation).

    Raises LexisegError if the system or its tower cannot be exported, an argument is wrong, or a library is missing.
    """
    if isinstance(segmenter, ExportedPredictor):
        raise LexisegError("This model is already exported; export the original model.")
    if not isinstance(segmenter, Segmenter):
        raise LexisegError(f"What is exported is a Segmenter, not {describe(segmenter)}; lexiseg.load(name) makes one.")
    model, folder = segmenter.model, Path(folder).expanduser()
    _check(model, folder, kind, precision)
    model.eval()  # in training some systems leave steps out
    spec = _describe(segmenter, kind, sizes, precision)
    temporary = make_folder(folder.parent / f".{folder.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        _save_tokenizer(model.clip.tokenizer, temporary / spec.text.tokenizer)
        compiled = False
        with _traceable(model):
            for name, graph in zip((*spec.graphs, spec.text.graph), _graphs(segmenter, spec), strict=True):
                compiled = _write(graph, temporary / name, spec)
        spec = spec.model_copy(update={"compiled": compiled})
        write_json(temporary / FILE, spec.model_dump(mode="json"))
        with writing(f"write the folder '{folder}'", "choose another"):
            if folder.exists():
                shutil.rmtree(folder)
            temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return spec


def measure(segmenter: Segmenter, folder: Path, spec: ExportSpec) -> dict[str, Any]:
    """Compare labels with those of the model in float32 on sample pictures, and write ``report.json`` into the folder.

    Returns what was written: one row per picture with the fraction of equal labels, the largest difference of a winning
    score, and processor seconds of both; ``equal``, the fraction over all pixels; and the size of the files.
    """
    exported = ExportedPredictor(folder, device="cpu", templates=segmenter.templates)
    rows, total, same = [], 0, 0
    for name in list_samples()[:2]:
        classes, seconds, results = Vocabulary.load(sample_classes(name)), [], []
        for predictor in (segmenter, exported):
            start = time.process_time()
            results.append(predictor.predict(sample_path(name), classes, window=spec.window))
            seconds.append(round(time.process_time() - start, 3))
        labels, scores = (
            [np.asarray(part) for part in kind]
            for kind in zip(*((one.label_map, one.scores) for one in results), strict=True)
        )
        equal = labels[0] == labels[1]
        total, same = total + equal.size, same + int(equal.sum())
        rows.append(
            {
                "picture": name,
                "classes": len(classes),
                "size": list(equal.shape),
                "equal": float(equal.mean()),
                "largest_score_difference": float(np.abs(scores[0] - scores[1]).max()),
                "seconds": {"torch": seconds[0], "exported": seconds[1]},
            }
        )
    files = {path.name: path.stat().st_size for path in sorted(folder.iterdir()) if path.name != REPORT}
    versions = {}
    for package in _PACKAGES:
        with suppress(PackageNotFoundError):
            versions[package] = version(package)
    report = {
        "lexiseg": lexiseg.__version__,
        "format": spec.kind,
        "precision": spec.precision,
        "compiled": spec.compiled,
        "equal": same / total,
        "pictures": rows,
        "bytes": files,
        "versions": versions,
    }
    write_json(folder / REPORT, report)
    return report


def _check(model: SegmentationModel, folder: Path, kind: str, precision: str) -> None:
    """What can be said before anything is computed."""
    need_utf8(folder, "an exported model")
    if kind not in KINDS or precision not in PRECISIONS:
        raise LexisegError(f"Formats are {', '.join(KINDS)} and precisions {', '.join(PRECISIONS)}.")
    if (precision == "int8" and kind != "onnx") or (precision == "fp16" and kind == "torch"):
        raise LexisegError(f"The format {kind} is not written in {precision}; choose --format onnx or --dtype fp32.")
    if folder.exists() and not (folder / FILE).is_file() and (not folder.is_dir() or any(folder.iterdir())):
        raise LexisegError(f"'{folder}' exists and is not an exported model; choose another folder.")
    model.check_exportable()
    clip = model.clip
    plain = isinstance(clip.tokenizer, SimpleTokenizer) and clip.tokenizer.clean_fn is _clean_lower
    if not clip.plain_text or not plain or clip.tokenizer.reduction_fn is not None:
        raise LexisegError(
            f"The text tower or the tokenizer of '{clip.name}' is not CLIP's own, and only that is exported; choose a "
            "model on a CLIP such as 'ViT-B-16/openai'."
        )
    needed = {"onnx": ("onnx", "onnxscript", "onnxruntime"), "openvino": ("onnx", "onnxscript", "openvino")}
    for package in needed.get(kind, ()):
        need(package, f"This export needs {package}", "export" if kind == "onnx" else "export,openvino")


def _describe(segmenter: Segmenter, kind: str, sizes: Sequence[int], precision: str) -> ExportSpec:
    """All that stands in ``export.json``; the rules are read off the model's own scores of an example."""
    model, suffix = segmenter.model, _SUFFIXES[kind]
    options, window = model.options.model_dump(mode="json"), model.window
    unit, resolution = model.patch_size, options.get("resolution")
    fit: dict[str, Any] = {"kind": options.get("fit", "resize"), "unit": unit}
    if fit["kind"] == "pad" and options.get("window_size") is None:
        fit["kind"] = "crop"  # whole pictures are not padded
    if fit["kind"] == "pad" and (options.get("pad_to") or unit) % unit == 0:
        fit["unit"] = options.get("pad_to") or unit
    square = [whole_number(side, "A size", 2 * fit["unit"]) for side in sizes]
    if resolution is not None:
        fit |= {"kind": "resize", "size": (resolution, resolution)}
        square = [resolution]
    elif square or not model.exports_any_size:
        square = square or [window.size or model.clip.image_size]
        if wrong := [side for side in square if side % fit["unit"]]:
            raise LexisegError(
                f"A size of {wrong[0]} is not a multiple of the patch of {fit['unit']} pixels; choose another."
            )
        side = square[0]  # of which all windows are
        stride = window.stride if window.size == side else max(side * 5 // 6, 1)
        window = replace(window, size=side, stride=stride, short_side=max(window.short_side or 0, side), long_side=None)
    with torch.no_grad():
        side = square[0] if square else 4 * fit["unit"]
        text = torch.eye(2, model.clip.embed_dim, device=model.device)
        if options.get("templates", 1) != 1:
            text = text[:, None].expand(-1, options["templates"], -1)
        scores = model(torch.zeros(1, 3, side, side), text, seen=torch.ones(2, dtype=torch.bool))
    if not isinstance(scores, GridScores):
        raise LexisegError(
            f"{model.system} does not score a grid of patches and cannot be exported; use the model itself."
        )
    decode = {
        "resize_to": "none" if scores.resize_to is None else "frame" if fit["kind"] == "pad" else "window",
        "square_side": options.get("mask_size") if scores.resize_to is not None else None,
        "sigmoid": scores.sigmoid,
        "seen_offset": 0.0 if scores.offsets is None else round(float(scores.offsets[0]), 6),
    }
    names = [f"image-{side}{suffix}" for side in square] if len(square) > 1 else [f"image{suffix}"]
    values: dict[str, Any] = {
        "format": FORMAT,
        "lexiseg": lexiseg.__version__,
        "kind": kind,
        "precision": precision,
        "system": model.system,
        "name": model.clip.name,
        "trained_on": model.clip.trained_on,
        "options": options,
        "parameters": model.num_parameters(),
        "sha256": segmenter.fingerprint(),
        "mean": model.mean,
        "std": model.std,
        "graphs": names,
        "sizes": [(side, side) for side in square],
        "fit": fit,
        "window": asdict(window),
        "decode": decode,
        "text": {
            "graph": f"text{suffix}",
            "tokenizer": "tokenizer.json",
            "context_length": model.clip.context_length - (kind == "torch"),  # see `_graphs`
            "templates": segmenter.templates or model.default_templates,
            "separate_templates": options.get("templates", 1) != 1,
            "first_of_name": bool(options.get("released")),
        },
        "seen_names": model.seen_names,
        "max_words": options["padding"] if options.get("released") and options.get("padding") else None,
    }
    return ExportSpec(**values)


def _graphs(segmenter: Segmenter, spec: ExportSpec) -> Iterator[Graph]:
    """The image graphs in their order, and the text graph."""
    model, unit = segmenter.model, spec.fit.unit
    dimension = torch.export.Dim
    words = torch.nn.functional.normalize(torch.randn(3, model.clip.embed_dim), dim=-1)
    if spec.text.separate_templates:
        words = words[:, None].repeat(1, len(spec.text.templates), 1)
    batch, classes = dimension("batch", min=1, max=1024), dimension("words", min=2, max=4096)
    # An example of no side that the tower has a table for, not even less one patch: a trace would keep to that side.
    beyond = model.clip.image_size // unit
    for size in spec.sizes or (((beyond + 2) * unit, (beyond + 3) * unit),):
        free: dict[int, Any] = {0: batch}
        if not spec.sizes:
            free |= {2: unit * dimension("rows", min=2, max=_SIDES), 3: unit * dimension("columns", min=2, max=_SIDES)}
        inputs = {"images": torch.randn(2, 3, *size), "text": words}
        yield Graph(_Images(model), inputs, {"images": free, "text": {0: classes}}, "grid")
    # In memory as a call lays them out: compiled code relies on the example's strides.
    tokens = model.clip.tokenize(["a photo of a cat", "a tree"])[:, :9].contiguous()
    # torch notes that the last length takes another path, which computes the same.
    length = dimension("length", min=2, max=model.clip.context_length - 1)
    free_text = {"tokens": {0: dimension("texts", min=1, max=_WORDS), 1: length}}
    yield Graph(_Texts(model), {"tokens": tokens}, free_text, "vectors")


@contextmanager
def _traceable(model: SegmentationModel) -> Iterator[None]:
    """The model without gradients, and without the fitting of windows, which `spec.Fit` does before the graph."""
    required = [parameter for parameter in model.parameters() if parameter.requires_grad]
    same: dict[str, Any] = {"fit_to_patches": lambda images: images, "fitted": lambda images: (images, (0, 0))}
    same = {name: function for name, function in same.items() if hasattr(model, name)}
    level = logging.root.manager.disable
    try:
        logging.disable(logging.WARNING)  # the exporters' remarks about their own steps
        model.requires_grad_(False)
        vars(model).update(same)
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
        for name in same:
            vars(model).pop(name, None)
        for parameter in required:
            parameter.requires_grad_(True)


def _write(graph: Graph, path: Path, spec: ExportSpec) -> bool:
    """Trace a graph and write it; whether it was compiled."""
    try:
        program = torch.export.export(
            graph.module.eval(), tuple(graph.inputs.values()), dynamic_shapes=graph.free, strict=False
        )
        if spec.kind == "torch":
            return _write_torch(program, path)
        onnx = path if spec.kind == "onnx" else path.with_suffix(".onnx")
        _write_onnx(program, graph, onnx)
    except LexisegError:
        raise
    except Exception as error:  # exporters raise errors of many kinds
        cause = re.sub(r"\x1b\[[0-9;]*m", "", str(error.__cause__ or error))
        first = shorten(cause.strip().partition("\n")[0], 300)
        raise LexisegError(
            f"torch {torch.__version__} cannot export {spec.system} as {spec.kind} ({first}); another version of torch "
            "or fixed sizes (--size) may help."
        ) from error
    if spec.kind == "openvino":
        import openvino

        openvino.save_model(openvino.convert_model(onnx), path, compress_to_fp16=spec.precision == "fp16")
        for file in onnx.parent.glob(f"{onnx.name}*"):
            file.unlink()
    elif spec.precision != "fp32":
        _narrow(onnx, spec.precision)
    return False


def _write_torch(program: Any, path: Path) -> bool:
    if shutil.which(os.environ.get("CXX", "g++")) is None and shutil.which("clang++") is None:
        torch.export.save(program, path)
        return False
    from torch import _inductor

    _inductor.aoti_compile_and_package(program, package_path=str(path))
    return True


def _write_onnx(program: Any, graph: Graph, path: Path) -> None:
    written = torch.onnx.export(
        program,
        dynamo=True,
        opset_version=_OPSET,
        input_names=list(graph.inputs),
        output_names=[graph.output],
        verbose=False,
    )
    if written is None:
        raise ValueError("the exporter gave no program")
    size = sum(tensor.numel() * tensor.element_size() for tensor in program.state_dict.values())
    written.save(str(path), external_data=size * 1.2 > _MAX_BYTES)


def _narrow(path: Path, precision: str) -> None:
    if precision == "int8":
        from onnxruntime.quantization import QuantType, quantize_dynamic

        quantize_dynamic(path, path, op_types_to_quantize=["MatMul", "Gemm"], weight_type=QuantType.QInt8)
        return
    import onnx
    from onnxruntime.transformers.float16 import convert_float_to_float16

    onnx.save(convert_float_to_float16(onnx.load(path), keep_io_types=True, disable_shape_infer=True), path)


def _save_tokenizer(tokenizer: SimpleTokenizer, path: Path) -> None:
    """open_clip's byte-pair tokenizer as a file of the library tokenizers; cleaning stays with the caller."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors

    merges = sorted(tokenizer.bpe_ranks, key=lambda pair: tokenizer.bpe_ranks[pair])
    bpe = models.BPE(vocab=tokenizer.encoder, merges=merges, end_of_word_suffix="</w>", ignore_merges=False)
    made = Tokenizer(bpe)
    pieces = pre_tokenizers.Split(Regex(tokenizer.pat.pattern), "removed", invert=True)
    made.pre_tokenizer = pre_tokenizers.Sequence([pieces, pre_tokenizers.ByteLevel(False, use_regex=False)])
    marks = ("<start_of_text>", "<end_of_text>")
    made.add_special_tokens(list(marks))
    made.post_processor = processors.TemplateProcessing(
        single=f"{marks[0]} $A {marks[1]}", special_tokens=[(mark, tokenizer.encoder[mark]) for mark in marks]
    )
    write_text(path, made.to_str())
