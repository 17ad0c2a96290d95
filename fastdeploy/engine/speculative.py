"""Drafts: guesses of the next tokens of a text, which the next step verifies all at once.

A drafter is called after every step and leaves its guesses in `request.draft_ids`. What they are
worth decides how fast a text grows and nothing else: the sampler keeps a draft only where it has
chosen that very token itself (see `sampler.py`).

    NgramDrafter    what followed the newest tokens when they stood in the text before
    MTPDrafter      what the model's multi-token-prediction block makes of its last hidden state

Legend: T tokens of the flat batch, S texts that are drafted for, D hidden size.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ernie.settings import ConfigError
from fastdeploy.config import Speculation
from fastdeploy.engine.batch import Batch
from fastdeploy.engine.request import Request, Status
from fastdeploy.engine.runner import Runner
from fastdeploy.engine.scheduler import Schedule

Drafter = Callable[[Schedule], None]


def make_drafter(speculation: Speculation | None, runner: Runner) -> Drafter | None:
    """Raises ConfigError if the model has not what it takes."""
    if speculation is None:
        return None
    if speculation.method == "ngram":
        return NgramDrafter(speculation)
    depth = runner.model.config.num_nextn_predict_layers
    if depth != 1:
        raise ConfigError(
            f"speculative_config has the method mtp, but the model has {depth} MTP blocks "
            f"(num_nextn_predict_layers); it takes a model with 1, or the method ngram"
        )
    return MTPDrafter(runner, speculation.num_speculative_tokens)


def num_ahead(speculation: Speculation | None) -> int:
    """Positions past the tokens of a step where the drafter writes to the cache, at most."""
    if speculation is None or speculation.method == "ngram":
        return 0
    return speculation.num_speculative_tokens - 1


def num_allowed(request: Request, num_tokens: int) -> int:
    """How many of `num_tokens` drafts could be of use: one token follows them in any case."""
    if request.status is not Status.RUNNING:
        return 0
    return min(num_tokens, request.max_output - request.num_output - 1)


class NgramDrafter:
    """Proposes the continuation of the most recent earlier place where the text ended as now."""

    def __init__(self, speculation: Speculation) -> None:
        self.speculation = speculation

    def __call__(self, schedule: Schedule) -> None:
        s = self.speculation
        for part in schedule.parts:
            request = part.request
            num_tokens = num_allowed(request, s.num_speculative_tokens) if part.chooses else 0
            if num_tokens > 0:
                if request.drafter_notes is None:
                    request.drafter_notes = NgramIndex(s.min_ngram_size, s.max_ngram_size)
                place = request.drafter_notes.find(request.token_ids)
                request.draft_ids = continuation(request.token_ids, place, num_tokens)


class NgramIndex:
    """Where each n-gram of a growing text has ended last. A new token costs one entry a size."""

    def __init__(self, min_size: int, max_size: int) -> None:
        self.sizes = range(max_size, min_size - 1, -1)
        self.end_by_ngram: dict[tuple[int, ...], int] = {}
        self.num_read = 0  # n-grams that end in `token_ids[:num_read]` are in the dict

    def find(self, token_ids: Sequence[int]) -> int | None:
        """Where the longest possible end of the text has ended before, None if no end ever has.

        `token_ids` is the text of the last call, and what has been added to it.
        """
        length = len(token_ids)
        for end in range(self.num_read + 1, length):  # not the newest: it would find itself
            for size in self.sizes:
                if size <= end:
                    self.end_by_ngram[tuple(token_ids[end - size : end])] = end
        self.num_read = max(self.num_read, length - 1)
        for size in self.sizes:
            if size < length:
                place = self.end_by_ngram.get(tuple(token_ids[length - size :]))
                if place is not None:
                    return place
        return None


def continuation(token_ids: Sequence[int], place: int | None, num_tokens: int) -> list[int]:
    """The tokens from `place` on; where the text ends, the copy goes on with its own beginning."""
    if place is None:
        return []
    period = len(token_ids) - place
    return [token_ids[place + i % period] for i in range(num_tokens)]


@dataclass(frozen=True, slots=True)
class Drafted:
    """A text that MTP drafts for."""

    request: Request
    sequence: int  # which of the step's parts is its
    row: int  # of its last known token but one, whose hidden state the step has computed
    num_tokens: int  # to draft at most, one or more


class MTPDrafter:
    """Drafts with the model's MTP block, which has a layer of the paged cache to itself.

    The block's entry at position t is made of the hidden state at t and of token t + 1. After a
    step every computed token has a known successor, so one pass over the step's own batch fills the
    layer exactly as far as the others are filled, and its last valid row is the first draft:

        main layers   0 1 2 .. n-2        known tokens 0 .. n-1, the last one just chosen
        MTP layer     0 1 2 .. n-2        row n-2: hidden state n-2 with token n-1, drafts token n

    Each further draft takes the block's own output as the hidden state of the next position and
    the draft before as its successor. Those entries, and those of drafts that are not accepted, lie
    past the computed tokens and are overwritten by the pass after the next step.

    A pass is a batch that every rank computes like a step; rank 0 has the logits and picks.
    """

    def __init__(self, runner: Runner, num_tokens: int) -> None:
        self.runner = runner
        self.num_tokens = num_tokens

    def __call__(self, schedule: Schedule) -> None:
        step, texts = self.runner.batch, self._texts(schedule)
        assert step is not None, "a step goes before"
        rows = [text.row for text in texts]  # of the last result
        # Also where nobody is drafted for: the layer is filled for texts that may hit its blocks.
        batch = self._first_batch(step, next_ids(schedule), rows)
        for depth in range(1, self.num_tokens + 1):
            tokens = self.runner.run_batch(batch).argmax(-1).tolist()
            for text, token in zip(texts, tokens, strict=True):
                text.request.draft_ids.append(token)
            kept = [i for i, text in enumerate(texts) if text.num_tokens > depth]
            if not kept:
                return
            texts, rows = [texts[i] for i in kept], [rows[i] for i in kept]
            batch = self._next_batch(step, texts, rows, depth)
            rows = [*range(len(texts))]

    def _texts(self, schedule: Schedule) -> list[Drafted]:
        texts, first, block_size = [], 0, self.runner.cache.block_size
        for s, part in enumerate(schedule.parts):
            request = part.request
            if part.chooses and request.status is Status.RUNNING:
                # The first draft writes nothing, the others need a place each.
                places = len(request.table.blocks) * block_size - request.num_computed
                count = min(num_allowed(request, self.num_tokens), 1 + places)
                row = first + request.num_computed - 1 - part.start
                if count > 0:
                    texts.append(Drafted(request, s, row, count))
            first += part.num_tokens
        return texts

    def _first_batch(self, step: Batch, next_ids: list[int], rows: list[int]) -> Batch:
        """Every token of the step once more, with its successor."""
        return dataclasses.replace(
            step,
            token_ids_T=column(next_ids, step.token_ids_T),
            rows_R=column(rows, step.rows_R),
            after_T=column(range(len(next_ids)), step.rows_R),
            adapters=None,
            modality_T=None,
            embeds=None,
        )

    def _next_batch(
        self, step: Batch, texts: Sequence[Drafted], rows: list[int], depth: int
    ) -> Batch:
        """One token a text: what stands so many places past the last computed one. `rows` of the
        last result are those before.
        """
        block_size = self.runner.cache.block_size
        places = [text.request.num_computed + depth - 1 for text in texts]
        blocks = [t.request.table.blocks[p // block_size] for t, p in zip(texts, places)]
        slots = [b * block_size + p % block_size for b, p in zip(blocks, places)]
        layouts = [text.request.layout for text in texts]
        positions = [p + (layout.shift if layout else 0) for layout, p in zip(layouts, places)]
        return Batch(
            token_ids_T=column([t.request.draft_ids[-1] for t in texts], step.token_ids_T),
            positions_T=column(positions, step.positions_T),
            slots_T=column(slots, step.slots_T),
            cu_seqlens_S1=column(range(len(texts) + 1), step.cu_seqlens_S1),
            lens_S=column([p + 1 for p in places], step.lens_S),
            tables_SM=step.tables_SM[[text.sequence for text in texts]],
            rows_R=column(range(len(texts)), step.rows_R),
            adapters=None,
            after_T=column(rows, step.rows_R),
        )


def column(values: Sequence[int], like: Tensor) -> Tensor:
    return torch.tensor(values, dtype=like.dtype, device=like.device)


def next_ids(schedule: Schedule) -> list[int]:
    """The token after each token of a step; 0 after drafts that were not accepted."""
    ids: list[int] = []
    for part in schedule.parts:
        start, end = part.start + 1, part.start + part.num_tokens + 1
        known = part.request.token_ids[start:end]
        ids += known + [0] * (part.num_tokens - len(known))
    return ids
