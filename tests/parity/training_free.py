"""Golden cases of segmentation without training: towers, whole predictions and pieces of the training-free methods."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lexiseg.clip.model import CLIP
from lexiseg.clip.positions import resize_positions
from lexiseg.clip.proxy import Proxy
from lexiseg.clip.text import TextEmbedder
from lexiseg.models.base import ImageFeatures
from lexiseg.models.dense_clip import DenseCLIP, DenseCLIPOptions
from lexiseg.models.last_block import (
    label_agreement,
    majority,
    mix,
    mix_by_proxy,
    neighbourhood,
    proxy_attention,
)
from lexiseg.scores import WindowScores
from lexiseg.scores.words import Postprocessing, words_to_classes
from lexiseg.smoothing import pamr, pamr_weights
from lexiseg.templates import IMAGENET_80
from lexiseg.windows import cover
from tests.parity.case import Case, UnsupportedError
from tests.parity.clip_build import IdTokenizer, make_clip, vision_sizes

METHODS = ("SCLIP", "NACLIP", "ClearCLIP", "ProxyCLIP", "ResCLIP", "GEM", "PAMR", "text")
_MIXINGS = {
    "vanilla": "qk", "MaskCLIP": "value", "SCLIP": "qq+kk", "ClearCLIP": "qq", "csa": "qq+kk", "kk": "kk",
    "naclip": "kk+neighbours", "nonly": "neighbours", "resclip": "kk+neighbours", "sclip": "qq+kk", "clearclip": "qq",
}  # fmt: skip


def build_clip(case: Case) -> CLIP:
    """The CLIP of a case, with the activation that the JSON states, checked against its sizes."""
    tower = case.config["tower"]
    clip = make_clip(case.params(), heads=tower["heads"], native=tower["input_resolution"])
    if tower["act"] == "gelu":
        for block in clip.visual.transformer.resblocks:
            block.mlp.gelu = torch.nn.GELU()
    sizes = {**vision_sizes(clip), "table_grid": list(clip.visual.grid_size)}
    sizes["layer_norm_eps"] = clip.visual.ln_post.eps
    case.check_stated("sizes of the tower", tower, sizes)
    return clip.eval()


def build(case: Case, method: str, proxy: Proxy | None = None, clip: CLIP | None = None, **options: Any) -> DenseCLIP:
    given = {"positions_by_count": True, "window_size": None, "window_stride": 0, "short_side": 0, **options}
    return DenseCLIP(clip or build_clip(case), DenseCLIPOptions(method=method, **given), proxy=proxy).eval()


def enter(model: DenseCLIP, images: Tensor) -> tuple[Tensor, tuple[int, int]]:
    """Tokens that enter the last block, and the grid."""
    options = model.options
    tokens, grid = model.tower.embed(images, interpolation=options.positions, by_count=options.positions_by_count)
    return model.tower.run(tokens, stop=len(model.tower.blocks) - options.last_blocks)[0], grid


def weights_of(model: DenseCLIP, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
    """The mixing's weights (B, heads, T, T): what it makes of values that are one-hot."""
    query, key, _ = model.tower.blocks[-1].qkv(tokens)
    eye = torch.eye(tokens.shape[1]).expand(*query.shape[:2], -1, -1)
    neighbours = neighbourhood(grid, model.options.neighbour_std)
    return mix((query, key, eye), model.options.mixing, neighbours if "neigh" in model.options.mixing else None)


@torch.no_grad()
def towers(case: Case) -> None:
    """Tokens of the last block's variants."""
    images, clip = case.input("image"), build_clip(case)
    case.check_stated("batch", case.config, {"batch": len(images), "image_hw": list(images.shape[-2:])})
    for name, said in case.config["options"].items():
        method = case.config["method"]
        kept, last, mixing = True, 1, "qk"
        if method == "SCLIP":
            mixing = "qq+kk" if said["csa"] else "qk"
        elif method == "NACLIP":
            mixing, kept = _MIXINGS[said["attn_strategy"]], said["arch"] == "vanilla"
        else:
            mixing, kept, last = _MIXINGS[said["model_type"]], not said["ignore_residual"], said["last_n_layers"]
        std = said.get("gaussian_std", 5.0)
        model = build(case, "sclip", clip=clip, mixing=mixing, whole_block=kept, last_blocks=last, neighbour_std=std)
        tokens, grid = enter(model, images)
        case.check_stated("grid", case.config, {"grid": list(grid)})
        result = model.run_last_blocks(tokens, grid)
        case.check(f"{name}/tokens", result)
        case.check(f"{name}/patches", result[:, 1:])
        case.check(f"{name}/class", result[:, 0])
        case.check("last_block_input", tokens)
        if case.has(f"{name}/attention"):
            case.check(f"{name}/attention", weights_of(model, tokens, grid))
        source = tuple(case.config["tower"]["table_grid"])
        table = case.params()["visual.positional_embedding"]
        case.check("positions", resize_positions(table, grid, source, "bicubic-offset", by_count=True))


