"""Chooses tokens from logits, for a whole batch at once.

    raw logits -> penalties, biases, bans, masks -> greedy rows: argmax
                                                 -> others: `ernie.kernels.draw`
                                                 -> tokens that a request is forced to take

A draw is the inverse of the cumulative distribution at one uniform number, which is made from the
request's seed and the position of the token. So a seeded result does not depend on the neighbours
in the batch, on chunking, or on a preemption in between. Log-probabilities are those of the raw
logits.

Verification of drafts. Logits after the last known token and after each draft come together:

    known tokens       ... x        drafts a b c        logits after x, a, b, c
    chosen from them   a b f g      accepted a b, then f; g continues a text that is not there

Each row is treated as if the drafts before it had been generated: a token is chosen from it, or
forced, exactly as it would be without drafts, with the same uniform number. Tokens are kept up to
the first that is not its draft. So speculation changes no token at all, drawn or greedy, and the
distribution is unchanged because the draws are.

Legend: R rows of logits, r rows that are treated alike, V vocabulary, K candidates.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ernie import kernels
from ernie.kernels.transfer import places
from fastdeploy.engine.adjustments import MINUS_INFINITY, Lists, Notes
from fastdeploy.engine.constraint import Filled
from fastdeploy.engine.request import End, Request
from fastdeploy.engine.scheduler import ScheduledRequest
from fastdeploy.outputs import Logprob, TokenLogprobs
from fastdeploy.sampling import SamplingParams

LEAST_LOGPROB = -9999.0  # stands for impossible: JSON has no infinity
MIN_TEMPERATURE = 1e-5  # below it the quotient could overflow; greedy to any precision
NONE_LEFT = (
    "no token is left to go on with: bad words, min_tokens and the answer's form rule out the "
    "whole vocabulary; allow more"
)


@dataclass(slots=True)
class Choice:
    token: int
    logprob: float | None = None  # in the raw logits, for requests that want it
    logprobs: TokenLogprobs | None = None  # as `params.logprobs` asks for them


class Sampler:
    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size

    @torch.inference_mode()
    def __call__(
        self, logits_RV: Tensor, parts: Sequence[ScheduledRequest], masks: Filled | None = None
    ) -> list[list[Choice]]:
        """The choices of each part that chooses, in order: its accepted drafts and one token more.
        Scores prompt tokens on the way. `masks` are those of the parts that are held to a form.

        Overwrites `logits_RV`.
        """
        rows, choosing = _chosen_from(logits_RV, parts)
        if not choosing:
            return []
        device = logits_RV.device
        if len(rows) < len(logits_RV):
            logits_RV = logits_RV.index_select(0, places(rows, device))
        # The request of each row, and how many drafts stand before the token it chooses.
        requests = [part.request for part in choosing for _ in range(len(part.draft_ids) + 1)]
        offsets = [i for part in choosing for i in range(len(part.draft_ids) + 1)]
        wanted = [i for i, request in enumerate(requests) if request.wants_logprob]
        wanted_r = places(wanted, device) if wanted else None
        # Copied before they are adjusted.
        raw_rV = logits_RV[:0] if wanted_r is None else logits_RV.index_select(0, wanted_r)
        has_bans = self._adjust(logits_RV, choosing)
        if masks is not None:
            masks.apply(logits_RV)
        forced = _forced(choosing)
        tokens_R = _choose(logits_RV, requests, offsets, forced)
        impossible_R = None
        if has_bans or masks is not None:
            impossible_R = logits_RV.gather(1, tokens_R[:, None])[:, 0] == MINUS_INFINITY
        logprobs_r = raw_rV[:, 0]  # none
        if wanted_r is not None:
            logprobs_r = kernels.token_logprobs(raw_rV, tokens_R.index_select(0, wanted_r))
        # Here a step waits for the device, and nowhere before.
        choices = [Choice(token) for token in tokens_R.tolist()]
        for i, logprob in zip(wanted, logprobs_r.tolist()):
            choices[i].logprob = logprob
        _describe(raw_rV, [requests[i] for i in wanted], [choices[i] for i in wanted])
        accepted = self._accepted(choices, choosing)
        if masks is not None:
            tokens_by_request = {
                part.request: [choice.token for choice in some]
                for part, some in zip(choosing, accepted)
            }
            masks.take(tokens_by_request)
        if impossible_R is not None:
            _end_impossible(impossible_R.tolist(), forced, choosing, accepted)
        return accepted

    def warm_up(self, device: torch.device) -> None:
        """Have a GPU's kernels compiled, for all settings, before a request needs them."""
        logits_RV = torch.zeros(1, self.vocab_size, device=device)
        one = torch.ones(1, dtype=torch.float64)
        for top_k in (0, 1):
            for top_p in (0.5, 1.0):
                limits = (one * 0, one.long() * top_k, one * top_p)
                tokens_R = kernels.draw(logits_RV, one, *limits, one / 2)
        kernels.token_logprobs(logits_RV, tokens_R)

    def _adjust(self, logits_RV: Tensor, parts: Sequence[ScheduledRequest]) -> bool:
        """Whether there are bans among the changes."""
        lists, row = Lists(self.vocab_size), 0
        for part in parts:
            request = part.request
            if request.is_adjusted:
                if request.sampler_notes is None:
                    request.sampler_notes = Notes(request, self.vocab_size)
                first_place = row * self.vocab_size
                request.sampler_notes.write(lists, first_place, request, part.draft_ids)
            row += len(part.draft_ids) + 1
        lists.apply(logits_RV)
        return bool(lists.bans)

    def _accepted(
        self, choices: list[Choice], parts: Sequence[ScheduledRequest]
    ) -> list[list[Choice]]:
        """Of the choices of each part: those that are its drafts, and the first that is not."""
        accepted, row = [], 0
        for part in parts:
            num_kept = 1
            for choice, draft in zip(choices[row : row + len(part.draft_ids)], part.draft_ids):
                if choice.token != draft:
                    break
                num_kept += 1
            accepted.append(choices[row : row + num_kept])
            row += len(part.draft_ids) + 1
            if part.request.early_stop is not None:
                part.request.watch([choice.logprob for choice in accepted[-1]])
        return accepted


