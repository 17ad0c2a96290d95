"""Runs the model over one batch: the only place where the engine meets the network."""

from __future__ import annotations

import torch
from torch import Tensor

from ernie.model import ErnieModel
from fastdeploy.engine.batch import Batch, BatchBuilder
from fastdeploy.engine.cache import KVCache, PagedAttend
from fastdeploy.engine.ranks import Ranks
from fastdeploy.engine.scheduler import Schedule


class Runner:
    """On a rank above 0 there are no `batches` to build: rank 0 sends them."""

    def __init__(
        self,
        model: ErnieModel,
        cache: KVCache,
        batches: BatchBuilder | None,
        ranks: Ranks | None = None,
    ) -> None:
        self.model = model
        self.cache = cache
        self.batches = batches
        self.ranks = ranks
        self.batch: Batch | None = None
        self.hidden_TD: Tensor | None = None

    def run(self, schedule: Schedule) -> Tensor:
        """Compute the tokens of a step; returns the wanted logits, float32 `(R, V)`, by part."""
        assert self.batches is not None, "rank 0 decides what is run"
        batch = self.batches.build(schedule)
        if self.ranks is None:
            return self.compute(batch)
        with self.ranks.watched():
            self.ranks.send(batch)
            return self.compute(batch.to(self.model.device))

    @torch.inference_mode()
    def compute(self, batch: Batch) -> Tensor:
        """What every rank does with a batch; only rank 0 gets whole rows of logits."""
        attend = PagedAttend(self.cache, batch)
        hidden_TD = self.model.hidden(
            batch.token_ids_T, batch.positions_T, attend, adapters=batch.adapters
        )
        self.batch, self.hidden_TD = batch, hidden_TD  # for a drafter, until the next step
        if not len(batch.rows_R):
            return hidden_TD.new_empty(0, self.model.config.vocab_size, dtype=torch.float32)
        if len(batch.rows_R) < len(hidden_TD):
            hidden_TD = hidden_TD[batch.rows_R]
        return self.model.head(hidden_TD)
