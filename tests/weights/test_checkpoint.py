"""Checkpoints as they lie around: how programs wrap weights, and what a stranger's file may not do."""

from __future__ import annotations

import argparse
import collections
import datetime
import gzip
import pathlib
import pickle
import sys
import types
import warnings
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import CLIPConfig, CLIPModel

from lexiseg.clip.load import load_clip, random_clip
from lexiseg.errors import LexisegError
from lexiseg.weights import ConversionReport, convert
from lexiseg.weights.checkpoint import Checkpoint, read_checkpoint
from lexiseg.weights.clip_state import infer_vit_architecture, is_openai, transformers_source
from lexiseg.weights.filling import key_map
from tests.references import put_tensors
from tests.towers import small_clip

State = dict[str, Tensor]


@pytest.fixture(scope="module")
def clip_state() -> State:
    """A CLIP that can be converted."""
    clip = small_clip(vision_cfg={"width": 64, "head_width": 64, "layers": 2}, text_cfg={"width": 64, "heads": 1})
    return {key: value.clone() for key, value in clip.model.state_dict().items()}


@pytest.fixture
def state() -> State:
    """What is recognised as a CLIP, no more."""
    keys = ("visual.conv1.weight", "token_embedding.weight", "visual.transformer.resblocks.1.ln_1.bias")
    values = {key: torch.randn(2, 3) for key in keys}
    return {**values, "half": torch.ones(2, 2).half(), "row": torch.arange(4)[::2], "one": torch.tensor(2.0)}


def read(content: Any, folder: Path, **given: Any) -> Checkpoint:
    torch.save(content, folder / "x.pt")
    return read_checkpoint(folder / "x.pt", is_openai, **given)


def converted(content: Any, folder: Path, **given: Any) -> ConversionReport:
    torch.save(content, folder / "x.pt")
    return convert(folder / "x.pt", folder / "out", **given)


def same(found: State, state: State) -> bool:
    return found.keys() == state.keys() and all(
        torch.equal(value, found[key]) and value.dtype == found[key].dtype for key, value in state.items()
    )


def prefixed(state: State, prefix: str) -> State:
    return {prefix + key: value for key, value in state.items()}


def test_wrappings(state: State, tmp_path: Path) -> None:
    optimizer = {"state": {0: {"exp_avg": torch.zeros(3)}}, "param_groups": [{"lr": 0.1}]}
    beside = {
        "meta": {"best": np.float64(0.5), "count": np.int32(7), "curve": np.ones((2, 3)), "flag": np.bool_(True)},
        "args": argparse.Namespace(lr=1, out=pathlib.PurePosixPath("a"), at=pathlib.PureWindowsPath("b")),
        "counts": collections.Counter("aab"),
        "history": collections.defaultdict(list, {"loss": [np.float32(1)]}),
        "when": datetime.datetime(2024, 1, 2),
        "types": [torch.Size([1]), torch.float16, torch.device("cpu"), np.float32, {1, 2}, 3 + 4j, b"x"],
        "optimizer": optimizer,
    }
    wrapped = [
        {key: {**beside, key: state}[key] if key == wrap else value for key, value in {wrap: state, **beside}.items()}
        for wrap in ("state_dict", "model", "model_state_dict", "net", "teacher", "whatever")
    ]
    wrapped += [
        {"state_dict": {**prefixed(state, "model."), "criterion.weight": torch.ones(3)}, **beside},
        {"model": collections.OrderedDict(prefixed(state, "module."))},
        {"model": {"state_dict": prefixed(state, "net.module._orig_mod.")}},
        prefixed(state, "_orig_mod.module.model."),
        prefixed(state, "backbone.clip."),
        prefixed(state, "my.own_clip."),
        {key.replace("visual.", "visual._orig_mod.", 1): value for key, value in state.items()},
        {"model": {key: value.numpy() for key, value in state.items()}},
        {
            "model": {
                key: torch.nn.Parameter(value, requires_grad=value.is_floating_point()) for key, value in state.items()
            }
        },
    ]
    for content in wrapped:
        assert same(read(content, tmp_path).state, state)
    assert any("keys do not begin with 'model.'." in note for note in read(wrapped[6], tmp_path).notes)
    for protocol, old in ((2, False), (4, False), (2, True)):
        path = tmp_path / "y.ckpt"
        torch.save(wrapped[0], path, pickle_protocol=protocol, _use_new_zipfile_serialization=not old)
        assert same(read_checkpoint(path, is_openai).state, state)


