"""Chooses tokens from logits, for a whole batch at once.

    raw logits -> penalties, biases, bans, masks -> greedy rows: argmax
                                                 -> others: temperature, min_p, top_k, top_p, draw
                                                 -> tokens that a request is forced to take

A draw is the inverse of the cumulative distribution at one uniform number, which is made from the
request's seed and the position of the token. So a seeded result does not depend on the neighbours
in the batch, on chunking, or on a preemption in between. Log-probabilities are those of the raw
logits.

Verification of drafts. Logits after the last known token and after each draft come together:

    known tokens       ... x        drafts a b c        logits after x, a, b, c
    chosen from them   a b f g      accepted a b, then f; g continues a text that is not there

Each row is treated as if the drafts before it had been generated: a token is chosen from it exactly
as it would be without drafts, with the same uniform number. Tokens are kept up to the first that is
not its draft. So speculation changes no token at all, drawn or greedy, and the distribution is
unchanged because the draws are.

Legend: R rows of logits, r rows that are treated alike, V vocabulary, K candidates.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastdeploy.engine.constraint import Filled
from fastdeploy.engine.request import Request
from fastdeploy.engine.scheduler import Part
from fastdeploy.outputs import Logprob, TokenLogprobs
from fastdeploy.sampling import SamplingParams

# A nucleus (top_p) is looked for among so many of the likeliest tokens, and among 16 times as many
# where these do not hold enough probability: sorting a whole vocabulary takes milliseconds.
NUM_CANDIDATES = 256
LEAST_LOGPROB = -9999.0  # stands for impossible: JSON has no infinity
MIN_TEMPERATURE = 1e-5  # below it the quotient could overflow; greedy to any precision


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
        self, logits_RV: Tensor, parts: Sequence[Part], masks: Filled | None = None
    ) -> list[list[Choice]]:
        """The choices of each part that chooses, in order: its accepted drafts and one token more.
        Scores prompt tokens on the way. `masks` are those of the parts that are held to a form.

        Overwrites `logits_RV`.
        """
        rows: list[int] = []
        choosing, row = [], 0
        for part in parts:
            if part.num_logits and part.request.num_to_score > 0:
                self._score_prompt(logits_RV[row : row + part.num_logits], part)
            row += part.num_logits
            if part.chooses:
                rows += range(row - 1 - len(part.draft_ids), row)
                choosing.append(part)
        if not choosing:
            return []
        if len(rows) < len(logits_RV):
            logits_RV = logits_RV[rows]
        # The request of each row, and how many drafts stand before the token it chooses.
        requests = [part.request for part in choosing for _ in range(len(part.draft_ids) + 1)]
        offsets = [i for part in choosing for i in range(len(part.draft_ids) + 1)]
        wanted = [i for i, request in enumerate(requests) if request.wants_logprob]
        raw_rV = logits_RV[wanted] if wanted else None  # a copy, made before it is adjusted
        self._adjust(logits_RV, choosing)
        if masks is not None:
            masks.apply(logits_RV)
        tokens = _choose(logits_RV, requests, offsets)
        for i, request in enumerate(requests):
            if request.thinking is not None:  # which has no drafts
                forced = request.thinking.forced(request.token_ids)
                tokens[i] = tokens[i] if forced is None else forced
        choices = [Choice(token) for token in tokens]
        if raw_rV is not None:
            _add_logprobs(raw_rV, [requests[i] for i in wanted], [choices[i] for i in wanted])
        accepted = self._accepted(choices, choosing)
        if masks is not None:
            tokens_by_request = {
                part.request: [choice.token for choice in some]
                for part, some in zip(choosing, accepted)
            }
            masks.take(tokens_by_request)
        return accepted

    def _adjust(self, logits_RV: Tensor, parts: Sequence[Part]) -> None:
        row = 0
        for part in parts:
            note = self._notes(part.request)
            if note is not None:
                note.adjust_rows(logits_RV[row:], part.request, part.draft_ids)
            row += len(part.draft_ids) + 1

    def _accepted(self, choices: list[Choice], parts: Sequence[Part]) -> list[list[Choice]]:
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
            note = self._notes(part.request)
            if note is not None:
                for choice in accepted[-1]:
                    note.add(choice.token)
        return accepted

    def _notes(self, request: Request) -> Notes | None:
        if request.sampler_notes is None:
            # False stands for "nothing to adjust", so that the question is asked once a request.
            request.sampler_notes = (
                Notes(request, self.vocab_size) if _needs_notes(request) else False
            )
        return request.sampler_notes or None

    def _score_prompt(self, logits_nV: Tensor, part: Part) -> None:
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


class Notes:
    """What the sampler knows of a request whose logits it adjusts: seen tokens, biases, bans."""

    def __init__(self, request: Request, vocab_size: int) -> None:
        params = request.params
        self.presence = params.presence_penalty or 0.0
        self.frequency = params.frequency_penalty or 0.0
        self.repetition = params.repetition_penalty or 1.0
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
        for token in request.token_ids[request.num_prompt :]:
            self.add(token)

    def add(self, token: int) -> None:
        slot = self.slot_by_token.setdefault(token, len(self.slot_by_token))
        self.seen[slot] = token
        self.generated[slot] += 1

    def adjust_rows(self, logits_RV: Tensor, request: Request, draft_ids: Sequence[int]) -> None:
        """Adjust the logits after the known tokens, and those after each draft as if it and the
        ones before it had been generated.
        """
        num_seen = len(self.slot_by_token)
        ends = [*request.token_ids[request.num_prompt :], *draft_ids] if self.runs else []
        for i in range(len(draft_ids) + 1):
            if i:
                self.add(draft_ids[i - 1])
            self.adjust(logits_RV[i], may_stop=request.may_stop(i))
            self._ban_runs(logits_RV[i], ends[: request.num_output + i])
        for token in draft_ids:  # forget them again
            self.generated[self.slot_by_token[token]] -= 1
        while len(self.slot_by_token) > num_seen:
            self.slot_by_token.popitem()

    def adjust(self, logits_V: Tensor, *, may_stop: bool) -> None:
        """Penalties (Source: the definitions of OpenAI, for repetition of CTRL), biases, bans."""
        device = logits_V.device
        seen = self.seen[: len(self.slot_by_token)].to(device)
        counts = self.generated[: len(self.slot_by_token)].to(device)
        values = logits_V[seen]
        values = torch.where(values > 0, values / self.repetition, values * self.repetition)
        logits_V[seen] = values - self.frequency * counts - self.presence * (counts > 0)
        logits_V[self.biased.to(device)] += self.bias.to(device)
        logits_V[self.banned.to(device)] = float("-inf")
        if not may_stop:
            logits_V[self.stops.to(device)] = float("-inf")

    def _ban_runs(self, logits_V: Tensor, generated_ids: Sequence[int]) -> None:
        """Ban the last token of each sequence of which the others have just been generated."""
        for *begin, last in self.runs:
            if generated_ids[-len(begin) :] == begin:
                logits_V[last] = float("-inf")


def _needs_notes(request: Request) -> bool:
    p = request.params
    penalised = p.presence_penalty or p.frequency_penalty or p.repetition_penalty not in (None, 1)
    must_go_on = p.min_tokens > 1 and request.stop_ids
    banned = request.banned_ids or request.banned_runs
    return bool(penalised or p.logit_bias or banned or must_go_on)


def uniform(seed: tuple[int, int], position: int) -> float:
    """A number in [0, 1) that depends on the seed, the sample's index and the position only."""
    digest = hashlib.blake2b(struct.pack("<QQQ", *seed, position), digest_size=8).digest()
    return (int.from_bytes(digest, "little") >> 11) * 2.0**-53


