"""Factorised class scores and their streaming decode.

Every system scores classes for places: a grid of patches (`GridScores`), a set of masks (`RegionScores`), or windows
that slide over a large picture (`WindowScores`). All three turn into pixels through the same methods, and the large
array, classes x height x width, is built only by the one that is called `dense`.
"""

from lexiseg.scores.base import Scores
from lexiseg.scores.kinds import GridScores, RegionScores, WindowScores

__all__ = ["GridScores", "RegionScores", "Scores", "WindowScores"]
