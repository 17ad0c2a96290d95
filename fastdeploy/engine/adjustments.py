"""What requests change in their logits before a token is chosen: penalties, biases, bans.

Each request has notes on this side of the bus: the tokens it has seen, its biases and bans. What
they say of the rows of a step is written into three lists of places, and these change the logits of
all rows at once, so that a GPU gets two copies and a few kernels, and nobody waits for it.

    penalties   value -> value * or / repetition - frequency * count - presence     seen tokens
    biases      value -> value + bias
    bans        value -> -inf

Legend: R rows of logits, V vocabulary, p, b, n places of the three lists, r rows with penalties.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ernie.kernels.transfer import moved
from fastdeploy.engine.request import Request

MINUS_INFINITY = float("-inf")


class Notes:
    """What the sampler knows of a request whose logits it adjusts: seen tokens, biases, bans."""

    def __init__(self, request: Request, vocab_size: int) -> None:
        params = request.params
        presence, frequency = params.presence_penalty or 0.0, params.frequency_penalty or 0.0
        self.penalties = (params.repetition_penalty or 1.0, frequency, presence)
        self.penalises = self.penalties != (1.0, 0.0, 0.0)
        counts = dict.fromkeys(request.token_ids[: request.num_prompt], 0)
        self.slot_by_token = {token: slot for slot, token in enumerate(counts)}
        # Tokens seen and how often each was generated. Room for all there can be: grown in place.
        room = min(vocab_size, len(counts) + request.max_output)
        self.seen = torch.zeros(room, dtype=torch.int64)
        self.seen[: len(counts)] = torch.tensor(list(counts))
        self.generated = torch.zeros(room)
        bias = params.logit_bias or {}
        self.biased = torch.tensor(list(bias), dtype=torch.int64)
        self.bias = torch.tensor(list(bias.values()), dtype=torch.float32)
        self.banned = torch.tensor(sorted(request.banned_ids), dtype=torch.int64)
        self.runs = request.banned_runs
        self.stops = torch.tensor(sorted(request.stop_ids), dtype=torch.int64)
        self.num_read = request.num_prompt  # tokens of the text that are in the notes

    def _follow(self, token_ids: Sequence[int]) -> None:
        """Take note of the tokens that have become known since the last call."""
        for token in token_ids[self.num_read :]:
            self._add(token)
        self.num_read = len(token_ids)

    def _add(self, token: int) -> None:
        slot = self.slot_by_token.setdefault(token, len(self.slot_by_token))
        self.seen[slot] = token
        self.generated[slot] += 1

    def write(
        self, lists: Lists, first_place: int, request: Request, draft_ids: Sequence[int]
    ) -> None:
        """Write down the changes of the row after the known tokens, which begins at `first_place`
        of the flat logits, and of those after each draft as if it and the ones before it had been
        generated.
        """
        self._follow(request.token_ids)
        num_seen = len(self.slot_by_token)
        ends = [*request.token_ids[request.num_prompt :], *draft_ids] if self.runs else []
        for i in range(len(draft_ids) + 1):
            if i:
                self._add(draft_ids[i - 1])
            begin = first_place + i * lists.vocab_size
            self._write_row(lists, begin, may_stop=request.may_stop(i))
            banned = self._run_ends(ends[: request.num_output + i])
            if banned:
                lists.bans.append(torch.tensor(banned) + begin)
        for token in draft_ids:  # forget them again
            self.generated[self.slot_by_token[token]] -= 1
        while len(self.slot_by_token) > num_seen:
            self.slot_by_token.popitem()

    def _write_row(self, lists: Lists, begin: int, *, may_stop: bool) -> None:
        if self.penalises:
            num_seen = len(self.slot_by_token)
            lists.seen.append(self.seen[:num_seen] + begin)
            lists.counts.append(self.generated[:num_seen].clone())
            lists.penalties.append(self.penalties)
        if len(self.biased):
            lists.biased.append(self.biased + begin)
            lists.biases.append(self.bias)
        if len(self.banned):
            lists.bans.append(self.banned + begin)
        if not may_stop:
            lists.bans.append(self.stops + begin)

    def _run_ends(self, generated_ids: Sequence[int]) -> list[int]:
        """The last token of each sequence of which the others have just been generated."""
        runs = ((begin, last) for *begin, last in self.runs)
        return [last for begin, last in runs if generated_ids[-len(begin) :] == begin]


class Lists:
    """The changes of a step's rows: places in the flat logits, and what is done to them."""

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size
        self.seen: list[Tensor] = []  # for each row with penalties, int64
        self.counts: list[Tensor] = []  # how often each of these was generated, float32
        self.penalties: list[tuple[float, float, float]] = []  # repetition, frequency, presence
        self.biased: list[Tensor] = []
        self.biases: list[Tensor] = []
        self.bans: list[Tensor] = []

    def apply(self, logits_RV: Tensor) -> None:
        """Change the logits, in place."""
        if not (self.seen or self.biased or self.bans):
            return
        flat = logits_RV.view(-1)
        seen_p, row_p, biased_b, banned_n = self._places(flat.device)
        counts_p, penalties_3r, bias_b = self._values(flat.device)
        if self.seen:
            # Source: the definitions of OpenAI; for repetition, CTRL (arXiv:1909.05858).
            repetition_p, frequency_p, presence_p = penalties_3r[:, row_p]
            values_p = flat[seen_p]
            values_p = torch.where(values_p > 0, values_p / repetition_p, values_p * repetition_p)
            values_p = values_p - frequency_p * counts_p - presence_p * (counts_p > 0)
            flat.index_copy_(0, seen_p, values_p)
        if self.biased:
            flat.index_copy_(0, biased_b, flat[biased_b] + bias_b)
        if self.bans:
            flat.index_fill_(0, banned_n, MINUS_INFINITY)

    def _places(self, device: torch.device) -> Sequence[Tensor]:
        """Of penalties, the row of each among those that have some, of biases, of bans."""
        sizes = torch.tensor([len(places) for places in self.seen], dtype=torch.int64)
        rows = torch.arange(len(sizes)).repeat_interleave(sizes)
        parts = [_joined(self.seen), rows, _joined(self.biased), _joined(self.bans)]
        return moved(torch.cat(parts), device).split([len(part) for part in parts])

    def _values(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """Of penalties: counts, and those of each row; of biases."""
        penalties_3r = torch.tensor(self.penalties).reshape(-1, 3).T
        parts = [_joined(self.counts).float(), penalties_3r.flatten(), _joined(self.biases).float()]
        counts_p, flat, bias_b = moved(torch.cat(parts), device).split([len(x) for x in parts])
        return counts_p, flat.view(3, -1), bias_b


def _joined(parts: Sequence[Tensor]) -> Tensor:
    return torch.cat(list(parts)) if parts else torch.empty(0, dtype=torch.int64)
