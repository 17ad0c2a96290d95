"""Decode steps recorded, one for each of a few shapes: CUDA graphs, and programs on a CPU.

A step in which every text computes a few tokens, its newest one and maybe drafts, is the same few
hundred kernels every time, each shorter than it takes to start it from Python. A recording starts
them all at once; it reads its inputs from, and writes its results to, the memory it was recorded
with, the division of its rows among the texts too. So a step is copied into fixed buffers and
padded to a recorded shape: so many texts, and so many rows of tokens. On a GPU all shapes are
recorded at the start; on a CPU, where padding costs time, small steps are recorded as they occur
and others run as they are.

Rows of padding stand behind the others and belong to texts that are not there, one to each and the
rest to the last: a shape has room for one where it has room for a row. They are stored nowhere
(slot -1), and nobody reads what they make of the keys that they find, which may be anything.

Legend: T tokens, S texts, M blocks of a table, R rows of logits, D hidden size.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ernie.kernels.cpu.program import NotRecordable, record
from fastdeploy.engine.batch import Batch

log = logging.getLogger("fastdeploy")

Result = tuple[Tensor, Tensor]  # hidden states (T, D) and logits (R, V)
Forward = Callable[[Batch], Result]
Record = Callable[[Forward, Batch], Callable[[], Result]]
Shape = tuple[int, int]  # texts, and rows: tokens of all of them

WARM_UPS = 2  # runs before a graph is recorded: kernels are compiled and their settings tried out
MOST_ROWS_OF_PROGRAMS = 16  # a larger step takes so long that Python between its calls is nothing
GPU_PADDING = 2  # rows of a recording for each one of a step, at most; on a CPU 1


def graph_shapes(max_num_seqs: int, most_tokens: int) -> list[Shape]:
    """1, 2, 4, 8, then every multiple of 16, and the largest batch itself: of one token a text, and
    of as many as one can have, with one text more for the padding.
    """
    sizes = {1, 2, 4, 8, *range(16, max_num_seqs, 16), max_num_seqs}
    return [
        (size + (count > 1), size * count)
        for count in sorted({1, most_tokens})
        for size in sorted(sizes)
        if size <= max_num_seqs
    ]


def program_shapes(max_num_seqs: int, most_tokens: int) -> list[Shape]:
    """Every shape of a small batch."""
    return [
        (size, rows)
        for size in range(1, min(max_num_seqs, MOST_ROWS_OF_PROGRAMS) + 1)
        for rows in range(size, min(size * most_tokens, MOST_ROWS_OF_PROGRAMS) + 1)
    ]


class FixedBatch:
    """The buffers that recorded steps read, for shapes up to `most`: columns of one run of int64.

    A step is written to the run in the host's memory, and what is in use goes to the device in one
    copy. On a CPU they are the same. A copy is done before the next step is written, because the
    tokens of a step are waited for.
    """

    def __init__(self, most: Shape, max_blocks: int, device: torch.device) -> None:
        self.most_texts, self.most_rows = most
        self.max_blocks = max_blocks
        tables = (self.most_texts * max_blocks + 1) // 2
        size = 3 * self.most_rows + self.most_texts + 1 + tables
        self.host = torch.zeros(size, dtype=torch.int64, pin_memory=device.type == "cuda")
        # As arrays of numpy, which need a fraction of torch's time for a few numbers.
        self.columns = {name: column.numpy() for name, column in self._columns(self.host).items()}
        self.columns["slots_T"].fill(-1)
        self.columns["lens_S"].fill(1)
        self.columns["cu_seqlens_S1"][:] = np.arange(self.most_texts + 1)
        self.on_device = self.host if device.type == "cpu" else self.host.to(device)
        self.views: dict[Shape, Batch] = {}
        self.rows = torch.arange(self.most_rows, device=device)  # the same for all steps

    def _columns(self, run: Tensor) -> dict[str, Tensor]:
        """The columns of a run, by the names of a `Batch`."""
        rows, texts = self.most_rows, self.most_texts
        token_ids, positions, slots = run[: 3 * rows].view(3, rows)
        short = run[3 * rows :].view(torch.int32)
        tables = short[2 * texts + 2 :][: texts * self.max_blocks]
        return {
            "token_ids_T": token_ids,
            "positions_T": positions,
            "slots_T": slots,
            "lens_S": short[:texts],
            "cu_seqlens_S1": short[texts : 2 * texts + 1],
            "tables_SM": tables.view(texts, self.max_blocks),
        }

    def view(self, shape: Shape) -> Batch:
        """What a step of this shape reads, on the device."""
        if shape not in self.views:
            size, rows = shape
            lengths = {"lens_S": size, "cu_seqlens_S1": size + 1, "tables_SM": size}
            inputs: dict[str, Any] = {
                name: column[: lengths.get(name, rows)]
                for name, column in self._columns(self.on_device).items()
            }
            self.views[shape] = Batch(**inputs, rows_R=self.rows[:rows], adapters=None)
        return self.views[shape]

    def fill(self, batch: Batch, shape: Shape) -> None:
        """Take a step from the host's memory, and pad it to `shape`."""
        columns, (size, rows) = self.columns, shape
        num_tokens, (num, num_blocks) = len(batch.token_ids_T), batch.tables_SM.shape
        for name in ("token_ids_T", "positions_T", "slots_T"):
            columns[name][:num_tokens] = getattr(batch, name).numpy()
        columns["lens_S"][:num] = batch.lens_S.numpy()
        columns["cu_seqlens_S1"][: num + 1] = batch.cu_seqlens_S1.numpy()
        columns["tables_SM"][:num, :num_blocks] = batch.tables_SM.numpy()
        if rows > num_tokens or size > num:
            self._pad(num, num_tokens, size, rows)
        if self.on_device is not self.host:
            tables = (size * self.max_blocks + 1) // 2
            used = 3 * self.most_rows + self.most_texts + 1 + tables
            self.on_device[:used].copy_(self.host[:used], non_blocking=True)

    def _pad(self, num: int, num_tokens: int, size: int, rows: int) -> None:
        """What else an old step left in the padding is valid, and its results are not used."""
        assert size > num or rows == num_tokens, "rows of padding would be a text's"
        lens, bounds = self.columns["lens_S"], self.columns["cu_seqlens_S1"]
        self.columns["slots_T"][num_tokens:rows] = -1
        bounds[num + 1 : size + 1] = np.minimum(np.arange(1, size - num + 1) + num_tokens, rows)
        lens[num:size] = 1
        lens[size - 1] += rows - bounds[size]
        bounds[size] = rows


