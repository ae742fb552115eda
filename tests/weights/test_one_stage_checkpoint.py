"""Converting checkpoints of the one-stage systems in their authors' layout, and of CLIPs."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from lexiseg.clip.load import load_clip
from lexiseg.clip.model import build_clip
from lexiseg.errors import LexisegError
from lexiseg.models import SYSTEMS, DenseCLIP, SegmentationModel, ZegCLIP
from lexiseg.models.one_stage import OneStageModel
from lexiseg.templates import PAPER_TEMPLATES, SINGLE_TEMPLATE
from lexiseg.weights import convert, load_model, save_model
from lexiseg.weights.filling import authors_key
from lexiseg.weights.one_stage_checkpoint import NAMES
from tests.towers import small_clip, unit_rows


def one_stage(system: str, layers: int = 3, **options: Any) -> OneStageModel:
    """A model as the authors' code would build it, small: heads of 64 channels as in all released models."""
    changes = {
        "embed_dim": 64,
        "quick_gelu": True,
        "vision_cfg": {"image_size": 32, "patch_size": 8, "width": 128, "layers": layers, "head_width": 64},
        "text_cfg": {"context_length": 20, "vocab_size": 300, "width": 64, "heads": 1, "layers": 1},
    }
    model = SYSTEMS[system].build(small_clip(**changes), {"num_prompts": 4, "class_embedding_twice": True, **options})
    assert isinstance(model, OneStageModel)
    return model.eval()


def zegclip(**options: Any) -> ZegCLIP:
    """A small ZegCLIP."""
    return cast(ZegCLIP, one_stage("zegclip", **options))


def authors_state(model: OneStageModel) -> dict[str, Tensor]:
    """The same weights in the authors' layout, with the tensors that take part in no computation."""
    state = {
        str(authors_key(name, model.system)): tensor
        for name, tensor in model.state_dict().items()
        if authors_key(name, model.system)
    }
    heads, spectral = model.heads(), model.system == "spt-seg"
    dim = heads[0].query_proj.out_features
    hidden = int(dim * model.options.ffn_ratio)
    unused: dict[str, tuple[int, ...]] = {}
    cascade = model.system == "cascade-clip"
    for head in range(len(heads)):
        decoder = f"decode_head.{f'cascade_decoders.{head}' if cascade else 'decoder_1'}.layers."
        for index in range(model.options.decoder_layers):
            prefix = f"{decoder}{index}."
            unused |= linear(f"{prefix}self_attn.in_proj_", 3 * dim, dim) | linear(
                f"{prefix}self_attn.out_proj.", dim, dim
            )
            unused |= {f"{prefix}norm1.{part}": (dim,) for part in ("weight", "bias")}
            if spectral:
                unused |= linear(f"{prefix}hlfs.h_proj.", dim // 8, dim // 8)
                for part in ("q", "k", "v", "proj"):
                    unused |= linear(f"{prefix}multihead_attn.{part}.", dim, dim)
        for part in ("hlfs.proj",) if spectral else ("multihead_attn.v", "multihead_attn.proj"):
            unused |= linear(f"{prefix}{part}.", dim, dim)
        unused |= linear(f"{prefix}linear1.", hidden, dim) | linear(f"{prefix}linear2.", dim, hidden)
        unused |= {f"{prefix}norm{index}.{part}": (dim,) for index in (2, 3) for part in ("weight", "bias")}
    unused["decode_head.loss_decode.criterion.empty_weight"] = (16,)
    if spectral:
        unused |= linear("backbone.proj_fre.", 10, 1024)
    if model.prompts is not None and model.prompts.depth == 0:
        width = model.clip.image_tower.width
        unused |= {"backbone.prompt_norm.weight": (width,), "backbone.prompt_norm.bias": (width,)}
    return {**state, **{key: torch.randn(shape) for key, shape in unused.items()}}


def linear(prefix: str, outputs: int, inputs: int) -> dict[str, tuple[int, ...]]:
    """Shapes of a linear layer."""
    return {f"{prefix}weight": (outputs, inputs), f"{prefix}bias": (outputs,)}


def write_checkpoint(path: Path, state: dict[str, Tensor]) -> Path:
    """A file as mmcv writes it."""
    meta = {"epoch": 1, "iter": 20000, "mmcv_version": "1.4.4", "CLASSES": ("aeroplane", "bicycle"), "hook_msgs": {}}
    optimizer = {"state": {0: {"step": 5, "exp_avg": torch.zeros(2)}}, "param_groups": [{"lr": 1e-6, "params": [0]}]}
    torch.save({"meta": meta, "state_dict": state, "optimizer": optimizer}, path)
    return path


def same(a: SegmentationModel, b: SegmentationModel, size: tuple[int, int] = (32, 32)) -> None:
    images, text = torch.randn(1, 3, *size), unit_rows(5, a.clip.embed_dim)
    seen = torch.tensor([True, False, True, True, False])
    with torch.no_grad():
        ours, theirs = (model(images, text, seen=seen).dense(size) for model in (a, b))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"prompt_depth": 1, "decoder_layers": 2, "ffn_ratio": 2.0},
        {"prompt_depth": 0},
        {"prompt_depth": -2, "decoder_layers": 1, "ffn_ratio": 4.0},
        {"backbone": "fixed", "descriptor": False},
    ],
)
def test_convert_the_authors_checkpoint(options: dict[str, Any], tmp_path: Path) -> None:
    model = zegclip(**options)
    state = authors_state(model)
    path = write_checkpoint(tmp_path / "iter_20000.pth", state)
    report = convert(path, tmp_path / "model", class_names=["cat", "sky"])
    assert report.kind == "zegclip"
    assert report.num_tensors == len(state)
    assert set(report.unused) == state.keys() - {authors_key(name, "zegclip") for name in model.state_dict()}
    again = load_model(tmp_path / "model")
    assert isinstance(again, ZegCLIP)
    for key in ("backbone", "num_prompts", "descriptor", "decoder_layers", "class_embedding_twice"):
        if key != "num_prompts" or again.prompts is not None:
            assert getattr(again.options, key) == getattr(model.options, key), key
    assert again.seen_names == ("cat", "sky")
    assert again.default_templates == SINGLE_TEMPLATE
    assert again.options.seen_offset == 0.1
    assert again.window.size == again.options.mask_size == 32
    assert again.mean == pytest.approx((0.485, 0.456, 0.406))
    same(again, model)


