"""`lexiseg predict` where things go otherwise than planned: names, stops, full disks, closed pipes, datasets."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time
import unicodedata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pycocotools.coco import COCO

import lexiseg
from lexiseg.cli import main
from lexiseg.cli.pictures import SOME_FAILED
from lexiseg.data.sets.open import open_data_set
from lexiseg.errors import LexisegError
from lexiseg.segmentation import Segmentation
from tests.cli.calling import WORDS, Call


@pytest.fixture
def predict(call: Call, tiny_model: Path) -> Call:
    return lambda *args: call("predict", *args, "-m", tiny_model)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_pictures(tmp_path / "in", ["a_first.png", "caf\udce9.png", "z_last.png"])


def write_pictures(folder: Path, names: list[str]) -> Path:
    folder.mkdir()
    for index, name in enumerate(names):
        pixels = np.random.default_rng(index).integers(0, 256, (40, 56, 3), dtype=np.uint8)
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "PNG")
        (folder / name).write_bytes(file.getvalue())
    return folder


def test_results_beside_the_pictures_are_not_segmented_again(predict: Call, tmp_path: Path) -> None:
    folder = write_pictures(tmp_path / "own", ["a.png", "b_overlay.png"])
    for more in ((), ("--resume",), ()):
        code, _, err = predict(folder, WORDS, "-o", folder, *more)
        assert code == 0 and "2 of 2 pictures" in err
    assert "Skipped: 4 pictures that lexiseg wrote itself" in err
    assert "Skipped: 4 pictures that lexiseg wrote itself" in predict(folder, WORDS, "-o", tmp_path / "out")[2]
    assert len(list(folder.glob("*.json"))) == 2


@pytest.mark.parametrize(
    ("name", "kind", "other"),
    [
        ("a.json", "json", "overlay"),
        ("annotations.json", "coco", "overlay"),
        ("a_labels.png", "labels", "overlay"),
        ("a_overlay.png", "overlay", "labels"),
    ],
)
def test_annotations_beside_the_pictures_are_not_replaced(
    predict: Call, tmp_path: Path, name: str, kind: str, other: str
) -> None:
    folder = write_pictures(tmp_path / "own", ["a.png", "b.png"])
    foreign = '{"shapes": "made by lexiseg"}' if kind == "json" else '{"ignore_index": []}'  # another kind's mark
    (folder / name).write_text(foreign)
    before = sorted(folder.iterdir())
    code, _, err = predict(folder, WORDS, "-o", folder, "--save", f"{other},{kind}")
    assert code == 2 and f"{name}' was not written by lexiseg" in err and sorted(folder.iterdir()) == before
    assert f"leave {kind} out" in err and predict(folder, WORDS, "-o", folder, "--save", other)[0] == 0
    assert (folder / name).read_text() == foreign
    (folder / name).unlink()
    for _ in range(2):  # what lexiseg has written is
        assert predict(folder, WORDS, "-o", folder, "--save", kind)[0] == 0


def test_a_picture_is_taken_once_however_its_folder_is_spelled(predict: Call, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(folder)
    names = ("in/a_first.png", "in/../in/a_first.png", folder / "a_first.png", "link/a_first.png")
    assert predict(*names, WORDS, "--save", "labels")[0] == 0
    assert [path.name for path in (tmp_path / "out").glob("*.png")] == ["a_first_labels.png"]


def test_results_that_another_run_replaced_are_made_again(predict: Call, folder: Path, tmp_path: Path) -> None:
    assert predict(folder, WORDS, "--save", "json")[0] == 0
    first = (tmp_path / "out" / "a_first.json").read_bytes()
    assert predict(folder / "a_first.png", "grass; dog", "--save", "json")[0] == 0
    assert (tmp_path / "out" / "a_first.json").read_bytes() != first
    code, _, err = predict(folder, WORDS, "--save", "json", "--resume")
    assert code == 0 and "3 of 3 pictures segmented, 2 of them earlier" in err
    assert json.loads((tmp_path / "out" / "a_first.json").read_bytes())["vocabulary"] == json.loads(first)["vocabulary"]


def test_a_name_that_is_not_utf8_is_a_name_like_any_other(predict: Call, folder: Path, tmp_path: Path) -> None:
    for more in ([], ["--resume"], ["--save", "labels", "-o", "labels"], ["--save", "coco", "-o", "coco"]):
        code, out, err = predict(folder, WORDS, *more)
        assert code == 0 and err.startswith("3 of 3 pictures segmented"), err
        assert "\udce9" not in out + err and (r"caf\xe9" in out or "--resume" in more)
    assert (tmp_path / "out" / "caf\udce9_labels.png").is_file()
    names = {image["file_name"] for image in COCO(str(tmp_path / "coco" / "annotations.json")).imgs.values()}
    assert names == {"a_first.png", "caf\udce9.png", "z_last.png"}
    code, out, err = predict(folder, WORDS, "--json")
    assert [Path(image["image"]).name for image in json.loads(out)["images"]] == sorted(names)


def test_two_spellings_of_a_name_are_one_name(predict: Call, tmp_path: Path) -> None:
    forms = [unicodedata.normalize(form, "é.png") for form in ("NFC", "NFD")]
    write_pictures(tmp_path / "in", forms)
    assert predict("in", WORDS, "--save", "labels")[0] == 0
    stems = {unicodedata.normalize("NFC", path.name) for path in (tmp_path / "out").glob("*.png")}
    assert len(stems) == 2  # neither overwrote the other, also where a disk takes both for one
    write_pictures(tmp_path / "one", [forms[1]])
    assert predict(f"one/{forms[0]}", WORDS, "--save", "labels")[0] == 0


def test_names_that_are_too_long_or_those_of_the_run_s_own_files(predict: Call, tmp_path: Path) -> None:
    names = ["annotations.png", "classes.png", f"{'é' * 120}.png", f"{'n' * 250}.png", f"{'n' * 249}m.png"]
    write_pictures(tmp_path / "in", names)
    for more in ((), ("--resume",)):
        code, out, _ = predict("in", WORDS, "--save", "labels,overlay,json,coco,yolo", *more)
        assert code == 0 and "wrote out/yolo/classes.txt\n" in out
    for pattern in ("*_labels.png", "*_overlay.png"):
        assert len(list((tmp_path / "out").glob(pattern))) == len(names)
    assert len(json.loads((tmp_path / "out" / "annotations.json").read_text())["images"]) == len(names)
    assert (tmp_path / "out" / "yolo" / "classes.txt").read_text().splitlines() == [
        part.split(",")[0] for part in WORDS.split("; ")
    ]


def test_label_maps_can_be_read_as_masks_and_a_list_of_the_user_s_own_stays(predict: Call, tmp_path: Path) -> None:
    write_pictures(tmp_path / "images", ["a.png", "b.png"])
    masks = tmp_path / "masks"
    for classes in ("dog; sky", "dog; tree, bush"):
        code, out, _ = predict("images", classes, "--save", "labels", "-o", masks)
        assert code == 0 and out.endswith(f"wrote {masks / 'classes.txt'}\n")
        data = open_data_set("own", tmp_path, "train")
        assert data.vocabulary.names == tuple(part.split(",")[0] for part in classes.split("; "))
        assert np.array_equal(data[0].label, Image.open(masks / "a_labels.png"))
    for text in ("cat, kitten\n", "cat, kitten\ndog\n"):
        (masks / "classes.txt").write_text(text)
        code, out, err = predict("images", "cat; dog", "--save", "labels", "-o", masks)
        assert code == 0 and (masks / "classes.txt").read_text() == text and "classes.txt" not in out
        assert ("lists other classes than these label maps" in err) == ("dog" not in text)


def test_nothing_of_a_folder_is_passed_over(predict: Call, folder: Path) -> None:
    (folder / "phone.heic").write_bytes(b"\0\0\0\x18ftypheic")
    (folder / "gone.png").symlink_to("nothing.png")
    (folder / "layers.psd").write_bytes(b"8BPS")
    for suffix in (".ico", ".dib", ".j2k", ".pfm"):
        Image.new("F" if suffix == ".pfm" else "RGB", (16, 16)).save(folder / f"rare{suffix}")
    code, _, err = predict(folder, WORDS, "--save", "labels")
    assert code == SOME_FAILED
    assert "phone.heic" in err and "gone.png" in err and "layers.psd" in err
    assert err.endswith("7 of 10 pictures segmented\n")


def test_coco_is_one_data_set_a_run_also_after_a_stop(predict: Call, tmp_path: Path, folder: Path) -> None:
    code, out, _ = predict(folder, WORDS, "--save", "coco")
    assert code == 0 and "wrote out/annotations.json\n" in out
    assert [path.name for path in (tmp_path / "out").iterdir() if not path.name.startswith(".")] == ["annotations.json"]
    first = (tmp_path / "out" / "annotations.json").read_bytes()
    write_pictures(tmp_path / "more", ["b.png"])
    assert predict(folder, "more", WORDS, "--save", "coco,labels", "--resume")[0] == 0
    dataset = COCO(str(tmp_path / "out" / "annotations.json"))
    assert [image["file_name"] for image in dataset.imgs.values()][-1] == "more/b.png"
    assert sorted(dataset.imgs) == [1, 2, 3, 4] and len(dataset.getCatIds()) == 3
    assert len(json.loads(first)["images"]) == 3
    assert dataset.loadRes(json.loads((tmp_path / "out" / "annotations.json").read_text())["annotations"])
    labels = np.asarray(Image.open(tmp_path / "out" / "b_labels.png"))
    painted = np.full(labels.shape, 255)
    for annotation in dataset.loadAnns(dataset.getAnnIds(imgIds=[4])):
        painted[dataset.annToMask(annotation) > 0] = annotation["category_id"] - 1
    assert np.array_equal(painted, labels)
    code, out, _ = predict(folder / "a_first.png", WORDS, "--save", "coco", "-o", "single")
    assert code == 0 and (tmp_path / "single" / "annotations.json").is_file()
    (tmp_path / "bad.png").write_bytes(b"")
    assert predict("bad.png", WORDS, "--save", "coco", "-o", "none")[0] != 0
    assert not (tmp_path / "none" / "annotations.json").exists()  # where no picture could be done


def test_instances_are_regions(predict: Call, folder: Path, tmp_path: Path) -> None:
    picture = folder / "a_first.png"
    assert predict(picture, WORDS, "--save", "coco", "-o", "classes")[0] == 0
    assert predict(picture, WORDS, "--save", "coco", "-o", "regions", "--instances", "all")[0] == 0
    count = {
        name: len(json.loads((tmp_path / name / "annotations.json").read_text())["annotations"])
        for name in ("classes", "regions")
    }
    assert count["regions"] >= count["classes"]
    for more, words in (
        (["--instances", "cat"], "'cat' is not one of the classes"),
        (["--instances", "dog", "--save", "labels"], "has no effect"),
        (["--font", "any.ttf"], "for the legend of overlays"),
    ):
        code, _, err = predict(picture, WORDS, *["--save", "coco", *more])
        assert code == 2 and words in err


def stop_after(monkeypatch: pytest.MonkeyPatch, count: int, error: BaseException) -> None:
    """Let something end the run once ``count`` pictures are written."""
    save, written = Segmentation.save, [0]

    def fragile(self: Segmentation, *args: Any, **options: Any) -> dict[str, Path]:
        if written[0] == count:
            raise error
        written[0] += 1
        return save(self, *args, **options)

    monkeypatch.setattr(Segmentation, "save", fragile)


def test_a_stop_says_what_is_done_and_how_to_go_on(
    predict: Call, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        stop_after(patch, 2, KeyboardInterrupt())
        code, _, err = predict(folder, WORDS, "--save", "labels")
    assert code == 130 and len(err.splitlines()) == 1
    assert err.startswith("Stopped with 2 of 3 pictures complete") and "--resume" in err
    assert len(list((tmp_path / "out").glob("*_labels.png"))) == 2
    code, _, err = predict(folder, WORDS, "--save", "labels", "--resume", "--refine", "edges")
    assert code == 2 and "'refine' was none and is now edges" in err
    code, _, err = predict(folder, WORDS.replace("grass", "sky"), "--save", "labels", "--resume")
    assert code == 2 and "'classes.2.name' was grass and is now sky" in err
    code, _, err = predict(folder, WORDS, "--save", "labels", "--resume")
    assert code == 0 and err == "3 of 3 pictures segmented, 2 of them earlier\n"


def test_a_moved_folder_goes_on(predict: Call, folder: Path, tmp_path: Path) -> None:
    more = ("--save", "labels,coco", "-o", "out")
    assert predict(folder, WORDS, *more)[0] == 0
    moved = folder.rename(tmp_path / "moved")
    (tmp_path / "link").symlink_to(moved)
    for place in (moved, tmp_path / "link"):
        code, _, err = predict(place, WORDS, *more, "--resume")
        assert code == 0 and err == "3 of 3 pictures segmented, 3 of them earlier\n"
    (moved / "z_last.png").write_bytes((moved / "a_first.png").read_bytes())
    assert predict(moved, WORDS, *more, "--resume")[2] == "3 of 3 pictures segmented, 2 of them earlier\n"
    assert len(list((tmp_path / "out").glob("*_labels.png"))) == 3


@pytest.mark.parametrize(("count", "code"), [(0, 2), (2, 1)])
def test_a_full_disk_keeps_what_is_whole(
    predict: Call, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: int, code: int
) -> None:
    stop_after(monkeypatch, count, LexisegError("Cannot write 'x' (No space left on device); choose another place."))
    result, _, err = predict(folder, WORDS, "--save", "labels")
    assert result == code and "No space left" in err.splitlines()[0]
    assert (f"{count} of 3 pictures segmented" in err) == (count > 0)
    for path in (tmp_path / "out").glob("*_labels.png"):
        Image.open(path).load()


def start(folder: Path, *args: object, **options: Any) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(Path(lexiseg.__file__).parents[1]), "PYTHONUNBUFFERED": "1"}
    command = [sys.executable, "-m", "lexiseg", *(str(arg) for arg in args)]
    streams: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options}
    return subprocess.Popen(command, cwd=folder, env=environment, text=True, **streams)


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_signals_stop_a_real_run(tmp_path: Path, tiny_model: Path, number: signal.Signals, code: int) -> None:
    write_pictures(tmp_path / "in", [f"{index:04d}.png" for index in range(400)])
    process = start(tmp_path, "predict", "in", WORDS, "--model", tiny_model, "--save", "labels")
    try:
        until = time.monotonic() + 120
        while time.monotonic() < until and len(list(tmp_path.glob("out/*_labels.png"))) < 5:
            time.sleep(0.05)
        process.send_signal(number)
        _, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == code
    assert len(err.splitlines()) == 1 and err.startswith("Stopped with ") and "of 400 pictures complete" in err
    for path in tmp_path.glob("out/*_labels.png"):
        Image.open(path).load()


def test_sigterm_while_libraries_are_imported_is_143(tmp_path: Path) -> None:
    lines = (
        "import pathlib, sys",
        "from lexiseg.cli import main",
        "pathlib.Path.cwd = lambda: exec('import os; os.kill(os.getpid(), 15)')  # as dataclasses run what they make",
        "sys.exit(main(['models']))",
    )
    (tmp_path / "stopped.py").write_text("\n".join(lines))
    environment = {**os.environ, "PYTHONPATH": str(Path(lexiseg.__file__).parents[1])}
    command = [sys.executable, "-m", "stopped"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (143, "Stopped.\n")


def test_a_reader_that_goes_away_is_no_error(
    predict: Call, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w") as broken:
        monkeypatch.setattr(sys, "stdout", broken)
        assert predict(folder, WORDS, "--save", "labels")[0] == 0
        assert main(["models"]) == 0
        monkeypatch.undo()
    assert len(list((tmp_path / "out").glob("*_labels.png"))) == 3


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_closed_and_full_outputs_of_a_real_process(tmp_path: Path, folder: Path, tiny_model: Path) -> None:
    with Path("/dev/full").open("w") as full:
        process = start(tmp_path, "models", stdout=full)
        _, err = process.communicate(timeout=60)
    assert (
        process.returncode == 2
        and err == "Cannot write (No space left on device); free disk space or write elsewhere.\n"
    )
    closed = subprocess.run(
        [sys.executable, "-m", "lexiseg", "predict", folder, WORDS, "--model", tiny_model, "--quiet"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(Path(lexiseg.__file__).parents[1])},
        preexec_fn=lambda: os.closerange(1, 3),
        check=False,
    )
    assert closed.returncode == 0 and len(list((tmp_path / "out").glob("*_labels.png"))) == 3


def test_labelling_one_picture_needs_no_record(predict: Call, folder: Path, tmp_path: Path) -> None:
    code, out, err = predict(folder / "a_first.png", WORDS)
    assert code == 0 and err == "" and "wrote out/a_first.json\n" in out
    assert not (tmp_path / "out" / ".lexiseg-predict").exists()
