"""The authors' decoupled checkpoints: recognised, taken apart, and put into our generators, at the published sizes."""

from __future__ import annotations

import ast
import gzip
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lexiseg.clip.load import shapes_of
from lexiseg.errors import LexisegError
from lexiseg.proposals.base import ProposalGenerator
from lexiseg.proposals.options import Mask2FormerOptions, MaskFormerOptions
from lexiseg.weights.decoupled_checkpoints import read_parts
from lexiseg.weights.detectron_checkpoint import (
    generator_source,
    infer_generator_options,
    recognise_detectron,
    used_tensors,
)
from lexiseg.weights.filling import expected_shapes, take_tensors
from tests.proposals.test_proposals import MASKED, SMALL
from tests.references import put_tensors

LAYOUTS = Path(__file__).parents[1] / "golden" / "layouts"
SYSTEMS = ("zsseg", "zegformer", "freeseg", "maft", "deop")
RESNET: dict[str, Any] = {"backbone": "r50c", "widths": (4, 4, 8, 8), "stem_width": 8}


def layout(system: str) -> dict[str, tuple[int, ...]]:
    """Keys and shapes of a published checkpoint."""
    if system == "deop":
        return deop_layout()
    lines = gzip.decompress((LAYOUTS / f"{system}.txt.gz").read_bytes()).decode().splitlines()
    return {key: ast.literal_eval(shape) for key, shape in (line.split(" ", 1) for line in lines)}


def deop_layout() -> dict[str, tuple[int, ...]]:
    """ZSSeg's, with what DeOP adds (one anchor layer); 1020 tensors."""
    shapes = {key: shape for key, shape in layout("zsseg").items() if "pixel_" not in key or "pixel_decoder" in key}
    visual = "clip_adapter.clip_model.visual."
    tables = ["learned_position", *(f"transformer.resblocks.{block}.learned_position" for block in range(1, 6))]
    shapes |= {visual + table: (577, 768) for table in tables}
    shapes["query_embedding.weight"] = (100, 512)
    attention = {"in_proj_weight": (1536, 512), "in_proj_bias": (1536,)}
    out = {"out_proj.weight": (512, 512), "out_proj.bias": (512,)}
    layer = "decoder.layers.0."
    for name in ("self_attn", "multihead_attn_my"):
        shapes |= {f"{layer}{name}.{key}": shape for key, shape in (attention | out).items()}
    shapes |= {layer + "linear1.weight": (1024, 512), layer + "linear1.bias": (1024,)}
    shapes |= {layer + "linear2.weight": (512, 1024), layer + "linear2.bias": (512,)}
    shapes |= {f"decoder.outlayer.self_attn.{key}": shape for key, shape in (attention | out).items()}
    shapes |= {f"decoder.outlayer.multihead_attn_my.{key}": shape for key, shape in attention.items()}
    norms = [f"{layer}norm{index}" for index in (1, 2, 3)] + ["decoder.outlayer.norm1", "decoder.norm"]
    return shapes | {f"{norm}.{kind}": (512,) for norm in norms for kind in ("weight", "bias")}


def on_meta(system: str) -> dict[str, Tensor]:
    return {key: torch.empty(shape, device="meta") for key, shape in layout(system).items()}


