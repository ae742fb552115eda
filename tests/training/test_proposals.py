"""What proposals start from: an ImageNet ResNet; `tests.data.picture_world.test_shapes` has runs of our own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import save_file
from torch import Tensor

from lexiseg.cli import main
from lexiseg.clip.load import shapes_of
from lexiseg.clip.model import save_clip
from lexiseg.errors import LexisegError
from lexiseg.proposals.base import ProposalGenerator
from lexiseg.proposals.options import Mask2FormerOptions, MaskFormerOptions, SamOptions
from lexiseg.recipes import load_recipe
from lexiseg.training.dry_run import dry_run
from lexiseg.training.proposals import IMAGENET_WEIGHTS, describe_start, proposals_start
from lexiseg.training.run import build_task
from lexiseg.training.segmentation import SegmentationTask
from lexiseg.weights import load_model
from tests.recipes.texts import recipe_of as load
from tests.towers import small_clip
from tests.training.runs import quietly, same

SMALL: dict[str, Any] = {
    **{"backbone": "r50", "widths": (4, 4, 8, 8), "stem_width": 8, "num_queries": 5, "hidden_dim": 32},
    **{"pixel_dim": 32, "mask_dim": 32, "heads": 2, "decoder_layers": 2, "ffn_dim": 24, "embed_dim": 16},
}


def make(kind: str, **changes: Any) -> Any:
    torch.manual_seed(1)
    options = MaskFormerOptions if kind == "maskformer" else Mask2FormerOptions
    return options(**{**SMALL, **changes}).build().eval()


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
    tensors, seen = proposals_start(generator, str(path))
    assert {f"backbone.body.{name}" for name in generator.backbone.body.state_dict()} == set(tensors) and not seen
    assert all(torch.equal(state[name.removeprefix("backbone.body.")], tensor) for name, tensor in tensors.items())


def test_a_resnet_file_that_does_not_fit(tmp_path: Path) -> None:
    path = tmp_path / "resnet.safetensors"
    save_file(resnet_state(make("maskformer")), path)
    for changes, sentence in (
        ({"backbone": "r101"}, r"for the backbone 'r101', does not fit; missing: .*layer3\.10.*; change .*\.backbone"),
        ({"backbone": "r50c"}, r"missing: .*conv1\.0\.weight.*; left over: .*conv1\.weight"),
        ({"stem_width": 6}, r"conv1\.weight is \(8, 3, 7, 7\) instead of \(6, .*; change .*proposals\.stem_width"),
        ({"widths": (4, 4, 8, 4)}, r"layer4\.0\.bn1\.bias is .*; change .* or model\.options\.proposals\.widths"),
    ):
        with pytest.raises(LexisegError, match=sentence):
            proposals_start(make("maskformer", **changes), str(path))
    deeper = resnet_state(make("maskformer")) | {"layer3.6.conv1.weight": torch.zeros(1)}
    save_file(deeper, path)
    with pytest.raises(LexisegError, match=r"left over: \S*layer3\.6\.conv1\.weight; change .*\.backbone"):
        proposals_start(make("maskformer"), str(path))
    path.write_bytes(b"nothing")
    with pytest.raises(LexisegError, match="is damaged"):
        proposals_start(make("maskformer"), str(path))
    with pytest.raises(LexisegError, match="There is no file"):
        proposals_start(make("maskformer"), str(tmp_path / "gone.pth"))


class Evil:
    """A pickle that would run something."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (exec, ("raise SystemExit('it ran')",))


def test_a_pickle_that_holds_more_than_tensors_is_not_opened(tmp_path: Path) -> None:
    torch.save({"conv1.weight": Evil()}, tmp_path / "evil.pth")
    with pytest.raises(LexisegError, match=r"holds a \S+\.exec at 'conv1\.weight', which lexiseg does not read"):
        proposals_start(make("maskformer"), str(tmp_path / "evil.pth"))
    for content, what in (([1, 2], "a list"), (7, "an int")):
        torch.save(content, tmp_path / "other.pth")
        with pytest.raises(LexisegError, match=f"holds {what}, not a state dict"):
            proposals_start(make("maskformer"), str(tmp_path / "other.pth"))


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
    theirs = {name: tuple(tensor.shape) for name, tensor in state.items() if not name.startswith("fc.")}
    ours = shapes_of(generator.backbone.body)  # type: ignore[arg-type]
    assert ours == {name: shape for name, shape in theirs.items() if name in ours}
    assert all("num_batches" in name for name in theirs.keys() - ours.keys())


