"""The plain generator: one sequence, one token at a time, nothing clever. The engine's oracle.

Every setting of the serving engine must give, at temperature 0, the tokens that this module gives.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from ernie import kernels
from ernie.model import ErnieModel


class GrowingCache:
    """An `attend` that remembers: keys and values of one sequence, appended call by call, one store
    a layer, in the dtype of the activations or another that a cache may have.
    """

    def __init__(self, dtype: torch.dtype | None = None) -> None:
        self.dtype = dtype
        self.keys: dict[int, Tensor] = {}
        self.values: dict[int, Tensor] = {}

    def __call__(self, q_THd: Tensor, k_TGd: Tensor, v_TGd: Tensor, *, layer: int) -> Tensor:
        for store, new_TGr in zip((self.keys, self.values), self._rows(k_TGd, v_TGd)):
            store[layer] = torch.cat((store[layer], new_TGr)) if layer in store else new_TGr
        keys_nGr, values_nGr = self.keys[layer], self.values[layer]
        # The growing cache is one block of n positions: the paged operation with the simplest of
        # tables.
        whole = torch.zeros(1, 1, dtype=torch.int32, device=q_THd.device)
        rows = torch.tensor([0, len(q_THd)], dtype=torch.int32, device=q_THd.device)
        length = torch.tensor([len(keys_nGr)], dtype=torch.int32, device=q_THd.device)
        scale = q_THd.shape[-1] ** -0.5
        return kernels.attend_paged(
            q_THd, keys_nGr[None], values_nGr[None], whole, rows, length, scale
        )

    def _rows(self, k_TGd: Tensor, v_TGd: Tensor) -> tuple[Tensor, ...]:
        """Keys and values in the cache's format."""
        tokens, heads, width = k_TGd.shape
        dtype = self.dtype or k_TGd.dtype
        shape = (1, tokens, heads, kernels.cache_width(width, dtype))
        keys, values = (torch.empty(shape, dtype=dtype, device=k_TGd.device) for _ in range(2))
        slots = torch.arange(tokens, device=k_TGd.device)
        kernels.write_cache(k_TGd, v_TGd, keys, values, slots)
        return keys[0], values[0]


@torch.no_grad()
def generate(
    model: ErnieModel,
    prompt_ids: Sequence[int],
    *,
    max_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    stop_ids: Sequence[int] = (),
    cache_dtype: torch.dtype | None = None,
    pixel_values: Tensor | np.ndarray | None = None,
    grid_thw: Tensor | np.ndarray | None = None,
) -> Iterator[int]:
    """Yield new token ids until one of `stop_ids` (which is yielded too) or `max_tokens`.

    `pixel_values` `(P, C)` and `grid_thw` `(N, 3)` are the pictures of the prompt, as for
    `ErnieModel.prompt`; what is generated is text, and stands behind the prompt's largest position.
    `temperature` 0 takes the most likely token, the smallest id among equals. `cache_dtype` rounds
    keys and values as a serving cache of that dtype does.
    """
    cache, generator = GrowingCache(cache_dtype), torch.Generator(model.device).manual_seed(seed)
    prompt = model.prompt(prompt_ids, pixel_values, grid_thw)
    hidden_TD = model.read(prompt, cache)
    position = int(prompt.positions.max()) + 1
    for number in range(max_tokens):
        token = choose(model.head(hidden_TD[-1:])[0], temperature, top_p, generator)
        yield token
        if token in stop_ids or number + 1 == max_tokens:
            return
        ids_T = torch.tensor([token], device=model.device)
        hidden_TD = model.hidden(ids_T, torch.tensor([position], device=model.device), cache)
        position += 1


def choose(logits_V: Tensor, temperature: float, top_p: float, generator: torch.Generator) -> int:
    """One token: argmax at temperature 0, else a draw from the smallest set of tokens with mass
    `top_p`.
    """
    if temperature == 0:
        return int(logits_V.argmax())
    probs_V, order_V = (logits_V / temperature).softmax(-1).sort(descending=True, stable=True)
    outside = probs_V.cumsum(0) - probs_V >= top_p
    outside[0] = False
    probs_V = probs_V.masked_fill(outside, 0.0)
    return int(order_V[probs_V.multinomial(1, generator=generator)])
