"""Looking inside a model: what the papers measure of towers and draw as figures."""

from lexiseg.analysis.figures import cka_figure, compare_figure, nga_figure, scores_figure, similarity_figure
from lexiseg.analysis.towers import Blocks, linear_cka, patch_similarity, plain_blocks, system_blocks

__all__ = [
    "Blocks",
    "cka_figure",
    "compare_figure",
    "linear_cka",
    "nga_figure",
    "patch_similarity",
    "plain_blocks",
    "scores_figure",
    "similarity_figure",
    "system_blocks",
]
