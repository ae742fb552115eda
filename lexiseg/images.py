"""Reading any picture into one form: red, green, blue bytes."""

from __future__ import annotations

import glob
import io
import re
import threading
import warnings
from pathlib import Path
from typing import IO, Any, TypeAlias

import numpy as np
import torch
from PIL import ExifTags, Image
from PIL.Image import Transpose

from lexiseg.errors import LexisegError
from lexiseg.words import shorten

ImageSource: TypeAlias = "str | Path | bytes | IO[bytes] | Image.Image | np.ndarray | torch.Tensor"

DEFAULT_MAX_PIXELS = 200_000_000
IMAGE_SUFFIXES = frozenset(
    (
        *(".avif", ".bmp", ".gif", ".jfif", ".jp2", ".jpe", ".jpeg", ".jpg", ".mpo", ".pbm", ".pgm"),
        *(".png", ".pnm", ".ppm", ".tif", ".tiff", ".webp"),
    )
)
# Formats that are pictures and decode in this process. Left out on purpose: EPS starts Ghostscript, and formats
# without a signature (TGA) take any bytes for a picture.
_FORMATS = ("PNG", "JPEG", "MPO", "WEBP", "GIF", "BMP", "DIB", "TIFF", "PPM", "JPEG2000", "AVIF", "ICO", "HEIF")
_TURNS = {
    2: Transpose.FLIP_LEFT_RIGHT,
    3: Transpose.ROTATE_180,
    4: Transpose.FLIP_TOP_BOTTOM,
    5: Transpose.TRANSPOSE,
    6: Transpose.ROTATE_270,
    7: Transpose.TRANSVERSE,
    8: Transpose.ROTATE_90,
}
_PIXEL_LIMIT_LOCK = threading.Lock()


def read_image(source: ImageSource, *, max_pixels: float = DEFAULT_MAX_PIXELS) -> torch.Tensor:
    """Read a picture, whatever holds it.

    Files: the EXIF orientation is applied; of an animation the first frame is taken; 16-bit values keep their upper
    byte's precision (v / 257, rounded). Transparency is laid over white, because cut-outs and logos are drawn for a
    white page and the colours hidden under transparent pixels are arbitrary.

    Args:
        source: a path; the bytes of a file; a binary file object; a PIL image; a numpy array (H, W) or (H, W, C) with
            1 to 4 channels (grey, grey and alpha, colour, colour and alpha) of type uint8, uint16, bool, or float in
            0..1; a torch tensor of those types, (H, W) or (C, H, W).
        max_pixels: refuse pictures with more pixels than this. For files the size is read from the header before
            anything is decoded, so that a small file cannot fill the memory.

    Returns:
        uint8, shape (3, H, W): red, green, blue.

    Raises:
        LexisegError: the picture is missing, broken, too large, or of another kind. One sentence, with the name.
    """
    if isinstance(source, torch.Tensor):
        return _from_tensor(source, max_pixels)
    if isinstance(source, np.ndarray):
        return _from_array(source, max_pixels)
    if isinstance(source, Image.Image):
        return _from_pil(source, "the given picture", max_pixels)
    if isinstance(source, bytes | bytearray | memoryview):
        return _from_file(io.BytesIO(source), "the given data", max_pixels)
    if isinstance(source, str | Path):
        return _from_path(source, max_pixels)
    read = getattr(source, "read", None)
    if not callable(read):
        raise LexisegError(
            f"A picture must be a path, bytes, a file object, a PIL image, a numpy array or a tensor, not a "
            f"{type(source).__name__}."
        )
    name = f"the file '{source.name}'" if isinstance(getattr(source, "name", None), str) else "the given file object"
    try:
        data = read()
    except (OSError, ValueError) as error:
        raise LexisegError(f"Cannot read {name} ({error}); open it again in binary mode.") from error
    if not isinstance(data, bytes):
        raise LexisegError(f"Reading {name} gives text, not bytes; open it in binary mode.")
    return _from_file(io.BytesIO(data), name, max_pixels)


