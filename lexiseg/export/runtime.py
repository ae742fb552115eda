"""Predicting with an exported model, without importing torch: numpy, Pillow, a tokenizer and the graphs' library."""

from __future__ import annotations

import html
import os
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from inspect import signature
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np

from lexiseg import notes
from lexiseg.background import BackgroundSource
from lexiseg.errors import LexisegError
from lexiseg.export.decoding import Part, decode
from lexiseg.export.spec import ExportSpec, read_spec
from lexiseg.files import need_utf8
from lexiseg.images import DEFAULT_MAX_PIXELS
from lexiseg.pictures import Picture
from lexiseg.predictor import Predictor, Words
from lexiseg.resampling import resize_floats
from lexiseg.vocabulary import TemplateSource, VocabularySource
from lexiseg.windows import Box, WindowPolicy
from lexiseg.words import first_line, shorten

if TYPE_CHECKING:
    from lexiseg.scores import Scores

_TEXTS = 64  # encoded at a time
REMEMBERED = 100_000  # words, before all are forgotten
Graph = Callable[..., np.ndarray]
"""Takes the inputs as arrays, in their order, and gives the output."""


class TextEncoder:
    """Words to unit vectors, by the exported text tower and tokenizer; what was encoded is remembered in memory.

    Raises LexisegError if the tokenizer is damaged or a graph cannot be loaded.
    """

    def __init__(self, folder: Path, spec: ExportSpec, device: str) -> None:
        from tokenizers import Tokenizer

        path = folder / spec.text.tokenizer
        try:
            self._tokenizer = Tokenizer.from_file(str(path))
            self._tokenizer.encode("a")
        except Exception as error:  # of tokenizers' own kinds
            raise LexisegError(f"The tokenizer '{path}' cannot be read; export the model again.") from error
        self.rule = spec.text
        self._graph = cache(lambda: open_graph(folder / spec.text.graph, spec, device))
        self.known: dict[tuple[str, tuple[str, ...]], Any] = {}
        self._lock = threading.Lock()

    def tokens(self, text: str) -> list[int]:
        """Token ids, marks included; the cleaning is open_clip's."""
        import ftfy

        cleaned = html.unescape(html.unescape(ftfy.fix_text(text)))
        return self._tokenizer.encode(" ".join(cleaned.split()).lower()).ids

    def count_tokens(self, text: str) -> int:
        """How many token ids a text needs."""
        return len(self.tokens(text))

    def __call__(self, words: Sequence[str], templates: tuple[str, ...]) -> np.ndarray:
        """Vectors (W, D), the mean over the templates; or (W, P, D), one per template.

        As `lexiseg.clip.text.TextEmbedder` does it, and `lexiseg.models.cat_seg` what is special there.
        """
        if self.rule.first_of_name:
            words = [word.split(", ")[0] for word in words]
        if self.rule.separate_templates:
            return np.stack([self._embed(words, (template,)) for template in templates], axis=1)
        return self._embed(words, templates)

    def _embed(self, words: Sequence[str], templates: tuple[str, ...]) -> np.ndarray:
        with self._lock:
            known: dict[str, Any] = {word: self.known.get((word, templates)) for word in words}
            if unknown := [word for word, vector in known.items() if vector is None]:
                texts = [template.replace("{}", word) for word in unknown for template in templates]
                vectors = _unit(self._encode(texts)).reshape(len(unknown), len(templates), -1)
                known |= zip(unknown, _unit(vectors.mean(axis=1)), strict=True)
                if len(self.known) + len(unknown) > REMEMBERED:
                    self.known.clear()
                self.known |= {(word, templates): known[word] for word in unknown}
            return np.stack([known[word] for word in words])

    def _encode(self, texts: Sequence[str]) -> np.ndarray:
        ids = [self.tokens(text) for text in texts]
        vectors = []
        for start in range(0, len(ids), _TEXTS):
            part = ids[start : start + _TEXTS]
            tokens = np.zeros((len(part), max(map(len, part))), np.int64)  # what follows an end mark is not looked at
            for row, one in zip(tokens, part, strict=True):
                row[: len(one)] = one
            vectors.append(self._graph()(tokens))
        return np.concatenate(vectors)


