"""Golden cases of the decoupled family's text features: learned prompts and templates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lexiseg.clip.model import CLIP, build_clip
from lexiseg.clip.prompt_learner import PromptLearner
from lexiseg.clip.text import TextEmbedder
from lexiseg.templates import IMAGENET_80, IMAGENET_SELECT, IN_THE_SCENE, VILD_14, ZEGFORMER_32
from lexiseg.training.prompts import crop_logits, hide_background
from tests.parity.case import Case
from tests.parity.clip_build import IdTokenizer, adapter_clip, architecture, make_clip, text_sizes, toy_sizes, under

SOFTMAX_TOLERANCE = 1e-3


def deop_text(case: Case) -> None:
    """DeOP's text features: learned prompts of three shapes, template averages, scores."""
    config, params = case.config, case.params()
    names = config["names"]
    texts = {"X.": case.input("sentence_X_dot_ids")[0]}
    texts |= dict(zip(names, case.input("name_token_ids"), strict=True))
    for mode, options in config["modes"].items():
        for index, template in enumerate(options.get("templates", [])):
            ids = case.input(f"{mode}/token_ids")[index]
            texts |= {template.replace("{}", name): row for name, row in zip(names, ids, strict=True)}
    clip = make_clip(params, text_heads=config["heads"], tokenizer=IdTokenizer(texts))
    embedder = TextEmbedder(clip)
    features: dict[str, Tensor] = {}
    for mode, options in config["modes"].items():
        if "templates" in options:
            features[mode] = embedder.embed(names, options["templates"])
            case.check(f"{mode}/text_features", features[mode])
        else:
            learner = prompt_learner(under(params, f"{mode}/"))
            features[mode] = check_prompts(case, mode, learner, clip, names)
    for mode, options in config["modes"].items():
        given = tuple(options.get("templates", ()))
        check_spelling(case, mode, given)
        case.check_stated(f"{mode}: prompt", options, prompt_sizes(under(params, f"{mode}/")))
    rows = classifier_rows(case, features, F.normalize(params["non_object_embedding"], dim=-1))
    if rows is not None:
        logits = 100 * F.normalize(case.input("query_features"), dim=-1) @ rows.T
        case.check("sim_logits", logits)
        case.check("class_probs", logits.softmax(dim=-1)[..., :-1], tolerance=SOFTMAX_TOLERANCE)
    case.check_stated("text tower", config, text_sizes(clip))
    real = config.get("real_bpe_ids_with_sot_eot", {})
    if real:
        tokenizer = build_clip(architecture({"context_length": 77, "vocab_size": 8}))
        dot = tokenizer.tokenize(["X."])[0]
        stated = {key: config[key] for key in ("real_X_dot",) if key in config}
        case.check_stated("tokens of 'X.'", stated, {"real_X_dot": dot[: len(config.get("real_X_dot", []))].tolist()})
        for name, ids in real.items():
            found = tokenizer.tokenize([name])[0, : len(ids)].tolist()
            case.check_that(f"tokens of '{name}'", found == ids, f"{found} instead of {ids}")


def classifier_rows(case: Case, features: dict[str, Tensor], last: Tensor) -> Tensor | None:
    """The rows of a classifier, "no object" the last. The case does not say of which mode they are."""
    if not case.has("classifier_rows"):
        return None
    expected = case.tensors["expected/classifier_rows"]
    candidates = [torch.cat([rows, last]).detach() for rows in features.values()]
    rows = min(candidates, key=lambda rows: float((rows - expected).abs().max()))
    case.check("classifier_rows", rows)
    return rows


def check_spelling(case: Case, name: str, templates: Sequence[str]) -> None:
    """Compare a list of templates with the package's own of that name or, if it knows no such name, of that length."""
    known = {
        "vild": VILD_14,
        "imagenet": IMAGENET_80,
        "single": IN_THE_SCENE,
        "imagenet_select": IMAGENET_SELECT,
        "clip_side": ZEGFORMER_32,
    }
    long = [ours for ours in known.values() if len(ours) == len(templates) > 1]
    ours = known[name] if name in known and len(known[name]) == len(templates) > 1 else long[0] if long else None
    if ours is not None:
        case.check_that(f"{name} templates", tuple(templates) == ours, "they are spelt otherwise")


def prompt_sizes(tables: Mapping[str, Tensor]) -> dict[str, Any]:
    """How many vectors learned prompts have, under the names of the cases' JSON."""
    prefix, suffix, task = (len(tables.get(f"{part}_prompt", ())) for part in ("prefix", "suffix", "task"))
    return {"prompt_shape": [prefix, suffix], "task_prompt_len": task or None}


def prompt_learner(params: dict[str, Tensor]) -> PromptLearner:
    tables = {key: params[key] for key in ("prefix_prompt", "suffix_prompt", "task_prompt") if key in params}
    sizes = prompt_sizes(tables)
    width = next(iter(tables.values())).shape[1]
    learner = PromptLearner(width, *sizes["prompt_shape"], sizes["task_prompt_len"] or 0)
    learner.load_state_dict(tables)
    return learner


def check_prompts(
    case: Case,
    mode: str,
    learner: PromptLearner,
    clip: CLIP,
    names: list[str],
    task: str | None = None,
    last_row: Tensor | None = None,
) -> Tensor:
    embeddings, end = learner.assemble(clip, names, task, length=clip.context_length)
    case.check(f"{mode}/embeddings", embeddings)
    case.check(f"{mode}/eot_index", end)
    case.check(f"{mode}/feature_index", end)
    case.check(f"{mode}/text_raw", clip.encode_embeddings(embeddings, end))
    features = learner(clip, names, task)
    with_last = features if last_row is None else torch.cat([features, last_row])
    case.check(f"{mode}/text_features", with_last)
    return with_last


