"""Reading any picture into one form: red, green, blue bytes."""

from __future__ import annotations

import glob
import io
import os
import re
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import islice
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, TypeAlias

import numpy as np
from PIL import ExifTags, Image, TiffImagePlugin
from PIL.Image import Transpose

from lexiseg.errors import LexisegError, warn
from lexiseg.files import refuse_url, spelled
from lexiseg.first_and_last import SharedContext
from lexiseg.words import counted, describe, kind, shorten

if TYPE_CHECKING:
    import torch

ImageSource: TypeAlias = "str | Path | bytes | IO[bytes] | Image.Image | np.ndarray | torch.Tensor"

DEFAULT_MAX_PIXELS = 200_000_000
IMAGE_SUFFIXES = frozenset(
    (
        *(".apng", ".avif", ".avifs", ".bmp", ".dib", ".gif", ".ico", ".j2c", ".j2k", ".jfif", ".jp2", ".jpc", ".jpe"),
        *(".jpeg", ".jpf", ".jpg", ".jpx", ".mpo", ".pbm", ".pfm", ".pgm", ".png", ".pnm", ".ppm", ".tga", ".tif"),
        *(".tiff", ".webp"),
    )
)
VIDEO_SUFFIXES = frozenset(
    (
        *(".3g2", ".3gp", ".asf", ".avi", ".flv", ".m2ts", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".mts"),
        *(".mxf", ".ogv", ".ts", ".vob", ".webm", ".wmv"),
    )
)
# Pictures that are not read here. Listings of folders name them, so that they are reported, not passed over.
FOREIGN_SUFFIXES = frozenset(
    (
        *(".cur", ".dcm", ".dds", ".dicom", ".emf", ".eps", ".exr", ".fits", ".hdr", ".heic", ".heics", ".heif"),
        *(".heifs", ".hif", ".icns", ".jls", ".jxl", ".jxr", ".pcx", ".pct", ".pict", ".psb", ".psd", ".qoi", ".ras"),
        *(".sgi", ".svg", ".svgz", ".wbmp", ".wdp", ".wmf", ".xbm", ".xcf", ".xpm"),
        *(".3fr", ".arw", ".cr2", ".cr3", ".crw", ".dcr", ".dng", ".erf", ".fff", ".iiq", ".kdc", ".mef", ".mos"),
        *(".mrw", ".nef", ".nrw", ".orf", ".pef", ".raf", ".raw", ".rw2", ".rwl", ".sr2", ".srf", ".srw", ".x3f"),
    )
)
# Formats that are pictures and decode in this process. Left out on purpose: EPS starts Ghostscript, and formats
# without a signature (TGA) take any bytes for a picture; the latter is allowed to files that end so.
_FORMATS = ("PNG", "JPEG", "MPO", "WEBP", "GIF", "BMP", "DIB", "TIFF", "PPM", "JPEG2000", "AVIF", "ICO", "HEIF")
TURNS = {
    2: Transpose.FLIP_LEFT_RIGHT,
    3: Transpose.ROTATE_180,
    4: Transpose.FLIP_TOP_BOTTOM,
    5: Transpose.TRANSPOSE,
    6: Transpose.ROTATE_270,
    7: Transpose.TRANSVERSE,
    8: Transpose.ROTATE_90,
}
"""How a picture is turned by its EXIF orientation."""
# The marker before each pass over a JPEG's pixels with its length and its number of colours; programs write 3 to 12.
_SCAN = re.compile(rb"\xff\xda\x00(?:\x08\x01|\x0a\x02|\x0c\x03|\x0e\x04)")
_MAX_SCANS = 100
_PIXEL_LIMIT_LOCK = threading.Lock()


def read_image(source: ImageSource, *, max_pixels: float = DEFAULT_MAX_PIXELS) -> torch.Tensor:
    """Read a picture as a tensor: `read_pixels` with the channels first.

    Returns uint8, shape (3, H, W): red, green, blue. Raises LexisegError as `read_pixels`.
    """
    import torch

    return torch.from_numpy(read_pixels(source, max_pixels=max_pixels)).permute(2, 0, 1)


