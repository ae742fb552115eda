"""What proposals start from: models of transformers, whose masks are the same here, and ImageNet ResNets."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lexiseg.cli import main
from lexiseg.clip.model import save_clip
from lexiseg.errors import LexisegError
from lexiseg.proposals.base import ProposalGenerator
from lexiseg.proposals.options import Mask2FormerOptions, MaskFormerOptions, SamOptions
from lexiseg.proposals.pretrained import IMAGENET_WEIGHTS, describe_start, fit_resnet, start_proposals
from lexiseg.recipes import SegmentationRecipe, load_recipe
from lexiseg.training.dry_run import dry_run
from lexiseg.training.run import build_task, train
from lexiseg.training.segmentation import SegmentationTask
from lexiseg.weights import load_model
from tests.towers import small_clip

SMALL: dict[str, Any] = {
    **{"backbone": "r50", "widths": (4, 4, 8, 8), "stem_width": 8, "num_queries": 5, "hidden_dim": 32},
    **{"pixel_dim": 32, "mask_dim": 32, "heads": 2, "decoder_layers": 2, "ffn_dim": 24, "embed_dim": 16},
}
MASKED: dict[str, Any] = {"encoder_layers": 1, "encoder_ffn_dim": 24, "interaction": False}
KINDS = ("maskformer", "mask2former")


def make(kind: str, **changes: Any) -> Any:
    torch.manual_seed(1)
    if kind == "maskformer":
        return MaskFormerOptions(**{**SMALL, **changes}).build().eval()
    return Mask2FormerOptions(**{**SMALL, **MASKED, **changes}).build().eval()


def theirs(kind: str, resnet: dict[str, Any] | None = None, **changes: Any) -> Any:
    """A small model of transformers, every tensor of it random, batch statistics included."""
    from transformers import (
        Mask2FormerConfig,
        Mask2FormerForUniversalSegmentation,
        MaskFormerConfig,
        MaskFormerDetrConfig,
        MaskFormerForInstanceSegmentation,
        ResNetConfig,
    )

    torch.manual_seed(2)
    backbone = ResNetConfig(
        **{
            **{"embedding_size": 8, "hidden_sizes": [16, 16, 32, 32], "depths": [3, 4, 6, 3]},
            **{"out_features": ["stage1", "stage2", "stage3", "stage4"], **(resnet or {})},
        }
    )
    if kind == "maskformer":
        values: dict[str, Any] = {
            **{"num_queries": 5, "d_model": 32, "decoder_layers": 2, "decoder_ffn_dim": 24},
            **{"decoder_attention_heads": 2, "encoder_attention_heads": 2, **changes},
        }
        decoder = MaskFormerDetrConfig(**values)
        model: Any = MaskFormerForInstanceSegmentation(
            MaskFormerConfig(
                backbone_config=backbone, decoder_config=decoder, fpn_feature_size=32, mask_feature_size=32
            )
        )
    else:
        values = {
            **{"feature_size": 32, "mask_feature_size": 32, "hidden_dim": 32, "encoder_feedforward_dim": 24},
            **{"encoder_layers": 1, "decoder_layers": 3, "num_attention_heads": 2, "dim_feedforward": 24},
            **{"num_queries": 5, **changes},
        }
        model = Mask2FormerForUniversalSegmentation(Mask2FormerConfig(backbone_config=backbone, **values))
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if name.endswith("running_var"):
                tensor.uniform_(0.5, 1.5)
            elif "norm" in name.lower() and name.endswith("weight"):
                tensor.uniform_(0.8, 1.2)
            elif tensor.is_floating_point() and tensor.dim() < 2:
                tensor.normal_(std=0.2)
    return model.eval()


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    found = {}
    for kind in KINDS:
        folder = tmp_path_factory.mktemp(kind)
        theirs(kind).save_pretrained(folder)
        found[kind] = str(folder)
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_masks_are_those_of_transformers(kind: str, folders: dict[str, str]) -> None:
    generator, model = make(kind), theirs(kind)
    before = {name: tensor.clone() for name, tensor in generator.state_dict().items()}
    images = torch.randn(2, 3, 64, 96)
    random = torch.get_rng_state()
    names = start_proposals(generator, folders[kind])
    assert torch.equal(random, torch.get_rng_state())
    with torch.no_grad():
        expected = model(images, **({} if kind == "maskformer" else {"output_auxiliary_logits": True}))
        found = generator(images)
    assert found.mask_logits.shape == expected.masks_queries_logits.shape == (2, 5, 16, 24)
    torch.testing.assert_close(found.mask_logits, expected.masks_queries_logits, rtol=1e-5, atol=1e-5)
    # The masks are the pixels' own doing, not the same everywhere.
    assert float(found.mask_logits.std(dim=(2, 3)).min()) > 1e-3
    if kind == "mask2former":
        assert len(found.aux) == len(expected.auxiliary_logits) == 2
        for ours, there in zip(found.aux, expected.auxiliary_logits, strict=True):
            torch.testing.assert_close(ours.mask_logits, there["masks_queries_logits"], rtol=1e-5, atol=1e-5)
    # The class head is ours, and so is what counts nothing; everything else was filled.
    kept = {name for name in before if name not in names}
    assert kept == {name for name in before if name.startswith("class_embed.")}
    assert all(torch.equal(before[name], generator.state_dict()[name]) for name in kept)


def test_the_look_at_the_words_stays_as_it_was(folders: dict[str, str]) -> None:
    generator = make("mask2former", interaction=True, interaction_dim=16, interaction_heads=2)
    names = start_proposals(generator, folders["mask2former"])
    kept = {name.partition(".")[0] for name in generator.state_dict() if name not in names}
    assert kept == {"class_embed", "interaction"}
    words = nn.functional.normalize(torch.randn(4, 16), dim=-1)
    assert torch.isfinite(generator(torch.randn(1, 3, 32, 32), words).mask_logits).all()


@pytest.mark.parametrize(
    ("kind", "changes", "sentence"),
    [
        (
            "maskformer",
            {"num_queries": 7},
            r"'transformer.queries_embedder.weight' is 5 x 32 there and 7 x 32 here; "
            r"set model.options.proposals.num_queries to 5\.",
        ),
        ("maskformer", {"heads": 4}, r"all sizes match; set model.options.proposals.heads to 2\."),
        ("maskformer", {"backbone": "r50c"}, r"there is no 'backbone.body.conv1.0.weight' in it; .*backbone to r50"),
        ("maskformer", {"backbone": "r101"}, r"no 'backbone.body.layer3.6.conv1.weight' in it; set .*backbone to r50"),
        ("maskformer", {"widths": (4, 4, 8, 16)}, r"widths to \[4, 4, 8, 8\]\.$"),
        (
            "maskformer",
            {"decoder_layers": 1},
            r"its 'transformer.decoder.layers.1.* is not expected here; .*_layers to 2",
        ),
        (
            "mask2former",
            {"ffn_dim": 16},
            r"is 24 x 32 there and 16 x 32 here; set model.options.proposals.ffn_dim to 24",
        ),
        ("mask2former", {"encoder_heads": 4}, r"encoder_heads to 2\."),
        ("mask2former", {"encoder_points": 2}, r"sampling_offsets.weight' .*encoder_points to 4"),
        ("mask2former", {"decoder_layers": 10}, r"no 'transformer.decoder.layers.2.* in it; .*decoder_layers to 2"),
    ],
)
def test_what_does_not_fit_names_tensor_and_option(
    kind: str, changes: dict[str, Any], sentence: str, folders: dict[str, str]
) -> None:
    generator = make(kind, **changes)
    before = {name: tensor.clone() for name, tensor in generator.state_dict().items()}
    with pytest.raises(LexisegError, match=sentence) as error:
        start_proposals(generator, folders[kind])
    assert "\n" not in str(error.value)
    assert all(torch.equal(before[name], tensor) for name, tensor in generator.state_dict().items())


def test_another_kind_of_model(tmp_path: Path, folders: dict[str, str]) -> None:
    with pytest.raises(LexisegError, match="is a mask2former, but this generator is a maskformer"):
        start_proposals(make("maskformer"), folders["mask2former"])
    for kind, source, sentence in (
        ("maskformer", tmp_path, "There is no .*config.json"),
        ("maskformer", tmp_path / "nowhere", "There is no folder"),
        ("maskformer", "a/b/c", "There is no folder"),
    ):
        with pytest.raises(LexisegError, match=sentence):
            start_proposals(make(kind), str(source))
    (tmp_path / "config.json").write_text('{"model_type": "zsseg"}')
    with pytest.raises(LexisegError, match=r"not a MaskFormer or Mask2Former of transformers.*name the run's folder"):
        start_proposals(make("maskformer"), str(tmp_path))
    theirs("maskformer", {"downsample_in_bottleneck": True}).save_pretrained(tmp_path / "caffe")
    with pytest.raises(LexisegError, match="has downsample_in_bottleneck True"):
        start_proposals(make("maskformer"), str(tmp_path / "caffe"))
    config = json.loads((Path(folders["maskformer"]) / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "backbone_config": {"model_type": "swin"}}))
    with pytest.raises(LexisegError, match=r"is a .*swin, but only ResNets are supported"):
        start_proposals(make("maskformer"), str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(LexisegError, match="cannot be read"):
        start_proposals(make("maskformer"), str(tmp_path))
    state = load_file(Path(folders["maskformer"]) / "model.safetensors")
    del state["mask_embedder.0.0.weight"]
    save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(LexisegError, match=r"lacks 'mask_embed.0.0.weight'"):
        start_proposals(make("maskformer"), str(tmp_path))


# ---- a ResNet alone


def resnet_state(generator: ProposalGenerator) -> dict[str, Tensor]:
    """A backbone's tensors as timm would save them, other than they are."""
    prefix = "backbone.body."
    torch.manual_seed(3)
    state = {
        name.removeprefix(prefix): tensor + 0.01 * torch.rand_like(tensor)
        for name, tensor in generator.state_dict().items()
        if name.startswith(prefix)
    }
    return state | {"fc.weight": torch.zeros(7, 32), "bn1.num_batches_tracked": torch.tensor(3)}


