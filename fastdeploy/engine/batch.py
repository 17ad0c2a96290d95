"""The flat batch of one step as tensors, built from a `Schedule`; drafts go on from it in passes.

Legend: T tokens of the batch, S requests (parts) in it, M blocks of the longest table, R rows of
hidden states that need logits.

The block tables live in one array with a row (seat) for each running request. A step writes only
the blocks that are new in it, so building a batch costs the same however long the texts are.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ernie.adapters import ActiveAdapters, Adapter
from ernie.model import Embeds
from fastdeploy.engine.scheduler import Schedule


@dataclass(frozen=True, slots=True)
class Batch:
    """Inputs of the model in one step, or with `after_T` of its MTP block in a pass that drafts. As
    built, the tensors share the builder's buffers in the host's memory: use them, or take them to
    the device, before the next batch is built.
    """

    token_ids_T: Tensor  # int64
    positions_T: Tensor  # int64; (3, T) where tokens of vision are among them
    slots_T: Tensor  # int64, where each token's key and value go: block * block_size + offset
    cu_seqlens_S1: Tensor  # int32, part s is tokens cu_seqlens[s]:cu_seqlens[s + 1]
    lens_S: Tensor  # int32, tokens of each request in the cache once this step is done
    tables_SM: Tensor  # int32, entries past a request's last block mean nothing
    rows_R: Tensor  # int64, the tokens after which logits are wanted
    adapters: ActiveAdapters | None  # and which tokens each one changes; None: nobody has one
    begins: bool = False  # whether the step is the beginning of one text, and nothing else
    modality_T: Tensor | None = None  # int64, 0 text, 1 vision; None: all is text
    embeds: Embeds | None = None  # rows of pictures
    # int64; token t comes after row after_T[t] of the last result, whose hidden state it has.
    after_T: Tensor | None = None

    def to(self, device: torch.device) -> Batch:
        """The same on another device."""
        if self.token_ids_T.device == device:
            return self
        moved: dict[str, Any] = {name: getattr(self, name).to(device) for name in TENSORS}
        adapters = None if self.adapters is None else self.adapters.to(device)
        for name in OPTIONAL:
            tensor = getattr(self, name)
            moved[name] = None if tensor is None else tensor.to(device)
        embeds = None if self.embeds is None else Embeds(*(t.to(device) for t in self.embeds))
        return replace(self, **moved, adapters=adapters, embeds=embeds)


TENSORS = tuple(field.name for field in fields(Batch) if field.type == "Tensor")
OPTIONAL = tuple(field.name for field in fields(Batch) if field.type == "Tensor | None")


class BatchBuilder:
    def __init__(
        self,
        *,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        max_blocks: int,
        block_size: int,
    ) -> None:
        self.block_size = block_size
        self.tables = np.zeros((max_num_seqs, max_blocks), np.int32)
        self.token_ids = np.zeros(max_num_batched_tokens, np.int64)
        self.positions = np.zeros(max_num_batched_tokens, np.int64)
        self.slots = np.zeros(max_num_batched_tokens, np.int64)
        self.rows = np.zeros(max_num_batched_tokens, np.int64)
        self.cu_seqlens = np.zeros(max_num_seqs + 1, np.int32)
        self.lens = np.zeros(max_num_seqs, np.int32)
        self.seats = np.zeros(max_num_seqs, np.int64)

    def build(self, schedule: Schedule) -> Batch:
        """The batch of a step that has at least one part."""
        num_tokens = num_rows = num_blocks = 0
        has_vision = False
        for s, part in enumerate(schedule.parts):
            request, first = part.request, num_tokens
            num_tokens += part.num_tokens
            blocks = request.table.blocks
            if part.new_blocks:
                old = len(blocks) - len(part.new_blocks)
                self.tables[request.seat, old : len(blocks)] = part.new_blocks
            self._fill_tokens(slice(first, num_tokens), part.start, part.token_ids, blocks)
            if request.layout is not None:
                places_3N, modality_N = request.layout.at(part.start, part.start + part.num_tokens)
                self.positions[first:num_tokens] = places_3N[0]
                has_vision |= bool(modality_N.any())
            self.seats[s] = request.seat
            self.cu_seqlens[s + 1] = num_tokens
            self.lens[s] = part.start + part.num_tokens
            if part.num_logits:
                wanted = np.arange(num_tokens - part.num_logits, num_tokens)
                self.rows[num_rows : num_rows + part.num_logits] = wanted
                num_rows += part.num_logits
            num_blocks = max(num_blocks, len(blocks))
        num_parts = len(schedule.parts)
        positions_T, modality_T = torch.from_numpy(self.positions[:num_tokens]), None
        if has_vision:
            positions_T, modality_T = self._by_modality(schedule)
        return Batch(
            token_ids_T=torch.from_numpy(self.token_ids[:num_tokens]),
            positions_T=positions_T,
            slots_T=torch.from_numpy(self.slots[:num_tokens]),
            cu_seqlens_S1=torch.from_numpy(self.cu_seqlens[: num_parts + 1]),
            lens_S=torch.from_numpy(self.lens[:num_parts]),
            tables_SM=torch.from_numpy(self.tables[self.seats[:num_parts], :num_blocks]),
            rows_R=torch.from_numpy(self.rows[:num_rows]),
            adapters=self._adapters(schedule),
            begins=num_parts == 1 and schedule.parts[0].start == 0,
            modality_T=modality_T,
        )

    def _by_modality(self, schedule: Schedule) -> tuple[Tensor, Tensor]:
        """Positions `(3, T)`, equal ones for tokens of text, and modality `(T,)`."""
        positions_3T = np.tile(self.positions[: schedule.num_tokens], (3, 1))
        modality_T = np.zeros(schedule.num_tokens, np.int64)
        first = 0
        for part in schedule.parts:
            where = slice(first, first + part.num_tokens)
            if part.request.layout is not None:
                found = part.request.layout.at(part.start, part.start + part.num_tokens)
                positions_3T[:, where], modality_T[where] = found
            first = where.stop
        return torch.from_numpy(positions_3T), torch.from_numpy(modality_T)

    def _adapters(self, schedule: Schedule) -> ActiveAdapters | None:
        tokens_by_adapter: dict[Adapter, list[np.ndarray]] = {}
        first = 0
        for part in schedule.parts:
            if part.request.adapter is not None:
                tokens = np.arange(first, first + part.num_tokens)
                tokens_by_adapter.setdefault(part.request.adapter, []).append(tokens)
            first += part.num_tokens
        if not tokens_by_adapter:
            return None
        groups = tokens_by_adapter.items()
        return ActiveAdapters(
            tuple((adapter, torch.from_numpy(np.concatenate(tokens))) for adapter, tokens in groups)
        )

    def _fill_tokens(
        self, where: slice, start: int, token_ids: list[int], blocks: list[int]
    ) -> None:
        if where.stop - where.start == 1:  # most parts of most steps: plain integers are faster
            self.token_ids[where.start] = token_ids[0]
            self.positions[where.start] = start
            block = blocks[start // self.block_size]
            self.slots[where.start] = block * self.block_size + start % self.block_size
            return
        end = start + where.stop - where.start
        positions = np.arange(start, end)
        self.token_ids[where] = token_ids
        self.positions[where] = positions
        first = start // self.block_size
        table = np.asarray(blocks[first : -(-end // self.block_size)])
        numbers, offsets = np.divmod(positions, self.block_size)
        self.slots[where] = table[numbers - first] * self.block_size + offsets
