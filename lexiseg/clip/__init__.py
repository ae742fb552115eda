"""CLIP through open_clip: loading by name, the image towers run our way, cached text embeddings, learned prompts."""

from lexiseg.clip.image import BeforeBlock, ImageTokens, ImageTower
from lexiseg.clip.load import load_clip, packaged_clips
from lexiseg.clip.mask_attention import image_embeddings, region_embeddings
from lexiseg.clip.model import CLIP, build_clip, save_clip
from lexiseg.clip.positions import resize_positions
from lexiseg.clip.prompt_learner import PromptLearner
from lexiseg.clip.severance import Severance
from lexiseg.clip.text import TextEmbedder
from lexiseg.clip.visual_prompts import AddedTables, PrependedPrompts

__all__ = [
    "CLIP",
    "AddedTables",
    "BeforeBlock",
    "ImageTokens",
    "ImageTower",
    "PrependedPrompts",
    "PromptLearner",
    "Severance",
    "TextEmbedder",
    "build_clip",
    "image_embeddings",
    "load_clip",
    "packaged_clips",
    "region_embeddings",
    "resize_positions",
    "save_clip",
]
