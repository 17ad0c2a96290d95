"""What is told of the routers of a mixture of experts while it trains, layer by layer.

    moe_max_over_mean   load of the busiest expert over the mean, in the layer where it is worst
    moe_dead_experts    experts of all layers without a token in the last DEAD_AFTER steps
    moe_entropy         of the router's probabilities over its largest value, mean over the layers
    moe_layers          the same three numbers of each layer, as lists
    moe_loads           at about a hundred steps of a run: tokens of each expert, a list a layer

Of a multimodal model these are about the text experts, and the same with moe_vision_ about the
vision experts. A collapsing router shows in all of them: load goes to a few experts, the others
die, and the entropy falls. Numbers are of the whole step, all batches and all ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

DEAD_AFTER = 20  # steps
_MOST_LOADS = 100  # of a run


def figures(
    loads: Sequence[Tensor],
    entropies: Sequence[Tensor],
    idle: list[list[int]],
    top_k: int,
    *,
    with_loads: bool,
    num_banks: int = 1,
) -> dict[str, Any]:
    """The numbers of a step, from each layer's load `(E,)` and its entropy summed over the tokens;
    where there are two banks, from those of a layer's text and vision experts in turn.

    `idle`, the steps since each expert's last token by layer, is moved on by one step.
    """
    if not loads:
        return {}
    counts = _lists(loads)
    if not idle:
        idle += [[0] * len(layer) for layer in counts]
    found: dict[str, Any] = {}
    for bank, name in zip(range(num_banks), ("moe_", "moe_vision_")):
        own = slice(bank, None, num_banks)
        values = _of_bank(counts[own], list(entropies)[own], idle[own], top_k)
        if with_loads:
            values["loads"] = counts[own]
        found |= {name + key: value for key, value in values.items()}
    return found


def _of_bank(
    counts: list[list[int]], entropies: Sequence[Tensor], idle: list[list[int]], top_k: int
) -> dict[str, Any]:
    for layer, steps in zip(counts, idle, strict=True):
        steps[:] = [0 if count else n + 1 for count, n in zip(layer, steps, strict=True)]
    busiest = [max(layer) * len(layer) / max(sum(layer), 1) for layer in counts]
    dead = [sum(n >= DEAD_AFTER for n in steps) for steps in idle]
    found: dict[str, Any] = {
        "max_over_mean": max(busiest),
        "dead_experts": sum(dead),
    }
    layers: dict[str, list[Any]] = {"max_over_mean": _rounded(busiest), "dead_experts": dead}
    if entropies:
        num_tokens = [max(sum(layer) / top_k, 1) for layer in counts]
        sums = torch.stack(list(entropies)).tolist()
        means = [total / n for total, n in zip(sums, num_tokens, strict=True)]
        found["entropy"] = sum(means) / len(means)
        layers["entropy"] = _rounded(means)
    found["layers"] = layers
    return found


def _lists(loads: Sequence[Tensor]) -> list[list[int]]:
    """Each layer's numbers, in one copy from the device."""
    flat = iter(torch.cat(list(loads)).tolist())
    return [[next(flat) for _ in range(len(load))] for load in loads]


def tells_loads(step: int, num_steps: int) -> bool:
    """Whether the record of a step has `moe_loads`: about a hundred do, the first and the last."""
    return step in (1, num_steps) or step % max(num_steps // _MOST_LOADS, 1) == 0


def _rounded(values: Sequence[float]) -> list[float]:
    return [round(value, 4) for value in values]
