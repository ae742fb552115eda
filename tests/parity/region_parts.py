"""Golden cases of MAFT and its hosts, part by part: crops, ensembles, losses, the region classifier."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lexiseg.clip.model import CLIP, OPENAI_MEAN, OPENAI_STD
from lexiseg.clip.text import TextEmbedder
from lexiseg.losses import mask_aware
from lexiseg.losses.mask_aware import distillation_loss, iou_targets, mask_aware_loss, mask_ious
from lexiseg.models.base import ImageFeatures
from lexiseg.models.region_base import RegionModel
from lexiseg.models.region_models import FreeSeg, ZSSeg
from lexiseg.models.zegformer import ZegFormer
from lexiseg.normalisation import pixels_of
from lexiseg.proposals.base import Proposals
from lexiseg.regions.crops import CropEncoder, CropOptions, painted_boxes, tight_crops
from lexiseg.regions.ensemble import EnsembleOptions, ensemble
from lexiseg.scores import RegionScores
from lexiseg.vocabulary import Vocabulary, VocabularyClass
from tests.parity.case import Case, UnsupportedError
from tests.parity.clip_build import adapter_clip, text_sizes, toy_sizes, under, vision_sizes
from tests.parity.clip_texts import prompt_learner, prompt_sizes, toy_tokenizer
from tests.parity.pictures import clip_normalised, normalised, padded

_CLIP_NUMBERS = {"clip_pixel_mean": OPENAI_MEAN, "clip_pixel_std": OPENAI_STD}
# What is behind CLIP's softmax at temperature 100 multiplies its rounding.
SOFTMAX = 1e-3
LABELS = 0.005
GIVEN = {"proposals": {"kind": "ground-truth"}}  # the proposals are inputs of the case
_CROP_MODES: dict[str, Callable[[str], dict[str, Any]]] = {
    r"default": lambda _: {},
    r"matting": lambda _: {"matting": True},
    r"(?:fill_zero|zerofill)": lambda _: {"fill": "zero"},
    r"expand(\d)(\d*)": lambda digits: {"expand": float(f"{digits[0]}.{digits[1:] or 0}")},
    r"thr(\d)(\d*)": lambda digits: {"threshold": float(f"{digits[0]}.{digits[1:] or 0}")},
}


def crop_options(mode: str, **more: Any) -> CropOptions:
    """Options of a crop mode, read off its name; several are joined by an underscore."""
    options: dict[str, Any] = {}
    rest = mode
    while rest:
        for pattern, make in _CROP_MODES.items():
            found = re.match(rf"{pattern}(?:_|$)", rest)
            if found:
                options |= make("".join(found.groups()))
                rest = rest[found.end() :]
                break
        else:
            raise UnsupportedError(f"there is no crop mode '{mode}'")
    return CropOptions(**{**options, **more})


def check_sub(case: Case, name: str, actual: Tensor, tolerance: float | None = None) -> None:
    """Compare with a tensor stored at every k-th pixel. Where its size allows several k, values tell them apart."""
    if not case.has(name):
        return
    expected = case.tensors[f"expected/{name}"]
    sizes = actual.shape[-2:]
    steps = [k for k in range(1, max(sizes) + 1) if tuple(-(-size // k) for size in sizes) == expected.shape[-2:]]
    found = [actual[..., ::k, ::k] for k in steps if actual[..., ::k, ::k].shape == expected.shape]
    best = min(found, key=lambda part: float((part - expected).abs().max()), default=actual)
    case.check(name, best, tolerance=tolerance)


def stated_sub(case: Case) -> tuple[slice, slice]:
    """Rows and columns of the crops that a case keeps, as its JSON has it: "[:, :, 3::7, 3::7]"."""
    found = re.findall(r"(\d*)::(\d+)", case.config["sub"])
    if len(found) != 2:
        raise UnsupportedError(f"'{case.config['sub']}' does not say which pixels are kept")
    rows, columns = (slice(int(offset or 0), None, int(step)) for offset, step in found)
    return rows, columns


def check_map(case: Case, name: str, scores: Tensor) -> None:
    """Compare a label map with the best of our scores (C, H, W); a few pixels near ties may differ."""
    if not case.has(name):
        return
    case.touched.add(f"expected/{name}")
    expected = case.tensors[f"expected/{name}"].long()
    labels = scores.argmax(dim=0)
    share = float((labels != expected).float().mean())
    theirs = scores.gather(0, expected[None])[0]
    gap = float((scores.amax(dim=0) - theirs).max() / scores.abs().max())
    fine = share <= LABELS and gap <= 2 * SOFTMAX
    case.check_that(name, fine, f"{share:.2%} of the labels differ, by {gap:.1e} of the scores at most")
    if share:
        case.notes.append(f"{name}: {share:.3%} of the labels differ, at ties within {gap:.1e}")


# Losses.


def losses(case: Case) -> None:
    """Mask-aware loss and self-distillation, with gradients."""
    config = case.config
    text, labels = case.input("text_features")[:-1], case.input("labels").long()
    shape = dict(zip("BNDHW", (*case.input("feat_masked").shape, *labels.shape[-2:]), strict=True))
    constants = {"eps_iou": mask_aware.EPS_IOU, "eps_norm": mask_aware.EPS_RANGE}
    case.check_stated("stated sizes and constants", config, {**shape, "C": len(text), **constants})
    regions, plain = (case.input(name).clone().requires_grad_() for name in ("feat_masked", "feat_plain_student"))

    def probabilities(x: Tensor) -> Tensor:
        return (config["temperature"] * F.normalize(x, dim=-1) @ text.T).softmax(dim=-1)

    masks = F.interpolate(case.input("mask_logits"), size=labels.shape[-2:], mode="bilinear", align_corners=True)
    masks, scores = masks.sigmoid(), probabilities(regions)
    if case.has("mask_probs"):
        case.check("mask_probs", masks[:, : case.tensors["expected/mask_probs"].shape[1]])
    found = [mask_ious(mask, label, len(text)) for mask, label in zip(masks, labels, strict=True)]
    ious = torch.cat([rows for rows, _ in found])
    targets = torch.cat([iou_targets(rows) for rows, _ in found])
    case.check("iou", ious)
    case.check("iou_norm", targets)
    rows = torch.cat([score[:, present].T for score, (_, present) in zip(scores, found, strict=True)])
    loss = mask_aware_loss(rows, targets)
    teacher = probabilities(case.input("feat_plain_teacher"))
    distillation = config["dis_weight"] * distillation_loss(probabilities(plain), teacher)
    total = loss + distillation
    total.backward()
    case.check("ma_loss", loss)
    case.check("dis_loss_weighted", distillation)
    case.check("total", total)
    for name, tensor in (("feat_masked", regions), ("feat_plain_student", plain)):
        if tensor.grad is not None:
            case.check(f"grad/{name}", tensor.grad)


# Crops.


def merge(case: Case) -> None:
    """Mask & crop of FreeSeg and ZSSeg, with its variants."""
    config = case.config
    image, masks = clip_normalised(case.input("image")), case.input("mask_probs")
    black = clip_normalised(torch.zeros(3, 1, 1)).flatten()
    rows, columns = stated_sub(case)
    sizes = dict(zip("NHW", masks.shape, strict=True))
    case.check_stated("sizes and fill", config, {**sizes, "fill_mean": [255 * value for value in OPENAI_MEAN]})
    for mode in sorted({name.split("/")[0] for name in case.expected_names()}):
        options = crop_options(mode, align_corners="align_corners=True" in config["resize"])
        crops = tight_crops(image, [masks], options, size=config["out"], black=black)
        case.check(f"{mode}/valid", crops.valid)
        case.check(f"{mode}/boxes", crops.boxes)
        case.check(f"{mode}/crops_sub", crops.images[..., rows, columns])
        case.check(f"{mode}/crops_mean", crops.images.mean(dim=(2, 3)), zero_below=1e-6)
        case.check(f"{mode}/crops_std", crops.images.std(dim=(2, 3)))
        raw = list(painted_boxes(image, masks[crops.valid], crops.boxes, options, black))
        for name in case.expected_names(f"{mode}/"):
            stem, _, index = name.rpartition("_")
            if stem == f"{mode}/full_crop":
                check_sub(case, name, crops.images[int(index)][None])
            elif stem == f"{mode}/unresized":
                case.check(name, raw[int(index)][None])
            elif stem == f"{mode}/unnormalised":
                case.check(name, 255 * pixels_of(raw[int(index)], OPENAI_MEAN, OPENAI_STD)[None])


def region_crops(case: Case) -> None:
    """SimBaseline's region classifier: crops, features and logits in each mode."""
    params = under(case.params(), "clip_adapter.")
    clip, rows = toy_clip(case, params, case.config["config"]["test_names"])
    case.check("text_rows", rows)
    image, masks = clip_normalised(case.input("image")), case.input("masks")
    size = case.config.get("crop", 224)  # what the authors' code resizes to, whatever the tower
    names = {
        "mask_matting": "matting",
        "mask_fill": "fill",
        "mask_expand_ratio": "expand",
        "mask_thr": "threshold",
    }
    model = ZSSeg.build(clip, GIVEN)
    assert isinstance(model, ZSSeg) and isinstance(model.region_encoder, CropEncoder)
    for mode, given in case.config["modes"].items():
        options = CropOptions(size=size, **{names[key]: value for key, value in given.items()})
        black = clip_normalised(torch.zeros(3, 1, 1)).flatten()
        crops = tight_crops(image, [masks], options, size=size, black=black)
        case.check(f"{mode}/valid", crops.valid)
        case.check(f"{mode}/boxes", crops.boxes)
        for name in case.expected_names(f"{mode}/regions_every"):
            step = int(name.rpartition("every")[2])
            case.check(name, crops.images[..., ::step, ::step])
        moments = torch.stack([crops.images.mean(dim=(2, 3)), crops.images.std(dim=(2, 3))], dim=-1)
        case.check(f"{mode}/regions_mean_std", moments)
        features = F.normalize(model.region_encoder.embed_crops(clip.visual, crops.images), dim=-1)
        case.check(f"{mode}/region_features", features)
        case.check(f"{mode}/logits", 100 * features @ rows.T)