def of_generator(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A file's tensors of the generator, in the newest layout."""
    used, _ = used_tensors(state, "zsseg", "the checkpoint")
    apart = (".clip_model.", ".bg_feature", "predictor.logit_scale")
    return {
        k: v for k, v in used.items() if k.startswith(("backbone.", "sem_seg_head.")) and not any(a in k for a in apart)
    }


def rebuild(state: dict[str, Tensor], heads: int | None = None, name: str = "the checkpoint") -> ProposalGenerator:
    """The generator of a checkpoint, as the readers of whole models make it."""
    tensors = of_generator(state)
    options = infer_generator_options(tensors, heads=heads)
    generator, source = options.build(), generator_source(options)
    generator.load_state_dict(take_tensors(shapes_of(generator), source, tensors, f"The generator of {name}"))
    return generator


def authors_state(generator: ProposalGenerator) -> dict[str, Tensor]:
    """A generator's tensors as the authors would save them."""
    return put_tensors(generator.state_dict(), generator_source(generator.options))  # type: ignore[arg-type]


def make(kind: str, **changes: Any) -> ProposalGenerator:
    torch.manual_seed(1)
    if kind == "mask2former":
        generator = Mask2FormerOptions(**{**SMALL, **MASKED, **RESNET, **changes}).build()
    else:
        generator = MaskFormerOptions(**{**SMALL, **RESNET, **changes}).build()
    state = {name: torch.rand_like(tensor) for name, tensor in generator.state_dict().items()}
    generator.load_state_dict(state)
    return generator


def whole_file(generator: ProposalGenerator) -> dict[str, Tensor]:
    """The generator and the least that a file of ZSSeg's has beside it."""
    return {**authors_state(generator), "clip_adapter.non_object_embedding": torch.rand(1, 12)}


@pytest.mark.parametrize("system", SYSTEMS)
def test_published_layouts_fit(system: str) -> None:
    state = on_meta(system)
    assert len(state) == {"deop": 1020, "zsseg": 987, "zegformer": 969, "freeseg": 1167, "maft": 1465}[system]
    assert recognise_detectron(state) == system
    tensors = of_generator(state)
    options = infer_generator_options(tensors)
    with torch.device("meta"):
        generator = options.build()
    wanted = expected_shapes(shapes_of(generator), generator_source(generator.options))  # type: ignore[arg-type]
    assert wanted == {key: tuple(value.shape) for key, value in tensors.items()}
    assert options.num_queries == 100 and options.embed_dim == 512 and options.hidden_dim == 256
    if system in ("freeseg", "maft"):
        expected: MaskFormerOptions | Mask2FormerOptions = Mask2FormerOptions(interaction_heads=8, encoder_heads=8)
        expected = expected.model_copy(update={"text_dim": 512})
    elif system == "zegformer":
        expected = MaskFormerOptions(backbone="r101", class_head="linear")
    else:
        expected = MaskFormerOptions()
    usual = {"widths": (64, 128, 256, 512), "stem_width": 64 if system == "zegformer" else 128}
    assert options == expected.model_copy(update=usual)


def test_a_second_adapter() -> None:
    """Its prompts count, its CLIP must be the first one's."""
    state = {key: torch.zeros(()).expand(shape) for key, shape in layout("zsseg").items()}
    first = {key: value for key, value in state.items() if key.startswith("clip_adapter.")}
    second = {f"_region_{key}": value for key, value in first.items()}
    prompt = "clip_adapter.prompt_learner.prefix_prompt"
    used, unused = used_tensors({**state, **second, f"_region_{prompt}": torch.ones(3, 4)}, "zsseg", "it")
    assert used[prompt].shape == (3, 4) and prompt in unused and not any("_region" in key for key in used)
    assert {f"_region_{key}" for key in first if ".clip_model." in key or ".pixel_mean" in key} <= set(unused)
    other = "_region_clip_adapter.clip_model.ln_final.bias"
    with pytest.raises(LexisegError, match=r"The two CLIPs in it, .* are not the same"):
        used_tensors({**state, **second, other: torch.ones(512)}, "zsseg", "it")


def test_other_files_are_not_recognised() -> None:
    assert recognise_detectron({"backbone.patch_embed.weight": torch.zeros(1)}) is None
    prompts = ("clip_adapter.prompt_learner.prefix_prompt", "clip_adapter.clip_model.ln_final.weight")
    assert recognise_detectron(dict.fromkeys(prompts, torch.zeros(1))) == "prompts"
    with pytest.raises(LexisegError, match="not a checkpoint of DeOP, ZSSeg, ZegFormer, FreeSeg or MAFT"):
        read_parts({"head.weight": torch.zeros(1)})


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("maskformer", {}),
        ("maskformer", {"backbone": "r50", "stem_width": 6, "class_head": "linear"}),
        ("mask2former", {"encoder_heads": 4}),
        ("mask2former", {"interaction": False, "class_head": "none", "encoder_points": 2, "encoder_heads": 4}),
    ],
)
def test_round_trip(kind: str, changes: dict[str, Any]) -> None:
    generator = make(kind, **changes)
    state = authors_state(generator)
    options = infer_generator_options(state, heads=2, encoder_heads=changes.get("encoder_heads"))
    expected = generator.options.model_dump()  # type: ignore[union-attr]
    unseen = {"frozen_dropout", "dropout", "text_dim"}
    unseen |= {"class_hidden"} if options.class_head != "cosine-mlp" else set()
    unseen |= {"embed_dim"} if options.class_head == "none" else set()
    if not expected.get("interaction", True):
        unseen |= {"interaction_dim", "interaction_heads"}
    assert {key: value for key, value in options.model_dump().items() if key not in unseen} == {
        key: value for key, value in expected.items() if key not in unseen
    }
    found = take_tensors(shapes_of(generator), generator_source(generator.options), state, "it")  # type: ignore[arg-type]
    assert all(torch.equal(found[name], tensor) for name, tensor in generator.state_dict().items())


