"""Position tables of the image towers, resized to other grids: every system has its own way of doing it."""

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from lexiseg.errors import LexisegError

Interpolation = Literal[
    "bilinear", "bilinear-antialias", "bicubic", "bicubic-corners", "bicubic-antialias", "bicubic-offset"
]

# DINO's and its followers' guard against rounding: a grid of n is sampled as if it were n + 0.1 cells long.
_OFFSET = 0.1


def resize_positions(
    table: Tensor,
    grid: tuple[int, int],
    source: tuple[int, int] | None = None,
    interpolation: Interpolation = "bilinear",
    *,
    by_count: bool = False,
    num_prefix: int = 1,
) -> Tensor:
    """Resize a position table (1 + h0 * w0, W) to another patch grid (h, w); row 0, the class token's, is copied.

    Args:
        table: given back itself when the grids agree.
        grid: the target (h, w).
        source: (h0, w0); None means a square grid. Rows that do not form it are a `LexisegError`.
        interpolation: "bilinear" is what ZegCLIP does at every forward (align_corners False, no antialias); "bicubic"
            is DeOP's and ZSSeg's; "bicubic-corners" (align_corners True) is MAFT's and FreeSeg's; "bicubic-antialias"
            is open_clip's when it loads weights; "bicubic-offset" is what DINO, SCLIP, ClearCLIP, NACLIP, ProxyCLIP and
            ResCLIP do, sampling with the scale (h + 0.1) / h0; "bilinear-antialias" is TIPSv2's and SigLIP 2's.
        by_count: take the table as it is whenever it has 1 + h * w rows, whatever its grid, as DeOP's released code
            does.
        num_prefix: rows in front of the patches', such as those of registers, all of which are copied.
    """
    rows = table.shape[0] - num_prefix
    if source is None:
        side = round(rows**0.5)
        source = (side, side)
    if source[0] * source[1] != rows:
        raise LexisegError(
            f"A position table of {table.shape[0]} rows is not {num_prefix} + {source[0]} x {source[1]}; "
            "check the image size and the patch size of the tower."
        )
    if source == grid or (by_count and source[0] * source[1] == grid[0] * grid[1]):
        return table
    patches = table[num_prefix:].reshape(1, source[0], source[1], -1).permute(0, 3, 1, 2)
    mode, _, variant = interpolation.partition("-")
    if variant == "offset" and torch.compiler.is_compiling():
        down, across = (matrix.to(patches.device) for matrix in bicubic(grid, source))
        patches = down @ patches.float() @ across.T
    elif variant == "offset":
        scale = ((grid[0] + _OFFSET) / source[0], (grid[1] + _OFFSET) / source[1])
        patches = F.interpolate(patches.float(), scale_factor=scale, mode=mode, recompute_scale_factor=False)
    else:
        corners, antialias = variant == "corners", variant == "antialias"
        patches = F.interpolate(patches.float(), size=grid, mode=mode, align_corners=corners, antialias=antialias)
    patches = patches.permute(0, 2, 3, 1).reshape(grid[0] * grid[1], -1).to(table.dtype)
    return torch.cat([table[:num_prefix], patches])


def bicubic(grid: tuple[int, int], source: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """What "bicubic-offset" does along each axis as matrices (h, h0) and (w, w0), for graphs of any size.

    Exporters can neither follow a scale that depends on the size nor take the table as it is where the grids agree.
    """
    matrices, agree = [], torch.ones((), dtype=torch.bool)
    for length, count in zip(grid, source, strict=True):
        index, every = torch.arange(length)[:, None], torch.arange(count)
        place = (index + 0.5) * (count / (length + _OFFSET)) - 0.5
        taps = place.floor() + torch.arange(-1, 3)
        distance = (place - taps).abs()
        near = (1.25 * distance - 2.25) * distance * distance + 1
        far = ((-0.75 * distance + 3.75) * distance - 6) * distance + 3
        weights = torch.where(distance <= 1, near, far)[..., None] * (taps.clamp(0, count - 1)[..., None] == every)
        matrices.append((weights.sum(1), (index == every).float()))
        agree = agree & (index.max() == count - 1)
    rows, columns = (torch.where(agree, same, resized) for resized, same in matrices)
    return rows, columns
