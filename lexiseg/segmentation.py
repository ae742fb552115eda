"""The result of a prediction, and every form a person or a program may want it in."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, SupportsIndex

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from lexiseg import formats
from lexiseg.class_list import write_class_list
from lexiseg.colors import IGNORED_COLOR
from lexiseg.errors import LexisegError
from lexiseg.files import as_path, atomic_write, make_folder, write_json, write_text
from lexiseg.label_ids import ignore_index
from lexiseg.overlay import LegendEntry, draw_legend, paint_classes
from lexiseg.vocabulary import Vocabulary
from lexiseg.words import counted, describe, finite, kind, printable, shorten, whole_number

if TYPE_CHECKING:
    import torch

_CHUNK = 2**20
_NOTEBOOK_SIDE = 1024


@dataclass(frozen=True)
class TableRow:
    """One class of a result."""

    name: str  # of the class
    seen: bool | None  # whether masks of it were trained on; None where nobody said
    fraction: float  # its pixels as a fraction of the picture's, in 0..1
    score: float | None  # the mean over its pixels of the winning score; None where it has none, or none are kept
    index: int  # its id in the label map


@dataclass(frozen=True, eq=False, repr=False)
class Segmentation:
    """A picture's labels.

    Attributes:
        label_map: the class of each pixel, shape (H, W): uint8 with 255 = ignored; where there are more than 255
            classes int32 with 65535 = ignored (more than 65,535: 2**31 - 1). Otherwise an index into ``classes``.
            A tensor; of an exported model, which runs without torch, a numpy array, like ``scores`` and ``image``.
        vocabulary: the classes, with colours, seen flags and the background.
        scores: the winning score of each pixel, float32, shape (H, W). It is the number the model decides by, in the
            model's own units (for ZegCLIP a probability in 0..1, minus the seen classes' offset): comparable between
            pixels of one model, but not a calibrated confidence. None if scores were not kept.
        image: the picture, uint8, shape (3, H, W), or None.
        name: what the picture is called.
        metadata: what made the result (model, window ...).

    Raises:
        LexisegError: the shapes do not fit each other, the image is not uint8, or a label is no class.
    """

    label_map: torch.Tensor
    vocabulary: Vocabulary
    scores: torch.Tensor | None = None
    image: torch.Tensor | None = None
    name: str = ""
    metadata: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        labels = self.label_map
        if not hasattr(labels, "shape") or not isinstance(self.vocabulary, Vocabulary):
            raise LexisegError(
                "A result is made of a label map, a tensor or an array, and a Vocabulary, not "
                f"{kind(labels)} and {kind(self.vocabulary)}."
            )
        array: Any = _as_array(labels)
        if array.ndim != 2 or array.dtype.kind not in "iub" or array.size == 0:
            raise LexisegError(
                f"A label map must be whole numbers of shape (H, W), not {array.dtype} of shape {array.shape}."
            )
        fits = array.min() >= 0 and array.max() <= self.ignore_index  # others would become classes in fewer bits
        array = array.astype(np.uint8 if self.num_classes <= 255 else np.int32, copy=False)
        if not isinstance(labels, np.ndarray):
            import torch

            array = torch.from_numpy(array)
        object.__setattr__(self, "label_map", array)
        size = self.size
        for what, other, shape in (("scores", self.scores, size), ("image", self.image, (3, *size))):
            if other is not None and not hasattr(other, "shape"):
                raise LexisegError(f"The {what} must be a tensor or an array, not {kind(other)}.")
            if other is not None and tuple(other.shape) != shape:
                raise LexisegError(
                    f"The {what} must have the shape {shape}, as the label map is {size}, not "
                    f"{tuple(other.shape)}; resize one of them."
                )
        if self.image is not None and not str(self.image.dtype).endswith("uint8"):
            raise LexisegError(f"The image must be uint8, not {self.image.dtype}; see lexiseg.images.read_image.")
        if self.scores is not None:
            scores: Any = self.scores
            scores = scores.astype(np.float32, copy=False) if isinstance(scores, np.ndarray) else scores.float()
            object.__setattr__(self, "scores", scores)
        if not fits or sum(self._counts[0]) + self.num_ignored != self._labels.size:
            raise LexisegError(
                f"The label map holds ids outside the {counted(self.num_classes, 'class')}; correct them or add "
                "classes."
            )

    @classmethod
    def from_coco(cls, dataset: Mapping[str, Any], image_id: int | None = None) -> Segmentation:
        """A picture of a COCO dataset; pixels without an annotation are ignored, later annotations cover earlier ones.

        Arguments and errors are those of `lexiseg.formats.read_coco`.
        """
        import torch

        labels, names, name = formats.read_coco(dataset, image_id)
        return cls(torch.from_numpy(labels), Vocabulary.parse([{"name": word} for word in names]), name=name)

    @property
    def classes(self) -> tuple[str, ...]:
        """The class names, in the user's order; the label map indexes them."""
        return self.vocabulary.names

    @property
    def num_classes(self) -> int:
        """How many classes there are."""
        return len(self.vocabulary)

    @property
    def size(self) -> tuple[int, int]:
        """Height and width in pixels."""
        return int(self.label_map.shape[0]), int(self.label_map.shape[1])

    @property
    def ignore_index(self) -> int:
        """The id of ignored pixels in this label map."""
        return ignore_index(self.num_classes)

    @property
    def num_ignored(self) -> int:
        """How many pixels have no class."""
        return int((self._labels == self.ignore_index).sum())

    @property
    def _labels(self) -> np.ndarray:
        return _as_array(self.label_map)

    @cached_property
    def _counts(self) -> tuple[list[int], list[float]]:
        """Pixels and sum of winning scores of each class, computed in pieces so that memory stays small."""
        labels = self._labels.reshape(-1)
        scores = None if self.scores is None else _as_array(self.scores).reshape(-1)
        pixels = np.zeros(self.num_classes, np.int64)
        sums = np.zeros(self.num_classes)
        for start in range(0, labels.size, _CHUNK):
            part = labels[start : start + _CHUNK]
            keep = (part >= 0) & (part < self.num_classes)
            pixels += np.bincount(part[keep], minlength=self.num_classes)
            if scores is not None:
                values = scores[start : start + _CHUNK][keep].astype(np.float64)
                sums += np.bincount(part[keep], weights=values, minlength=self.num_classes)
        return pixels.tolist(), sums.tolist()

    def table(self, *, include_absent: bool = False) -> list[TableRow]:
        """The classes by decreasing fraction of the picture; those without a pixel only on request, in their order."""
        pixels, sums = self._counts
        total = self._labels.size
        rows = []
        for index, entry in enumerate(self.vocabulary.classes):
            if pixels[index] or include_absent:
                score = sums[index] / pixels[index] if pixels[index] and self.scores is not None else None
                rows.append(TableRow(entry.name, entry.seen, pixels[index] / total, score, index))
        return sorted(rows, key=lambda row: -row.fraction)

    def mask(self, name_or_index: str | SupportsIndex) -> torch.Tensor:
        """The pixels of one class: bool, shape (H, W). Raises LexisegError if there is no such class."""
        if isinstance(name_or_index, str):
            formats.names_in(self, name_or_index)
            return self.label_map == self.classes.index(name_or_index)
        index = whole_number(name_or_index, "A class is given by its name or its number, which")
        if index >= self.num_classes:
            raise LexisegError(f"There is no class {describe(index)}; the result has {self.num_classes}.")
        return self.label_map == index

    @property
    def segments(self) -> list[dict[str, Any]]:
        """One entry for each class in the picture, in the classes' order.

        The shape of the Hugging Face ``image-segmentation`` pipeline: ``label``, ``score`` (the mean winning score
        over the mask) and ``mask`` (a PIL image of mode L, 255 inside and 0 outside).
        """
        return [
            {"label": row.name, "score": row.score, "mask": Image.fromarray(mask * np.uint8(255))}
            for row, mask in formats.objects_of(self)
        ]

    def palette(self) -> np.ndarray:
        """The classes' colours: uint8, shape (C, 3)."""
        return self.vocabulary.palette()

    def label_image(self) -> Image.Image:
        """The label map as a picture whose pixel values are the ids.

        Mode P with the classes' colours, 255 = ignored; with more than 255 classes 16-bit grey, 65535 = ignored. Raises
        LexisegError if there are more than 65,535, which no PNG can number.
        """
        labels = self._labels
        if self.num_classes > 65535:
            raise LexisegError(
                f"A PNG cannot number {self.num_classes:,} classes; save the result as JSON with masks instead."
            )
        if self.num_classes > 255:
            return Image.fromarray(labels.astype(np.uint16))
        image = Image.fromarray(labels)
        colors = np.zeros((256, 3), np.uint8)
        colors[: self.num_classes] = self.palette()
        colors[255] = IGNORED_COLOR
        image.putpalette(colors.tobytes())
        return image

    def overlay(
        self, *, alpha: float = 0.55, legend: bool = True, outlines: bool = True, font: str | Path | None = None
    ) -> Image.Image:
        """The picture with its classes painted over it and a legend beside or below it.

        Classes known to have had no masks in training are noted as unseen. Pixels of a background class keep the
        picture's own colours; ignored pixels are shown faded. Without a picture the colours alone are drawn.

        ``alpha``: how much the colours cover the picture, 0..1. ``legend``: add a panel with the names and fractions;
        without it the result has the picture's size. ``outlines``: draw a thin light line between classes. ``font``: a
        TrueType or OpenType file to use first; what it lacks is drawn in fonts of this machine. Raises LexisegError if
        ``alpha`` is outside 0..1 or the font cannot be read.
        """
        alpha = finite(alpha, "The overlay's alpha")
        if not 0 <= alpha <= 1:
            raise LexisegError(f"The overlay's alpha must be in 0..1, not {alpha}.")
        image = None if self.image is None else _as_array(self.image).transpose(1, 2, 0)
        background = self.vocabulary.background_index
        palette = self.palette()
        labels = self._labels
        painted = paint_classes(image, labels, palette, alpha=alpha, outlines=outlines, background=background)
        if not legend:
            return painted
        entries = [
            LegendEntry(
                row.name,
                tuple(palette[row.index].tolist()),
                row.fraction,
                note="unseen" if row.seen is False else "",
                hollow=row.index == background,
                index=row.index,
            )
            for row in self.table()
        ]
        if self.num_ignored:
            fraction = self.num_ignored / self._labels.size
            entries.append(LegendEntry("(no class)", IGNORED_COLOR, fraction, hollow=True))
        return draw_legend(painted, entries, font=font)

    def polygons(self, tolerance: float = 1.0) -> dict[str, list[formats.Polygon]]:
        """The outlines of each class in the picture, by its name; see `lexiseg.formats.polygons_of`.

        Raises LexisegError if OpenCV (the extra ``polygons``) is not installed, or the tolerance is not a number of at
        least 0.
        """
        tolerance = finite(tolerance, "The tolerance of polygons")
        if tolerance < 0:
            raise LexisegError(f"The tolerance of polygons must be 0 or more pixels, not {tolerance}.")
        return {row.name: formats.polygons_of(mask, tolerance) for row, mask in formats.objects_of(self)}

    def to_coco(self, instances: Collection[str] = ()) -> dict[str, Any]:
        """The result as a COCO dataset of one picture; see `lexiseg.formats.to_coco`."""
        return formats.to_coco([self], instances)

    def to_supervision(self, instances: Collection[str] = ()) -> Any:
        """The result as ``supervision.Detections``; see `lexiseg.formats.to_supervision`."""
        return formats.to_supervision(self, instances)

    def __repr__(self) -> str:
        """What a prompt shows: size and largest classes."""
        found = ", ".join(f"{row.name} {row.fraction:.0%}" for row in self.table()[:8]) or "no class"
        return printable(f"<Segmentation of {self.size[1]} x {self.size[0]} pixels: {found}>")

    def _repr_png_(self) -> bytes:
        """What a notebook shows: the overlay."""
        image = self.overlay()
        image.thumbnail((_NOTEBOOK_SIDE, _NOTEBOOK_SIDE))
        file = io.BytesIO()
        image.save(file, "PNG")
        return file.getvalue()

    def to_dict(self, *, masks: bool = False) -> dict[str, Any]:
        """Everything about the result that JSON can hold; ``masks`` adds each segment's as COCO's run lengths."""
        palette = self.palette()
        segments = []
        for row, mask in formats.objects_of(self):
            segment: dict[str, Any] = {
                "label": row.name,
                "index": row.index,
                "seen": row.seen,
                "fraction": row.fraction,
                "pixels": self._counts[0][row.index],
                "score": row.score,
                "bbox": formats.bounding_box(mask),
                "color": palette[row.index].tolist(),
            }
            if masks:
                segment["segmentation"] = formats.encode_rle(mask)
            segments.append(segment)
        return {
            "name": self.name,
            "height": self.size[0],
            "width": self.size[1],
            "ignore_index": self.ignore_index,
            "ignored_fraction": self.num_ignored / self._labels.size,
            "segments": segments,
            "vocabulary": self.vocabulary.to_dict(),
            "metadata": self.metadata,
        }

    def to_json(self, *, masks: bool = False) -> str:
        """``to_dict`` as indented JSON text."""
        return json.dumps(self.to_dict(masks=masks), indent=2, ensure_ascii=False) + "\n"

    def save_png(self, path: str | Path) -> Path:
        """Write `label_image` as a PNG, atomically, and return the path.

        Raises LexisegError if the file cannot be written, or there are more than 65,535 classes.
        """
        return _save_image(self.label_image(), as_path(path, "The PNG"))

    def save(
        self,
        folder: str | Path,
        stem: str,
        kinds: Collection[str] = ("labels", "overlay", "json"),
        *,
        instances: Collection[str] = (),
        font: str | Path | None = None,
    ) -> dict[str, Path]:
        """Write the result into a folder, each file atomically.

        Args:
            folder: created with its parents where it is missing.
            stem: the beginning of the file names.
            kinds: any of ``labels`` (STEM_labels.png), ``overlay`` (STEM_overlay.png), ``json`` (STEM.json), ``coco``
                (STEM_coco.json, a COCO dataset), ``geojson`` (STEM.geojson, in pixels), ``yolo`` (yolo/STEM.txt with
                the list of `lexiseg.class_list.write_class_list`), ``labelme`` (labelme/STEM.json), ``cvat``
                (STEM_cvat.xml) and ``masks`` (one PNG per class in STEM_masks).
            instances: names of classes whose connected regions are annotations of their own, see
                `lexiseg.formats.objects_of`; for the kinds from ``coco`` to ``cvat``.
            font: see `overlay`.

        Returns:
            The path of each kind written; of ``masks`` their folder.

        Raises:
            LexisegError: a kind or an instance's class is unknown, the stem is not a file name, the folder cannot be
                written, or a kind needs a package that is not installed.
        """
        kinds = (kinds,) if isinstance(kinds, str) else kinds
        if not isinstance(kinds, Collection) or not isinstance(stem, str):
            raise LexisegError("save takes a folder, the beginning of a file name, and a list of kinds.")
        for name in kinds:
            if name not in formats.SAVE_FORMATS:
                raise LexisegError(
                    f"Unknown output '{shorten(str(name))}'; known are {', '.join(formats.SAVE_FORMATS)}."
                )
        instances = formats.names_in(self, instances)
        if not stem or stem in (".", "..") or Path(stem).name != stem or "\0" in stem:
            raise LexisegError(f"'{shorten(stem)}' cannot begin a file name; give a name without folders.")
        folder = make_folder(folder)
        writers: dict[str, Callable[[], Path]] = {
            "labels": lambda: self.save_png(folder / f"{stem}_labels.png"),
            "overlay": lambda: _save_image(self.overlay(font=font), folder / f"{stem}_overlay.png"),
            "json": lambda: write_text(folder / f"{stem}.json", self.to_json()),
            "coco": lambda: write_json(folder / f"{stem}_coco.json", self.to_coco(instances)),
            "geojson": lambda: write_json(folder / f"{stem}.geojson", formats.to_geojson(self, instances)),
            "yolo": lambda: self._save_yolo(folder / "yolo", stem, instances),
            "labelme": lambda: write_json(
                make_folder(folder / "labelme") / f"{stem}.json", formats.to_labelme(self, instances)
            ),
            "cvat": lambda: write_text(folder / f"{stem}_cvat.xml", formats.to_cvat(self, instances)),
            "masks": lambda: self._save_masks(folder / f"{stem}_masks"),
        }
        return {name: write() for name, write in writers.items() if name in kinds}

    def _save_yolo(self, folder: Path, stem: str, instances: Collection[str]) -> Path:
        write_class_list(make_folder(folder), self.classes)
        return write_text(folder / f"{stem}.txt", formats.to_yolo(self, instances))

    def _save_masks(self, folder: Path) -> Path:
        before = set(make_folder(folder).glob("[0-9][0-9][0-9]*.png"))
        for row, mask in formats.objects_of(self):
            part = re.sub(r"[^0-9A-Za-z]+", "-", row.name).strip("-")[:40]  # of the name, what every file system takes
            path = folder / (f"{row.index:03d}_{part}".rstrip("_") + ".png")
            before.discard(_save_image(Image.fromarray(mask * np.uint8(255)), path))
        for path in before:  # an earlier result's classes, which this one may not have, go; a user's files stay
            with suppress(OSError), Image.open(path) as image:
                if image.info.get("Software") == "lexiseg":
                    path.unlink(missing_ok=True)
        return folder


def _as_array(values: Any) -> np.ndarray:
    """A tensor wherever it is, or an array, as an array."""
    return values if isinstance(values, np.ndarray) else values.detach().cpu().numpy()


def _save_image(image: Image.Image, path: Path) -> Path:
    if path.suffix.lower() != ".png":
        raise LexisegError(f"'{path}' must end in .png, the format that keeps every label.")
    mine = PngInfo()
    mine.add_text("Software", "lexiseg")
    with atomic_write(path) as temporary:
        # A painted photograph gets hardly smaller by the usual level 6, which takes more than twice as long.
        image.save(temporary, "PNG", compress_level=4 if image.mode == "RGB" else 6, pnginfo=mine)
    return path
