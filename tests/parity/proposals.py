"""Golden cases of the proposal generators: MaskFormer, Mask2Former's head, and the criterion of the first stage."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lexiseg.clip.load import shapes_of
from lexiseg.losses.proposals import (
    MaskTargets,
    ProposalWeights,
    level_losses,
    mask_targets,
    match,
    proposal_losses,
)
from lexiseg.proposals.base import Proposals
from lexiseg.proposals.mask2former import Mask2Former
from lexiseg.proposals.maskformer import MaskFormer
from lexiseg.proposals.options import Mask2FormerOptions, MaskFormerOptions
from lexiseg.weights.detectron_checkpoint import generator_source, infer_generator_options
from lexiseg.weights.filling import take_tensors
from tests.parity.case import Case
from tests.parity.clip_build import adapter_clip, toy_sizes, under
from tests.parity.clip_texts import prompt_learner, toy_tokenizer
from tests.parity.pictures import batched, normalised
from tests.parity.rounding import check_gradients, in_double, stirred
from tests.references import put_tensors

_GENERATOR = ("backbone.", "sem_seg_head.")


def generator_sizes(model: MaskFormer | Mask2Former) -> dict[str, Any]:
    """Sizes of a generator under the names that the cases' JSON has for them."""
    options = model.options
    sizes = {
        "conv": options.pixel_dim,
        "conv_dim": options.pixel_dim,
        "mask": options.mask_dim,
        "mask_dim": options.mask_dim,
        "hid": options.hidden_dim,
        "hidden": options.hidden_dim,
        "nh": options.heads,
        "nheads": options.heads,
        "ff": options.ffn_dim,
        "ffn": options.ffn_dim,
        "dec": options.decoder_layers,
        "Q": options.num_queries,
        "N": options.num_queries,
    }
    if options.class_head == "cosine-mlp":
        sizes |= {"ehid": options.class_hidden, "class_embed_hidden": options.class_hidden}
    if options.widths is not None and options.backbone != "tiny":
        layers = [len(getattr(model.backbone.body, f"layer{stage}")) for stage in (1, 2, 3, 4)]
        depth = {"r50": 50, "r101": 101}[options.backbone.removesuffix("c")]
        sizes |= {"wpg": options.widths[0], "res2": 4 * options.widths[0], "depth": depth, "blocks": layers}
        sizes |= {} if options.stem_width is None else {"stem": options.stem_width}
    return sizes


def generator_params(case: Case) -> dict[str, Tensor]:
    """The proposal generator's tensors by the authors' keys."""
    return {key: value for key, value in case.params().items() if key.startswith(_GENERATOR)}


def maskformer(case: Case, heads: int, *, dropout: float | None = None) -> MaskFormer:
    """The case's MaskFormer, filled."""
    params = generator_params(case)
    options = infer_generator_options(params, heads=heads)
    assert isinstance(options, MaskFormerOptions)
    if dropout is not None:
        options = options.model_copy(update={"dropout": dropout})
    model = MaskFormer(options)
    model.load_state_dict(_tensors(model, params, case.name))
    body: Any = model.backbone.body
    for block, dilation in zip(body.layer4, case.config.get("res5_dilations", [1, 2, 4]), strict=True):
        block.conv2.dilation = block.conv2.padding = (dilation, dilation)
    return model.eval()


@torch.no_grad()
def maskformer_small(case: Case) -> None:
    """MaskFormer alone, from the backbone's features to the masks of every layer."""
    model = maskformer(case, case.config["config"]["nh"])
    case.check_stated("sizes", case.config["config"], generator_sizes(model))
    sizes = {key: value for key, value in generator_sizes(model).items() if key in ("depth", "blocks")}
    case.check_stated("backbone", case.config, sizes)
    images = case.input("image_normalised")
    features = model.backbone(images)
    for index, name in enumerate(("res2", "res3", "res4", "res5")):
        _strided(case, name, features[index])
    case.check("mask_features", model.pixel_decoder(features).last_hidden_state)
    feature = features[-1]
    if model.transformer.input_projection is not None:
        feature = model.transformer.input_projection(feature)
    case.check("pos", model.transformer.position_embedder(feature.shape, feature.device, feature.dtype))
    states = model.decode(features[-1])
    case.check("decoder_states", torch.stack(states))
    case.check("mask_embeddings", model.mask_embed(states[-1]))
    with torch.enable_grad():  # or it would leave the earlier layers out
        found = model(images)
    for name, level in _named_levels(found):
        _strided(case, f"{name}pred_masks", level.mask_logits)
        if level.embeddings is not None:
            case.check(f"{name}query_embeddings", level.embeddings)


def _named_levels(found: Proposals) -> list[tuple[str, Proposals]]:
    return [*((f"aux_{index}/", level) for index, level in enumerate(found.aux)), ("", found)]


def _strided(case: Case, name: str, actual: Tensor) -> None:
    """Compare with a tensor that may be stored at every second or k-th pixel: ``name_strideK``."""
    for key in case.expected_names(name):
        rest = key.removeprefix(name)
        if rest == "":
            case.check(key, actual)
        elif rest.startswith("_stride"):
            step = int(rest.removeprefix("_stride"))
            case.check(key, actual[..., ::step, ::step])


