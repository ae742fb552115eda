"""Golden cases of CAT-Seg: dense tower, text, aggregation, a training step, inference, groups and schedule."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lexiseg.clip.model import OPENAI_MEAN, OPENAI_STD, build_clip
from lexiseg.clip.text import TextEmbedder
from lexiseg.models.cat_seg import CATSeg
from lexiseg.pictures import cut_windows, read_picture
from lexiseg.recipes import TrainSettings
from lexiseg.scores import GridScores
from lexiseg.training.trainer import build_optimizer, group_parameters, learning_rate
from lexiseg.windows import WindowPolicy
from tests.parity.case import Case
from tests.parity.cat_seg_build import options_of, partial, their_key, whole
from tests.parity.clip_build import architecture
from tests.parity.pictures import batched, clip_normalised
from tests.parity.rounding import check_gradients, in_double, stirred


def check_sub(case: Case, name: str, actual: Tensor) -> None:
    """Compare with a tensor, whole or as every n-th value of its last two axes."""
    case.check(name, actual)
    step = case.config.get("subsampled", {}).get(f"expected/{name}_sub")
    if isinstance(step, int):
        case.check(f"{name}_sub", actual[..., ::step, ::step])


def dense_tower(case: Case) -> None:
    """The image tower and what guides the decoder, at several sizes."""
    model = partial(case)
    for mode, stated in case.config["modes"].items():
        images = case.input(f"{mode}/image")
        with torch.no_grad():
            tokens, levels, grid = model.run_tower(images)
            values = model.encode_images(images).values
        grids = {"grid": grid[0], "image": images.shape[-1], "batch": len(images)}
        case.check_stated(mode, stated, {**grids, "position_resized": grid[0] != case.config["config"]["pos_grid"]})
        case.check(f"{mode}/before_ln_post", tokens)
        case.check(f"{mode}/dense", model.clip.image_tower.project(tokens))
        for name, block in zip(("hidden_a", "hidden_b"), model.guidance_blocks, strict=True):
            case.check(f"{mode}/{name}", levels[block])
        for name, level in zip(("res3", "res4", "res5"), ("dense", "middle", "fine"), strict=True):
            case.check(f"{mode}/{name}", values[level])
        if case.has(f"{mode}/pooled"):
            case.check(f"{mode}/pooled", _pooled(model, images))


@torch.no_grad()
def _pooled(model: CATSeg, images: Tensor) -> Tensor:
    """CLIP's ordinary image vector with the model's prompts: the last block has its attention."""
    tower, prompts = model.clip.image_tower, model.prompt_tokens
    tokens, grid = tower.embed(images, interpolation="bicubic", by_count=True)
    hook = None if prompts is None else lambda index, x: (x, prompts[index][None])
    return tower.project(tower.run(tokens, grid, before_block=hook).tokens)[:, 0]


def text(case: Case) -> None:
    """Tokens and text embeddings: the first synonym in one template, and the ensemble with all of them."""
    model = partial(case)
    clip, names = model.clip, case.config["class_names"]
    groups = [name.split(", ") for name in names]
    used, template = [group[0] for group in groups], case.config["template"]
    case.check_that("used_name", used == list(case.config["used_name"]), "another name is used")
    tokens = clip.tokenize([template.replace("{}", name) for name in used])
    case.check("token_ids", tokens)
    embedder = TextEmbedder(clip)
    with torch.no_grad():
        vectors = embedder.embed(used, (template,))
        case.check("text", vectors[:, None])
        case.check("text_unnormalised", clip.encode_text(tokens))
        case.check("projected_text_guidance", model.aggregator.text_guidance_projection(vectors))
    for name, templates in (("single", [template]), ("ensemble", case.config["ensemble_templates"])):
        joined = [embedder.embed_joined(groups, (one,)) for one in templates]
        case.check(f"{name}_synonym_mean", torch.stack(joined, dim=1))


def watch(case: Case, model: CATSeg) -> list[Any]:
    """Compare the aggregation's results on their way; the handles end it."""
    aggregator, handles = model.aggregator, []

    def compare(name: str, module: nn.Module, change: Any) -> None:
        handles.append(
            module.register_forward_hook(lambda module, given, result: check_sub(case, name, change(result)))
        )

    for index, layer in enumerate(aggregator.layers):
        compare(f"layer{index}/swin_block_1", layer.swin_block.block_1, lambda x: x.flatten(0, 1).flatten(1, 2))
        compare(f"layer{index}/swin_block", layer.swin_block, _as_maps)
        compare(f"layer{index}/out", layer, _as_maps)
    compare("projected_appearance_guidance", aggregator.guidance_projection, lambda x: x)
    compare("projected_text_guidance", aggregator.text_guidance_projection, lambda x: x)
    for index, module in enumerate(aggregator.decoder_guidance_projection):
        compare(f"projected_decoder_guidance_{index}", module, lambda x: x)
    compare("decoder1", aggregator.decoder1, lambda x: x)
    compare("decoder2", aggregator.decoder2, lambda x: x)
    return handles


