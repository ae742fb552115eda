"""From the cosines of words to classes, by the rules of the training-free papers' protocols."""

from __future__ import annotations

import torch
from torch import Tensor


def words_to_classes(
    cosines: Tensor, word_to_class: Tensor, *, scale: float, threshold: float = 0.0, area: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Labels from cosines at every pixel.

    A class's probability is the largest among its words, after a softmax over all words: with a threshold it matters
    how many near-synonyms share the mass, and which scale was used (SCLIP, NACLIP, ClearCLIP, ProxyCLIP, ResCLIP).

    Args:
        cosines: (W, H, W') of words.
        word_to_class: (W,) the class of each word, non-decreasing.
        scale: of the cosines in the softmax.
        threshold: pixels whose best class is less probable become class 0, the background.
        area: classes other than 0 that win no more than this fraction of the pixels that such classes win are given up
            before the labels are made (SCLIP's rule); 0 gives up none.

    Returns:
        labels (H, W') int64, and the probabilities (C, H, W') float32 they were made of; not renormalised.
    """
    words = (scale * cosines.float()).softmax(dim=0)
    count = int(word_to_class[-1]) + 1
    index = word_to_class[:, None, None].expand(words.shape)
    probabilities = words.new_zeros(count, *words.shape[1:]).scatter_reduce_(0, index, words, "amax")
    if area:
        wins = torch.bincount(probabilities.argmax(0).flatten(), minlength=count)[1:]
        small = (wins.double() <= area * wins.sum()).nonzero().view(-1) + 1
        probabilities[small] = 0.0
    best, labels = probabilities.max(dim=0)
    return labels.masked_fill(best < threshold, 0), probabilities