class DecodeGraphs:
    """Recorded decode steps of the given shapes. `record` makes one; tests pass one that runs the
    step as it is. A step is padded to at most `padding` times its rows.
    """

    def __init__(
        self,
        forward: Forward,
        inputs: FixedBatch,
        record: Record,
        shapes: Sequence[Shape],
        padding: int,
    ) -> None:
        self.forward = forward
        self.inputs = inputs
        self.record = record
        self.shapes = sorted(shapes, key=lambda shape: (shape[1], shape[0]))
        self.padding = padding
        self.replays: dict[Shape, Callable[[], Result]] = {}
        # Not `functools.cache` of a method, which would keep this alive, and with it the model.
        self.shape_by_size: dict[Shape, Shape | None] = {}

    def record_all(self) -> None:
        """Record every shape, the largest first: the smaller ones fit into its memory."""
        for shape in reversed(self.shapes):
            self.replays[shape] = self.record(self.forward, self.inputs.view(shape))

    def shape_of(self, batch: Batch) -> Shape | None:
        """The shape to which a step is padded; None if it must run as it is, because it wants
        logits of some tokens only, has adapters or vision, is a pass that drafts, or is too large.
        """
        is_plain = batch.adapters is None and batch.modality_T is None and batch.after_T is None
        if not is_plain or len(batch.token_ids_T) != len(batch.rows_R):
            return None
        size = len(batch.lens_S), len(batch.token_ids_T)
        if size not in self.shape_by_size:
            self.shape_by_size[size] = self._find(*size)
        return self.shape_by_size[size]

    def _find(self, num_texts: int, num_tokens: int) -> Shape | None:
        for size, rows in self.shapes:
            has_room = size > num_texts and rows > num_tokens
            if has_room or (size >= num_texts and rows == num_tokens):
                return (size, rows) if rows <= self.padding * num_tokens else None
        return None

    def run(self, batch: Batch, shape: Shape) -> tuple[Batch, Result]:
        """A step that is still in the host's memory: the same on the device, and its results, in
        memory that the next one overwrites.
        """
        num_texts, num_tokens = len(batch.lens_S), len(batch.token_ids_T)
        self.inputs.fill(batch, shape)
        if shape not in self.replays:
            self.replays[shape] = self.record(self.forward, self.inputs.view(shape))
        hidden_TD, logits_RV = self.replays[shape]()
        batch = self.inputs.view((num_texts, num_tokens))
        return batch, (hidden_TD[:num_tokens], logits_RV[:num_tokens])


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
