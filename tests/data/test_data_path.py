"""What a training step may cost beside the model: one decode a picture, and no text forward at all."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

import lexiseg.data.sets.dataset as reading
from lexiseg.clip.model import CLIP
from lexiseg.data.sets.open import open_data_set
from lexiseg.data.transforms import paper_pipeline
from lexiseg.models import ZegCLIP, ZegCLIPOptions
from lexiseg.recipes import TrainSettings
from lexiseg.training.segmentation import SegmentationTask
from lexiseg.training.trainer import Trainer
from tests import miniatures
from tests.towers import small_clip

STEPS, BATCH = 3, 2


def test_a_step_decodes_each_picture_once_and_embeds_no_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    miniatures.voc2012(tmp_path / "voc")
    torch.manual_seed(0)
    dataset = open_data_set("voc2012", tmp_path / "voc", "train")
    seen = [entry.name for entry in dataset.vocabulary.classes if entry.seen]
    model = ZegCLIP(small_clip(), ZegCLIPOptions(num_prompts=2, decoder_layers=1, decoder_heads=2), seen)
    counts: Counter[str] = Counter()

    def counting(name: str, real: Any) -> Any:
        def counted(*args: Any, **kwargs: Any) -> Any:
            counts[name] += 1
            return real(*args, **kwargs)

        return counted

    monkeypatch.setattr(reading, "read_pixels", counting("pictures", reading.read_pixels))
    monkeypatch.setattr(reading, "read_values", counting("labels", reading.read_values))
    monkeypatch.setattr(CLIP, "encode_text", counting("texts", CLIP.encode_text))
    pipeline = paper_pipeline(model.mean, model.std, crop=32)
    task = SegmentationTask(model, dataset, pipeline, batch_size=BATCH, validation=dataset, num_samples=1)
    assert counts == {"texts": 1, "labels": 1}  # a label with a class is looked for before anything is trained
    counts["labels"] = 0
    settings = TrainSettings(steps=STEPS, batch_size=BATCH, lr=1e-3, workers=0, log_every=1, snapshot_every=0)
    Trainer(task, settings, tmp_path / "run", device="cpu", tensorboard=False, progress=False).run()
    assert counts == {"texts": 1, "pictures": STEPS * BATCH, "labels": STEPS * BATCH}
    # Looking at validation pictures needs the names of unseen classes once, and then no more.
    task.evaluate(STEPS)
    texts = counts["texts"]
    task.evaluate(STEPS)
    assert texts <= 2 and counts["texts"] == texts