# Ensembles.


def flags(config: dict[str, Any], name: str) -> Tensor | None:
    given = config.get("trainable_flag")
    return None if name.endswith("noflag") or given is None else torch.tensor(given).bool()


def check_ensembles(
    case: Case, opinion: Tensor, said: Tensor, masks: Tensor, encoded: Tensor, drops: Callable[[str], bool]
) -> None:
    """Every ensemble of a case, by the weight and the flags in its name."""
    weights = set()
    for name in sorted({key.rsplit("/", 1)[0] for key in case.expected_names() if "lambda" in key}):
        weight = float(re.findall(r"lambda(-?[\d.]+(?:e-?\d+)?)_", name)[0])
        weights.add(weight)
        options = EnsembleOptions(weight=weight)
        alone = weight <= 0 and not drops(name)
        scores = ensemble(opinion, said, options, seen=flags(case.config, name), encoded=None if alone else encoded)
        kept = scores[encoded] if weight <= 0 and not alone else scores
        case.check(f"{name}/class_scores", kept, tolerance=SOFTMAX)
        pixels = torch.einsum("nc,nhw->chw", scores, masks)
        for key in (f"{name}/sem_seg", f"{name}/sem_seg_sub"):
            check_sub(case, key, pixels, SOFTMAX)
        check_map(case, f"{name}/label_map", pixels)
    stated = case.config.get("lambdas")
    if stated is not None:
        case.check_stated("lambdas", {"lambdas": sorted(stated)}, {"lambdas": sorted(weights)})


