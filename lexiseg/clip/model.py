"""CLIP: an open_clip model with the few things a segmenter needs of it."""

import copy
import errno
import hashlib
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import open_clip
import torch
from open_clip import tokenizer as open_clip_tokenizer
from open_clip.modified_resnet import ModifiedResNet
from open_clip.tokenizer import SimpleTokenizer
from open_clip.transformer import ResidualAttentionBlock, TextTransformer
from pydantic import BaseModel, Field, FiniteFloat
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from lexiseg.catalog import CLIP_CONFIG_NAME as CONFIG_NAME
from lexiseg.checking import check
from lexiseg.clip.library_towers import OpenCLIPTower
from lexiseg.clip.patch_tower import PatchTower
from lexiseg.clip.resnet import RESNET_STRIDE
from lexiseg.clip.tower import ImageTower, block_attention, run_block
from lexiseg.errors import LexisegError
from lexiseg.files import atomic_write, make_folder, write_json
from lexiseg.words import shorten

WEIGHTS_NAME = "open_clip_model.safetensors"

# The mean and standard deviation OpenAI's CLIP was trained with, RGB in 0..1.
OPENAI_MEAN = (0.48145466, 0.4578275, 0.40821073)
OPENAI_STD = (0.26862954, 0.26130258, 0.27577711)