def _chosen_from(
    logits_RV: Tensor, parts: Sequence[ScheduledRequest]
) -> tuple[list[int], list[ScheduledRequest]]:
    """The rows of logits that tokens are chosen from, and the parts that these belong to: of each
    the last row, and one for each of its drafts. Rows in front of them score prompt tokens.
    """
    rows: list[int] = []
    choosing, row = [], 0
    for part in parts:
        if part.num_logits and part.request.num_to_score > 0:
            _score_prompt(logits_RV[row : row + part.num_logits], part)
        row += part.num_logits
        if part.chooses:
            rows += range(row - 1 - len(part.draft_ids), row)
            choosing.append(part)
    return rows, choosing


def _score_prompt(logits_nV: Tensor, part: ScheduledRequest) -> None:
    """Append the log-probability of each prompt token that follows a token of the part."""
    request = part.request
    scores = request.prompt_logprobs
    if not scores:
        scores.append(None)  # nothing stands before the first token
    # Positions that were scored before a preemption are skipped.
    first = len(scores) - 1 - part.start
    targets = request.token_ids[
        len(scores) : min(part.start + part.num_tokens + 1, request.num_prompt)
    ]
    counts = [request.params.prompt_logprobs or 0] * len(targets)
    scores += describe(logits_nV[first : first + len(targets)], targets, counts)


def uniform(seed: tuple[int, int], position: int) -> float:
    """A number in [0, 1) that depends on the seed, the sample's index and the position only."""
    digest = hashlib.blake2b(struct.pack("<QQQ", *seed, position), digest_size=8).digest()
    return (int.from_bytes(digest, "little") >> 11) * 2.0**-53


def _choose(
    logits_RV: Tensor, requests: Sequence[Request], offsets: Sequence[int], forced: dict[int, int]
) -> Tensor:
    """A token for each row, int64 `(R,)` on the device. `offsets`: drafts between the known tokens
    of its request and it; `forced`: tokens of rows that have no choice.
    """
    device = logits_RV.device
    drawn = [i for i, request in enumerate(requests) if not request.params.is_greedy]
    if len(drawn) == len(requests):
        tokens_R = _draw_rows(logits_RV, requests, offsets)
    else:
        tokens_R = kernels.argmax(logits_RV)
    if 0 < len(drawn) < len(requests):
        rows_r = places(drawn, device)
        some = [requests[i] for i in drawn], [offsets[i] for i in drawn]
        tokens_R.index_copy_(0, rows_r, _draw_rows(logits_RV.index_select(0, rows_r), *some))
    if forced:
        rows_r, forced_r = places([list(forced), list(forced.values())], device)
        tokens_R.index_copy_(0, rows_r, forced_r)
    return tokens_R


def _draw_rows(logits_rV: Tensor, requests: Sequence[Request], offsets: Sequence[int]) -> Tensor:
    def column(values: list, dtype: torch.dtype = torch.float64) -> Tensor:
        return torch.tensor(values, dtype=dtype)

    params = [request.params for request in requests]
    return kernels.draw(
        logits_rV,
        column([1.0 if p.temperature is None else p.temperature for p in params]).clamp_min(
            MIN_TEMPERATURE
        ),
        column([p.min_p for p in params]),
        column([max(p.top_k, 0) for p in params], torch.int64),
        column([1.0 if p.top_p is None else p.top_p for p in params]),
        column([uniform(r.seed, r.num_output + i) for r, i in zip(requests, offsets)]),
    )