@torch.no_grad()
def gem(case: Case) -> None:
    """GEM's path of self-self attention."""
    images, clip = case.input("image"), build_clip(case)
    case.check_stated("batch", case.config, {"batch": len(images), "image_hw": list(images.shape[-2:])})
    for name, said in case.config["options"].items():
        model = build(
            case, "gem", clip=clip, positions_by_count=False, depth=said["depth"], iterations=said["ss_attn_iter"],
            temperature=said["ss_attn_temp"], whole_block=not said["ignore_residual"],
        )  # fmt: skip
        tokens, _ = model.tower.embed(images, interpolation="bicubic-antialias")
        case.check(f"{name}/patches", model.run_self_self(tokens)[:, 1:])


def windows(case: Case) -> None:
    """NACLIP's Gaussian."""
    for index, said in enumerate(case.config["variants"]):
        (height, width), std = said["grid"], said["std"]
        case.check(f"variant_{index}/addition", neighbourhood((height, width), std))
        around = neighbourhood((2 * height - 1, 2 * width - 1), std, 0)
        middle = (height - 1) * (2 * width - 1) + width - 1
        case.check(f"variant_{index}/window", around[middle].unflatten(0, (2 * height - 1, 2 * width - 1)))


def refinement(case: Case) -> None:
    """PAMR alone."""
    image, logits = case.input("image"), case.input("logits")
    case.check_stated("sizes", case.config, {"image_hw": list(image.shape[-2:]), "classes": logits.shape[1]})
    for index, (steps, dilations) in enumerate(case.config["variants"]):
        case.check(f"variant_{index}", pamr(logits, image, steps, dilations))
        if case.has(f"variant_{index}_affinity"):
            case.check(f"variant_{index}_affinity", pamr_weights(image, dilations)[None])


def agreement(case: Case) -> None:
    """ResCLIP's feedback from given labels."""
    for index, said in enumerate(case.config["variants"]):
        labels = case.input(f"variant_{index}/labels")
        found = label_agreement(labels, said["std"], said["delete_same_entity"])
        case.check(f"variant_{index}/attention", F.pad(found, (1, 0, 1, 0))[None])


def texts(case: Case) -> None:
    """The 80 templates, and words averaged over them."""
    words, templates = case.config["query_words"], case.config["templates"]
    case.check_that("templates", list(IMAGENET_80) == list(templates), "the ImageNet templates differ")
    check_words(case)
    ids = case.input("token_ids").long()
    names = [template.replace("{}", word) for word in words for template in templates]
    said = case.config["text"]
    tokenizer = IdTokenizer(dict(zip(names, ids.flatten(0, 1), strict=True)))
    clip = make_clip(case.params(), text_heads=said["heads"], tokenizer=tokenizer)
    if said["act"] == "gelu":
        for block in clip.model.transformer.resblocks:
            block.mlp.gelu = torch.nn.GELU()
    embedder = TextEmbedder(clip.eval())
    case.check("text_embeddings", embedder.embed(words, templates))


def check_words(case: Case) -> None:
    """The words of the class lines, and the class of each."""
    lines = [line.split(case.config["separator"]) for line in case.config["class_name_lines"]]
    words = [word.strip() for line in lines for word in line]
    owners = [index for index, line in enumerate(lines) for _ in line]
    found = {"query_words": [], "query_idx": owners}
    if "query_words" in case.config:
        case.check_that("words", words == list(case.config["query_words"]), "the class lines give other words")
    case.check_stated("classes of the words", case.config, {"query_idx": found["query_idx"]})


