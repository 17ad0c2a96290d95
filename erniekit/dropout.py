"""Dropout while a model trains: a walk that lets its parts drop elements, by seeds.

    x + drop(attention(norm(x))), x + drop(mlp(norm(x)))    hidden_dropout_prob
    drop(softmax(q k')) v                                   attention_probs_dropout_prob
    W x + scale B A drop(x)                                 lora_dropout

The first two grow with depth, `rate * layer / layers`, and over `dropout_warmup_steps` steps, so
that the lowest layer never drops anything. Prediction blocks do not either, nor does a vision
tower.

A mask follows from the run's seed, the step, the batch's number in it, the layer and the place in
the layer. So a resumed run and one on several ranks drop the same elements, a block that is
computed again drops them again, and no mask is kept: the backward pass draws its own. Outside of
`Dropout.during` nothing is dropped.

Source: Srivastava et al. 2014; ERNIEKit's rates by layer and step (its flash attention leaves
weights alone, whatever the rate; without it they are dropped as here); PEFT for adapters.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ernie.model import Block, ErnieModel
from erniekit.config import Run
from erniekit.lora import Pair
from erniekit.seeds import seed_of


class Dropout:
    """What is dropped at which rate; one for all parts of a model. The default drops nothing."""

    def __init__(
        self,
        hidden: float = 0.0,
        attention: float = 0.0,
        adapter: float = 0.0,
        *,
        warmup_steps: int = 0,
        num_layers: int = 1,
        seed: int = 0,
    ) -> None:
        self.hidden, self.attention, self.adapter = hidden, attention, adapter
        self.warmup_steps, self.num_layers, self.seed = warmup_steps, num_layers, seed
        self.at: tuple[int, int] | None = None  # step and batch

    @contextlib.contextmanager
    def during(self, step: int, batch: int) -> Iterator[None]:
        """Inside, where forward and backward pass of a batch belong, elements are dropped. `step`
        counts those done before, `batch` those of the step, of all ranks.
        """
        self.at = (step, batch)
        try:
            yield
        finally:
            self.at = None

    def rate(self, most: float, layer: int) -> float:
        """The rate of a layer now, of what grows with depth and steps; 0 outside of `during`."""
        if self.at is None:
            return 0.0
        rise = min(self.at[0] / self.warmup_steps, 1.0) if self.warmup_steps else 1.0
        return most * rise * layer / self.num_layers

    def drop(self, x: Tensor, rate: float, *place: int) -> Tensor:
        """`x` with elements dropped, and the others divided by `1 - rate`."""
        if self.at is None or not rate:
            return x
        return _Drop.apply(x, rate, seed_of(self.seed, *self.at, *place))

    # --- what the walk puts into a block ---

    def after(self, layer: int, place: int, part: nn.Module, args: Any, out: Any) -> Any:
        """A hook behind attention or feed-forward; experts give their routing along."""
        del part, args
        rate = self.rate(self.hidden, layer)
        if isinstance(out, tuple):
            return (self.drop(out[0], rate, layer, place), *out[1:])
        return self.drop(out, rate, layer, place)

    def before(self, layer: int, part: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        """A hook in front of attention, which has `attend` drop weights."""
        del part
        if not (rate := self.rate(self.attention, layer)):
            return None
        x_TD, rotary, attend = args

        def drop(weights_Hqn: Tensor, number: int) -> Tensor:
            return self.drop(weights_Hqn, rate, layer, _WEIGHTS, number)

        return x_TD, rotary, partial(attend, drop=drop)


_ATTENTION, _MLP, _WEIGHTS, _ADAPTERS = range(4)  # places in a layer


def add_dropout(model: ErnieModel, run: Run) -> Dropout:
    """Let the parts of a model that is about to be trained drop elements, in place."""
    o, layers = run.optimisation, model.model.layers
    found = Dropout(
        o.hidden_dropout_prob,
        o.attention_probs_dropout_prob,
        run.model.lora_dropout,
        warmup_steps=o.dropout_warmup_steps,
        num_layers=len(layers),
        seed=run.training.seed,
    )
    for number, block in enumerate(layers):
        assert isinstance(block, Block)
        if found.hidden:
            block.self_attn.register_forward_hook(partial(found.after, number, _ATTENTION))
            block.mlp.register_forward_hook(partial(found.after, number, _MLP))
        if found.attention:
            block.self_attn.register_forward_pre_hook(partial(found.before, number))
        if found.adapter:
            pairs = (module for module in block.modules() if isinstance(module, Pair))
            for place, pair in enumerate(pairs):
                pair.dropout = _of_adapter(found, number, place)
    return found


def _of_adapter(dropout: Dropout, layer: int, place: int) -> Any:
    return lambda x: dropout.drop(x, dropout.adapter, layer, _ADAPTERS, place)


class _Drop(torch.autograd.Function):
    """`x * mask / (1 - rate)`, whose backward pass draws the mask again."""

    @staticmethod
    def forward(ctx, x: Tensor, rate: float, seed: int) -> Tensor:
        ctx.rate, ctx.seed = rate, seed
        return x * factors(x, rate, seed)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return grad * factors(grad, ctx.rate, ctx.seed), None, None


def factors(like: Tensor, rate: float, seed: int) -> Tensor:
    """0 where an element of `like` is dropped, else `1 / (1 - rate)`; the same for a seed."""
    generator = torch.Generator(like.device).manual_seed(seed)
    uniform = torch.rand(like.shape, generator=generator, device=like.device)
    return (uniform >= rate).to(like.dtype) / (1 - rate)
