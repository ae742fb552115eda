"""Means over a batch that several processes share.

Gradients are averaged over the processes. A loss that is a mean over the samples (pixels, masks, regions) of a
process's share would then weigh a sample by how few others its process has. Multiplied by `share_weight`, the mean over
the processes is the mean over the whole batch, however the batch is divided.
"""

from __future__ import annotations

import torch


def mean_count(count: float, device: torch.device) -> float:
    """The mean of ``count`` over the processes; ``count`` itself where there is one process.

    Every process must call this the same number of times, whatever its share looks like.
    """
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return count
    # Counts of pixels are larger than float32 counts exactly.
    total = torch.tensor(count, dtype=torch.float64, device=device)
    torch.distributed.all_reduce(total)
    return float(total) / torch.distributed.get_world_size()


def share_of_one() -> float:
    """The mean over the processes of a count that is 1 in all: what to divide by where there is nothing to count."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return 1.0
    return 1.0 / torch.distributed.get_world_size()


def share_weight(count: float, device: torch.device) -> float:
    """What a mean over ``count`` things of this process is multiplied by, see above; 1 where there is one process.

    Args:
        count: number (or total weight) of what the mean is taken over here; 0 is allowed.
        device: of the tensors.
    """
    mean = mean_count(count, device)
    return count / mean if mean else 1.0
