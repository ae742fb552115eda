"""Golden cases of MAFT, its three hosts and SimBaseline: crops, ensembles, losses, whole models."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lexiseg.clip.text import TextEmbedder
from lexiseg.models.base import ImageFeatures
from lexiseg.models.maft import MaskAttention
from lexiseg.models.region_base import RegionModel
from lexiseg.models.region_models import FreeSeg, ZSSeg
from lexiseg.models.zegformer import ZegFormer
from lexiseg.proposals.base import Proposals
from lexiseg.proposals.mask2former import Mask2Former
from lexiseg.proposals.maskformer import MaskFormer
from lexiseg.regions.ensemble import EnsembleOptions, ensemble
from lexiseg.templates import IMAGENET_SELECT, IN_THE_SCENE
from lexiseg.weights.decoupled_checkpoints import read_parts
from tests.parity.case import Case, UnsupportedError
from tests.parity.clip_build import text_sizes, under, vision_sizes
from tests.parity.clip_texts import prompt_sizes
from tests.parity.decoupled_clip import inputs
from tests.parity.pictures import batched, normalised
from tests.parity.proposals import generator_gradients, generator_sizes, interaction_sizes, mask2former_sizes
from tests.parity.region_parts import (
    GIVEN,
    SOFTMAX,
    check_output,
    classify,
    classify_zegformer,
    ensembles,
    flags,
    losses,
    merge,
    region_crops,
    toy_clip,
    vocabulary,
)
from tests.parity.rounding import check_gradients, in_double, stirred

# Whole models.


def read(case: Case, **options: Any) -> RegionModel:
    """The model of a case, through the converter, with what only the JSON can tell."""
    config = case.config
    small = config.get("config", config)
    interaction = config.get("interaction") or {}
    model, _ = read_parts(
        case.params(),
        heads=small.get("vision_heads", small.get("vh")),
        text_heads=small.get("text_heads", small.get("th")),
        generator={"heads": small.get("nheads", small.get("nh")), "interaction_heads": interaction.get("heads")},
        options=options,
        name=case.name,
    )
    assert isinstance(model, RegionModel)
    return model


def whole_images(case: Case) -> list[Tensor]:
    return [case.input(f"image.{index}") for index in range(len(case.config["sizes"]))]


def words(model: RegionModel, names: list[str]) -> Tensor:
    """Text rows of names: of learned prompts with a gradient."""
    if model.prompts is not None:
        return model.prompts(model.clip, names)
    return model.embed_text(TextEmbedder(model.clip), vocabulary(names, model.default_templates))


def full(case: Case) -> None:
    """A whole host: proposals, crops, ensemble and label map; then the losses of its first stage and gradients."""
    config = case.config
    weight = config["ensemble_lambda"]
    if "clip_cls_style" in config:
        merges = {"cropmask": "mask-crop", "crop": "crop", "mask": "mask"}
        model = read(
            case,
            seen_offset=max(config["gzero_calibrate"], 0.0),
            ensemble={"weight": weight},
            crops={"convention": "roi-align", "merge": merges[config["clip_cls_style"]]},
        )
        names = {"train": config["seen"], "test": [*config["seen"], *config["unseen"]]}
        seen = torch.arange(len(names["test"])) < len(config["seen"])
        model.default_templates = {"single": IN_THE_SCENE, "imagenet_select": IMAGENET_SELECT}[
            config["prompt_ensemble_type"]
        ]
    else:
        crops = {"align_corners": config["interaction"] is not None, "size": config.get("crop", 224)}
        system = ZSSeg if config["interaction"] is None else FreeSeg
        stated = {"mask_weight": "mask_weight", "dice_weight": "dice_weight", "no_object_weight": "no_object"}
        criterion = system.options_class().model_dump()["criterion"]  # type: ignore[call-arg]
        criterion |= {ours: config[key] for key, ours in stated.items() if key in config}
        model = read(case, crops=crops, ensemble={"weight": weight}, criterion=criterion)
        names = {"train": config["class_names_train"], "test": config["class_names_test"]}
        seen = torch.tensor(config["trainable_flag"]).bool()
    check_sizes(case, model)
    images = whole_images(case)
    batch = batched([normalised(image) for image in images])
    with torch.no_grad():
        text = words(model, names["test"])
        if isinstance(model, ZegFormer):
            case.check("text_features_test", text[:, 0])
            case.check("text_features_test_clip", text[:, 1])
        check_backbone(case, model, batch)
        found = model.propose(batch, text)
        check_proposals(case, model, found, text)
        for index, image in enumerate(images):
            size = (int(image.shape[-2]), int(image.shape[-1]))
            features = model.proposed(ImageFeatures(size, {"images": batch[index][None]}), text)
            scores = model.score(features, text, seen=seen)
            check_output(case, "", f".{index}", scores, config["output_sizes"][index])
    text = words(model, names["train"])
    if isinstance(model, ZegFormer):
        case.check("text_features", text[:, 0])
    labels = batched([case.input(f"labels.{index}").long() for index in range(len(images))], value=255)
    result = model.losses(batch, labels, text)
    expected = {name.removeprefix("train/") for name in case.expected_names("train/")}
    case.check_stated("loss_keys", config, {"loss_keys": sorted(expected)})
    case.check_that("losses", expected == result.keys() - {"loss"}, f"{sorted(result)} instead of {sorted(expected)}")
    for name, value in result.items():
        case.check(f"train/{name}", value)
    result["loss"].backward()
    gradients = own_gradients(model)

    def again(seed: int | None) -> dict[str, Tensor]:
        fresh = copy.deepcopy(model)
        fresh.zero_grad()
        in_double((fresh,), seed)
        pixels = batch.double()
        stirred((pixels,), seed)
        rows = words(fresh, names["train"]) if fresh.prompts is not None else text.double()
        fresh.losses(pixels, labels, rows)["loss"].backward()
        return own_gradients(fresh)

    check_gradients(case, gradients, again)
    trained = {".".join(key.split(".")[:2]) for key in gradients}
    case.check_stated("trainable_top", config, {"trainable_top": sorted(trained)})


def check_sizes(case: Case, model: RegionModel) -> None:
    """Compare the JSON's sizes and counts with the model and the pictures."""
    config, generator = case.config, model.generator
    assert isinstance(generator, (MaskFormer, Mask2Former))
    found: dict[str, Any] = {
        **text_sizes(model.clip),
        **vision_sizes(model.clip, config.get("native")),
        **generator_sizes(generator),
    }
    layers = generator.options.decoder_layers
    found |= {"decoder_layers": layers, "decoder_layers_cfg": layers, "deform_encoder_layers": None}
    if isinstance(generator, Mask2Former):
        found |= mask2former_sizes(generator, case.params())
        case.check_stated("interaction", config.get("interaction") or {}, interaction_sizes(case.params()))
    if model.prompts is not None:
        found |= prompt_sizes(model.prompts.state_dict())
    found["sizes"] = [list(image.shape[-2:]) for image in whole_images(case)]
    if "class_names" in config:
        found["C"] = len(config["class_names"])
    if "class_names_train" in config:
        found["C_train"] = len(config["class_names_train"])
    found.pop("stem", None)  # here it is said in words
    case.check_stated("sizes", config, found)
    dilations = re.findall(r"dilation ([\d,]+)", config.get("resnet", ""))
    if dilations:
        body: Any = generator.backbone.body
        ours = [block.conv2.dilation[0] for block in body.layer4]
        case.check_that("dilations", ours == [int(one) for one in dilations[0].strip(",").split(",")], f"{ours}")