def _forced(parts: Sequence[ScheduledRequest]) -> dict[int, int]:
    """The tokens of rows whose request is made to end its thoughts."""
    tokens, row = {}, 0
    for part in parts:
        for i, token in enumerate(part.request.forced_ids(part.draft_ids), row):
            if token is not None:
                tokens[i] = token
        row += len(part.draft_ids) + 1
    return tokens


def _end_impossible(
    impossible: Sequence[bool],
    forced: Mapping[int, int],
    parts: Sequence[ScheduledRequest],
    accepted: Sequence[Sequence[Choice]],
) -> None:
    """End the answers that had no token left to choose: by row, whether its choice is impossible.
    What was forced counts as chosen, and what stands behind a refused draft does not count.
    """
    row = 0
    for part, some in zip(parts, accepted):
        for i in range(len(some)):
            if impossible[row + i] and row + i not in forced:
                _end_stuck(part.request, i)
        row += len(part.draft_ids) + 1


def _end_stuck(request: Request, num_drafts: int) -> None:
    """End an answer at its token after so many drafts, unless its form ends it before."""
    end = End(request.num_output + num_drafts + 1, "error", NONE_LEFT)
    ends = [end] if request.end is None else [request.end, end]
    request.end = min(ends, key=lambda one: (one.num_tokens, one.reason != "error"))


def _describe(raw_rV: Tensor, requests: Sequence[Request], choices: Sequence[Choice]) -> None:
    """Describe each choice whose user wants that."""
    described = [i for i, request in enumerate(requests) if request.params.logprobs is not None]
    if not described:
        return
    params = [requests[i].params for i in described]
    shown_rV = raw_rV.index_select(0, places(described, raw_rV.device))
    shown_rV = _within_top_p(_temperature_scaled(shown_rV, params), params)
    tokens = [choices[i].token for i in described]
    entries = describe(shown_rV, tokens, [p.logprobs or 0 for p in params])
    for i, entry in zip(described, entries):
        choices[i].logprobs = entry


def describe(
    logits_rV: Tensor, tokens: Sequence[int], num_top: Sequence[int]
) -> list[TokenLogprobs]:
    """Log-probability and rank of one token a row, and of the `num_top` likeliest (-1 = all)."""
    if not tokens:
        return []
    logprobs_rV = logits_rV.float().log_softmax(-1).clamp_min(LEAST_LOGPROB)
    own_r1 = logprobs_rV.gather(-1, places(tokens, logits_rV.device)[:, None])
    rank_r = (logprobs_rV > own_r1).sum(-1) + 1
    vocab_size = logits_rV.shape[-1]
    counts = [vocab_size if n < 0 else min(n, vocab_size) for n in num_top]
    top_rK, ids_rK = logprobs_rV.topk(max(counts))
    entries = []
    own, ranks = own_r1[:, 0].tolist(), rank_r.tolist()
    for i, (token, count) in enumerate(zip(tokens, counts)):
        entry = {token: Logprob(own[i], ranks[i])}
        likeliest = zip(ids_rK[i, :count].tolist(), top_rK[i, :count].tolist())
        for rank, (other, logprob) in enumerate(likeliest, 1):
            entry.setdefault(other, Logprob(logprob, rank))
        entries.append(entry)
    return entries


def _temperature_scaled(logits_rV: Tensor, params: Sequence[SamplingParams]) -> Tensor:
    """Rows of requests that ask for it divided by their temperature, for `temp_scaled_logprobs`."""
    wanted = [(p.temperature or 1.0) if p.temp_scaled_logprobs else 1.0 for p in params]
    if all(value == 1.0 for value in wanted):
        return logits_rV
    divisor_r = torch.tensor(wanted, device=logits_rV.device).clamp_min(MIN_TEMPERATURE)
    return logits_rV / divisor_r[:, None]


def _within_top_p(logits_rV: Tensor, params: Sequence[SamplingParams]) -> Tensor:
    """Rows of requests that ask for it without the tokens outside their nucleus, for
    `top_p_normalized_logprobs`: the fewest likeliest tokens that together reach `top_p`.
    """
    rows = [i for i, p in enumerate(params) if p.top_p_normalized_logprobs and p.top_p is not None]
    if not rows:
        return logits_rV
    top_p_r1 = torch.tensor(
        [params[i].top_p for i in rows], dtype=torch.float64, device=logits_rV.device
    )
    probs_rV, order_rV = logits_rV[rows].double().softmax(-1).sort(descending=True, stable=True)
    outside_rV = probs_rV.cumsum(-1) - probs_rV >= top_p_r1[:, None]
    outside_rV[:, 0] = False  # top_p = 0 means the likeliest
    outside_rV = torch.zeros_like(outside_rV).scatter(-1, order_rV, outside_rV)
    logits_rV = logits_rV.clone()
    logits_rV[rows] = logits_rV[rows].masked_fill(outside_rV, float("-inf"))
    return logits_rV
