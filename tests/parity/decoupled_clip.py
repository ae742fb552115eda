"""Golden cases of the CLIP side of DeOP, MAFT and their hosts: severance, visual prompts, mask attention."""

from __future__ import annotations

from collections.abc import Callable, Collection
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lexiseg.clip.embeddings import image_embeddings, whole_patches
from lexiseg.clip.model import CLIP
from lexiseg.clip.resnet import attention_pool, resnet_features
from lexiseg.clip.tower import Attention, ImageTower
from lexiseg.models.deop import AddedTables, patch_severance
from lexiseg.models.deop_ablations import RELEASED_RESIDUAL, PrependedPrompts, mask_severance
from lexiseg.models.maft import INSIDE, attend_regions, attention_mask, region_embeddings
from lexiseg.regions.pooling import resize_masks
from tests.parity.case import Case
from tests.parity.clip_build import make_clip, vision_sizes
from tests.parity.clip_texts import deop_text, learned_text, stage1_prompt, template_text, zegformer_text


def deop_visual(case: Case) -> None:
    """DeOP's image encoder, with its prompts, in every mode of severance."""
    config, params = case.config, case.params()
    clip = make_clip(
        {f"visual.{key}": value for key, value in params.items()},
        heads=config["heads"],
        native=config["input_resolution"],
    )
    tower = clip.image_tower
    images = whole_patches(case.input("image"), tower.patch_size)
    case.check_stated(
        "sizes",
        config,
        {**vision_sizes(clip, config["input_resolution"]), "image_size": list(case.input("image").shape[-2:])},
    )
    grid = (images.shape[-2] // tower.patch_size, images.shape[-1] // tower.patch_size)
    region_masks = resize_masks(case.input("mask_logits"), grid).sigmoid()
    modes = config.get("modes", {"": config})
    for name, mode in modes.items():
        start = f"{name}/" if name else ""
        severed = severances(mode, region_masks)
        added = None
        hook: Any = None
        residual: dict[int, float] = {}
        if config["cls"] == "VisionTransformerLearnPosition":
            side = round((len(params["learned_position"]) - 1) ** 0.5)
            run = config.get("input_resolution_run", tower.patch_size * side)
            case.check_stated(f"{start}table", {"run": run // tower.patch_size}, {"run": side})
            tables = added_tables(params, tower, config["position_layers"])
            added, hook = tables(grid)
        elif config["cls"] == "VisionTransformerLearnToken":
            rows = params["transformer.deep_prompt_embeddings"]
            case.check_stated("prompts", config, {"num_prompt_tokens": rows.shape[1]})
            used = min(len(rows), len(mode.get("prompt_layers", config.get("prompt_layers", []))))
            case.check_stated(f"{start}prompts", mode, {"deep_prompt_rows_used": used})
            prompts = prepended(params, tower, mode.get("prompt_layers", config.get("prompt_layers", [])), severed)
            added, hook = prompts(grid)
        else:
            residual = RELEASED_RESIDUAL if RELEASED_RESIDUAL.keys() <= set(severed) else {}
        tokens, _ = tower.embed(images, interpolation="bicubic", by_count=True, added=added)
        run = tower.run(
            tokens,
            grid,
            before_block=hook,
            levels=range(tower.num_blocks),
            attention=severed,
            residual=residual,
        )
        features = tower.project(run.tokens[:, -run.num_patches :]).unflatten(1, grid)
        case.check(f"{start}features", features)
        case.check(f"{start}cls", tower.project(run.tokens[:, :1])[:, 0])
        case.check(f"{start}tokens_last", run.tokens)
        case.check(f"{start}tokens_second_last", run.levels[max(tower.num_blocks - 2, 0)])
        for index, level in run.levels.items():
            case.check(f"{start}block_{index}", level)


def severances(mode: dict[str, Any], masks: Tensor) -> dict[int, Attention]:
    blocks, alphas = mode["layermaskvit"], mode.get("gps_alpha_paper") or {}
    severed, softmax = mode.get("maskselfattn"), mode.get("maskselfattnsoftmax")
    if severed and not softmax:
        return {index: partial(patch_severance, alpha=float(alphas.get(str(index), 1.0))) for index in blocks}
    return dict.fromkeys(blocks, partial(mask_severance, masks=masks, kind="mps" if severed else "released"))


def added_tables(params: dict[str, Tensor], tower: ImageTower, blocks: list[int]) -> AddedTables:
    names = {index: f"transformer.resblocks.{index}.learned_position" for index in blocks}
    tables = AddedTables(tower.width, blocks)
    tables.table = torch.nn.Parameter(params["learned_position"])
    for index, name in names.items():  # of another size, in some
        tables.block_tables[str(index)] = torch.nn.Parameter(params[name])
    return tables


def prepended(
    params: dict[str, Tensor], tower: ImageTower, blocks: list[int], severed: Collection[int]
) -> PrependedPrompts:
    rows = params["transformer.deep_prompt_embeddings"][: len(blocks)]
    prompts = PrependedPrompts(tower, blocks[: len(rows)], severed, rows.shape[1], 0.0).eval()
    prompts.load_state_dict({"embeddings": rows})
    return prompts


def ip_clip(case: Case) -> None:
    """MAFT's encoder: a class token for each mask, from block L on."""
    config, params = case.config, case.params()
    clip = make_clip(params, heads=config["heads"], native=config["native"])
    tower, images, masks = clip.image_tower, case.input("image"), case.input("masks")
    grid = tuple(side // tower.patch_size for side in images.shape[-2:])
    on_grid = resize_masks(masks, (grid[0], grid[1]))
    case.check("mask_on_grid", on_grid)
    check_visual_sizes(case, clip, images, masks)
    inside = (on_grid >= INSIDE).flatten(2)
    empty = [(~rows.any(dim=1)).nonzero().flatten().tolist() for rows in inside]
    full = [rows.all(dim=1).nonzero().flatten().tolist() for rows in inside]
    case.check_stated("masks", config, {"masks_empty_on_grid": empty, "masks_full_on_grid": full})
    for key, end in (("trace_L", "/attn_blocked"), ("single", "/single_mask_cls")):
        found = [int(name.split("/")[0].removeprefix("L")) for name in case.expected_names() if name.endswith(end)]
        if config.get(key) is not None and found:
            case.check_stated(key, config, {key: found[0]})
    dense_kept = any(name.startswith("L") and name.endswith("/dense") for name in case.expected_names())
    case.check_stated("dense", config, {"dense": dense_kept})
    for start in config["L"]:
        name = f"L{start}"
        case.check(f"{name}/cls", region_embeddings(clip.visual, images, masks, start_block=start))
        tokens, run_grid = tower.embed(whole_patches(images, tower.patch_size), interpolation="bicubic-corners")
        case.check(f"{name}/tokens_after_ln_pre", tokens)
        early = tower.run(tokens, run_grid, stop=start, levels=range(start))
        # The patches are a run of their own behind the first masked block.
        late = tower.run(early.tokens[:, 1:], run_grid, first=start, levels=range(tower.num_blocks))
        case.check(f"{name}/dense", tower.project(late.tokens).unflatten(1, run_grid))
        for index, level in {**early.levels, **late.levels}.items():
            if index >= start:
                stop = index + 1
                regions = attend_regions(tower, early.tokens, run_grid, on_grid >= INSIDE, start_block=start, stop=stop)
                level = torch.cat([regions, level], dim=1)
            case.check(f"{name}/tokens_after_layer_{index}", level)
        case.check(f"{name}/attn_blocked", blocked(on_grid, config["heads"]))
    for key in case.expected_names():
        if key.endswith("/single_mask_cls"):
            start = int(key.split("/")[0].removeprefix("L"))
            # one mask an image, the last
            single = region_embeddings(clip.visual, images, masks[:, -1:], start_block=start)
            case.check(key, single[:, 0])
    case.check("no_mask/cls", image_embeddings(clip.visual, images))
    case.check("no_mask/dense", dense(tower, images, "bicubic-corners"))


def check_visual_sizes(case: Case, clip: CLIP, images: Tensor, masks: Tensor | None) -> None:
    """Compare the JSON's sizes with the tower, the picture and the masks."""
    patch = clip.image_tower.patch_size if hasattr(clip.visual, "transformer") else None
    found: dict[str, Any] = {"B": len(images), "res": images.shape[-2]}
    found |= (
        {} if patch is None else {**vision_sizes(clip, case.config.get("native")), "grid": images.shape[-2] // patch}
    )
    if masks is not None:
        found |= {"N": masks.shape[1], "mh": masks.shape[-2], "mw": masks.shape[-1]}
    case.check_stated("sizes", case.config, found)


def blocked(on_grid: Tensor, heads: int) -> Tensor:
    """The whole block mask of the authors' code (B * heads, N + P, N + P), True = blocked, from our rows of it."""
    allowed = attention_mask(on_grid >= INSIDE)[:, 0]
    batch, regions, total = allowed.shape
    patches = torch.arange(total) >= regions
    rows = patches.expand(batch, total - regions, -1)
    return ~torch.cat([allowed, rows], dim=1).repeat_interleave(heads, dim=0)


def dense(tower: ImageTower, images: Tensor, interpolation: Any) -> Tensor:
    tokens, grid = tower.embed(whole_patches(images, tower.patch_size), interpolation=interpolation)
    run = tower.run(tokens, grid)
    return tower.project(run.tokens[:, -run.num_patches :]).unflatten(1, grid)


def ip_resnet(case: Case) -> None:
    """The attention pool of CLIP's ResNets, plain and with masks."""
    config, params = case.config, case.params()
    clip = make_clip(params, heads=config["heads"], native=config["native"])
    images, masks = case.input("image"), case.input("masks")
    check_visual_sizes(case, clip, images, masks)
    layers = [len(getattr(clip.visual, f"layer{stage}")) for stage in (1, 2, 3, 4)]
    width = clip.visual.layer1[0].conv1.weight.shape[0]
    case.check_stated("tower", config, {"layers": layers, "width": width, "out": clip.embed_dim})
    features = resnet_features(clip.visual, images)
    case.check("layer4", features)
    case.check("no_mask/cls", image_embeddings(clip.visual, images))
    case.check("no_mask/dense", attention_pool(clip.visual.attnpool, features, patches=True))
    for name in case.expected_names("released_key_padding/"):
        case.skip(name)
    case.check("paper_masked/cls", region_embeddings(clip.visual, images, masks, start_block=0))


def plain_vit(case: Case) -> None:
    """CLIP's own encoder in the four hosts, which resize its positions in two ways."""
    config, params = case.config, case.params()
    clip = make_clip(params, heads=config["heads"], native=config["native"])
    for key in case.expected_names("native/"):
        case.check(key, image_embeddings(clip.visual, case.input("image_native")))
    for name in case.expected_names("legacy_key_padding/"):
        case.skip(name)
    other = case.input("image_other")
    check_visual_sizes(case, clip, other, None)
    case.check_stated("second size", config, {"res2": other.shape[-1]})
    if "maxdiff_align_corners" in config:
        corners = image_embeddings(clip.visual, other, position_interpolation="bicubic-corners")
        difference = float(
            (corners - image_embeddings(clip.visual, other, position_interpolation="bicubic")).detach().abs().max()
        )
        stated = config["maxdiff_align_corners"]
        fine = abs(difference - stated) <= 1e-3 * stated
        case.check_that("maxdiff_align_corners", fine, f"{difference} instead of {stated}")
    ways: dict[str, Any] = {"maft": "bicubic-corners", "freeseg": "bicubic-corners", "zsseg": "bicubic"}
    for key in case.expected_names("other/"):
        way = ways[key.removeprefix("other/").split("_")[0]]
        whole = "dense" not in key
        case.check(
            key,
            image_embeddings(clip.visual, other, position_interpolation=way)
            if whole
            else dense(clip.image_tower, other, way),
        )


def _templates(case: Case, name: str) -> bool:
    templates = case.config.get("templates")
    return isinstance(templates, dict) and name in templates


KINDS: list[tuple[Callable[[Case], bool], Callable[[Case], None]]] = [
    (lambda case: str(case.config.get("cls", "")).startswith("VisionTransformer"), deop_visual),
    (lambda case: "sentence_X_dot_ids" in inputs(case), deop_text),
    (lambda case: case.has("loss_cls") and {"mask_0", "name_token_ids"} <= inputs(case), stage1_prompt),
    (lambda case: "native" in case.config and case.has("paper_masked/cls"), ip_resnet),
    (lambda case: "native" in case.config and isinstance(case.config.get("L"), list), ip_clip),
    (lambda case: "native" in case.config and {"image_native", "image_other"} <= inputs(case), plain_vit),
    (lambda case: _text_only(case) and "prompt_shape" in case.config, learned_text),
    (lambda case: _text_only(case) and _templates(case, "clip_side"), zegformer_text),
    (lambda case: _text_only(case) and "templates" in case.config, template_text),
]


def _text_only(case: Case) -> bool:
    return "text_layers" in case.config and not any(name.startswith("image") for name in inputs(case))


def inputs(case: Case) -> set[str]:
    return {key.removeprefix("input/") for key in case.tensors if key.startswith("input/")}