def check_backbone(case: Case, model: RegionModel, images: Tensor) -> None:
    """Compare feature maps."""
    for name, actual in zip(("res2", "res3", "res4", "res5"), model.generator.backbone(images), strict=True):
        check_some(case, name, actual)
    check_mask_features(case, model, images)


def check_mask_features(case: Case, model: RegionModel, images: Tensor) -> None:
    """Compare what the masks are made of; of Mask2Former before it has looked at the words."""
    if not case.has("mask_features"):
        return
    generator = model.generator
    assert isinstance(generator, (MaskFormer, Mask2Former))
    features = generator.backbone(images)
    if isinstance(generator, Mask2Former):
        actual = generator.pixel_features(features)[1]
    else:
        actual = generator.pixel_decoder(features).last_hidden_state
    check_some(case, "mask_features", actual)


def check_some(case: Case, name: str, actual: Tensor) -> None:
    """Compare with all images, or with the one that the case keeps without saying which it is."""
    if case.has(name) and len(expected := case.tensors[f"expected/{name}"]) < len(actual):
        actual = actual[(actual - expected).abs().flatten(1).amax(dim=1).argmin()][None]
    case.check(name, actual)


def check_proposals(case: Case, model: RegionModel, found: Proposals, text: Tensor) -> None:
    case.check("pred_masks", found.mask_logits)
    if found.embeddings is not None:
        case.check("pred_embed", found.embeddings)
        case.check("pred_logits", model.proposal_logits(found.embeddings, text))


