"""Golden cases of the one-stage systems: encoder, scores, losses, gradients and sliding window."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.prompt_rows import prompts_as_rows
from lexiseg.clip.model import build_clip
from lexiseg.data.base import remap_to_seen
from lexiseg.losses.masks import pseudo_labels
from lexiseg.models.cascade_clip import CascadeCLIP
from lexiseg.models.options import format_groups
from lexiseg.models.spt_seg import SpectralLayer, SPTSeg
from lexiseg.models.zegclip import ZegCLIP
from lexiseg.scores import WindowScores
from lexiseg.weights.filling import authors_key
from lexiseg.weights.one_stage_checkpoint import read_one_stage
from lexiseg.windows import Box, cover
from tests.parity.case import Case, UnsupportedError
from tests.parity.clip_build import architecture, text_sizes, vision_sizes
from tests.references import pixel_accuracy

_AUTHORS_LOSSES = {"accuracy": "decode.acc_seg"}


def groups_of(tower: dict[str, Any]) -> str:
    """The groups of a Cascade-CLIP case: three blocks, three more, and the last, as its code has it."""
    blocks = [index + 1 for index in tower["out_indices"]]
    if len(blocks) != 6:
        raise UnsupportedError(f"a case with {len(blocks)} levels has no known groups")
    return format_groups((tuple(blocks[:3]), tuple(blocks[3:]), (tower["layers"],)))


def build(case: Case, **options: Any) -> ZegCLIP:
    """Build the model of a case from its parameters, through the converter, with what only the JSON can tell."""
    config = case.config["model_config"]
    head, tower = config["decode_head"], config["backbone"]
    loss = head.get("loss_decode", {})
    given: dict[str, Any] = {
        "decoder_heads": head.get("num_heads", 8),
        "mask_size": head.get("img_size"),
        "seen_offset": 0.0 if config.get("self_training") else 0.1,
        "mask_weight": loss.get("mask_weight", 20.0) * loss.get("loss_weight", 1.0),
        "dice_weight": loss.get("dice_weight", 1.0) * loss.get("loss_weight", 1.0),
        "dropout": 0.0,
        "prompt_dropout": 0.0,
        **options,
    }
    if len(tower.get("out_indices", [])) > 1:
        given["groups"] = groups_of(tower)
    if "param/backbone.complex_weight" in case.tensors:
        keys = config.get("exclude_key", [])
        keys = [keys] if isinstance(keys, str) else keys
        given["train_filter"] = any(key in "backbone.complex_weight" for key in keys)
    model, unused = read_one_stage(
        case.params(),
        heads=tower["heads"],
        text_heads=config.get("text_encoder", {}).get("transformer_heads"),
        options=given,
        name=case.name,
    )
    stated = (tower.get("total_d_layer", 11), head.get("num_layers", 3))
    depth = stated[0] if model.prompts is None else model.prompts.depth
    found = (depth, model.options.decoder_layers)
    case.check_that("configuration", stated == found, f"the file gives {found} and the JSON {stated}")
    case.check_stated("projected memory", head, {"use_proj": False})
    check_stated_sizes(case, model)
    if unused:
        case.notes.append(f"{len(unused)} parameters take part in no computation")
    return model


def check_stated_sizes(case: Case, model: ZegCLIP) -> None:
    """Compare the sizes and the classes of the JSON with the model and the inputs."""
    config, clip = case.config["model_config"], model.clip
    tower, head, text = config["backbone"], config["decode_head"], config.get("text_encoder", {})
    seen = vision_sizes(clip)
    prompts = case.tensors.get("param/backbone.prompt_embeddings")
    seen |= {} if prompts is None else {"num_tokens": prompts.shape[1], "prompt_dim": prompts.shape[2]}
    # A resolution that is no multiple of the patch has as many patches as fit whole, as in CLIP's constructor.
    patch, stated = clip.image_tower.patch_size, tower.get("input_resolution", 0)
    seen["input_resolution"] = stated if stated // patch == stored_side(case) else patch * stored_side(case)
    case.check_stated("sizes of the tower", tower, seen)
    dim = clip.embed_dim
    levels = len(tower.get("out_indices", [0]))
    widths = dict.fromkeys(("in_channels", "channels", "embed_dims"), dim)
    case.check_stated("sizes of the head", head, {**widths, "use_stages": levels})
    if "param/text_encoder.token_embedding.weight" in case.tensors:
        sizes = {**text_sizes(clip), "embed_dim": dim, "vocab_size": text_sizes(clip)["vocab"]}
        sizes |= {f"transformer_{key}": sizes[key] for key in ("width", "layers")}
        case.check_stated("sizes of the text tower", text, sizes)
    weights = case.tensors.get("param/decode_head.loss_decode.criterion.empty_weight")
    if weights is not None:
        case.check_stated("classes of the loss", head, {"num_classes": len(weights) - 1})
        loss = {"num_classes": len(weights) - 1, "dec_layers": model.options.decoder_layers}
        case.check_stated("classes of the loss", head.get("loss_decode", {}), loss)
    if config.get("ft_backbone"):
        raise UnsupportedError("a case whose backbone is tuned as a whole is not known")
    if {"input/seen_idx", "input/unseen_idx"} <= case.tensors.keys():
        ids = case.input("seen_idx").tolist()
        every = sorted({*ids, *case.input("unseen_idx").tolist()})
        case.check_stated("classes of the head", head, {"seen_idx": ids, "all_idx": every})
        unseen = [index for index in every if index not in ids]
        stated = {"base_class": ids, "novel_class": unseen, "both_class": every}
        case.check_stated("classes", config, stated)
        names = {"number": len(config.get("class_names", every))}
        case.check_stated("class names", names, {"number": len(every)})


def stored_side(case: Case) -> int:
    """Patches a side of the position table in the file."""
    return round((len(case.tensors["param/backbone.positional_embedding"]) - 1) ** 0.5)


def compare_blocks(case: Case, model: ZegCLIP, images: Tensor) -> None:
    """Compare the blocks' outputs, prompts' rows included."""
    names = case.expected_names("block_")
    if not names:
        return
    with torch.no_grad(), prompts_as_rows(model):
        result = model.run_tower(images, levels=range(model.clip.image_tower.num_blocks))
    for name in names:
        case.check(name, result.levels[int(name.split("_")[1])].transpose(0, 1))


def compare_features(case: Case, model: ZegCLIP, images: Tensor) -> None:
    """Compare the class embedding and the patches of each level, the final ones last."""
    with torch.no_grad():
        blocks = model.level_blocks if isinstance(model, CascadeCLIP) else ()
        result = model.run_tower(images, levels=blocks)
        cls, patches = model.project_tokens(result)
        levels = [
            model.project_level(index, result.levels[block][:, -result.num_patches :])
            for index, block in enumerate(blocks)
        ]
    case.check("cls", cls)
    for index, level in enumerate([*levels, patches]):
        case.check(f"patch_feature_{index}", level.unflatten(1, result.grid).permute(0, 3, 1, 2))


def compare_spectral(case: Case, model: ZegCLIP, images: Tensor) -> None:
    """Compare what the filter adds before the first two blocks, and the first layer's high and low frequencies."""
    if not isinstance(model, SPTSeg):
        return
    added: list[Tensor] = []
    handle = model.spectral.register_forward_hook(lambda module, inputs, output: added.append(output))
    with torch.no_grad():
        features = model.encode_images(images)
    handle.remove()
    case.check("spectral_prompt_call0_p0", added[0])
    case.check("spectral_prompt_call1_p1", added[1].transpose(0, 1))
    head = model.heads()[0]
    memory, layer = features.values[head.feature], head.decoder.layers[0]
    if isinstance(layer, SpectralLayer):
        guide, grid = layer.guide, (memory.shape[1], memory.shape[2])
        with torch.no_grad():
            parts = {
                "hf": guide.high_frequency(memory.flatten(1, 2), grid),
                "lf": guide.low_frequency(memory.flatten(1, 2), grid),
            }
        for name, part in parts.items():
            # The authors' maps are padded; what lies in the padding is cut off later, and lexiseg has less of it.
            key = f"expected/sgd_layer0_{name}_padded"
            if key in case.tensors:
                case.tensors[key] = case.tensors[key][:, : grid[0], : grid[1]].contiguous()
            case.check(f"sgd_layer0_{name}_padded", part.unflatten(1, grid))


