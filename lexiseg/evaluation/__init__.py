"""How good a model is: `evaluate` takes what ``lexiseg evaluate`` takes, and gives the report.

>>> from lexiseg.evaluation import evaluate
>>> report = evaluate("my-photos", "runs/mine", output="out/evaluation")  # a recipe, a dataset's folder, ...
>>> report.summary()["miou"]
"""

from lexiseg.evaluation.resolve import evaluate

__all__ = ["evaluate"]