def own_gradients(model: RegionModel) -> dict[str, Tensor]:
    """Gradients by the authors' keys."""
    row = "sem_seg_head.predictor.bg_feature" if isinstance(model, ZegFormer) else "clip_adapter.non_object_embedding"
    gradients = {row: model.no_object.grad, **generator_gradients(model.generator)}
    if model.prompts is not None:
        own = model.prompts.named_parameters()
        gradients |= {f"clip_adapter.prompt_learner.{name}": parameter.grad for name, parameter in own}
    if model.student is not None:
        own = model.student.named_parameters()
        gradients |= {f"IPCLIP.{name}": parameter.grad for name, parameter in own}
    return {key: gradient for key, gradient in gradients.items() if gradient is not None}


def maft_step(case: Case) -> None:
    """FreeSeg + MAFT: a training step, and what the same weights say of a picture."""
    config = case.config
    attention = {"start_block": config["start_layer"], "image_size": config["clip_size"]}
    model = read(case, attention=attention)
    assert model.student is not None and isinstance(model.region_encoder, MaskAttention)
    names = config["class_names"]
    case.check_that(
        "templates", tuple(config["templates"]) == model.default_templates, "the model has others by default"
    )
    check_sizes(case, model)
    images = whole_images(case)
    batch = batched([normalised(image) for image in images])
    with torch.no_grad():
        text = words(model, names)
        case.check("text_features", model.text_rows(text))
        check_backbone(case, model, batch)
        found = model.propose(batch, text)
        check_proposals(case, model, found, text)
        own = torch.cat(
            [model.clip_frame(one[None], tuple(image.shape[-2:])) for one, image in zip(batch, images, strict=True)]
        )
        square = model.region_encoder.square(model.clip, own)
        masks, _ = model.region_encoder.square_masks(
            model.student, square, own, found.mask_logits, tuple(batch.shape[-2:])
        )
        case.check("ip_masked", model.region_encoder.attend(model.student, square, masks))
        case.check("ip_plain", model.region_encoder.whole(model.student, square))
        for index, image in enumerate(images):
            features = ImageFeatures((image.shape[-2], image.shape[-1]), {"images": batch[index][None]})
            check_output(case, "", f".{index}", model.score(features, text), config["output_sizes"][index])
    names_trained = {f"IPCLIP.{name.removeprefix('student.')}" for name in model.trainable_names()}
    stated = {re.sub(r"\.\d+\.", ".*.", name) for name in names_trained}
    case.check_that("trainable", stated == set(config["trainable"]), f"{sorted(stated)}")
    labels = batched([case.input(f"labels.{index}").long() for index in range(len(images))], value=255)
    # Each picture is padded after it was normalised for CLIP, so pictures of several sizes have frames of their own.
    model.clip_frame = lambda *_: own  # type: ignore[method-assign]
    result = model.losses(batch, labels, text)
    case.check("ma_loss", result["loss_mask_aware"])
    case.check("dis_loss_weighted", result["loss_distillation"])
    result["loss"].backward()
    for name in case.expected_names("grad/"):
        case.check(name, own_gradients(model)[name.removeprefix("grad/")])