def read_pixels(source: ImageSource, *, max_pixels: float = DEFAULT_MAX_PIXELS, orient: bool = True) -> np.ndarray:
    """Read a picture, whatever holds it.

    Of several frames or pages the first is taken, and a LexisegWarning says so. Transparency is laid over white,
    because cut-outs and logos are drawn for a white page and the colours hidden under transparent pixels are arbitrary.

    Numbers that are not bytes are read by their depth, the same for files, arrays and tensors: floats in 0..1 run from
    black to white; other numbers are of the depth of 8, 10, 12, 14, 16 ... bits that just holds the largest of them, so
    that 12 bits in a 16-bit file run from 0 to 4095 (of colour files of 16 bits the upper 8 are read). Numbers below 0,
    and floats whose largest is between 1 and 2 (most likely 0..1 with overshoot), are refused.

    ``source``: a path; the bytes of a file; a binary file object; a PIL image; a numpy array (H, W) or (H, W, C) with 1
    to 4 channels (grey, grey and alpha, colour, colour and alpha); a torch tensor, (H, W) or (C, H, W). ``max_pixels``:
    refuse pictures with more pixels than this. For files the size is read from the header before anything is decoded,
    so that a small file cannot fill the memory. ``orient``: turn the picture as its EXIF orientation says. Returns
    uint8, shape (H, W, 3): red, green, blue; memory of its own. Raises LexisegError if the picture is missing, broken,
    too large, or of another kind. One sentence, with the name.
    """
    if isinstance(source, np.ndarray):
        return _from_array(source, "the array", max_pixels)
    if "torch" in sys.modules and isinstance(source, sys.modules["torch"].Tensor):
        return _from_tensor(source, max_pixels)
    if isinstance(source, Image.Image):
        return _from_pil(source, "the given picture", max_pixels, orient)
    if isinstance(source, bytes | bytearray | memoryview):
        return _from_file(io.BytesIO(bytes(source)), "the given data", max_pixels, orient)
    if isinstance(source, str | os.PathLike):
        return _from_path(source, max_pixels, orient)
    if not callable(getattr(source, "read", None)):
        raise LexisegError(
            f"A picture must be a path, bytes, a file object, a PIL image, a numpy array or a tensor, not "
            f"{describe(source) if source is None else kind(source)}."
        )
    name = f"the file '{shorten(image_name(source), 200)}'" if _own_name(source) else "the given file object"
    return _from_file(io.BytesIO(_all_bytes(source, name)), name, max_pixels, orient)


def list_images(target: str | Path) -> list[Path]:
    """List the pictures that a path stands for, in an order that does not depend on the machine.

    ``target``: a file (taken whatever its extension); a folder (its files with a picture's extension, hidden ones and
    subfolders left out); or a pattern with ``*``, ``?``, ``[]`` or ``**`` (files with a picture's extension). Returns
    the paths, in natural order: img2 comes before img10. Broken links and formats of cameras that cannot be read here
    (.heic ...) are among them, so that whoever reads them reports them; videos, files without an extension and folders
    of pictures are not, as a LexisegWarning says. Raises LexisegError if there is nothing of that name, or no picture.
    """
    text = os.fsdecode(target)
    refuse_url(text)
    path = spelled(text)
    try:
        if path.is_dir():
            found = [entry for entry in path.iterdir() if not entry.name.startswith(".")]
        elif os.path.lexists(path) or not glob.has_magic(text):
            if not os.path.lexists(path):
                raise LexisegError(f"There is no file or folder '{path}'; check the path.")
            return [path]
        else:
            found = [Path(name) for name in glob.glob(text, recursive=True)]  # noqa: PTH207 (patterns may be absolute)
            # A folder that links lead to in several ways, or in a circle, is one folder, by its shortest name.
            found.sort(key=lambda entry: (len(entry.parts), entry), reverse=True)
            found = list({(entry.parent.resolve(), entry.name): entry for entry in found}.values())
        videos = sum(entry.suffix.lower() in VIDEO_SUFFIXES for entry in found)
        bare = sum(not entry.suffix and entry.is_file() for entry in found)
        inner = path.is_dir() and sum(_holds_pictures(one) for one in found if not one.name.endswith("_masks"))
        kinds = ((videos, "video", ""), (bare, "file", " without an extension"), (inner, "folder", " of pictures"))
        for left, noun, more in kinds:
            if left:
                warn(f"Skipped in '{path}': {counted(left, noun)}{more}; give each one by itself.")
        known = IMAGE_SUFFIXES | FOREIGN_SUFFIXES
        found = [entry for entry in found if entry.suffix.lower() in known and (entry.is_file() or _is_broken(entry))]
    except (OSError, ValueError, re.error) as error:
        raise LexisegError(f"Cannot list '{shorten(text, 200)}' ({_reason(error)}); check the path.") from error
    if not found:
        raise LexisegError(f"There is no picture in '{path}'; supported are {', '.join(sorted(IMAGE_SUFFIXES))}.")
    return sorted(found, key=_natural_key)


