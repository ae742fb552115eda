"""SAM and SAM 2 as generators, with tiny random models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from lexiseg.errors import LexisegError
from lexiseg.proposals.options import SamOptions
from lexiseg.proposals.sam import Sam, without_overlaps


def tiny_sam() -> tuple[Any, Any]:
    from transformers import SamConfig, SamImageProcessor, SamModel

    torch.manual_seed(0)
    vision = {
        "hidden_size": 16,
        "output_channels": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 64,
        "patch_size": 16,
        "mlp_dim": 16,
        "window_size": 2,
        "global_attn_indexes": [0],
        "num_pos_feats": 8,
    }
    prompt = {"hidden_size": 16, "image_size": 64, "patch_size": 16, "mask_input_channels": 4}
    decoder = {
        "hidden_size": 16,
        "mlp_dim": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "iou_head_hidden_dim": 8,
    }
    model = SamModel(SamConfig(vision_config=vision, prompt_encoder_config=prompt, mask_decoder_config=decoder))
    side, low = {"height": 64, "width": 64}, {"height": 16, "width": 16}
    processor = SamImageProcessor(
        size={"longest_edge": 64}, pad_size=side, mask_size={"longest_edge": 16}, mask_pad_size=low
    )
    return model, processor


def sam(**changes: Any) -> Sam:
    options = {"points_per_side": 2, "pred_iou": -10.0, "stability": -1.0, **changes}
    generator = SamOptions(**options).build()
    assert isinstance(generator, Sam)
    return generator


def test_sam_proposes_masks() -> None:
    images = torch.randn(2, 3, 32, 64)
    every = sam(nms=1.0, overlaps="all").use(*tiny_sam())
    found = every(images)
    assert found.valid is not None and found.embeddings is None
    assert found.mask_logits.shape == (2, found.valid.shape[1], 8, 16)
    assert found.valid.shape[1] > 1
    assert not list(every.parameters()) and not every.state_dict()
    assert sam(nms=1.0, overlaps="all", max_masks=2).use(*tiny_sam())(images).valid.shape[1] <= 2  # type: ignore[union-attr]
    for option in ("pred_iou", "stability"):
        nothing = sam(**{option: 100.0}).use(*tiny_sam())(images)
        assert nothing.valid is not None and not nothing.valid.any()
        assert bool((nothing.mask_logits < 0).all())
    fewer, apart = (sam(mask_stride=1, **more).use(*tiny_sam())(images) for more in ({"nms": 0.0}, {"nms": 1.0}))
    assert fewer.valid is not None and int(fewer.valid.sum()) < int(found.valid.sum())
    assert int((found.mask_logits > 0).sum(dim=1).max()) > 1 == int((apart.mask_logits > 0).sum(dim=1).max())


def test_sam_from_a_folder(tmp_path: Path) -> None:
    model, processor = tiny_sam()
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    images = torch.randn(1, 3, 32, 32)
    expected = sam().use(model, processor)(images)
    assert torch.equal(sam(weights=str(tmp_path))(images).mask_logits, expected.mask_logits)


def tiny_sam2() -> tuple[Any, Any]:
    from transformers import Sam2Config, Sam2ImageProcessor, Sam2Model

    torch.manual_seed(0)
    trunk = {
        "model_type": "sam2_hiera_det_model",
        "hidden_size": 8,
        "num_attention_heads": 1,
        "image_size": [128, 128],
        "embed_dim_per_stage": [8, 16, 32, 64],
        "blocks_per_stage": [1, 1, 2, 1],
        "num_attention_heads_per_stage": [1, 1, 2, 2],
        "window_size_per_stage": [4, 2, 4, 2],
        "window_positional_embedding_background_size": [4, 4],
        "global_attention_blocks": [3],
    }
    vision = {
        "backbone_config": trunk,
        "backbone_channel_list": [64, 32, 16, 8],
        "backbone_feature_sizes": [[32, 32], [16, 16], [8, 8]],
        "fpn_hidden_size": 16,
    }
    prompt = {"hidden_size": 16, "image_size": 128, "patch_size": 16, "mask_input_channels": 4}
    decoder = {
        "hidden_size": 16,
        "mlp_dim": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "iou_head_hidden_dim": 8,
    }
    model = Sam2Model(Sam2Config(vision_config=vision, prompt_encoder_config=prompt, mask_decoder_config=decoder))
    side, low = {"height": 128, "width": 128}, {"height": 32, "width": 32}
    return model, Sam2ImageProcessor(size=side, mask_size=low)


def test_sam2_from_a_folder(tmp_path: Path) -> None:
    model, processor = tiny_sam2()
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    images = torch.randn(1, 3, 64, 96)
    expected = sam().use(model, processor)(images)
    assert expected.valid is not None and expected.valid.any()
    assert torch.equal(sam(weights=str(tmp_path))(images).mask_logits, expected.mask_logits)


def test_sam_that_cannot_be_had(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    images = torch.randn(1, 3, 32, 32)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(LexisegError, match=r"'nobody/no-such-sam': .* cannot be reached \(HF_HUB_OFFLINE is set\)"):
        sam(weights="nobody/no-such-sam")(images)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)

    def refuse(*given: Any, **named: Any) -> Any:
        raise OSError("no network")

    monkeypatch.setattr("urllib.request.urlopen", refuse)
    with pytest.raises(LexisegError, match=r"cannot be reached \(no network\)"):
        sam(weights="nobody/no-such-sam")(images)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(LexisegError, match="could not be loaded"):
        sam(weights=str(tmp_path))(images)


def test_sam_from_the_local_cache_asks_no_server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for part in tiny_sam():
        part.save_pretrained(tmp_path)
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda _, file: str(tmp_path / file))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert sam(weights="owner/name")(torch.randn(1, 3, 64, 96)).valid is not None


def test_overlaps() -> None:
    masks = torch.zeros(3, 1, 4, dtype=torch.bool)
    masks[0, 0, :3] = True
    masks[1, 0, 1:2] = True
    masks[2, 0, 2:] = True
    assert without_overlaps(masks, "largest").int().squeeze(1).tolist() == [[1, 1, 1, 0], [0] * 4, [0, 0, 0, 1]]
    assert without_overlaps(masks, "smallest").int().squeeze(1).tolist() == [[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 1]]
    assert without_overlaps(masks[:2], "largest").int().squeeze(1).tolist() == [[1, 1, 1, 0], [0] * 4]
    assert torch.equal(without_overlaps(masks, "all"), masks)