def test_pickles_of_arrays_and_torchscript(state: State, clip_state: State, tmp_path: Path) -> None:
    arrays = {key: value.numpy() for key, value in state.items()}
    content = {"model": arrays, "__author__": "third_party", "matching_heuristics": True}
    for protocol in (0, 2, 4, 5):
        (tmp_path / "x.pkl").write_bytes(pickle.dumps(content, protocol=protocol))
        assert same(read_checkpoint(tmp_path / "x.pkl", is_openai).state, state)
    clip = small_clip(vision_cfg={"width": 64, "head_width": 64, "layers": 2}, text_cfg={"width": 64, "heads": 1}).model
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.trace(clip, (torch.zeros(1, 3, 32, 32), torch.zeros(1, 77).long())), tmp_path / "x.pt")
    convert(tmp_path / "x.pt", tmp_path / "out")
    assert same(load_clip(tmp_path / "out").model.state_dict(), clip_state)
    state["row"] = state["row"].contiguous()
    save_file(prefixed(state, "module."), tmp_path / "z.pth")  # whatever its ending
    assert same(read_checkpoint(tmp_path / "z.pth", is_openai).state, state)


def test_a_moving_average_is_announced_and_chosen(state: State, clip_state: State, tmp_path: Path) -> None:
    plain = {key: value * 2 for key, value in state.items()}
    both: list[Any] = [
        {"state_dict": plain, "state_dict_ema": state},
        {"model": plain, "ema": {"module": state}},
        {"model": plain, "ema_state": state},  # of Detectron2's hook
        {"net_g": plain, "net_g_ema": state},
        {"state_dict": plain, "swa_model": {"module": state}},
        {**prefixed(plain, "model."), **prefixed(state, "ema_model.module.")},
        {"state_dict": {**prefixed(plain, "student."), **prefixed(state, "teacher.")}},
        {"state_dict": plain | {f"ema_{key.replace('.', '_')}": value for key, value in state.items()}},  # of mmcv's
    ]
    for content in both:
        for ema, expected in ((None, plain), (False, plain), (True, state)):
            found = read(content, tmp_path, ema=ema)
            assert same(found.state, expected)
            assert any("moving average (EMA)" in note for note in found.notes)
    zero = {key: value * 0 for key, value in clip_state.items()}
    with pytest.raises(LexisegError, match="or after a broken download; take the file's moving average with --ema"):
        converted({"state_dict": zero, "state_dict_ema": clip_state}, tmp_path)
    assert "the file holds no others" in str(read({"model_ema": state}, tmp_path).notes)
    several = read({"generator": state, "discriminator": plain, "optimizer": {"m": plain}}, tmp_path)
    assert same(several.state, state) and several.notes == ("Left out: what the file holds under 'discriminator'.",)
    for content, ema, sentence in (
        ({"model_ema": state}, False, "holds only a moving average"),
        ({"model": state}, True, "holds no moving average"),
    ):
        with pytest.raises(LexisegError, match=sentence):
            read(content, tmp_path, ema=ema)


def test_transformers_clip_gives_the_same_embeddings(tmp_path: Path) -> None:
    torch.manual_seed(0)
    tower = {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 3}
    for activation, sharded in (("quick_gelu", False), ("gelu", True)):
        tower |= {"projection_dim": 32, "hidden_act": activation}
        config = CLIPConfig(
            text_config=tower, vision_config={**tower, "image_size": 32, "patch_size": 8}, projection_dim=32
        )
        model = CLIPModel(config).eval()
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
        folder = tmp_path / activation
        model.save_pretrained(folder, max_shard_size="1MB" if sharded else "1GB")
        assert (folder / "model.safetensors.index.json").exists() is sharded
        convert(folder, tmp_path / "out")
        clip = load_clip(tmp_path / "out")
        tokens = clip.tokenize(["a cat", "a photo of two dogs"])
        images = torch.rand(2, 3, 32, 32)
        with torch.no_grad():
            theirs = model(input_ids=tokens, pixel_values=images)
            torch.testing.assert_close(clip.model.encode_text(tokens, True), theirs.text_embeds, rtol=0, atol=1e-5)
            torch.testing.assert_close(clip.model.encode_image(images, True), theirs.image_embeds, rtol=0, atol=1e-5)
    back = put_tensors(clip.model.state_dict(), transformers_source)
    assert all(torch.equal(back[key], value) for key, value in model.state_dict().items())
    # Without the configuration nothing but the arguments tells the heads.
    torch.save(model.state_dict(), tmp_path / "alone.pt")
    convert(tmp_path / "alone.pt", tmp_path / "out", heads=3, text_heads=3, quick_gelu=False)
    assert load_clip(tmp_path / "out").architecture == clip.architecture
    (folder / "config.json").write_text('{"vision_config": {"hidden_act": "relu"}}')
    with pytest.raises(LexisegError, match="activations other"):
        convert(folder, tmp_path / "out")
    (tmp_path / "empty").mkdir()
    with pytest.raises(LexisegError, match=r"neither model\.safetensors nor pytorch_model\.bin"):
        convert(tmp_path / "empty", tmp_path / "out")