def _holds_pictures(path: Path) -> bool:
    """Whether it is a folder with pictures, at any depth; those that end in ``_masks`` are lexiseg's and not asked."""
    names = (name for _, _, inside in os.walk(path) for name in inside)
    return any(name.lower().endswith(tuple(IMAGE_SUFFIXES)) for name in islice(names, 10_000))  # of maybe millions


def _is_broken(path: Path) -> bool:
    """Whether it is a link to nothing."""
    return path.is_symlink() and not path.exists()


def _natural_key(path: Path) -> tuple[list[tuple[int, int, str]], str]:
    parts = re.split(r"(\d+)", str(path).casefold())
    return [(1, int(part), "") if index % 2 else (0, 0, part) for index, part in enumerate(parts)], str(path)


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or "not a usable path"


def _from_path(source: str | os.PathLike[Any], max_pixels: float, orient: bool) -> np.ndarray:
    text = os.fsdecode(source)
    refuse_url(text)
    if "\0" in text:
        raise LexisegError("The picture's path holds a null character; check the path.")
    name = f"'{shorten(text, 200)}'"
    path = spelled(text)
    try:
        if path.is_dir():
            raise LexisegError(f"{name} is a folder, not a picture; give a file, or run on the folder's pictures.")
        if _is_broken(path):
            raise LexisegError(f"{name} is a link to a file that is not there; restore the file or remove the link.")
        with path.open("rb") as file:
            if path.is_file() and path.stat().st_size == 0:
                raise LexisegError(f"The picture {name} is an empty file; copy it again.")
            whole = file if file.seekable() else io.BytesIO(file.read())  # a pipe gives its bytes once
            return _from_file(whole, name, max_pixels, orient, path.suffix.lower())
    except FileNotFoundError as error:
        raise LexisegError(f"There is no picture {name}; check the path.") from error
    except (OSError, ValueError) as error:
        raise LexisegError(f"Cannot read the picture {name} ({_reason(error)}); check the path.") from error


def _all_bytes(source: Any, name: str) -> bytes:
    """What a file object holds from where it stands, or all of it where it stands at its end."""
    try:
        data = source.read()
        if not data and source.seekable():
            source.seek(0)
            data = source.read()
    except Exception as error:  # the object is the caller's and may raise anything
        raise LexisegError(f"Cannot read {name} ({shorten(str(error))}); open it again in binary mode.") from error
    if not isinstance(data, bytes | bytearray | memoryview):
        raise LexisegError(f"Reading {name} gives {kind(data)}, not bytes; open it in binary mode.")
    return bytes(data)


@contextmanager
def _without_warnings() -> Iterator[None]:
    # Pillow's, of large pictures and damaged metadata: the first is checked here, the second is harmless.
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"PIL\b")
        yield


pillow_silenced = SharedContext(_without_warnings)
"""Silences Pillow's warnings for a block, in any number of threads at once."""


def _from_file(file: IO[bytes], name: str, max_pixels: float, orient: bool, suffix: str = "") -> np.ndarray:
    with pillow_silenced():
        image = _open(file, name, suffix)
        try:
            if image.format in ("JPEG", "MPO"):
                _refuse_scans(file, name)
            pixels, several = _from_pil(image, name, max_pixels, orient), _has_several(image)
        finally:
            image.close()
    if several:
        text = f"{_capital(name)} holds several frames or pages, of which only the first is read; save the others as "
        warn(f"{text}pictures of their own if you want them too.")
    return pixels


def _refuse_scans(file: IO[bytes], name: str) -> None:
    """Refuse a JPEG of many passes over its pixels: each takes a few bytes, and the time of a whole picture."""
    place = file.tell()
    file.seek(0)
    scans = sum(1 for _ in _SCAN.finditer(file.read()))
    file.seek(place)
    if scans > _MAX_SCANS:
        raise LexisegError(
            f"{_capital(name)} is a JPEG of {scans} scans, which no camera or program writes; save it again."
        )


def _has_several(image: Image.Image) -> bool:
    """Whether a file holds more pictures; a camera's second one (MPO), a preview or a depth map, does not count."""
    try:  # counting them would take a time that grows with the square of a TIFF's pages
        return image.format != "MPO" and getattr(image, "is_animated", False)
    except Exception:  # the first can be read, whatever is wrong with the others
        return False


