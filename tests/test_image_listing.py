"""Which pictures a folder, a pattern or a name stands for."""

from __future__ import annotations

import os
import unicodedata
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from PIL import Image

from lexiseg.errors import LexisegError, LexisegWarning
from lexiseg.images import IMAGE_SUFFIXES, list_images, read_image
from tests.test_images import EXPECTED, PICTURE, encode


def test_names_of_any_spelling(tmp_path: Path) -> None:
    (tmp_path / unicodedata.normalize("NFD", "café.png")).write_bytes(encode(Image.fromarray(PICTURE)))
    (tmp_path / "caf\udce9.png").write_bytes(encode(Image.fromarray(PICTURE)))
    typed = tmp_path / unicodedata.normalize("NFC", "café.png")
    assert torch.equal(read_image(typed), EXPECTED)
    assert len(list_images(typed)) == 1
    listed = list_images(tmp_path)
    assert len(listed) == 2
    for path in listed:
        assert torch.equal(read_image(path), EXPECTED)
        assert torch.equal(read_image(os.fspath(path)), EXPECTED)


def test_nothing_of_a_folder_is_passed_over(tmp_path: Path) -> None:
    (tmp_path / "phone.heic").write_bytes(b"\0\0\0\x18ftypheic")
    (tmp_path / "gone.png").symlink_to(tmp_path / "nothing.png")
    (tmp_path / "old.tga").write_bytes(encode(Image.fromarray(PICTURE), "TGA"))
    (tmp_path / "notes.md").touch()
    listed = {path.name: path for path in list_images(tmp_path)}
    assert sorted(listed) == ["gone.png", "old.tga", "phone.heic"]
    assert torch.equal(read_image(listed["old.tga"]), EXPECTED)
    with pytest.raises(LexisegError, match=r"phone.heic.*\.heic.*convert it"):
        read_image(listed["phone.heic"])
    with pytest.raises(LexisegError, match=r"gone.png.*link to a file that is not there"):
        read_image(listed["gone.png"])
    with pytest.raises(LexisegError, match="not a picture that can be read"):
        read_image(encode(Image.fromarray(PICTURE), "TGA"))


@pytest.mark.parametrize("name", ["old.CRW", "scan.jxr", "burst.heics", "mri.dicom"])
def test_formats_that_are_not_read_are_listed_and_named(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"other")
    with pytest.raises(LexisegError, match="in a format that is not supported"):
        read_image(list_images(tmp_path)[0])


def test_a_circle_of_links_lists_a_picture_once(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "a.png").touch()
    (tmp_path / "deep" / "again").symlink_to("../deep")
    (tmp_path / "zoo").symlink_to("deep")
    assert list_images(str(tmp_path / "**" / "*.png")) == [tmp_path / "deep" / "a.png"]


def test_listing(tmp_path: Path) -> None:
    for name in ("img10.png", "img2.PNG", "Img1.jpg", "notes.txt", ".hidden.png"):
        (tmp_path / name).touch()
    (tmp_path / "sub.png").mkdir()
    (tmp_path / "sub.png" / "deep.webp").touch()
    with pytest.warns(LexisegWarning, match="1 folder of pictures"):
        assert [path.name for path in list_images(tmp_path)] == ["Img1.jpg", "img2.PNG", "img10.png"]
    assert list_images(str(tmp_path / "notes.txt")) == [tmp_path / "notes.txt"]
    assert [path.name for path in list_images(str(tmp_path / "img*"))] == ["img2.PNG", "img10.png"]
    assert [path.name for path in list_images(str(tmp_path / "**" / "*.webp"))] == ["deep.webp"]
    (tmp_path / "odd[1].png").touch()
    assert list_images(tmp_path / "odd[1].png") == [tmp_path / "odd[1].png"]
    for name in ("a.mp4", "b.MOV", "c.wmv"):
        (tmp_path / name).touch()
    with pytest.warns(LexisegWarning) as caught:
        assert len(list_images(tmp_path)) == 4
    assert [str(one.message) for one in caught] == [
        f"Skipped in '{tmp_path}': {what}; give each one by itself." for what in ("3 videos", "1 folder of pictures")
    ]
    (tmp_path / "IMG_0001").touch()
    with pytest.warns(LexisegWarning, match="Skipped in .*: 1 file without an extension; give each one by itself"):
        assert len(list_images(tmp_path)) == 4
    empty = tmp_path / "empty"
    empty.mkdir()
    for target, words in (
        (empty, "no picture"),
        (tmp_path / "nothing", "no file or folder"),
        (str(tmp_path / "*.bmp"), "no picture"),
        ("https://example.org/*.png", "URL"),
        ("bad\0*", "Cannot list|no file|no picture"),
        ("bad\0", "Cannot list|no file"),
    ):
        with pytest.raises(LexisegError, match=words):
            list_images(target)


def test_what_can_be_read_is_listed(tmp_path: Path) -> None:
    Image.init()
    readable = set()
    for ending, kind in Image.EXTENSION.items():
        path = tmp_path / f"picture{ending}"
        with suppress(
            OSError, ValueError, KeyError, ImportError, LexisegError
        ):  # Pillow writes no such file, or we read none
            Image.fromarray(PICTURE).save(path, kind)
            readable.add(ending if read_image(path).shape == (3, 7, 5) else "")
    assert {".png", ".jpg", ".tga"} < readable <= IMAGE_SUFFIXES