def no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *_: None)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")


def test_a_hub_out_of_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    no_hub(monkeypatch)
    with torch.device("meta"):
        generator = MaskFormerOptions().build()
    with pytest.raises(LexisegError) as error:
        proposals_start(generator, "imagenet")
    said = str(error.value)
    assert "Cannot download 'timm/resnet101s.gluon_in1k'" in said and "cannot be reached" in said and "\n" not in said
    assert "--set proposals_from=PATH" in said and "--set proposals_from=null" in said
    assert describe_start(generator, "imagenet").endswith("(not on this machine yet, to be downloaded)")


@pytest.mark.parametrize("source", ["facebook/maskformer-resnet101-coco-stuff", "nowhere/run"])
def test_a_generator_that_others_trained_is_no_start(source: str, tmp_path: Path) -> None:
    """It has seen masks of the classes that are unseen here."""
    with pytest.raises(LexisegError, match=f"'{source}' is not a lexiseg run or model .* has seen masks of unseen"):
        build_task(load(recipe_file(tmp_path, source)))


def test_generators_without_such_weights() -> None:
    for generator, sentence in (
        (SamOptions().build(), "only a maskformer or mask2former can start from weights"),
        (make("maskformer", backbone="tiny"), "no such weights for the backbone 'tiny'"),
        (make("maskformer"), "no ImageNet weights for a r50 with these widths"),
    ):
        for call in (proposals_start, describe_start):
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


def test_the_key_in_a_recipe(tmp_path: Path) -> None:
    assert load(recipe_file(tmp_path, None)).proposals_from is None
    for source in ("imagenet", "resnet.pth", str(tmp_path)):
        assert load(recipe_file(tmp_path, source)).proposals_from == source
    with pytest.raises(LexisegError, match=r"wrong value for 'proposals_from': 'ImageNet' .* did you mean 'imagenet'"):
        load(recipe_file(tmp_path, "ImageNet"))
    with pytest.raises(LexisegError, match="give 'imagenet', a ResNet's file or the folder of a run"):
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

    whole = load_model(quietly(recipe, tmp_path / "whole")).state_dict()
    quietly(recipe, tmp_path / "halves", stop_after=1)
    assert same(load_model(quietly(recipe, tmp_path / "halves", resume=True)).state_dict(), whole)
    trained = "generator.backbone.body.layer4.0.conv1.weight"
    assert not torch.equal(whole[trained], state["layer4.0.conv1.weight"])
    # A finished model is read without it; a run that goes on wants the weights it began with.
    save_file({name: tensor + 1 for name, tensor in state.items()}, source)
    assert torch.equal(load_model(tmp_path / "whole" / "model").state_dict()[trained], whole[trained])
    with pytest.raises(LexisegError, match=r"Cannot resume .*'proposals' was "):
        quietly(recipe, tmp_path / "halves", resume=True)


def test_dry_run_tries_what_is_there(tmp_path: Path) -> None:
    source = tmp_path / "resnet.safetensors"
    save_file(resnet_state(make("maskformer")), source)
    recipe = load(recipe_file(tmp_path, str(source)))
    there = dry_run(recipe)
    assert dict(there.rows())["proposals from"].startswith(f"{source} (")
    assert there.to_dict()["proposals_from"] == there.proposals_from
    with pytest.raises(LexisegError, match="There is no file"):
        dry_run(recipe.model_copy(update={"proposals_from": "gone.pth"}))
    assert "proposals from" not in dict(dry_run(recipe.model_copy(update={"proposals_from": None})).rows())


def test_at_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = recipe_file(tmp_path, "somebody/maskformer", train={"steps": 0, "batch_size": 1, "lr": 1.0})
    words = ["train", str(recipe), "-o", str(tmp_path / "run")]
    assert main(words) == 2
    told = capsys.readouterr().err
    assert "'somebody/maskformer' is not a lexiseg run or model" in told and "Traceback" not in told
    assert main([*words, "--set", "proposals_from=null"]) == 0
    assert yaml.safe_load((tmp_path / "run" / "recipe.yaml").read_text())["proposals_from"] is None
    # What a training starts from instead brings its proposals.
    assert main([*words[:3], str(tmp_path / "next"), "--initial", str(tmp_path / "run")]) == 0
    assert load_model(tmp_path / "next" / "model").metadata["initial"]["model"] == str(tmp_path / "run")
    assert main([*words, "--initial", str(tmp_path / "run"), "--set", "proposals_from=imagenet"]) == 2