def _as_maps(x: Tensor) -> Tensor:
    """(B, T, H, W, C) as the authors have it, (B, C, T, H, W)."""
    return x.permute(0, 4, 1, 2, 3)


def aggregator(case: Case) -> None:
    """The aggregation alone, with every step and the gradients."""
    config = case.config
    model, logits, gradients = _aggregate(case)
    words = case.input("text_features")
    stated = {"batch": len(logits), "classes": words.shape[1], "templates": words.shape[2]}
    case.check_stated("sizes", config, stated)
    ours, image = model.aggregator, case.input("image_features")
    case.check("logits", logits)
    with torch.no_grad():
        cost = ours.cost_volume(image, words)
        case.check("corr_all", cost)
        truncated = bool(ours.keep) and words.shape[1] > ours.keep
        case.check_stated("truncated", config, {"truncated": truncated})
        if truncated:
            kept = ours.best_words(cost)
            case.check("kept_classes", kept)
            case.check("class_scores", cost.amax((1, 3, 4)))
            cost = torch.stack([one[:, rows] for one, rows in zip(cost, kept, strict=True)])
            case.check("corr_used", cost)
        check_sub(case, "corr_embed", _as_maps(ours.embed(cost.transpose(1, 2))))
        guidance = [case.input(f"appearance_guidance_{index}") for index in range(3)]
        # without a graph the classes go through in parts
        parts = ours(image, words, guidance, tuple(config["config"]["pooling_size"]))
    # A ReLU whose input is zero but for rounding changes every gradient.
    check_gradients(case, gradients, lambda seed: _aggregate(case, seed, double=True)[2], most=1.0)
    case.check_that("in parts", torch.allclose(parts, logits, atol=1e-4), "the result is another in parts")


def _aggregate(
    case: Case, seed: int | None = None, *, double: bool = False
) -> tuple[CATSeg, Tensor, dict[str, Tensor]]:
    """The model, its logits and the gradients by the authors' keys; `double` as in `rounding.check_gradients`."""
    model = partial(case)
    names = ("image_features", "text_features", "appearance_guidance_1", "appearance_guidance_2")
    image, words, middle, fine = (case.input(name).clone() for name in names)
    first = case.input("appearance_guidance_0")
    same = torch.equal(first, image)
    if double:
        in_double((model,), seed)
        image, words, middle, fine, first = (one.double() for one in (image, words, middle, fine, first))
        stirred((image, words, middle, fine, first), seed)
    image.requires_grad_(), words.requires_grad_()
    guidance = [image if same else first, middle, fine]
    handles = [] if double else watch(case, model)
    logits = model.aggregator(image, words, guidance, tuple(case.config["config"]["pooling_size"]))
    for handle in handles:
        handle.remove()
    (logits * case.input("grad_weight_sub") * (logits != -100)).sum().backward()
    inputs = {"image_features": image.grad, "text_features": words.grad}
    return model, logits.detach(), {**{key: one for key, one in inputs.items() if one is not None}, **_gradients(model)}


def _gradients(model: CATSeg) -> dict[str, Tensor]:
    """Gradients by the authors' keys."""
    return {their_key(name): value.grad for name, value in model.named_parameters() if value.grad is not None}


def settings(
    base_lr: float, multiplier: float, steps: int = 1, clip_norm: float | None = None, *, prompts: bool = False
) -> TrainSettings:
    """The released optimizer, of a model with prompts or without."""
    return TrainSettings(
        steps=steps,
        batch_size=4,
        lr=base_lr,
        weight_decay=1e-4,
        no_decay=("norm", "embedding"),
        multipliers={key: {"lr": multiplier} for key in ("clip.", "prompt_tokens")[: 1 + prompts]},
        schedule="cosine",
        min_lr=0.0,
        clip_norm=clip_norm,
    )


def check_groups(case: Case, what: str, groups: list[dict[str, Any]], stated: list[dict[str, Any]]) -> None:
    """Compare which parameters train, at which rates and decays."""
    found = {
        their_key(name): (group["initial_lr"], group["weight_decay"]) for group in groups for name in group["names"]
    }
    wanted = {entry["name"]: (entry["lr"], entry["weight_decay"]) for entry in stated}
    case.check_that(f"{what} names", found.keys() == wanted.keys(), str(sorted(found.keys() ^ wanted.keys())[:3]))
    same = all(torch.allclose(torch.tensor(found[key]), torch.tensor(wanted[key])) for key in found.keys() & wanted)
    case.check_that(f"{what} rates", same, "a rate or decay is another")


