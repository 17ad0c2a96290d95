"""Forgetting activations: a walk that makes parts of a model compute again in the backward pass.

    granularity   kept per token and layer, of the 0.3B shape, float32     computed twice
    (off)         about 50 KiB                                            norms, swiglu
    mlp           about 26 KiB                                            gate, up, swiglu, a norm
    full_attn     about 41 KiB                                            projections, attention
    full          4 KiB: the block's input                                the whole block

`core_attn` is accepted and does nothing more: the attention kernels never keep the weights. The
results of norms, the product of gate and up, and the activation of a vision tower are never kept
either: it costs one pass over memory to make them again.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

from torch import Tensor, nn

from ernie import kernels
from ernie.layers import MLP
from ernie.model import Block, ErnieModel
from ernie.recomputed import recomputed, saved_by
from ernie.vision.vit import MLP as TowerMLP
from ernie.vision.vit import VisionBlock
from erniekit.config.model import TOWER

T = TypeVar("T")

_PARTS = {"full": "", "full_attn": "self_attn", "mlp": "mlp"}  # of a block; "" is all of it


def recompute(model: ErnieModel, granularity_of: Callable[[int | str], str | None]) -> None:
    """Make the blocks of `model` recompute, in place; names of parameters stay as they are.

    `granularity_of` is asked for each layer by number and for the vision tower, whose blocks are
    recomputed whole or not at all. None recomputes only what costs next to nothing.
    """
    is_full = granularity_of(TOWER) == "full"
    for part in model.vision_model.modules() if model.vision_model is not None else ():
        if not isinstance(part, VisionBlock):
            continue
        if is_full:
            part.forward = partial(_again, part.forward)  # type: ignore[method-assign]
        else:
            part.mlp.forward = partial(_without_activation, part.mlp)  # type: ignore[method-assign]
            _forget_between(part.norm1, part.attn)
            _forget_between(part.norm2, part.mlp)
    for number, block in enumerate(model.model.layers):
        assert isinstance(block, Block)
        chosen = granularity_of(number)
        if chosen in _PARTS:
            part = block.get_submodule(_PARTS[chosen])
            part.forward = partial(_again, part.forward)
        if chosen not in ("full", "mlp"):
            for part in block.modules():
                if isinstance(part, MLP):
                    part.forward = partial(_without_product, part)  # type: ignore[method-assign]
            _forget_between(block.post_attention_layernorm, block.mlp)
        if chosen not in ("full", "full_attn"):
            _forget_between(block.input_layernorm, block.self_attn)


def _again(forward: Callable[..., T], *args: Any, **settings: Any) -> T:
    return recomputed(partial(forward, **settings), *args)


def _without_product(mlp: MLP, x_TD: Tensor) -> Tensor:
    """The forward pass of `mlp`, whose last projection keeps gate and up, which are kept anyway,
    in place of their product.
    """
    gate_TI, up_TI = mlp.gate_proj(x_TD), mlp.up_proj(x_TD)
    return _forgetting(
        kernels.swiglu(gate_TI, up_TI), kernels.swiglu, (gate_TI, up_TI), mlp.down_proj
    )


def _without_activation(mlp: TowerMLP, x_PW: Tensor) -> Tensor:
    """The same of a vision tower, whose last projection makes its input of that of `quick_gelu`."""
    h = mlp.fc1(x_PW)
    return _forgetting(kernels.quick_gelu(h), kernels.quick_gelu, (h,), mlp.fc2)


def _forget_between(norm: nn.Module, reader: nn.Module) -> None:
    """Have `reader`, which is called with the result of `norm`, keep the input of the norm, which
    is kept anyway, in place of the result.
    """
    normalise, read = norm.forward, reader.forward
    given: list[Tensor] = []

    def remembering(x_TD: Tensor) -> Tensor:
        given[:] = [x_TD]
        return normalise(x_TD)

    def forgetting(normed_TD: Tensor, *args: Any, **settings: Any) -> Any:
        kept = (given.pop(),)
        return _forgetting(normed_TD, normalise, kept, lambda x: read(x, *args, **settings))

    norm.forward = remembering  # type: ignore[method-assign]
    reader.forward = forgetting  # type: ignore[method-assign]


def _forgetting(
    x: Tensor, make: Callable[..., Tensor], kept: tuple[Tensor, ...], use: Callable[[Tensor], T]
) -> T:
    """`use(x)`, for whose backward pass `kept` is kept and not x, which is `make(*kept)` again.

    It is made once, however often it is needed.
    """
    address, shape, kept = x.data_ptr(), x.shape, tuple(source.detach() for source in kept)
    num_needed, made = 0, None

    def pack(saved: Tensor) -> Tensor | tuple[Tensor, ...]:
        nonlocal num_needed
        if saved.data_ptr() != address or saved.shape != shape:
            return saved.detach()  # a result itself would keep alive what it comes from
        num_needed += 1
        return kept

    def unpack(packed: Tensor | tuple[Tensor, ...]) -> Tensor:
        nonlocal num_needed, made
        if isinstance(packed, Tensor):
            return packed
        found = make(*packed) if made is None else made
        num_needed -= 1
        made = found if num_needed else None
        return found

    with saved_by(pack, unpack):
        return use(x)
