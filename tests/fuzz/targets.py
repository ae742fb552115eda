"""What is mutated: pictures, arrays, vocabularies, class lists, data and model folders, recipes and checkpoints."""

from __future__ import annotations

import argparse
import io
import json
import pickle
import random
import shutil
import struct
import tempfile
import zipfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from PIL import Image
from safetensors.torch import save, save_file
from torch import Tensor

from lexiseg.clip.load import load_clip
from lexiseg.clip.model import CLIP, build_clip, save_clip
from lexiseg.images import read_image
from lexiseg.models import SYSTEMS
from lexiseg.recipes import load_recipe, parse_recipe
from lexiseg.recipes.reading import as_yaml
from lexiseg.vocabulary import Vocabulary
from lexiseg.weights import convert, load_model, save_model
from lexiseg.weights.clip_state import transformers_source
from lexiseg.weights.filling import key_map
from tests.fuzz.data_folders import data_folders
from tests.fuzz.mutations import NASTY_NUMBERS, NASTY_TEXTS, nasty, spoil_bytes, spoil_json, spoil_value
from tests.fuzz.runner import CANARY, Maker
from tests.references import put_tensors

Thunk = Callable[[], object]


# ---- pictures ----


@cache
def pictures() -> list[tuple[str, bytes]]:
    rng = np.random.default_rng(0)
    colors = Image.fromarray(rng.integers(0, 255, (12, 17, 3), dtype=np.uint8))
    modes = {mode: colors.convert(mode) for mode in ("RGB", "L", "P", "1", "RGBA", "LA", "CMYK", "YCbCr")}
    modes["I;16"] = Image.fromarray(rng.integers(0, 65535, (9, 7), dtype=np.uint16))
    modes["F"] = Image.fromarray(rng.random((9, 7), dtype=np.float32))
    found = []
    for kind, of in (
        ("png", ("RGB", "L", "P", "1", "RGBA", "LA", "I;16")),
        ("jpeg", ("RGB", "L", "CMYK")),
        ("gif", ("P",)),
        ("bmp", ("RGB", "P", "1")),
        ("tiff", ("RGB", "CMYK", "I;16", "F", "YCbCr")),
        ("webp", ("RGB", "RGBA")),
        ("ppm", ("RGB", "L")),
    ):
        for mode in of:
            file = io.BytesIO()
            exif = Image.Exif()
            exif[0x0112] = 6
            modes[mode].save(file, kind, **({"exif": exif} if kind in ("jpeg", "png", "webp") else {}))
            found.append((f".{kind}", file.getvalue()))
    return found


def image_files(rng: random.Random, folder: Path) -> Thunk:
    suffix, data = rng.choice(pictures())
    data = spoil_bytes(data, rng)
    path = folder / f"picture{rng.choice((suffix, '.png', '.tga', ''))}"
    path.write_bytes(data)
    source: Any = rng.choice((path, str(path), data, io.BytesIO(data)))
    return lambda: read_image(source, max_pixels=4_000_000)


def image_arrays(rng: random.Random, _: Path) -> Thunk:
    shape = tuple(rng.choice((0, 1, 2, 3, 4, 5, 17)) for _ in range(rng.choice((2, 3, 3, 3, 4, 0, 1, 5))))
    if rng.random() < 0.5:
        kinds = ("u1", "i1", "u2", "i4", "i8", "f2", "f4", "f8", "?", "c8", "O", "U3", "M8[s]", "V4")
        array = np.zeros(shape, dtype=rng.choice(kinds))
        if array.dtype.kind in "fiu" and array.size:
            array.flat[0] = rng.choice((0, 1, 100)) if array.dtype.kind != "f" else rng.choice((0, 0.5, 1e30, np.nan))
        value: Any = rng.choice(
            (
                array,
                array[::-1] if shape else array,
                array.T,
                np.ma.array(array),
                array.tolist(),
                memoryview(array.tobytes()),
            )
        )
    else:
        tensor = torch.zeros(
            shape, dtype=rng.choice((torch.uint8, torch.float16, torch.bfloat16, torch.int64, torch.complex64))
        )
        value = rng.choice((tensor, tensor.to("meta"), tensor.to_sparse(), tensor.expand(2, *shape), tensor.bool()))
    if rng.random() < 0.2:
        value = nasty(rng)
    return lambda: read_image(value, max_pixels=4_000_000)


# ---- words ----

CLASSES: dict[str, Any] = {
    "classes": [{"name": "cat", "synonyms": ["kitten"], "color": [1, 2, 3], "id": 4}, "tree, bush", {"name": "sky"}],
    "templates": ["a photo of a {}"],
    "background": "rest, other",
    "ignore": [255],
}


def vocabularies(rng: random.Random, _: Path) -> Thunk:
    texts = ("cat; tree, bush; sky", "cat\ntree, bush\n# no", "0: cat\n1: dog", json.dumps(CLASSES))
    value: Any = rng.choice((*texts, ["cat", "dog"], CLASSES, {"cat": 1, "dog": 2}, {0: "cat", 1: "dog"}))
    if isinstance(value, str):
        value = spoil_bytes(value.encode(), rng).decode(rng.choice(("utf-8", "latin-1")), "surrogateescape")
    else:
        value = spoil_value(value, rng)
    more = {key: nasty(rng) for key in ("templates", "background") if rng.random() < 0.15}
    return lambda: Vocabulary.parse(value, **more)