def _unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)


class ExportedModel:
    """What a `lexiseg.predictor.Predictor` asks of a model; see `lexiseg.export.spec.ExportSpec`."""

    def __init__(self, folder: Path, device: str) -> None:
        self.spec = spec = read_spec(folder)
        self.text = TextEncoder(folder, spec, device)
        self.system, self.seen_names, self.metadata = spec.system, spec.seen_names, {"exported": spec.kind}
        self.default_templates, self.window, self.postprocessing = spec.text.templates, spec.window, None
        read = {"count_tokens": self.text.count_tokens, "context_length": spec.text.context_length}
        self.clip = SimpleNamespace(name=spec.name, trained_on=spec.trained_on, **read)
        self.options = SimpleNamespace(model_dump=lambda mode="json": dict(spec.options))
        self._graph = cache(lambda name: open_graph(folder / name, spec, device))
        self._from = folder, device
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[Any, ...]:
        return ExportedModel, self._from  # graphs cannot be copied: a copy opens its own

    def num_parameters(self, *, trainable: bool = False) -> int:
        """Parameters of the model that was exported; none of them trains."""
        return 0 if trainable else self.spec.parameters

    def grids(self, pixels: np.ndarray, text: np.ndarray) -> np.ndarray:
        """Grids (B, W, h, w) of windows (B, 3, H, W), normalised. Raises LexisegError if no graph takes their size."""
        spec, fit = self.spec, self.spec.fit
        height, width = (int(side) for side in pixels.shape[2:])
        size = fit.to((height, width))
        if spec.sizes and size not in spec.sizes:
            known = ", ".join(f"{one[1]} x {one[0]}" for one in spec.sizes)
            advice = "choose such a window, or export it again without --size"
            if height != width and any(max(size) in one for one in spec.sizes):  # a whole side of such a picture
                advice = "crop the picture until its longer side is at most 4 times the other"
            raise LexisegError(
                f"This model was exported for windows of {known} pixels, not of {width} x {height}; {advice}."
            )
        if fit.kind == "pad":
            top, left = (size[0] - height) // 2, (size[1] - width) // 2
            around = (top, size[0] - height - top), (left, size[1] - width - left)
            pixels = np.pad(pixels, ((0, 0), (0, 0), *around))
        elif fit.kind == "crop" and size[0] <= height and size[1] <= width:
            pixels = pixels[:, :, : size[0], : size[1]]
        pixels = resize_floats(pixels, size)
        name = spec.graphs[spec.sizes.index(size) if spec.sizes else 0]
        with self._lock:
            graph = self._graph(name)
        return graph(np.ascontiguousarray(pixels), text)