class CLIP(nn.Module):
    """An open_clip model: text in, embeddings out; images in, tokens out.

    Args:
        model: an ``open_clip.CLIP`` or ``open_clip.CustomTextCLIP``.
        architecture: ``{"model_cfg": ..., "preprocess_cfg": {"mean", "std"}}``, the contents of open_clip's
            ``open_clip_config.json``: enough to build the same model again with `build_clip`. Lexiseg's own may say
            what it was "trained_on".
        tokenizer: turns a list of strings into ids (n, context_length).
        name: what the user called it.

    Attributes:
        packaged: True when the weights came with lexiseg and were not changed at loading.
    """

    model: Any  # an open_clip model: its modules are reached by name, which nn.Module's types cannot follow

    def __init__(
        self, model: nn.Module, architecture: dict[str, Any], tokenizer: Any, name: str, *, packaged: bool = False
    ) -> None:
        super().__init__()
        self.model = model
        self.architecture = architecture
        self.name = name
        self.packaged = packaged
        self.tokenizer = tokenizer
        self._name_tokens: dict[str, tuple[int, ...]] = {}
        self._digests: dict[str, tuple[tuple[tuple[int, int], ...], str]] = {}

    @property
    def visual(self) -> Any:
        """The open_clip image tower."""
        return self.model.visual

    @property
    def image_tower(self) -> ImageTower:
        """Open_clip's image tower for systems that change it or train it: prompts, masks, any block's output.

        A `LexisegError` if it is not a plain vision transformer of open_clip.
        """
        return ImageTower(self.model.visual)

    @property
    def patch_tower(self) -> PatchTower:
        """The image tower for systems that only read it, whichever library it comes from; see `PatchTower`.

        A `LexisegError` if it is not a plain vision transformer.
        """
        return OpenCLIPTower(self.image_tower)

    @property
    def embed_dim(self) -> int:
        """Width D of the joint embedding."""
        return int(self.architecture["model_cfg"]["embed_dim"])

    @property
    def context_length(self) -> int:
        """Number of token places of the text tower."""
        return int(self.model.context_length)

    @property
    def patch_size(self) -> int:
        """Side of a patch in pixels; of a ResNet, the pixels per side of one place in its last feature map."""
        visual = self.model.visual
        return RESNET_STRIDE if isinstance(visual, ModifiedResNet) else self.image_tower.patch_size

    @property
    def image_size(self) -> int:
        """Side of the (square) images the tower was trained on, in pixels."""
        size = self.model.visual.image_size
        return int(size if isinstance(size, int) else size[0])

    @property
    def mean(self) -> tuple[float, float, float]:
        """Mean of the training images, RGB in 0..1."""
        red, green, blue = self.architecture["preprocess_cfg"]["mean"]
        return float(red), float(green), float(blue)

    @property
    def std(self) -> tuple[float, float, float]:
        """Standard deviation of the training images, RGB in 0..1."""
        red, green, blue = self.architecture["preprocess_cfg"]["std"]
        return float(red), float(green), float(blue)

    @property
    def trained_on(self) -> str | None:
        """What the weights were trained on, such as "picture-world", where the configuration says so."""
        return self.architecture.get("trained_on")

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.parameters()).device

    def tokenize(self, texts: Sequence[str]) -> Tensor:
        """Turn texts into token ids (n, context_length), long, on the CPU. An over-long text is cut."""
        return self.tokenizer(list(texts), context_length=self.context_length).long()

    def count_tokens(self, text: str) -> int:
        """Number of tokens ``text`` needs, the start and the end mark included."""
        if isinstance(self.tokenizer, SimpleTokenizer):
            return len(self.tokenizer.encode(text)) + 2
        return int((self.tokenizer([text], context_length=self.context_length) != 0).sum())

    @property
    def text_width(self) -> int:
        """Width of the tokens of the text tower."""
        return int(self.text_tower.token_embedding.weight.shape[1])

    @property
    def text_tower(self) -> Any:
        """The open_clip text tower: the model itself, or a part of it."""
        return self.model if isinstance(self.model, open_clip.CLIP) else self.model.text

    @property
    def _text_pool(self) -> str | None:
        text = self.text_tower
        return text.text_pool_type if isinstance(text, open_clip.CLIP) else getattr(text, "pool_type", None)

    @property
    def plain_text(self) -> bool:
        """Whether the text tower is open_clip's causal one that is read at the end mark, which our own forward runs."""
        text = self.text_tower
        return (
            isinstance(text, open_clip.CLIP | TextTransformer)
            and self._text_pool in ("argmax", "eos")
            and text.attn_mask is not None
            and getattr(text, "cls_emb", None) is None
            and all(isinstance(block, ResidualAttentionBlock) for block in text.transformer.resblocks)
        )

    def text_end(self, tokens: Tensor) -> Tensor:
        """Positions (n,) of the end marks in token ids (n, L)."""
        if self._text_pool == "argmax":
            return tokens.argmax(dim=-1)
        text = self.text_tower
        eos = text.text_eos_id if isinstance(text, open_clip.CLIP) else text.eos_id
        return tokens.eq(eos).int().argmax(dim=-1)

    def name_tokens(self, text: str) -> tuple[int, ...]:
        """Token ids of a text without the start and the end mark; remembered, since training asks again and again.

        A text that is too long for the text tower is a `LexisegError`.
        """
        known = self._name_tokens.get(text)
        if known is None:
            ids = self.tokenize([text])
            if int(ids[0, -1]) and self.count_tokens(text) > self.context_length:
                raise LexisegError(
                    f"'{text[:80]}' does not fit the text tower, which takes {self.context_length} tokens; shorten it."
                )
            known = self._name_tokens[text] = tuple(ids[0, 1 : int(self.text_end(ids)[0])].tolist())
        return known

    def mark_tokens(self) -> tuple[int, int, int]:
        """Token ids of the start mark, the full stop and the end mark."""
        ids = self.tokenize(["X."])
        end = int(self.text_end(ids)[0])
        return int(ids[0, 0]), int(ids[0, end - 1]), int(ids[0, end])

    def encode_text(self, tokens: Tensor) -> Tensor:
        """Encode token ids (n, L), L at most the context length: (n, D), not normalised.

        The sequence is cut behind the longest text of the batch: in a causal tower no later token can reach an earlier
        one, so nothing changes but the time.
        """
        if not self.plain_text:
            return self.model.encode_text(tokens)
        end = self.text_end(tokens)
        return self.encode_embeddings(self.embed_tokens(tokens[:, : int(end.max()) + 1]), end)

    def embed_tokens(self, tokens: Tensor) -> Tensor:
        """Look up token ids (n, L) in the text tower's table: (n, L, W), without positions."""
        return self.text_tower.token_embedding(tokens)

    def encode_embeddings(self, embeddings: Tensor, end: Tensor) -> Tensor:
        """Encode texts given as token embeddings, so that some of them can be learned: (n, D), not normalised.

        Args:
            embeddings: (n, L, W) without positions, L at most the context length; what lies behind a text's end mark
                does not matter.
            end: (n,) positions of the end marks.

        Raises LexisegError if the text tower is not the causal one of CLIP.
        """
        if not self.plain_text:
            raise LexisegError(
                f"The text tower of '{self.name}' is not CLIP's causal one, which learned prompts need; "
                "choose a CLIP such as 'ViT-B-16/openai'."
            )
        text = self.text_tower
        dtype = text.transformer.get_cast_dtype()
        x = embeddings.to(dtype) + text.positional_embedding[: embeddings.shape[1]].to(dtype)
        for block in text.transformer.resblocks:
            x = run_block(block, x, attention=partial(block_attention, causal=True))
        x = text.ln_final(x[torch.arange(x.shape[0], device=x.device), end])
        projection = text.text_projection
        if projection is None:
            return x
        return projection(x) if isinstance(projection, nn.Linear) else x @ projection

    def fingerprint(self) -> str:
        """SHA-256 (hex) of all weights as float32: equal exactly when the towers are. Cached until one changes."""
        return self._digest("all", self.model.state_dict(keep_vars=True).items())

    def text_fingerprint(self) -> str:
        """SHA-256 (hex) of all weights but the image tower's: the key of cached text embeddings."""
        tensors = self.model.state_dict(keep_vars=True).items()
        # "visual." in open_clip, "vision_model." and "visual_projection." in transformers.
        return self._digest("text", ((key, value) for key, value in tensors if not key.startswith("vis")))

    def _digest(self, part: str, tensors: Iterable[tuple[str, Tensor]]) -> str:
        items = sorted(tensors)
        # A tensor's version counts in-place changes, so a training step makes the cached digest stale.
        state = tuple((tensor.data_ptr(), tensor._version) for _, tensor in items)
        known = self._digests.get(part)
        if known is not None and known[0] == state:
            return known[1]
        self._digests[part] = (state, digest_of(items))
        return self._digests[part][1]


