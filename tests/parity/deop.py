"""Golden cases of DeOP: heatmap decoders, pooling, the last stage's loss, the whole system."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lexiseg.losses.regions import region_map_losses
from lexiseg.models.deop import DeOP
from lexiseg.models.deop_ablations import ReleasedConvAnchors, ReleasedQueryAnchors
from lexiseg.proposals.base import Proposals
from lexiseg.proposals.maskformer import MaskFormer
from lexiseg.regions.anchors import pool
from lexiseg.regions.pooling import resize_masks, unit_or_zero
from lexiseg.weights.decoupled_checkpoints import infer_anchor_options, read_parts
from lexiseg.weights.filling import authors_key
from tests.parity.case import Case, UnsupportedError
from tests.parity.clip_build import toy_sizes, under
from tests.parity.clip_texts import toy_tokenizer
from tests.parity.decoupled_clip import inputs
from tests.parity.deop_metrics import evaluation
from tests.parity.pictures import batched, normalised
from tests.parity.proposals import generator_sizes

Options = dict[str, Any]


@torch.no_grad()
def query_anchors(case: Case) -> None:
    """The query-based heatmap decoder, with every intermediate result."""
    params, config = case.params(), case.config
    options = infer_anchor_options(params)
    sizes = (options["anchor_queries"], options["anchor_layers"], config["heads"], config["dim_feedforward"])
    anchors = ReleasedQueryAnchors(config["d_model"], *sizes, 0.0).eval()
    anchors.load_state_dict(
        {name: params[str(authors_key(f"anchors.{name}", "deop"))] for name in anchors.state_dict()}
    )
    case.check_that("K", options["anchor_layers"] == config["K"], f"the file has {options['anchor_layers']}")
    case.check_stated("queries", config, {"num_queries": options["anchor_queries"]})
    features = case.input("features").permute(0, 2, 3, 1)
    grid = (int(features.shape[1]), int(features.shape[2]))
    masks = resize_masks(case.input("mask_logits").sigmoid(), grid)
    case.check("mask_downsampled", masks)
    case.check("pos", anchors.positions(features).transpose(0, 1).expand(-1, len(features), -1))
    case.check("attention_before_mask", anchors.attention(features).flatten(3))
    states: list[Tensor] = []
    for layer in anchors.layers:
        layer.register_forward_hook(lambda _, __, found: states.append(found))
    case.check("outlayer_query", anchors.decoded(features))
    heatmaps = anchors(features, masks)
    pooled = pool(features, heatmaps)
    case.check("heatmap_per_head", heatmaps)
    case.check("heatmap_mean", heatmaps.mean(dim=1))
    case.check("pooled_before_norm", pooled)
    case.check("pooled", unit_or_zero(pooled))
    # The authors' code also returns the layers' outputs under a norm that nothing else uses.
    norm = [
        F.layer_norm(state, state.shape[-1:], params["decoder.norm.weight"], params["decoder.norm.bias"])
        for state in states[: len(anchors.layers)]
    ]
    case.check("hs", torch.stack([*norm, unit_or_zero(pooled)]))


@torch.no_grad()
def conv_anchors(case: Case) -> None:
    """The convolutional heatmap decoder as released."""
    params = case.params()
    sizes = {"d_model": params["decoderConv.weight"].shape[1]}
    for mode in case.config["modes"]:
        sizes["num_queries"] = case.input(f"{mode}/mask_logits").shape[1]
        case.check_stated(f"{mode}: sizes", case.config, sizes)
        features = unit_or_zero(case.input(f"{mode}/features"))
        masks = case.input(f"{mode}/mask_logits").sigmoid()
        masks = resize_masks(masks, (int(features.shape[1]), int(features.shape[2])))
        anchors = ReleasedConvAnchors(features.shape[-1], "sigmoid" if mode.endswith("sigmoid") else "softmax")
        anchors.load_state_dict({"weight": params["decoderConv.weight"]})
        heatmaps = anchors(features, masks)
        case.check(f"{mode}/scores", anchors.scores(features, masks))
        case.check(f"{mode}/heatmap", heatmaps.mean(dim=1))
        case.check(f"{mode}/pooled", pool(features, heatmaps))


def map_loss(case: Case) -> None:
    """The loss of the last stage and its gradients, at each steepness."""
    weights = case.config["weights"]
    case.check_stated("classes", case.config, {"num_classes": case.input("pred_logits").shape[-1] - 1})
    for scale in case.config["output_sig"]:
        logits, masks = (case.input(name).clone().requires_grad_() for name in ("pred_logits", "pred_masks"))
        labels = case.input("sem_seg").long()
        labels[labels == case.config["ignore"]] = 255
        parts = region_map_losses(
            logits.softmax(dim=-1),
            masks,
            labels,
            scale=scale,
            focal_weight=weights["loss_ce"],
            dice_weight=weights["loss_decoder_dice"],
        )
        parts.total.backward()
        case.check(f"sig{scale}/loss_ce", parts.mask / weights["loss_ce"])
        case.check(f"sig{scale}/loss_decoder_dice", parts.dice / weights["loss_decoder_dice"])
        case.check(f"sig{scale}/total", parts.total)
        for name, given in (("grad_logits", logits), ("grad_masks", masks)):
            if given.grad is not None:
                case.check(f"sig{scale}/{name}", given.grad)


def severance_options(mode: dict[str, Any], blocks: list[int]) -> Options:
    """Options of the severance that a mode of a case asks for."""
    severed, softmax, alphas = (mode.get(key) for key in ("maskselfattn", "maskselfattnsoftmax", "gps_alpha_paper"))
    if not blocks:
        return {"severance": "none"}
    kind = "released" if not severed else "mps" if softmax else "gps"
    options: Options = {"severance": kind, "severed_blocks": tuple(blocks)}
    if kind == "gps" and alphas:
        options["alpha"] = tuple(float(alphas.get(str(index), 1.0)) for index in blocks)
    return options


def build(case: Case, names: list[str], options: Options) -> DeOP:
    """The case's model through the converter, with what only the JSON can tell."""
    config = case.config["config"]
    params = case.params()
    model, unused = read_parts(
        params,
        kind="deop",
        heads=config["vh"],
        text_heads=config["th"],
        generator={"heads": config["nh"]},
        tokenizer=toy_tokenizer(case, under(params, "clip_adapter."), names),
        options={"anchor_dropout": 0.0, "prompt_dropout": 0.0, **options},
        name=case.name,
    )
    if unused:
        case.notes.append(f"{len(unused)} parameters take part in no computation")
    assert isinstance(model, DeOP)
    check_sizes(case, model)
    in_double(model)
    return model


