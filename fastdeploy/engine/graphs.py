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
from typing import Any

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
    """The buffers that recorded steps read: columns of one run of int64, for `max_num_seqs` rows.

    A step is written to the run in the host's memory, and what is in use goes to the device in one
    copy. On a CPU they are the same. A copy is done before the next step is written, because the
    tokens of a step are waited for.
    """

    def __init__(self, max_num_seqs: int, max_blocks: int, device: torch.device) -> None:
        self.most, self.max_blocks = max_num_seqs, max_blocks
        columns = 4 * max_num_seqs + (max_num_seqs * max_blocks + 1) // 2
        pinned = device.type == "cuda"
        self.host = torch.zeros(columns, dtype=torch.int64, pin_memory=pinned)
        # As arrays of numpy, which need a fraction of torch's time for a few numbers.
        self.columns = {name: column.numpy() for name, column in self._columns(self.host).items()}
        self.columns["slots_T"].fill(-1)
        self.columns["lens_S"].fill(1)
        self.on_device = self.host if device.type == "cpu" else self.host.to(device)
        self.views: dict[int, Batch] = {}
        # The same for all decode steps: request s is row s.
        self.rows = torch.arange(max_num_seqs, device=device)
        self.cu_seqlens = torch.arange(max_num_seqs + 1, dtype=torch.int32, device=device)

    def _columns(self, run: Tensor) -> dict[str, Tensor]:
        """The columns of a run, by the names of a `Batch`."""
        token_ids, positions, slots, lens = run[: 4 * self.most].view(4, self.most)
        tables = run[4 * self.most :].view(torch.int32)[: self.most * self.max_blocks]
        return {
            "token_ids_T": token_ids,
            "positions_T": positions,
            "slots_T": slots,
            "lens_S": lens.view(torch.int32)[: self.most],
            "tables_SM": tables.view(self.most, self.max_blocks),
        }

    def view(self, size: int) -> Batch:
        """The first `size` rows on the device."""
        if size not in self.views:
            columns = self._columns(self.on_device)
            inputs: dict[str, Any] = {name: column[:size] for name, column in columns.items()}
            self.views[size] = Batch(
                **inputs,
                cu_seqlens_S1=self.cu_seqlens[: size + 1],
                rows_R=self.rows[:size],
                adapters=None,
            )
        return self.views[size]

    def fill(self, batch: Batch, size: int) -> None:
        """Take a decode step from the host's memory, and pad it to `size` rows."""
        columns = self.columns
        num, num_blocks = batch.tables_SM.shape
        for name in ("token_ids_T", "positions_T", "slots_T", "lens_S"):
            columns[name][:num] = getattr(batch, name).numpy()
        columns["tables_SM"][:num, :num_blocks] = batch.tables_SM.numpy()
        # What else an old step left in the padding is valid, and its results are not used.
        columns["slots_T"][num:size] = -1
        columns["lens_S"][num:size] = 1
        if self.on_device is not self.host:
            used = 4 * self.most + (size * self.max_blocks + 1) // 2
            self.on_device[:used].copy_(self.host[:used], non_blocking=True)


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
        """Whether this is a step, every request of it computes one token and wants its logits, none
        has an adapter or is of vision, and there are not more than the largest size."""
        num = len(batch.lens_S)
        decodes = len(batch.token_ids_T) == num == len(batch.rows_R)
        is_plain = batch.adapters is None and batch.modality_T is None
        is_plain &= batch.after_T is None
        return decodes and is_plain and num <= self.sizes[-1]

    def run(self, batch: Batch) -> tuple[Batch, Result]:
        """A step that is still in the host's memory: on the device, and its results; both in memory
        that the next one overwrites."""
        num = len(batch.lens_S)
        size = self.sizes[bisect_left(self.sizes, num)]
        self.inputs.fill(batch, size)
        if size not in self.replays:
            self.replays[size] = self.record(self.forward, self.inputs.view(size))
        hidden_TD, logits_RV = self.replays[size]()
        return self.inputs.view(num), (hidden_TD[:num], logits_RV[:num])


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