def compare_forward(case: Case, model: ZegCLIP, images: Tensor, text: Tensor) -> Tensor:
    """Compare everything up to the mask logits, and return those (B, C, h, w)."""
    compare_blocks(case, model, images)
    compare_features(case, model, images)
    compare_spectral(case, model, images)
    with torch.no_grad():
        features = model.encode_images(images)
        cls = features.values["cls"]
        case.check("relationship_descriptor", model.descriptor(cls, text))
        logits = model.grid_logits(features, text)
        for index, (head, queries) in enumerate(zip(model.heads(), model.queries(cls, text), strict=True)):
            memory = features.values[head.feature]
            prefix = f"cascade_{index}" if isinstance(model, CascadeCLIP) else "decoder_1"
            case.check(f"q_projs_{index}_out" if isinstance(model, CascadeCLIP) else "q_proj_out", queries)
            case.check(f"{prefix}_query_in_LND", queries.transpose(0, 1))
            case.check(f"{prefix}_memory_LND", memory.flatten(1, 2).transpose(0, 1))
            seen = head.decoder.project_memory(memory)
            for number, (layer, part) in enumerate(zip(head.decoder.layers, seen, strict=True)):
                case.check(f"{prefix}_layer{number}_attn_logits", layer.mask_logits(queries, part))
                if layer.logits_only:
                    case.skip(f"{prefix}_layer{number}_query_out")
                else:
                    queries = layer(queries, part)
                    case.check(f"{prefix}_layer{number}_query_out", queries.transpose(0, 1))
        size = model.mask_size(features.size)
        case.check("pred_masks", F.interpolate(logits, size=size, mode="bilinear", align_corners=False))
    return logits


