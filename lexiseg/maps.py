"""Maps: GeoTIFFs of any size, by windows, with their georeference kept (extra ``geo``)."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from lexiseg.errors import LexisegError, need, warn
from lexiseg.files import atomic_write, make_folder, need_utf8
from lexiseg.label_ids import ignore_index
from lexiseg.windows import check_proportions
from lexiseg.words import counted, describe, printable, whole_number

if TYPE_CHECKING:
    from lexiseg.segmenter import Segmenter
    from lexiseg.vocabulary import Vocabulary

MAP_SUFFIXES = frozenset({".tif", ".tiff", ".vrt", ".jp2"})
_BLOCK = 512
_CACHE_MEGABYTES = 256
# Numbers are stretched between these percentiles of a map's overview, as viewers of maps do.
_LOW, _HIGH = 2.0, 98.0
_OVERVIEW = 1024
MOST_TAGS = 4096


@dataclass(frozen=True)
class MapOptions:
    """How a map is segmented."""

    # red, green and blue, counted from 1; None takes the first three, or the first alone of one or two
    bands: tuple[int, int, int] | None = None
    tile: int = 1024  # side of a tile in pixels; a multiple of 16
    margin: int = 64  # pixels that a tile sees of its neighbours on each side
    polygons: str = "geojson"  # write polygons as well: "none", "geojson" or "gpkg" (GeoPackage)
    smallest: int = 16  # polygons of fewer pixels are left out

    def __post_init__(self) -> None:
        if whole_number(self.tile, "A tile's side") < 16 or self.tile % 16:
            raise LexisegError(f"A tile's side must be a multiple of 16, not {describe(self.tile)}.")
        whole_number(self.margin, "A tile's margin")
        whole_number(self.smallest, "The smallest polygon")
        if self.polygons not in ("none", "geojson", "gpkg"):
            raise LexisegError(f"Polygons are written as geojson, gpkg or none, not {describe(self.polygons)}.")


def is_map(path: str | Path) -> bool:
    """Whether a file is a TIFF or another raster with a georeference, and of a name that GDAL takes."""
    path = Path(path)
    if path.suffix.lower() in MAP_SUFFIXES and path.is_file():
        with suppress(LexisegError), warnings.catch_warnings():  # whether it lies anywhere is what is asked here
            warnings.simplefilter("ignore")
            with _opened(path) as source:
                return source.crs is not None
    return False


def map_files(source: str | Path, folder: str | Path, options: MapOptions) -> dict[str, Path]:
    """Where `segment_map` writes: "labels", a GeoTIFF of ids, and "polygons", if they are asked for."""
    folder, stem = Path(folder), Path(source).stem
    files = {"labels": folder / f"{stem}_labels.tif"}
    if options.polygons != "none":
        files["polygons"] = folder / f"{stem}_polygons.{options.polygons}"
    return files


def count_tiles(source: str | Path, options: MapOptions) -> int:
    """How many tiles a map is cut into at most. Raises LexisegError if it cannot be read, or without rasterio."""
    with _opened(source) as raster:
        return math.ceil(raster.width / options.tile) * math.ceil(raster.height / options.tile)


def segment_map(
    segmenter: Segmenter,
    source: str | Path,
    vocabulary: Vocabulary,
    folder: str | Path,
    options: MapOptions | None = None,
    **settings: Any,
) -> Iterator[tuple[int, int, NDArray[np.integer]]]:
    """Segment a raster tile by tile; see `map_files`.

    Labels are a tiled, compressed GeoTIFF in the cloud-optimised layout with the source's georeference, its palette and
    the names of the classes; what the source's mask leaves out, and no class, is its no-data value (255, or 65535
    beyond 255 classes). Polygons are in the source's coordinates and are cut where tiles meet. Memory is that of some
    tiles.

    ``settings``: ``window`` and others that `Segmenter.predict` takes. Returns an iterator that does the work, a tile
    at a time, and gives its row, its column and its labels; files are there when it ends. Raises LexisegError if
    rasterio is not installed, or the raster or the bands are wrong.
    """
    options = options or MapOptions()
    raster = _opened(source)
    bands = _bands(options.bands, int(raster.count))
    most = options.tile + 2 * options.margin
    check_proportions(
        min(raster.height, most), min(raster.width, most), f"'{printable(str(source))}', or a tile of it,"
    )
    need_utf8(Path(folder), "GDAL")
    files = map_files(source, make_folder(folder), options)
    return _segment(_import_rasterio(), raster, bands, segmenter, vocabulary, files, options, settings)


def _segment(
    rasterio: Any, raster: Any, bands: Sequence[int], segmenter: Segmenter, vocabulary: Vocabulary,
    files: dict[str, Path], options: MapOptions, settings: dict[str, Any],
) -> Iterator[tuple[int, int, NDArray[np.integer]]]:  # fmt: skip
    nodata = ignore_index(len(vocabulary))
    profile = {
        "driver": "GTiff", "width": raster.width, "height": raster.height, "count": 1,
        "dtype": {255: "uint8", 65535: "uint16"}.get(nodata, "int32"), "nodata": nodata,
        "crs": raster.crs, "transform": raster.transform,
        "tiled": True, "blockxsize": _BLOCK, "blockysize": _BLOCK, "compress": "deflate", "bigtiff": "if_safer",
        "sparse_ok": True,
    }  # fmt: skip
    with ExitStack() as stack:
        stack.enter_context(rasterio.Env(GDAL_CACHEMAX=_CACHE_MEGABYTES))
        stack.enter_context(raster)
        final = stack.enter_context(atomic_write(files["labels"]))
        scratch = stack.enter_context(TemporaryDirectory(dir=final.parent, prefix=".lexiseg-"))
        vectors = stack.enter_context(_Polygons(files["polygons"], raster.crs)) if "polygons" in files else None
        low, high = _stretch(raster, bands)
        plain, empty = Path(scratch) / "labels.tif", True
        with rasterio.open(plain, "w", **profile) as labels:
            labels.update_tags(1, **_name_tags(vocabulary.names))
            palette = vocabulary.palette().tolist()
            labels.write_colormap(1, {index: (*color, 255) for index, color in enumerate(palette)})
            for inner, outer in _tiles(rasterio, raster, options):
                with _reading(raster.name):
                    valid = raster.dataset_mask(window=outer) > 0
                    values = raster.read(bands, window=outer) if valid.any() else None
                if values is None:
                    continue  # a part that holds nothing is not written, so an empty map stays small
                empty, pixels = False, _pixels(values, low, high)
                found = np.asarray(segmenter.predict(pixels, vocabulary, **settings).label_map).astype(profile["dtype"])
                found[~valid] = nodata
                row, column = inner.row_off - outer.row_off, inner.col_off - outer.col_off
                found = found[row : row + inner.height, column : column + inner.width]
                labels.write(found, 1, window=inner)
                if vectors is not None:
                    vectors.add(found, nodata, rasterio.windows.transform(inner, raster.transform), vocabulary, options)
                yield inner.row_off, inner.col_off, found
        if empty:
            note = f"'{printable(raster.name)}' is masked or without data throughout, so no pixel has a class"
            warn(f"{note}; check its mask and no-data value.")
        # A cloud-optimised file is laid out anew: its overviews come first.
        layout = {"compress": "deflate", "blocksize": _BLOCK, "overview_resampling": "nearest", "bigtiff": "if_safer"}
        rasterio.shutil.copy(plain, final, driver="COG", sparse_ok=True, **layout)


def _import_rasterio() -> Any:
    for part in ("features", "shutil", "windows"):
        need(f"rasterio.{part}", "Maps need rasterio", "geo")
    return need("rasterio", "Maps need rasterio", "geo")


@contextmanager
def _reading(source: str | Path) -> Iterator[None]:
    """What fails here is the map's fault, not that of a file that is being written meanwhile."""
    try:
        yield
    except (_import_rasterio().errors.RasterioError, UnicodeError) as error:  # GDAL takes names in UTF-8 alone
        raise LexisegError(f"'{printable(str(source))}' cannot be read as a map; check the file.") from error