def stage1_prompt(case: Case) -> None:
    """Learning the prompts offline, on masked crops: input, logits, loss and gradients."""
    config = case.config["config"]
    params = under(case.params(), "clip_adapter.")
    names = config["train_names"]
    clip = adapter_clip(params, config, toy_tokenizer(case, params, names))
    learner = prompt_learner(under(params, "prompt_learner."))
    case.check_stated("sizes", case.config["config"], toy_sizes(clip))
    trained = [f"clip_adapter.prompt_learner.{name}" for name, _ in learner.named_parameters()]
    case.check_stated("prompt", case.config, {**prompt_sizes(learner.state_dict()), "trainable": trained})
    count = len(case.input("labels"))
    images = torch.stack([case.input(f"image_{index}") for index in range(count)])
    masks = torch.stack([case.input(f"mask_{index}") for index in range(count)])
    crops = hide_background(images / 255, masks, clip)
    case.check("model_input", crops)
    logits = crop_logits(learner, clip, crops, names)
    case.check("logits", logits)
    loss = F.cross_entropy(logits, case.input("labels").long())
    case.check("loss_cls", loss)
    loss.backward()
    for name, parameter in learner.named_parameters():
        if parameter.grad is not None:
            case.check(f"grad/clip_adapter.prompt_learner.{name}", parameter.grad)


def toy_tokenizer(case: Case, adapter: dict[str, Tensor], names: Sequence[str]) -> IdTokenizer:
    """The tokens of names in a toy vocabulary, and those of "X.", from the rows that the case has of its tokens."""
    texts = dict(zip(names, case.input("name_token_ids"), strict=True))
    table, ids = adapter["clip_model.token_embedding.weight"], torch.zeros_like(texts[names[0]])
    for place, name in ((0, "start"), (2, "dot"), (3, "end")):
        ids[place] = (table - adapter[f"prompt_learner.{name}_signal"]).abs().amax(dim=1).argmin()
    ids[1] = ids[2]
    return IdTokenizer({**texts, "X.": ids})


def learned_text(case: Case) -> None:
    """ZSSeg's and FreeSeg's learned prompts, with real tokens."""
    config, params = case.config, case.params()
    names = config["class_names"]
    clip = adapter_clip(params, config)
    learner = prompt_learner(under(params, "prompt_learner."))
    last = F.normalize(params["non_object_embedding"], dim=-1)
    ids = clip.tokenize(names)
    case.check("token_ids", ids)
    case.check("token_lengths", clip.text_end(ids) + 1)
    case.check_stated("prompt and text tower", config, {**text_sizes(clip), **prompt_sizes(learner.state_dict())})
    if not config.get("tasks"):
        check_prompts(case, "plain", learner, clip, names, last_row=last)
        return
    features = [
        check_prompts(case, f"task{index}", learner, clip, names, task, last)
        for index, task in enumerate(config["tasks"])
    ]
    embedder = TextEmbedder(clip)
    for key in case.expected_names("cached/"):
        # The authors' cache knows class names only, so that the first task's features are given to every later one.
        first = next(name for name in case.expected_names("cached/") if "first_task" in name)
        index = int(first.rsplit("task", 1)[1])
        case.check(key, torch.cat([embedder.embed_prompted(learner, names, config["tasks"][index]), last]))
        case.notes.append(f"{key}: compared with task {index}, which the authors' cache holds; ours knows the task")
    case.check_that("tasks differ", not torch.allclose(features[0], features[-1]), "they are the same")


def template_text(case: Case) -> None:
    """Averages over templates, in ZSSeg and MAFT."""
    config = case.config
    params = case.params()
    adapter = "clip_adapter." if any(key.startswith("clip_adapter.") for key in params) else ""
    params = under(params, adapter)
    names = config["class_names"]
    clip = adapter_clip(params, config)
    embedder = TextEmbedder(clip)
    case.check_stated("text tower", config, text_sizes(clip))
    given = config["templates"]
    sets = given if isinstance(given, dict) else {"": given}
    for name, templates in sets.items():
        check_spelling(case, name, templates)
        case.check(name, embedder.embed(names, templates))
    # The case does not say of which template these are, nor of which set.
    every = [template for templates in sets.values() for template in templates]
    if case.has("token_ids"):
        filled = [clip.tokenize([template.replace("{}", name) for name in names]) for template in (*every, "{}")]
        expected = case.tensors["expected/token_ids"]
        case.check("token_ids", min(filled, key=lambda ids: int((ids != expected).sum())))
    if case.has("text_features"):
        last = F.normalize(params["non_object_embedding"], dim=-1)
        expected = case.tensors["expected/text_features"]
        found = [torch.cat([embedder.embed(names, templates), last]) for templates in sets.values()]
        case.check("text_features", min(found, key=lambda rows: float((rows - expected).abs().max())))
    if case.has("encode_text_ids"):
        ids = case.tensors["expected/encode_text_ids"]
        case.skip("encode_text_ids")
        case.check("encode_text_raw", clip.encode_text(ids))


def zegformer_text(case: Case) -> None:
    """ZegFormer's text features: three sets of templates, synonyms averaged with them."""
    config, params = case.config, case.params()
    clip = adapter_clip(params, config)
    embedder = TextEmbedder(clip)
    case.check_stated("text tower", config, text_sizes(clip))
    for name, templates in config["templates"].items():
        check_spelling(case, name, templates)
        for part, suffix in (("seen", ""), ("all", "_test")):
            groups = [text.split(", ") for text in config[part]]
            features = embedder.embed_joined(groups, templates)
            side = f"text_features{suffix}_clip" if name == "clip_side" else f"{name}/text_features{suffix}"
            case.check(side, features)