def training_step(case: Case) -> None:
    """Loss, gradients, one step of the optimizer and the loss after it."""
    model, config = whole(case), case.config
    sizes, optimiser = config["config"], config["optimiser"]
    model.train()
    names = [f"image_{index}" for index in range(case.numbered("image_"))]
    images = _batch(case, names, sizes["size_divisibility"])
    labels = torch.stack([case.input(f"sem_seg_{index}").long() for index in range(len(images))])
    labels = torch.where(labels == config["ignore_value"], 255, labels)
    tokens = case.input("token_ids")

    def losses() -> dict[str, Tensor]:
        return model.losses(images, labels, F.normalize(model.clip.encode_text(tokens), dim=-1))

    def again(seed: int | None) -> dict[str, Tensor]:
        fresh, pixels = whole(case).train(), images.double()
        in_double((fresh,), seed)
        stirred((pixels,), seed)
        fresh.losses(pixels, labels, F.normalize(fresh.clip.encode_text(tokens), dim=-1))["loss"].backward()
        return _gradients(fresh)

    handles = watch(case, model)
    loss = losses()["loss"]
    for handle in handles:
        handle.remove()
    case.check("loss_sem_seg", loss)
    with torch.no_grad():
        _check_forward(case, model, images, F.normalize(model.clip.encode_text(tokens), dim=-1))
    loss.backward()
    check_gradients(case, _gradients(model), again, most=1.0)
    prompts = model.prompt_tokens is not None
    plan = settings(sizes["base_lr"], sizes["clip_multiplier"], clip_norm=sizes["clip_value"], prompts=prompts)
    groups = group_parameters(model, plan)
    check_groups(case, "groups", groups, optimiser["groups"])
    every = [parameter for group in groups for parameter in group["params"]]
    frozen = {their_key(name) for name, parameter in model.named_parameters() if not parameter.requires_grad}
    case.check_stated("frozen", config, {"frozen": sorted(frozen)})
    zero = [their_key(n) for n, p in model.named_parameters() if p.grad is not None and not p.grad.any()]
    case.check_stated("zero gradients", config, {"grad_all_zero": zero, "grad_none": []})
    norm = torch.nn.utils.clip_grad_norm_(every, optimiser["full_model_clip_norm"])
    case.check("grad_norm_all_trainable", norm)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer = build_optimizer(groups, plan)
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(0, group["initial_lr"], plan)
        case.check_stated("optimizer", optimiser, {"betas": list(group["betas"]), "eps": group["eps"]})
    optimizer.step()
    for name, parameter in model.named_parameters():
        _check_delta(case, f"step1_delta/{their_key(name)}", parameter.detach() - before[name])
    with torch.no_grad():
        case.check("loss_after_step1", losses()["loss"])


def _check_delta(case: Case, name: str, actual: Tensor) -> None:
    """99.5 % of the entries within 1 % of the largest: where a gradient is near zero AdamW's step has either sign."""
    if not case.has(name):
        return
    case.touched.add(f"expected/{name}")
    expected = case.tensors[f"expected/{name}"]
    near = (actual - expected).abs() <= 0.01 * expected.abs().max()
    case.check_that(name, float(near.float().mean()) >= 0.995, "more than 0.5 % of the entries differ")


def _batch(case: Case, names: list[str], divisibility: int) -> Tensor:
    """Pictures as the released code prepares them: normalised, then filled up with zeros to a common size."""
    return batched([clip_normalised(case.input(name)) for name in names], divisibility)


def _check_forward(case: Case, model: CATSeg, images: Tensor, vectors: Tensor) -> None:
    """Compare what leads to the logits, and those."""
    features = model.encode_images(images)
    logits = model.score_grid(features, vectors)
    check_sub(case, "logits", logits)
    dense = features.values["dense"]
    cost = model.aggregator.cost_volume(dense, vectors[None, :, None].expand(len(images), -1, -1, -1))
    check_sub(case, "corr", cost)
    check_sub(case, "corr_embed", _as_maps(model.aggregator.embed(cost.transpose(1, 2))))
    tokens = model.clip.image_tower.project(
        model.run_tower(F.interpolate(images, size=(model.options.resolution,) * 2, mode="bilinear"))[0]
    )
    case.check("clip_dense_sub", tokens[:, ::4])
    check_sub(case, "res4", features.values["middle"])
    check_sub(case, "res5", features.values["fine"])


def _vectors(case: Case, model: CATSeg) -> Tensor:
    with torch.no_grad():
        return F.normalize(model.clip.encode_text(case.input("token_ids")), dim=-1)


