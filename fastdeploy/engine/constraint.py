"""Answers that are held to a form: what may come next, as masks over the vocabulary.

    Compiling             a request waits for its grammar outside of the queue
    begin(parts)          before the model runs: masks of the step, filled by a thread meanwhile
    Filled.apply(logits)  after it: what no mask allows becomes impossible
    Filled.take(tokens)   then: the chosen tokens move the matchers on

A row of a mask allows a token as if the drafts before the row had been generated; behind a draft
that the form does not allow nothing is filled in, because no choice can be that draft. While a
model thinks its form does not hold: it begins behind the tag that ends the thought, or behind the
tokens that a budget forces there, and until then the text cannot end.

A text whose form leaves nothing but its end is over with its last token ("complete"); where a form
allows the end among other things, the model decides by a token that ends texts. A constraint that
cannot go on ends its text as "error": the grammar outgrew its limits, or bans leave no token, or
its work takes too long.

An ambiguous grammar of a few KiB can take seconds for one mask, within all limits of the library.
So that no other text waits for it, a constraint has a balance of seconds, which its work draws on
and each step refills a little; work that overdraws it is left behind (see `timed`).

Legend: R rows of the step's logits, r rows with a mask, V vocabulary, W words of 32 bits.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from ernie.kernels.transfer import moved, places
from fastdeploy.engine.grammar import TOO_SLOW, Grammars, why_stuck
from fastdeploy.engine.request import End, Request
from fastdeploy.engine.thinking import ThinkTags
from fastdeploy.engine.timed import Job, Result, TimedThread
from fastdeploy.errors import RequestError

if TYPE_CHECKING:
    from llguidance import LLMatcher

    from fastdeploy.engine.scheduler import ScheduledRequest

# Of each byte of a mask, what is added to 8 logits: 0 where the bit is set.
_BITS = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little")
ADDED = torch.from_numpy(np.where(_BITS, 0, -np.inf).astype(np.float32))
ALL = np.uint32(0xFFFFFFFF)
REFILL_S = 0.01  # of the balance, for each mask and for each step's tokens


class Constraint:
    """The form of one request's answer, and where in it the answer is."""

    def __init__(
        self,
        matcher: LLMatcher,
        prompt_ids: Sequence[int],
        tags: ThinkTags | None = None,
        banned_ends: Iterable[int] = (),
        ends: Iterable[int] = (),
        most_s: float = 1.0,
    ) -> None:
        """`matcher` is this constraint's own; `banned_ends` are ends that are never allowed, `ends`
        are not within a thought: the form is still to come. `most_s` is the full balance.
        """
        self.matcher, self.tags = matcher, tags
        self.is_open = tags is not None and tags.leave_open(prompt_ids)  # within a thought
        self.banned_ends, self.ends = tuple(banned_ends), tuple(ends)
        self.most_s = self.balance_s = most_s
        self.is_left = False  # work on it was left behind: nobody may touch it any more
        # Of the answer's tokens, by their numbers: those that the matcher has, and the newest
        # one of the thought.
        self.consumed: list[int] = []
        self.last_thought = 0

    @property
    def is_complete(self) -> bool:
        """Whether the answer so far has the whole form."""
        return not self.is_open and self.matcher.is_accepting()

    def fill(
        self,
        masks_nW: np.ndarray,
        draft_ids: Sequence[int],
        num_output: int,
        forced: Sequence[int | None],
    ) -> None:
        """Set the bits of the tokens that may follow the known ones, of which `num_output` are the
        answer's, and those that may follow each draft; rows are given with all bits set. `forced`:
        see `Request.forced_ids`.
        """
        self._return_to(num_output)
        num_consumed, is_open = 0, self.is_open
        for i, mask_W in enumerate(masks_nW):
            if is_open:
                _ban(mask_W, self.ends)
            else:
                self._fill(mask_W)
            if i == len(draft_ids):
                break
            draft, must = draft_ids[i], forced[i]
            if must not in (None, draft):
                break
            if is_open:
                is_open = self._stays_open(draft)
            elif must is None:
                if not self.matcher.try_consume_tokens([draft]):
                    break
                num_consumed += 1
        self.matcher.rollback(num_consumed)

    def take(
        self, tokens: Sequence[int], num_output: int, forced: Sequence[int | None]
    ) -> End | None:
        """Move on by tokens that were chosen after `num_output` others. Those that were `forced`
        belong to the end of a thought, whatever the form says.
        """
        for count, (token, must) in enumerate(zip(tokens, forced), num_output + 1):
            if self.is_open:
                self.is_open = self._stays_open(token)
                self.last_thought = count
            elif must is None:
                if not self.matcher.try_consume_tokens([token]):
                    return End(count, "error", why_stuck(self.matcher))
                self.consumed.append(count)
                if self.matcher.is_stopped():
                    return End(count, "complete")
        return None

    def pay(self, seconds: float, num_masks: int = 1) -> None:
        """Take what its work has cost off the balance; for each mask some comes back, so that
        drafts, which have masks of their own, are no reason to run out of it.
        """
        self.balance_s = min(self.balance_s - seconds + num_masks * REFILL_S, self.most_s)

    def _return_to(self, num_output: int) -> None:
        """Forget tokens that it was moved on by and that did not become known: their step has
        failed.
        """
        num_kept = bisect_right(self.consumed, num_output)
        if num_kept < len(self.consumed):
            self.matcher.rollback(len(self.consumed) - num_kept)
            del self.consumed[num_kept:]
        self.is_open |= self.last_thought > num_output

    def _fill(self, mask_W: np.ndarray) -> None:
        self.matcher.unsafe_compute_mask_ptr(mask_W.ctypes.data, mask_W.nbytes)
        if self.matcher.is_error():  # which `take` finds again
            mask_W[:] = ALL
        _ban(mask_W, self.banned_ends)

    def _stays_open(self, token: int) -> bool:
        assert self.tags is not None, "a thought needs tags"
        return token != self.tags.end