def test_what_a_file_does_not_say_can_be_given(tmp_path: Path) -> None:
    model = zegclip(num_prompts=100)
    path = write_checkpoint(tmp_path / "model.pth", {key: value.half() for key, value in authors_state(model).items()})
    report = convert(path, tmp_path / "a", transductive=True, heads=8, dtype=torch.float16)
    again = load_model(tmp_path / "a")
    assert isinstance(again, ZegCLIP)
    assert again.options.seen_offset == 0.0
    assert again.default_templates == PAPER_TEMPLATES
    assert again.clip.architecture["model_cfg"]["vision_cfg"]["head_width"] == 16
    assert next(again.parameters()).dtype == torch.float32
    assert len(report.notes) == 1
    assert len(convert(path, tmp_path / "b", templates=["{}"]).notes) == 2
    assert load_model(tmp_path / "b").default_templates == ("{}",)


@pytest.mark.parametrize(
    ("system", "layers", "options"),
    [
        ("cascade-clip", 7, {"groups": "{1-3},{4-6},{7}"}),
        ("cascade-clip", 4, {"groups": "{2-3},{4}", "backbone": "fixed", "decoder_layers": 2}),
        ("spt-seg", 3, {}),
        ("spt-seg", 3, {"prompt_depth": 1, "decoder_layers": 2, "filter_grid": 3}),
    ],
)
def test_convert_cascade_clip_and_spt(system: str, layers: int, options: dict[str, Any], tmp_path: Path) -> None:
    model = one_stage(system, layers, **options)
    state = authors_state(model)
    report = convert(write_checkpoint(tmp_path / "iter_20000.pth", state), tmp_path / "model", class_names=["cat"])
    assert report.kind == system
    assert set(report.unused) == state.keys() - {authors_key(name, system) for name in model.state_dict()}
    again = load_model(tmp_path / "model")
    assert type(again) is type(model)
    for key in options:
        assert getattr(again.options, key) == getattr(model.options, key), key
    assert not again.window.antialias  # mmcv's resize
    same(again, model)
    del state["decode_head.loss_decode.criterion.empty_weight"]  # its size differs between files, and some lack it
    state["backbone.moon"] = state.pop("backbone.proj")
    with pytest.raises(LexisegError):
        convert(write_checkpoint(tmp_path / "b.pth", state), tmp_path / "out")
    state["backbone.proj"] = state["backbone.moon"]
    with pytest.raises(LexisegError, match=f"looks like {NAMES[system]} but does not fit; left over: backbone.moon"):
        convert(write_checkpoint(tmp_path / "b.pth", state), tmp_path / "out")


