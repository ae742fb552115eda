"""Learned prompts, synonyms joined into one vector, template sets, and the hook models embed words with."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from lexiseg.clip.model import CLIP, digest_of
from lexiseg.clip.prompt_learner import PromptLearner
from lexiseg.clip.text import TextEmbedder
from lexiseg.data.base import Sample
from lexiseg.errors import LexisegError
from lexiseg.models import DenseCLIP
from lexiseg.templates import TEMPLATE_SETS
from lexiseg.training.prompts import PromptTask, crop_logits, crop_object, hide_background, read_prompts
from lexiseg.vocabulary import Vocabulary
from tests.towers import small_clip

NAMES = ["cat", "traffic light", "wall-other"]


def row(clip: CLIP, text: str) -> torch.Tensor:
    """The token embeddings of a sentence, marks included."""
    ids = clip.tokenize([text])
    return clip.embed_tokens(ids[:, : int(clip.text_end(ids)) + 1])[0]


@torch.no_grad()
def test_prompts_that_are_words_are_the_sentence(clip: CLIP) -> None:
    """A prefix made of the tokens of "a photo of a" gives what the written template gives."""
    learner = PromptLearner(clip.text_width, prefix=4)
    assert learner.prefix_prompt is not None
    learner.prefix_prompt.copy_(row(clip, "a photo of a")[1:-1])
    written = TextEmbedder(clip).embed(NAMES, ["a photo of a {}."])
    torch.testing.assert_close(learner(clip, NAMES), written, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_prefix_suffix_and_task_have_their_places(clip: CLIP) -> None:
    learner = PromptLearner(clip.text_width, prefix=2, suffix=3, task=1)
    embeddings, end = learner.assemble(clip, NAMES, "panoptic segmentation.", length=clip.context_length)
    assert embeddings.shape == (3, 77, 16)
    task, dot = row(clip, "panoptic segmentation.")[1:-1], row(clip, "X.")[-2]
    assert learner.task_prompt is not None and learner.prefix_prompt is not None and learner.suffix_prompt is not None
    for index, name in enumerate(NAMES):
        marks = row(clip, name)
        expected = torch.cat(
            [
                task,
                learner.task_prompt,
                marks[:1],
                learner.prefix_prompt,
                marks[1:-1],
                learner.suffix_prompt,
                dot[None],
                marks[-1:],
            ]
        )
        assert int(end[index]) == len(expected) - 1
        assert torch.equal(embeddings[index, : len(expected)], expected)
        padding = clip.embed_tokens(torch.zeros(1, 1, dtype=torch.long))[0, 0]
        assert bool((embeddings[index, len(expected) :] == padding).all())


@torch.no_grad()
def test_padding_and_chunks_do_not_matter(clip: CLIP) -> None:
    learner = PromptLearner(clip.text_width, prefix=3, suffix=1)
    whole = learner(clip, NAMES)
    assert whole.shape == (3, 16)
    torch.testing.assert_close(whole.norm(dim=-1), torch.ones(3))
    torch.testing.assert_close(learner(clip, NAMES, chunk=1), whole)
    embeddings, end = learner.assemble(clip, NAMES, length=77)
    torch.testing.assert_close(F.normalize(clip.encode_embeddings(embeddings, end), dim=-1), whole)
    assert learner(clip, []).shape == (0, 16)


@torch.no_grad()
def test_the_task_matters(clip: CLIP) -> None:
    learner = PromptLearner(clip.text_width, prefix=2, task=2)
    usual, named = learner(clip, NAMES), learner(clip, NAMES, "semantic segmentation.")
    assert torch.equal(usual, named)
    assert not torch.allclose(usual, learner(clip, NAMES, "instance segmentation."))
    with pytest.raises(LexisegError, match="no task part"):
        PromptLearner(clip.text_width)(clip, NAMES, "semantic segmentation.")


def test_prompts_learn(clip: CLIP) -> None:
    """Short steps against the gradient lower the loss; only the prompts have one."""
    torch.manual_seed(0)
    frozen = copy.deepcopy(clip).requires_grad_(False)
    learner = PromptLearner(frozen.text_width, prefix=4, suffix=2)
    crops = hide_background(torch.rand(4, 3, 32, 32), torch.ones(4, 32, 32), frozen)
    labels = torch.tensor([0, 1, 2, 0])
    losses = []
    for _ in range(8):
        loss = F.cross_entropy(crop_logits(learner, frozen, crops, NAMES), labels)
        losses.append(float(loss.detach()))
        gradients = torch.autograd.grad(loss, list(learner.parameters()))
        # Prompts start small and the tower normalises them, so a step's length counts, not the gradient's.
        with torch.no_grad():
            for parameter, gradient in zip(learner.parameters(), gradients, strict=True):
                parameter -= 1e-3 * gradient / gradient.norm()
    assert losses[-1] < losses[0]


def test_the_background_takes_the_numbers_of_the_mean(clip: CLIP) -> None:
    mask = torch.zeros(1, 4, 4)
    mask[..., :2] = 1
    found = hide_background(torch.full((1, 3, 4, 4), 0.5), mask, clip)
    for channel in range(3):
        assert found[0, channel, 0, 3].item() == pytest.approx(clip.mean[channel])
        assert found[0, channel, 0, 0].item() == pytest.approx((0.5 - clip.mean[channel]) / clip.std[channel])


def test_mistakes_are_sentences(clip: CLIP) -> None:
    with pytest.raises(LexisegError, match="nothing to learn"):
        PromptLearner(16, prefix=0)
    with pytest.raises(LexisegError, match=r"needs \d+ tokens with its learned prompt"):
        PromptLearner(16, prefix=16)(clip, ["cat", "cat " * 60])
    with pytest.raises(LexisegError, match="does not fit the text tower"):
        PromptLearner(16, prefix=1)(clip, ["cat " * 90])
    other = small_clip(custom_text=True, text_cfg={"no_causal_mask": True, "pool_type": "last"})
    with pytest.raises(LexisegError, match="not CLIP's causal one"):
        PromptLearner(16, prefix=1)(other, ["cat"])


# ---- the cache ----


def test_learned_prompts_are_remembered_by_their_weights(clip: CLIP, tmp_path: Path) -> None:
    learner = PromptLearner(clip.text_width, prefix=2, task=1)
    embedder = TextEmbedder(clip, tmp_path)
    first = embedder.embed_prompted(learner, NAMES)
    assert not first.requires_grad
    assert torch.equal(embedder.embed_prompted(learner, NAMES), first)
    assert embedder.num_forwards == 1
    fresh = TextEmbedder(clip, tmp_path)
    assert torch.equal(fresh.embed_prompted(learner, NAMES), first)
    assert fresh.num_forwards == 0
    # FreeSeg's own cache knows class names only and would answer with the first task's vectors.
    assert not torch.allclose(fresh.embed_prompted(learner, NAMES, "instance segmentation."), first)
    with torch.no_grad():
        next(learner.parameters()).add_(0.5)
    files = set(tmp_path.rglob("*.safetensors"))
    assert not torch.allclose(fresh.embed_prompted(learner, NAMES, disk=False), first)
    assert set(tmp_path.rglob("*.safetensors")) == files


def test_prompts_are_saved_with_the_state(clip: CLIP) -> None:
    learner = PromptLearner(clip.text_width, prefix=2, suffix=1, task=1)
    assert set(learner.state_dict()) == {"prefix_prompt", "suffix_prompt", "task_prompt"}
    again = PromptLearner(clip.text_width, prefix=2, suffix=1, task=1)
    assert again.fingerprint() != learner.fingerprint()
    again.load_state_dict(learner.state_dict())
    assert again.fingerprint() == learner.fingerprint()


def test_synonyms_are_averaged_before_the_norm(clip: CLIP, tmp_path: Path) -> None:
    embedder = TextEmbedder(clip, tmp_path)
    templates = ["a {}.", "the {} in the scene"]
    joined = embedder.embed_joined([["grass", "lawn"], ["sky"]], templates)
    parts = [[embedder.embed([word], [template])[0] for template in templates] for word in ("grass", "lawn", "sky")]
    grass = torch.stack(parts[0] + parts[1]).mean(0)
    torch.testing.assert_close(joined[0], grass / grass.norm())
    torch.testing.assert_close(joined[1], embedder.embed(["sky"], templates)[0])
    forwards = embedder.num_forwards
    embedder.embed_joined([["grass", "lawn"], ["sky"]], templates)
    assert embedder.num_forwards == forwards
    assert not torch.allclose(embedder.embed_joined([["grass"], ["lawn", "sky"]], templates), joined)


def test_the_default_hook_is_the_embedder(clip: CLIP) -> None:
    vocabulary = Vocabulary.parse(["cat", "sky"])
    embedder = TextEmbedder(clip)
    assert torch.equal(DenseCLIP.build(clip).embed_text(embedder, vocabulary), embedder(vocabulary))


def test_template_sets() -> None:
    assert {name: len(templates) for name, templates in TEMPLATE_SETS.items()} == {
        "single": 1,
        "paper": 15,
        "sculpture": 1,
        "in-the-scene": 1,
        "vild": 14,
        "imagenet-select": 8,
        "zegformer": 32,
        "imagenet": 80,
    }
    for templates in TEMPLATE_SETS.values():
        assert len(set(templates)) == len(templates)
        assert all(template.count("{}") == 1 for template in templates)


# ---- offline ----


def test_prompts_learn_offline_from_seen_classes_only(clip: CLIP, tmp_path: Path) -> None:
    dataset = Squares()
    task = PromptTask(copy.deepcopy(clip), PromptLearner(clip.text_width, prefix=2), dataset, batch_size=4, per_class=2)
    assert task.names == ["cat", "dog"]
    assert sorted(rank for _, rank in task.examples) == [0, 0, 1, 1]
    batch = task.batch(3)
    assert batch["images"].shape == (4, 3, 32, 32)
    assert bool(batch["masks"].flatten(1).any(dim=1).all())
    assert all(torch.equal(value, task.batch(3)[key]) for key, value in batch.items())
    losses = task.losses(batch)
    losses["loss"].backward()
    trained = [name for name, parameter in task.model.named_parameters() if parameter.grad is not None]
    assert trained == ["learner.prefix_prompt"]
    assert not task.model.train().clip.training
    task.export(tmp_path)
    assert digest_of(sorted(read_prompts(tmp_path)[0].items())) == task.model.learner.fingerprint()
    with pytest.raises(LexisegError, match="There is no prompts"):
        read_prompts(tmp_path / "nowhere")


def test_a_crop_is_a_part_of_the_box() -> None:
    image = torch.zeros(3, 20, 30, dtype=torch.uint8)
    mask = torch.zeros(20, 30, dtype=torch.bool)
    image[:, 5:9, 10:22], mask[5:9, 10:22] = 200, True
    image[0, :, 10:22] = torch.arange(12, dtype=torch.uint8)
    parts = set()
    for seed in range(5):
        crop, inside = crop_object(image, mask, 8, np.random.default_rng(seed))
        assert bool(inside.all())
        torch.testing.assert_close(crop[1:], torch.full((2, 8, 8), 200 / 255))
        parts.add((round(255 * float(crop[0].min())), round(255 * float(crop[0].max()))))
    assert len(parts) > 2 and all(0 <= left < right <= 11 for left, right in parts)


class Squares:
    """Pictures of one square of a class each; the third class is unseen."""

    vocabulary = Vocabulary.parse([{"name": "cat", "seen": True}, {"name": "dog", "seen": True}, {"name": "sky"}])

    def __len__(self) -> int:
        return 9

    def __getitem__(self, index: int) -> Sample:
        label = torch.full((24, 24), 255)
        label[4:20, 6:15] = index % 3
        return Sample(torch.full((3, 24, 24), 20 * index, dtype=torch.uint8), label, str(index))
