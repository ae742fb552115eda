"""Label files of every kind the datasets are distributed with, and the step from a file's values to class ids.

Two steps, each in one place: :func:`read_values` gives the numbers as they stand in the file, and :class:`ValueTable`
says what each of them is: a class, no class, or a fault of the file.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from enum import Enum
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, TiffImagePlugin, UnidentifiedImageError

from lexiseg.data.sets.archive import Place, readable
from lexiseg.errors import DataSetError, LexisegError
from lexiseg.images import TURNS, open_header, orientation_of, pillow_silenced

MAX_PIXELS = 200_000_000
"""Labels of more pixels are refused before one is decoded."""

UNKNOWN = -1
"""What :meth:`ValueTable.look_up` gives a value that is neither a class nor known to have none."""


class LabelKind(Enum):
    """How a label file holds its numbers.

    ``sbd_mat``: MATLAB file of the Semantic Boundaries Dataset, ``GTcls.Segmentation``. ``context_mat``: MATLAB file of
    PASCAL Context, variable ``LabelMap``. ``color``: colour PNG or TIFF with one class a colour; the value is ``R *
    65536 + G * 256 + B``. ``ade_full``: colour PNG of ADE20K's full set: ``R // 10 * 256 + G``. ``wide``: TIFF or PNG
    of one channel, 16 bits (8 are read as well). ``index``: PNG, TIFF, BMP or GIF, 8 bits: palette indices or grey
    values, also as three equal channels.
    """

    index = "index"
    wide = "wide"
    ade_full = "ade_full"
    color = "color"
    context_mat = "context_mat"
    sbd_mat = "sbd_mat"


def read_values(path: Place, kind: LabelKind) -> NDArray[np.int64]:
    """The numbers of a label file as they stand in it: ``(H, W)`` int64.

    Raises LexisegError if the file is missing, damaged or of another kind than ``kind``, which is a DataSetError; one
    sentence says which.
    """
    try:
        if kind in (LabelKind.context_mat, LabelKind.sbd_mat):
            return _mat(path, kind)
        with pillow_silenced(), open_header(readable(path), ("PNG", "TIFF", "BMP", "GIF")) as picture:
            if picture.width * picture.height > MAX_PIXELS:
                raise LexisegError(f"The label '{path}' has more than {MAX_PIXELS // 1_000_000} megapixels; shrink it.")
            _refuse_pages(picture, path)
            return _picture(_as_stored(picture), path, kind)
    except LexisegError:
        raise
    except FileNotFoundError as error:
        raise LexisegError(f"The label '{path}' does not exist; every picture of a split needs one.") from error
    except Exception as error:  # decoders of hostile bytes raise nearly anything
        what = "a MATLAB file" if kind in (LabelKind.context_mat, LabelKind.sbd_mat) else "a label picture"
        raise LexisegError(f"The label '{path}' cannot be read as {what}; is the file complete?") from error


def _refuse_pages(picture: Image.Image, path: Place) -> None:
    """Refuse a TIFF of several pages, unless the second is a smaller copy or a mask of the first."""
    if isinstance(picture, TiffImagePlugin.TiffImageFile) and picture.is_animated:
        picture.seek(1)
        if not picture.tag_v2.get(ExifTags.Base.NewSubfileType, 0):
            raise LexisegError(f"The label '{path}' holds several pages; save the one that counts alone.")
        picture.seek(0)


def _as_stored(picture: Image.Image) -> Image.Image:
    """The picture without the turn that Pillow gives a TIFF with an orientation when it is loaded, and no other."""
    if not isinstance(picture, TiffImagePlugin.TiffImageFile) or (flag := orientation_of(picture)) == 1:
        return picture
    picture.filename = ""  # of a mapped file Pillow would mix the pixels up
    picture.load()
    return picture.transpose(TURNS[{6: 8, 8: 6}.get(flag, flag)])


def _picture(picture: Image.Image, path: Place, kind: LabelKind) -> NDArray[np.int64]:
    mode = picture.mode
    if kind in (LabelKind.ade_full, LabelKind.color):
        if mode not in ("RGB", "RGBA"):
            raise DataSetError(
                f"The label '{path}' holds single numbers (mode {mode}), but classes are told by colours here; save it "
                "as an RGB PNG.",
                "index-label",
            )
        pixels = np.asarray(picture)[..., :3].astype(np.int64)
        red, green, blue = pixels[..., 0], pixels[..., 1], pixels[..., 2]
        return red // 10 * 256 + green if kind is LabelKind.ade_full else red * 65536 + green * 256 + blue
    if mode in ("RGB", "RGBA", "LA"):  # grey values that a program saved as colours
        bands = np.asarray(picture)
        if all(np.array_equal(bands[..., 0], bands[..., band]) for band in range(1, bands.shape[-1] - (mode != "RGB"))):
            return bands[..., 0].astype(np.int64)
    if mode in ("RGB", "RGBA", "LA", "CMYK", "YCbCr"):
        raise DataSetError(
            f"The label '{path}' holds colours (mode {mode}) instead of class ids; save it as an 8-bit palette or grey "
            "PNG.",
            "color-label",
        )
    if kind is LabelKind.index and mode not in ("P", "L", "1"):
        raise DataSetError(
            f"The label '{path}' is a 16-bit picture (mode {mode}), but this dataset's ids fit 8 bits; save it as an "
            "8-bit palette or grey PNG.",
            "wide-label",
        )
    if mode.startswith("F"):
        problem = f"The label '{path}' holds fractions (mode {mode}) instead of class ids; save whole numbers."
        raise DataSetError(problem, "wide-label")
    # Not convert("L"): that would turn palette indices into the brightness of their colours.
    return np.array(picture).astype(np.int64)


def _mat(path: Place, kind: LabelKind) -> NDArray[np.int64]:
    if isinstance(path, Path) and not path.is_file():
        raise FileNotFoundError(path)
    from scipy.io import loadmat

    content: dict[str, Any] = loadmat(str(path) if isinstance(path, Path) else path.open())
    name = "LabelMap" if kind is LabelKind.context_mat else "GTcls"
    if name not in content:
        raise LexisegError(f"The label '{path}' holds no variable '{name}'; it belongs to another dataset.")
    values = content[name] if kind is LabelKind.context_mat else content[name][0]["Segmentation"][0]
    if values.ndim != 2 or not np.issubdtype(values.dtype, np.integer):
        raise LexisegError(
            f"The label '{path}' holds {values.dtype} of shape {values.shape} instead of class ids; get the file again."
        )
    return np.asarray(values).astype(np.int64)


def png_fault(path: Place) -> str | None:
    """What Pillow says is wrong with the chunks of a PNG file: a checksum that does not fit, an end that is missing.

    Decoders are lenient: a PNG that lacks its last bytes may decode without a word, with black in place of what is
    lost. None where the file is whole, or is no PNG at all.
    """
    try:
        with pillow_silenced(), open_header(readable(path), ("PNG",)) as picture:
            picture.verify()
    except UnidentifiedImageError:
        return None
    except (OSError, SyntaxError, ValueError) as error:
        return str(error)
    return None


class ValueTable:
    """What the values of a label file stand for.

    ``void``: values that stand for no class; they become ``ignore``. ``ignore``: label of pixels without a class.
    ``rest_is_void``: whether every other value has no class either. Else it is a fault of the file. ``remedy``: what to
    do about such a value, for the sentence.
    """

    def __init__(
        self,
        id_map: Mapping[int, int],
        void: Iterable[int],
        ignore: int,
        *,
        rest_is_void: bool = False,
        remedy: str = "complete the class list or fix the label",
    ) -> None:
        self.ignore = ignore
        self.remedy = remedy
        self._other = ignore if rest_is_void else UNKNOWN
        pairs = sorted({**dict.fromkeys(void, ignore), **id_map}.items())
        self._values = np.array([value for value, _ in pairs], np.int64)
        self._ids = np.array([index for _, index in pairs], np.int64)
        # Values are small numbers but for colours, which are up to 2**24 and few: those are searched for.
        self._direct: NDArray[np.int64] | None = None
        if self._values[-1] < 1 << 16:
            self._direct = np.full(int(self._values[-1]) + 2, self._other, np.int64)
            self._direct[self._values] = self._ids

    def with_rest(self, index: int, keep: Iterable[int]) -> ValueTable:
        """The same, but that every value without a class is of the class ``index``, ``keep`` alone excepted."""
        ids = dict(zip(self._values.tolist(), self._ids.tolist(), strict=True))
        ids = {value: index if found == self.ignore else found for value, found in ids.items()}
        return ValueTable({**ids, **dict.fromkeys(keep, self.ignore)}, (), self.ignore, remedy=self.remedy)

    def look_up(self, values: NDArray[np.int64]) -> NDArray[np.int64]:
        """Class ids, ``ignore``, or :data:`UNKNOWN` for ``values`` of any shape; the same shape comes back."""
        if self._direct is not None:
            last = len(self._direct) - 1
            if values.size and (int(values.min()) < 0 or int(values.max()) > last):
                values = np.where((values < 0) | (values > last), last, values)
            return self._direct.take(values)
        places = np.minimum(np.searchsorted(self._values, values), len(self._values) - 1)
        return np.where(self._values[places] == values, self._ids[places], self._other)
