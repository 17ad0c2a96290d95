"""Which tokens the next step computes: the policy of the engine, on one page.

Every step has a budget of tokens. A running request asks for the tokens that it knows and has not
computed; one that generates asks for one, one that reads its prompt for many and gets what the
budget leaves (chunked prefill). Then waiting requests are admitted by priority, and among equals
first come, first served. When the cache is full, the request that was admitted last among those of
the lowest priority loses its blocks and returns to its place in the queue; what it generated is
kept, and is computed again (preemption by recomputation). A waiting request never pushes out a
running one.

What is left of the budget goes to drafts: guesses of what will follow the known tokens of a request
(see `speculative.py`), computed along with them and verified by the sampler. A draft is no known
token. It never costs another text a token or a block: it comes last, and blocks that were added for
it are given back before the next step is decided.

Integers only: no tensor is touched here, and no decision is taken anywhere else.
"""

from __future__ import annotations

import dataclasses
import time
from bisect import insort
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from fastdeploy.engine.blocks import BlockManager
from fastdeploy.engine.request import Request, Status

# Log-probabilities of a prompt need logits at each of its positions: a vocabulary of floats a
# token. So many of one prompt in a step, and of all, but for one of each that finds no room.
MAX_SCORED_TOKENS = 128
MAX_SCORED_IN_STEP = 512


@dataclass(frozen=True, slots=True)
class ScheduledRequest:
    """The tokens of one request in a step: known ones from `start` on, then drafts."""

    request: Request
    start: int  # computed before: the position of the first token of the part
    num_tokens: int  # drafts included
    # Blocks that joined the table in this step, its last ones. On admission that is the whole
    # table.
    new_blocks: list[int]
    # Logits are wanted after so many of the last tokens: 0 when known tokens remain to be computed,
    # 1 to choose the next token, one more for each draft, and more where tokens of the prompt are
    # scored.
    num_logits: int
    # Whether the last of these logits (one, and one for each draft) choose new tokens; never for a
    # request that is pooled.
    chooses: bool
    draft_ids: Sequence[int] = ()

    @property
    def token_ids(self) -> list[int]:
        """The ids of its tokens, drafts included."""
        known_ids = self.request.token_ids[self.start : self.start + self.num_tokens]
        return [*known_ids, *self.draft_ids] if self.draft_ids else known_ids


@dataclass(frozen=True, slots=True)
class Schedule:
    """One step: all that goes from the scheduler to the runner and the sampler."""

    parts: list[ScheduledRequest] = field(default_factory=list)  # in the order of the flat batch

    @property
    def num_tokens(self) -> int:
        return sum(part.num_tokens for part in self.parts)