def sliding(case: Case) -> None:
    """Windows with their overlap and the whole picture, as all published results have it."""
    model = whole(case)
    vectors = _vectors(case, model)
    for mode, stated in case.config["modes"].items():
        stride = int(stated["kernel"] * (1 - stated["overlap"]))
        policy = WindowPolicy(stated["kernel"], stride, canvas=tuple(stated["out_res"]), whole=True)
        picture = read_picture(mode, case.input(f"{mode}/image"), policy, 1e9)
        found = {"stride": stride, "windows": len(picture.boxes) - 1, "image": list(picture.image.shape[1:])}
        case.check_stated(mode, stated, found)
        images = cut_windows([(picture, box) for box in picture.boxes], OPENAI_MEAN, OPENAI_STD, vectors.device)
        with torch.no_grad():
            features = model.encode_images(images)
            cost = model.aggregator.cost_volume(
                features.values["dense"], vectors[None, :, None].expand(len(images), -1, -1, -1)
            )
            scores = model.score(features, vectors)
        check_sub(case, f"{mode}/window_corr", cost)
        check_sub(case, f"{mode}/window_logits", scores.logits)
        picture.parts = [scores[index] for index in range(len(images))]
        joined, out = picture.joined(policy), tuple(stated["out"])
        dense = joined.dense(out)
        case.check(f"{mode}/sem_seg", dense[0])
        case.check_labels(f"{mode}/argmax", joined.label_map(out)[0], case.tensors[f"expected/{mode}/sem_seg"][None])


def whole_pictures(case: Case) -> None:
    """Whole pictures as the released code runs them without windows; of a batch it gives the first one's scores."""
    model = whole(case)
    vectors, divisibility = _vectors(case, model), case.config["config"]["size_divisibility"]
    for mode, stated in case.config["modes"].items():
        sizes = [tuple(case.input(f"{mode}/image_{index}").shape[1:]) for index in range(len(stated["images"]))]
        case.check_stated(mode, stated, {"images": [list(size) for size in sizes]})
        images = _batch(case, [f"{mode}/image_{index}" for index in range(len(sizes))], divisibility)
        with torch.no_grad():
            logits = model.score_grid(model.encode_images(images), vectors)
        check_sub(case, f"{mode}/logits", logits)
        side = logits.shape[-1]
        # Its cut takes the first picture's pixels off the map of logits, which is smaller.
        crop = (min(sizes[0][0], side), min(sizes[0][1], side))
        scores = GridScores(logits[:1], crop=crop, sigmoid=True)
        out = tuple(stated.get("out", sizes[0]))
        dense = scores.dense(out)
        case.check_stated(mode, stated, {"result": list(dense.shape[1:])})
        case.check(f"{mode}/sem_seg", dense[0])
        case.check_labels(f"{mode}/argmax", scores.label_map(out)[0], case.tensors[f"expected/{mode}/sem_seg"][None])


def groups_and_schedule(case: Case) -> None:
    """Which parameters train in each mode, at which rates, and how the rates fall."""
    config, sizes = case.config, case.config["config"]
    vision = {
        "image_size": sizes["pos_grid"] * sizes["patch"],
        "patch_size": sizes["patch"],
        "width": sizes["vision_width"],
        "layers": sizes["vision_layers"],
        "head_width": sizes["vision_width"] // sizes["vision_heads"],
    }
    text = {"context_length": 77, "vocab_size": 64, "width": sizes["text_width"]}
    text |= {"heads": sizes["text_heads"], "layers": sizes["text_layers"]}
    plan = settings(config["base_lr"], config["clip_multiplier"], config["max_iter"])
    for mode, stated in config["groups"].items():
        finetune = "none" if mode == "frozen" else mode
        more = {"prompt_length": 2} if any("prompt_tokens" in entry["name"] for entry in stated) else {}
        clip = build_clip(architecture(text, output_dim=sizes["embed_dim"], **vision))
        model = CATSeg.build(clip, options_of(case, finetune=finetune, guidance_blocks=None, **more))
        rules = settings(config["base_lr"], config["clip_multiplier"], prompts=bool(more))
        check_groups(case, mode, group_parameters(model, rules), stated)
    steps = [int(step) for step in case.input("iterations")]
    rates = {
        name: [learning_rate(step, rate, plan) for step in steps]
        for name, rate in (("lr_other", plan.lr), ("lr_clip", plan.lr * plan.multipliers["clip."].lr))
    }
    for name, values in rates.items():
        case.check(name, torch.tensor(values, dtype=torch.float64))


def cat_seg(case: Case) -> None:
    """A case of CAT-Seg; what is in it says of which kind."""
    config = case.config
    if "groups" in config:
        groups_and_schedule(case)
    elif "optimiser" in config:
        training_step(case)
    elif "ensemble_templates" in config:
        text(case)
    elif "input/image_features" in case.tensors:
        aggregator(case)
    elif config["config"].get("sliding_window"):
        sliding(case)
    elif "template" in config:
        whole_pictures(case)
    else:
        dense_tower(case)


KINDS = [(lambda case: case.config.get("system") == "CAT-Seg", cat_seg)]