def _ban(mask_W: np.ndarray, tokens: Iterable[int]) -> None:
    for token in tokens:
        mask_W[token >> 5] &= ALL ^ np.uint32(1 << (token & 31))


@dataclass(frozen=True, slots=True)
class Held:
    """A part of a step whose text has a form, and the rows of its masks among all masks."""

    request: Request
    constraint: Constraint
    draft_ids: Sequence[int]
    forced: Sequence[int | None]
    rows: slice

    def pay(self, result: Result | None, num_masks: int = 1) -> None:
        """Pay for its work; None: the work was left behind, and the answer ends with its next
        token.
        """
        if result is None:
            self.constraint.is_left = True
            self.request.end = End(self.request.num_output + 1, "error", TOO_SLOW)
        else:
            self.constraint.pay(result.seconds, num_masks)


class Filled:
    """The masks of one step, which a thread may still be working on."""

    def __init__(
        self, held: Sequence[Held], rows: Sequence[int], num_words: int, thread: TimedThread
    ) -> None:
        """`rows` are those of the step's logits, one for each mask."""
        self.held, self.rows, self.thread = held, rows, thread
        self.masks_rW = np.full((len(rows), num_words), ALL)
        self.filling = thread.begin(
            [
                Job(
                    partial(
                        one.constraint.fill,
                        self.masks_rW[one.rows],
                        one.draft_ids,
                        one.request.num_output,
                        one.forced,
                    ),
                    one.constraint.balance_s,
                )
                for one in held
            ]
        )

    def apply(self, logits_RV: Tensor) -> None:
        """Make tokens that no mask allows impossible, in place."""
        kept: list[int] = []
        for one, result in zip(self.held, self.filling.wait()):
            one.pay(result, one.rows.stop - one.rows.start)
            if result is not None:  # else a thread may go on writing to them
                kept += range(one.rows.start, one.rows.stop)
        device, vocab_size = logits_RV.device, logits_RV.shape[-1]
        bytes_r = moved(torch.from_numpy(self.masks_rW[kept].view(np.uint8)), device).int()
        added_rV = torch.nn.functional.embedding(bytes_r, moved(ADDED, device)).flatten(1)
        rows = places([self.rows[i] for i in kept], device)
        logits_RV.index_add_(0, rows, added_rV[:, :vocab_size])

    def take(self, tokens_by_request: Mapping[Request, Sequence[int]]) -> None:
        """Move the constraints on by what was chosen."""
        going = [one for one in self.held if not one.constraint.is_left]
        jobs = [
            Job(
                partial(
                    one.constraint.take,
                    tokens_by_request[one.request],
                    one.request.num_output,
                    one.forced,
                ),
                one.constraint.balance_s,
            )
            for one in going
        ]
        for one, result in zip(going, self.thread.begin(jobs).wait() if jobs else ()):
            one.pay(result)
            if result is not None:
                one.request.end = result.value


class Masks:
    """Fills the masks of a step while the model computes its logits."""

    def __init__(self, vocab_size: int) -> None:
        self.num_words = -(-vocab_size // 32)
        self.thread = TimedThread("masks")

    def begin(self, parts: Sequence[ScheduledRequest]) -> Filled | None:
        """None for a step without a constrained request. Until `apply` nobody else may touch the
        constraints of the requests.
        """
        held: list[Held] = []
        rows: list[int] = []
        row = 0
        for part in parts:
            if part.chooses:
                end = row + len(part.draft_ids) + 1
                request, constraint = part.request, part.request.constraint
                if constraint is not None and not constraint.is_left:
                    place = slice(len(rows), len(rows) + end - row)
                    forced = request.forced_ids(part.draft_ids)
                    held.append(Held(request, constraint, part.draft_ids, forced, place))
                    rows += range(row, end)
                row = end
        return Filled(held, rows, self.num_words, self.thread) if held else None


class Compiling:
    """Requests whose grammar is being compiled; they join the queue when it is."""

    def __init__(
        self,
        grammars: Grammars | None,
        tags: ThinkTags | None,
        eos_ids: frozenset[int],
        most_s: float,
    ) -> None:
        """`most_s`: see `Constraint`."""
        self.grammars, self.tags, self.eos_ids, self.most_s = grammars, tags, eos_ids, most_s
        self.futures: dict[Request, Future[LLMatcher]] = {}

    def add(self, request: Request) -> None:
        assert self.grammars is not None, "checked before"
        assert request.params.guided_decoding is not None, "it has no form"
        self.futures[request] = self.grammars.begin(request.params.guided_decoding)

    def forget(self, request: Request) -> bool:
        """Whether it was there."""
        return self.futures.pop(request, None) is not None

    def ready(self, *, wait_s: float) -> list[tuple[Request, str | None]]:
        """Requests that have their constraint now, or (with what is wrong) never will. Waits a
        little where nothing is ready.
        """
        wait(self.futures.values(), wait_s, FIRST_COMPLETED)
        done = [request for request, future in self.futures.items() if future.done()]
        return [(request, self._finish(request, self.futures.pop(request))) for request in done]

    def _finish(self, request: Request, future: Future[LLMatcher]) -> str | None:
        try:
            matcher = future.result()
        except RequestError as error:
            return str(error)
        prompt_ids = request.token_ids[: request.num_prompt]
        banned_ends = self.eos_ids - request.stop_ids
        ends = self.eos_ids | request.stop_ids
        request.constraint = Constraint(
            matcher, prompt_ids, self.tags, banned_ends, ends, self.most_s
        )
        return None
