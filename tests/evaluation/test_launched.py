"""``lexiseg evaluate`` under launchers: the report of one process, whatever was killed before it."""

from __future__ import annotations

import json
import os
import signal

import pytest

from lexiseg.data.picture_world import write_voc
from lexiseg.journal import Journal
from tests.launching import Launch, free_port, launch


def evaluate_words(model, out, *more):
    return ["evaluate", "picture-world", "-w", model, "--size", "64", "-o", out, "--device", "cpu", *more]


def judged(out):
    report = json.loads((out / "report.json").read_text())
    return report["metrics"], report["classes"]


@pytest.mark.slow
def test_evaluate_command_killed_resumed_and_shared(tmp_path):
    """kill -9 leaves parts and no report; what goes on, with any number of processes, ends with the same report."""
    words = ["--limit", "180", "--json"]
    whole = launch(tmp_path, evaluate_words("zegclip-emoji", tmp_path / "whole", *words), count=1)
    parts = Journal(tmp_path / "broken" / "evaluation-parts")

    def counted():
        return [number for line in parts.lines() for number in line.get("batches", ())]

    for count in (1, 2):
        broken = Launch(tmp_path, evaluate_words("zegclip-emoji", tmp_path / "broken", *words, "--resume"), count)
        before = len(counted())
        broken.until(lambda before=before: len(counted()) > before)
        os.kill(broken.workers()[-1], signal.SIGKILL)
        assert broken.wait(120) != 0
        assert not (tmp_path / "broken" / "report.json").exists()
    refused = launch(tmp_path, evaluate_words("zegclip-emoji", tmp_path / "broken", "--resume"), expect=1)
    assert refused.count("made with other settings: 'num_pictures' was 180") == 1
    assert 0 < len(counted()) < 180
    said = launch(tmp_path, evaluate_words("zegclip-emoji", tmp_path / "broken", *words, "--resume"), count=2)
    assert said.count('"metrics"') == whole.count('"metrics"') == 1
    assert judged(tmp_path / "broken") == judged(tmp_path / "whole")
    assert (tmp_path / "broken" / "grid.png").read_bytes() == (tmp_path / "whole" / "grid.png").read_bytes()
    assert not parts.folder.exists()
    launch(tmp_path, evaluate_words("zegclip-emoji", tmp_path / "few", "--limit", "1"), count=3)
    assert json.loads((tmp_path / "few" / "report.json").read_text())["protocol"]["num_pictures"] == 1


@pytest.mark.slow
def test_a_broken_picture_ends_all_processes(tmp_path):
    write_voc(tmp_path / "data", num_train=1, num_val=6, size=32)
    names = (tmp_path / "data" / "ImageSets" / "Segmentation" / "val.txt").read_text().split()
    broken = tmp_path / "data" / "JPEGImages" / f"{names[3]}.jpg"  # the second process predicts it
    broken.write_bytes(broken.read_bytes()[:60])
    words = ["evaluate", tmp_path / "data", "-w", "zegclip-emoji", "-o", tmp_path / "out", "--device", "cpu"]
    said = launch(tmp_path, words, expect=1)
    assert said.count(broken.name) == 1 and not (tmp_path / "out" / "report.json").exists()


@pytest.mark.slow
def test_two_launchers_meet_as_two_machines_would_and_accelerate_launches(tmp_path):
    def words(name):
        return evaluate_words("zegclip-emoji", tmp_path / name, "--limit", "5")

    address = f"localhost:{free_port()}"
    launcher = [
        "torch.distributed.run", "--nnodes", "2", "--nproc_per_node", "1", "--rdzv_backend", "c10d",
        "--rdzv_endpoint", address, "--rdzv_id", "1", "-m",
    ]  # fmt: skip
    folders = [tmp_path / name for name in ("first", "second")]
    for folder in folders:
        folder.mkdir()
    machines = [Launch(folder, words("torchrun"), launcher=launcher) for folder in folders]
    assert [machine.wait() for machine in machines] == [0, 0]
    assert sorted("wrote" in machine.out.read_text() for machine in machines) == [False, True]
    launcher = [
        "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1",
        "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", str(free_port()), "-m",
    ]  # fmt: skip
    assert Launch(tmp_path, words("accelerate"), launcher=launcher).wait() == 0
    launch(tmp_path, words("plain"), count=1)
    assert judged(tmp_path / "torchrun") == judged(tmp_path / "accelerate") == judged(tmp_path / "plain")
