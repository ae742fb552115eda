"""``prepare`` unpacks safely, goes on where it was stopped, and may be repeated."""

from __future__ import annotations

import gzip
import io
import json
import shutil
import tarfile
import tracemalloc
import zipfile
from pathlib import Path

import pytest

from lexiseg.cli import main
from lexiseg.data.sets.open import open_data_set
from lexiseg.data.sets.prepare import prepare, unpack
from lexiseg.data.sets.verify import verify
from lexiseg.errors import LexisegError
from tests.miniatures import MINIATURES

VOC = "VOCdevkit/VOC2012"
NAME = "2007_000032"


def _cut(path: Path, keep: int) -> None:
    path.write_bytes(path.read_bytes()[:keep])


def _zip(path: Path, source: Path) -> None:
    with zipfile.ZipFile(path, "w") as packed:
        for file in sorted(source.rglob("*")):
            packed.write(file, file.relative_to(source))


def _tar(path: Path, source: Path, mode: str = "w:gz") -> None:
    with tarfile.open(path, mode) as packed:
        for entry in sorted(source.iterdir()):
            packed.add(entry, entry.name)


def _snapshot(root: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in root.rglob("*") if path.is_file()}


def test_prepare_voc(clean, tmp_path):
    (tmp_path / "benchmark").mkdir()
    shutil.copytree(clean("voc2012") / "benchmark_RELEASE", tmp_path / "benchmark" / "benchmark_RELEASE")
    (tmp_path / "kit").mkdir()
    shutil.copytree(clean("voc2012") / "VOCdevkit", tmp_path / "kit" / "VOCdevkit")
    root = tmp_path / "root"
    root.mkdir()
    _tar(root / "VOCtrainval_11-May-2012.tar", tmp_path / "kit", "w")
    _tar(root / "benchmark.tgz", tmp_path / "benchmark")
    steps = prepare("voc2012", root)
    assert [step.what.split()[0] for step in steps] == ["unpacked", "unpacked", "listed"]
    assert (root / VOC / "ImageSets/Segmentation/aug.txt").read_text() == "2008_000002\n2008_000003\n"
    assert verify("voc2012", root, workers=1).findings == ()
    before = _snapshot(root)
    assert prepare("voc2012", root) == [] and _snapshot(root) == before


def test_prepare_unpacks_again_what_was_removed(clean, tmp_path):
    root = tmp_path / "root"
    root.mkdir()
    _zip(root / "all.zip", clean("voc2012"))
    prepare("voc2012", root)
    shutil.rmtree(root / "VOCdevkit")
    (step, _) = prepare("voc2012", root)
    assert step.what.startswith("unpacked all.zip") and verify("voc2012", root, workers=1).findings == ()
    (root / VOC / f"JPEGImages/{NAME}.jpg").unlink()
    (step,) = prepare("voc2012", root)
    assert "1 file, " in step.what
    assert prepare("voc2012", root) == []


