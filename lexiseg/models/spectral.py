"""Spectral prompts: a learnt filter in the frequency domain, added to the patches of the first blocks (SPT-SEG).

The published description of SPT-SEG and its code differ in the word: its "spectral prompts" are no tokens of their own
but are added to the patch tokens. This file follows the code.
"""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn

from lexiseg.clip.image import BeforeBlock
from lexiseg.errors import LexisegError
from lexiseg.models.base import ModelOptions


class SpectralOptions(ModelOptions):
    """Options of the spectral prompts.

    Attributes:
        filter_blocks: the filter is added before each of the first so many blocks (released: 2).
        filter_grid: side of the patch grid the filter is made for; None is that of ``window_size``, or else the
            tower's own. On other grids its transfer function is interpolated.
        train_filter: train the filter, as the paper means it. The authors' code would leave it at its random start,
            if it is configured like ZegCLIP's; that configuration was never released.
    """

    filter_blocks: Annotated[int, Field(ge=1)] = 2
    filter_grid: Annotated[int, Field(ge=1)] | None = None
    train_filter: bool = True


class SpectralFilter(nn.Module):
    """F(patches, cls): patches times the class token, filtered over the grid.

    z = patches * cls, elementwise, as a map (h, w, W); its real two-dimensional Fourier transform is multiplied by a
    complex weight for each frequency and channel and transformed back.

    Args:
        grid: (h, w) the weight is made for.
        width: W of the tower.

    Raises:
        LexisegError: the grid is empty.
    """

    def __init__(self, grid: tuple[int, int], width: int) -> None:
        super().__init__()
        if min(grid) < 1:
            raise LexisegError(f"A spectral filter of {grid[0]} x {grid[1]} patches cannot be built; give a grid.")
        self.grid = grid
        self.weight = nn.Parameter(0.02 * torch.randn(grid[0], grid[1] // 2 + 1, width, 2))

    def transfer(self, grid: tuple[int, int]) -> Tensor:
        """The complex weight (h, w // 2 + 1, W) for patches of another grid.

        The released code knows one grid only. Here the weight is read as samples of a function of the frequency in
        cycles a patch, and interpolated linearly; along the first axis frequencies wrap around.
        """
        weight = self.weight.float()
        if grid != self.grid:
            rows = _interpolation(torch.fft.fftfreq(grid[0]), self.grid[0], self.grid[0], wrap=True)
            columns = _interpolation(torch.fft.rfftfreq(grid[1]), self.grid[1], weight.shape[1], wrap=False)
            rows, columns = rows.to(weight.device), columns.to(weight.device)
            weight = torch.einsum("ag,bf,gfwc->abwc", rows, columns, weight)
        return torch.view_as_complex(weight.contiguous())

    def forward(self, patches: Tensor, cls: Tensor, grid: tuple[int, int]) -> Tensor:
        """Return what is added to the patches.

        Args:
            patches: (B, N, W).
            cls: (B, 1, W), the class token.
            grid: (h, w), N = h * w.

        Returns:
            (B, N, W), of the patches' type; computed in float32.
        """
        with torch.autocast(patches.device.type, enabled=False):
            z = (patches.float() * cls.float()).unflatten(1, grid)
            spectrum = torch.fft.rfft2(z, dim=(1, 2), norm="ortho") * self.transfer(grid)
            z = torch.fft.irfft2(spectrum, s=grid, dim=(1, 2), norm="ortho")
        return z.flatten(1, 2).to(patches.dtype)

    def hook(self, grid: tuple[int, int], num_blocks: int, after: BeforeBlock | None) -> BeforeBlock:
        """Make the function that adds the filtered patches in an image tower.

        Args:
            grid: of the patches.
            num_blocks: it acts before each of the first so many blocks.
            after: called next, with the changed tokens; the visual prompts.
        """
        count = grid[0] * grid[1]

        def before_block(index: int, tokens: Tensor) -> tuple[Tensor, Tensor | None]:
            if index < num_blocks:
                rest, patches = tokens[:, :-count], tokens[:, -count:]
                tokens = torch.cat([rest, patches + self(patches, tokens[:, :1], grid)], dim=1)
            return (tokens, None) if after is None else after(index, tokens)

        return before_block


def _interpolation(frequencies: Tensor, period: int, samples: int, *, wrap: bool) -> Tensor:
    """The matrix (targets, samples) that interpolates samples at k / period linearly at ``frequencies``."""
    place = frequencies * period
    place = place % period if wrap else place.clamp(max=samples - 1)
    low = place.floor()
    share = place - low
    low_index = low.long() % samples
    high_index = (low.long() + 1) % samples if wrap else (low.long() + 1).clamp(max=samples - 1)
    matrix = torch.zeros(len(place), samples)
    target = torch.arange(len(place))
    matrix.index_put_((target, low_index), 1 - share, accumulate=True)
    return matrix.index_put_((target, high_index), share, accumulate=True)
