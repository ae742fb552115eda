"""SPT-SEG: ZegCLIP with spectral prompts and a spectral guided decoder.

Xu et al., "Spectral Prompt Tuning: Unveiling Unseen Classes for Zero-Shot Semantic Segmentation", AAAI 2024. This
follows the authors' code: a learned filter in the frequency domain is added to the patches before the first two blocks
(`SpectralFilter`; the paper's "spectral prompts" are no tokens of their own there), the decoder's layers split patches
into high and low frequencies (`SpectralLayer`), and the structural similarity of the raw mask logits takes the place of
the dice loss (`lexiseg.losses.ssim`). Everything else is as in ZegCLIP. The code works on a grid of 32 x 32 patches
only; here every grid does.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lexiseg.clip.tower import BeforeBlock
from lexiseg.losses.ssim import ssim_loss
from lexiseg.models.one_stage import DecoderLayer, MaskDecoder
from lexiseg.models.options import Count
from lexiseg.models.spectral_init import init_spectral_decoder
from lexiseg.models.zegclip import ZegCLIP, ZegCLIPOptions

_HEADS = 8  # fixed in the authors' code, whatever the number of attention heads elsewhere
_WINDOW = 3


class SPTSegOptions(ZegCLIPOptions):
    """Options of `SPTSeg`, with those of `ZegCLIPOptions`; the spectral decoder has its own eight heads.

    Attributes:
        filter_blocks: how many blocks, from the first on, have the filter added in front of them (released: 2).
        filter_grid: side of the patch grid the filter is made for; None is that of ``window_size``, or else the
            tower's own. On other grids its transfer function is interpolated.
        train_filter: train the filter, as the paper intends. The authors' code, configured like ZegCLIP's, would leave
            it at its random initial values; its own configuration was never released.
    """

    weights_depend_on = ZegCLIPOptions.weights_depend_on | {"filter_blocks", "filter_grid"}

    filter_blocks: Count = 2
    filter_grid: Count | None = None
    train_filter: bool = True


class SpectralFilter(nn.Module):
    """F(patches, cls): patches times the class token, filtered over the grid.

    z = patches * cls, elementwise, as a map (h, w, W); its real two-dimensional Fourier transform is multiplied by a
    complex weight for each frequency and channel, made for one ``grid``, and transformed back.
    """

    def __init__(self, grid: tuple[int, int], width: int) -> None:
        super().__init__()
        self.grid = grid
        self.weight = nn.Parameter(0.02 * torch.randn(grid[0], grid[1] // 2 + 1, width, 2))

    def weights(self, grid: tuple[int, int]) -> Tensor:
        """The weight (h, w // 2 + 1, W, 2), real and imaginary, on another grid, which the released code does not know.

        The weight is read as samples of a function of the frequency in cycles per patch, and interpolated linearly;
        along the first axis frequencies wrap around.
        """
        weight = self.weight.float()
        if grid == self.grid:
            return weight
        rows, columns = (torch.arange(count, device=weight.device) for count in (grid[0], grid[1] // 2 + 1))
        # In this order: ONNX's exporter takes no factor that is a ratio of sizes known only when the graph runs.
        row = torch.where(2 * rows < grid[0], rows, rows - grid[0]) * self.grid[0] / grid[0]
        low = row.floor().long()
        fraction = (row - low)[:, None, None, None]
        weight = weight[low % self.grid[0]].lerp(weight[(low + 1) % self.grid[0]], fraction)
        column = (columns * self.grid[1] / grid[1]).clamp(max=weight.shape[1] - 1)
        low = column.floor().long()
        high = (low + 1).clamp(max=weight.shape[1] - 1)
        return weight[:, low].lerp(weight[:, high], (column - low)[:, None, None])

    def forward(self, patches: Tensor, cls: Tensor, grid: tuple[int, int]) -> Tensor:
        """What is added to patches (B, N, W) of a grid (h, w), given the class token (B, 1, W); in float32."""
        with torch.autocast(patches.device.type, enabled=False):
            z, weights = patches.float() * cls.float(), self.weights(grid)
            if torch.compiler.is_compiling():  # exported graphs have no transform of any size
                return _filtered(z, weights, grid).to(patches.dtype)
            spectrum = torch.fft.rfft2(z.unflatten(1, grid), dim=(1, 2), norm="ortho") * torch.view_as_complex(weights)
            return torch.fft.irfft2(spectrum, s=grid, dim=(1, 2), norm="ortho").flatten(1, 2).to(patches.dtype)


def _filtered(z: Tensor, weights: Tensor, grid: tuple[int, int]) -> Tensor:
    """Patches z (B, N, W) filtered by ``weights`` (h, w // 2 + 1, W, 2), with the transforms as matrix products."""
    (height, width), half = grid, grid[1] // 2 + 1
    down, across = (torch.outer(torch.arange(side), torch.arange(side)).double() / side for side in grid)
    angle = 2 * math.pi * (down[:, None, :, None] + across[:, None, :half]).reshape(height * width, -1)
    cos, sin = angle.cos().to(z), angle.sin().to(z)
    (real, imaginary), (a, b) = (cos.T @ z, -(sin.T @ z)), weights.flatten(0, 1).unbind(-1)
    # A real map's spectrum is stored in half: each frequency counts twice but those that are their own mirror.
    column = torch.arange(half)
    twice = torch.where((column == 0) | (2 * column == width), 1.0, 2.0).to(z).repeat(height) / (height * width)
    return (cos * twice) @ (real * a - imaginary * b) - (sin * twice) @ (real * b + imaginary * a)


class SpectralGuide(nn.Module):
    """High and low frequencies of the patches, gated by a learned prompt: z of patches m.

    One of eight heads attends within windows of 3 x 3 patches (high frequencies); seven attend from every patch to the
    3 x 3 averages of the map (low frequencies). The map is padded with zeros to whole windows, and the zeros take part,
    as in the authors' code. The width must be a multiple of eight.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.head_dim = dim // _HEADS
        low = dim - self.head_dim
        self.low_query = nn.Linear(dim, low, bias=False)
        self.low_key_value = nn.Linear(dim, 2 * low, bias=False)
        self.low_out = nn.Linear(low, low)
        self.high = nn.Linear(dim, 3 * self.head_dim, bias=False)
        self.prompt = nn.Parameter(torch.randn(dim))
        self.transform = nn.Parameter(torch.eye(dim))

    def forward(self, memory: Tensor, grid: tuple[int, int]) -> Tensor:
        """Return z (B, N, D) of patches (B, N, D) of a grid (h, w).

        Where z points away from the prompt it is zero: all classes then have the logit 0 there.
        """
        z = torch.cat([self.high_frequency(memory, grid), self.low_frequency(memory, grid)], dim=-1)
        gate = (F.normalize(z, dim=-1, eps=1e-12) @ F.normalize(self.prompt, dim=0, eps=1e-12)).clamp(0.0, 1.0)
        return (z * gate[..., None]) @ self.transform

    def _windows(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """(B, N, E) to (B, rows of windows, 3, columns of windows, 3, E), padded with zeros at the right and below."""
        height, width = grid
        x = F.pad(x.unflatten(1, grid), (0, 0, 0, -width % _WINDOW, 0, -height % _WINDOW))
        return x.unflatten(2, (-1, _WINDOW)).unflatten(1, (-1, _WINDOW))

    def high_frequency(self, memory: Tensor, grid: tuple[int, int]) -> Tensor:
        """Local details (B, N, E / 2): attention inside windows of 3 x 3 patches."""
        # Without a bias the maps of padding are zero: padding after the map is the same, and less work.
        windows = self._windows(self.high(memory), grid).transpose(2, 3)
        batch, rows, columns = windows.shape[:3]
        # One head, said as an axis: exporters take attention of four axes only.
        query, key, value = windows.reshape(batch * rows * columns, 1, _WINDOW**2, -1).chunk(3, dim=-1)
        mixed = F.scaled_dot_product_attention(query, key, value)
        mixed = mixed.reshape(batch, rows, columns, _WINDOW, _WINDOW, -1).transpose(2, 3)
        return mixed.flatten(3, 4).flatten(1, 2)[:, : grid[0], : grid[1]].flatten(1, 2)

    def low_frequency(self, memory: Tensor, grid: tuple[int, int]) -> Tensor:
        """Global structure (B, N, E / 2): attention from all patches to the means of the windows."""
        pooled = self._windows(memory, grid).mean(dim=(2, 4)).flatten(1, 2)
        key, value = self.low_key_value(pooled).chunk(2, dim=-1)

        def split(x: Tensor) -> Tensor:
            return x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

        mixed = F.scaled_dot_product_attention(split(self.low_query(memory)), split(key), split(value))
        return self.low_out(mixed.transpose(1, 2).flatten(2))


class SpectralLayer(DecoderLayer):
    """Queries attend to z, see `SpectralGuide`: one head, no scale, and no maps of queries and keys."""

    def build_attention(self, dim: int) -> None:
        """Make the guide in the place of maps."""
        self.guide = SpectralGuide(dim)

    def project_memory(self, patches: Tensor, grid: tuple[int, int]) -> tuple[Tensor, ...]:
        """Z (B, N, D); see `DecoderLayer.project_memory`."""
        return (self.guide(patches, grid),)

    def mask_logits(self, queries: Tensor, memory: tuple[Tensor, ...]) -> Tensor:
        """The products of queries and z, (B, C, N)."""
        return queries @ memory[0].transpose(1, 2)

    def attend(self, queries: Tensor, memory: tuple[Tensor, ...], dropout: float) -> Tensor:
        """The mean of z, weighted by the softmax of those products."""
        z = memory[0][:, None]  # one head, said as an axis as in `SpectralGuide`
        return F.scaled_dot_product_attention(queries[:, None], z, z, dropout_p=dropout, scale=1.0).squeeze(1)


class SPTSeg(ZegCLIP):
    """SPT-SEG; the width of CLIP's joint embedding must be a multiple of eight."""

    system = "spt-seg"
    options_class = SPTSegOptions
    options: SPTSegOptions
    init_decoder = staticmethod(init_spectral_decoder)

    def build_prompts(self) -> None:
        """Make the prompts and the filter."""
        super().build_prompts()
        options, tower = self.options, self.clip.image_tower
        side = options.filter_grid or max((options.window_size or self.clip.image_size) // tower.patch_size, 1)
        self.spectral = SpectralFilter((side, side), tower.width)
        if not options.train_filter:
            self.frozen_prefixes += ("spectral.",)

    def build_decoder(self) -> MaskDecoder:
        """Make the spectral guided decoder of a head."""
        count, ratio, dropout = self.options.decoder_layers, self.options.ffn_ratio, self.options.dropout
        return MaskDecoder(SpectralLayer, count, self.clip.embed_dim, _HEADS, ratio, dropout)

    def make_before_block(self, grid: tuple[int, int]) -> BeforeBlock:
        """Add the filtered patches before the first blocks; then the prompts, see `ZegCLIP.make_before_block`."""
        prompts, count = super().make_before_block(grid), grid[0] * grid[1]

        def before_block(index: int, tokens: Tensor) -> tuple[Tensor, Tensor | None]:
            if index < self.options.filter_blocks:
                rest, patches = tokens[:, :-count], tokens[:, -count:]
                tokens = torch.cat([rest, patches + self.spectral(patches, tokens[:, :1], grid)], dim=1)
            return (tokens, None) if prompts is None else prompts(index, tokens)

        return before_block

    def class_losses(self, logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Focal loss, and one minus the structural similarity, both weighted."""
        parts = self.mask_and_dice(logits, labels, 0.0)
        ssim = ssim_loss(logits, labels, weight=self.options.dice_weight)
        return {"loss": parts.total + ssim, "loss_mask": parts.mask, "loss_ssim": ssim.detach()}