@pytest.mark.parametrize("backbone", ["r50", "r50c"])
@pytest.mark.parametrize("form", ["safetensors", "pth", "wrapped.pth"])
def test_imagenet_weights_from_a_file(backbone: str, form: str, tmp_path: Path) -> None:
    generator = make("maskformer", backbone=backbone)
    state = resnet_state(generator)
    path = tmp_path / f"resnet.{form}"
    if form == "safetensors":
        save_file(state, path)
    else:
        torch.save({"state_dict": state} if form.startswith("wrapped") else state, path)
    other = {name: tensor.clone() for name, tensor in generator.state_dict().items() if not name.startswith("backbone")}
    names = start_proposals(generator, str(path))
    found = generator.backbone.body.state_dict()
    assert {f"backbone.body.{name}" for name in found} == set(names)
    assert all(torch.equal(state[name], tensor) for name, tensor in found.items())
    assert all(torch.equal(tensor, generator.state_dict()[name]) for name, tensor in other.items())


def test_a_resnet_file_that_does_not_fit(tmp_path: Path) -> None:
    path = tmp_path / "resnet.safetensors"
    save_file(resnet_state(make("maskformer")), path)
    for changes, sentence in (
        ({"backbone": "r101"}, "there is no 'layer3.6.conv1.weight' in it; change model.options.proposals.backbone"),
        ({"backbone": "r50c"}, "there is no 'conv1.0.weight' in it; change model.options.proposals.backbone"),
        ({"stem_width": 6}, "'conv1.weight' is 8 x 3 x 7 x 7 there and 6 x .*; change .*proposals.stem_width"),
        ({"widths": (4, 4, 8, 4)}, "'layer4.0.conv1.weight' is .*; change model.options.proposals.widths"),
    ):
        with pytest.raises(LexisegError, match=sentence):
            start_proposals(make("maskformer", **changes), str(path))
    deeper = resnet_state(make("maskformer")) | {"layer3.6.conv1.weight": torch.zeros(1)}
    save_file(deeper, path)
    with pytest.raises(LexisegError, match=r"its 'layer3.6.conv1.weight' is not expected here; change .*\.backbone"):
        start_proposals(make("maskformer"), str(path))
    path.write_bytes(b"nothing")
    with pytest.raises(LexisegError, match="is damaged"):
        start_proposals(make("maskformer"), str(path))
    with pytest.raises(LexisegError, match="There is no file"):
        start_proposals(make("maskformer"), str(tmp_path / "gone.pth"))


