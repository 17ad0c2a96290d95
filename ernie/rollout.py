"""Many answers to many prompts at once, with their log-probabilities: what reinforcement learning
learns from.

    prompts, each once -> first tokens -> one token of every unfinished answer a step -> answers

A prompt is computed once for all its answers: they read its whole blocks of the cache, and have a
copy of the block that it does not fill. Blocks are taken as answers grow and are free again when an
answer has ended; rows of ended answers leave the batch. Randomness belongs to an answer: with the
same weights and seed it is the same, whatever stands beside it, as far as the kernels keep a row's
sum independent of its neighbours (the inference form of `ernie.fused` does on a CPU).

`ernie.generate` is the slow twin; nothing here is a server (`fastdeploy`).

Legend: R rows (answers under way), V vocabulary, M blocks of a table, as in `ernie.kernels`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from ernie import kernels
from ernie.adapters import ActiveAdapters, Adapter
from ernie.attention import Attend
from ernie.model import ErnieModel

BLOCK_SIZE = 16  # tokens
_LIKELY = 1024  # tokens among which `top_p` looks before it sorts the vocabulary


@dataclass(frozen=True)
class Sampling:
    """How answers are drawn. `temperature` 0 takes the likeliest token; `top_k` 0 allows all."""

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0


@dataclass
class Answer:
    """Token ids, the stop token included where one came, and the log-probability of each as the
    model gives it: at temperature 1, over the whole vocabulary.
    """

    token_ids: list[int] = field(default_factory=list)
    log_probs: list[float] = field(default_factory=list)
    is_cut: bool = False  # it reached max_tokens


class Pool:
    """Keys and values in blocks, one pair of stores a layer; grows by half when it is full."""

    def __init__(self, model: ErnieModel, num_blocks: int) -> None:
        c = model.config
        shape = (num_blocks, BLOCK_SIZE, c.num_key_value_heads, c.head_dim)
        empty = partial(torch.zeros, shape, dtype=model.activation_dtype, device=model.device)
        self.stores = [[empty(), empty()] for _ in range(c.num_hidden_layers)]
        self.free = list(range(num_blocks))[::-1]
        self.size = num_blocks

    def take(self, count: int) -> list[int]:
        while len(self.free) < count:
            self._grow(max(self.size // 2, 1))
        return [self.free.pop() for _ in range(count)]

    def _grow(self, count: int) -> None:
        for pair in self.stores:
            for i, store in enumerate(pair):
                pair[i] = torch.cat((store, store.new_zeros(count, *store.shape[1:])))
        self.free = [*range(self.size + count - 1, self.size - 1, -1), *self.free]
        self.size += count

    def copy(self, sources: list[int], targets: list[int]) -> None:
        for pair in self.stores:
            for store in pair:
                store[targets] = store[sources]

    def attend(self, tables: list[list[int]], lengths: list[int], counts: list[int]) -> Attend:
        """For the newest `counts` tokens of sequences with these tables and whole lengths."""
        device = self.stores[0][0].device
        widest = max(map(len, tables))
        rows = [table + [0] * (widest - len(table)) for table in tables]
        tables_SM = torch.tensor(rows, dtype=torch.int32, device=device)
        lens_S = torch.tensor(lengths, dtype=torch.int32, device=device)
        bounds_S1 = torch.tensor([0, *counts], device=device).cumsum(0).to(torch.int32)
        slots_T = torch.tensor(
            [
                table[j // BLOCK_SIZE] * BLOCK_SIZE + j % BLOCK_SIZE
                for table, length, count in zip(tables, lengths, counts)
                for j in range(length - count, length)
            ],
            device=device,
        )

        def attend(q_THd: Tensor, k_TGd: Tensor, v_TGd: Tensor, *, layer: int) -> Tensor:
            keys, values = self.stores[layer]
            scale = q_THd.shape[-1] ** -0.5
            new = (k_TGd, v_TGd, slots_T)
            return kernels.attend_paged(
                q_THd, keys, values, tables_SM, bounds_S1, lens_S, scale, new
            )

        return attend


@dataclass
class _Row:
    """An answer under way: its table, its whole length in the cache, and its own blocks."""

    answer: Answer
    table: list[int]
    length: int
    own: list[int]
    uniform: list[float]  # one number of [0, 1) a token


@torch.no_grad()
def rollout(
    model: ErnieModel,
    prompts: Sequence[Sequence[int]],
    seeds: Sequence[Sequence[int]],
    sampling: Sampling,
    *,
    stop_ids: Sequence[int] = (),
    max_seqs: int = 64,
    adapter: Adapter | None = None,
) -> list[list[Answer]]:
    """Answers to each prompt, one for each of its seeds (64-bit integers).

    At most `max_seqs` answers are under way at once (those of one prompt always are). `adapter`
    needs the inference form of the model. An answer ends with one of `stop_ids` or at
    `sampling.max_tokens`.
    """
    answers: list[list[Answer]] = [[] for _ in prompts]
    start = 0
    while start < len(prompts):
        end, count = start + 1, len(seeds[start])
        while end < len(prompts) and count + len(seeds[end]) <= max_seqs:
            count, end = count + len(seeds[end]), end + 1
        found = _wave(model, prompts[start:end], seeds[start:end], sampling, stop_ids, adapter)
        answers[start:end] = found
        start = end
    return answers


def _wave(
    model: ErnieModel,
    prompts: Sequence[Sequence[int]],
    seeds: Sequence[Sequence[int]],
    sampling: Sampling,
    stop_ids: Sequence[int],
    adapter: Adapter | None,
) -> list[list[Answer]]:
    pool = Pool(model, sum(len(p) // BLOCK_SIZE + 1 + 2 * len(s) for p, s in zip(prompts, seeds)))
    tables = [pool.take(-(-len(prompt) // BLOCK_SIZE)) for prompt in prompts]
    lengths = [len(prompt) for prompt in prompts]
    flat = [token for prompt in prompts for token in prompt]
    positions = [i for length in lengths for i in range(length)]
    attend = pool.attend(tables, lengths, lengths)
    hidden_TD = _hidden(model, flat, positions, attend, adapter)
    ends = torch.tensor(lengths, device=model.device).cumsum(0) - 1
    logits_PV = model.head(hidden_TD[ends])
    answers, rows, prompt_of_row = [], [], []
    for p, (prompt, own_seeds) in enumerate(zip(prompts, seeds)):
        group = [_row(pool, tables[p], len(prompt), seed, sampling) for seed in own_seeds]
        answers.append([row.answer for row in group])
        rows += group
        prompt_of_row += [p] * len(group)
    logits_RV = logits_PV[torch.tensor(prompt_of_row, device=model.device)]
    stops = frozenset(stop_ids)
    while rows := _extended(pool, rows, logits_RV, sampling, stops):
        tables, lengths = [row.table for row in rows], [row.length for row in rows]
        newest = [row.answer.token_ids[-1] for row in rows]
        attend = pool.attend(tables, lengths, [1] * len(rows))
        hidden_RD = _hidden(model, newest, [n - 1 for n in lengths], attend, adapter)
        logits_RV = model.head(hidden_RD)
    return answers


def _hidden(
    model: ErnieModel,
    token_ids: list[int],
    positions: list[int],
    attend: Attend,
    adapter: Adapter | None,
) -> Tensor:
    ids_T = torch.tensor(token_ids, device=model.device)
    active = None
    if adapter is not None:
        active = ActiveAdapters(((adapter, torch.arange(len(ids_T), device=model.device)),))
    positions_T = torch.tensor(positions, device=model.device)
    return model.hidden(ids_T, positions_T, attend, adapters=active)


def _row(pool: Pool, table: list[int], length: int, seed: int, sampling: Sampling) -> _Row:
    """An answer that begins after a prompt: whole blocks are the prompt's own, the rest a copy."""
    own = []
    if length % BLOCK_SIZE:
        own = pool.take(1)
        pool.copy(table[-1:], own)
    generator = torch.Generator().manual_seed(seed)
    uniform = torch.rand(sampling.max_tokens, generator=generator, dtype=torch.float64).tolist()
    return _Row(Answer(), [*table[: length // BLOCK_SIZE], *own], length, own, uniform)


def _extended(
    pool: Pool, rows: list[_Row], logits_RV: Tensor, sampling: Sampling, stops: frozenset[int]
) -> list[_Row]:
    """Give every row its next token; returns those that go on, with room for it in the cache."""
    uniform = [row.uniform[len(row.answer.token_ids)] for row in rows]
    uniform_R = torch.tensor(uniform, dtype=torch.float64, device=logits_RV.device)
    tokens_R, log_probs_R = choose(logits_RV, uniform_R, sampling)
    left = []
    for row, token, log_prob in zip(rows, tokens_R.tolist(), log_probs_R.tolist()):
        answer = row.answer
        answer.token_ids.append(token)
        answer.log_probs.append(log_prob)
        has_stopped = token in stops
        answer.is_cut = not has_stopped and len(answer.token_ids) == sampling.max_tokens
        if has_stopped or answer.is_cut:
            pool.free += row.own
            continue
        row.length += 1
        if row.length > len(row.table) * BLOCK_SIZE:
            new = pool.take(1)
            row.own += new
            row.table += new
        left.append(row)
    return left


def choose(logits_RV: Tensor, uniform_R: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """One token a row, int64 `(R,)`, and its log-probability, float32 `(R,)`.

    The token is the first at which the cumulated probability exceeds the row's number of [0, 1).
    """
    if sampling.temperature == 0:
        tokens_R = logits_RV.argmax(-1)
    else:
        probs_RV = (logits_RV / sampling.temperature).softmax(-1)
        kept_RK, order_RK = _kept(probs_RV, sampling)
        cumulated_RK = kept_RK.double().cumsum(-1)
        wanted_R1 = uniform_R[:, None] * cumulated_RK[:, -1:]
        place_R1 = torch.searchsorted(cumulated_RK, wanted_R1, right=True)
        place_R1 = place_R1.clamp_(max=kept_RK.shape[-1] - 1)
        tokens_R = (place_R1 if order_RK is None else order_RK.gather(-1, place_R1))[:, 0]
    chosen_R = logits_RV.gather(-1, tokens_R[:, None])[:, 0]
    return tokens_R, chosen_R - logits_RV.logsumexp(-1)


def _kept(probs_RV: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor | None]:
    """Probabilities of what may be drawn, zero elsewhere, and whose they are (None: in order)."""
    top_k, top_p, size = sampling.top_k, sampling.top_p, probs_RV.shape[-1]
    if not top_k and top_p >= 1:
        return probs_RV, None
    width = min(top_k or _LIKELY, size)
    kept_RK, order_RK = probs_RV.topk(width)
    if not top_k and bool((kept_RK.sum(-1) < top_p).any()):
        kept_RK, order_RK = probs_RV.sort(descending=True, stable=True)
    if top_p < 1:
        mass_R1 = kept_RK.sum(-1, keepdim=True) if top_k else 1.0
        before_RK = kept_RK.cumsum(-1) - kept_RK
        outside_RK = before_RK >= top_p * mass_R1
        outside_RK[:, 0] = False
        kept_RK = kept_RK.masked_fill(outside_RK, 0.0)
    return kept_RK, order_RK
