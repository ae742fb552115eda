"""Datasets read out of the archives they are distributed in, without unpacking."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from lexiseg.data.sets import archive
from lexiseg.data.sets.archive import Member, zipped
from lexiseg.data.sets.open import open_data_set
from lexiseg.data.sets.verify import verify
from lexiseg.errors import LexisegError
from tests import miniatures


def pack(target: Path, folder: Path, inside: str) -> None:
    """Zip ``folder`` as it is distributed, below the name ``inside``, and remove it."""
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as packed:
        packed.writestr(f"{inside}/", "")
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                packed.write(path, f"{inside}/{path.relative_to(folder)}")
    shutil.rmtree(folder)


def zip_coco(root: Path) -> None:
    for year in ("train2017", "val2017"):
        pack(root / f"{year}.zip", root / "images" / year, year)
    (root / "images").rmdir()
    with zipfile.ZipFile(root / "stuffthingmaps_trainval2017.zip", "w") as packed:
        for path in sorted((root / "stuffthingmaps").rglob("*.png")):
            packed.write(path, str(path.relative_to(root / "stuffthingmaps")))
    shutil.rmtree(root / "stuffthingmaps")


def zip_ade(root: Path) -> None:
    pack(root / "ADEChallengeData2016.zip", root / "ADEChallengeData2016", "ADEChallengeData2016")


@pytest.mark.parametrize(
    ("name", "write", "pack_up"),
    [("coco-stuff-164k", miniatures.coco_stuff, zip_coco), ("ade20k-150", miniatures.ade150, zip_ade)],
)
def test_the_archives_hold_what_the_folders_do(name: str, write, pack_up, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    write(tmp_path / "folders")
    write(tmp_path / "zips")
    pack_up(tmp_path / "zips")
    for split in ("train", "val"):
        expected = open_data_set(name, tmp_path / "folders", split)
        found = open_data_set(name, tmp_path / "zips", split)
        assert found.names == expected.names and len(found) == 2
        for ours, theirs in zip(found, expected, strict=True):
            assert torch.equal(ours.image, theirs.image) and torch.equal(ours.label, theirs.label)
    assert not verify(name, tmp_path / "zips").errors
    assert not any(path.is_dir() for path in (tmp_path / "zips").iterdir())  # nothing was unpacked


def test_what_is_unpacked_comes_first(tmp_path: Path) -> None:
    miniatures.ade150(tmp_path)
    shutil.copytree(tmp_path / "ADEChallengeData2016", tmp_path / "copy")
    pack(tmp_path / "ADEChallengeData2016.zip", tmp_path / "copy", "ADEChallengeData2016")
    dataset = open_data_set("ade20k-150", tmp_path, "val")
    assert all(isinstance(item.image, Path) and isinstance(item.label, Path) for item in dataset.items)
    shutil.rmtree(tmp_path / "ADEChallengeData2016" / "annotations")  # half unpacked
    dataset = open_data_set("ade20k-150", tmp_path, "val")
    assert all(isinstance(item.image, Path) and isinstance(item.label, Member) for item in dataset.items)
    assert len(list(dataset)) == 2


def test_what_is_wrong_in_an_archive_is_found(tmp_path: Path) -> None:
    miniatures.coco_stuff(tmp_path)
    zip_coco(tmp_path)
    path = tmp_path / "val2017.zip"
    data = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as packed:
        start = packed.infolist()[1].header_offset + 200
    data[start : start + 20] = bytes(20)
    path.write_bytes(data)
    (finding,) = verify("coco-stuff-164k", tmp_path, splits=["val"]).errors
    assert finding.kind == "damaged-picture" and "val2017.zip/val2017/" in finding.path
    assert "download the archive again" in finding.problem
    with pytest.raises(LexisegError, match="download the archive again"):
        list(open_data_set("coco-stuff-164k", tmp_path, "val"))
    path.write_bytes(data[:-40])
    (finding,) = verify("coco-stuff-164k", tmp_path, splits=["val"]).errors
    assert finding.kind == "damaged-archive"


def test_hostile_members_do_no_harm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "train2017.zip"
    link = zipfile.ZipInfo("train2017/link.jpg")
    link.external_attr = 0o120777 << 16
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as packed:
        packed.writestr("../outside.jpg", b"x")
        packed.writestr("/etc/outside.jpg", b"x")
        packed.writestr(link, "/etc/passwd")
        packed.writestr("train2017/.hidden.jpg", b"x")
        packed.writestr("train2017/deeper/a.jpg", b"x")
        packed.writestr("train2017/b.JPG", bytes(100_000))
    found = zipped([tmp_path / "absent.zip", path], "train2017", (".jpg",))
    assert list(found) == ["b"]
    assert found["b"].read_bytes() == bytes(100_000)
    monkeypatch.setattr(archive, "MAX_BYTES", 1000)
    with pytest.raises(LexisegError, match=r"train2017/b\.JPG.*do not use"):
        found["b"].read_bytes()
    assert list(tmp_path.iterdir()) == [path]
    with pytest.raises(LexisegError, match="no longer in the archive"):
        Member(path, "train2017/gone.jpg", 10).read_bytes()


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="loaders fork where they can")
def test_forked_loaders_do_not_share_a_place_in_the_file(tmp_path: Path) -> None:
    path = tmp_path / "val2017.zip"
    contents = [np.random.default_rng(index).bytes(50_000) for index in range(8)]
    with zipfile.ZipFile(path, "w") as packed:
        for index, content in enumerate(contents):
            packed.writestr(f"val2017/{index}.jpg", content)
    found = zipped([path], "val2017", (".jpg",))
    assert found["0"].read_bytes() == contents[0]  # opens the archive before the fork
    children = []
    for _ in range(2):
        child = os.fork()
        if child == 0:
            same = all(found[str(i)].read_bytes() == contents[i] for _ in range(20) for i in range(8))
            os._exit(0 if same else 1)
        children.append(child)
    assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children] == [0, 0]