def _seen(case: Case, num_classes: int) -> Tensor:
    seen = torch.zeros(num_classes, dtype=torch.bool)
    seen[case.input("seen_idx").long()] = True
    return seen


def evaluation(case: Case) -> None:
    """Scores of one image size, with every intermediate result."""
    model = build(case)
    images, text = case.input("image"), case.input("text_embeddings")
    compare_forward(case, model, images, text.float())
    size = tuple(images.shape[-2:])
    with torch.no_grad():
        scores = model(images, text, seen=_seen(case, len(text)))
    case.check("pred", scores.dense(model.mask_size(size)))
    case.check("scores", scores.dense(size))
    if case.has("argmax"):
        case.check_labels("argmax", scores.label_map(size), case.tensors["expected/scores"])


def compare_accuracy(case: Case, accuracy: Tensor, logits: Tensor) -> None:
    """Compare the accuracy, but for the pixels at which the best class is a tie of exact zeros."""
    name = "loss/decode.acc_seg"
    if not case.has(name):
        return
    labels = case.tensors["expected/label_used_in_loss"][:, 0]
    large = F.interpolate(logits, size=labels.shape[-2:], mode="bilinear", align_corners=False)
    best = large.topk(min(2, large.shape[1]), dim=1).values
    counted = labels != 255
    ties = int(((best[:, 0] == best[:, -1]) & counted).sum())
    if not ties:
        return case.check(name, accuracy)
    share = 100.0 * ties / int(counted.sum())
    difference = abs(float(accuracy) - float(case.tensors[f"expected/{name}"]))
    case.touched.add(f"expected/{name}")
    case.check_that(name, difference <= share, f"it differs by {difference:.2f}, and ties explain {share:.2f} only")
    case.notes.append(f"{name}: {ties} of {int(counted.sum())} pixels are ties of all classes")