def open_header(file: Path | IO[bytes], formats: list[str] | tuple[str, ...] | None = None) -> Image.Image:
    """A picture of which only the header is read, however many pixels it announces: Pillow's errors, but for bombs."""
    try:
        return Image.open(file, formats=formats)
    except Image.DecompressionBombError:
        # Pillow's own limit is lower than ours may be, and the same for a whole process. It is lifted for the header
        # alone; whoever opens the picture checks ours next.
        with _PIXEL_LIMIT_LOCK:
            limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
            try:
                if not isinstance(file, Path):
                    file.seek(0)
                return Image.open(file, formats=formats)
            finally:
                Image.MAX_IMAGE_PIXELS = limit


def _open(file: IO[bytes], name: str, suffix: str) -> Image.Image:
    with suppress(Exception):
        return open_header(file, ["PNG", "JPEG"])  # without importing Pillow's 70 other plugins
    Image.init()
    formats = [kind for kind in _FORMATS if kind in Image.OPEN] + (["TGA"] if suffix == ".tga" else [])
    try:
        return open_header(file, formats)
    except Exception as error:  # decoders of hostile bytes raise nearly anything
        if suffix in FOREIGN_SUFFIXES:
            raise LexisegError(
                f"{_capital(name)} is in a format that is not supported ({suffix}); convert it to JPEG, PNG or TIFF."
            ) from error
        file.seek(0)
        if file.read(4) in TiffImagePlugin.PREFIXES:
            text = (
                f"{_capital(name)} is a TIFF of a kind that is not read, such as one of five bands or of float colours"
            )
            raise LexisegError(f"{text}, or it is damaged; save it again as red, green and blue bytes.") from error
        raise LexisegError(
            f"{_capital(name)} is not a picture that can be read (PNG, JPEG, WebP, TIFF, GIF, BMP ...); convert it or "
            "give another file."
        ) from error


def _from_pil(image: Image.Image, name: str, max_pixels: float, orient: bool) -> np.ndarray:
    _check_size(image.width, image.height, name, max_pixels)
    try:
        # Pillow reads the upper 8 bits alone; a PNG's orientation may stand behind its pixels, which are then read too.
        halved = image.mode in ("RGB", "RGBA") and ";16" in str(getattr(image, "tile", ""))
        orientation = orientation_of(image)
        image.load()
        if image.format == "TIFF":  # Pillow has turned it
            orientation = 1 if orient else {6: 8, 8: 6}.get(orientation, orientation)
        elif not orient:
            orientation = 1
        # A file may announce one size and hold another; what counts is what was decoded.
        _check_size(image.width, image.height, name, max_pixels)
        pixels = _to_rgb(image, name)
    except LexisegError:
        raise
    except Exception as error:  # see _open
        raise LexisegError(f"{_capital(name)} is truncated or damaged; copy or save the picture again.") from error
    if orientation in TURNS:
        pixels = pixels.transpose(TURNS[orientation])
    array = np.array(pixels)
    if halved and array.max() < 32:
        text = f"{_capital(name)} uses less than 13 of its 16 bits per colour, of which the upper 8 are read, so it is "
        warn(f"{text}nearly black; scale its values to 16 bits.")
    return array


def orientation_of(image: Image.Image) -> int:
    """How a picture that was not decoded yet is to be turned, 1 to 8 as EXIF counts; 1, not at all, if damaged."""
    try:
        found = image.getexif().get(ExifTags.Base.Orientation)
    except Exception:  # damaged metadata does not spoil the picture
        return 1
    return found if found in TURNS else 1


def stored_size(image: Image.Image) -> tuple[int, int]:
    """Width and height of a picture as its file holds it; newer releases of Pillow give those of TIFFs turned."""
    tags = image.tag_v2 if isinstance(image, TiffImagePlugin.TiffImageFile) else None
    return image.size if tags is None else (tags[TiffImagePlugin.IMAGEWIDTH], tags[TiffImagePlugin.IMAGELENGTH])


def _to_rgb(image: Image.Image, name: str) -> Image.Image:
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode.startswith("I") or image.mode == "F":
        return Image.fromarray(_to_bytes(np.asarray(image), name)).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        layers = image.convert("RGBA") if image.mode != "La" else image.convert("LA").convert("RGBA")
        page = Image.new("RGBA", image.size, (255, 255, 255, 255))
        return Image.alpha_composite(page, layers).convert("RGB")
    return image.convert("RGB")