def list_images(target: str | Path) -> list[Path]:
    """List the pictures that a path stands for, in an order that does not depend on the machine.

    Args:
        target: a file (taken whatever its ending); a folder (its files with a picture's ending, hidden ones and
            subfolders left out); or a pattern with ``*``, ``?``, ``[]`` or ``**`` (files with a picture's ending).

    Returns:
        The paths, in natural order: img2 comes before img10.

    Raises:
        LexisegError: there is nothing of that name, or no picture in it.
    """
    path, text = Path(target), str(target)
    _refuse_url(text)
    try:
        if path.is_dir():
            found = [entry for entry in path.iterdir() if not entry.name.startswith(".")]
        elif path.exists() or not glob.has_magic(text):
            if not path.exists():
                raise LexisegError(f"There is no file or folder '{path}'; check the path.")
            return [path]
        else:
            found = [Path(name) for name in glob.glob(text, recursive=True)]  # noqa: PTH207 (patterns may be absolute)
        found = [entry for entry in found if entry.suffix.lower() in IMAGE_SUFFIXES and entry.is_file()]
    except (OSError, ValueError, re.error) as error:
        raise LexisegError(f"Cannot list '{shorten(text, 200)}' ({_reason(error)}); check the path.") from error
    if not found:
        raise LexisegError(
            f"There is no picture in '{path}'; endings that count are {', '.join(sorted(IMAGE_SUFFIXES))}."
        )
    return sorted(found, key=_natural_key)


def _natural_key(path: Path) -> tuple[list[tuple[int, int, str]], str]:
    parts = re.split(r"(\d+)", str(path).casefold())
    return [(1, int(part), "") if index % 2 else (0, 0, part) for index, part in enumerate(parts)], str(path)


def _refuse_url(text: str) -> None:
    if re.match(r"[A-Za-z][A-Za-z0-9+.\-]+://|data:image", text):
        raise LexisegError(
            f"'{shorten(text, 100)}' is a URL, and nothing is fetched from the network; download the picture and give "
            "its path."
        )


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or "not a usable path"


def _from_path(source: str | Path, max_pixels: float) -> torch.Tensor:
    _refuse_url(str(source))
    path = Path(source)
    name = f"'{shorten(str(source), 200)}'"
    if "\0" in str(source):
        raise LexisegError("The picture's path holds a null character; check the path.")
    try:
        if path.is_dir():
            raise LexisegError(f"{name} is a folder, not a picture; give a file, or run on the folder's pictures.")
        with path.open("rb") as file:
            if path.is_file() and path.stat().st_size == 0:
                raise LexisegError(f"The picture {name} is an empty file; copy it again.")
            return _from_file(file, name, max_pixels)
    except FileNotFoundError as error:
        raise LexisegError(f"There is no picture {name}; check the path.") from error
    except (OSError, ValueError) as error:
        raise LexisegError(f"Cannot read the picture {name} ({_reason(error)}); check the path.") from error


def _from_file(file: IO[bytes], name: str, max_pixels: float) -> torch.Tensor:
    with warnings.catch_warnings():
        # Pillow warns of large pictures and of damaged metadata; the first is checked here, the second is harmless.
        warnings.simplefilter("ignore")
        image = _open(file, name)
        try:
            return _from_pil(image, name, max_pixels)
        finally:
            image.close()


def _open(file: IO[bytes], name: str) -> Image.Image:
    """Read the header only."""
    Image.init()
    formats = [kind for kind in _FORMATS if kind in Image.OPEN]
    try:
        try:
            return Image.open(file, formats=formats)
        except Image.DecompressionBombError:
            # Pillow's own limit is lower than ours may be, and the same for a whole process. It is lifted for the
            # header alone; ours is checked next.
            with _PIXEL_LIMIT_LOCK:
                limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
                try:
                    file.seek(0)
                    return Image.open(file, formats=formats)
                finally:
                    Image.MAX_IMAGE_PIXELS = limit
    except Exception as error:  # decoders of hostile bytes raise nearly anything
        raise LexisegError(
            f"{_capital(name)} is not a picture that can be read (PNG, JPEG, WebP, TIFF, GIF, BMP ...); convert it or "
            "give another file."
        ) from error


def _from_pil(image: Image.Image, name: str, max_pixels: float) -> torch.Tensor:
    _check_size(image.width, image.height, name, max_pixels)
    try:
        image.load()
        try:
            orientation = image.getexif().get(ExifTags.Base.Orientation)
        except Exception:  # damaged metadata does not spoil the picture
            orientation = None
        # A file may announce one size and hold another; what counts is what was decoded.
        _check_size(image.width, image.height, name, max_pixels)
        pixels = _to_rgb(image, name)
    except LexisegError:
        raise
    except Exception as error:  # see _open
        raise _broken(name) from error
    if orientation in _TURNS:
        pixels = pixels.transpose(_TURNS[orientation])
    return torch.from_numpy(np.array(pixels)).permute(2, 0, 1)


def _broken(name: str) -> LexisegError:
    return LexisegError(f"{_capital(name)} is truncated or damaged; copy or save the picture again.")


