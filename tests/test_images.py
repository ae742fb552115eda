from __future__ import annotations

import io
import os
import struct
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFile

from lexiseg import images
from lexiseg.errors import LexisegError, LexisegWarning
from lexiseg.images import image_name, read_image, read_pixels
from lexiseg.notes import picture_world_model
from tests.miniatures import png_header

RNG = np.random.default_rng(0)
PICTURE = RNG.integers(0, 256, (7, 5, 3), dtype=np.uint8)
EXPECTED = torch.from_numpy(PICTURE).permute(2, 0, 1)


def encode(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


class Raising(io.RawIOBase):
    """A file object of somebody's own that is broken."""

    def read(self, size: int = -1) -> bytes:
        raise KeyError("no such blob")


def test_every_holder_of_the_same_picture_gives_the_same_pixels(tmp_path: Path) -> None:
    image = Image.fromarray(PICTURE)
    path = tmp_path / "a.png"
    image.save(path)
    data = path.read_bytes()
    with path.open("rb") as file:
        sources = [
            path,
            str(path),
            data,
            bytearray(data),
            memoryview(bytes(byte for one in data for byte in (one, 0)))[::2],
            io.BytesIO(data),
            file,
            image,
            PICTURE,
            EXPECTED,
            EXPECTED.float() / 255,
            EXPECTED.double() / 255,
            PICTURE.astype(np.float32) / 255,
            PICTURE.astype(np.uint16) * 257,
            PICTURE[:, ::-1][:, ::-1],
            np.dstack([PICTURE, np.full((7, 5), 255, np.uint8)]),
        ]
        for source in sources:
            result = read_image(source)
            assert result.dtype == torch.uint8 and result.shape == (3, 7, 5)
            assert torch.equal(result, EXPECTED), type(source)


def test_the_result_does_not_share_memory_with_the_source() -> None:
    array = PICTURE.copy()
    result = read_image(array)
    array[:] = 0
    assert torch.equal(result, EXPECTED)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP"])
def test_orientation_is_applied_once(orientation: int, kind: str) -> None:
    undo = {2: 2, 3: 3, 4: 4, 5: 5, 6: 8, 7: 7, 8: 6}
    turns = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_270,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_90,
    }
    image = Image.fromarray(PICTURE)
    stored = image if orientation == 1 else image.transpose(turns[undo[orientation]])
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"lossless": True} if kind == "WEBP" else {}
    data = encode(stored, kind, exif=exif, **options)
    assert torch.equal(read_image(data), EXPECTED)
    assert torch.equal(read_image(Image.open(io.BytesIO(data))), EXPECTED)
    assert np.array_equal(read_pixels(data, orient=False), np.asarray(stored))
    with Image.open(io.BytesIO(data)) as opened:
        assert images.stored_size(opened) == stored.size and images.orientation_of(opened) == orientation


def tiff(values: np.ndarray) -> bytes:
    """A TIFF of 16 bits or floats in colour, which Pillow does not write: its values (H, W, C) uint16 or float32."""
    height, width, bands = values.shape
    kind = 3 if values.dtype.kind == "f" else 1
    tags = [(256, width), (257, height), (258, 8 * values.itemsize), (259, 1), (262, 2), (273, 200), (277, bands)]
    tags += [(278, height), (279, values.nbytes), (339, kind)]
    head = b"II*\0" + struct.pack("<IH", 8, len(tags)) + b"".join(struct.pack("<HHII", t, 4, 1, v) for t, v in tags)
    return head.ljust(200, b"\0") + values.tobytes()


def test_tiffs_of_more_than_eight_bits_a_colour() -> None:
    with pytest.raises(LexisegError, match="a TIFF of a kind that is not read"):
        read_pixels(tiff(np.zeros((4, 4, 3), np.float32)))
    with pytest.warns(LexisegWarning, match="less than 13 of its 16 bits per colour"):
        assert read_pixels(tiff(np.full((4, 4, 3), 4095, np.uint16))).max() == 15
    assert read_pixels(tiff(np.full((4, 4, 3), 65535, np.uint16))).min() == 255