class Bomb:
    """A pickle that would run code."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path("exploded"),))


def foreign(module: str, name: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    """An object of a class of a library that is not there when the file is read."""
    for part in (module.split(".")[0], module):
        monkeypatch.setitem(sys.modules, part, types.ModuleType(part))
    kind = type(name, (dict,), {"__module__": module})
    setattr(sys.modules[module], name, kind)
    return kind(a=1)


def test_what_is_refused_is_named(
    state: State, clip_state: State, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    node = foreign("yacs.config", "CfgNode", monkeypatch)
    sparse = torch.eye(3).to_sparse()
    for content, sentence in (
        ({"model": state, "meta": Bomb()}, r"holds a .*(getattr|touch) at 'meta' "),
        ({"model": state, "cfg": {"train": [0, node]}}, r"holds a yacs\.config\.CfgNode at 'cfg\.train\.1'"),
        ({"model": state, "args": argparse.Namespace(cfg=node)}, r"CfgNode at 'args\.cfg'"),
        ({"model": state, "a": [node, Bomb()]}, r"CfgNode at 'a\.0' \(and 2 more such objects\)"),
        ({"model": {**state, "x": sparse}}, r"holds a sparse tensor at 'model\.x'"),
        ({**state, "x": torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8)}, "a quantised tensor at 'x'"),
        (
            {**state, "x": torch.ones(2).to(torch.float8_e5m2)},
            "type such as float8 at 'x', .*; get .* in 16 or 32",
        ),
        ({**state, "x": torch.ones(2, dtype=torch.complex64)}, "a complex tensor at 'x', .*; get .* in 16 or 32"),
        ({**state, "x": torch.empty(2, device="meta")}, r"a tensor without values \(meta\) at 'x'"),
        ({**state, "x": torch.nested.nested_tensor([torch.ones(1), torch.ones(2)])}, "nested_tensor at 'x'"),
        ([1, 2], "holds a list"),
        ({"a": 1}, "holds no tensors"),
    ):
        with pytest.raises(LexisegError, match=sentence):
            read(content, tmp_path)
    torch.save({"x": torch.ones(2, dtype=torch.complex64)}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    with pytest.raises(LexisegError, match="a complex tensor at 'x'"):
        convert(tmp_path / "old.pt", tmp_path / "out")
    for content, sentence in (
        ({**clip_state, "ln_final.bias": torch.tensor([float("nan")] * 64)}, r"not finite in ln_final\.bias"),
        ({**clip_state, "visual.proj": clip_state["visual.proj"].to(torch.int8)}, r"proj' in .* is quantised \(int8\)"),
        ({**clip_state, "visual.proj": clip_state["visual.proj"] > 0}, r"proj' in .* is quantised \(bool\)"),
        ({"a": torch.ones(1)}, "neither"),
        ({"\x1b[2J\u202e": torch.ones(1)}, r"begin with \\x1b\[2J\\u202e\)"),
    ):
        with pytest.raises(LexisegError, match=sentence):
            converted(content, tmp_path)
    tiny = {key: value.to(torch.float8_e4m3fn) for key, value in clip_state.items()}
    save_file(tiny, tmp_path / "f8.safetensors")
    with pytest.raises(LexisegError, match=r"is quantised \(float8_e4m3fn\)"):
        convert(tmp_path / "f8.safetensors", tmp_path / "out")
    (tmp_path / "b.pkl").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(LexisegError, match=r"holds a .*(getattr|touch).* which lexiseg does not read"):
        convert(tmp_path / "b.pkl", tmp_path / "out")
    for content in (b"not a checkpoint", b"", b"junk", b"\x80", pickle.dumps({"a": 1})[:-3]):
        (tmp_path / "c.pth").write_bytes(content)
        with pytest.raises(LexisegError, match=r"cannot be read as weights \(it is damaged or not a checkpoint\)"):
            convert(tmp_path / "c.pth", tmp_path / "out")
    with zipfile.ZipFile(tmp_path / "c.zip", "w") as archive:
        archive.write(tmp_path / "x.pt", "x.pt")
    (tmp_path / "c.tar.gz").write_bytes(gzip.compress(b"junk"))
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n"
    for name in ("c.pt", "c.safetensors"):
        (tmp_path / name).write_bytes(pointer)
    for name, sentence in (
        ("zip", "an archive; unpack"),
        ("tar.gz", "an archive"),
        ("pt", "LFS"),
        ("safetensors", "LFS"),
    ):
        with pytest.raises(LexisegError, match=sentence):
            convert(tmp_path / f"c.{name}", tmp_path / "out")
    assert not (tmp_path / "exploded").exists() and not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["ViT-L-14/openai", "ViT-H-14/laion2b_s32b_b79k", "ViT-bigG-14/laion2b_s39b_b160k"])
def test_heads_are_those_of_the_released_towers(name: str) -> None:
    """No shape tells them, and with a wrong number a tower computes something else."""
    with torch.device("meta"):
        clip = random_clip(name)
    found = infer_vit_architecture(clip.model.state_dict(), key_map())["model_cfg"]
    known = clip.architecture["model_cfg"]
    heads = [config["vision_cfg"]["width"] // config["vision_cfg"].get("head_width", 64) for config in (found, known)]
    assert heads[0] == heads[1] and found["text_cfg"]["heads"] == known["text_cfg"]["heads"]


def test_sizes_that_are_not_in_the_file(clip_state: State, tmp_path: Path) -> None:
    """Neither memory nor time follows what a file says of itself."""
    state = clip_state
    torch.save({"model": state}, tmp_path / "x.pt")
    with zipfile.ZipFile(tmp_path / "x.pt") as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    record = next(name for name in records if name.endswith("data.pkl"))
    for change, kind in (
        ({"compress": zipfile.ZIP_DEFLATED}, "cannot be read"),
        ({"pickle": b"\x80\x02r\xff\xff\xff\x7f" + records[record][2:]}, "cannot be read"),  # a huge place in its memo
        ({"pickle": b"\x80\x05\x96" + b"\xff" * 7 + b"\x0f."}, "cannot be read"),  # a huge array of bytes
        ({"pickle": records[record].replace(b"K@", b"K\xff")}, "is damaged|not fit|not a square grid|is not"),
    ):
        with zipfile.ZipFile(tmp_path / "y.pt", "w", change.get("compress", zipfile.ZIP_STORED)) as archive:  # type: ignore[arg-type]
            for name, data in records.items():
                archive.writestr(name, change.get("pickle", data) if name == record else data)
        with pytest.raises(LexisegError, match=kind):
            convert(tmp_path / "y.pt", tmp_path / "out")
    blocks = {key.replace(".resblocks.1.", ".resblocks.999999."): value for key, value in state.items()}
    many = {f"visual.transformer.resblocks.{index}.ln_1.bias": torch.ones(1) for index in range(2, 3000)}
    laughs: Any = {"a": torch.ones(1)}
    for _ in range(40):
        laughs = {str(index): laughs for index in range(20)}
    deep: Any = []
    for _ in range(300):
        deep = [deep]
    shared = torch.zeros(1 << 20)
    wide = {**state, "visual.conv1.weight": torch.ones(10**6, 3, 1, 1)}
    for content, sentence in (
        (blocks, r"has 2 of the tensors visual\.transformer\.resblocks\.0 to .*999999; it is damaged"),
        ({**state, **many}, "of the tensors"),
        ({**state, "visual.proj": torch.tensor(1.0)}, r"visual\.proj in .* has the shape \(\), not 2 sizes"),
        ({**state, "visual.proj": torch.ones(64, 0)}, r"has the shape \(64, 0\)"),
        (wide, "does not fit|do not go"),
        (laughs, "holds no tensors"),
        ({"a": deep}, "holds no tensors"),
        ({f"a{index}": shared[:] for index in range(24)}, "many of its tensors share their values"),
        ({**state, "attn_mask": torch.zeros(1).expand(10**9, 10**9)}, "is damaged"),
    ):
        with pytest.raises(LexisegError, match=sentence):
            converted(content, tmp_path)
    # Keys of tuples in tuples: Python's hash of the first takes all of the stack, of the second an age.
    for tuples in (b")" + b"\x85" * 200_000, b")q\x00" + b"2\x86" * 60):
        (tmp_path / "x.pkl").write_bytes(b"\x80\x02}" + tuples + b"K\x01s.")
        with pytest.raises(LexisegError, match="holds no tensors"):
            convert(tmp_path / "x.pkl", tmp_path / "out")
    with pytest.raises(LexisegError, match="check the path"):
        convert("x" * 5000, tmp_path / "out")
    (tmp_path / "config.json").write_text("[" * 100_000)
    with pytest.raises(LexisegError, match="not readable JSON"):
        converted(state, tmp_path)


def test_a_file_that_only_others_may_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "x.pt").touch()

    def refuse(*_: Any, **__: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(LexisegError, match=r"cannot be read \(Permission denied\); check the path"):
        read_checkpoint(tmp_path / "x.pt", is_openai)
