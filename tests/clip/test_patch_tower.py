"""Towers of other libraries, each against its library's own forward pass, with small random weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lexiseg.clip.foreign import ForeignCLIP, load_foreign
from lexiseg.clip.library_towers import TimmTower, TransformersTower
from lexiseg.clip.load import load_clip
from lexiseg.clip.patch_tower import PatchTower
from lexiseg.clip.proxy import Proxy, load_proxy, positions_of
from lexiseg.clip.text import TextEmbedder
from lexiseg.errors import LexisegError
from lexiseg.models import DenseCLIP, ZegCLIP
from lexiseg.segmenter import Segmenter
from lexiseg.weights import load_model, save_model

transformers = pytest.importorskip("transformers")

_VISION = {"hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 4, "image_size": 32, "patch_size": 8}
_TEXT = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48, "vocab_size": 60}
_TEXT |= {"max_position_embeddings": 16, "eos_token_id": 2, "bos_token_id": 0, "pad_token_id": 1}


def make_model(kind: str) -> Any:
    """A dual encoder of a few thousand random weights, none of them zero."""
    torch.manual_seed(3)
    vision: dict[str, Any] = dict(_VISION)
    if kind != "Tipsv2":
        vision["intermediate_size"] = 48
    if kind == "Siglip2":
        del vision["image_size"]
        vision["num_patches"] = 16
    text = {**_TEXT, "projection_size": 24} if kind.startswith("Siglip") else dict(_TEXT)
    more = {"projection_dim": 16} if kind == "MetaClip2" else {}
    config = getattr(transformers, f"{kind}Config")(vision_config=vision, text_config=text, **more)
    model = getattr(transformers, f"{kind}Model")(config).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model


def their_tokens(model: Any, images: Tensor) -> tuple[Tensor, Tensor]:
    """The library's own tokens and pooled output."""
    vision = model.vision_model
    if type(model).__name__ != "Siglip2Model":
        given = {"interpolate_pos_encoding": True} if "Tips" not in type(model).__name__ else {}
        result = vision(images, **given)
        return result.last_hidden_state, result.pooler_output
    height, width = images.shape[-2] // 8, images.shape[-1] // 8
    cut = images.unfold(2, 8, 8).unfold(3, 8, 8).permute(0, 2, 3, 4, 5, 1).reshape(len(images), height * width, -1)
    shapes = torch.tensor([[height, width]] * len(images))
    result = vision(cut, pixel_attention_mask=torch.ones(cut.shape[:2], dtype=torch.long), spatial_shapes=shapes)
    return result.last_hidden_state, result.pooler_output


KINDS = ("MetaClip2", "Siglip", "Siglip2", "Tipsv2")