def build_proxy(case: Case, feature: Any = "out") -> Proxy:
    """The second encoder of a case, in timm."""
    from timm.models.vision_transformer import VisionTransformer

    said = case.config["vfm"]
    params = {key.removeprefix("vfm."): value for key, value in case.params().items() if key.startswith("vfm.")}
    registers, scaled = said.get("registers", 0), "blocks.0.ls1.gamma" in params
    model = VisionTransformer(
        img_size=said["image_size"], patch_size=said["patch_size"], embed_dim=said["width"], depth=said["layers"],
        num_heads=said["heads"], num_classes=0, reg_tokens=registers, no_embed_class=bool(registers),
        init_values=1.0 if scaled else None, dynamic_img_size=True,
    )  # fmt: skip
    params.pop("mask_token", None)
    if registers:  # timm keeps the class token's position in the token
        table = params["pos_embed"]
        params |= {"cls_token": params["cls_token"] + table[:, :1], "pos_embed": table[:, 1:]}
        params["reg_token"] = params.pop("register_tokens")
    model.load_state_dict(params)
    plain = "bicubic-antialias" if said.get("antialias") else "bicubic"
    return Proxy(model, "bicubic-offset" if said.get("offset", 0.1) else plain, feature)


@torch.no_grad()
def proxies(case: Case) -> None:
    """ProxyCLIP's features, attention and patches."""
    images, said = case.input("image"), case.config["options"]
    check_words(case) if "class_name_lines" in case.config else None
    case.check_stated("batch", case.config, {"batch": len(images), "image_hw": list(images.shape[-2:])})
    clip, proxy = build_clip(case), build_proxy(case)
    model = build(case, "proxyclip", proxy, clip=clip)
    mean, std = (torch.tensor(numbers)[:, None, None] for numbers in (model.mean, model.std))
    given = proxy.normalise(images * std + mean) if case.has("vfm_image") else images
    case.check("vfm_image", given)
    features = proxy.features(given)
    unit_features = F.normalize(features.flatten(2), dim=1).unflatten(2, features.shape[2:])
    near = (features - case.tensors["expected/proxy_features"]).abs().max() < 1e-2 * features.abs().max()
    case.check("proxy_features", features if near else unit_features)
    kinds = {kind: build_proxy(case, kind).features(given) for kind in ("q", "k", "v")}
    for kind, value in kinds.items():
        case.check(f"vfm_{kind}", value.flatten(2).transpose(1, 2))
    tokens, grid = enter(model, images)
    case.check_stated("grid", case.config, {"grid": list(grid)})
    variants: dict[str, Any] = {"": {**said, "proxy_feature": "out"}, **case.config.get("variants", {})}
    for name, options in variants.items():
        chosen = kinds.get(options["proxy_feature"], features)
        patches = patches_with(model, tokens, grid, chosen, options["beta"], options["gamma"], whole=True)
        prefix = f"{name}/" if name else ""
        case.check(f"{prefix}patches", patches)
        if not name:
            case.check("as_meant/patches", patches)
            alone = patches_with(model, tokens, grid, chosen, options["beta"], options["gamma"], whole=False)
            case.check("as_meant_one_by_one/patches", alone)
            compare_attention(case, chosen, options["beta"], options["gamma"])
            if case.has("logits"):
                size = features.shape[2:]
                unit_patches = F.normalize(patches, dim=-1).unflatten(1, size)
                kept = ImageFeatures(tuple(images.shape[-2:]), {"patches": unit_patches})
                case.check("logits", model.score(kept, case.input("text_embeddings")).dense(tuple(images.shape[-2:])))
    case.check("no_proxy/patches", build(case, "sclip", clip=clip, mixing="qk").run_last_blocks(tokens, grid)[:, 1:])
    case.skip("as_released/patches")


def batch_attention(features: Tensor, beta: float, gamma: float, *, whole: bool) -> Tensor:
    """The proxy's attention, with the mean similarity over the batch (as released) or that of each image (ours)."""
    if not whole or len(features) == 1:
        return proxy_attention(features, beta, gamma)
    flat = F.normalize(features.flatten(2), dim=1)
    similarity = flat.transpose(1, 2) @ flat
    own = similarity.mean(dim=(1, 2))
    # An image's own mean times another beta is the mean of the batch.
    factors = (beta * similarity.mean() / own).tolist()
    return torch.cat([proxy_attention(one[None], b, gamma) for one, b in zip(features, factors, strict=True)])


def patches_with(
    model: DenseCLIP, tokens: Tensor, grid: tuple[int, int], features: Tensor, beta: float, gamma: float, *, whole: bool
) -> Tensor:
    block = model.tower.blocks[-1]
    attention = batch_attention(features, beta, gamma, whole=whole)
    mixed = mix_by_proxy(block.qkv(tokens)[2][:, :, 1:], grid, attention, tuple(features.shape[2:]))
    return model.tower.project(block.output(mixed))


