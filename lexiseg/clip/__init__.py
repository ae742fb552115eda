"""CLIP through open_clip: loading by name, the image tower run patch by patch, cached text embeddings."""

from lexiseg.clip.image import ImageTokens, ImageTower, resize_positions
from lexiseg.clip.load import load_clip, packaged_clips
from lexiseg.clip.model import CLIP, build_clip, save_clip
from lexiseg.clip.text import TextEmbedder

__all__ = [
    "CLIP",
    "ImageTokens",
    "ImageTower",
    "TextEmbedder",
    "build_clip",
    "load_clip",
    "packaged_clips",
    "resize_positions",
    "save_clip",
]
