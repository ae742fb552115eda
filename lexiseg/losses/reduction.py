"""Reduction of losses over a batch that is split among processes.

Gradients are averaged over the processes, so a mean over the samples (pixels, masks, regions) of one process would
weight a sample more the fewer samples its process has. Multiplied by `reduction_weight`, the mean over the processes is
the mean over the whole batch, however it is split.
"""

import torch


def mean_count(count: float, device: torch.device) -> float:
    """The mean of ``count`` over the processes, a sum of 0 counting as 1; all processes must call it equally often."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return count or 1.0
    total = torch.tensor(count, dtype=torch.float64, device=device)  # float32 does not count so many pixels exactly
    torch.distributed.all_reduce(total)
    return (float(total) or 1.0) / torch.distributed.get_world_size()


def reduction_weight(count: float, device: torch.device) -> float:
    """What a mean over ``count`` things (or a total weight) of this process is multiplied by; 1 in one process."""
    return count / mean_count(count, device)
