"""Dual encoders of other libraries with the interface of `CLIP`: MetaCLIP 2, SigLIP, SigLIP 2 and TIPSv2.

They come from transformers (``transformers:OWNER/NAME`` or a folder); TIPSv2's image tower from timm as well
(``timm:NAME``), with its text tower from transformers. They serve training-free segmentation; systems that need
open_clip's own tower refuse them with a `LexisegError`.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lexiseg.clip.library_towers import TimmTower, TransformersTower
from lexiseg.clip.model import CLIP, OPENAI_MEAN, OPENAI_STD
from lexiseg.clip.patch_tower import PatchTower
from lexiseg.clip.tower import ImageTower
from lexiseg.errors import LexisegError
from lexiseg.files import read_json
from lexiseg.hub import INTO_CACHE, download, download_folder
from lexiseg.words import first_line

TRANSFORMERS, TIMM = "transformers:", "timm:"
_KINDS = ("clip", "metaclip_2", "siglip", "siglip2", "tipsv2")
_TIPS_TEXT = {"base": "b14", "large": "l14", "so400m": "so400m14", "giant": "g14"}


class ForeignCLIP(CLIP):
    """A dual encoder ``model`` of transformers, or one whose image tower is ``trunk``, a tower of timm.

    Args:
        model: with ``text_model`` and ``get_text_features``, as transformers' dual encoders.
        tokenizer: of transformers.
        name: what the user called it.
        mean: of the images, RGB in 0..1.
        std: of the images.
        embed_dim: width of the joint embedding; None is what the model's configuration says.
        trunk: replaces the model's image tower.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        name: str,
        *,
        mean: Sequence[float],
        std: Sequence[float],
        embed_dim: int | None = None,
        trunk: nn.Module | None = None,
    ) -> None:
        if embed_dim is None:
            config = model.config
            projected = config.model_type in ("clip", "metaclip_2")
            embed_dim = int(config.projection_dim if projected else config.vision_config.hidden_size)
        architecture = {"model_cfg": {"embed_dim": embed_dim}, "preprocess_cfg": {"mean": list(mean), "std": list(std)}}
        # Weights are named, not copied, when a model is saved: they are as their library loads them.
        super().__init__(model, architecture, tokenizer, name, packaged=True)
        self.trunk = trunk
        if trunk is not None:
            model.vision_model = nn.Identity()

    @property
    def patch_tower(self) -> PatchTower:
        return TransformersTower(self.model) if self.trunk is None else TimmTower(self.trunk, "bilinear-antialias")

    @property
    def image_tower(self) -> ImageTower:
        """Not there: the tower is another library's, which a `LexisegError` says."""
        raise LexisegError(
            f"The image tower of '{self.name}' is not open_clip's, and this system changes its inside; choose a CLIP "
            "such as 'ViT-B-16/openai', or a training-free method."
        )

    @property
    def patch_size(self) -> int:
        return self.patch_tower.patch_size

    @property
    def image_size(self) -> int:
        """Side of the images the tower was trained on, in pixels; 256 where it takes any."""
        if self.trunk is not None:
            return int(self.trunk.patch_embed.img_size[0])  # type: ignore[union-attr, index]
        vision = self.model.config.vision_config
        return int(getattr(vision, "image_size", 0) or round(vision.num_patches**0.5) * vision.patch_size)

    @property
    def context_length(self) -> int:
        return int(self.model.config.text_config.max_position_embeddings)

    @property
    def text_width(self) -> int:
        return int(self.model.config.text_config.hidden_size)

    @property
    def plain_text(self) -> bool:
        return False  # it is not open_clip's

    def tokenize(self, texts: Sequence[str]) -> Tensor:
        """Turn texts into token ids (n, context_length), each 1 more than the library's so that 0 is padding."""
        length = self.context_length
        rows = [list(self.tokenizer(text, truncation=True, max_length=length)["input_ids"]) for text in texts]
        return torch.tensor([[token + 1 for token in row] + [0] * (length - len(row)) for row in rows])

    def count_tokens(self, text: str) -> int:
        return len(self.tokenizer(text)["input_ids"])

    def encode_text(self, tokens: Tensor) -> Tensor:
        given = tokens != 0
        if self.tokenizer.padding_side == "left":  # a stable sort moves the padding to the front
            order = given.int().argsort(dim=1, stable=True)
            tokens, given = tokens.gather(1, order), given.gather(1, order)
        pad = self.tokenizer.pad_token_id
        ids = torch.where(given, tokens - 1, 0 if pad is None else pad)
        inputs = {"attention_mask": given.long()} if "attention_mask" in self.tokenizer.model_input_names else {}
        return self.model.get_text_features(input_ids=ids, **inputs).pooler_output


