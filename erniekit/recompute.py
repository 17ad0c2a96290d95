"""Forgetting activations: a walk that makes parts of a model compute again in the backward pass.

    granularity   kept per token and layer, of the 0.3B shape, float32     computed twice
    (off)         about 70 KiB                                            nothing
    mlp           about 30 KiB                                            gate, up, swiglu
    full_attn     about 45 KiB                                            projections, attention
    full          4 KiB: the block's input                                the whole block

`core_attn` is accepted and does nothing more: the attention kernels never keep the weights.
"""

from __future__ import annotations

from collections.abc import Collection
from functools import partial

from torch.utils.checkpoint import checkpoint

from ernie.model import ErnieModel

_PARTS = {"full": "", "full_attn": "self_attn", "mlp": "mlp"}  # of a block; "" is all of it


def recompute(model: ErnieModel, granularity: str, except_layers: Collection[int] = ()) -> None:
    """Make the blocks of `model` recompute, in place; names of parameters stay as they are."""
    for number, block in enumerate(model.model.layers):
        if number not in except_layers and granularity in _PARTS:
            part = block.get_submodule(_PARTS[granularity])
            # Nothing random happens in a block, so the generator need not be restored.
            again = partial(checkpoint, use_reentrant=False, preserve_rng_state=False)
            part.forward = partial(again, part.forward)