def _opened(source: str | Path) -> Any:
    with _reading(source):
        return _import_rasterio().open(source)


def _bands(wanted: tuple[int, int, int] | None, count: int) -> tuple[int, ...]:
    if wanted is None:
        return (1, 2, 3) if count >= 3 else (1, 1, 1)
    three = isinstance(wanted, list | tuple) and len(wanted) == 3
    if not three or any(band not in range(1, count + 1) for band in wanted):
        raise LexisegError(f"The map has {counted(count, 'band')}, counted from 1; choose three of them, not {wanted}.")
    return wanted


def _tiles(rasterio: Any, raster: Any, options: MapOptions) -> Iterator[tuple[Any, Any]]:
    """Tiles row by row: the window that is written, and the larger one that is looked at, even at an edge."""
    window, tile, margin = rasterio.windows.Window, options.tile, options.margin
    whole = window(0, 0, raster.width, raster.height)
    for top in range(0, raster.height, tile):
        for left in range(0, raster.width, tile):
            x, y = min(left - margin, raster.width - tile), min(top - margin, raster.height - tile)
            seen = window(x, y, left + tile + margin - x, top + tile + margin - y)
            yield window(left, top, tile, tile).intersection(whole), seen.intersection(whole)


def _stretch(raster: Any, bands: Sequence[int]) -> tuple[NDArray[np.floating], NDArray[np.floating]]:
    """What becomes black and white in each band; bytes stay as they are."""
    if all(raster.dtypes[band - 1] == "uint8" for band in bands):
        return np.zeros(3), np.full(3, 255.0)
    factor = max(1, math.ceil(max(raster.shape) / _OVERVIEW))
    shape = (len(bands), max(1, raster.height // factor), max(1, raster.width // factor))
    with _reading(raster.name):
        small = raster.read(bands, out_shape=shape, masked=True)
    if np.iscomplexobj(small):
        raise LexisegError("The map holds complex numbers; convert it to real ones, such as their magnitude.")
    # Maps of floats mark what is missing by NaN, with or without saying so.
    finite = [band.compressed()[np.isfinite(band.compressed())] for band in small]
    ends = [np.percentile(values, (_LOW, _HIGH)) if values.size else np.array([0.0, 1.0]) for values in finite]
    return np.array([end[0] for end in ends]), np.array([end[1] for end in ends])


def _pixels(values: NDArray[np.generic], low: NDArray[np.floating], high: NDArray[np.floating]) -> NDArray[np.uint8]:
    scaled = (values.astype(np.float64) - low[:, None, None]) / np.maximum(high - low, 1e-12)[:, None, None]
    return np.ascontiguousarray((np.nan_to_num(scaled).clip(0, 1) * 255).round().astype(np.uint8).transpose(1, 2, 0))


def _name_tags(names: Sequence[str]) -> dict[str, str]:
    """A tag a class; GDAL takes time with the square of their number, so beyond `MOST_TAGS` one holds all as JSON."""
    if len(names) > MOST_TAGS:
        return {"classes": json.dumps(names)}
    return {f"class_{index}": name for index, name in enumerate(names)}


class _Polygons:
    """Polygons, written as they come: GeoJSON by hand, a feature a line; GeoPackage by pyogrio, some at a time."""

    def __init__(self, path: Path, crs: Any) -> None:
        self.path = path
        self.crs = crs
        self.count = 0
        self._stack = ExitStack()
        self._kept: list[tuple[Any, int, str]] = []

    def __enter__(self) -> _Polygons:
        self.temporary = self._stack.enter_context(atomic_write(self.path))
        if self.path.suffix == ".geojson":
            self.file = self._stack.enter_context(self.temporary.open("w", encoding="utf-8"))
            name = {"type": "name", "properties": {"name": self.crs.to_string()}} if self.crs else None
            self.file.write('{"type": "FeatureCollection", "crs": ' + json.dumps(name) + ', "features": [')
        else:
            need("pyogrio", "GeoPackages need pyogrio", "geo")
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> bool | None:
        if kind is None:
            if self.path.suffix == ".geojson":
                self.file.write("\n]}\n")
            else:
                self._flush()
        return self._stack.__exit__(kind, error, trace)

    def add(
        self, labels: NDArray[np.integer], nodata: int, transform: Any, vocabulary: Vocabulary, options: MapOptions
    ) -> None:
        """Add the polygons of a tile."""
        from rasterio import features
        from shapely.geometry import shape

        for geometry, value in features.shapes(labels, mask=labels != nodata, transform=transform):
            outline, index = shape(geometry), int(value)
            if round(outline.area / abs(transform.determinant)) < options.smallest:
                continue
            if self.path.suffix == ".geojson":
                properties = {"id": index, "name": vocabulary.names[index]}
                feature = {"type": "Feature", "properties": properties, "geometry": geometry}
                self.file.write(("," if self.count else "") + "\n" + json.dumps(feature))
            else:
                self._kept.append((outline, index, vocabulary.names[index]))
                if len(self._kept) >= 10_000:
                    self._flush()
            self.count += 1

    def _flush(self) -> None:
        import pyogrio

        geometry = np.array([shape.wkb for shape, _, _ in self._kept], dtype=object)
        fields = [
            np.array([index for _, index, _ in self._kept], dtype=np.int32),
            np.array([name for _, _, name in self._kept], dtype=object),
        ]
        pyogrio.raw.write(
            self.temporary, geometry, fields, np.array(["id", "name"], dtype=object), layer="segments",
            driver="GPKG", geometry_type="Polygon", crs=self.crs.to_wkt() if self.crs else None,
            append=self.temporary.exists() and self.temporary.stat().st_size > 0,
        )  # fmt: skip
        self._kept = []