class ExportedPredictor(Predictor):
    """A `lexiseg.segmenter.Segmenter` of an exported model; results hold numpy arrays, and torch is not needed.

    ``refine`` needs torch after all, and so do `scores`. Raises LexisegError if the folder is damaged, or a setting is
    one that was decided when the model was exported.
    """

    _arrays = True
    model: ExportedModel

    def __init__(
        self,
        folder: str | Path,
        *,
        device: Any = None,
        dtype: Any = None,
        compile: bool = False,
        templates: TemplateSource = None,
        max_pixels: float = DEFAULT_MAX_PIXELS,
        refine: Any = None,
    ) -> None:
        if compile or str(dtype).removeprefix("torch.") not in ("None", "auto", "fp32", "float32"):
            raise LexisegError("An exported model keeps the precision it was exported in; leave out dtype and compile.")
        place = "auto" if device is None else str(device)
        folder = Path(folder).expanduser()
        need_utf8(folder, "an exported model")
        model = ExportedModel(folder, place)
        super().__init__(model, templates=templates, max_pixels=max_pixels, refine=refine)
        self.device = _Device(place)

    def fingerprint(self) -> str:
        """See `Predictor.fingerprint`."""
        return self.model.spec.sha256

    def _words(self, classes: VocabularySource, background: BackgroundSource) -> Words:
        vocabulary = self.vocabulary(classes, background=background)
        notes.one_class(vocabulary)
        if vocabulary.exemplars:
            raise LexisegError("An exported model takes only words; name the classes, or use the model itself.")
        spec, words = self.model.spec, vocabulary.words
        if spec.max_words is not None and len(words) > spec.max_words:
            raise LexisegError(
                f"This exported model takes {spec.max_words} words at most, not {len(words)}; give fewer, or use the "
                "model itself."
            )
        if spec.text.separate_templates and len(vocabulary.templates) != len(spec.text.templates):
            raise LexisegError(
                f"This model has {len(spec.text.templates)} templates and {len(vocabulary.templates)} are given; "
                f"give {len(spec.text.templates)}."
            )
        owners = [(index, entry.seen is True) for index, entry in enumerate(vocabulary.classes) for _ in entry.words]
        return Words(
            vocabulary,
            self.model.text(words, vocabulary.templates).astype(np.float32),
            np.array([index for index, _ in owners]),
            np.array([seen for _, seen in owners]),
        )

    def _run(self, batch: list[tuple[Picture, Box]], words: Words) -> None:
        spec = self.model.spec
        pixels = np.stack([picture.crop(box) for picture, box in batch]).astype(np.float32) / 255
        mean, std = (np.array(values, np.float32).reshape(1, 3, 1, 1) for values in (spec.mean, spec.std))
        for (picture, _), grid in zip(batch, self.model.grids((pixels - mean) / std, words.text), strict=True):
            picture.parts.append(grid)

    def _about(self) -> dict[str, str]:
        return {"dtype": self.model.spec.precision, "runtime": self.model.spec.kind}

    def labels_of(self, picture: Picture, words: Words, policy: WindowPolicy) -> tuple[np.ndarray, np.ndarray]:
        """The labels (H, W) and their scores, without torch where nothing is refined."""
        if self.refinement.kind != "none":
            import torch

            from lexiseg.refine import refine

            image = torch.from_numpy(np.ascontiguousarray(picture.image))
            found = refine(self._joined(picture, words, policy), image, self.refinement)
            return found[0].numpy(), found[1].numpy()
        spec = self.model.spec
        offsets = spec.decode.seen_offset * words.seen_words.astype(np.float32) if words.seen_words.any() else None
        size = (int(picture.image.shape[1]), int(picture.image.shape[2]))
        canvas = size if policy.size is None else (int(picture.canvas.shape[1]), int(picture.canvas.shape[2]))
        parts = []
        for grid, seen in zip(picture.parts, picture.boxes, strict=True):
            # A picture that was run at once goes from its own window straight to its own size.
            box = (0, 0, *canvas) if policy.size is None or seen[0] < 0 else seen
            parts.append(Part(grid, box, spec.decode, spec.fit, offsets, seen))  # type: ignore[arg-type]
        whole = parts.pop() if picture.whole is not None else None
        winners, best = decode(parts, canvas, size, whole)
        return words.word_to_class[winners], best

    def _joined(self, picture: Picture, words: Words, policy: WindowPolicy) -> Scores:
        """The scores in torch's form, for whatever asks for more than labels."""
        import torch

        from lexiseg.scores import GridScores

        rule, fit = self.model.spec.decode, self.model.spec.fit
        owners, seen = torch.from_numpy(words.word_to_class), torch.from_numpy(words.seen_words)
        parts: list[Scores] = []
        for grid, box in zip(picture.parts, picture.boxes, strict=True):
            frame, place = rule.frame(fit, box[2:])
            crop = {"crop": box[2:], "crop_place": place} if rule.resize_to == "frame" else {}
            offsets = rule.seen_offset * seen.float() if rule.seen_offset and bool(seen.any()) else None
            values: Any = torch.from_numpy(grid[None])  # type: ignore[index]
            settings: dict[str, Any] = {"resize_to": frame, "sigmoid": rule.sigmoid, "offsets": offsets, **crop}
            parts.append(GridScores(values, word_to_class=owners, **settings))
        return replace(picture, parts=parts).joined(policy)


