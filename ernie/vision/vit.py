"""The vision tower: every patch of every frame becomes a row, and frames do not see one another.

    patch rows (P, C) -> normalised -> patch_embed -> blocks -> LayerNorm -> (P, W)

Legend: P patches of the flat batch, C elements of a patch (channel, row, column), W width of the
tower, H heads, d head width, F frames of all pictures (images and videos).

Patches stand as `ernie.vision.grids` says. Their positions enter by rotary embedding alone: the
pairs of a head are `(x[j], x[j + d/2])`, the first half of which turns with the patch's row and the
second with its column.

Source: PaddleFormers `ernie4_5_moe_vl/model/dfnrope`, transformers `ernie4_5_vl_moe`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ernie import kernels
from ernie.layers import Linear
from ernie.rope import Rotary
from ernie.vision.config import VisionConfig
from ernie.vision.grids import Grids, frame_lengths

MEAN = (0.48145466, 0.4578275, 0.40821073)  # of the channels of CLIP's images, in 0 .. 1
STD = (0.26862954, 0.26130258, 0.27577711)
THETA = 10000.0
EPS = 1e-6  # of every LayerNorm here and in the resampler


def normalised(patches_PC: Tensor, num_channels: int = 3) -> Tensor:
    """Bytes as the tower takes them: `(x / 255 - mean) / std` by channel, float32.

    Floating point rows pass: they were normalised by who made them. Source: PaddleFormers, which
    hands bytes to the model and normalises there, in float32.
    """
    if patches_PC.is_floating_point():
        return patches_PC
    if patches_PC.dtype != torch.uint8:
        raise ValueError(
            f"pixel_values are {str(patches_PC.dtype).removeprefix('torch.')}; give bytes (uint8) "
            "or normalised floating point rows"
        )
    shape = (1, num_channels, 1)
    mean, std = (torch.tensor(v, device=patches_PC.device).view(shape) for v in (MEAN, STD))
    x = patches_PC.unflatten(1, (num_channels, -1)).float() * (1 / 255)
    return ((x - mean) / std).flatten(1)


def patch_places(grids: Grids, merge: int = 2) -> Tensor:
    """Row and column of every patch in its frame, int64 `(P, 2)`."""
    places = []
    for frames, rows, columns in grids:
        window = (rows // merge, merge, columns // merge, merge)
        place = torch.cartesian_prod(torch.arange(rows), torch.arange(columns))
        place = place.view(*window, 2).transpose(1, 2).reshape(-1, 2)
        places.append(place.repeat(frames, 1))
    return torch.cat(places)


class LayerNorm(nn.Module):
    """Statistics in float32; weight and bias in the dtype of x."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))
        self.bias = nn.Parameter(torch.empty(size))

    def forward(self, x_PW: Tensor) -> Tensor:
        weight, bias = self.weight.to(x_PW.dtype), self.bias.to(x_PW.dtype)
        return F.layer_norm(x_PW, weight.shape, weight, bias, EPS)


class Attention(nn.Module):
    """Every patch looks at its whole frame. The rows of `qkv` are queries, keys, values."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.qkv = Linear(config.embed_dim, 3 * config.embed_dim, bias=True)
        self.proj = Linear(config.embed_dim, config.embed_dim, bias=True)

    def forward(
        self, x_PW: Tensor, rotary: Rotary, bounds_F1: Tensor, lengths: Sequence[int]
    ) -> Tensor:
        heads = self.num_heads
        turned_PHd, v_PHd = (
            self.qkv(x_PW).unflatten(-1, (3 * heads, -1)).split((2 * heads, heads), 1)
        )
        turned_PHd = kernels.rotate(turned_PHd, *rotary, halves=True)
        if v_PHd.requires_grad:  # a view would keep queries and keys as they were before
            v_PHd = v_PHd.contiguous()
        q_PHd, k_PHd = turned_PHd.split(heads, 1)
        scale = q_PHd.shape[-1] ** -0.5
        seen_PHd = kernels.attend_packed(
            q_PHd, k_PHd, v_PHd, bounds_F1, scale, lengths, causal=False
        )
        return self.proj(seen_PHd.flatten(1))


class MLP(nn.Module):
    """`fc2(quick_gelu(fc1(x)))`."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.fc1 = Linear(config.embed_dim, config.intermediate_size, bias=True)
        self.fc2 = Linear(config.intermediate_size, config.embed_dim, bias=True)

    def forward(self, x_PW: Tensor) -> Tensor:
        return self.fc2(kernels.quick_gelu(self.fc1(x_PW)))


class VisionBlock(nn.Module):
    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.norm1 = LayerNorm(config.embed_dim)
        self.attn = Attention(config)
        self.norm2 = LayerNorm(config.embed_dim)
        self.mlp = MLP(config)

    def forward(
        self, x_PW: Tensor, rotary: Rotary, bounds_F1: Tensor, lengths: Sequence[int]
    ) -> Tensor:
        x_PW = x_PW + self.attn(self.norm1(x_PW), rotary, bounds_F1, lengths)
        return x_PW + self.mlp(self.norm2(x_PW))


class PatchEmbed(nn.Module):
    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.proj = Linear(config.patch_elements, config.embed_dim)

    def forward(self, x_PC: Tensor) -> Tensor:
        return self.proj(x_PC)


class VisionTower(nn.Module):
    """Everything under the published prefix `vision_model.`."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.config = config
        self.patch_embed = PatchEmbed(config)
        self.blocks = nn.ModuleList(VisionBlock(config) for _ in range(config.depth))
        self.ln = LayerNorm(config.embed_dim)

    def forward(self, pixel_values_PC: Tensor, grids: Grids, dtype: torch.dtype) -> Tensor:
        """Rows `(P, W)` of all patches, activations in `dtype`; pixels as for `normalised`.

        Raises ValueError where pixels and grids do not belong together.
        """
        device, lengths = self.ln.weight.device, frame_lengths(grids)
        self.check(pixel_values_PC, grids)
        pixels = normalised(pixel_values_PC.to(device), self.config.in_channels)
        x_PW = self.patch_embed(pixels.to(dtype))
        rotary = self.rotary(grids)
        bounds_F1 = torch.tensor([0, *lengths]).cumsum(0).to(device, torch.int32)
        for block in self.blocks:
            x_PW = block(x_PW, rotary, bounds_F1, lengths)
        return self.ln(x_PW)

    def check(self, pixel_values_PC: Tensor, grids: Grids) -> None:
        """Raise ValueError unless there is a patch for each place of the grids."""
        wanted = (sum(frame_lengths(grids)), self.config.patch_elements)
        if pixel_values_PC.shape != wanted:
            raise ValueError(
                f"pixel_values are {' x '.join(map(str, pixel_values_PC.shape))}, but the grids "
                f"have {wanted[0]} patches of {wanted[1]} elements"
            )

    def rotary(self, grids: Grids) -> Rotary:
        """cos and sin of every pair's angle, float32 `(P, d/2)`: d/4 frequencies for the row, the
        same for the column.
        """
        config, device = self.config, self.ln.weight.device
        half = config.embed_dim // config.num_heads // 2
        places_P2 = patch_places(grids, config.spatial_merge_size).to(device)
        exponents = torch.arange(0, half, 2, dtype=torch.float32, device=device) / half
        angles = places_P2.float()[:, :, None] * (1.0 / THETA**exponents)
        return angles.flatten(1).cos(), angles.flatten(1).sin()
