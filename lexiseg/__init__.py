"""lexiseg segments a picture by words.

>>> import lexiseg
>>> model = lexiseg.load("second-look-emoji")  # a name, a folder or a hub id
>>> result = model.predict("photo.jpg", ["giraffe", "tree, bush", "sky"])  # a comma joins synonyms
>>> result.overlay().save("out.png")

The names below are imported when they are first used, so that ``import lexiseg`` does not wait for torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from lexiseg.errors import LexisegError, LexisegWarning

if TYPE_CHECKING:
    from pathlib import Path

    import torch

    from lexiseg.catalog import list_models
    from lexiseg.refine import Refinement
    from lexiseg.segmentation import Segmentation
    from lexiseg.segmenter import Segmenter
    from lexiseg.vocabulary import TemplateSource, Vocabulary

__version__ = "0.2.0.dev0"
__all__ = [
    "LexisegError",
    "LexisegWarning",
    "Segmentation",
    "Segmenter",
    "Vocabulary",
    "__version__",
    "list_models",
    "load",
]

_HOMES = {
    "Segmentation": "lexiseg.segmentation",
    "Segmenter": "lexiseg.segmenter",
    "Vocabulary": "lexiseg.vocabulary",
    "list_models": "lexiseg.catalog",
}


def load(
    name: str | Path = "auto",
    *,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    compile: bool = False,
    templates: TemplateSource = None,
    max_pixels: float | None = None,
    refine: str | Refinement | None = None,
) -> Segmenter:
    """Load a model, ready to segment pictures.

    Args:
        name: a model that comes with the package (see `list_models`); a folder that ``lexiseg train``,
            ``lexiseg convert`` or ``lexiseg export`` wrote; a training-free method and an open_clip name such as
            ``"naclip/ViT-B-16/openai"``; a hub repository ``"owner/name"``; or "auto", the best permissive weights
            that this machine has or can get (the choice is printed on stderr).
        device: where to run it; None uses an accelerator if there is one.
        dtype: "bf16" or "fp16" run the model in mixed precision; "auto" is bf16 on a processor made for it; None
            is float32.
        compile: compile it with torch.compile.
        templates: sentences that words are put into; None takes the model's own.
        max_pixels: larger pictures are refused; None is 200 million.
        refine: how masks are cleaned up: "none", "edges", "pamr" or "regions", see `lexiseg.refine`.

    Raises:
        LexisegError: there is no such model or device, or the weights do not fit.
    """
    from lexiseg.export.spec import is_export
    from lexiseg.images import DEFAULT_MAX_PIXELS

    limit = DEFAULT_MAX_PIXELS if max_pixels is None else max_pixels
    if is_export(name):
        from lexiseg.export.runtime import ExportedPredictor

        how: dict[str, Any] = {"dtype": dtype, "compile": compile, "templates": templates, "refine": refine}
        return ExportedPredictor(name, device=device, max_pixels=limit, **how)  # type: ignore[return-value]
    import torch

    from lexiseg.devices import pick_device, torch_defaults
    from lexiseg.segmenter import Segmenter
    from lexiseg.weights import load_model

    # A wrong device is said before gigabytes are read.
    place = pick_device("auto" if device is None else device)
    # Weights made in a caller's inference mode could never be trained, nor be asked whether they changed. The
    # random numbers drawn for weights that are read next are none of the caller's.
    with torch.inference_mode(False), torch.random.fork_rng(devices=[]):
        with torch_defaults():
            model = load_model(name)
        return Segmenter(
            model, device=place, dtype=dtype, compile=compile, templates=templates, max_pixels=limit, refine=refine
        )


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'lexiseg' has no attribute '{name}'")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
