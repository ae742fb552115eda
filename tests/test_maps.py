"""Maps: georeference kept, tiles that join, polygons on the earth, sizes that no memory holds."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

import lexiseg
from lexiseg.cli import main
from lexiseg.cli.streams import predict_map
from lexiseg.errors import LexisegError, LexisegWarning
from lexiseg.images import read_pixels
from lexiseg.maps import MapOptions, count_tiles, is_map, map_files, segment_map
from lexiseg.samples import sample_path
from lexiseg.vocabulary import Vocabulary

rasterio = pytest.importorskip("rasterio")
WORDS = "giraffe; elephant; butterfly; tree; leaves; grass"
PLACE = rasterio.transform.from_origin(500000, 5400000, 0.5, 0.5)


@pytest.fixture(scope="module")
def segmenter() -> Any:
    return lexiseg.load("zegclip-emoji", device="cpu")


def write(path: Path, bands: np.ndarray, **more: Any) -> Path:
    profile = {"driver": "GTiff", "crs": "EPSG:32632", "transform": PLACE, "count": len(bands), "dtype": bands.dtype}
    with rasterio.open(path, "w", height=bands.shape[1], width=bands.shape[2], **{**profile, **more}) as file:
        file.write(bands)
    return path


def run(segmenter: Any, source: Path, folder: Path, **options: Any) -> dict[str, Path]:
    chosen = MapOptions(**options)
    for _ in segment_map(segmenter, source, segmenter.vocabulary(WORDS), folder, chosen):
        pass
    return map_files(source, folder, chosen)


def test_a_tiff_without_a_place_is_no_map_and_nothing_is_said(tmp_path: Path) -> None:
    Image.new("RGB", (8, 6)).save(tmp_path / "plain.tif")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not is_map(tmp_path / "plain.tif")


def test_maps_among_pictures_and_names_that_gdal_does_not_take(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write(tmp_path / "map.tif", np.zeros((3, 16, 16), np.uint8))
    arguments = ["predict", str(tmp_path), "cat; dog", "-m", "zegclip-emoji", "--save", "labels", "-o"]
    assert main([*arguments, str(tmp_path / "out")]) == 0
    assert f"'{source}' is a map, whose coordinates the labels of pictures lack" in capsys.readouterr().err
    odd = source.rename(tmp_path / "caf\udce9.tif")
    assert not is_map(odd) and main([*arguments, str(tmp_path / "odd")]) == 0
    with pytest.raises(LexisegError, match=r"caf\\xe9.tif' cannot be read as a map"):
        count_tiles(odd, MapOptions())
    source = write(tmp_path / "map.tif", np.zeros((3, 16, 16), np.uint8))
    assert main(["predict", str(source), *arguments[2:], str(tmp_path / "caf\udce9")]) == 2
    assert r"caf\xe9' is not called in UTF-8, which GDAL needs; rename it." in capsys.readouterr().err
    assert not (tmp_path / "caf\udce9").exists()


def test_an_edge_of_one_pixel_is_a_tile_and_a_narrow_map_is_named(segmenter: Any, tmp_path: Path) -> None:
    source = write(tmp_path / "map.tif", np.zeros((3, 17, 33), np.uint8))
    files = run(segmenter, source, tmp_path / "out", tile=16, margin=0)
    with rasterio.open(files["labels"]) as labels:
        assert (labels.read(1) != labels.nodata).all()
    source = write(tmp_path / "narrow.tif", np.zeros((3, 8, 1000), np.uint8))
    with pytest.raises(LexisegError, match=r"narrow\.tif', or a tile of it, has 1000 x 8 pixels, too narrow"):
        run(segmenter, source, tmp_path / "narrow")
    assert not (tmp_path / "narrow").exists()


def test_labels_and_polygons_lie_where_the_map_does(segmenter: Any, tmp_path: Path) -> None:
    pixels = read_pixels(sample_path("demo"))
    source = write(tmp_path / "map.tif", pixels.transpose(2, 0, 1))
    files = run(segmenter, source, tmp_path / "out")
    expected = np.asarray(segmenter.predict(pixels, WORDS).label_map)
    with rasterio.open(files["labels"]) as labels:
        assert (labels.crs.to_epsg(), labels.transform, labels.nodata) == (32632, PLACE, 255)
        assert np.array_equal(labels.read(1), expected)
        assert labels.tags(1)["class_1"] == "elephant"
        assert labels.colormap(1)[1] == (*segmenter.vocabulary(WORDS).palette()[1], 255)
        assert labels.tags(ns="IMAGE_STRUCTURE")["LAYOUT"] == "COG"
    found = json.loads(files["polygons"].read_text())
    assert "32632" in found["crs"]["properties"]["name"]
    names = {one["properties"]["name"] for one in found["features"]}
    assert "elephant" in names
    shapes = [(one["geometry"], one["properties"]["id"]) for one in found["features"]]
    drawn = rasterio.features.rasterize(shapes, expected.shape, fill=255, transform=PLACE, dtype="uint8")
    assert (drawn == expected).mean() > 0.99


def test_polygons_of_just_the_smallest_size_are_written_wherever_the_map_lies(tmp_path: Path) -> None:
    turned = rasterio.Affine(1.7, 1.5, 500000, 1.1, -2.6, 5400000)
    source = write(tmp_path / "map.tif", np.zeros((3, 16, 16), np.uint8), transform=turned)
    board = np.indices((16, 16)).sum(axis=0) % 2
    model: Any = SimpleNamespace(predict=lambda *_: SimpleNamespace(label_map=board))
    options, classes = MapOptions(smallest=1, margin=0), Vocabulary.parse("cat; dog")
    list(segment_map(model, source, classes, tmp_path, options))
    polygons = json.loads(map_files(source, tmp_path, options)["polygons"].read_text())
    assert len(polygons["features"]) == 256


def test_so_many_names_that_gdal_would_take_minutes_are_one_tag(
    segmenter: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lexiseg.maps.MOST_TAGS", 2)
    source = write(tmp_path / "map.tif", np.zeros((3, 16, 16), np.uint8))
    with rasterio.open(run(segmenter, source, tmp_path / "out")["labels"]) as labels:
        assert json.loads(labels.tags(1)["classes"])[1] == "elephant" and "class_0" not in labels.tags(1)


def test_tiles_join_and_bands_of_any_depth(segmenter: Any, tmp_path: Path) -> None:
    pixels = read_pixels(sample_path("demo"))
    bands = pixels.transpose(2, 0, 1)[::-1].astype(np.uint16) * 40
    deep = np.concatenate([bands, bands[:1] * 0])
    source = write(tmp_path / "deep.tif", deep)
    files = run(segmenter, source, tmp_path / "out", tile=256, margin=128, bands=(3, 2, 1), polygons="gpkg")
    with rasterio.open(files["labels"]) as labels:
        found = labels.read(1)
        assert labels.block_shapes == [(512, 512)]
    expected = np.asarray(segmenter.predict(pixels, WORDS).label_map)
    assert found.shape == expected.shape and (found == expected).mean() > 0.9
    pyogrio = pytest.importorskip("pyogrio")
    about = pyogrio.read_info(files["polygons"], layer="segments")
    assert about["features"] > 5 and "32632" in about["crs"]


def test_a_tile_sees_its_margin_on_all_sides(segmenter: Any, tmp_path: Path) -> None:
    pixels = read_pixels(sample_path("demo"))[128:384, 128:384]
    source = write(tmp_path / "map.tif", pixels.transpose(2, 0, 1))
    files = run(segmenter, source, tmp_path, tile=128, margin=128, polygons="none")
    with rasterio.open(files["labels"]) as labels:  # so each of the four tiles sees the whole map
        assert np.array_equal(labels.read(1), np.asarray(segmenter.predict(pixels, WORDS).label_map))


def labelled(seen: list[np.ndarray], pixels: np.ndarray) -> Any:
    """What stands in for a model: a pixel of class 1 is bright."""
    seen.append(pixels)
    return SimpleNamespace(label_map=(pixels[..., 0] > 127).astype(np.uint8))


def test_polygons_of_tiles_lie_in_their_place_and_specks_are_left_out(tmp_path: Path) -> None:
    bands = np.zeros((3, 48, 64), np.uint8)
    bands[:, 10:40, 20:50] = bands[:, 2:6, 2:6] = bands[:, 44:47, 58:63] = 255  # in four tiles, 16 and 15 pixels
    model: Any = SimpleNamespace(predict=lambda pixels, *_: labelled([], pixels))
    source, options = write(tmp_path / "map.tif", bands), MapOptions(tile=32, margin=16)
    with warnings.catch_warnings():
        warnings.simplefilter("error", LexisegWarning)
        assert len(list(segment_map(model, source, Vocabulary.parse("field; house"), tmp_path, options))) == 4
    files = map_files(source, tmp_path, options)
    with rasterio.open(files["labels"]) as labels:
        assert np.array_equal(labels.read(1) * 255, bands[0])
    features = json.loads(files["polygons"].read_text())["features"]
    houses = [(one["geometry"], 255) for one in features if one["properties"] == {"id": 1, "name": "house"}]
    bands[:, 44:47, 58:63] = 0
    drawn = rasterio.features.rasterize(houses, bands.shape[1:], transform=PLACE, dtype="uint8")
    assert np.array_equal(drawn, bands[0])


def test_a_geopackage_holds_polygons_at_the_origin(tmp_path: Path) -> None:
    pyogrio, shapely = pytest.importorskip("pyogrio"), pytest.importorskip("shapely")
    bands = np.zeros((3, 16, 16), np.uint8)
    bands[:, :5, :4] = 255
    model: Any = SimpleNamespace(predict=lambda pixels, *_: labelled([], pixels))
    source = write(tmp_path / "map.tif", bands, transform=rasterio.Affine(1, 0, 0, 0, 1, 0))  # its bytes end in zeros
    options = MapOptions(polygons="gpkg")
    list(segment_map(model, source, Vocabulary.parse("field; house"), tmp_path, options))
    _, _, shapes, (ids, names) = pyogrio.raw.read(map_files(source, tmp_path, options)["polygons"])
    found = {(int(index), name): shapely.from_wkb(one) for index, name, one in zip(ids, names, shapes, strict=True)}
    assert {key: one.area for key, one in found.items()} == {(0, "field"): 236, (1, "house"): 20}
    assert found[1, "house"].bounds == (0, 0, 4, 5)


def test_numbers_are_stretched_between_their_percentiles(tmp_path: Path) -> None:
    seen: list[np.ndarray] = []
    model: Any = SimpleNamespace(predict=lambda pixels, *_: labelled(seen, pixels))
    source = write(tmp_path / "ramp.tif", np.broadcast_to(np.arange(1001, dtype=np.uint16), (1, 16, 1001)))
    list(segment_map(model, source, Vocabulary.parse("low; high"), tmp_path))
    (pixels,) = seen
    assert pixels[0, [0, 20, 500, 980, 1000]].tolist() == [[grey] * 3 for grey in (0, 0, 128, 255, 255)]


def test_what_the_map_leaves_out_has_no_class(segmenter: Any, tmp_path: Path) -> None:
    pixels = read_pixels(sample_path("demo")).transpose(2, 0, 1).copy()
    pixels[:, :, :100] = 0
    files = run(segmenter, write(tmp_path / "part.tif", pixels, nodata=0), tmp_path, polygons="none")
    with rasterio.open(files["labels"]) as labels:
        found = labels.read(1)
    assert (found[:, :100] == 255).all() and (found[:, 100:] < 6).mean() > 0.9
    empty = write(tmp_path / "empty.tif", np.zeros_like(pixels), nodata=0)
    with pytest.warns(LexisegWarning, match=r"empty\.tif' is masked or without data throughout"):
        run(segmenter, empty, tmp_path, polygons="none")


def test_what_is_not_finite_takes_no_part_in_the_stretch(segmenter: Any, tmp_path: Path) -> None:
    bands = read_pixels(sample_path("demo")).transpose(2, 0, 1)[:, 200:328, :256].astype(np.float32) / 255
    found = []
    for missing in (0.5, np.nan):
        bands[:, :4, :4] = missing
        files = run(segmenter, write(tmp_path / "part.tif", bands), tmp_path, polygons="none")
        with rasterio.open(files["labels"]) as labels:
            found.append(labels.read(1))
    assert len(np.unique(found[0])) > 1 and (found[0] == found[1]).mean() > 0.9
    whole = write(tmp_path / "cut.tif", bands)
    whole.write_bytes(whole.read_bytes()[: 128 * 256 * 4])
    with pytest.raises(LexisegError, match=r"cut\.tif' cannot be read as a map"):
        run(segmenter, whole, tmp_path)
    with pytest.raises(LexisegError, match="complex numbers"):
        run(segmenter, write(tmp_path / "complex.tif", bands.astype(np.complex64)), tmp_path)


@pytest.mark.parametrize("nodata", [65535, 2**31 - 1])
def test_more_classes_than_eight_or_sixteen_bits_number(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, nodata: int
) -> None:
    monkeypatch.setattr("lexiseg.maps.ignore_index", lambda _: nodata)  # GDAL takes minutes for so many names
    found = np.full((32, 48), 299, np.int32)
    found[:4] = nodata
    model: Any = SimpleNamespace(predict=lambda *_: SimpleNamespace(label_map=found.copy()))
    source = write(tmp_path / "map.tif", np.ones((3, 32, 48), np.uint8))
    vocabulary = Vocabulary.parse([f"class {index}" for index in range(300)])
    predict_map(model, str(source), vocabulary, tmp_path, MapOptions(polygons="none"), True)
    assert json.loads(capsys.readouterr().out)["classes"][0] == {"class": "class 299", "fraction": 1.0}
    with rasterio.open(tmp_path / "map_labels.tif") as labels:
        assert labels.nodata == nodata and np.array_equal(labels.read(1), found)
        if nodata == 65535:  # 32 bits have no palette
            assert labels.colormap(1)[299] == (*vocabulary.palette()[299], 255)


@pytest.mark.slow
def test_fifty_thousand_pixels_a_side_in_two_gigabytes(tmp_path: Path) -> None:
    path = tmp_path / "huge.tif"
    profile = {"driver": "GTiff", "crs": "EPSG:32632", "transform": PLACE, "count": 3, "dtype": "uint8", "nodata": 0}
    with rasterio.open(
        path, "w", width=50_000, height=50_000, tiled=True, sparse_ok=True, compress="deflate", **profile
    ) as file:
        pixels = read_pixels(sample_path("demo")).transpose(2, 0, 1)
        for row, column in ((0, 0), (25_000, 31_000), (49_488, 49_488)):
            file.write(pixels, window=rasterio.windows.Window(column, row, 512, 512))
    asked = ["predict", str(path), WORDS, "--model", "zegclip-emoji", "-o", str(tmp_path), "--device", "cpu"]
    # The peak of a process of its own; what getrusage says of one begins at what its parent holds.
    code = "import sys; from lexiseg.cli import main; main(sys.argv[1:]); print(open('/proc/self/status').read())"
    done = subprocess.run([sys.executable, "-c", code, *asked], check=True, capture_output=True, text=True)
    assert int(done.stdout.split("VmHWM:")[1].split()[0]) < 2 * 2**20
    with rasterio.open(tmp_path / "huge_labels.tif") as labels:
        assert labels.shape == (50_000, 50_000)
        part = labels.read(1, window=rasterio.windows.Window(31_000, 25_000, 512, 512))
    assert (part < 6).mean() > 0.9


def test_the_command_and_mistakes(segmenter: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write(tmp_path / "map.tif", read_pixels(sample_path("demo")).transpose(2, 0, 1)[:, :64, :96])
    assert is_map(source) and not is_map(sample_path("demo")) and not is_map(tmp_path / "no.tif")
    asked = ["predict", str(source), WORDS, "--model", "zegclip-emoji", "-o", str(tmp_path), "--device", "cpu"]
    assert main(asked) == 0
    assert "map_labels.tif" in capsys.readouterr().out and (tmp_path / "map_polygons.geojson").is_file()
    assert main([*asked, "--bands", "1,2,4"]) == 2
    assert "has 3 bands" in capsys.readouterr().err
    assert main([*asked, "--resume"]) == 2
    assert "cannot be resumed" in capsys.readouterr().err
    for wrong in ("red", "1,2,\u00b2", f"1,2,{'3' * 5000}"):  # int() takes neither of the last two
        assert main([*asked, "--bands", wrong]) == 2
    with pytest.raises(LexisegError, match="multiple of 16"):
        MapOptions(tile=100)
    with pytest.raises(LexisegError, match="margin must be a whole number of at least 0, not -1"):
        MapOptions(margin=-1)
    with pytest.raises(LexisegError, match="geojson, gpkg or none"):
        MapOptions(polygons="shp")
    (tmp_path / "broken.tif").write_bytes(b"II*\0")
    with pytest.raises(LexisegError, match="cannot be read as a map"):
        run(segmenter, tmp_path / "broken.tif", tmp_path)