def test_the_order_of_the_context_classes_is_pointed_out(tmp_path: Path) -> None:
    model = one_stage("cascade-clip", 2, groups="{1},{2}", num_prompts=35)
    # A group of one block has no weights in the authors' layout, and the files' first groups have more blocks.
    with pytest.raises(LexisegError, match=r"lacks decode_head\.weights_s1"):
        convert(write_checkpoint(tmp_path / "a.pth", authors_state(model)), tmp_path / "out")
    model = one_stage("cascade-clip", 3, groups="{1-2},{3}", num_prompts=35)
    report = convert(write_checkpoint(tmp_path / "b.pth", authors_state(model)), tmp_path / "model")
    assert any("not the papers' ten" in note for note in report.notes)
    assert load_model(report.folder).default_templates == PAPER_TEMPLATES


FULL_SIZE = {
    "embed_dim": 512,
    "quick_gelu": True,
    "vision_cfg": {"image_size": 512, "patch_size": 16, "width": 768, "layers": 12, "head_width": 64},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 512, "heads": 8, "layers": 12},
}


FULL = [("zegclip", 100, 376, 164_907_264), ("cascade-clip", 50, 527, 193_088_774), ("spt-seg", 100, 412, 170_304_266)]


@pytest.mark.slow
@pytest.mark.parametrize(("system", "prompts", "tensors", "parameters"), FULL)
def test_convert_a_full_size_checkpoint(
    system: str, prompts: int, tensors: int, parameters: int, tmp_path: Path
) -> None:
    """The released layouts, and the numbers of tensors and parameters of the released models."""
    options = {"num_prompts": prompts, "class_embedding_twice": True}
    model = SYSTEMS[system].build(build_clip({"model_cfg": FULL_SIZE}), options).eval()
    assert isinstance(model, OneStageModel)
    state = authors_state(model)
    assert len(state) == tensors
    known = {authors_key(name, system) for name in model.state_dict()}
    # The authors count parameters that take part in no computation, which lexiseg leaves out; buffers are none.
    unused = sum(value.numel() for key, value in state.items() if key not in known and "empty_weight" not in key)
    assert model.num_parameters() - 1 + unused == parameters  # but for logit_scale, which their file lacks
    report = convert(write_checkpoint(tmp_path / "coco.pth", state), tmp_path / "model")
    assert report.kind == system
    again = load_model(report.folder)
    assert again.window.size == 512
    assert again.window.stride == 426
    same(again, model, (64, 64))


def test_a_checkpoint_that_does_not_fit_is_refused_with_the_keys(tmp_path: Path) -> None:
    state = authors_state(zegclip())
    del state["decode_head.q_proj.bias"], state["backbone.ln_post.weight"]
    state["decode_head.extra"] = torch.ones(1)
    with pytest.raises(LexisegError) as error:
        convert(write_checkpoint(tmp_path / "a.pth", state), tmp_path / "out")
    sentence = str(error.value)
    assert "missing: backbone.ln_post.weight, decode_head.q_proj.bias" in sentence
    assert "left over: decode_head.extra" in sentence
    assert not (tmp_path / "out").exists()
    state = authors_state(zegclip())
    state["decode_head.q_proj.bias"] = torch.ones(3)
    with pytest.raises(LexisegError, match=r"decode_head.q_proj.bias is \(3,\) instead of \(64,\)"):
        convert(write_checkpoint(tmp_path / "b.pth", state), tmp_path / "out")
    state = {key: value for key, value in authors_state(zegclip()).items() if not key.startswith("text_encoder.")}
    with pytest.raises(LexisegError, match=r"lacks text_encoder\.token_.* text_encoder\.ln_final\.weight, .*; take a"):
        convert(write_checkpoint(tmp_path / "c.pth", state), tmp_path / "out")


