"""The record of a run over many pictures: what is done stays done, whatever stops the run."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from lexiseg.errors import LexisegError
from lexiseg.journal import Writer, changed
from lexiseg.labelling.pictures import (
    TRIES,
    Entry,
    Labeller,
    Picture,
    Record,
    Wanted,
    absolute,
    file_state,
)
from lexiseg.models import DenseCLIP
from lexiseg.models.dense_clip import DenseCLIPOptions
from lexiseg.segmenter import Segmenter
from lexiseg.vocabulary import Vocabulary
from tests.towers import small_clip

SETTINGS = {"classes": "abc", "window": {"size": None}}


def pictures(folder: Path, count: int = 4) -> list[Picture]:
    folder.mkdir(parents=True, exist_ok=True)
    made = []
    for index in range(count):
        path = folder / f"p{index}.png"
        pixels = np.random.default_rng(index).integers(0, 256, (20, 24, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path)
        made.append(Picture(str(path), f"p{index}", f"in/{path.name}"))
    return made


@pytest.fixture
def labeller(tmp_path: Path) -> Labeller:
    torch.manual_seed(0)
    model = DenseCLIP(small_clip(), DenseCLIPOptions(short_side=0))
    (tmp_path / "out").mkdir()
    wanted = Wanted(Vocabulary.parse("dog; grass"), ("labels", "json"))
    return Labeller(Segmenter(model, disk_cache=False), wanted, tmp_path / "out")


class Killed(BaseException):
    """Stands for kill -9: nothing handles it."""


def stop_at(labeller: Labeller, monkeypatch: pytest.MonkeyPatch, fatal: str) -> list[str]:
    """Make reading ``fatal`` end everything; returns the list of the pictures that were really segmented."""
    real = Labeller.label
    seen: list[str] = []

    def label(self: Labeller, todo: Sequence[Picture]) -> Iterator[Entry]:
        for picture in todo:
            if picture.stem == fatal:
                raise Killed
            seen.append(picture.stem)
            yield from real(self, [picture])

    monkeypatch.setattr(Labeller, "label", label)
    return seen


def test_a_shard_goes_on_where_it_was_stopped(
    tmp_path: Path, labeller: Labeller, monkeypatch: pytest.MonkeyPatch
) -> None:
    todo = pictures(tmp_path / "in")
    record = Record(tmp_path / "out")
    assert record.begin_run(SETTINGS, resume=False) == {}
    ((number, shard),) = record.shards_of(todo).items()
    with monkeypatch.context() as patch:
        seen = stop_at(labeller, patch, "p2")
        with pytest.raises(Killed):
            list(labeller.label_shard(record, number, shard))
        assert seen == ["p0", "p1"]
    (part,) = record.files()
    with part.open("a") as file:
        file.write('{"image": "half a li')  # what a killed process may leave
    with monkeypatch.context() as patch:
        seen = stop_at(labeller, patch, "nothing")
        entries = list(labeller.label_shard(record, number, shard))
    assert seen == ["p2", "p3"]
    assert [entry.stem for entry in entries] == ["p0", "p1", "p2", "p3"]
    assert sorted(line["stem"] for line in record.lines() if "stem" in line) == ["p0", "p1", "p2", "p3"]
    # A shard that is given out once more, because its result was lost, is not done once more.
    with monkeypatch.context() as patch:
        assert stop_at(labeller, patch, "p0") == []
        assert list(labeller.label_shard(record, number, shard)) == entries
    assert record.begin_run(SETTINGS, resume=True) == {entry.image: entry for entry in entries}
    assert list(record.shards_of(todo)) == [1]


def test_a_picture_that_kills_its_worker_is_left_out(
    tmp_path: Path, labeller: Labeller, monkeypatch: pytest.MonkeyPatch
) -> None:
    todo = pictures(tmp_path / "in")
    record = Record(tmp_path / "out")
    record.begin_run(SETTINGS, resume=False)
    stop_at(labeller, monkeypatch, "p1")
    for _ in range(1 + TRIES):
        with pytest.raises(Killed):
            list(labeller.label_shard(record, 0, todo))
    entries = list(labeller.label_shard(record, 0, todo))
    assert [bool(entry.error) for entry in entries] == [False, True, False, False]
    assert "p1.png" in entries[1].error and "killed" in entries[1].error


def test_pictures_of_one_size_share_a_forward_pass(
    tmp_path: Path, labeller: Labeller, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, sizes = DenseCLIP.encode_images, []
    monkeypatch.setattr(
        DenseCLIP, "encode_images", lambda self, images: sizes.append(len(images)) or real(self, images)
    )
    for count, expected in ((None, [4, 1]), (3, [3, 2])):
        labeller.wanted = labeller.wanted if count is None else replace(labeller.wanted, batch_size=count)
        sizes.clear()
        assert len(list(labeller.label(pictures(tmp_path / "in", 5)))) == 5 and sizes == expected


def test_what_counts_as_done(tmp_path: Path, labeller: Labeller) -> None:
    todo = pictures(tmp_path / "in")
    bad = tmp_path / "in" / "bad.png"
    bad.write_text("no picture")
    todo.append(Picture(str(bad), "bad", "bad.png"))
    out = tmp_path / "out"
    record = Record(out)
    record.begin_run(SETTINGS, resume=False)
    shards = record.shards_of(todo, 2)
    assert [len(shard) for shard in shards.values()] == [2, 2, 1]
    for number, shard in shards.items():
        list(labeller.label_shard(record, number, shard))
    assert json.loads((out / "p3.json").read_text())["name"] == "in/p3.png"
    done = Record(out).begin_run(SETTINGS, resume=True)
    assert [entry.stem for entry in done.values()] == ["p0", "p1", "p2", "p3"]  # the bad one is tried again
    (out / "p0.json").write_text("")
    assert [entry.stem for entry in Record(out).begin_run(SETTINGS, resume=True).values()] == ["p1", "p2", "p3"]
    (out / "p1.json").unlink()
    os.utime(todo[2].path, ns=(1, 1))
    assert [entry.stem for entry in Record(out).begin_run(SETTINGS, resume=True).values()] == ["p3"]
    record.forget(todo[3:4])
    assert Record(out).begin_run(SETTINGS, resume=True) == {}
    with closing(Writer(record, "000099")) as writer:  # of a picture without objects YOLO's file is empty
        image = absolute(todo[0].path)
        writer.write(asdict(Entry(image, "p0", files={"yolo": "yolo/p0.txt"}, state=file_state(image))))
    (out / "yolo").mkdir()
    (out / "yolo" / "p0.txt").touch()
    assert [entry.stem for entry in Record(out).begin_run(SETTINGS, resume=True).values()] == ["p0"]
    with pytest.raises(LexisegError, match=r"other settings: 'classes' was abc and is now other;.*--output"):
        record.begin_run({**SETTINGS, "classes": "other"}, resume=True)
    assert record.begin_run({**SETTINGS, "classes": "other"}, resume=False) == {}
    assert record.begin_run({**SETTINGS, "classes": "other"}, resume=True) == {}


def test_what_is_left_of_a_killed_process_is_removed(tmp_path: Path) -> None:
    record = Record(tmp_path)
    record.begin_run(SETTINGS, resume=False)
    gone = [".p0_labels.0123abcd.tmp.png", ".p0.0123abcd.tmp.json", ".p0_overlay.ffffffff.tmp.png"]
    gone += [".p0_cvat.0123abcd.tmp.xml", "yolo/.p0.0123abcd.tmp.txt"]
    (tmp_path / "yolo").mkdir()
    kept = [".other_labels.0123abcd.tmp.png", ".p0.txt", "p0.json"]
    for name in (*gone, *kept):
        (tmp_path / name).touch()
    record.clean(["p0"])
    assert {path.name for path in tmp_path.iterdir() if path.is_file()} == set(kept)
    assert not list((tmp_path / "yolo").iterdir())


def test_of_several_differences_the_first_by_name_is_said() -> None:
    before, now = dict.fromkeys("storage", 1), dict.fromkeys("storage", 2)
    assert changed(before, now) == "'a' was 1 and is now 2" and changed(now, dict(now)) == ""
    assert changed(before, {**now, "A": {"deep": 0}}) == "'A.deep' was not set and is now 0"


def test_attempts_do_not_write_into_each_other(tmp_path: Path) -> None:
    record = Record(tmp_path)
    record.begin_run(SETTINGS, resume=False)
    first, second = Writer(record, "000003"), Writer(record, "000003")
    entry = Entry("/a.png", "a", files={"labels": "a.png"}, size=(2, 3), classes=({"class": "dog", "fraction": 1.0},))
    first.write(asdict(entry))
    second.write(asdict(replace(entry, image="/b.png", stem="b")))
    first.write({"begin": "/c.png"})  # somebody thought to be dead goes on, into a file of its own
    attempts, done, begun = record.attempts_at(3)
    assert attempts == 2 and set(done) == {"/a.png", "/b.png"} and begun == {"/c.png": 1}
    assert done["/a.png"] == replace(entry, classes=[{"class": "dog", "fraction": 1.0}])


def test_facts_of_paths(tmp_path: Path) -> None:
    assert file_state(tmp_path / "nowhere") == (0, 0)
    assert absolute(tmp_path) == str(tmp_path)
