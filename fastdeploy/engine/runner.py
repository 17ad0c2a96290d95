"""Runs the model over one batch: the only place where the engine meets the network."""

from __future__ import annotations

import contextlib
from dataclasses import replace

import torch
from torch import Tensor

from ernie import kernels
from ernie.attention import Attend
from ernie.model import ErnieModel
from fastdeploy.config import EngineConfig
from fastdeploy.engine.batch import Batch, BatchBuilder
from fastdeploy.engine.cache import KVCache, PagedAttend
from fastdeploy.engine.graphs import (
    GPU_PADDING,
    DecodeGraphs,
    FixedBatch,
    Record,
    Shape,
    cuda_recorder,
    graph_shapes,
    program_shapes,
    record_program,
)
from fastdeploy.engine.ranks import Ranks
from fastdeploy.engine.scheduler import Schedule
from fastdeploy.engine.vision import PictureRows


def on(device: torch.device) -> contextlib.AbstractContextManager:
    """The device made this thread's current one: Triton starts its kernels there."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


class Runner:
    """On a rank above 0 there are no `batches` to build: rank 0 sends them."""

    def __init__(
        self,
        model: ErnieModel,
        cache: KVCache,
        batches: BatchBuilder | None,
        ranks: Ranks | None = None,
        pictures: PictureRows | None = None,
    ) -> None:
        self.model = model
        self.cache = cache
        self.batches = batches
        self.batch: Batch | None = None
        self.hidden_TD: Tensor | None = None
        self.ranks = ranks
        self.pictures = pictures  # None for a model of text
        self.graphs: DecodeGraphs | None = None
        # As chosen when this engine was made, whatever another of the process has chosen since.
        self.is_batch_invariant = kernels.is_batch_invariant()

    def record_decoding(self, record: Record, shapes: list[Shape], padding: int) -> DecodeGraphs:
        """Have decode steps run as recordings; see `fastdeploy.engine.graphs`."""
        assert self.batches is not None and self.ranks is None, "steps of one process only"
        most_texts, most_rows = (max(numbers) for numbers in zip(*shapes))
        # All rows may be padding, of one text.
        max_blocks = max(self.batches.tables.shape[1], -(-most_rows // self.batches.block_size))
        inputs = FixedBatch((most_texts, most_rows), max_blocks, self.model.device)
        self.graphs = DecodeGraphs(self._forward, inputs, record, shapes, padding)
        return self.graphs

    def run(self, schedule: Schedule) -> Tensor:
        """Compute the tokens of a step; returns the wanted logits, float32 `(R, V)`, by part."""
        assert self.batches is not None, "rank 0 decides what is run"
        batch = self.batches.build(schedule)
        if batch.modality_T is not None and self.pictures is not None:
            self._choose_kernels()
            with on(self.model.device), torch.inference_mode():
                embeds = self.pictures.embeds(schedule.parts, self.model)
            batch = replace(batch, embeds=embeds)
        return self.run_batch(batch)

    def run_batch(self, batch: Batch) -> Tensor:
        """Compute a batch on every rank; returns the wanted logits, float32 `(R, V)`."""
        if self.ranks is None:
            return self.compute(batch)
        with self.ranks.watched():
            self.ranks.send(batch)
            return self.compute(batch)

    @torch.inference_mode()
    def compute(self, batch: Batch) -> Tensor:
        """What every rank does with a batch; only rank 0 gets whole rows of logits."""
        graphs, device = self.graphs, self.model.device
        self._choose_kernels()
        with on(device):
            shape = None if graphs is None else graphs.shape_of(batch)
            if graphs is None or shape is None:
                hidden_TD, logits_RV = self._forward(batch.to(device))
            else:
                batch, (hidden_TD, logits_RV) = graphs.run(batch, shape)
        self.batch, self.hidden_TD = batch, hidden_TD  # for a drafter, until the next step
        return logits_RV

    def _choose_kernels(self) -> None:
        kernels.batch_invariant(self.is_batch_invariant, self.model.device.type)

    def _forward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Hidden states `(T, D)` and the wanted logits `(R, V)`."""
        hidden_TD = self._hidden(batch, PagedAttend(self.cache, batch))
        if not len(batch.rows_R):
            none_RV = hidden_TD.new_empty(0, self.model.config.vocab_size, dtype=torch.float32)
            return hidden_TD, none_RV
        wanted_RD = hidden_TD
        if len(batch.rows_R) < len(hidden_TD):
            wanted_RD = hidden_TD[batch.rows_R]
        return hidden_TD, self.model.head(wanted_RD)

    def _hidden(self, batch: Batch, attend: Attend) -> Tensor:
        if batch.after_T is not None:
            assert self.hidden_TD is not None, "drafts come after a step"
            before_TD = self.hidden_TD[batch.after_T]
            return self.model.hidden_after_next(
                batch.token_ids_T, before_TD, batch.positions_T, attend
            )
        return self.model.hidden(
            batch.token_ids_T,
            batch.positions_T,
            attend,
            modality=batch.modality_T,
            embeds=batch.embeds,
            adapters=batch.adapters,
        )


def record_steps(runner: Runner, config: EngineConfig) -> None:
    """Have decode steps run as recordings, where there are some. They hold the addresses of weights
    and cache: where these move, there are new ones.
    """
    runner._choose_kernels()  # another engine of this process may have chosen others
    speculation = config.speculation
    most_tokens = 1 + (speculation.num_speculative_tokens if speculation else 0)
    most, device = (config.max_num_seqs, most_tokens), runner.model.device
    if config.use_cudagraph:
        with torch.inference_mode(), on(device):
            shapes, record = graph_shapes(*most), cuda_recorder()
            runner.record_decoding(record, shapes, GPU_PADDING).record_all()
    elif device.type == "cpu" and runner.ranks is None and kernels.is_compiled("cpu"):
        runner.record_decoding(record_program, program_shapes(*most), padding=1)
