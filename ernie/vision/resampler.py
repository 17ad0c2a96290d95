"""The resampler: from patches of the vision tower to rows of the language model.

    (P, W) --2 x 2 patches--> (P/4, 4W) --spatial_linear--> (P/4, 4W)
           --2 frames------>  (L, 8W)   --temporal_linear-> (L, 4W)  --mlp, after_norm--> (L, D)

Legend: P patches, W width of the tower, L rows of the language model, D hidden size.

Frames are merged in pairs; an image is merged with itself, so that a picture of t frames, h rows
and w columns of patches becomes `max(t / 2, 1) * h/2 * w/2` rows.

Source: PaddleFormers `ernie4_5_moe_vl` (`VariableResolutionResamplerModel`), transformers.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ernie.config import ErnieConfig
from ernie.layers import Linear, RMSNorm
from ernie.vision.grids import Grids
from ernie.vision.vit import LayerNorm


def merged_frames(grids: Grids, merge: int = 2) -> Tensor:
    """For every row of the result, the rows of its two frames among windows, int64 `(2, L)`."""
    pairs, start = [], 0
    for frames, rows, columns in grids:
        size = rows // merge * (columns // merge)
        windows = torch.arange(start, start + frames * size).view(frames, size)
        pairs.append(
            torch.stack((windows[0::2].flatten(), windows[min(1, frames - 1) :: 2].flatten()))
        )
        start += frames * size
    return torch.cat(pairs, 1)


class Resampler(nn.Module):
    """Everything under the published prefix `model.resampler_model.`."""

    def __init__(self, config: ErnieConfig) -> None:
        super().__init__()
        vision = config.vision_config
        assert vision is not None
        self.merge = vision.spatial_merge_size
        wide = vision.embed_dim * self.merge**2
        self.spatial_linear = _two_layers(wide, wide)
        self.temporal_linear = _two_layers(2 * wide, wide)
        self.mlp = Linear(wide, config.hidden_size, bias=True)
        self.after_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x_PW: Tensor, grids: Grids) -> Tensor:
        """Rows `(L, D)` of all pictures, in their order."""
        windows = self.spatial_linear(x_PW.reshape(-1, x_PW.shape[1] * self.merge**2))
        first, second = merged_frames(grids, self.merge).to(x_PW.device)
        x = self.temporal_linear(torch.cat((windows[first], windows[second]), 1))
        return self.after_norm(self.mlp(x))


def _two_layers(in_size: int, size: int) -> nn.Sequential:
    return nn.Sequential(
        Linear(in_size, size, bias=True), nn.GELU(), Linear(size, size, bias=True), LayerNorm(size)
    )