def ensembles(case: Case) -> None:
    """The ensemble and the final combination, alone."""
    masks = case.input("mask_logits").sigmoid()
    encoded = (masks > 0.5).flatten(1).any(dim=1)
    case.check("valid", encoded)
    sizes = dict(zip("NHW", masks.shape, strict=True))
    case.check_stated("sizes", case.config, {**sizes, "C": case.input("class_logits").shape[-1] - 1})
    opinion = case.input("class_logits").softmax(dim=-1)[..., :-1]
    said = case.input("clip_logits")[..., :-1].softmax(dim=-1)
    check_ensembles(case, opinion, said, masks, encoded, lambda name: "maft" not in name)
    pixels = torch.einsum("nc,nhw->chw", opinion, masks)
    check_sub(case, "proposal_only/sem_seg", pixels)
    check_map(case, "proposal_only/label_map", pixels)


# The region classifier with given proposals.


def toy_clip(case: Case, adapter: dict[str, Tensor], names: list[str]) -> tuple[CLIP, Tensor]:
    """CLIP with a toy vocabulary, and the text rows of ``names`` with "no object" behind them."""
    config = case.config["config"]
    clip = adapter_clip(adapter, config, toy_tokenizer(case, adapter, names))
    case.check_stated("sizes of the towers", config, toy_sizes(clip, stated=config["res"]))
    rows = prompt_learner(under(adapter, "prompt_learner."))(clip, names).detach()
    return clip, torch.cat([rows, F.normalize(adapter["non_object_embedding"], dim=-1)])


