"""Decode steps recorded, one for each of a few batch sizes: CUDA graphs, and programs on a CPU.

A step in which every request computes one token is the same few hundred kernels every time, each
shorter than it takes to start it from Python. A recording starts them all at once; it reads its
inputs from, and writes its results to, the memory it was recorded with. So a step is copied into
fixed buffers and padded to the next size. On a GPU all sizes are recorded at the start; on a CPU,
where padding costs time, small batches are recorded as they occur and larger ones run as they are.

    rows      0 .. n - 1          n .. size - 1
    slot      of the new token    -1, nothing is stored
    length    of the text         1, whatever key stands there: nobody reads the result

Legend: T tokens, S requests, M blocks of a table, R rows of logits, D hidden size, V vocabulary.
"""

from __future__ import annotations

import logging
from bisect import bisect_left
from collections.abc import Callable

import torch
from torch import Tensor

from ernie.kernels.cpu.program import NotRecordable, record
from fastdeploy.engine.batch import Batch

log = logging.getLogger("fastdeploy")

Result = tuple[Tensor, Tensor]  # hidden states (T, D) and logits (R, V)
Forward = Callable[[Batch], Result]
Record = Callable[[Forward, Batch], Callable[[], Result]]

WARM_UPS = 2  # runs before a graph is recorded: kernels are compiled and their settings tried out
MOST_ROWS_OF_PROGRAMS = 16  # a larger step takes so long that Python between its calls is nothing


def graph_sizes(max_num_seqs: int) -> list[int]:
    """1, 2, 4, 8, then every multiple of 16, and the largest batch itself."""
    sizes = {1, 2, 4, 8, *range(16, max_num_seqs, 16), max_num_seqs}
    return sorted(size for size in sizes if size <= max_num_seqs)


def program_sizes(max_num_seqs: int) -> list[int]:
    """Every size of a small batch."""
    return list(range(1, min(max_num_seqs, MOST_ROWS_OF_PROGRAMS) + 1))


class FixedBatch:
    """The buffers that recorded steps read."""

    def __init__(self, max_num_seqs: int, max_blocks: int, device: torch.device) -> None:
        def zeros(*shape: int, dtype: torch.dtype) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        self.token_ids = zeros(max_num_seqs, dtype=torch.int64)
        self.positions = zeros(max_num_seqs, dtype=torch.int64)
        self.slots = zeros(max_num_seqs, dtype=torch.int64) - 1
        self.lens = zeros(max_num_seqs, dtype=torch.int32) + 1
        self.tables = zeros(max_num_seqs, max_blocks, dtype=torch.int32)
        # The same for all decode steps: request s is row s.
        self.rows = torch.arange(max_num_seqs, device=device)
        self.cu_seqlens = torch.arange(max_num_seqs + 1, dtype=torch.int32, device=device)

    def view(self, size: int) -> Batch:
        """The first `size` rows."""
        return Batch(
            token_ids_T=self.token_ids[:size],
            positions_T=self.positions[:size],
            slots_T=self.slots[:size],
            cu_seqlens_S1=self.cu_seqlens[: size + 1],
            lens_S=self.lens[:size],
            tables_SM=self.tables[:size],
            rows_R=self.rows[:size],
            adapters=None,
        )

    def fill(self, batch: Batch, size: int) -> None:
        """Copy a decode step, and pad it to `size` rows."""
        num, num_blocks = batch.tables_SM.shape
        self.token_ids[:num].copy_(batch.token_ids_T)
        self.positions[:num].copy_(batch.positions_T)
        self.slots[:num].copy_(batch.slots_T)
        self.lens[:num].copy_(batch.lens_S)
        self.tables[:num, :num_blocks].copy_(batch.tables_SM)
        # What else an old step left in the padding is valid, and its results are not used.
        self.slots[num:size].fill_(-1)
        self.lens[num:size].fill_(1)


class DecodeGraphs:
    """Recorded decode steps of the given sizes, in ascending order. `record` makes one; tests pass
    one that runs the step as it is."""

    def __init__(
        self, forward: Forward, inputs: FixedBatch, record: Record, sizes: list[int]
    ) -> None:
        self.forward = forward
        self.inputs = inputs
        self.record = record
        self.sizes = sizes
        self.replays: dict[int, Callable[[], Result]] = {}

    def record_all(self) -> None:
        """Record every size, the largest first: the smaller ones fit into its memory."""
        for size in reversed(self.sizes):
            self.replays[size] = self.record(self.forward, self.inputs.view(size))

    def takes(self, batch: Batch) -> bool:
        """Whether every request of the step computes one token and wants its logits, none has an
        adapter, and there are not more than the largest size."""
        num = len(batch.lens_S)
        decodes = len(batch.token_ids_T) == num == len(batch.rows_R)
        return decodes and batch.adapters is None and num <= self.sizes[-1]

    def run(self, batch: Batch) -> Result:
        """The step's results, in memory that the next one overwrites."""
        num = len(batch.lens_S)
        size = self.sizes[bisect_left(self.sizes, num)]
        self.inputs.fill(batch, size)
        if size not in self.replays:
            self.replays[size] = self.record(self.forward, self.inputs.view(size))
        hidden_TD, logits_RV = self.replays[size]()
        return hidden_TD[:num], logits_RV[:num]


def record_program(forward: Forward, batch: Batch) -> Callable[[], Result]:
    """A `Record` for the CPU; a step that cannot be recorded runs as it is."""
    try:
        result, program = record(lambda: forward(batch))
    except NotRecordable as error:
        log.info("decode steps of %d tokens are not recorded: %s", len(batch.token_ids_T), error)
        return lambda: forward(batch)

    def replay() -> Result:
        program.run()
        return result

    return replay


def cuda_recorder() -> Record:
    """A `Record` for the current GPU; what it records shares one pool of memory."""
    pool = torch.cuda.graph_pool_handle()

    def record(forward: Forward, batch: Batch) -> Callable[[], Result]:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UPS):
                forward(batch)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool):
            result = forward(batch)

        def replay() -> Result:
            graph.replay()
            return result

        return replay

    return record