def _to_rgb(image: Image.Image, name: str) -> Image.Image:
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode.startswith("I") or image.mode == "F":
        return Image.fromarray(_grey_bytes(np.asarray(image), name)).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        layers = image.convert("RGBA") if image.mode != "La" else image.convert("LA").convert("RGBA")
        page = Image.new("RGBA", image.size, (255, 255, 255, 255))
        return Image.alpha_composite(page, layers).convert("RGB")
    return image.convert("RGB")


def _grey_bytes(values: np.ndarray, name: str) -> np.ndarray:
    """Bring 16-bit, 32-bit integer and float grey values into 0..255."""
    if values.dtype.kind == "f":
        low, high = float(values.min()), float(values.max())
        if not (low >= 0 and high <= 255):
            raise LexisegError(f"{_capital(name)} holds numbers outside 0..255; save it with 8 or 16 bits.")
        return np.round(values * (255.0 if high <= 1 else 1.0)).astype(np.uint8)
    if int(values.min()) < 0 or int(values.max()) > 65535:
        raise LexisegError(f"{_capital(name)} holds numbers outside 0..65535; save it with 8 or 16 bits.")
    return _upper_byte(values)


def _upper_byte(values: np.ndarray) -> np.ndarray:
    return ((values.astype(np.uint32) + 128) // 257).astype(np.uint8)


def _from_tensor(tensor: torch.Tensor, max_pixels: float) -> torch.Tensor:
    tensor = tensor.detach().cpu()
    if tensor.ndim == 2:
        tensor = tensor[None]
    if tensor.ndim != 3 or tensor.shape[0] not in (1, 2, 3, 4):
        raise LexisegError(
            f"A picture as a tensor must have the shape (3, height, width), not {tuple(tensor.shape)}; for several "
            "pictures give a list."
        )
    if tensor.is_floating_point():
        tensor = tensor.float()
    return _from_channels(tensor.permute(1, 2, 0).numpy(), "the tensor", max_pixels)


def _from_array(array: np.ndarray, max_pixels: float) -> torch.Tensor:
    if array.ndim == 2:
        array = array[:, :, None]
    if array.ndim != 3 or array.shape[2] not in (1, 2, 3, 4):
        raise LexisegError(
            f"A picture as an array must have the shape (height, width, 3), not {array.shape}; for several pictures "
            "give a list."
        )
    return _from_channels(array, "the array", max_pixels)


def _from_channels(array: np.ndarray, name: str, max_pixels: float) -> torch.Tensor:
    _check_size(array.shape[1], array.shape[0], name, max_pixels)
    if array.dtype == np.bool_:
        array = array.astype(np.uint8) * np.uint8(255)
    elif array.dtype == np.uint16:
        array = _upper_byte(array)
    elif array.dtype.kind == "f":
        if not (float(array.min()) >= 0 and float(array.max()) <= 1):
            raise LexisegError(f"{_capital(name)} holds floats outside 0..1; scale it, or give uint8 values in 0..255.")
        array = np.round(array * 255).astype(np.uint8)
    elif array.dtype != np.uint8:
        raise LexisegError(f"{_capital(name)} is of type {array.dtype}; give uint8, uint16, bool or float in 0..1.")
    channels = array.shape[2]
    if channels in (2, 4):
        mode_array = np.ascontiguousarray(array)
        return _from_pil(Image.fromarray(mode_array, "LA" if channels == 2 else "RGBA"), name, max_pixels)
    if channels == 1:
        array = np.repeat(array, 3, axis=2)
    return torch.from_numpy(np.array(array)).permute(2, 0, 1)


def _check_size(width: int, height: int, name: str, max_pixels: float) -> None:
    if width < 1 or height < 1:
        raise LexisegError(f"{_capital(name)} has no pixels ({width} x {height}).")
    if width * height > max_pixels:
        raise LexisegError(
            f"{_capital(name)} has {width} x {height} = {width * height / 1e6:,.1f} megapixels, more than the limit of "
            f"{max_pixels / 1e6:,.1f}; raise the limit if you trust it, or shrink the picture."
        )


def _capital(name: str) -> str:
    return name[:1].upper() + name[1:]


def image_name(source: Any) -> str:
    """What to call a picture in messages and reports: its path or file name where it has one, else its kind."""
    if isinstance(source, str | Path):
        return str(source)
    name = getattr(source, "filename", None) or getattr(source, "name", None)
    return name if isinstance(name, str) and name else f"a {type(source).__name__}"
