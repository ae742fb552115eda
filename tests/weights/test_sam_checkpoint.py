"""Segment Anything's own checkpoints: converted to a folder of transformers, tensor for tensor, or refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lexiseg.cli import main
from lexiseg.clip.load import count_parameters
from lexiseg.errors import LexisegError
from lexiseg.weights import convert
from lexiseg.weights.filling import authors_key
from lexiseg.weights.sam_checkpoint import RELEASED
from tests.proposals.test_sam_proposals import sam, tiny_sam


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> tuple[Any, Any]:
    """A SAM as if it were one of the released ones, in which every tensor matters."""
    from transformers import SamModel

    model, processor = tiny_sam()
    config = model.config
    config.mask_decoder_config.num_attention_heads = 8
    config.vision_config.num_hidden_layers = 2
    config.vision_config.global_attn_indexes = [1]
    parts = ("vision_config", "prompt_encoder_config", "mask_decoder_config")
    monkeypatch.setitem(RELEASED, 16, {part: getattr(config, part).to_dict() for part in parts})
    model = SamModel(config)
    for tensor in model.state_dict().values():
        torch.nn.init.normal_(tensor, std=0.5)
    return model.eval(), processor


def authors_state(model: Any) -> dict[str, Tensor]:
    return {str(authors_key(name, "sam")): tensor for name, tensor in model.state_dict().items()}


def test_keys_are_the_authors() -> None:
    for name, key in (
        ("vision_encoder.layers.7.layer_norm2.bias", "image_encoder.blocks.7.norm2.bias"),
        ("vision_encoder.patch_embed.projection.weight", "image_encoder.patch_embed.proj.weight"),
        ("vision_encoder.neck.layer_norm2.weight", "image_encoder.neck.3.weight"),
        ("shared_image_embedding.positional_embedding", "prompt_encoder.pe_layer.positional_encoding_gaussian_matrix"),
        ("prompt_encoder.point_embed.3.weight", "prompt_encoder.point_embeddings.3.weight"),
        ("prompt_encoder.not_a_point_embed.weight", "prompt_encoder.not_a_point_embed.weight"),
        ("prompt_encoder.mask_embed.conv3.bias", "prompt_encoder.mask_downscaling.6.bias"),
        ("mask_decoder.transformer.layers.1.layer_norm4.bias", "mask_decoder.transformer.layers.1.norm4.bias"),
        (
            "mask_decoder.transformer.layer_norm_final_attn.weight",
            "mask_decoder.transformer.norm_final_attn.weight",
        ),
        ("mask_decoder.upscale_layer_norm.bias", "mask_decoder.output_upscaling.1.bias"),
        (
            "mask_decoder.output_hypernetworks_mlps.2.layers.0.weight",
            "mask_decoder.output_hypernetworks_mlps.2.layers.1.weight",
        ),
        ("mask_decoder.iou_prediction_head.proj_out.bias", "mask_decoder.iou_prediction_head.layers.2.bias"),
    ):
        assert authors_key(name, "sam") == key


def test_a_checkpoint_becomes_proposals(
    small: tuple[Any, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, processor = small
    torch.save(authors_state(model), tmp_path / "sam.pth")
    assert main(["convert", str(tmp_path / "sam.pth"), "-o", str(tmp_path / "out"), "--half", "--transductive"]) == 0
    captured = capsys.readouterr()
    assert f"--set model.options.proposals.weights={tmp_path / 'out'}" in captured.out
    for option in ("--half", "--transductive"):
        assert f"{option} has no effect" in captured.err
    generator = sam(weights=str(tmp_path / "out"))
    images = torch.randn(1, 3, 32, 64)
    with pytest.raises(LexisegError, match=r"is a file; run `lexiseg convert .*sam\.pth -o FOLDER`"):
        sam(weights=str(tmp_path / "sam.pth"))(images)
    found, expected = generator(images), sam().use(model, processor)(images)
    assert bool(found.valid.any()) and torch.equal(found.mask_logits, expected.mask_logits)
    again = generator.pipeline.model
    assert {**again.config.vision_config.to_dict(), "dtype": None} == {
        **model.config.vision_config.to_dict(),
        "dtype": None,
    }
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name


@pytest.mark.parametrize(("width", "millions"), [(768, 93.7), (1024, 312.3), (1280, 641.1)])
def test_the_released_sizes(width: int, millions: float) -> None:
    from transformers import SamConfig, SamModel

    with torch.device("meta"):
        model = SamModel(SamConfig(**RELEASED[width]))
    assert round(count_parameters(model) / 1e6, 1) == millions
    assert authors_state(model)["image_encoder.pos_embed"].shape == (1, 64, 64, width)
    heads = model.config.vision_config.num_attention_heads
    assert authors_state(model)["image_encoder.blocks.0.attn.rel_pos_h"].shape == (27, width // heads)


def test_what_does_not_fit_is_listed(small: tuple[Any, Any], tmp_path: Path) -> None:
    state = authors_state(small[0])
    for changes, sentence in (
        ({"image_encoder.pos_embed": None}, r"lacks image_encoder\.pos_embed"),
        (
            {"image_encoder.pos_embed": torch.ones(1, 4, 4, 20)},
            r"of 20 channels; lexiseg knows SAM's own, of 768, 1024",
        ),
        ({"image_encoder.neck.3.bias": None}, r"does not fit; missing: image_encoder\.neck\.3\.bias"),
        ({"mask_decoder.hf_token.weight": torch.ones(1)}, r"left over: mask_decoder\.hf_token\.weight"),
        ({"mask_decoder.iou_token.weight": torch.ones(1, 3)}, r"iou_token\.weight is \(1, 3\) instead of \(1, 16\)"),
    ):
        changed = {key: value for key, value in {**state, **changes}.items() if value is not None}
        torch.save(changed, tmp_path / "sam.pth")
        with pytest.raises(LexisegError, match=sentence):
            convert(tmp_path / "sam.pth", tmp_path / "out")
    assert not (tmp_path / "out").exists()
