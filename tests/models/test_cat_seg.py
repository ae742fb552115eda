"""CAT-Seg: the one tester, and what is its own."""

from __future__ import annotations

from typing import Any, ClassVar, cast

import pytest
import torch
from torch import Tensor

from lexiseg.errors import LexisegError, LexisegWarning
from lexiseg.models import SYSTEMS, CATSeg, SegmentationModel
from lexiseg.models.cost_aggregation import WindowBlock
from lexiseg.scores import GridScores
from lexiseg.segmenter import Segmenter
from lexiseg.vocabulary import Vocabulary, VocabularyClass
from lexiseg.windows import WindowPolicy
from tests.system_tester import DIM, SystemTester
from tests.towers import small_clip, unit_rows

SMALL: dict[str, Any] = {
    "hidden_dim": 16,
    "heads": 2,
    "attention_window": 3,
    "padding": 8,
    "appearance_dim": 6,
    "text_dim": 5,
    "guidance_dims": [7, 6],
    "decoder_guidance_dims": [4, 3],
    "decoder_dims": [16, 16],
    "layers": 1,
}


def build(**options: Any) -> CATSeg:
    """A small CAT-Seg whose padding tokens say something."""
    torch.manual_seed(1)
    model = cast(CATSeg, CATSeg.build(small_clip(), {**SMALL, **options}).eval())
    for name, parameter in model.named_parameters():
        if "padding_" in name:
            torch.nn.init.normal_(parameter.data)
    return model


class TestCATSeg(SystemTester):
    system = "cat-seg"
    options: ClassVar = SMALL
    classes_interact = True

    def test_fewer_classes_have_other_scores(self, model: SegmentationModel) -> None:
        text, images = unit_rows(9, DIM), self.images()
        together = self.dense(model, images, text)
        assert not torch.allclose(self.dense(model, images, text[:5]), together[:, :5], atol=1e-4)

    def test_what_trains(self, model: SegmentationModel) -> None:
        names = set(model.trainable_names())
        assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} == names
        clip = {name for name in names if name.startswith("clip.")}
        assert all(name.endswith((".q_proj_weight", ".v_proj_weight")) for name in clip)
        assert len(clip) == 2 * (4 + 2)  # blocks of the image tower and of the text tower
        assert {name for name, _ in model.named_parameters() if not name.startswith("clip.")} <= names

    def test_training_lowers_the_loss(self, model: SegmentationModel) -> None:
        images, labels = self.images(), self.labels()
        vocabulary = Vocabulary.parse("cat; sky; grass; road")
        before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}

        def loss() -> Tensor:
            return model.losses(images, labels, model.training_text(vocabulary, unit_rows(4, DIM)))["loss"]

        first = loss().item()
        model.train()
        optimizer = torch.optim.AdamW([parameter for _, parameter in model.trainable_parameters()], lr=3e-3)
        for _ in range(8):
            optimizer.zero_grad()
            loss().backward()
            optimizer.step()
        model.eval()
        assert loss().item() < 0.9 * first
        names = set(model.trainable_names())
        for name, parameter in model.named_parameters():
            assert torch.equal(parameter, before[name]) == (name not in names), name


class TestWithPromptsAndTemplates(SystemTester):
    system = "cat-seg"
    options: ClassVar = {
        **SMALL,
        "finetune": "prompt",
        "prompt_length": 2,
        "prompt_depth": 3,
        "class_attention": "full",
        "padding": 0,
        "resolution": 24,
    }
    classes_interact = True


# ---- many classes ----