def compare_attention(case: Case, features: Tensor, beta: float, gamma: float) -> None:
    attention = batch_attention(features, beta, gamma, whole=True)
    case.check("attention", attention)
    if case.has("similarity_scaled"):
        logits = attention.log()  # up to a constant of each row, which the diagonal tells
        flat = F.normalize(features.flatten(2), dim=1)
        own = gamma * (1 - beta * (flat.transpose(1, 2) @ flat).mean())
        logits = logits - logits.diagonal(dim1=1, dim2=2)[..., None] + own
        case.check("similarity_scaled", logits.masked_fill(attention == 0, -1e9))
        if "share_of_pairs_kept" in case.config:
            kept = float((attention > 0).float().mean())
            case.check_stated("pairs kept", case.config, {"share_of_pairs_kept": kept})


def resclip_options(said: Any, **more: Any) -> dict[str, Any]:
    return {
        "middle_blocks": tuple(said["rcs_layers"]), "middle_weights": tuple(said["attn_rcs_weights"]),
        "feedback_weights": tuple(said["attn_sfr_weights"]), "feedback_threshold": said["temp_thd"],
        "feedback_same_entity": said["delete_same_entity"], "neighbour_std": said["gaussian_std"],
        "logit_scale": said["logit_scale"], **more,
    }  # fmt: skip


@torch.no_grad()
def resclip_tower(case: Case) -> None:
    """ResCLIP's attention, labels, feedback and tokens."""
    said, images, text = case.config["options"], case.input("image"), case.input("text_embeddings")
    case.check_stated("batch", case.config, {"batch": len(images), "image_hw": list(images.shape[-2:])})
    case.check_that("PAMR", dict(said["sfr_pamr"]) == {"steps": 10, "dilations": [8, 16]}, "another inner PAMR")
    clip = build_clip(case)
    for name, variant in case.config["variants"].items():
        options = resclip_options(said, mixing=_MIXINGS[variant["attn_strategy"]])
        model = build(case, "resclip", clip=clip, whole_block=variant["arch"] == "w_resi", **options)
        tokens, grid = model.tower.embed(images, interpolation="bicubic-offset", by_count=True)
        tokens, kept = model.tower.run(tokens, stop=len(model.tower.blocks) - 1, attending=model.options.middle_blocks)
        case.check_stated("grid", case.config, {"grid": list(grid)})
        middle = list(kept.values())
        used, weights = middle if variant["use_rcs"] else (), None
        if variant["use_sfr"]:
            first = model.unit_patches(model.run_last_blocks(tokens, grid, used), grid)
            logits = torch.einsum("bhwd,qd->bqhw", first, text)
            labels = majority(model.first_labels(logits, images), grid)[0]
            found = label_agreement(labels, model.options.neighbour_std, model.options.feedback_same_entity)
            if name == "resclip-both":
                compare_feedback(case, model, logits, labels, middle)
            weights = F.pad(found / found.max(), (1, 0, 1, 0))[None]
        case.check(f"{name}/tokens", model.run_last_blocks(tokens, grid, used, weights))


def compare_feedback(case: Case, model: DenseCLIP, logits: Tensor, labels: Tensor, middle: list[Any]) -> None:
    images, std = case.input("image"), model.options.neighbour_std
    large = F.interpolate(logits, size=images.shape[-2:], mode="bilinear", align_corners=False)
    refined = pamr(large, images, **dict(case.config["options"]["sfr_pamr"]))
    case.check("sfr/probabilities", (model.options.logit_scale * refined).softmax(dim=1))
    case.check("sfr/patch_labels", labels)
    for key, kept in (("", model.options.feedback_same_entity), ("_delete_same_entity_true", True)):
        case.check(f"sfr/attention{key}", F.pad(label_agreement(labels, std, kept), (1, 0, 1, 0))[None])
    plain = F.pad(label_agreement(labels, std, False), (1, 0, 1, 0))[None]
    case.check("sfr/attention_delete_same_entity_false", plain)
    query = middle[0][0]
    eye = torch.eye(query.shape[2]).expand(*query.shape[:2], -1, -1)
    case.check("rcs/attention", torch.stack([mix((q, k, eye), "qk") for q, k in middle]).mean(0)[0])