def training(case: Case) -> None:
    """Losses, gradients and the labels they see; inductive, fully supervised or self-training."""
    config = case.config["model_config"]
    model = build(case).train()
    images, text = case.input("image"), case.input("text_embeddings").float()
    raw = case.input("labels")[:, 0].long()
    seen = _seen(case, len(text))
    self_training = bool(config.get("self_training"))
    used = text if self_training else text[case.input("seen_idx").long()]
    logits = compare_forward(case, model, images, used)
    if self_training:
        large = F.interpolate(logits, size=raw.shape[-2:], mode="bilinear", align_corners=False)
        case.check("label_used_in_loss", pseudo_labels(large, raw, seen)[:, None])
        labels = pseudo_labels(large, raw, seen)
        losses = model.losses(images, raw, used, seen=seen)
    else:
        labels = raw if bool(seen.all()) else remap_to_seen(raw, case.input("seen_idx").tolist())
        case.check("label_used_in_loss", labels[:, None])
        losses = model.losses(images, labels, used)
    case.check("loss/decode.loss_mask", losses["loss_mask"])
    for name in ("loss_dice", "loss_ssim"):
        if name in losses:
            case.check(f"loss/decode.{name}", losses[name])
    if model.options.mask_size is not None:
        size = model.mask_size((images.shape[-2], images.shape[-1]))
        logits = F.interpolate(logits, size=size, mode="bilinear", align_corners=False)
    large = F.interpolate(logits, size=labels.shape[-2:], mode="bilinear", align_corners=False)
    compare_accuracy(case, pixel_accuracy(large, labels), logits)
    case.check("loss_total", losses["loss"])
    keys = [_AUTHORS_LOSSES.get(name, f"decode.{name}") for name in (*losses, "accuracy") if name != "loss"]
    case.check_stated("losses", case.config, {"loss_keys": keys})
    losses["loss"].backward()
    # The bias of attention keys has no gradient in exact arithmetic: it shifts all logits of a softmax alike.
    magnitudes = [float(case.tensors[f"expected/{name}"].abs().max()) for name in case.expected_names("grad/")]
    largest = max(magnitudes, default=0.0)
    with_gradient = set()
    for name, parameter in model.trainable_parameters():
        key = authors_key(name, model.system)
        if parameter.grad is not None:
            with_gradient.add(f"grad/{key}")
            case.check(f"grad/{key}", parameter.grad, zero_below=1e-7 * largest)
    wanted = set(case.expected_names("grad/"))
    difference = sorted(wanted ^ with_gradient)
    case.check_that("which parameters have gradients", not difference, f"they differ in {difference[:3]}")
    trained = {name.removeprefix("grad/") for name in with_gradient}
    for key, sentence in (
        ("trainable_without_grad", "has a gradient here"),
        ("frozen_examples", "is trained here"),
    ):
        wrong = sorted(trained & set(case.config.get(key, [])))
        case.check_that(key, not wrong, f"{wrong[:1]} {sentence}")
    check_frozen_count(case, trained)
    if case.has("eval_scores"):
        model.eval()
        with torch.no_grad():
            scores = model(images, text, seen=seen)
        case.check("eval_scores", scores.dense(tuple(images.shape[-2:])))


def check_frozen_count(case: Case, trained: set[str]) -> None:
    """Compare the number of frozen parameters; the file does not tell buffers apart."""
    stated = case.config.get("frozen_parameters_count")
    if stated is not None:
        buffers = ("running_mean", "running_var", "num_batches_tracked", "criterion.empty_weight")
        every = [key for key in case.params() if not key.endswith(buffers)]
        found = len(every) - len(trained) - len(case.config.get("trainable_without_grad", []))
        case.check_that("frozen_parameters_count", found == stated, f"{found} instead of {stated}")