@torch.no_grad()
def simple_baseline(case: Case) -> None:
    """SimBaseline end to end, in each mode of its ensemble, and its classifier on given masks."""
    config = case.config["config"]
    clip, rows = toy_clip(case, under(case.params(), "clip_adapter."), config["test_names"])
    image = case.input("image")
    size = (int(image.shape[-2]), int(image.shape[-1]))
    crops = {"size": case.config.get("crop", 224)}  # what the authors' code resizes to, whatever the tower
    first = True
    for mode, given in case.config["modes"].items():
        seen = flags(given, mode)
        if mode == "direct":
            _given_masks(case, ZSSeg.build(clip, {**GIVEN, "crops": crops}), rows, seen, given["weight"])
            continue
        opts = dict(zip(given["opts"][::2], given["opts"][1::2], strict=True))
        unknown = opts.keys() - {"MODEL.CLIP_ADAPTER.CLIP_ENSEMBLE_WEIGHT", "MODEL.CLIP_ADAPTER.CLIP_ENSEMBLE"}
        if unknown:
            raise UnsupportedError(f"mode {mode} sets {sorted(unknown)[0]}, which is not known")
        options: dict[str, Any] = {"weight": opts.get("MODEL.CLIP_ADAPTER.CLIP_ENSEMBLE_WEIGHT", 0.8)}
        if not opts.get("MODEL.CLIP_ADAPTER.CLIP_ENSEMBLE", True):
            options["rule"] = "proposal"
        model, _ = read_parts(
            case.params(),
            heads=config["vh"],
            text_heads=config["th"],
            generator={"heads": config["nh"]},
            options={"crops": crops, "ensemble": options},
            tokenizer=clip.tokenizer,
            name=case.name,
        )
        assert isinstance(model, RegionModel)
        features = model.encode_images(normalised(image)[None])
        if first:
            first = False
            assert isinstance(model.generator, MaskFormer)
            case.check_stated("sizes of the generator", config, generator_sizes(model.generator))
            assert model.prompts is not None
            values = features.values
            large = model.upsampled(values["mask_logits"], values["images"])
            case.check("mask_logits", large[0, :, : size[0], : size[1]])
            case.check("proposal_logits", model.proposal_logits(values["embeddings"], rows[:-1])[0])
            encoded = features.values["encoded"][0]
            case.check("valid", encoded)
            regions = F.normalize(features.values["regions"][0], dim=-1)
            case.check("region_logits", (100 * regions @ rows.T)[encoded])
        text = words(model, config["test_names"])
        scores = model.score(features, text, seen=seen)
        output = case.config["output_size"]
        case.check(f"{mode}/sem_seg", scores.dense((output[0], output[1]))[0], tolerance=SOFTMAX)


def _given_masks(case: Case, model: Any, rows: Tensor, seen: Tensor | None, weight: float) -> None:
    image, logits = case.input("image"), case.input("direct/mask_logits")
    views = model.encode_regions(normalised(image)[None], tuple(image.shape[-2:]), Proposals(logits[None]))
    encoded = views["encoded"][0]
    case.check("direct/valid", encoded)
    case.check("direct/region_logits", (100 * F.normalize(views["regions"][0], dim=-1) @ rows.T)[encoded])
    said = model.region_probabilities(views["regions"], rows[:-1], None)[0]
    opinion = case.input("direct/cls_logits").softmax(dim=-1)[..., :-1]
    scores = ensemble(opinion, said, EnsembleOptions(weight=weight), seen=seen, encoded=encoded)
    case.check("direct/sem_seg", torch.einsum("nc,nhw->chw", scores, logits.sigmoid()), tolerance=SOFTMAX)


KINDS: list[tuple[Callable[[Case], bool], Callable[[Case], None]]] = [
    (lambda case: {"feat_masked", "feat_plain_teacher"} <= inputs(case), losses),
    (lambda case: "start_layer" in case.config and case.has("ma_loss"), maft_step),
    (lambda case: {"image", "mask_probs"} == inputs(case), merge),
    (lambda case: {"class_logits", "clip_logits", "mask_logits"} == inputs(case), ensembles),
    (lambda case: {"class_logits", "mask_logits", "image"} == inputs(case), classify),
    (lambda case: {"pred_logits", "pred_masks_stride4"} <= inputs(case), classify_zegformer),
    (lambda case: "ensemble_lambda" in case.config and case.has("train/loss_ce"), full),
    (lambda case: {"image", "masks", "name_token_ids"} <= inputs(case), region_crops),
    (lambda case: "modes" in case.config and case.has("region_logits"), simple_baseline),
]