def predict_options(case: Case) -> tuple[str, dict[str, Any]]:
    """The method of a whole prediction, and its options."""
    said, method = case.config["options"], case.config["method"]
    if method == "SCLIP":
        return "sclip", {"mixing": "qq+kk" if said["csa"] else "qk"}
    if method == "NACLIP":
        kept = said["arch"] == "vanilla"
        mixing = _MIXINGS[said["attn_strategy"]]
        return "naclip", {"whole_block": kept, "mixing": mixing, "neighbour_std": said["gaussian_std"]}
    if method == "ClearCLIP":
        mixing = _MIXINGS[said["model_type"]]
        return "clearclip", {"mixing": mixing, "whole_block": not said["ignore_residual"]}
    if method == "ProxyCLIP":
        return "proxyclip", {"beta": said["beta"], "gamma": said["gamma"], "pad_to": said["pad_to"]}
    mixing = _MIXINGS[said["attn_strategy"]]
    return "resclip", resclip_options(said, mixing=mixing, whole_block=said["arch"] == "w_resi")


@torch.no_grad()
def predictions(case: Case) -> None:
    """From a picture to its label map: windows, averages, PAMR, scale, synonyms, thresholds."""
    said, image, text = case.config["options"], case.input("image"), case.input("text_embeddings")
    check_words(case)
    case.check_stated("sizes", case.config, {"image_hw": list(image.shape[-2:])})
    method, options = predict_options(case)
    proxy = build_proxy(case) if method == "proxyclip" else None
    crop = said["slide_crop"] or None
    options |= {"window_size": crop, "window_stride": said["slide_stride"] if crop else 0}
    model = build(case, method, proxy, **options)
    if "image_mean" in said:
        case.check_numbers("mean", [255 * value for value in model.mean], said["image_mean"])
        case.check_numbers("std", [255 * value for value in model.std], said["image_std"])
    size = tuple(case.config["ori_shape"])
    height, width = image.shape[-2:]
    boxes = cover(height, width, crop, said["slide_stride"])
    crops = [image[..., top : top + h, left : left + w] for top, left, h, w in boxes]
    padded = "window_shapes_padded" in case.config
    shapes = [list((model.fitted(one)[0] if padded else one).shape[-2:]) for one in crops]
    case.check_stated("windows", case.config, {f"window_shapes{'_padded' if padded else ''}": shapes})
    parts = [model(one, text) for one in crops]
    for name, index in (("first", 0), ("last", -1)):
        part = parts[index]
        frame = part.resize_to if padded else tuple(crops[index].shape[-2:])
        if not crop and method in ("sclip", "clearclip", "proxyclip"):
            frame = size
        if padded:  # before the padding is cut off
            part = type(part)(part.logits, resize_to=part.resize_to)
        case.check(f"window_logits_{name}", part.dense(frame))
    if case.has("patch_labels_first"):
        case.check("patch_labels_first", model.patch_labels(model.encode_images(crops[0]), text)[0])
    scores = WindowScores(parts, boxes, (height, width)) if crop else parts[0]
    logits = scores.dense(size)
    case.check("logits_before_pamr", logits)
    guide = F.interpolate(image, size=size, mode="bilinear", align_corners=False)
    case.check("pamr_image", guide)
    # SCLIP's code refines in windows only.
    if said.get("pamr_steps", 0) and (crop or method != "sclip"):
        logits = pamr(logits, guide, said["pamr_steps"], said["pamr_stride"])
    case.check("logits", logits)
    renormalised = method in ("naclip", "resclip")
    rule = Postprocessing(said["logit_scale"], said["prob_thd"], said.get("area_thd") or 0.0)
    labels, probabilities = words_to_classes(logits[0], case.input("query_idx"), rule)
    case.check("probabilities", probabilities / probabilities.sum(0) if renormalised else probabilities)
    case.check("seg_pred", labels[None])
    compare_margins(case, probabilities, labels, said["prob_thd"])


def compare_margins(case: Case, probabilities: Tensor, labels: Tensor, threshold: float) -> None:
    """How much of the picture the threshold made background."""
    below = float((probabilities.amax(0) < threshold).float().mean())
    case.check_stated("background", case.config, {"share_of_background_by_threshold": below})


def training_free(case: Case) -> None:
    """Find out which kind of case this is and compare it."""
    config = case.config
    if "text" in config and "templates" in config:
        return texts(case)
    if "input/logits" in case.tensors:
        return refinement(case)
    if "smallest_margin" in config and "ori_shape" in config:
        return predictions(case)
    if config["method"] == "GEM":
        return gem(case)
    if "vfm" in config:
        return proxies(case)
    if config["method"] == "ResCLIP":
        return resclip_tower(case) if "tower" in config else agreement(case)
    if "tower" in config:
        return towers(case)
    if isinstance(config.get("variants"), list):
        return windows(case)
    raise UnsupportedError("this kind of training-free case is not known")