def check_sizes(case: Case, model: DeOP) -> None:
    """Compare the sizes of the JSON with the model's."""
    config, params = case.config["config"], case.params()
    options = infer_anchor_options(params)
    generator = model.generator
    assert isinstance(generator, MaskFormer)
    sizes = {
        **toy_sizes(model.clip, stated=config["res"]),
        **generator_sizes(generator),
        "n_train": len(config["train_names"]),
    }
    sizes["npre"] = len(params["clip_adapter.prompt_learner.prefix_prompt"])
    if options["heatmaps"] == "query-released":
        sizes["K"] = options["anchor_layers"]
        sizes |= {"dff": options["anchor_hidden"]} if "anchor_hidden" in options else {}
    tables = [key for key in params if key.endswith("learned_position")]
    if tables:
        rows = len(params["clip_adapter.clip_model.visual.learned_position"])
        patch, side = model.clip.image_tower.patch_size, round((rows - 1) ** 0.5)
        sizes["run"] = config["run"] if config["run"] // patch == side else patch * side
        blocks = {int(key.split("resblocks.")[1].split(".")[0]) for key in tables if "resblocks" in key}
        case.check_that("pl", set(config["pl"]) == blocks, f"the file has tables in {sorted(blocks)}")
    case.check_stated("sizes", config, sizes)


