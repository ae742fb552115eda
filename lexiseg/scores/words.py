"""From the cosines of words to classes, by the rules of the training-free papers' protocols."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Postprocessing:
    """How a protocol turns cosines into labels."""

    scale: float  # of the cosines in the softmax
    threshold: float = 0.0  # pixels whose best class is less probable become background
    area: float = 0.0  # see `words_to_classes`


def words_to_classes(
    cosines: Tensor, word_to_class: Tensor, rule: Postprocessing, background: int = 0
) -> tuple[Tensor, Tensor]:
    """Labels from cosines at every pixel.

    A class's probability is the largest among its words, after a softmax over all words: with a threshold it matters
    how many near-synonyms share the mass, and which scale was used (SCLIP, NACLIP, ClearCLIP, ProxyCLIP, ResCLIP).

    Args:
        cosines: (W, H, W') of words.
        word_to_class: (W,) the class of each word, non-decreasing.
        rule: scale, threshold and area. Classes other than the background that win no more than the fraction ``area``
            of the pixels that such classes win are dropped before the labels are made (SCLIP's rule); 0 drops none.
        background: the class that pixels below the threshold become.

    Returns:
        labels (H, W') int64, and the probabilities (C, H, W') float32 they were made of; not renormalised.
    """
    words = (rule.scale * cosines.float()).softmax(dim=0)
    count = int(word_to_class[-1]) + 1
    index = word_to_class[:, None, None].expand(words.shape)
    probabilities = words.new_zeros(count, *words.shape[1:]).scatter_reduce_(0, index, words, "amax")
    if rule.area:
        wins = torch.bincount(probabilities.argmax(0).flatten(), minlength=count)
        wins[background] = 0
        small = wins.double() <= rule.area * wins.sum()
        small[background] = False
        probabilities[small] = 0.0
    best, labels = probabilities.max(dim=0)
    return labels.masked_fill(best < rule.threshold, background), probabilities