@torch.no_grad()
def mask2former_head(case: Case) -> None:
    """Mask2Former's head with context interaction, from given features."""
    config, params = case.config, generator_params(case)
    model = _head_only(config, params)
    channels = {f"res{stage}": case.input(f"res{stage}").shape[1] for stage in (2, 3, 4, 5)}
    case.check_stated("channels", config["channels"], channels)
    case.check_stated("words", config, {"C": len(case.input("text_features")) - 1})  # "no object" is the last
    case.check_stated("sizes", config, {**generator_sizes(model), **mask2former_sizes(model, params)})
    case.check_stated("interaction", config["interaction"], interaction_sizes(params))
    features = [case.input(f"res{stage}") for stage in (2, 3, 4, 5)]
    text = case.input("text_features")
    levels, pixels = model.pixel_features(features)
    case.check("encoder_memory", torch.cat([level.flatten(2).transpose(1, 2) for level in levels], dim=1))
    case.check("mask_features_pre_interaction", pixels)
    levels, pixels = model.interact(levels, pixels, text)
    case.check("mask_features_post_interaction", pixels)
    for index, level in enumerate(levels):
        case.check(f"multi_scale_post_interaction.{index}", level)
    found = model.propose(features, text)
    for index, level in enumerate(found.aux):
        case.check(f"aux.{index}/pred_masks", level.mask_logits)
        if level.embeddings is not None:
            case.check(f"aux.{index}/pred_embed", level.embeddings)
    case.check("pred_masks", found.mask_logits)
    if found.embeddings is not None:
        case.check("pred_embed", found.embeddings)


def mask2former_sizes(model: Mask2Former, params: dict[str, Tensor]) -> dict[str, Any]:
    """Sizes that Mask2Former alone has, under the names of the JSON."""
    encoder = "sem_seg_head.pixel_decoder.transformer.encoder.layers."
    layers = {key.removeprefix(encoder).split(".")[0] for key in params if key.startswith(encoder)}
    heads = model.options.encoder_heads
    weights = params[f"{encoder}0.self_attn.attention_weights.weight"].shape[0]
    return {
        "embed": model.options.embed_dim,
        "deform_points": weights // (3 * heads),  # three levels
        "DEC_LAYERS": model.options.decoder_layers,
        "actual_decoder_layers": model.options.decoder_layers,
        "encoder_layers": len(layers),
        "deform_encoder_layers": len(layers),
        "encoder_ffn": params[f"{encoder}0.linear1.weight"].shape[0],
    }


def interaction_sizes(params: dict[str, Tensor]) -> dict[str, Any]:
    """The width inside the context interaction."""
    keys = [key for key in params if key.startswith("sem_seg_head.interaction.") and key.endswith("v_proj.weight")]
    return {"embed_dim": params[keys[0]].shape[0]} if keys else {}


def _head_only(config: dict[str, Any], params: dict[str, Tensor]) -> Mask2Former:
    """Mask2Former whose backbone only has the case's feature widths; the features are given."""
    channels = tuple(config["channels"][f"res{stage}"] for stage in (2, 3, 4, 5))
    stages = {
        f"backbone.res{stage}.0.conv1.weight": torch.zeros(width, 1, 1, 1)
        for stage, width in zip((2, 3, 4, 5), channels, strict=True)
    }
    known = {
        **params,
        **stages,
        **{f"backbone.res4.{block}.conv1.weight": torch.zeros(channels[2], 1, 1, 1) for block in range(1, 6)},
        "backbone.stem.conv1.weight": torch.zeros(2, 1, 1, 1),
    }
    options = infer_generator_options(
        known,
        heads=config["nheads"],
        encoder_heads=config["deform_heads"],
        interaction_heads=config["interaction"]["heads"],
    )
    assert isinstance(options, Mask2FormerOptions)
    model = Mask2Former(options.model_copy(update={"backbone": "tiny"}))
    model.backbone = nn.Module()
    model.load_state_dict(_tensors(model, params, "it"))
    return model.eval()