class Scheduler:
    def __init__(
        self,
        blocks: BlockManager,
        *,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        chunked_prefill: bool = True,
        num_ahead: int = 0,
    ) -> None:
        """`num_ahead`: positions past a step's tokens where whoever drafts the next ones writes."""
        assert max_num_batched_tokens >= max_num_seqs, "each running request needs one token a step"
        self.blocks = blocks
        self.max_num_batched_tokens = max_num_batched_tokens
        self.chunked_prefill = chunked_prefill
        self.num_ahead = num_ahead
        self.waiting: deque[Request] = deque()  # in order of priority and arrival
        self.running: list[Request] = []  # in order of priority and admission
        self.num_arrivals = 0
        self.seats = list(reversed(range(max_num_seqs)))  # rows of the runner that are not taken
        self.num_preemptions = 0
        self.num_prompt_tokens = 0  # of requests when they were first admitted
        self.num_hit_tokens = 0  # of these, found in the cache
        self.num_drafts = 0  # parts with drafts
        self.num_draft_tokens = 0
        self.num_accepted_tokens = 0  # of these, became known
        self.refused: tuple[Request, int] | None = None  # with the number of free blocks there were
        self.num_scored = 0  # tokens of this step that may be of prompts to be scored

    @property
    def has_work(self) -> bool:
        return bool(self.running or self.waiting)

    def add(self, request: Request) -> None:
        self.num_arrivals += 1
        request.arrival = self.num_arrivals
        self._enqueue(request)

    def schedule(self) -> Schedule:
        """Decide the next step. Every request in it has its blocks when this returns."""
        for request in self.running:
            self.blocks.shrink(request.table, request.num_computed)
        schedule, self.num_scored = Schedule(), 0
        budget = self.max_num_batched_tokens
        num_preempted = self.num_preemptions

        position = 0
        while position < len(self.running):
            request = self.running[position]
            # One token is kept for each request behind, so that no prompt ever stalls a stream.
            most = budget - (len(self.running) - position - 1)
            num_tokens = self._num_wanted(request, most)
            if not self._make_room(request, request.num_computed + num_tokens):
                break  # it was the last one left, and has preempted itself
            schedule.parts.append(self._part(request, num_tokens))
            budget -= num_tokens
            position += 1

        while self.waiting and self.seats and budget and self.num_preemptions == num_preempted:
            num_tokens = self._admit(self.waiting[0], budget)
            if not num_tokens:
                break
            request = self.waiting.popleft()
            schedule.parts.append(self._part(request, num_tokens, admitted=True))
            budget -= num_tokens
        self._add_drafts(schedule.parts, budget)
        return schedule

    def update(
        self, schedule: Schedule, chosen: Sequence[Sequence[int]]
    ) -> list[tuple[Request, int]]:
        """Take the tokens that the step chose, for each part that chooses, in order: its accepted
        drafts and one more.

        Returns the requests that got some, and how many; none follows one that ends the text.
        Finished requests have given back what they held.
        """
        tokens, grown = iter(chosen), []
        for part in schedule.parts:
            request = part.request
            request.num_computed += part.num_tokens - len(part.draft_ids)
            if part.chooses:
                num_taken = _take(request, next(tokens))
                request.draft_ids = []
                request.num_computed += num_taken - 1
                grown.append((request, num_taken))
                if part.draft_ids:
                    self.num_drafts += 1
                    self.num_draft_tokens += len(part.draft_ids)
                    self.num_accepted_tokens += num_taken - 1
                self.blocks.name(request.table, request.key_ids, request.num_computed)
                if request.finish_reason():
                    self.finish(request)
            elif request.num_computed == request.num_known:  # its states were all that was wanted
                self.finish(request)
        return grown

    def finish(self, request: Request) -> None:
        """Take a request out, wherever it is: it has ended, or nobody waits for it any more."""
        if request.status is Status.RUNNING:
            self._leave(request)
            self.running.remove(request)
        elif request.status is Status.WAITING:
            self.waiting.remove(request)
        if self.refused and self.refused[0] is request:
            self.refused = None
        request.status = Status.FINISHED

    def preempt_all(self) -> None:
        """Take the blocks of every running request away; all of them start anew."""
        while self.running:
            self._preempt_last()

    def check(self) -> None:
        """Assert what holds between two steps; for tests."""
        self.blocks.check([request.table for request in self.running])
        taken = [request.seat for request in self.running] + self.seats
        assert sorted(taken) == list(range(len(taken))), f"seats {taken}"
        for request in self.running:
            assert request.num_computed < request.num_known, f"{request.id} has nothing to compute"
        assert all(not request.table.blocks for request in self.waiting)
        assert list(self.waiting) == sorted(self.waiting, key=_place_in_queue)
        assert self.running == sorted(self.running, key=_priority)

    def _num_wanted(self, request: Request, most: int) -> int:
        if request.num_to_score > 0:
            room = max(MAX_SCORED_IN_STEP - self.num_scored, 1)  # and nobody waits for the rest
            most = min(most, MAX_SCORED_TOKENS, room)
        num_tokens = min(request.num_known - request.num_computed, most)
        self.num_scored += num_tokens if request.num_to_score > 0 else 0
        return num_tokens

    def _make_room(self, request: Request, num_tokens: int) -> bool:
        """Preempt from the back until the table can hold `num_tokens`; False if `request` had to
        go.
        """
        while self.blocks.num_missing(request.table, num_tokens) > self.blocks.num_free:
            if self._preempt_last() is request:
                return False
        return True

    def _preempt_last(self) -> Request:
        victim = self.running.pop()
        self._leave(victim)
        victim.status = Status.WAITING
        victim.num_computed = 0
        victim.draft_ids = []
        victim.num_preemptions += 1
        self.num_preemptions += 1
        self._enqueue(victim)
        return victim

    def _enqueue(self, request: Request) -> None:
        insort(self.waiting, request, key=_place_in_queue)

    def _admit(self, request: Request, budget: int) -> int:
        """Start a waiting request; returns how many tokens it computes first, 0 if it has to wait.

        All its known tokens must find room, not only the first chunk, and so must the next block of
        each running request: otherwise texts would push each other out again and again.
        """
        if self.refused == (request, self.blocks.num_free):
            return 0  # nothing has changed: do not search a long text for hits in every step
        needs_all = request.num_to_score > 0 or request.params.pooling == "mean"
        found = self.blocks.find(() if needs_all else request.key_ids, request.cache_root)
        num_cached = len(found.blocks) * self.blocks.block_size
        rest = request.num_known - num_cached
        if rest > budget and not self.chunked_prefill:
            return 0
        num_missing = self.blocks.num_missing(found, request.num_known)
        if num_missing + len(self.running) > self.blocks.num_free_without(found):
            self.refused = (request, self.blocks.num_free)
            return 0
        self.blocks.adopt(found)
        request.table = found
        request.num_computed = num_cached
        request.seat = self.seats.pop()
        request.status = Status.RUNNING
        insort(self.running, request, key=_priority)
        if request.metrics.inference_start_time is None:
            request.metrics.inference_start_time = time.monotonic()
            request.num_cached = num_cached
            self.num_prompt_tokens += request.num_prompt
            self.num_hit_tokens += num_cached
        return self._num_wanted(request, budget)

    def _part(
        self, request: Request, num_tokens: int, *, admitted: bool = False
    ) -> ScheduledRequest:
        start, end = request.num_computed, request.num_computed + num_tokens
        added = self.blocks.grow(request.table, end)
        self.blocks.name(request.table, request.key_ids, end)
        chooses = end == request.num_known and request.params.pooling is None
        scores = request.num_to_score > 0
        return ScheduledRequest(
            request=request,
            start=start,
            num_tokens=num_tokens,
            new_blocks=list(request.table.blocks) if admitted else added,
            num_logits=num_tokens if scores else int(chooses),
            chooses=chooses,
        )

    def _add_drafts(self, parts: list[ScheduledRequest], budget: int) -> None:
        """Lengthen parts by the drafts of their requests, as far as budget and free blocks go."""
        for i, part in enumerate(parts):
            request, end = part.request, part.start + part.num_tokens
            if not part.chooses or not (request.draft_ids or self.num_ahead):
                continue
            room = (len(request.table.blocks) + self.blocks.num_free) * self.blocks.block_size
            draft_ids = request.draft_ids[: min(budget, room - end)]
            budget -= len(draft_ids)
            ahead = end + len(draft_ids) + self.num_ahead
            added = self.blocks.grow(request.table, min(ahead, room, request.max_len))
            parts[i] = dataclasses.replace(
                part,
                num_tokens=part.num_tokens + len(draft_ids),
                new_blocks=part.new_blocks + added,
                num_logits=part.num_logits + len(draft_ids),
                draft_ids=draft_ids,
            )

    def _leave(self, request: Request) -> None:
        self.blocks.release(request.table)
        self.seats.append(request.seat)
        request.seat = -1


def _place_in_queue(request: Request) -> tuple[int, int]:
    return request.priority, request.arrival


def _priority(request: Request) -> int:
    return request.priority


def _take(request: Request, token_ids: Sequence[int]) -> int:
    """Append tokens until one ends the text; returns how many."""
    for count, token in enumerate(token_ids, 1):
        request.token_ids.append(token)
        if request.finish_reason():
            return count
    return len(token_ids)