def digest_of(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """SHA-256 (hex) of tensors and their names, as float32, in their order."""
    digest = hashlib.sha256()
    for key, tensor in tensors:
        values = tensor.detach().to("cpu", torch.float32).contiguous()
        digest.update(f"{key}{tuple(values.shape)}".encode())
        digest.update(values.numpy().tobytes())
    return digest.hexdigest()


class Preprocessing(BaseModel):
    """Mean and standard deviation of the images, RGB in 0..1."""

    mean: tuple[FiniteFloat, FiniteFloat, FiniteFloat] = OPENAI_MEAN
    std: tuple[FiniteFloat, FiniteFloat, FiniteFloat] = OPENAI_STD


class ModelConfig(BaseModel):
    """The towers; what is in them open_clip checks when it builds them."""

    embed_dim: Annotated[int, Field(ge=1)]
    vision_cfg: dict[str, Any]
    text_cfg: dict[str, Any]


class Architecture(BaseModel):
    """What is asked of an ``open_clip_config.json``; further keys are left alone."""

    model_cfg: ModelConfig
    preprocess_cfg: Preprocessing | None = None


def check_architecture(architecture: dict[str, Any], name: str) -> Architecture:
    """Refuse towers that are never run here, by the configuration alone: before a gigabyte is downloaded.

    CLIP's own ResNets pass: mask attention runs them. What needs patches refuses them with `CLIP.image_tower`. A
    `LexisegError` says that the configuration is incomplete, or whose tower it has.
    """
    what = f"The architecture of '{shorten(name)}', as open_clip's {CONFIG_NAME} has it,"
    found = check(Architecture, architecture if isinstance(architecture, dict) else {}, what)
    vision, text = found.model_cfg.vision_cfg, found.model_cfg.text_cfg
    other = None
    if vision.get("timm_model_name"):
        other = f"an image tower of the timm library ({vision['timm_model_name']})"
    elif vision.get("attentional_pool"):
        other = "an image tower that pools with attention"
    elif text.get("hf_model_name") or "multimodal_cfg" in architecture["model_cfg"]:
        other = "a text tower that is not open_clip's own"
    elif text.get("hf_tokenizer_name"):
        other = f"a tokenizer of the transformers library ({text['hf_tokenizer_name']})"
    if other:
        raise LexisegError(
            f"'{name}' has {other}, which lexiseg does not run through open_clip; choose a plain ViT such as "
            "'ViT-B-16/openai', or take it from transformers, such as 'transformers:google/siglip2-base-patch16-256'."
        )
    return found


def build_clip(architecture: dict[str, Any], *, name: str = "clip", tokenizer: Any = None) -> CLIP:
    """Build a CLIP with random weights from its architecture.

    Args:
        architecture: as in open_clip's ``open_clip_config.json``; ``preprocess_cfg`` may be missing (OpenAI's mean and
            std).
        name: what to call it in messages and files.
        tokenizer: as open_clip's; None takes CLIP's own byte-pair tokenizer.

    Raises LexisegError if the configuration is not one open_clip can build, or it needs a tower from another library.
    """
    preprocess = check_architecture(architecture, name).preprocess_cfg or Preprocessing()
    config = copy.deepcopy(architecture)
    model_cfg = config["model_cfg"]
    text = model_cfg["text_cfg"]
    arguments = {key: value for key, value in model_cfg.items() if key != "custom_text"}
    model_class = open_clip.CustomTextCLIP if model_cfg.get("custom_text") else open_clip.CLIP
    try:
        model = model_class(**arguments)
        size = model.visual.image_size
        if min((size,) if isinstance(size, int) else size) < 1:
            raise ValueError("its image_size is below 1")
        if tokenizer is None:
            arguments = text.get("tokenizer_kwargs")
            # Reading its 49,152 merges takes longer than building a small model, and open_clip has done it already.
            tokenizer = SimpleTokenizer(**arguments) if arguments else open_clip_tokenizer._tokenizer
    except Exception as error:  # a value of a wrong type or size fails wherever open_clip first computes with it
        raise LexisegError(
            f"open_clip cannot build the architecture of '{name}' ({shorten(str(error), 200)}); check its "
            f"{CONFIG_NAME}."
        ) from error
    model.eval()
    made = {"model_cfg": model_cfg, "preprocess_cfg": preprocess.model_dump(mode="json")}
    if "trained_on" in config:
        made["trained_on"] = str(config["trained_on"])
    return CLIP(model, made, tokenizer, name)


def save_clip(clip: CLIP, folder: str | Path, *, dtype: torch.dtype | None = None) -> Path:
    """Write a folder that both lexiseg and open_clip (``local-dir:``) load, and return it.

    ``dtype`` is what to store the weights in, for example ``torch.float16``; None keeps them. A folder that cannot be
    written is a `LexisegError`.
    """
    folder = make_folder(folder)
    write_tensors(folder / WEIGHTS_NAME, clip.model.state_dict(), dtype=dtype)
    write_json(folder / CONFIG_NAME, clip.architecture)
    return folder


def write_tensors(
    path: Path,
    tensors: Mapping[str, Tensor],
    *,
    dtype: torch.dtype | None = None,
    metadata: dict[str, str] | None = None,
) -> None:
    """Write tensors, wherever they are, as a safetensors file, which is there as a whole or not at all.

    ``dtype``: what to store floats in; None keeps them. ``metadata``: what the file notes of itself. Raises
    LexisegError if it cannot be written.
    """
    stored = {}
    for key, tensor in tensors.items():
        value = tensor.detach().cpu()
        kind = dtype if dtype is not None and value.is_floating_point() else value.dtype
        stored[key] = value.to(kind, copy=True).contiguous()  # safetensors refuses tensors that share memory
    with atomic_write(path) as temporary:
        try:
            save_file(stored, temporary, metadata)
        except SafetensorError as error:  # a full disk
            raise OSError(errno.EIO, str(error)) from error