def class_lists(rng: random.Random, folder: Path) -> Thunk:
    coco = {"categories": [{"id": 1, "name": "cat"}, {"id": 7, "name": "dog", "supercategory": "animal"}]}
    values: list[Any] = [CLASSES, coco, ["cat", "dog"], {"names": {0: "cat", 1: "dog"}, "nc": 2}, {"0": "cat"}]
    lines = ["cat\ndog, hound\n", "0: cat\n11: (ignore)\n", "name,r,g,b\ncat,1,2,3\ndog,4,5,6\n", "1,cat\n2,dog\n"]
    value = rng.choice([*values, *lines])
    suffix = rng.choice((".txt", ".csv", ".json", ".yaml", ".yml", ""))
    if isinstance(value, str):
        data = spoil_bytes(value.encode(), rng)
    elif rng.random() < 0.5:
        data = spoil_json(value, rng)
    else:
        data = spoil_bytes(yaml.safe_dump(value).encode(), rng)
    path = folder / f"classes{suffix}"
    path.write_bytes(data)
    return lambda: Vocabulary.load(path)


# ---- recipes ----


@cache
def recipes() -> list[str]:
    names = ("zegclip-picture-world", "deop-picture-world", "clip-emoji", "proposals-picture-world")
    return [as_yaml(load_recipe(name)) for name in names]


def recipe_files(rng: random.Random, folder: Path) -> Thunk:
    text = rng.choice(recipes())
    if rng.random() < 0.7:
        value = spoil_value(yaml.safe_load(text), rng)
        try:
            text = yaml.safe_dump(value)
        except RecursionError:
            text = "a: " + "[" * 5000
        data = text.encode("utf-8", "surrogatepass")
    else:
        data = spoil_bytes(text.encode(), rng)
    if rng.random() < 0.3:
        text = data.decode("utf-8", "replace")
        return lambda: parse_recipe(text, "the recipe")
    path = folder / "recipe.yaml"
    path.write_bytes(data)
    keys = [
        rng.choice(("train.steps", "model.options", "data", "seed", "x.y.z", "", "=")) for _ in range(rng.randrange(2))
    ]
    overrides = [f"{key}={rng.choice(NASTY_TEXTS)}" for key in keys]
    return lambda: load_recipe(path, overrides)


# ---- models ----


@cache
def small_clip() -> CLIP:
    torch.manual_seed(0)
    return build_clip(
        {
            "model_cfg": {
                "embed_dim": 8,
                "vision_cfg": {"image_size": 16, "patch_size": 8, "width": 64, "head_width": 64, "layers": 2},
                "text_cfg": {"context_length": 77, "vocab_size": 64, "width": 64, "heads": 1, "layers": 1},
            }
        }
    )


def state_of(clip: CLIP) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in clip.model.state_dict().items()}


@cache
def folders() -> Path:
    """Model folders of several systems, small, and a CLIP's."""
    folder = Path(tempfile.mkdtemp(prefix="lexiseg-fuzz-"))
    for system, options in (
        ("zegclip", {"num_prompts": 2, "decoder_heads": 2, "decoder_layers": 1}),
        ("dense-clip", {}),
    ):
        save_model(SYSTEMS[system].build(load_clip(save_clip(small_clip(), folder / "clip")), options), folder / system)
    return folder


def model_folders(rng: random.Random, folder: Path) -> Thunk:
    kind = rng.choice(("zegclip", "zegclip", "dense-clip", "clip"))
    target = folder / "model"
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(folders() / kind, target)
    config, weights = sorted(target.iterdir(), key=lambda path: path.suffix)
    if config.suffix != ".json":
        config, weights = weights, config
    part = rng.random()
    if part < 0.6:
        config.write_bytes(spoil_json(json.loads(config.read_text()), rng))
    elif part < 0.85:
        data = weights.read_bytes()
        (length,) = struct.unpack("<Q", data[:8])
        header = spoil_json(json.loads(data[8 : 8 + length]), rng)
        weights.write_bytes(struct.pack("<Q", len(header)) + header + data[8 + length :])
    elif part < 0.95:
        weights.write_bytes(spoil_bytes(weights.read_bytes(), rng))
    else:
        rng.choice((config, weights)).unlink()
    name = f"dense-clip/{target}" if kind == "clip" else str(target)
    if rng.random() < 0.05:
        name = rng.choice(NASTY_TEXTS) + rng.choice(("", "/" + "y" * 5000, "\x00"))
    return lambda: load_model(name)