def in_double(model: DeOP) -> None:
    """Run the generator in double precision, from and to single.

    With random weights some of its queries amplify rounding a hundredfold, to more than half of what a case may differ;
    this leaves the authors' share of that. The generator has cases of its own in single precision.
    """
    generator = model.generator.double()
    generator.register_forward_pre_hook(lambda _, arguments: (arguments[0].double(), *arguments[1:]))
    generator.register_forward_hook(lambda _, __, found: in_single(found))


def in_single(found: Proposals) -> Proposals:
    embeddings = None if found.embeddings is None else found.embeddings.float()
    return Proposals(found.mask_logits.float(), embeddings, found.valid)


@torch.no_grad()
def inference(case: Case) -> None:
    """One picture through the whole system, padded, cut and resized, with every intermediate result."""
    config, names = case.config["config"], case.config["config"]["test_names"]
    model = build(case, names, severance_options(case.config, config["lm"]))
    image = normalised(case.input("image"))[None]
    size = (int(image.shape[-2]), int(image.shape[-1]))
    padded = model.pad(image)
    case.check("images_normalised_padded", padded)
    features = model.encode_images(image)
    proposals = model.propose(padded)
    case.check("pred_mask_logits", proposals.mask_logits)
    if proposals.embeddings is not None:
        case.check("pred_query_embeddings", proposals.embeddings)
    if case.has("res5"):
        case.check("res5", model.generator.backbone(padded.double())[-1])  # type: ignore[operator]
    case.check("clip_features", model.patches(padded, proposals.mask_logits, size))
    case.check("pooled", features.values["regions"])
    text = learned_text(model, names)
    case.check("text_rows", model.text_rows(text))
    case.check("class_logits", model.class_logits(features.values["regions"], text))
    masks = model.upsampled(proposals.mask_logits, padded)[..., : size[0], : size[1]]
    if case.has("pred_masks_returned"):
        count = len(case.tensors["expected/pred_masks_returned"])
        case.check("pred_masks_returned", masks[0, :count])
    scores = model.score(features, text)
    case.check("sem_seg_input_res", scores.dense(size)[0])
    output = tuple(case.config["output_size"])
    case.check("sem_seg", scores.dense(output)[0])
    if case.has("labels"):
        case.check_labels("labels", scores.label_map(output)[0], case.tensors["expected/sem_seg"][None])


def learned_text(model: DeOP, names: list[str]) -> Tensor:
    """Text of the names with the model's own prompt."""
    if model.prompt is None:
        raise UnsupportedError("the case has no learned prompt")
    return model.prompt(model.clip, names)


@torch.no_grad()
def batches(case: Case) -> None:
    """Pictures of several sizes in one padded frame, in several variants of the system."""
    names = case.config["config"]["test_names"]
    images = [normalised(case.input(f"image_{index}")) for index in range(case.numbered("image_"))]
    batch = batched(images, 1)
    for name, mode in case.config["modes"].items():
        options = severance_options(mode, mode["layermaskvit"])
        switches = mode.get("opts", [])
        for key, value in zip(switches[::2], switches[1::2], strict=True):
            if key != "MODEL.MASK_FORMER.MASKDOWNSAMPLE":
                raise UnsupportedError(f"mode {name} sets {key}, which is not known")
            options["masks"] = "patches-twice" if value else "sigmoid"
        model = build(case, names, options)
        text = learned_text(model, names)
        features = model.encode_images(batch)
        for index, image in enumerate(images):
            size = (int(image.shape[1]), int(image.shape[2]))
            scores = model.score(replace(features, size=size), text)[index]
            case.check(f"{name}/sem_seg_{index}", scores.dense(size)[0])