@torch.no_grad()
def classify(case: Case) -> None:
    """FreeSeg's and ZSSeg's crops, CLIP scores, ensembles and label maps, given proposals."""
    config, adapter = case.config, under(case.params(), "clip_adapter.")
    clip = adapter_clip(adapter, config)
    learner, task = prompt_learner(under(adapter, "prompt_learner.")), config.get("task")
    rows = learner(clip, config["class_names"], task)
    rows = torch.cat([rows, F.normalize(adapter["non_object_embedding"], dim=-1)])
    case.check("text_features", rows)
    system = FreeSeg if config.get("task") else ZSSeg
    crops = system.options_class().model_dump()["crops"]  # type: ignore[call-arg]
    crops |= {"size": config["crop"], "threshold": config["mask_thr"], "fill": config["mask_fill"]}
    model = system.build(clip, {**GIVEN, "crops": crops})
    assert isinstance(model, RegionModel)
    image, logits = case.input("image"), case.input("mask_logits")
    size = (int(image.shape[-2]), int(image.shape[-1]))
    found = {**text_sizes(clip), **vision_sizes(clip, config["native"]), **prompt_sizes(learner.state_dict())}
    found |= {"N": len(logits), "H": size[0], "W": size[1], "C": len(config["class_names"])}
    case.check_stated("sizes", config, found)
    views = model.encode_regions(normalised(image)[None], size, Proposals(logits[None]))
    encoded = views["encoded"][0]
    case.check("valid", encoded)
    case.check("clip_logits", (100 * F.normalize(views["regions"][0], dim=-1) @ rows.T)[encoded])
    said = model.region_probabilities(views["regions"], rows[:-1], None)[0]
    case.check("clip_probs", said[encoded], tolerance=SOFTMAX)
    opinion = case.input("class_logits").softmax(dim=-1)[..., :-1]
    check_ensembles(case, opinion, said, logits.sigmoid(), encoded, lambda name: True)