def _choose(logits_RV: Tensor, requests: Sequence[Request], offsets: Sequence[int]) -> list[int]:
    """A token for each row; `offsets`: drafts between the known tokens of its request and it."""
    drawn = [i for i, request in enumerate(requests) if not request.params.is_greedy]
    if len(drawn) == len(requests):
        return _draw_rows(logits_RV, requests, offsets)
    tokens = logits_RV.argmax(-1).tolist()
    if drawn:
        chosen = _draw_rows(
            logits_RV[drawn], [requests[i] for i in drawn], [offsets[i] for i in drawn]
        )
        for i, token in zip(drawn, chosen):
            tokens[i] = token
    return tokens


def _draw_rows(logits_rV: Tensor, requests: Sequence[Request], offsets: Sequence[int]) -> list[int]:
    def column(values: list, dtype: torch.dtype = torch.float64) -> Tensor:
        return torch.tensor(values, dtype=dtype)

    params = [request.params for request in requests]
    temperature_r = column([1.0 if p.temperature is None else p.temperature for p in params])
    min_p_r = column([p.min_p for p in params])
    top_k_r = column([max(p.top_k, 0) for p in params], torch.int64)
    top_p_r = column([1.0 if p.top_p is None else p.top_p for p in params])
    uniform_r = column([uniform(r.seed, r.num_output + i) for r, i in zip(requests, offsets)])
    return draw(logits_rV, temperature_r, min_p_r, top_k_r, top_p_r, uniform_r).tolist()