@pytest.mark.parametrize("attention", ["linear", "full"])
def test_in_parts_it_says_the_same(attention: str) -> None:
    model, images, text = build(class_attention=attention), torch.randn(2, 3, 56, 72), unit_rows(70, DIM)
    features = model.encode_images(images)
    whole = model.score_grid(features, text).detach()
    with torch.no_grad():
        parts = model.score_grid(features, text)
    torch.testing.assert_close(parts, whole, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("attention", ["linear", "full"])
def test_one_padding_token_stands_for_all_missing_classes(attention: str) -> None:
    """The released code has a copy for each: classes of their own that look like the token say the same."""
    layer = build(class_attention=attention).aggregator.layers[0].attention
    assert isinstance(layer, torch.nn.Module)
    x, guidance = torch.randn(1, 3, 2, 2, 16), torch.randn(1, 3, 5)
    token, its_guidance = layer.padding_tokens.data, layer.padding_guidance.data
    copies = torch.cat([x, token[:, :, None, None].expand(1, 5, 2, 2, 16)], dim=1)
    with torch.no_grad():
        found = layer(x, guidance)
        expected = layer(copies, torch.cat([guidance, its_guidance.expand(1, 5, 5)], dim=1))[:, :3]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_beyond_the_padding_nothing_is_left_out_unless_as_released() -> None:
    exact, released = build(), build(released=True)
    text, images = unit_rows(20, DIM), torch.randn(1, 3, 40, 48)
    with torch.no_grad():
        assert float(exact(images, text).logits.min()) > -100
        with pytest.warns(LexisegWarning, match="scores 8 classes per window and drops the others of 20"):
            scores = released(images, text)
    assert isinstance(scores, GridScores)
    left_out = (scores.logits == -100).flatten(2).all(2)
    assert left_out.sum(1).tolist() == [12]
    kept = (~left_out[0]).nonzero().flatten()
    with torch.no_grad():
        torch.testing.assert_close(scores.logits[:, kept], released(images, text[kept]).logits)


def test_as_released_a_name_ends_at_its_comma() -> None:
    names = (VocabularyClass("building, edifice"), VocabularyClass("sky"))
    for released in (False, True):
        model = build(released=released)
        embedder = Segmenter(model, disk_cache=False).embedder
        text = model.embed_text(embedder, Vocabulary(names, ("a {}",)))
        expected = embedder.embed(["building" if released else "building, edifice", "sky"], ["a {}"])
        assert torch.equal(text, expected)
        torch.testing.assert_close(model.training_text(Vocabulary(names, ("a {}",)), text), text, rtol=1e-4, atol=1e-5)


# ---- windows ----


@pytest.mark.parametrize("grid", [(7, 5), (6, 6), (3, 8), (2, 2), (1, 4), (4, 4)])
@pytest.mark.parametrize("shifted", [False, True])
def test_a_grid_need_not_be_whole_windows(grid: tuple[int, int], shifted: bool) -> None:
    """Places of other windows are not seen: each window alone gives what it gives in the whole."""
    torch.manual_seed(0)
    block = WindowBlock(8, 4, 2, 3, shifted=shifted)
    x, guidance = torch.randn(2, 2, *grid, 8), torch.randn(2, 1, *grid, 4)
    with torch.no_grad():
        found = block(x, guidance)
        side = min(3, *grid)
        shift = side // 2 if shifted and min(grid) > 3 else 0
        edges = [sorted({0, *range(shift, length, side), length}) for length in grid]
        for top, bottom in zip(edges[0], edges[0][1:], strict=False):
            for left, right in zip(edges[1], edges[1][1:], strict=False):
                part = (slice(None), slice(None), slice(top, bottom), slice(left, right))
                alone = WindowBlock(8, 4, 2, max(bottom - top, right - left), shifted=False)
                alone.load_state_dict(block.state_dict())
                torch.testing.assert_close(found[part], _whole(alone, x[part], guidance[part]), rtol=1e-4, atol=1e-5)


def _whole(block: WindowBlock, x: Tensor, guidance: Tensor) -> Tensor:
    """One window over all of x, whatever its aspect: attention among all places."""
    flat, seen = x.flatten(2, 3)[:, :, None], guidance.flatten(2, 3)[:, :, None]
    query, key, value = block.attn(block.norm1(flat), seen)
    parts = [part.unflatten(-1, (block.heads, -1)).transpose(-2, -3) for part in (query, key, value)]
    mixed = torch.nn.functional.scaled_dot_product_attention(*parts).transpose(-2, -3).flatten(-2)
    flat = flat + block.attn.proj(mixed)
    flat = flat + block.mlp["fc2"](torch.nn.functional.gelu(block.mlp["fc1"](block.norm2(flat))))
    return flat[:, :, 0].unflatten(2, x.shape[2:4])


def test_windows_and_the_whole_picture_are_averaged() -> None:
    model = build(window_size=32, window_stride=24, canvas=[56, 80], whole=True, resolution=32)
    picture = torch.randint(0, 256, (3, 50, 90), dtype=torch.uint8)
    segmenter, words = Segmenter(model, disk_cache=False), ["cat", "sky", "road"]
    assert model.window == WindowPolicy(32, 24, canvas=(56, 80), whole=True)
    scores = segmenter.scores(picture, words)
    result = segmenter.predict(picture, words)
    assert torch.equal(result.label_map, scores.dense((50, 90))[0].argmax(0).to(torch.uint8))
    resize = torch.nn.functional.interpolate
    text = model.embed_text(segmenter.embedder, segmenter.vocabulary(words))
    mean, std = (torch.tensor(values).view(3, 1, 1) * 255 for values in (model.mean, model.std))
    canvas = (resize(picture[None].float(), size=(56, 80), mode="bilinear") - mean) / std
    single = (resize(picture[None].float(), size=(32, 32), mode="bilinear") - mean) / std
    total, count = torch.zeros(3, 56, 80), torch.zeros(56, 80)

    def probabilities(images: Tensor) -> Tensor:
        with torch.no_grad():
            logits = model.score_grid(model.encode_images(images), text)
        return resize(logits, size=(32, 32), mode="bilinear").sigmoid()

    for top in (0, 24):
        for left in (0, 24, 48):
            place = (..., slice(top, top + 32), slice(left, left + 32))
            total[place] += probabilities(canvas[place])[0]
            count[place] += 1
    mean_scores = (total / count + resize(probabilities(single), size=(56, 80), mode="bilinear")[0]) / 2
    expected = resize(mean_scores[None], size=(50, 90), mode="bilinear")
    torch.testing.assert_close(scores.dense((50, 90)), expected, rtol=1e-4, atol=1e-5)
    segmenter.set_image(picture)
    assert torch.equal(segmenter.predict(classes=words).label_map, result.label_map)


# ---- text and training ----


def test_templates_stay_apart_as_channels() -> None:
    model = build(templates=2)
    segmenter = Segmenter(model, disk_cache=False)
    vocabulary = Vocabulary.parse("cat; sky", templates=["a {}", "the {} there"])
    text = model.embed_text(segmenter.embedder, vocabulary)
    assert text.shape == (2, 2, DIM)
    torch.testing.assert_close(model.training_text(vocabulary, text), text, rtol=1e-4, atol=1e-5)
    with pytest.raises(LexisegError, match="has 2 templates, but 1 were given"):
        model.embed_text(segmenter.embedder, Vocabulary.parse("cat", templates=["a {}"]))


def test_the_text_of_a_step_is_that_of_prediction_with_gradients() -> None:
    model, vocabulary = build(), Vocabulary.parse("cat; sky, clouds", templates=["a {}", "the {} there"])
    text = model.embed_text(Segmenter(model, disk_cache=False).embedder, vocabulary)
    again = model.training_text(vocabulary, text)
    assert again.requires_grad and text.shape == (3, DIM)
    torch.testing.assert_close(again, text, rtol=1e-4, atol=1e-5)
    assert build(finetune="none").training_text(vocabulary, text) is text


def test_the_loss_is_the_mean_over_pixels_and_classes_with_ignored_pixels() -> None:
    model, text, images = build(finetune="none"), unit_rows(4, DIM), torch.randn(2, 3, 32, 32)
    labels = torch.randint(0, 4, (2, 20, 24))
    labels[0, :5] = 255
    logits = model.score_grid(model.encode_images(images), text)
    logits = torch.nn.functional.interpolate(logits, size=(20, 24), mode="bilinear")
    target = torch.nn.functional.one_hot(labels.clamp(max=4), 5)[..., :4].permute(0, 3, 1, 2).float()
    target *= (labels < 4)[:, None]
    expected = torch.nn.functional.binary_cross_entropy_with_logits(logits, target)
    torch.testing.assert_close(model.losses(images, labels, text)["loss"], expected)
    with pytest.raises(LexisegError, match="no self-training"):
        model.losses(images, labels, text, seen=torch.ones(4, dtype=torch.bool))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"finetune": "prompt"}, "no prompts to tune"),
        ({"guidance_blocks": [1, 4]}, "guidance_blocks .* do not fit an image tower of 4 blocks"),
        ({"heads": 3}, "a hidden_dim of 16 is not a multiple of its 3 heads"),
        ({"decoder_guidance_dims": [16, 3]}, "leaves no room"),
        ({"decoder_dims": [16, 50]}, "does not divide into groups"),
        ({"window_size": 8, "window_stride": 9}, "leaves gaps between windows"),
        ({"whole": True}, "whole .* needs a window_size"),
        ({"resolution": 10**9}, "resolution.*less than or equal to 65536"),
    ],
)
def test_options_that_do_not_fit(options: dict[str, Any], words: str) -> None:
    with pytest.raises(LexisegError, match=words):
        SYSTEMS["cat-seg"].build(small_clip(), {**SMALL, **options})


def test_a_text_tower_that_is_a_part_of_its_own_trains_as_well() -> None:
    clip = small_clip(custom_text=True)
    model = SYSTEMS["cat-seg"].build(clip, SMALL)
    trained = [name for name in model.trainable_names() if name.startswith("clip.model.text.")]
    assert len(trained) == 2 * 2  # query and value in each block
    assert model.training_text(Vocabulary.parse("cat; sky"), unit_rows(2, DIM)).shape == (2, DIM)