def load_foreign(name: str) -> ForeignCLIP:
    """Load ``transformers:OWNER/NAME``, ``transformers:FOLDER``, or ``timm:NAME`` of a TIPSv2 tower.

    Raises LexisegError if there is no such model, it is of another kind, or its weights cannot be loaded.
    """
    if name.startswith(TRANSFORMERS):
        return _transformers(name.removeprefix(TRANSFORMERS), name)
    trunk_name = name.removeprefix(TIMM)
    size = trunk_name.removeprefix("vit_").partition("_")[0]
    if "tipsv2" not in trunk_name or size not in _TIPS_TEXT:
        raise LexisegError(
            f"'{name}' has no text tower; of timm's towers only TIPSv2's have one, such as "
            "'timm:vit_base_patch14_reg1_tipsv2.webli'."
        )
    text = _transformers(f"google/tipsv2-{_TIPS_TEXT[size]}", name)
    return ForeignCLIP(text.model, text.tokenizer, name, mean=text.mean, std=text.std, trunk=timm_model(trunk_name))


def timm_model(name: str) -> Any:
    """A pretrained model of timm without its head, in evaluation mode, for images of any size.

    A `LexisegError` says that timm has no such model, or that the weights cannot be had or are damaged.
    """
    import timm

    if name not in timm.list_pretrained(name):
        raise LexisegError(
            f"timm {timm.__version__} has no weights '{name}'; name a model with its weights, such as "
            "'vit_base_patch8_224.dino'."
        )
    repository = str(getattr(timm.get_pretrained_cfg(name), "hf_hub_id", None) or f"timm/{name}")
    repository = f"timm/{name}" if repository.endswith("/") else repository
    path = download(repository, ("model.safetensors",), name, then=INTO_CACHE)
    try:
        return timm.create_model(
            name, pretrained=True, pretrained_cfg_overlay={"file": str(path)}, num_classes=0, dynamic_img_size=True
        ).eval()
    except Exception as error:  # timm and safetensors raise errors of many kinds
        raise LexisegError(
            f"The weights of '{name}' in '{path}' cannot be read ({first_line(error)}); delete the file and download "
            "it again."
        ) from error


def _transformers(source: str, name: str) -> ForeignCLIP:
    folder = Path(source).expanduser()
    if not folder.is_dir():
        folder = download_folder(source, name)
    kind = read_kind(folder, name)
    if kind not in _KINDS:
        raise LexisegError(
            f"'{name}' is a {kind}, whose patches cannot be compared with text; choose one of {', '.join(_KINDS)}."
        )
    from transformers import AutoModel

    # TIPSv2's files have no temperature, which only training needs.
    model, tokenizer = read_transformers(folder, name, AutoModel, optional=("temperature",))
    mean, std = _normalisation(folder, kind)
    return ForeignCLIP(model, tokenizer, name, mean=mean, std=std)


def read_transformers(folder: Path, name: str, kind: Any, *, optional: Sequence[str] = ()) -> tuple[Any, Any]:
    """The model, in float32 and evaluation mode, and the tokenizer of a folder as transformers writes it.

    ``kind``: the class of transformers that reads the model. ``optional``: weights that may be missing. Raises
    LexisegError if the files are damaged, or another weight is missing.
    """
    from transformers import AutoTokenizer

    try:
        model, report = kind.from_pretrained(
            folder, local_files_only=True, use_safetensors=True, output_loading_info=True
        )
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # transformers raises errors of many kinds
        raise LexisegError(
            f"The model '{name}' in '{folder}' cannot be read ({first_line(error)}); download it again."
        ) from error
    if missing := sorted(set(report["missing_keys"]).difference(optional)):
        raise LexisegError(f"The model '{name}' in '{folder}' lacks {missing[0]}; download it again.")
    return model.float().eval(), tokenizer


def read_kind(folder: Path, name: str) -> str:
    """The ``model_type`` that a folder of transformers states; a `LexisegError` if it has no readable config.json."""
    config = read_json(folder / "config.json", f"give '{name}' as transformers writes it")
    if "model_type" not in config:
        raise LexisegError(f"'{name}' has no model_type in '{folder}'; give a model as transformers writes it.")
    return str(config["model_type"])


def _normalisation(folder: Path, kind: str) -> tuple[Sequence[float], Sequence[float]]:
    """Mean and standard deviation of the images, as the model's processor has them."""
    none, half = ((0.0,) * 3, (1.0,) * 3), ((0.5,) * 3, (0.5,) * 3)
    try:
        said = json.loads((folder / "preprocessor_config.json").read_text("utf-8"))
        return none if said.get("do_normalize") is False else (said["image_mean"], said["image_std"])
    except (OSError, ValueError, KeyError, AttributeError):
        return {"tipsv2": none, "siglip": half, "siglip2": half}.get(kind, (OPENAI_MEAN, OPENAI_STD))