class Bomb:
    """What a hostile pickle would run."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (open, (str(self.path), "w"))


@cache
def states() -> list[dict[str, Tensor]]:
    """Small checkpoints: OpenAI's CLIP, that of transformers, and ZegCLIP's."""
    clip = small_clip()
    model = SYSTEMS["zegclip"].build(clip, {"num_prompts": 2, "decoder_heads": 1, "decoder_layers": 1})
    theirs = put_tensors(state_of(clip), transformers_source)
    found = [state_of(clip), theirs, put_tensors(model.state_dict(), key_map("zegclip"))]
    return [{key: value.clone().contiguous() for key, value in state.items()} for state in found]


def spoil_state(state: dict[str, Any], rng: random.Random, folder: Path) -> dict[str, Any]:
    """A state dict with a few hostile tensors, names and objects."""
    state = dict(state)
    for _ in range(rng.choice((1, 1, 2, 3))):
        key = rng.choice(list(state))
        value = state.pop(key)
        if not isinstance(value, Tensor):
            continue
        spoilt: list[Callable[[], Any]] = [
            lambda value=value: value.float().sum(),
            lambda value=value: value[..., None],
            lambda value=value: value.flatten()[: rng.randrange(4)],
            lambda value=value: torch.full_like(value, float(rng.choice(("nan", "inf", "1e38")))),
            lambda value=value: value.to(rng.choice((torch.int64, torch.complex64, torch.bool, torch.float64))),
            lambda value=value: value.to_sparse(),
            lambda value=value: torch.quantize_per_tensor(value.float(), 0.1, 0, torch.qint8),
            lambda value=value: value.to("meta"),
            lambda: torch.nested.nested_tensor([torch.ones(1), torch.ones(2)]),
            lambda value=value: value.flatten()[:1].expand(10**6, 10**6),
            lambda: torch.zeros([rng.choice((0, 1, 7, 60)) for _ in range(rng.randrange(5))]),
            lambda value=value: value.numpy(),
            lambda: np.array([object()], dtype=object),
            lambda: Bomb(folder / CANARY),
            lambda: argparse.Namespace(cfg=rng.choice((1, Bomb(folder / CANARY)))),
            lambda: nasty(rng),
            lambda value=value: value,
        ]
        try:
            new = rng.choice(spoilt)()
        except (TypeError, RuntimeError, NotImplementedError):  # not every tensor can be spoilt in every way
            continue
        names = [
            key,
            key,
            rng.choice(NASTY_TEXTS),
            key.replace(".0.", f".{rng.choice(NASTY_NUMBERS)}."),
            f"module.{key}",
        ]
        state[rng.choice(names)] = new
    return state


def checkpoints(rng: random.Random, folder: Path) -> Thunk:
    path = folder / f"x{rng.choice(('.pt', '.pth', '.ckpt', '.bin', '.pkl'))}"
    content: Any = spoil_state(rng.choice(states()), rng, folder) if rng.random() < 0.6 else rng.choice(states())
    prefix = rng.choice(("", "", "module.", "model.", "net._orig_mod."))
    content = {prefix + key: value for key, value in content.items()}
    wrap = rng.choice((None, None, "state_dict", "model", "ema", "x"))
    content = content if wrap is None else {wrap: content, "epoch": nasty(rng), "args": argparse.Namespace(a=1)}
    kind = rng.randrange(6)
    if kind == 0:
        path.write_bytes(pickle.dumps(content, protocol=rng.choice((0, 2, 4, 5))) if rng.random() < 0.5 else b"")
    else:
        torch.save(content, path, _use_new_zipfile_serialization=kind != 1)
    if kind == 2:
        path = folder / "x.safetensors"
        data = save({str(k): v for k, v in rng.choice(states()).items()}, metadata={"format": "pt"})
        path.write_bytes(spoil_bytes(data, rng))
    elif kind == 3:
        _spoil_records(path, rng)
    elif kind == 4 and rng.random() < 0.5:
        path.write_bytes(spoil_bytes(path.read_bytes(), rng))
    source: Any = path
    if rng.random() < 0.05:
        target = folder / "transformers"
        target.mkdir(exist_ok=True)
        save_file(states()[1], target / "model.safetensors")
        (target / "config.json").write_bytes(
            spoil_json({"vision_config": {"num_attention_heads": 1}, "text_config": {}}, rng)
        )
        source = target
    return lambda: convert(source, folder / "out", ema=rng.choice((None, None, True, False)))


def _spoil_records(path: Path, rng: random.Random) -> None:
    """Change the pickle inside of a checkpoint, which a change of the file would only make unreadable."""
    with zipfile.ZipFile(path) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    compression = rng.choice((zipfile.ZIP_STORED, zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED))
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in records.items():
            archive.writestr(name, spoil_bytes(data, rng) if name.endswith("data.pkl") else data)


TARGETS: dict[str, tuple[Maker, int]] = {
    "image-files": (image_files, 500),
    "image-arrays": (image_arrays, 300),
    "vocabularies": (vocabularies, 400),
    "class-lists": (class_lists, 250),
    "data-folders": (data_folders, 100),
    "recipes": (recipe_files, 150),
    "model-folders": (model_folders, 150),
    "checkpoints": (checkpoints, 250),
}
"""What there is to try, and how many of the 2,000 inputs of `make test` are of it."""