def test_prepare_says_what_is_missing(clean, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    assert main(["data", "prepare", "voc2012", str(tmp_path / "empty")]) == 2
    assert "is empty; put the archives of voc2012 into it" in capsys.readouterr().err
    assert main(["data", "prepare", "own", str(tmp_path / "missing")]) == 2
    assert "put your pictures and masks" in capsys.readouterr().err
    root = tmp_path / "half"
    shutil.copytree(clean("ade150"), tmp_path / "pack")
    shutil.rmtree(tmp_path / "pack/ADEChallengeData2016/images/training")
    root.mkdir()
    _zip(root / "all.zip", tmp_path / "pack")
    assert main(["data", "prepare", "ade20k-150", str(root)]) == 2
    said = capsys.readouterr()
    assert "is ready" not in said.out and "unpacked all.zip" in said.err
    assert "is not complete (the split 'val' is)" in said.err and "training" in said.err
    root = tmp_path / "ade847"
    shutil.copytree(clean("ade847"), root)
    classes = (root / "ADE20K_2021_17_01/classes.json").rename(tmp_path / "list.json")
    with pytest.raises(LexisegError, match="list of ADE20K's 847 classes is missing"):
        prepare("ade20k-847", root)
    assert main(["data", "prepare", "ade20k-847", str(root), "--classes", str(classes)]) == 0


def test_prepare_coco(clean, tmp_path):
    source = clean("coco-stuff")
    for split in ("train2017", "val2017"):
        (tmp_path / "pack" / split).mkdir(parents=True)
        shutil.copytree(source / "images" / split, tmp_path / "pack" / split / split)
    root = tmp_path / "root"
    root.mkdir()
    _zip(root / "train2017.zip", tmp_path / "pack" / "train2017")
    _zip(root / "val2017.zip", tmp_path / "pack" / "val2017")
    _zip(root / "stuffthingmaps_trainval2017.zip", source / "stuffthingmaps")
    assert len(prepare("coco-stuff-164k", root)) == 3
    assert verify("coco-stuff-164k", root, workers=1).findings == ()


@pytest.mark.parametrize("name", ["context59", "context459", "ade150", "ade847", "ade847-full", "own-folders"])
def test_prepare_others(clean, tmp_path, name):
    root = tmp_path / "root"
    root.mkdir()
    _zip(root / "all.zip", clean(name))
    data_name = MINIATURES[name][0]
    steps = prepare(data_name, root)
    assert len(steps) == (3 if name == "own-folders" else 1)
    assert verify(data_name, root, workers=1).findings == ()
    assert open_data_set(data_name, root, "val").names == open_data_set(data_name, clean(name), "val").names
    assert prepare(data_name, root) == []


def test_a_label_that_context_lacks_is_said(clean, tmp_path):
    root = tmp_path / "root"
    shutil.copytree(clean("context459"), root)
    (root / "VOCdevkit/VOC2010/trainval/2008_000003.mat").unlink()
    with pytest.raises(LexisegError, match=r"not complete.*2008_000003"):
        prepare("pascal-context-459", root)


def test_unpacking_goes_on_where_it_was(clean, tmp_path):
    archive = tmp_path / "all.zip"
    _zip(archive, clean("own-folders"))
    first = unpack(archive, tmp_path / "out")
    (tmp_path / "out/images/photo 2.jpg").unlink()
    _cut(tmp_path / "out/masks/photo 3.png", 20)
    second = unpack(archive, tmp_path / "out")
    assert first.kept == 0 and (second.written, second.kept) == (2, first.written - 2)
    assert not list((tmp_path / "out").rglob("*.tmp*"))


def test_what_somebody_has_corrected_is_left_as_it_is(clean, tmp_path):
    _zip(tmp_path / "all.zip", clean("own-folders"))
    with zipfile.ZipFile(tmp_path / "all.zip", "a") as packed:
        packed.writestr("extra/names.txt", "cat\ndog\n")
    prepare("own", tmp_path)
    (tmp_path / "extra/names.txt").write_text("cat\nwolf\n")
    (step,) = prepare("own", tmp_path)
    assert step.what.endswith("1 that differ left as they are (remove 'extra/names.txt' to restore it)")
    assert (tmp_path / "extra/names.txt").read_text() == "cat\nwolf\n"


def test_an_archive_s_header_does_not_fill_the_memory(tmp_path):
    header = tarfile.TarInfo("long")
    header.type, header.size = tarfile.XHDTYPE, 64 << 20
    with gzip.open(tmp_path / "a.tar.gz", "wb", 1) as packed:
        packed.write(header.tobuf(tarfile.GNU_FORMAT))
        packed.write(bytes(header.size))
    tracemalloc.start()
    try:
        with pytest.raises(LexisegError, match="damaged"):
            unpack(tmp_path / "a.tar.gz", tmp_path / "out")
        assert tracemalloc.get_traced_memory()[1] < 32 << 20
    finally:
        tracemalloc.stop()


def _tar_of(path: Path, *members: tarfile.TarInfo) -> Path:
    with tarfile.open(path, "w") as packed:
        for member in members:
            packed.addfile(member, io.BytesIO(b"x" * member.size))
    return path


def _member(name: str, kind: bytes = tarfile.REGTYPE, link: str = "", size: int = 1) -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.type, member.linkname, member.size = kind, link, size if kind == tarfile.REGTYPE else 0
    return member


@pytest.mark.parametrize("name", ["../evil", "/tmp/evil", "a/../../evil"])
def test_nothing_leads_outside(tmp_path, name):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as packed:
        packed.writestr("good", "x")
        packed.writestr(name, "x")
    _tar_of(tmp_path / "a.tar", _member("good"), _member(name))
    for archive in ("a.zip", "a.tar"):
        with pytest.raises(LexisegError, match="leads outside"):
            unpack(tmp_path / archive, tmp_path / "in" / "out")
    assert not (tmp_path / "in" / "out" / "good").exists() and not list(tmp_path.glob("**/evil"))


def test_what_a_killed_run_left_is_removed(clean, tmp_path):
    archive = tmp_path / "all.zip"
    _zip(archive, clean("own-folders"))
    left = tmp_path / "out/.lexiseg-unpacking/images/photo 2.jpg"
    left.parent.mkdir(parents=True)
    left.write_bytes(b"half")
    assert unpack(archive, tmp_path / "out").kept == 0
    assert not left.parent.parent.exists() and (tmp_path / "out/images/photo 2.jpg").stat().st_size > 4


def test_links_are_not_followed(tmp_path):
    archive = _tar_of(tmp_path / "a.tar", _member("link", tarfile.SYMTYPE, "/tmp"), _member("b"))
    done = unpack(archive, tmp_path / "out")
    assert done.skipped == ("link",) and done.written == 1 and not (tmp_path / "out" / "link").exists()
    (tmp_path / "out" / "link").symlink_to(tmp_path)
    with pytest.raises(LexisegError, match="through the link"):
        unpack(_tar_of(tmp_path / "b.tar", _member("link/c")), tmp_path / "out")


def test_damaged_archives(clean, tmp_path):
    archive = tmp_path / "all.zip"
    _zip(archive, clean("own-folders"))
    data = bytearray(archive.read_bytes())
    data[len(data) // 2] ^= 255
    (tmp_path / "bad.zip").write_bytes(bytes(data))
    _tar(tmp_path / "all.tgz", clean("own-folders"))
    _cut(tmp_path / "all.tgz", 3000)
    (tmp_path / "text.zip").write_text("<html>not found</html>")
    for name in ("bad.zip", "all.tgz", "text.zip"):
        with pytest.raises(LexisegError, match=name):
            unpack(tmp_path / name, tmp_path / "out")
    with pytest.raises(LexisegError, match="does not exist"):
        prepare("voc2012", tmp_path / "none")


def test_prepare_command(clean, tmp_path, capsys):
    shutil.copytree(clean("own-folders"), tmp_path / "my")
    assert main(["data", "prepare", "own", str(tmp_path / "my"), "--json"]) == 0
    steps = json.loads(capsys.readouterr().out)["steps"]
    assert [Path(step["path"]).name for step in steps] == ["train.txt", "val.txt"]
    assert main(["data", "prepare", "own", str(tmp_path / "my")]) == 0
    assert "is ready" in capsys.readouterr().out