def stage_loss(case: Case) -> None:
    """The criterion of the first stage on given predictions: matches, losses, gradients."""
    config = case.config
    weights = ProposalWeights(
        cost_class=config["cost_class"] if isinstance(config["cost_class"], (int, float)) else 0.0,
        class_weight=config["weights"]["loss_ce"],
        mask_weight=config["cost_mask"],
        dice_weight=config["cost_dice"],
        no_object=config["eos_coef"],
    )
    # lexiseg's losses have these numbers in them.
    case.check_stated("focal loss", config.get("focal", {}), {"alpha": 0.25, "gamma": 2})
    case.check_stated("classes", config, {"num_classes": case.input("final/pred_logits").shape[-1] - 1})
    targets = []
    while f"input/target_{len(targets)}/labels" in case.tensors:
        start = f"target_{len(targets)}/"
        targets.append(MaskTargets(case.input(start + "labels").long(), case.input(start + "masks").float()))
    total: Tensor | float = 0.0
    for name in sorted({key.split("/")[1] for key in case.tensors if key.endswith("/pred_masks")}):
        logits = case.input(f"{name}/pred_logits").clone().requires_grad_()
        masks = case.input(f"{name}/pred_masks").clone().requires_grad_()
        for image, (queries, found) in enumerate(match(masks, logits, targets, weights)):
            case.check(f"{name}/match_{image}", torch.stack([queries, found]))
        suffix = "" if name == "final" else name.removeprefix("aux")
        losses = level_losses(masks, logits, targets, weights)
        factors = {"loss_ce": weights.class_weight, "loss_mask": weights.mask_weight, "loss_dice": weights.dice_weight}
        weighted = []
        for key, value in losses.items():
            case.check(f"loss_unweighted/{key}{suffix}", value / factors[key])
            weighted.append(value / factors[key] * config["weights"][key + suffix])
            case.check(f"loss_weighted/{key}{suffix}", weighted[-1])
        level = torch.stack(weighted).sum()
        level.backward()
        total = total + level.detach()
        assert logits.grad is not None and masks.grad is not None
        case.check(f"{name}/grad_logits", logits.grad)
        case.check(f"{name}/grad_masks", masks.grad)
    case.check("loss_total", torch.as_tensor(total))


def zsseg_training(case: Case) -> None:
    """A whole training step of ZSSeg: prompts, generator, matching, losses, gradients. The dropout was off."""
    losses, gradients = _zsseg_step(case)
    for name, value in losses.items():
        case.check("loss/total" if name == "loss" else f"loss/{name}", value)
    check_gradients(case, gradients, lambda seed: _zsseg_step(case, seed, double=True)[1])


def _zsseg_step(
    case: Case, seed: int | None = None, *, double: bool = False
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Losses, and gradients by the authors' keys."""
    config, params = case.config["config"], case.params()
    adapter = under(params, "clip_adapter.")
    names = config["train_names"]
    clip = adapter_clip(adapter, config, toy_tokenizer(case, adapter, names))
    learner = prompt_learner(under(adapter, "prompt_learner."))
    no_object = adapter["non_object_embedding"].clone()
    case.check_stated("sizes of the text tower", config, {**toy_sizes(clip, vision=False), "n_train": len(names)})
    model = maskformer(case, config["nh"], dropout=0.0).train()
    case.check_stated("sizes", config, generator_sizes(model))
    indices = range(sum(key.startswith("input/image_") for key in case.tensors))
    batch = batched([normalised(case.input(f"image_{index}")) for index in indices])
    labels = batched([case.input(f"sem_seg_{index}").long() for index in indices], value=255)
    if double:
        in_double((clip.model, learner, model), seed)
        batch, no_object = batch.double(), no_object.double()
        stirred((batch, no_object), seed)
    no_object.requires_grad_()
    found = model(batch)
    rows = torch.cat([learner(clip, names), F.normalize(no_object, dim=-1)])
    logits = [100 * F.normalize(level.embeddings, dim=-1) @ rows.T for level in found.levels]
    losses = proposal_losses(found, logits, mask_targets(labels))
    losses["loss"].backward()
    gradients = {"clip_adapter.non_object_embedding": no_object.grad}
    gradients |= {f"clip_adapter.prompt_learner.{name}": p.grad for name, p in learner.named_parameters()}
    gradients |= generator_gradients(model)
    return losses, {key: gradient for key, gradient in gradients.items() if gradient is not None}


def _tensors(model: MaskFormer | Mask2Former, params: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    """A generator's tensors from the authors'."""
    return take_tensors(shapes_of(model), generator_source(model.options), params, name)


def generator_gradients(model: MaskFormer | Mask2Former) -> dict[str, Tensor]:
    """Gradients of a generator by the authors' keys."""
    found = {name: value.grad for name, value in model.named_parameters() if value.grad is not None}
    return put_tensors(found, generator_source(model.options))


def _is_maskformer(case: Case) -> bool:
    return "expected/decoder_states" in case.tensors and "input/image_normalised" in case.tensors


def _is_mask2former_head(case: Case) -> bool:
    return "input/res5" in case.tensors and "DEC_LAYERS" in case.config


def _is_zsseg_training(case: Case) -> bool:
    prompts = "param/clip_adapter.prompt_learner.prefix_prompt" in case.tensors
    return prompts and {"input/sem_seg_0", "expected/loss/loss_ce"} <= case.tensors.keys() and not _has_anchors(case)


def _has_anchors(case: Case) -> bool:
    return any(key.startswith(("param/decoder", "param/query_embedding")) for key in case.tensors)


def _is_stage_loss(case: Case) -> bool:
    return "cost_mask" in case.config and "input/final/pred_masks" in case.tensors


KINDS: list[tuple[Callable[[Case], bool], Callable[[Case], None]]] = [
    (_is_maskformer, maskformer_small),
    (_is_mask2former_head, mask2former_head),
    (_is_stage_loss, stage_loss),
    (_is_zsseg_training, zsseg_training),
]