def draw(
    logits_rV: Tensor,
    temperature_r: Tensor,
    min_p_r: Tensor,
    top_k_r: Tensor,
    top_p_r: Tensor,
    uniform_r: Tensor,
) -> Tensor:
    """One token a row; int64 `(r,)`.

    `min_p` keeps tokens with at least that share of the likeliest one's probability; then `top_k`
    (0 = all) keeps the k likeliest; then `top_p` keeps the fewest likeliest ones that together
    reach that share of what is left. Settings are float64 (top_k int64) and in the host's memory,
    so that what is to be done is known without asking a GPU; probabilities are float32, and sums of
    probabilities float64: in float32 a vocabulary of 100,000 adds up with an error that can be
    seen.
    """
    device = logits_rV.device
    scaled_rV = logits_rV / temperature_r.clamp_min(MIN_TEMPERATURE).float().to(device)[:, None]
    if bool(min_p_r.any()):
        floor_r1 = scaled_rV.amax(-1, keepdim=True) + min_p_r.log().float().to(device)[:, None]
        scaled_rV = scaled_rV.masked_fill(scaled_rV < floor_r1, float("-inf"))
    probs_rV = scaled_rV.softmax(-1)
    restricted_r = (top_k_r > 0) | (top_p_r < 1)
    kept, free = (mask_r.nonzero()[:, 0] for mask_r in (restricted_r, ~restricted_r))
    if not len(kept):
        return _invert(probs_rV, uniform_r.to(device))
    few = max(NUM_CANDIDATES, int(top_k_r.max()))
    top_k_k, top_p_k, uniform_k = (x[kept].to(device) for x in (top_k_r, top_p_r, uniform_r))
    if not len(free):
        return _draw_restricted(probs_rV, top_k_k, top_p_k, uniform_k, few)
    kept, free, uniform_f = kept.to(device), free.to(device), uniform_r[free].to(device)
    tokens_r = torch.empty(len(probs_rV), dtype=torch.int64, device=device)
    tokens_r[free] = _invert(probs_rV[free], uniform_f)
    tokens_r[kept] = _draw_restricted(probs_rV[kept], top_k_k, top_p_k, uniform_k, few)
    return tokens_r


def _draw_restricted(
    probs_rV: Tensor, top_k_r: Tensor, top_p_r: Tensor, uniform_r: Tensor, num_candidates: int
) -> Tensor:
    num_candidates = min(num_candidates, probs_rV.shape[-1])
    top_rK, ids_rK = probs_rV.topk(num_candidates)
    mass_rK = top_rK.double()
    limit_r = torch.where(top_k_r > 0, top_k_r, num_candidates)
    rank_K = torch.arange(num_candidates, device=probs_rV.device)
    mass_rK = mass_rK.masked_fill(rank_K >= limit_r[:, None], 0.0)
    whole_r = torch.where(top_k_r > 0, mass_rK.sum(-1), 1.0)
    enough_r = torch.where(top_p_r < 1, top_p_r * whole_r, float("inf"))
    before_rK = mass_rK.cumsum(-1) - mass_rK
    kept_rK = mass_rK.masked_fill(before_rK >= enough_r[:, None], 0.0)
    tokens_r = ids_rK.gather(-1, _invert(kept_rK, uniform_r)[:, None])[:, 0]
    short_r = (top_k_r == 0) & (mass_rK.sum(-1) < enough_r)
    if num_candidates < probs_rV.shape[-1] and bool(short_r.any()):
        settings = (top_k_r[short_r], top_p_r[short_r], uniform_r[short_r])
        tokens_r[short_r] = _draw_restricted(probs_rV[short_r], *settings, 16 * num_candidates)
    return tokens_r


def _invert(weights_rK: Tensor, uniform_r: Tensor) -> Tensor:
    """Where the cumulated weights pass `uniform` times their sum; never an index of weight 0."""
    cumulated_rK = weights_rK.cumsum(-1, dtype=torch.float64)
    target_r1 = uniform_r[:, None] * cumulated_rK[:, -1:]
    return torch.searchsorted(cumulated_rK, target_r1, right=True)[:, 0].clamp_max(
        weights_rK.shape[-1] - 1
    )


def _add_logprobs(raw_rV: Tensor, requests: Sequence[Request], choices: Sequence[Choice]) -> None:
    """Say in each choice how likely it was, and describe it where the user wants that."""
    tokens_r1 = torch.tensor([choice.token for choice in choices], device=raw_rV.device)[:, None]
    logprobs_r = raw_rV.gather(-1, tokens_r1)[:, 0] - raw_rV.logsumexp(-1)
    for request, choice, logprob in zip(requests, choices, logprobs_r.tolist()):
        choice.logprob = logprob
        request.watch(logprob)
    described = [i for i, request in enumerate(requests) if request.params.logprobs is not None]
    params = [requests[i].params for i in described]
    shown_rV = _within_top_p(_temperature_scaled(raw_rV[described], params), params)
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
    own_r1 = logprobs_rV.gather(-1, torch.tensor(tokens, device=logits_rV.device)[:, None])
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