@pytest.mark.parametrize("size", [(32, 32), (40, 64)])
@pytest.mark.parametrize("kind", KINDS)
def test_tokens_and_embeddings_are_the_librarys(kind: str, size: tuple[int, int]) -> None:
    model = make_model(kind)
    tower = TransformersTower(model)
    images = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        tokens, grid = tower.embed(images)
        ours, _ = tower.run(tokens)
        theirs, pooled = their_tokens(model, images)
        norm = model.vision_model.layernorm if kind == "Tipsv2" else model.vision_model.post_layernorm
        ours_normed = ours if kind == "MetaClip2" else norm(ours)
        torch.testing.assert_close(ours_normed, theirs, rtol=1e-4, atol=1e-5)
        assert grid == (size[0] // 8, size[1] // 8)
        said = tower.project(ours)
        assert said.shape == (2, tower.num_prefix + grid[0] * grid[1], 16 if kind == "MetaClip2" else 24)
        if kind == "MetaClip2":
            torch.testing.assert_close(said[:, 0], model.visual_projection(pooled), rtol=1e-4, atol=1e-5)
        elif kind == "Tipsv2":
            torch.testing.assert_close(said[:, 0], pooled, rtol=1e-4, atol=1e-5)
        else:  # of one token alone the pooling head can attend to nothing else
            alone = model.vision_model.head(theirs[:, 3:4])
            torch.testing.assert_close(said[:, 3], alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("registers", [0, 1])
@pytest.mark.parametrize("size", [(32, 32), (40, 64)])
def test_timms_tokens_are_timms(registers: int, size: tuple[int, int]) -> None:
    from timm.models.vision_transformer import VisionTransformer

    torch.manual_seed(2)
    trunk = VisionTransformer(
        img_size=32, patch_size=8, embed_dim=24, depth=3, num_heads=4, num_classes=0, reg_tokens=registers,
        no_embed_class=bool(registers), init_values=1.0, dynamic_img_size=True,
    ).eval()  # fmt: skip
    for parameter in trunk.parameters():
        nn.init.normal_(parameter, std=0.3)
    tower = TimmTower(trunk)
    images = torch.randn(2, 3, *size)
    with torch.no_grad():
        ours = tower.project(tower.run(tower.embed(images)[0])[0])
        torch.testing.assert_close(ours, trunk.forward_features(images), rtol=1e-4, atol=1e-5)
        proxy = Proxy(trunk)
        features = proxy.features(images)
        grid = (size[0] // 8, size[1] // 8)
        torch.testing.assert_close(features.flatten(2).transpose(1, 2), ours[:, 1 + registers :], rtol=0, atol=0)
        assert features.shape == (2, 24, *grid)
        assert proxy(torch.rand(1, 3, 37, 50)).shape == (1, 24, 5, 6)


def test_the_tokens_of_dinov3_come_from_its_own_forward() -> None:
    from timm.models.eva import Eva

    torch.manual_seed(2)
    model = Eva(
        img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=4, num_classes=0, use_abs_pos_emb=False,
        use_rot_pos_emb=True, dynamic_img_size=True, num_reg_tokens=4,
    ).eval()  # fmt: skip
    with pytest.raises(LexisegError, match="plain vision transformer"):
        TimmTower(model)
    images = torch.randn(1, 3, 40, 48)
    with torch.no_grad():
        expected = model.forward_features(images)[:, -30:].transpose(1, 2).unflatten(2, (5, 6))
    torch.testing.assert_close(Proxy(model).features(images), expected)


def save_folder(kind: str, folder: Path) -> Path:
    """A model folder as transformers writes it, with a tokenizer of whole words."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    model = make_model(kind)
    model.save_pretrained(folder)
    words = ["<s>", "<pad>", "</s>", "<unk>", "a", "photo", "of", "cat", "dog", "sky", "grass"]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    names = ["input_ids", "attention_mask"] if kind in ("Tipsv2", "MetaClip2") else ["input_ids"]
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>",
        model_input_names=names, model_max_length=16,
    ).save_pretrained(folder)  # fmt: skip
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_a_folder_of_transformers_segments(kind: str, tmp_path: Path) -> None:
    folder = save_folder(kind, tmp_path / "tower")
    model = load_model(f"maskclip/transformers:{folder}")
    clip = model.clip
    assert isinstance(clip, ForeignCLIP) and isinstance(clip.patch_tower, PatchTower)
    tokens = clip.tokenize(["a photo of cat", "sky"])
    given = clip.tokenizer(["a photo of cat", "sky"], padding="max_length", max_length=16, return_tensors="pt")
    masked = {"attention_mask": given["attention_mask"]} if "attention_mask" in given else {}
    with torch.no_grad():
        theirs = clip.model.get_text_features(input_ids=given["input_ids"], **masked).pooler_output
        torch.testing.assert_close(clip.encode_text(tokens), theirs, rtol=1e-4, atol=1e-5)
    vectors = TextEmbedder(clip).embed(["cat", "sky", "grass"], ["a photo of {}"])
    assert vectors.shape == (3, clip.embed_dim) and clip.count_tokens("a cat") >= 4
    segmenter = Segmenter(model, disk_cache=False, templates="a photo of {}")
    picture = torch.randint(0, 255, (3, 41, 60), dtype=torch.uint8)
    result = segmenter.predict(picture, ["cat", "sky"])
    assert result.label_map.shape == (41, 60)
    again = load_model(save_model(model, tmp_path / "model"))
    repeated = Segmenter(again, disk_cache=False, templates="a photo of {}").predict(picture, ["cat", "sky"])
    assert torch.equal(repeated.label_map, result.label_map)
    for method in ("sclip", "naclip"):
        other = DenseCLIP.build(clip, {"method": method, "window_size": 32, "window_stride": 16, "short_side": 32})
        assert Segmenter(other, disk_cache=False).predict(picture, ["cat", "sky"]).label_map.shape == (41, 60)


def test_mean_and_deviation_come_from_the_processor(tmp_path: Path) -> None:
    folder = save_folder("Siglip", tmp_path / "tower")
    assert load_clip(f"transformers:{folder}").mean == (0.5, 0.5, 0.5)
    (folder / "preprocessor_config.json").write_text('{"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]}')
    clip = load_clip(f"transformers:{folder}")
    assert (clip.mean, clip.std, clip.image_size) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6), 32)
    assert load_clip(f"transformers:{save_folder('Tipsv2', tmp_path / 'tips')}").std == (1.0, 1.0, 1.0)


def test_what_is_wrong_is_said_in_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save_folder("Siglip", tmp_path / "tower")
    clip = load_clip(f"transformers:{folder}")
    with pytest.raises(LexisegError, match="training-free"):
        ZegCLIP.build(clip)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:3000])
    with pytest.raises(LexisegError, match="cannot be read"):
        load_foreign(f"transformers:{folder}")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "bert"}))
    with pytest.raises(LexisegError, match="is a bert"):
        load_foreign(f"transformers:{folder}")
    monkeypatch.setattr("lexiseg.hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(LexisegError, match="HF_HUB_OFFLINE"):
        load_foreign("transformers:google/tipsv2-b14")
    with pytest.raises(LexisegError, match="HF_HUB_OFFLINE"):
        load_proxy("vit_base_patch8_224.dino")
    with pytest.raises(LexisegError, match=r"no weights .*; name a model with its weights"):
        load_proxy("vit_base_patch8_225.dino")
    with pytest.raises(LexisegError, match="no weights"):
        load_proxy("vit_base_patch8_224.dinosaur")
    with pytest.raises(LexisegError, match="no text tower"):
        load_foreign("timm:vit_base_patch8_224.dino")
    for name, problem in (("naclip", "lacks a tower"), ("proxyclip/ViT-B-16/openai", "second encoder")):
        with pytest.raises(LexisegError, match=problem):
            load_model(name)
    assert positions_of("vit_base_patch8_224.dino") == "bicubic-offset"
    assert positions_of("vit_base_patch14_reg4_dinov2.lvd142m") is None