def test_older_layouts() -> None:
    generator = make("maskformer")
    state = whole_file(generator)
    pixel = "sem_seg_head.pixel_decoder."
    old = {key.replace(pixel, "sem_seg_head."): value for key, value in state.items()}
    doubled = {key.replace(pixel, pixel + "pixel_decoder."): value for key, value in state.items()}
    assert old.keys() != state.keys() != doubled.keys()
    for variant in (state, old, doubled):
        rebuilt = rebuild(variant, heads=2)
        ours = generator.state_dict()
        assert all(torch.equal(tensor, ours[name]) for name, tensor in rebuilt.state_dict().items())


def test_what_does_not_fit_is_listed() -> None:
    state = whole_file(make("maskformer"))
    layer = "sem_seg_head.predictor.transformer.decoder.layers.1."
    missing = {key: value for key, value in state.items() if key != layer + "norm2.bias"}
    with pytest.raises(LexisegError, match=r"of 'x.pth' does not fit; missing: .*layers\.1\.norm2\.bias"):
        rebuild(missing, heads=2, name="'x.pth'")
    extra = {**state, "sem_seg_head.predictor.second_opinion": torch.zeros(1)}
    with pytest.raises(LexisegError, match=r"left over: sem_seg_head\.predictor\.second_opinion"):
        rebuild(extra, heads=2)
    wrong = {**state, layer + "self_attn.in_proj_weight": torch.zeros(45, 16)}
    with pytest.raises(LexisegError, match=r"in_proj_weight is \(45, 16\) instead of \(48, 16\)"):
        rebuild(wrong, heads=2)
    for key, sentence in (
        ("backbone.res2.0.conv1.weight", "lacks backbone.res2.0.conv1.weight"),
        ("backbone.res4.5.conv1.weight", "missing: backbone.res4.5.conv1.weight"),
    ):
        with pytest.raises(LexisegError, match=sentence):
            rebuild({k: v for k, v in state.items() if k != key}, heads=2)
    shallow = {key: value for key, value in state.items() if not key.startswith("backbone.res4.5.")}
    with pytest.raises(LexisegError, match="5 blocks in res4"):
        rebuild(shallow, heads=2)


@pytest.mark.slow
@pytest.mark.parametrize("system", SYSTEMS)
def test_full_size_round_trip(system: str) -> None:
    state: dict[str, Tensor] = {}
    for key, shape in layout(system).items():
        real = key.startswith(("backbone.", "sem_seg_head.")) and ".clip_model." not in key
        state[key] = torch.randn(shape) if real else torch.zeros(()).expand(shape)
    there, tensors = authors_state(rebuild(state)), of_generator(state)
    assert there.keys() == tensors.keys()
    assert all(torch.equal(there[key], tensor) for key, tensor in tensors.items())