def test_all_tensors_that_tell_the_shape_are_listed(tmp_path: Path) -> None:
    state = authors_state(zegclip())
    lost = ("backbone.conv1.weight", "backbone.proj", "text_encoder.ln_final.weight")
    for key in lost:
        del state[key]
    with pytest.raises(LexisegError, match=rf"lacks {', '.join(lost)}; take a complete file"):
        convert(write_checkpoint(tmp_path / "a.pth", state), tmp_path / "out")
    cascade = authors_state(one_stage("cascade-clip", 6, groups="{2-3},{4-5},{6}"))
    del cascade["decode_head.weights_s1"], cascade["backbone.proj"]
    with pytest.raises(LexisegError, match=r"lacks decode_head\.weights_s1, backbone\.proj; take a complete file"):
        convert(write_checkpoint(tmp_path / "b.pth", cascade), tmp_path / "out")
    clip = dict(small_clip().model.state_dict())
    del clip["ln_final.weight"], clip["visual.proj"]
    with pytest.raises(LexisegError, match=r"lacks visual\.proj, ln_final\.weight; take a complete file"):
        convert(write_checkpoint(tmp_path / "c.pth", clip), tmp_path / "out")


@pytest.mark.parametrize("key", ["decode_head.q_projs.0.weight", "backbone.complex_weight"])
def test_a_file_with_hardly_anything_in_it_is_refused(key: str, tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path / "a.pth", {key: torch.ones(1)})
    with pytest.raises(LexisegError, match=r"lacks .*backbone\.proj, .*; take a complete file"):
        convert(path, tmp_path / "out")


def test_files_that_are_no_checkpoints(tmp_path: Path) -> None:
    with pytest.raises(LexisegError, match="There is no file"):
        convert(tmp_path / "nothing.pth", tmp_path / "out")
    for content, sentence in (
        ([1, 2], "holds a list"),
        ({"a": 1}, "holds no tensors"),
        ({"a": torch.ones(1)}, "neither"),
    ):
        torch.save(content, tmp_path / "a.pth")
        with pytest.raises(LexisegError, match=sentence):
            convert(tmp_path / "a.pth", tmp_path / "out")
    folder = save_model(zegclip(), tmp_path / "model")
    for source in (folder, folder / "model.safetensors"):
        with pytest.raises(LexisegError, match=rf"already part of .*model \(zegclip\); give its folder '{folder}'"):
            convert(source, tmp_path / "out")


@pytest.mark.parametrize("openai", [True, False])
def test_convert_a_clip(openai: bool, tmp_path: Path) -> None:
    clip = small_clip(quick_gelu=openai, vision_cfg={"width": 64, "head_width": 64}, text_cfg={"width": 64, "heads": 1})
    state = {f"module.{key}": value for key, value in clip.model.state_dict().items()}
    if openai:
        state = {key.removeprefix("module."): value.half() for key, value in state.items()}
        state |= {
            "input_resolution": torch.tensor(32),
            "context_length": torch.tensor(77),
            "vocab_size": torch.tensor(9),
        }
    torch.save(state if openai else {"state_dict": state, "epoch": 3}, tmp_path / "clip.pt")
    report = convert(tmp_path / "clip.pt", tmp_path / "clip")
    assert report.kind == "clip"
    assert len(report.unused) == (3 if openai else 0)
    again = load_clip(tmp_path / "clip")
    assert again.architecture["model_cfg"]["quick_gelu"] is openai
    images = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        ours, theirs = again.model.encode_image(images), clip.model.encode_image(images)
    torch.testing.assert_close(ours, theirs, rtol=1e-2 if openai else 1e-6, atol=1e-2 if openai else 1e-6)
    assert isinstance(load_model(f"dense-clip/{tmp_path / 'clip'}"), DenseCLIP)