@torch.no_grad()
def baseline(case: Case) -> None:
    """The baseline without heatmaps, in the variants of the released bytecode."""
    config, names = case.config["config"], case.config["config"]["test_names"]
    image = normalised(case.input("image"))[None]
    for name, mode in case.config["modes"].items():
        masks = "patches" if mode["cls"].endswith("MaskSelfAttn") else "logits"
        options = {**severance_options(mode, config["lm"]), "class_scores": "cosine", "masks": masks}
        model = build(case, names, options)
        text = learned_text(model, names)
        case.check("text", text)
        features = model.encode_images(image)
        regions = features.values["regions"]
        case.check(f"{name}/pooled_unit", regions)
        case.check(f"{name}/logits", model.class_logits(regions, text)[..., :-1])
        case.check(f"{name}/sem_seg", model.score(features, text).dense(tuple(case.config["output_size"]))[0])


def training(case: Case) -> None:
    """A step of the last stage: what trains, predictions, losses and gradients."""
    config, names = case.config["config"], case.config["config"]["train_names"]
    weights = case.config["loss_weights"]
    options = {
        **severance_options(case.config, config["lm"]),
        "squash": case.config["output_sig"],
        "focal_weight": weights["loss_ce"],
        "dice_weight": weights["loss_decoder_dice"],
    }
    model = build(case, names, options)
    model.train()
    keys = {name: authors_key(name, "deop") for name in model.trainable_names()}
    wanted = set(case.config["trainable"]) - set(case.config.get("zero_grad", []))
    differ = sorted(wanted ^ {str(key) for key in keys.values()})
    case.check_that("what trains", not differ, f"it differs in {differ[:3]}")
    count = case.numbered("image_")
    # A batch is padded to its largest picture, and with labels of no class.
    images = batched([normalised(case.input(f"image_{index}")) for index in range(count)], 1)
    labels = batched([case.input(f"sem_seg_{index}").long() for index in range(count)], 1, 255)
    text = learned_text(model, names)
    with torch.no_grad():
        features = model.encode_images(images)
        case.check("pred_logits", model.class_logits(features.values["regions"], text))
        case.check("pred_masks", features.values["mask_logits"])
    losses = model.losses(images, labels, text)
    case.check("loss/loss_ce", losses["loss_mask"])
    case.check("loss/loss_decoder_dice", losses["loss_dice"])
    case.check("loss/total", losses["loss"])
    losses["loss"].backward()
    total = torch.zeros(())
    for name, parameter in model.trainable_parameters():
        if parameter.grad is not None:
            case.check(f"grad/{keys[name]}", parameter.grad)
            total += parameter.grad.square().sum()
    case.check("grad_norm/all", total.sqrt())


def _param(case: Case, key: str) -> bool:
    return f"param/{key}" in case.tensors


def _pooled(case: Case) -> bool:
    return bool(case.expected_names()) and any(name.endswith("/pooled_unit") for name in case.expected_names())


KINDS: list[tuple[Callable[[Case], bool], Callable[[Case], None]]] = [
    (lambda case: "features" in inputs(case) and _param(case, "query_embedding.weight"), query_anchors),
    (lambda case: _param(case, "decoderConv.weight") and "vw" not in case.config.get("config", {}), conv_anchors),
    (lambda case: isinstance(case.config.get("output_sig"), list) and "pred_masks" in inputs(case), map_loss),
    (lambda case: _pooled(case) and _param(case, "clip_adapter.clip_model.visual.proj"), baseline),
    (lambda case: _param(case, "query_embedding.weight") and "loss_weights" in case.config, training),
    (lambda case: _param(case, "query_embedding.weight") and "image" in inputs(case), inference),
    (lambda case: _param(case, "query_embedding.weight") and "image_0" in inputs(case), batches),
    (lambda case: "base" in case.config and "scores_0" in inputs(case), evaluation),
]
