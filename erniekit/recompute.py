"""Forgetting activations: a walk that makes parts of a model compute again in the backward pass.

    granularity   kept per token and layer, of the 0.3B shape, float32     computed twice
    (off)         about 58 KiB                                            swiglu
    mlp           about 30 KiB                                            gate, up, swiglu
    full_attn     about 45 KiB                                            projections, attention
    full          4 KiB: the block's input                                the whole block

`core_attn` is accepted and does nothing more: the attention kernels never keep the weights. The
product of gate and up, and the activation of a vision tower, are never kept either: it costs one
pass over memory to make them again.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from functools import partial

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ernie import kernels
from ernie.layers import MLP
from ernie.model import ErnieModel
from ernie.vision.vit import MLP as TowerMLP
from ernie.vision.vit import VisionBlock, quick_gelu

RECOMPUTED = {"full": "", "full_attn": "self_attn", "mlp": "mlp"}  # of a block; "" is all of it


def recompute(
    model: ErnieModel, granularity: str | None, except_layers: Collection[int] = ()
) -> None:
    """Make the blocks of `model` recompute, in place; names of parameters stay as they are.

    `granularity` None recomputes only what costs next to nothing, in every layer. The blocks of a
    vision tower are recomputed whole, where blocks are.
    """
    # Nothing random happens in a block, so the generator need not be restored.
    again = partial(checkpoint, use_reentrant=False, preserve_rng_state=False)
    for part in model.vision_model.modules() if model.vision_model is not None else ():
        if granularity == "full" and isinstance(part, VisionBlock):
            part.forward = partial(again, part.forward)  # type: ignore[method-assign]
        elif granularity != "full" and isinstance(part, TowerMLP):
            part.forward = partial(_without_activation, part)  # type: ignore[method-assign]
    for number, block in enumerate(model.model.layers):
        chosen = None if number in except_layers else granularity
        if chosen in RECOMPUTED:
            part = block.get_submodule(RECOMPUTED[chosen])
            part.forward = partial(again, part.forward)
        if chosen not in ("full", "mlp"):
            for part in block.modules():
                if isinstance(part, MLP):
                    part.forward = partial(_without_product, part)  # type: ignore[method-assign]


def _without_product(mlp: MLP, x_TD: Tensor) -> Tensor:
    """The forward pass of `mlp`, whose last projection keeps gate and up, which are kept anyway,
    in place of their product.
    """
    gate_TI, up_TI = mlp.gate_proj(x_TD), mlp.up_proj(x_TD)
    kept = gate_TI.detach(), up_TI.detach()
    return _forgetting(kernels.swiglu(gate_TI, up_TI), lambda: kernels.swiglu(*kept), mlp.down_proj)


def _without_activation(mlp: TowerMLP, x_PW: Tensor) -> Tensor:
    """The same of a vision tower, whose last projection makes its input of that of `quick_gelu`."""
    h = mlp.fc1(x_PW)
    kept = h.detach()
    return _forgetting(quick_gelu(h), lambda: quick_gelu(kept), mlp.fc2)


def _forgetting(
    x: Tensor, again: Callable[[], Tensor], project: Callable[[Tensor], Tensor]
) -> Tensor:
    """`project(x)`, for whose backward pass x is made again and not kept."""
    address = x.data_ptr()

    def pack(saved: Tensor) -> Tensor | None:
        return None if saved.data_ptr() == address else saved

    def unpack(packed: Tensor | None) -> Tensor:
        return again() if packed is None else packed

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        return project(x)
