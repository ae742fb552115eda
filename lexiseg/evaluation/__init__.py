"""How good a model is: `evaluate` takes what ``lexiseg evaluate`` takes, and gives the report.

>>> from lexiseg.evaluation import evaluate
>>> report = evaluate("my-photos", "runs/mine", output="out/evaluation")  # a recipe, a dataset's folder, ...
>>> report.summary()["miou"]
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lexiseg.evaluation.resolve import evaluate

__all__ = ["evaluate"]


def __getattr__(name: str) -> Any:
    if name != "evaluate":
        raise AttributeError(f"module 'lexiseg.evaluation' has no attribute '{name}'")
    from lexiseg.evaluation.resolve import evaluate

    return evaluate