def backbone(case: Case) -> None:
    """The image encoder alone, in each prompt mode."""
    config = case.config["backbone_config"]
    clip = build_clip(
        architecture(
            {"vocab_size": 8},
            image_size=config["input_resolution"],
            patch_size=config["patch_size"],
            width=config["width"],
            layers=config["layers"],
            head_width=config["width"] // config["heads"],
            output_dim=config["output_dim"],
        )
    )
    options: dict[str, Any] = {"class_embedding_twice": True, "backbone": "fixed", "decoder_heads": 1}
    if "num_tokens" in config:
        options |= {
            "backbone": "prompt",
            "num_prompts": config["num_tokens"],
            "prompt_depth": config.get("total_d_layer", 11),
        }
    model = ZegCLIP(clip, ZegCLIP.parse_options(options)).eval()  # type: ignore[arg-type]
    params = case.params()
    state, used = model.state_dict(), set()
    for name in state:
        key = (authors_key(name, model.system) or "").removeprefix("backbone.")
        if (authors_key(name, model.system) or "").startswith("backbone."):
            state[name] = params[key]
            used.add(key)
    left = sorted(params.keys() - used)
    if config.get("total_d_layer") == 0:
        left = [key for key in left if not key.startswith("prompt_norm.")]
    case.check_that("all parameters used", not left, f"left over are {left[:3]}")
    model.load_state_dict(state)
    images = case.input("image")
    compare_blocks(case, model, images)
    with torch.no_grad():
        features = model.encode_images(images)
    case.check("cls", features.values["cls"])
    case.check("patch_feature", features.values["patches"].permute(0, 3, 1, 2))


def text_path(case: Case) -> None:
    """Text embeddings from token ids, single and averaged over templates, and the scores they give."""
    model = build(case)
    ids = case.input("tokens").long()
    with torch.no_grad():
        raw = model.clip.encode_text(ids.flatten(0, 1)).reshape(*ids.shape[:2], -1)
    unit = raw / raw.norm(dim=-1, keepdim=True)
    mean = unit.mean(dim=1)
    multi = mean / mean.norm(dim=-1, keepdim=True)
    case.check("text_raw_single", raw[:, 0])
    case.check("text_normalised_single", unit[:, 0])
    case.check("text_multi", multi)
    images = case.input("image")
    config = case.config["model_config"]
    seen = torch.zeros(len(ids), dtype=torch.bool)
    seen[torch.tensor(config["base_class"])] = True
    for name, text in (("scores_single", unit[:, 0]), ("scores_multi", multi)):
        with torch.no_grad():
            scores = model(images, text, seen=seen)
        case.check(name, scores.dense(tuple(images.shape[-2:])))


def _windows(canvas: tuple[int, ...], size: list[int], stride: list[int]) -> list[Box]:
    # Rows and columns apart: lexiseg's own windows are square, those of a case need not be.
    tops = sorted({box[0] for box in cover(canvas[0], canvas[1], size[0], stride[0])})
    lefts = sorted({box[1] for box in cover(canvas[0], canvas[1], size[1], stride[1])})
    return [(top, left, min(size[0], canvas[0]), min(size[1], canvas[1])) for top in tops for left in lefts]


def slide(case: Case) -> None:
    """The whole test path: windows, their mean, the resize to the original size, the label map."""
    model = build(case)
    config = case.config
    images, text = case.input("image"), case.input("text_embeddings")
    seen = _seen(case, len(text))
    canvas = tuple(images.shape[-2:])
    case.check_stated("canvas", config, {"image_hw": list(canvas)})
    test = config["model_config"]["test_cfg"]
    boxes = _windows(canvas, test["crop_size"], test["stride"])
    shapes = [list(box[2:]) for box in boxes]
    case.check_that("window shapes", shapes == config["window_shapes"], f"{shapes}")
    case.check_that("number of windows", len(boxes) == config["n_windows"], f"{len(boxes)}")
    parts = []
    with torch.no_grad():
        for top, left, height, width in boxes:
            parts.append(model(images[:, :, top : top + height, left : left + width], text, seen=seen))
    for name, index in (("window_scores_first", 0), ("window_scores_last", -1)):
        case.check(name, parts[index].dense(boxes[index][2:]))
    scores = WindowScores(parts, boxes, canvas)
    original = tuple(config["ori_shape"])
    case.check("slide_scores", scores.dense(canvas))
    dense = scores.dense(original)
    case.check("slide_scores_rescaled", dense)
    case.check("softmax_of_scores", dense.softmax(dim=1))
    case.check_labels("seg_pred", scores.label_map(original), case.tensors["expected/slide_scores_rescaled"])
