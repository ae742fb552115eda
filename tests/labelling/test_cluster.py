"""Labelling a folder through Ray Data, with workers and drivers killed in the middle: every picture once."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

import lexiseg
from lexiseg.cli import main
from lexiseg.errors import LexisegError
from lexiseg.files import read_lines
from lexiseg.journal import Journal
from lexiseg.labelling.pictures import FOLDER
from lexiseg.labelling.ray_data import check_reachable
from tests.cli.calling import WORDS, assert_sentence, leftovers
from tests.cli.conftest import call, tiny_model  # noqa: F401 (fixtures)

COUNT = 24
LIMIT = 1500  # seconds; seconds on a quiet machine, minutes on a busy one
needs_ray = pytest.mark.skipif(find_spec("ray") is None, reason="Ray is not installed: pip install 'lexiseg[ray]'")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("cluster") / "pictures"
    place.mkdir()
    rng = np.random.default_rng(0)
    for index in range(COUNT):
        Image.fromarray(rng.integers(0, 256, (300, 400, 3), dtype=np.uint8)).save(place / f"p{index}.jpg")
    return place


def start(folder: Path, model: Path, out: Path, *options: object) -> subprocess.Popen[str]:
    words = ["predict", folder, WORDS, "-m", model, "-o", out, "--device", "cpu", *options]
    return subprocess.Popen(
        [sys.executable, "-m", "lexiseg", *(str(word) for word in words)],
        env={**os.environ, "PYTHONPATH": str(Path(lexiseg.__file__).parents[1]), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def on_ray(*options: object) -> tuple[object, ...]:
    return ("--cluster", "ray", "--address", "local", "--workers", 2, "--shard-size", 12, *options)


def wait_for_part(out: Path, process: subprocess.Popen[str], limit: float = 900) -> tuple[int, list[str]]:
    """Wait until a shard is half done: the process that is at it, and the pictures it has finished."""
    until = time.monotonic() + limit
    while time.monotonic() < until:
        if process.poll() is not None:
            raise AssertionError(process.communicate())
        for path in out.joinpath(FOLDER).glob("*.*.jsonl"):
            lines = list(read_lines(path))
            done = [line["image"] for line in lines if "image" in line]
            if 2 <= len(done) <= 9:
                return int(lines[0]["process"]), done
        time.sleep(0.01)
    raise AssertionError("no shard was begun")


def check_results(out: Path, folder: Path) -> None:
    lines = [line for line in Journal(out / FOLDER).lines() if "image" in line]
    assert sorted(Path(line["image"]).name for line in lines) == sorted(path.name for path in folder.iterdir())
    assert not any(line["error"] for line in lines)
    for line in lines:
        stem = Path(line["image"]).stem
        assert line["files"] == {
            "labels": f"{stem}_labels.png", "overlay": f"{stem}_overlay.png", "json": f"{stem}.json"
        }  # fmt: skip
        with Image.open(out / line["files"]["labels"]) as labels:
            labels.load()
        assert json.loads((out / line["files"]["json"]).read_text())["width"] == 400
    assert not leftovers(out)


@needs_ray
@pytest.mark.slow
def test_a_killed_worker_loses_no_picture(folder: Path, tiny_model: Path, tmp_path: Path) -> None:  # noqa: F811
    process = start(folder, tiny_model, tmp_path / "ray", *on_ray())
    worker, _ = wait_for_part(tmp_path / "ray", process)
    assert worker != process.pid
    os.kill(worker, signal.SIGKILL)
    out, err = process.communicate(timeout=LIMIT)
    assert process.returncode == 0, err
    assert f"{COUNT} of {COUNT} pictures segmented" in err and "Traceback" not in err
    assert out.count("_labels.png") == COUNT
    check_results(tmp_path / "ray", folder)
    # The files are those that one machine writes.
    alone = start(folder, tiny_model, tmp_path / "alone")
    alone.communicate(timeout=LIMIT)
    assert alone.returncode == 0
    names = {path.name for path in (tmp_path / "alone").iterdir()}
    assert names == {path.name for path in (tmp_path / "ray").iterdir()}
    for name in names - {FOLDER}:
        assert (tmp_path / "alone" / name).read_bytes() == (tmp_path / "ray" / name).read_bytes(), name


@needs_ray
@pytest.mark.slow
def test_a_killed_driver_goes_on_with_resume(folder: Path, tiny_model: Path, tmp_path: Path) -> None:  # noqa: F811
    out = tmp_path / "ray"
    process = start(folder, tiny_model, out, *on_ray())
    worker, done = wait_for_part(out, process)
    process.kill()
    process.communicate()
    until = time.monotonic() + 120
    while _runs(worker) and time.monotonic() < until:  # Ray's own processes end with the driver
        time.sleep(0.2)
    written = {image: (out / f"{Path(image).stem}_labels.png").stat().st_mtime_ns for image in done}
    again = start(folder, tiny_model, out, *on_ray("--resume"))
    _, err = again.communicate(timeout=LIMIT)
    assert again.returncode == 0, err
    earlier = re.search(rf"{COUNT} of {COUNT} pictures segmented, (\d+) of them earlier", err)
    assert earlier and int(earlier[1]) >= len(done), err
    assert {image: (out / f"{Path(image).stem}_labels.png").stat().st_mtime_ns for image in done} == written
    check_results(out, folder)


@pytest.mark.slow
def test_a_killed_single_machine_run_goes_on_with_resume(
    folder: Path,
    tiny_model: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    process = start(folder, tiny_model, tmp_path / "out")
    pid, done = wait_for_part(tmp_path / "out", process)
    assert pid == process.pid
    process.kill()
    process.communicate()
    (tmp_path / "out" / ".p3_labels.01234567.tmp.png").touch()
    written = {image: (tmp_path / "out" / f"{Path(image).stem}.json").stat().st_mtime_ns for image in done}
    again = start(folder, tiny_model, tmp_path / "out", "--resume", "--json")
    out, err = again.communicate(timeout=LIMIT)
    assert again.returncode == 0, err
    images = [Path(entry["image"]).name for entry in json.loads(out)["images"]]
    assert sorted(images) == sorted(path.name for path in folder.iterdir())
    assert {image: (tmp_path / "out" / f"{Path(image).stem}.json").stat().st_mtime_ns for image in done} == written
    assert not leftovers(tmp_path / "out")


@needs_ray
@pytest.mark.slow
def test_mistakes_on_a_cluster_are_one_sentence(folder: Path, tiny_model: Path, tmp_path: Path) -> None:  # noqa: F811
    (tmp_path / "in").mkdir()
    for path in list(folder.iterdir())[:3]:
        (tmp_path / "in" / path.name).write_bytes(path.read_bytes())
    (tmp_path / "in" / "bad.png").write_text("no picture")
    process = start(tmp_path / "in", tiny_model, tmp_path / "out", *on_ray("--json"))
    out, err = process.communicate(timeout=LIMIT)
    assert process.returncode == 1, err
    entries = {Path(entry["image"]).name: entry for entry in json.loads(out)["images"]}
    assert "bad.png" in entries["bad.png"]["error"] and "bad.png" in err
    assert sum("error" in entry for entry in entries.values()) == 1
    process = start(tmp_path / "in", tiny_model, tmp_path / "out2", *on_ray("--device", "cuda"))
    out, err = process.communicate(timeout=LIMIT)
    assert process.returncode == 2 and "no GPU" in err and "Traceback" not in err


def _runs(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return Path(f"/proc/{process}/stat").exists() and " Z " not in Path(f"/proc/{process}/stat").read_text()


def test_options_for_a_cluster_need_one(
    call,  # type: ignore[no-untyped-def]  # noqa: F811
    folder: Path,
    tiny_model: Path,  # noqa: F811
) -> None:
    assert_sentence(*call("predict", folder, WORDS, "-m", tiny_model, "--workers", 2), "--cluster ray")
    assert main(["predict", str(folder), WORDS, "--cluster", "dask"]) == 2


def test_without_ray_one_sentence_says_what_to_install(
    call,  # type: ignore[no-untyped-def]  # noqa: F811
    folder: Path,
    tiny_model: Path,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    assert_sentence(
        *call("predict", folder, WORDS, "-m", tiny_model, "--cluster", "ray"), "pip install", "lexiseg[ray]"
    )


def test_a_ray_that_does_not_start_is_one_sentence(
    call,  # type: ignore[no-untyped-def]  # noqa: F811
    folder: Path,
    tiny_model: Path,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def slow(**_: object) -> None:
        raise Exception("The current node timed out during startup.")  # as Ray does, of this very class

    ray = SimpleNamespace(is_initialized=lambda: False, init=slow, data=None, exceptions=None)
    for name in ("ray", "ray.data", "ray.exceptions"):
        monkeypatch.setitem(sys.modules, name, ray)
    found = call("predict", folder, WORDS, "-m", tiny_model, "--cluster", "ray", "-o", tmp_path / "out")
    assert_sentence(*found, "Ray did not start", "timed out during startup")


def test_an_address_where_nobody_listens_is_told_at_once() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        check_reachable(f"127.0.0.1:{port}")
    with pytest.raises(LexisegError, match=f"no Ray cluster at '127.0.0.1:{port}'"):
        check_reachable(f"127.0.0.1:{port}")
    check_reachable("auto")
