"""Folders of models, and their names."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

import lexiseg.clip.model
from lexiseg import renames
from lexiseg.catalog import packaged_clips, packaged_models
from lexiseg.clip.load import load_clip
from lexiseg.clip.model import save_clip
from lexiseg.errors import LexisegError, LexisegWarning
from lexiseg.models import CATSeg, DenseCLIP, ZegCLIP
from lexiseg.weights import convert, list_models, load_model, save_model
from tests.models.test_cat_seg import SMALL as CAT_SEG
from tests.towers import small_clip
from tests.weights.test_one_stage_checkpoint import same, zegclip


def test_a_full_disk_is_a_sentence_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(lexiseg.clip.model, "save_file", full)
    with pytest.raises(LexisegError, match=r"Cannot write '.*model\.safetensors' \(.*No space left on device"):
        save_clip(small_clip(), tmp_path)
    assert not list(tmp_path.iterdir())


def test_packaged_models_were_trained_with_the_packaged_clips() -> None:
    fingerprints = {name: load_clip(name).fingerprint() for name in packaged_clips()}
    for folder in packaged_models().values():
        reference = json.loads((folder / "config.json").read_text())["clip"]
        assert reference["fingerprint"] == fingerprints[reference["name"]]


def test_a_folder_whose_name_is_not_utf8(tmp_path: Path) -> None:
    model = zegclip()
    folder = save_model(model, tmp_path / "caf\udce9")
    same(model.eval(), load_model(folder))
    folder = save_clip(small_clip(), tmp_path / "clip\udce9")
    assert convert(next(folder.glob("*.safetensors")), tmp_path / "again\udce9").kind == "clip"


def test_wrong_folders(tmp_path: Path) -> None:
    with pytest.raises(LexisegError, match=r"has no config.json"):
        load_model(tmp_path)
    folder = save_model(zegclip(), tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())

    def architecture(preprocess_cfg: Any = None, **changes: Any) -> dict[str, Any]:
        model_cfg = {**config["clip"]["architecture"]["model_cfg"], **changes}
        return {"architecture": {"model_cfg": model_cfg, "preprocess_cfg": preprocess_cfg}}

    def changed(**changes: Any) -> Path:
        (folder / "config.json").write_text(json.dumps({**config, **changes}))
        return folder

    for changes, sentence in (
        ({"format": 2}, "has format 2 and this lexiseg reads 1"),
        ({"system": "segnext"}, "of the system 'segnext'.* it has zegclip, dense-clip"),
        ({"options": {**config["options"], "colour": 1}}, "unknown option 'colour'"),
        ({"options": {**config["options"], "num_prompts": 0}}, "wrong value for 'num_prompts'"),
        (
            {"options": {**config["options"], "num_prompts": 5}},
            r"prompts.embeddings is \(1, 4, 128\) instead of \(1, 5",
        ),
        ({"clip": {"name": "clip-nowhere", "fingerprint": "0"}}, "No CLIP is called 'clip-nowhere'"),
        ({"system": ["a"]}, "of the system"),
        *(({"options": value}, "its options must be a mapping") for value in (5, [1])),
        *(({"metadata": value}, "its metadata must be a mapping") for value in ("x", [1])),
        ({"clip": "foo"}, "its clip must be a mapping"),
        ({"clip": {"architecture": 5}}, "open_clip_config.json has it, lacks the key 'model_cfg'"),
        ({"clip": architecture(vision_cfg=5)}, "wrong value for 'model_cfg.vision_cfg'"),
        ({"clip": architecture(embed_dim=[])}, "wrong value for 'model_cfg.embed_dim'"),
        ({"clip": architecture(text_cfg={"tokenizer_kwargs": 5})}, "open_clip cannot build"),
        ({"clip": architecture(preprocess_cfg=5)}, "wrong value for 'preprocess_cfg'"),
        ({"clip": architecture(preprocess_cfg={"mean": [0, 1, None]})}, "wrong value for 'preprocess_cfg.mean.2'"),
        *(
            ({key: value}, f"its {key} must be a list of texts")
            for key in ("seen_names", "templates")
            for value in (5, None, [5], "x")
        ),
    ):
        with pytest.raises(LexisegError, match=sentence):
            load_model(changed(**changes))
    (folder / "config.json").write_text("[]")
    with pytest.raises(LexisegError, match="should hold a mapping"):
        load_model(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(LexisegError, match="not readable JSON"):
        load_model(folder)
    changed()
    long = json.dumps({"head": "a" * 9000}).encode()
    four_bits = json.dumps({"a": {"dtype": "F4", "shape": [2], "data_offsets": [0, 1]}}).encode()
    four_bits = len(four_bits).to_bytes(8, "little") + four_bits + b"0"  # of which PyTorch makes no other numbers
    for content in (b"x", four_bits, len(long).to_bytes(8, "little") + long):
        (folder / "model.safetensors").write_bytes(content)
        with pytest.raises(LexisegError, match="not a readable safetensors file") as caught:
            load_model(folder)
        assert len(str(caught.value)) < 1000
    (folder / "model.safetensors").unlink()
    with pytest.raises(LexisegError, match=r"has no model.safetensors"):
        load_model(folder)
    save_clip(small_clip(), tmp_path / "clip")
    with pytest.raises(LexisegError, match="write 'naclip/' before it"):
        load_model(tmp_path / "clip")


def test_wrong_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lexiseg.catalog.PACKAGED_FOLDER", tmp_path)
    save_model(zegclip(), tmp_path / "zegclip-test")
    (tmp_path / "a.pth").touch()
    for name, sentence in (
        ("zegclip-tset", "did you mean 'zegclip-test'"),
        ("dense-clip", "lacks a tower"),
        ("dense-clip/ViT-B-16/opnai", "known tags: openai"),
        (str(tmp_path / "a.pth"), "run `lexiseg convert"),
        (str(tmp_path / "nowhere"), "No model is called"),
        ("qqqq", "there are zegclip-test"),
    ):
        with pytest.raises(LexisegError, match=sentence):
            load_model(name)


def test_a_packaged_clip_is_named_and_not_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lexiseg.catalog.PACKAGED_FOLDER", tmp_path)
    save_clip(small_clip(), tmp_path / "clip-test", dtype=torch.float16)
    model = ZegCLIP.build(load_clip("clip-test"), {"decoder_heads": 4}).eval()
    model.metadata = {"description": "a test"}
    folder = save_model(model, tmp_path / "zegclip-test")
    assert not any(key.startswith("clip.") for key in load_file(folder / "model.safetensors"))
    same(load_model("zegclip-test"), model)
    assert [(entry.name, entry.system) for entry in list_models()] == [
        ("zegclip-test", "zegclip"),
        ("maskclip/clip-test", "dense-clip"),
        ("naclip/clip-test", "dense-clip"),
    ]
    assert list_models()[0].description == "a test"
    assert isinstance(load_model("dense-clip/clip-test"), DenseCLIP)
    # A tower that training changed goes into the folder.
    with torch.no_grad():
        model.clip.visual.conv1.weight.mul_(1.5)
    save_model(model, tmp_path / "changed")
    assert any(key.startswith("clip.") for key in load_file(tmp_path / "changed" / "model.safetensors"))
    same(load_model(tmp_path / "changed"), model)
    # Another CLIP under the same name is noticed.
    (tmp_path / "own").mkdir()
    own = folder.rename(tmp_path / "own" / "model")
    assert load_model(own).clip.packaged
    save_clip(small_clip(seed=9), tmp_path / "clip-test")
    with pytest.raises(LexisegError, match="another version of 'clip-test'"):
        load_model(own)


def test_of_a_packaged_clip_what_training_changed_is_stored(tmp_path: Path) -> None:
    """CAT-Seg tunes a part of both towers, and splits some of their tensors."""
    model = CATSeg.build(load_clip("clip-world2"), CAT_SEG)
    tuned = "clip.model.visual.transformer.resblocks.3.attn.q_proj_weight"
    with torch.no_grad():
        model.get_parameter(tuned).add_(1)
    state = torch.get_rng_state()
    folder = save_model(model, tmp_path)
    assert torch.equal(torch.get_rng_state(), state)
    assert [name for name in load_file(folder / "model.safetensors") if name.startswith("clip.")] == [tuned]
    again = load_model(folder)
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in again.state_dict().items())


def test_a_model_from_the_hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = zegclip()
    folder = save_model(model, tmp_path / "model")
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda _, name: str(folder / name))
    same(load_model("somebody/zegclip"), model)


def test_half_precision_on_disk(tmp_path: Path) -> None:
    folder = save_model(zegclip(), tmp_path / "model", dtype=torch.float16)
    state = load_file(folder / "model.safetensors")
    assert {value.dtype for value in state.values()} == {torch.float16}
    assert next(load_model(folder).parameters()).dtype == torch.float32
    save_file({**state, "extra": torch.ones(1)}, folder / "model.safetensors")
    with pytest.raises(LexisegError, match="does not fit; left over: extra"):
        load_model(folder)


def test_old_names_are_read_and_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = zegclip()
    folder = save_model(model, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    options = {"prompts": config["options"].pop("num_prompts"), "old": {"a": 1}, "gone": 7, **config["options"]}
    del options["dropout"]
    (folder / "config.json").write_text(json.dumps({**config, "options": options}))
    changes = {"prompts": "num_prompts", "old.a": lambda value: {"dropout": value / 2}, "gone": lambda _: {}}
    monkeypatch.setitem(renames.RENAMED_OPTIONS, "zegclip", {**changes, "old": lambda _: {}})
    with pytest.warns(LexisegWarning, match=r"'prompts' is 'num_prompts'; 'old.a' is 'dropout'; 'gone' is gone"):
        again = load_model(folder)
    assert again.options.dropout == 0.5  # type: ignore[attr-defined]
    same(again, model)


def test_an_option_that_is_gone_is_dropped_at_its_usual_value_alone() -> None:
    options = {"stage": "maft", "crops": {"min_score": 0.0, "merge": "mask"}}
    with pytest.warns(LexisegWarning, match=r"'crops\.min_score' is gone"):
        assert renames.renamed_options("zsseg", options, "it") == {"crops": {"merge": "mask"}}
    with pytest.raises(LexisegError, match=r"'crops\.min_score' is 0\.1, which this release no longer has"):
        renames.renamed_options("zsseg", {"crops": {"min_score": 0.1}}, "it")
    with pytest.raises(LexisegError, match="'regions' is 'pooled', which this release no longer has"):
        renames.renamed_options("zsseg", {"regions": "pooled"}, "it")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert renames.renamed_options("zsseg", {"regions": "crops"}, "it") == {"regions": "crops"}


def test_dense_clip_on_the_packaged_clip_is_the_row_of_the_results() -> None:
    model = load_model("dense-clip/clip-emoji")
    options = model.options.model_dump()
    assert (options["method"], options["short_side"], options["window_size"]) == ("maskclip", 128, None)
