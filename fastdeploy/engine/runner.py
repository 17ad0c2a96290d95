"""Runs the model over one batch: the only place where the engine meets the network."""

from __future__ import annotations

import torch
from torch import Tensor

from ernie.model import ErnieModel
from fastdeploy.engine.batch import Batch, BatchBuilder
from fastdeploy.engine.cache import KVCache, PagedAttend
from fastdeploy.engine.scheduler import Schedule


class Runner:
    def __init__(self, model: ErnieModel, cache: KVCache, batches: BatchBuilder) -> None:
        self.model = model
        self.cache = cache
        self.batches = batches
        self.batch: Batch | None = None
        self.hidden_TD: Tensor | None = None

    @torch.inference_mode()
    def run(self, schedule: Schedule) -> Tensor:
        """Compute the tokens of a step; returns the wanted logits, float32 `(R, V)`, by part."""
        batch = self.batches.build(schedule)
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