class Evil:
    """A pickle that would run something."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (exec, ("raise SystemExit('it ran')",))


def test_a_pickle_that_holds_more_than_tensors_is_not_opened(tmp_path: Path) -> None:
    torch.save({"conv1.weight": Evil()}, tmp_path / "evil.pth")
    with pytest.raises(LexisegError, match=r"holds more than tensors, so it was not loaded; give a \.safetensors file"):
        start_proposals(make("maskformer"), str(tmp_path / "evil.pth"))
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(LexisegError, match="is not a state dict"):
        start_proposals(make("maskformer"), str(tmp_path / "list.pth"))


@pytest.mark.parametrize("kind", ["r50", "r101", "r50c", "r101c"])
def test_timms_resnets_have_our_names(kind: Any) -> None:
    import timm

    name = IMAGENET_WEIGHTS[kind].removeprefix("timm/")
    config = timm.models.get_pretrained_cfg(name)
    assert config is not None and config.hf_hub_id == IMAGENET_WEIGHTS[kind]
    assert (config.mean, config.std) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    with torch.device("meta"):
        generator = MaskFormerOptions(backbone=kind).build()
        state = timm.create_model(name, pretrained=False).state_dict()
    useful = {
        name: tensor for name, tensor in state.items() if not name.startswith("fc.") and "num_batches" not in name
    }
    fit_resnet(generator, useful, "timm's")  # type: ignore[arg-type]


def no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *_: None)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")


def test_a_hub_out_of_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    no_hub(monkeypatch)
    with torch.device("meta"):
        generator = MaskFormerOptions().build()
    for source, name in (("imagenet", "timm/resnet101s.gluon_in1k"), ("facebook/maskformer", "facebook/maskformer")):
        with pytest.raises(LexisegError) as error:
            start_proposals(generator, source)
        said = str(error.value)
        assert f"Cannot download '{name}'" in said and "cannot be reached" in said and "\n" not in said
        assert "--set proposals_from=PATH" in said and "--set proposals_from=null" in said
        assert describe_start(generator, source).endswith("(not on this machine yet, to be downloaded)")


def test_a_model_in_the_hubs_cache(folders: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    no_hub(monkeypatch)
    folder = Path(folders["maskformer"])
    monkeypatch.setattr(
        "huggingface_hub.try_to_load_from_cache",
        lambda _, name: str(folder / name) if (folder / name).exists() else None,
    )
    first, second = make("maskformer"), make("maskformer")
    assert describe_start(first, "somebody/maskformer") == "somebody/maskformer (in the local cache)"
    assert start_proposals(first, "somebody/maskformer") == start_proposals(second, str(folder))
    assert all(torch.equal(second.state_dict()[name], tensor) for name, tensor in first.state_dict().items())


def test_generators_without_such_weights() -> None:
    for generator, sentence in (
        (SamOptions().build(), "only a maskformer or mask2former can start from weights"),
        (make("maskformer", backbone="tiny"), "no such weights for the backbone 'tiny'"),
        (make("maskformer"), "no ImageNet weights for a r50 with these widths"),
    ):
        for call in (start_proposals, describe_start):
            with pytest.raises(LexisegError, match=sentence):
                call(generator, "imagenet")


# ---- in a recipe


def recipe_file(folder: Path, source: str | None, **changes: Any) -> Path:
    clip = save_clip(small_clip(), folder / "clip")
    proposals = {"kind": "maskformer", **SMALL, "widths": list(SMALL["widths"]), "class_hidden": 16}
    content = {
        "kind": "segmentation",
        "proposals_from": source,
        "model": {"system": "zsseg", "clip": str(clip), "options": {"proposals": proposals}},
        "data": {"source": "picture-world", "size": 32, "length": 2, "val_size": 32, "val_length": 1},
        "train": {"steps": 2, "batch_size": 2, "lr": 1e-3, "workers": 0, "checkpoint_every": 1, "min_lr": 0.0},
        **changes,
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def load(path: Path) -> SegmentationRecipe:
    recipe = load_recipe(path)
    assert isinstance(recipe, SegmentationRecipe)
    return recipe


def test_the_key_in_a_recipe(tmp_path: Path) -> None:
    assert load(recipe_file(tmp_path, None)).proposals_from is None
    for source in ("imagenet", "resnet.pth", "facebook/maskformer-resnet101-coco-stuff", str(tmp_path)):
        assert load(recipe_file(tmp_path, source)).proposals_from == source
    with pytest.raises(LexisegError, match=r"wrong value for 'proposals_from': 'ImageNet' .* did you mean 'imagenet'"):
        load(recipe_file(tmp_path, "ImageNet"))
    with pytest.raises(LexisegError, match="give 'imagenet', a file, a folder or OWNER/NAME on the hub"):
        load(recipe_file(tmp_path, "nonsense"))
    with pytest.raises(LexisegError, match=r"unknown key 'proposals_form'; did you mean 'proposals_from'\?"):
        load(recipe_file(tmp_path, None, proposals_form="imagenet"))
    with pytest.raises(LexisegError, match="contradicts itself: 'initial' brings its proposals"):
        load(recipe_file(tmp_path, "imagenet", initial="runs/one"))
    with pytest.raises(LexisegError, match="but zegclip proposes no regions; remove the key"):
        dry_run(load_recipe("tiny").model_copy(update={"proposals_from": "imagenet"}))


def test_a_training_starts_from_it_and_goes_on_from_its_checkpoint(tmp_path: Path) -> None:
    source = tmp_path / "resnet.safetensors"
    state = resnet_state(make("maskformer"))
    save_file(state, source)
    recipe = load(recipe_file(tmp_path, str(source)))
    started, plain = build_task(recipe), build_task(recipe.model_copy(update={"proposals_from": None}))
    assert isinstance(started, SegmentationTask) and isinstance(plain, SegmentationTask)
    assert started.model.metadata["proposals"]["from"] == str(source) and "proposals" not in plain.model.metadata
    for name, tensor in started.model.state_dict().items():
        short = name.removeprefix("generator.backbone.body.")
        assert torch.equal(tensor, state[short] if short != name else plain.model.state_dict()[name])

    quiet: dict[str, Any] = {"device": "cpu", "tensorboard": False, "progress": False}
    whole = load_model(train(recipe, tmp_path / "whole", **quiet)).state_dict()
    train(recipe, tmp_path / "halves", until=1, **quiet)
    halves = load_model(train(recipe, tmp_path / "halves", resume=True, **quiet)).state_dict()
    assert all(torch.equal(halves[name], tensor) for name, tensor in whole.items())
    trained = "generator.backbone.body.layer4.0.conv1.weight"
    assert not torch.equal(whole[trained], state["layer4.0.conv1.weight"])
    # A finished model is read without it; a run that goes on wants the weights it began with.
    save_file({name: tensor + 1 for name, tensor in state.items()}, source)
    assert torch.equal(load_model(tmp_path / "whole" / "model").state_dict()[trained], whole[trained])
    with pytest.raises(LexisegError, match=r"Cannot resume .*'proposals' was "):
        train(recipe, tmp_path / "halves", resume=True, **quiet)


def test_dry_run_downloads_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folders: dict[str, str]) -> None:
    no_hub(monkeypatch)
    recipe = load(recipe_file(tmp_path, "facebook/maskformer-resnet101-coco-stuff"))
    shown = dict(dry_run(recipe).rows())
    assert shown["proposals from"] == (
        "facebook/maskformer-resnet101-coco-stuff (not on this machine yet, to be downloaded)"
    )
    there = dry_run(recipe.model_copy(update={"proposals_from": folders["maskformer"]}))
    assert dict(there.rows())["proposals from"].startswith(f"{folders['maskformer']} (")
    assert there.to_dict()["proposals_from"] == there.proposals_from
    with pytest.raises(LexisegError, match="There is no file"):
        dry_run(recipe.model_copy(update={"proposals_from": "gone.pth"}))
    assert "proposals from" not in dict(dry_run(recipe.model_copy(update={"proposals_from": None})).rows())


def test_at_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    no_hub(monkeypatch)
    recipe = recipe_file(tmp_path, "somebody/maskformer", train={"steps": 0, "batch_size": 1, "lr": 1.0})
    words = ["train", str(recipe), "-o", str(tmp_path / "run")]
    assert main(words) == 2
    told = capsys.readouterr().err
    assert "Cannot download 'somebody/maskformer'" in told and "Traceback" not in told
    assert main([*words, "--set", "proposals_from=null"]) == 0
    assert yaml.safe_load((tmp_path / "run" / "recipe.yaml").read_text())["proposals_from"] is None
    # What a training starts from instead brings its proposals.
    assert main([*words[:3], str(tmp_path / "next"), "--initial", str(tmp_path / "run")]) == 0
    assert load_model(tmp_path / "next" / "model").metadata["initial"]["model"] == str(tmp_path / "run")
    assert main([*words, "--initial", str(tmp_path / "run"), "--set", "proposals_from=imagenet"]) == 2