@torch.no_grad()
def classify_zegformer(case: Case) -> None:
    """ZegFormer's three merges, its CLIP scores, ensembles and calibration, given proposals."""
    config = case.config
    clip = adapter_clip(under(case.params(), "sem_seg_head.predictor."), config)
    names = [*config["seen"], *config["unseen"]]
    numbers = {name: [255 * value for value in values] for name, values in _CLIP_NUMBERS.items()}
    sizes = {"N": case.input("pred_logits").shape[1], **text_sizes(clip), **vision_sizes(clip, config["native"])}
    case.check_stated("sizes and normalisation", config, {**sizes, **numbers})
    rows, columns = stated_sub(case)
    images = [case.input(f"image.{index}") for index in range(len(config["sizes"]))]
    case.check_stated("sizes of pictures", config, {"sizes": [list(image.shape[-2:]) for image in images]})
    frame = tuple(config["padded"])
    batch = torch.stack([padded(normalised(image), frame) for image in images])
    seen = torch.arange(len(names)) < len(config["seen"])
    mask_logits, class_logits = case.input("pred_masks_stride4"), case.input("pred_logits")
    merges = {"cropmask": "mask-crop", "crop": "crop", "mask": "mask"}
    for style, joined, for_all, offset in config["modes"]:
        # Where it is joined for all classes, none counts as seen.
        rule, flagged = "released" if joined or for_all else "region", seen if joined else None
        options = {
            "crops": {"convention": "roi-align", "merge": merges[style]},
            "ensemble": {"rule": rule, "weight": config["ensemble_lambda"]},
            "seen_offset": max(offset, 0.0),
        }
        model = ZegFormer.build(clip, {**GIVEN, **options})
        assert isinstance(model, ZegFormer) and isinstance(model.region_encoder, CropEncoder)
        text = model.embed_text(TextEmbedder(clip), vocabulary(names))
        case.check("text_features_test_clip", text[:, 1])
        cut, found, scores = [], [], []
        for index, image in enumerate(images):
            size = (int(image.shape[-2]), int(image.shape[-1]))
            own = model.clip_frame(batch[index][None], size)
            cut.append(model.region_encoder.cut(clip, own[0], size, mask_logits[index]))
            found.append(model.region_encoder.embed_crops(clip.visual, cut[-1].images))
            said = model.region_probabilities(found[-1], text[:, 1], class_logits[index])
            opinion = class_logits[index].softmax(dim=-1)[..., :-1]
            scores.append(ensemble(opinion, said, model.options.ensemble, seen=flagged, seen_mean=model.seen_mean))
        crops = torch.stack([one.images for one in cut])
        case.check("boxes", torch.stack([one.boxes for one in cut]))
        case.check(f"{style}/crops_sub", crops[..., rows, columns])
        case.check(f"{style}/crops_mean", crops.mean(dim=(3, 4)), zero_below=1e-6)
        case.check(f"{style}/clip_feat", torch.stack(found))
        _check_some_crop(case, f"{style}/full_crop", crops.flatten(0, 1))
        name = f"{style}_{'ens' if joined else 'all' if for_all else 'cliponly'}_gz{offset}"
        class_scores = torch.stack(scores)
        key = f"expected/{name}/class_scores"
        if key in case.tensors and case.tensors[key].shape[-1] > len(names):  # where nothing is joined, the logits
            case.tensors[key] = case.tensors[key].softmax(dim=-1)[..., : len(names)]
        case.check(f"{name}/class_scores", class_scores, tolerance=SOFTMAX)
        for index, output in enumerate(config["output_sizes"]):
            values = {"images": batch[index][None], "mask_logits": mask_logits[index][None]}
            features = ImageFeatures(tuple(config["sizes"][index]), values)
            offsets = seen.float() * max(offset, 0.0)
            result = model.pixel_scores(class_scores[index][None], features, offsets=offsets)
            check_output(case, f"{name}/", f".{index}", result, output)


def _check_some_crop(case: Case, name: str, crops: Tensor) -> None:
    """Compare with a crop that is stored without saying which it is."""
    if case.has(name):
        expected = case.tensors[f"expected/{name}"]
        step = round(crops.shape[-1] / expected.shape[-1])
        best = int((crops[..., ::step, ::step] - expected).abs().flatten(1).amax(dim=1).argmin())
        check_sub(case, name, crops[best])


def check_output(case: Case, start: str, end: str, scores: RegionScores, size: Sequence[int]) -> None:
    """Compare dense scores and label map of one picture at its output size."""
    dense = scores.dense((size[0], size[1]))[0]
    check_sub(case, f"{start}sem_seg{end}", dense, SOFTMAX)
    check_sub(case, f"{start}sem_seg_sub{end}", dense, SOFTMAX)
    check_map(case, f"{start}label_map{end}", dense)


def vocabulary(names: Sequence[str], templates: Sequence[str] | None = None) -> Vocabulary:
    """Names as ZegFormer writes them, a comma between synonyms."""
    entries = [name.split(", ") for name in names]
    classes = tuple(VocabularyClass(first, synonyms=tuple(rest)) for first, *rest in entries)
    return Vocabulary(classes, tuple(templates)) if templates else Vocabulary(classes)
