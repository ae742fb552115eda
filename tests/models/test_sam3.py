"""SAM 3 as an engine, on a small random network of transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

import lexiseg
from lexiseg.errors import LexisegError
from lexiseg.exemplars import Exemplar
from lexiseg.export.exporting import export
from lexiseg.models.sam3 import SAM3, SAM3Towers
from lexiseg.segmenter import Segmenter
from lexiseg.vocabulary import VocabularyClass
from lexiseg.weights import save_model
from lexiseg.weights.auto import auto_order, known_weights
from lexiseg.weights.training_free import load_sam3

WORDS = ["cat", "red car", "sky"]


class Tokenizer:
    """Letters as tokens, between a start and an end mark, in the manner of transformers."""

    def __call__(self, texts: Any, **options: Any) -> Any:
        from transformers import BatchEncoding

        rows = [
            [98, *(ord(letter) % 97 for letter in text), 99] for text in ([texts] if texts == str(texts) else texts)
        ]
        if "return_tensors" not in options:
            return {"input_ids": rows[0]}
        max_length = options["max_length"]
        ids = torch.tensor([row + [0] * (max_length - len(row)) for row in rows])
        given = torch.tensor([[1] * len(row) + [0] * (max_length - len(row)) for row in rows])
        return BatchEncoding({"input_ids": ids, "attention_mask": given})


def network() -> Any:
    from transformers import Sam3Config, Sam3Model

    torch.manual_seed(0)
    width = {"hidden_size": 16, "num_attention_heads": 2}
    layers = {**width, "num_layers": 1, "intermediate_size": 24}
    config = Sam3Config(
        vision_config={
            "backbone_config": {
                **width,
                "model_type": "sam3_vit_model",
                "intermediate_size": 24,
                "num_hidden_layers": 2,
                "image_size": 56,
                "patch_size": 14,
                "window_size": 2,
                "global_attn_indexes": [1],
                "pretrain_image_size": 28,
            },
            "fpn_hidden_size": 16,
            "backbone_feature_sizes": [[16, 16], [8, 8], [4, 4]],
        },
        text_config={
            **width,
            "model_type": "clip_text_model",
            "vocab_size": 100,
            "intermediate_size": 24,
            "projection_dim": 12,
            "num_hidden_layers": 2,
            "max_position_embeddings": 32,
            "eos_token_id": 99,
        },
        geometry_encoder_config=layers,
        detr_encoder_config=layers,
        detr_decoder_config={**layers, "num_queries": 7},
        mask_decoder_config={**width, "num_upsampling_stages": 3},
    )
    model = Sam3Model(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()


@pytest.fixture(scope="module")
def model() -> SAM3:
    return SAM3(SAM3Towers(network(), Tokenizer(), "sam3/small")).eval()


def images(count: int = 2, height: int = 40, width: int = 56) -> Tensor:
    return torch.randn(count, 3, height, width, generator=torch.Generator().manual_seed(3))


def text(model: SAM3, words: list[str] = WORDS) -> Tensor:
    return model.clip.word_tokens(words)  # type: ignore[operator]


@torch.no_grad()
def expected(model: SAM3, pixels: Tensor, **prompt: Any) -> Tensor:
    """A word's map from the library's own forward pass over picture and prompt."""
    found = model.network(pixel_values=pixels, **prompt)
    things = (found.pred_masks.sigmoid() * found.pred_logits.sigmoid()[..., None, None]).amax(1)
    return torch.maximum(things, found.semantic_seg[:, 0].sigmoid()) * found.presence_logits.sigmoid()[..., None]


def square(pixels: Tensor) -> Tensor:
    return F.interpolate(pixels, size=(56, 56), mode="bilinear", antialias=True)


def test_words_are_scored_as_the_library_scores_them_one_by_one(model: SAM3) -> None:
    pixels = images()
    with torch.no_grad():
        scores = model(pixels, text(model))
    assert scores.class_scores.shape == (2, 3, 3) and bool((scores.class_scores[0] == torch.eye(3)).all())
    for place, word in enumerate(WORDS):
        inputs = Tokenizer()([word], padding="max_length", max_length=32, return_tensors="pt")
        maps = torch.cat([expected(model, square(one[None]), **inputs) for one in pixels])
        torch.testing.assert_close(scores.masks[:, place], maps, rtol=1e-4, atol=1e-5)
    assert float(scores.masks.max() - scores.masks.min()) > 0.01


def test_the_image_goes_through_once(model: SAM3, monkeypatch: pytest.MonkeyPatch) -> None:
    passes, forward = [], model.network.vision_encoder.forward
    monkeypatch.setattr(
        model.network.vision_encoder, "forward", lambda *given, **named: passes.append(1) or forward(*given, **named)
    )
    with torch.no_grad():
        model(images(1), text(model, [f"word {index}" for index in range(11)]))
    assert len(passes) == 1


@pytest.mark.parametrize("count", [1, 9, 1000])
def test_any_number_of_words_keeps_the_best_maps(model: SAM3, count: int) -> None:
    model.options = model.options_class(most_words=5, words_at_once=250)
    try:
        words = [f"word {index}" for index in range(count)]
        with torch.no_grad():
            features = model.encode_images(images(1))
            scores = model.score(features, text(model, words))
            every = torch.cat([model.word_maps(features, 0, text(model, words[at : at + 250]))
                               for at in range(0, count, 250)])  # fmt: skip
    finally:
        model.options = model.options_class()
    assert scores.masks.shape[1] == min(count, 5)
    best = every.flatten(1).amax(1).topk(min(count, 5)).indices.sort().values
    assert torch.equal(scores.class_scores[0].argmax(1), best)
    labels = scores.label_map((33, 21))
    assert 0 <= int(labels.min()) <= int(labels.max()) < count
    assert torch.equal(labels, scores.dense((33, 21)).argmax(1))


@pytest.mark.parametrize("size", [(1, 1), (5, 71), (131, 17), (56, 56)])
def test_any_resolution_and_aspect(model: SAM3, size: tuple[int, int]) -> None:
    with torch.no_grad():
        scores = model(images(1, *size), text(model))
    assert scores.label_map(size).shape == (1, *size)


def test_a_box_in_the_picture_itself_is_what_the_library_makes_of_it(model: SAM3) -> None:
    picture = torch.randint(0, 256, (3, 56, 56), dtype=torch.uint8)
    mask = torch.zeros(56, 56, dtype=torch.bool)
    mask[14:42, 7:21] = True
    pixels = (picture[None].float() / 255 - 0.5) / 0.5
    with torch.no_grad():
        found = model.word_maps(model.encode_images(pixels), 0, model.embed_exemplar(picture, mask)[None])
    inputs = Tokenizer()(["visual"], padding="max_length", max_length=32, return_tensors="pt")
    box = torch.tensor([[[14 / 56, 28 / 56, 14 / 56, 28 / 56]]])
    maps = expected(model, pixels, **inputs, input_boxes=box, input_boxes_labels=torch.ones(1, 1, dtype=torch.long))
    torch.testing.assert_close(found, maps, rtol=1e-4, atol=1e-5)


def test_a_segmenter_takes_words_and_exemplars(model: SAM3) -> None:
    segmenter = Segmenter(model, disk_cache=False)
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (45, 60, 3), dtype=np.uint8))
    result = segmenter.predict(picture, ["cat", "red car, lorry", "sky"])
    assert result.label_map.shape == (45, 60) and result.metadata["system"] == "sam3"
    shown = VocabularyClass("mug", exemplars=(Exemplar(picture, box=(5, 5, 30, 30)),), scored=False)
    mixed = segmenter.predict(picture, [shown, VocabularyClass("sky")])
    assert mixed.label_map.shape == (45, 60)
    refined = Segmenter(model, disk_cache=False, refine="edges").predict(picture, WORDS)
    assert refined.label_map.shape == (45, 60)


def test_wrong_words_and_templates_are_sentences(model: SAM3, tmp_path: Path) -> None:
    segmenter = Segmenter(model, disk_cache=False)
    picture = Image.new("RGB", (20, 20))
    with pytest.raises(LexisegError, match="reads at most 32"):
        segmenter.predict(picture, ["x" * 40])
    with pytest.raises(LexisegError, match="SAM 3 takes one template, but 2 were given"):
        Segmenter(model, disk_cache=False, templates=["a {}", "{}s"]).predict(picture, WORDS)
    with pytest.raises(LexisegError, match="no weights of its own to save"):
        save_model(model, tmp_path / "saved")
    assert not (tmp_path / "saved").exists()
    with pytest.raises(LexisegError, match=r"sam3 has no grid of patches .* cannot be exported"):
        export(segmenter, tmp_path / "exported")
    with pytest.raises(LexisegError, match="training-free"):
        model.losses(images(), torch.zeros(2, 40, 56, dtype=torch.long), text(model))


def test_a_folder_is_loaded_and_a_wrong_one_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import transformers

    saved = network()
    saved.save_pretrained(tmp_path / "sam3")
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda *given, **named: Tokenizer())
    loaded = lexiseg.load(f"sam3/{tmp_path / 'sam3'}", device="cpu").model
    assert isinstance(loaded, SAM3)
    state = loaded.network.state_dict()
    assert all(torch.equal(state[key], value) for key, value in saved.state_dict().items())
    config = tmp_path / "sam3" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "model_type": "vit"}))
    with pytest.raises(LexisegError, match="is a vit, not a SAM 3"):
        load_sam3(str(tmp_path / "sam3"))
    weights = tmp_path / "sam3" / "model.safetensors"
    config.write_text(json.dumps({**json.loads(config.read_text()), "model_type": "sam3"}))
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(LexisegError, match=r"cannot be read .* download it again"):
        load_sam3(str(tmp_path / "sam3"))


def test_the_licence_is_said_first_and_auto_never_takes_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*given: Any) -> Path:
        assert "gated and under the SAM License" in capsys.readouterr().err
        raise LexisegError("no network here")

    monkeypatch.setattr("lexiseg.weights.training_free.cached", lambda *given: None)
    monkeypatch.setattr("lexiseg.weights.training_free.download_folder", refuse)
    with pytest.raises(LexisegError, match="no network here"):
        lexiseg.load("sam3")
    assert "facebook/sam3" in {one.name for one in known_weights()}
    assert all(one.best != "sam3" for one in auto_order())
