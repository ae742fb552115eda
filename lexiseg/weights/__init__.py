"""Models on disk: saving and loading folders, names of the models that come with lexiseg, converting checkpoints."""

from lexiseg.catalog import ModelEntry, list_models
from lexiseg.weights.convert import ConversionReport, convert
from lexiseg.weights.folder import load_model, save_model

__all__ = ["ConversionReport", "ModelEntry", "convert", "list_models", "load_model", "save_model"]
