"""Models on disk: saving and loading folders, and names of the models that come with lexiseg."""

from lexiseg.catalog import ModelEntry, list_models
from lexiseg.weights.folder import load_model, save_model

__all__ = ["ModelEntry", "list_models", "load_model", "save_model"]