class _Device(str):
    """The name of a device, with its kind as torch's has it."""

    @property
    def type(self) -> str:
        return self.partition(":")[0]


# ---- the libraries that run graphs


def open_graph(path: Path, spec: ExportSpec, device: str) -> Graph:
    """A graph, ready to run.

    ``device``: "cpu", "cuda" or "auto"; OpenVINO's own names too. Raises LexisegError if the library is not installed
    or has no such device, or the file is damaged; and when it is run, if it does not fit what it is given.
    """
    openers = {"onnx": _onnx, "openvino": _openvino, "torch": _torch}
    try:
        graph = openers[spec.kind](path, spec, device)
    except ImportError as error:
        package = {"onnx": "onnxruntime", "openvino": "openvino"}.get(spec.kind, "torch")
        raise LexisegError(
            f"An exported model of this format needs {package}; install it with pip install {package}."
        ) from error
    except LexisegError:
        raise
    except Exception as error:  # each library has errors of its own
        raise LexisegError(
            f"The graph '{path}' cannot be loaded ({first_line(error)}); export the model again."
        ) from error

    def run(*inputs: np.ndarray) -> np.ndarray:
        try:
            return graph(*inputs)
        except Exception as error:
            raise LexisegError(
                f"The graph '{path}' cannot be run ({first_line(error)}); export the model again."
            ) from error

    return run


def _threads() -> int:
    """What ``OMP_NUM_THREADS`` says, which torch heeds and ONNX Runtime does not; 0 leaves it to the library."""
    said = os.environ.get("OMP_NUM_THREADS", "")
    return int(said) if said.isdecimal() else 0


def _onnx(path: Path, spec: ExportSpec, device: str) -> Graph:
    import onnxruntime

    kind = device.partition(":")[0]
    providers = {"cpu": ["CPUExecutionProvider"], "cuda": ["CUDAExecutionProvider", "CPUExecutionProvider"]}
    there = onnxruntime.get_available_providers()
    if kind == "auto":
        kind = "cuda" if "CUDAExecutionProvider" in there else "cpu"
    if kind not in providers or providers[kind][0] not in there:
        raise LexisegError(f"ONNX Runtime has no device '{shorten(device)}' here; use cpu.")
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads, options.inter_op_num_threads = _threads(), 1
    # Threads that wait must not keep a processor busy: others want it.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session = onnxruntime.InferenceSession(str(path), options, providers=providers[kind])
    names = [one.name for one in session.get_inputs()]

    def run(*inputs: np.ndarray) -> np.ndarray:
        return session.run(None, dict(zip(names, inputs, strict=True)))[0]

    return run


# Threads share a graph, whose request runs once at a time; and the first runs of two graphs at once may wait for each
# other for ever, one with Python's lock and one with a lock of the library's own.
_OPENVINO = threading.Lock()


def _openvino(path: Path, spec: ExportSpec, device: str) -> Graph:
    import openvino

    place = "CPU" if device in ("auto", "cpu") else device.upper()
    settings: dict[str, Any] = {"INFERENCE_PRECISION_HINT": "f32"} if place == "CPU" else {}
    if _threads():
        settings["INFERENCE_NUM_THREADS"] = _threads()
    request = openvino.Core().compile_model(str(path), place, settings).create_infer_request()

    def run(*inputs: np.ndarray) -> np.ndarray:
        with _OPENVINO:
            return request.infer(list(inputs))[0]

    return run


def _torch(path: Path, spec: ExportSpec, device: str) -> Graph:
    import torch

    if device not in ("auto", "cpu"):
        raise LexisegError("An exported model in torch's format runs where it was exported, on the cpu.")
    call: Any
    if spec.compiled:
        call = torch._inductor.aoti_load_package(str(path))
    else:
        # Sizes at which the model takes a shorter way to the same numbers are ruled out by guards that nobody needs.
        known = signature(torch.export.ExportedProgram.module).parameters
        loose = {"check_guards": False} if "check_guards" in known else {}
        call = torch.export.load(path).module(**loose)

    def run(*inputs: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            return call(*(torch.from_numpy(np.ascontiguousarray(one)) for one in inputs)).numpy()

    return run