def _to_bytes(values: np.ndarray, name: str) -> np.ndarray:
    """Numbers of any depth as bytes; see `read_pixels` for the rule."""
    if values.dtype == np.uint8:
        return values
    if values.dtype == np.bool_:
        return values.astype(np.uint8) * np.uint8(255)
    if values.dtype.kind not in "iuf":
        raise LexisegError(f"{_capital(name)} is of type {values.dtype}; give whole numbers, bool or float in 0..1.")
    low, high = float(values.min()), float(values.max())
    if not 0 <= low <= high < float(2**64):
        raise LexisegError(f"{_capital(name)} holds values that are negative, NaN or infinite; scale it to 0..1.")
    whole = values.dtype.kind != "f"
    if not whole and 1 < high < 2:
        raise LexisegError(f"{_capital(name)} holds floats up to {high:.9g}, outside 0..1; clip or scale it.")
    bits = int(high).bit_length()
    top = 2 ** max(8, bits + bits % 2) - 1 if whole or high > 1 else 1
    if whole and top == 255:
        return values.astype(np.uint8)
    if values.dtype == np.uint16:
        return np.rint(np.arange(65536) * (255 / top)).clip(0, 255).astype(np.uint8)[values]
    return np.rint(values * (255 / top)).clip(0, 255).astype(np.uint8)


def _from_tensor(tensor: torch.Tensor, max_pixels: float) -> np.ndarray:
    import torch

    usable = not (tensor.is_nested or tensor.is_quantized or tensor.is_meta) and tensor.layout == torch.strided
    if not usable or tensor.dim() not in (2, 3) or (tensor.ndim == 3 and tensor.shape[0] not in (1, 2, 3, 4)):
        last = usable and tensor.dim() == 3 and tensor.shape[2] in (3, 4)
        kind = f"the shape {tuple(tensor.shape)}" if usable else "other storage (nested, sparse, quantised or meta)"
        raise LexisegError(
            f"A picture as a tensor must be dense with the shape (3, height, width), not of {kind}; "
            + ("give tensor.permute(2, 0, 1)." if last else "for several pictures give a list.")
        )
    try:
        tensor = tensor.detach().cpu().resolve_conj().resolve_neg()
        array = (tensor.float() if tensor.is_floating_point() else tensor).numpy()
    except (RuntimeError, TypeError, ValueError, NotImplementedError) as error:
        raise LexisegError(f"The tensor ({tensor.dtype}) cannot be read; give uint8 or float in 0..1.") from error
    return _from_array(array if array.ndim == 2 else array.transpose(1, 2, 0), "the tensor", max_pixels)


def _from_array(array: np.ndarray, name: str, max_pixels: float) -> np.ndarray:
    if array.ndim == 2:
        array = np.asarray(array)[:, :, None]
    if array.ndim != 3 or array.shape[2] not in (1, 2, 3, 4):
        first = array.ndim == 3 and array.shape[0] in (3, 4)
        raise LexisegError(
            f"A picture as an array must have the shape (height, width, 3), not {array.shape}; "
            + ("give array.transpose(1, 2, 0)." if first else "for several pictures give a list.")
        )
    _check_size(array.shape[1], array.shape[0], name, max_pixels)
    if array.dtype.kind in "iu" and array.max() == 1:
        text = f"{_capital(name)} holds whole numbers from 0 to 1, so the picture is black; if it is one of floats in "
        warn(f"{text}0..1, give those, and if it is a mask, the picture instead.")
    array = _to_bytes(np.asarray(array), name)
    channels = array.shape[2]
    if channels in (2, 4):
        layers = Image.fromarray(np.ascontiguousarray(array), "LA" if channels == 2 else "RGBA")
        return _from_pil(layers, name, max_pixels, False)
    return np.array(np.repeat(array, 3, axis=2) if channels == 1 else array)


def _check_size(width: int, height: int, name: str, max_pixels: float) -> None:
    if width < 1 or height < 1:
        raise LexisegError(f"{_capital(name)} has no pixels ({width} x {height}); give another.")
    if width * height > max_pixels:
        raise LexisegError(
            f"{_capital(name)} has {width} x {height} = {width * height:,} pixels, more than the limit of "
            f"{max_pixels:,.0f}; raise the limit if you trust it, or shrink the picture."
        )


def _capital(name: str) -> str:
    return name[:1].upper() + name[1:]


def image_name(source: Any) -> str:
    """What to call a picture in messages and reports: its path or file name where it has one, else its kind."""
    return _own_name(source) or ("the given data" if isinstance(source, bytes | bytearray) else kind(source))


def _own_name(source: Any) -> str:
    if isinstance(source, str | os.PathLike):
        return os.fsdecode(source)
    try:
        name = getattr(source, "filename", None) or getattr(source, "name", None)
    except Exception:  # the object is the caller's and may raise anything
        name = None
    return name if isinstance(name, str) else ""