@pytest.mark.parametrize("channels", [3, 4])
def test_pngs_of_less_than_thirteen_of_sixteen_bits_come_with_a_note(channels: int) -> None:
    cv2 = pytest.importorskip("cv2")
    values = np.full((4, 4, channels), 4095, np.uint16)
    values[..., 3:] = 65535
    with pytest.warns(LexisegWarning, match="less than 13 of its 16 bits per colour"):
        assert read_pixels(bytes(cv2.imencode(".png", values)[1])).max() == 15


def test_transparency_is_laid_over_white() -> None:
    layers = np.zeros((2, 2, 4), np.uint8)
    layers[0, 0] = (200, 100, 50, 255)
    layers[0, 1] = (200, 100, 50, 0)
    layers[1, 0] = (0, 0, 0, 127)
    result = read_image(encode(Image.fromarray(layers)))
    assert result[:, 0, 0].tolist() == [200, 100, 50]
    assert result[:, 0, 1].tolist() == [255, 255, 255]
    assert result[:, 1, 0].tolist() == [128, 128, 128]
    assert torch.equal(read_image(layers), result)
    assert torch.equal(read_image(torch.from_numpy(layers).permute(2, 0, 1)), result)
    grey = read_image(np.dstack([np.full((2, 2), 10, np.uint8), np.array([[0, 255], [0, 255]], np.uint8)]))
    assert grey[0].tolist() == [[255, 10], [255, 10]]


def test_grey_palette_bilevel_and_cmyk() -> None:
    grey = RNG.integers(0, 256, (4, 3), dtype=np.uint8)
    assert torch.equal(read_image(grey), torch.from_numpy(grey).expand(3, 4, 3))
    assert torch.equal(read_image(encode(Image.fromarray(grey))), read_image(grey))
    assert torch.equal(read_image(torch.from_numpy(grey)), read_image(grey))
    palette = Image.fromarray(np.array([[0, 1], [1, 0]], np.uint8)).convert("P")
    palette.putpalette([255, 0, 0, 0, 0, 255])
    assert read_image(encode(palette))[:, 0].tolist() == [[255, 0], [0, 0], [0, 255]]
    see_through = encode(palette, transparency=1)
    assert read_image(see_through)[:, 0].tolist() == [[255, 255], [0, 255], [0, 255]]
    colour_key = encode(Image.fromarray(PICTURE), transparency=tuple(PICTURE[0, 0].tolist()))
    assert read_image(colour_key)[:, 0, 0].tolist() == [255, 255, 255]
    bilevel = np.array([[True, False]])
    assert read_image(encode(Image.fromarray(bilevel)))[0].tolist() == [[255, 0]]
    assert read_image(bilevel)[0].tolist() == [[255, 0]]
    cmyk = read_image(encode(Image.fromarray(PICTURE).convert("CMYK"), "TIFF"))
    assert torch.equal(cmyk, EXPECTED)
    assert read_image(encode(Image.fromarray(PICTURE).convert("CMYK"), "JPEG")).shape == (3, 7, 5)


@pytest.mark.parametrize("bits", [8, 10, 12, 14, 16])
def test_numbers_are_read_by_their_depth_whatever_holds_them(bits: int) -> None:
    top = 2**bits - 1
    deep = np.array([[0, top // 2, top]], np.uint16)
    expected = [0, round(top // 2 * 255 / top), 255]
    holders: list[Any] = [
        *(deep.astype(kind) for kind in (np.uint16, ">u2", np.int32, np.uint64, np.float32, np.float64)),
        *(encode(Image.fromarray(deep), kind) for kind in ("PNG", "TIFF")),
        *(encode(Image.fromarray(deep.astype(kind)), "TIFF") for kind in (np.int32, np.float32)),
        *(Image.fromarray(deep.astype(kind)) for kind in (np.uint16, np.int32, np.float32)),
        *(torch.from_numpy(deep).to(kind) for kind in (torch.uint16, torch.int32, torch.int64, torch.float32)),
    ]
    for holder in holders:
        assert read_image(holder)[1].tolist() == [expected], holder


def test_depth_is_that_of_the_largest_number() -> None:
    deep = np.array([[0, 257, 32896, 65535]], np.uint16)
    assert read_image(deep)[1].tolist() == [[0, 1, 128, 255]]
    assert read_image(np.array([[0, 70000, 2**18 - 1]]))[0].tolist() == [[0, 68, 255]]
    assert read_image(np.array([[7, 3, 1]]))[0].tolist() == [[7, 3, 1]]  # never below 8 bits
    assert read_image(np.array([[0, 2047]]))[0].tolist() == [[0, 127]]  # eleven bits are of twelve
    assert read_image(np.array([[0.0, 0.5, 1.0]], np.float16))[0].tolist() == [[0, 128, 255]]
    assert read_image(torch.tensor([[0.0, 0.5, 1.0]], dtype=torch.bfloat16))[0].tolist() == [[0, 128, 255]]
    layers = np.array([[[4095, 4095], [4095, 0], [0, 4095]]], np.uint16)
    assert read_image(layers)[0].tolist() == [[255, 255, 0]]


def test_a_file_object_that_stands_at_its_end_is_read_from_its_beginning() -> None:
    file = io.BytesIO()
    Image.fromarray(PICTURE).save(file, "PNG")
    assert torch.equal(read_image(file), EXPECTED)
    assert torch.equal(read_image(file), EXPECTED)
    tail = io.BytesIO(b"head" + encode(Image.fromarray(PICTURE)))
    tail.seek(4)
    assert torch.equal(read_image(tail), EXPECTED)


def test_pixels_can_be_had_as_they_are_stored() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encode(Image.fromarray(PICTURE), exif=exif)
    assert read_pixels(data).shape == (5, 7, 3)
    assert np.array_equal(read_pixels(data, orient=False), PICTURE)


def test_threads_leave_the_warning_filters_as_they_were(tmp_path: Path) -> None:
    data = encode(Image.fromarray(RNG.integers(0, 256, (200, 200, 3), dtype=np.uint8)))
    before = list(warnings.filters)
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(read_image, [data] * 64))
    assert warnings.filters == before


def test_the_first_frame_of_an_animation() -> None:
    frames = [Image.new("RGB", (3, 2), color) for color in ("red", "blue")]
    data = encode(frames[0], "GIF", save_all=True, append_images=frames[1:])
    with pytest.warns(LexisegWarning, match="holds several frames"):
        assert read_image(data)[:, 0, 0].tolist() == [255, 0, 0]
    opened = Image.open(io.BytesIO(data))
    opened.seek(1)
    assert read_image(opened)[:, 0, 0].tolist() == [0, 0, 255]


def test_pixel_limit_is_checked_before_decoding() -> None:
    bomb = png_header(60_000, 60_000)
    limit = Image.MAX_IMAGE_PIXELS
    with pytest.raises(LexisegError, match=r"3,600,000,000 pixels, more than the limit of 200,000,000"):
        read_image(bomb)
    assert limit == Image.MAX_IMAGE_PIXELS
    with pytest.raises(LexisegError, match="5 x 7 = 35 pixels, more than the limit of 34;"):
        read_image(encode(Image.fromarray(PICTURE)), max_pixels=34)
    assert read_image(encode(Image.fromarray(PICTURE)), max_pixels=35).shape == (3, 7, 5)
    with pytest.raises(LexisegError, match="5 x 7 = 35 pixels, more than the limit of 34;"):
        read_image(PICTURE, max_pixels=34)
    # Larger than Pillow's own limit but allowed here: then the header is believed and the data found short.
    with pytest.raises(LexisegError, match="truncated"):
        read_image(png_header(15_000, 12_500))


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("missing.png", None, "no picture"),
        ("text.jpg", b"I am not a picture, really not.", "not a picture that can be read"),
        ("empty.png", b"", "empty file"),
        ("short.jpg", "truncate", "truncated or damaged"),
        ("header.png", encode(Image.fromarray(PICTURE))[:20], "not a picture|truncated"),
        ("vector.eps", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n", "format that is not supported"),
    ],
)
def test_broken_files_are_one_sentence_with_the_name(
    tmp_path: Path, name: str, content: bytes | str | None, words: str
) -> None:
    path = tmp_path / name
    if content == "truncate":
        noise = RNG.integers(0, 256, (64, 64, 3), dtype=np.uint8)
        path.write_bytes(encode(Image.fromarray(noise), "JPEG")[:1500])
    elif isinstance(content, bytes):
        path.write_bytes(content)
    with pytest.raises(LexisegError, match=words) as caught:
        read_image(path)
    assert name in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("https://example.org/cat.jpg", "URL"),
        ("data:image/png;base64,AAAA", "URL"),
        ("bad\0name.png", "null character"),
        (".", "is a folder"),
        ("x" * 5000, "Cannot read"),
        (b"", "not a picture"),
        (3, "must be a path"),
        (None, "must be a path"),
        (io.StringIO("text"), "binary mode"),
        (np.zeros((2, 2, 5), np.uint8), "shape"),
        (np.zeros((3, 20, 20), np.uint8), "shape"),
        (np.zeros((0, 2, 3), np.uint8), "no pixels"),
        (np.full((2, 2, 3), -1), "negative"),
        (np.full((2, 2, 3), 1.5), "outside 0..1"),
        (np.full((2, 2, 3), np.nan), "NaN"),
        (np.full((2, 2, 3), np.inf), "infinite"),
        (np.zeros((2, 2, 3), complex), "complex128"),
        (torch.zeros(1, 3, 4, 4), "list"),
        (torch.zeros(0, 3), "no pixels"),
        (torch.full((3, 4, 4), -1.0), "negative"),
        (torch.zeros(3, 4, 4, dtype=torch.complex64), "complex64"),
        (torch.zeros(3, 4, 4).to_sparse(), "sparse"),
        (torch.zeros(3, 4, 4, device="meta"), "meta"),
        (torch.nested.nested_tensor([torch.zeros(3, 4, 4)]), "nested"),
        (torch.quantize_per_tensor(torch.zeros(3, 4, 4), 1.0, 0, torch.quint8), "quantised"),
        (np.array([[None, None]]), "object"),
        (np.zeros((2, 2), "M8[s]"), "datetime64"),
        (Image.fromarray(np.array([[-7]], np.int32)), "negative"),
        (Image.fromarray(np.array([[float("nan")]], np.float32)), "NaN"),
        (Raising(), "Cannot read"),
    ],
)
def test_other_mistakes(source: object, words: str) -> None:
    with pytest.raises(LexisegError, match=words) as caught:
        read_image(source)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500


def test_damaged_metadata_does_not_spoil_the_picture() -> None:
    data = encode(Image.fromarray(PICTURE), "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert read_image(data).shape == (3, 7, 5)


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF"])
def test_frames_that_are_not_read_are_said(kind: str) -> None:
    first, second = Image.new("RGB", (8, 6)), Image.new("RGB", (8, 6), "white")
    with pytest.warns(LexisegWarning, match="holds several frames or pages, of which only the first is read"):
        pixels = read_pixels(encode(first, kind, save_all=True, append_images=[second]))
    assert not pixels.any()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read_pixels(encode(first, kind))


def test_pages_of_a_tiff_are_not_counted() -> None:
    """A file of 200,000 pages took minutes, because Pillow looks through all pages before it at each page."""
    image = Image.new("L", (8, 6))
    data = bytearray(encode(image, "TIFF", save_all=True, append_images=[image, image]))
    first = struct.unpack_from("<I", data, 4)[0]
    second = struct.unpack_from("<I", data, first + 2 + 12 * struct.unpack_from("<H", data, first)[0])[0]
    # The third page is nowhere, which shows to whoever looks for it.
    struct.pack_into("<I", data, second + 2 + 12 * struct.unpack_from("<H", data, second)[0], 0xFFFFFFF0)
    with pytest.warns(LexisegWarning, match="holds several frames or pages"):
        read_pixels(bytes(data))


def test_a_jpeg_of_many_scans_is_refused() -> None:
    """Each takes a few bytes, and lets the decoder go over all pixels once more."""
    data = encode(Image.new("L", (64, 64)), "JPEG", progressive=True)
    with pytest.raises(LexisegError, match="scans, which no camera or program writes"):
        read_pixels(data[:-2] + data[data.rindex(b"\xff\xda") : -2] * 100 + data[-2:])
    assert read_pixels(data).shape == (64, 64, 3)


def test_channels_at_the_other_end_are_named() -> None:
    with pytest.raises(LexisegError, match=r"not \(3, 7, 5\); give array.transpose\(1, 2, 0\)"):
        read_pixels(PICTURE.transpose(2, 0, 1))
    with pytest.raises(LexisegError, match=r"the shape \(7, 5, 3\); give tensor.permute\(2, 0, 1\)"):
        read_image(torch.from_numpy(PICTURE))


def test_numbers_up_to_1_are_said_to_be_black() -> None:
    mask = (PICTURE > 127).astype(np.uint8)
    for source in (mask, mask[..., 0].astype(np.int64), torch.from_numpy(mask).permute(2, 0, 1)):
        with pytest.warns(LexisegWarning, match="whole numbers from 0 to 1, so the picture is black"):
            read_pixels(source)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for picture in (mask.astype(np.float32), mask.astype(bool), mask * 0, mask * 255):
            read_pixels(picture)


def test_names(tmp_path: Path) -> None:
    assert image_name(tmp_path / "a.png") == str(tmp_path / "a.png")
    assert image_name(b"abc") == "the given data"


SEEDS = [
    encode(Image.fromarray(RNG.integers(0, 256, (24, 24, 3), dtype=np.uint8)), kind)
    for kind in ("PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP")
] + [encode(Image.fromarray(PICTURE).convert("P"), transparency=0)]


def survives(data: bytes) -> None:
    try:
        result = read_image(data, max_pixels=1e6)
    except LexisegError as error:
        assert "\n" not in str(error)
    else:
        assert result.dtype == torch.uint8 and result.shape[0] == 3


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.binary(max_size=300))
def test_random_bytes_never_crash(data: bytes) -> None:
    survives(data)


@settings(max_examples=250, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.sampled_from(SEEDS),
    st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), max_size=12),
    st.floats(0.05, 1),
)
def test_mutated_pictures_never_crash(seed: bytes, changes: list[tuple[float, int]], keep: float) -> None:
    data = bytearray(seed)
    for place, value in changes:
        # Half of the changes hit the first bytes, where the structure is.
        position = int(place * 2 * len(data)) if place < 0.5 else int((place - 0.5) * 2 * min(64, len(data)))
        data[position] = value
    survives(bytes(data[: max(1, int(keep * len(data)))]))


def test_truncated_files_are_refused_whatever_other_code_asked_of_pillow(monkeypatch: pytest.MonkeyPatch) -> None:
    assert ImageFile.LOAD_TRUNCATED_IMAGES is False
    noise = encode(Image.fromarray(RNG.integers(0, 256, (64, 64, 3), dtype=np.uint8)))
    with pytest.raises(LexisegError, match="truncated"):
        read_image(noise[: len(noise) // 2])


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
def test_a_picture_comes_from_a_pipe(tmp_path: Path) -> None:
    content, pipe = io.BytesIO(), tmp_path / "pipe"
    Image.new("RGB", (300, 200), "red").save(content, "PNG")
    os.mkfifo(pipe)
    writer = threading.Thread(target=pipe.write_bytes, args=(content.getvalue(),))
    writer.start()
    picture_world_model(pipe)  # which may not read what can be read only once
    assert read_image(pipe).shape == (3, 200, 300)
    writer.join()
