"""Drafts: guesses of the next tokens of a text, which the next step verifies all at once.

A drafter is called after every step and leaves its guesses in `request.draft_ids`. What they are
worth decides how fast a text grows and nothing else: the sampler keeps a draft only where it has
chosen that very token itself (see `sampler.py`).

    NgramDrafter    what followed the newest tokens when they stood in the text before
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from fastdeploy.config import Speculation
from fastdeploy.engine.request import Request, Status
from fastdeploy.engine.scheduler import Schedule

Drafter = Callable[[Schedule], None]


def make_drafter(speculation: Speculation | None) -> Drafter | None:
    if speculation is None:
        return None
    return NgramDrafter(speculation)


def num_allowed(request: Request, num_tokens: int) -> int:
    """How many of `num_tokens` drafts could be of use: one token follows them in any case."""
    if request.status is not Status.RUNNING:
        return 0
    return min(num_tokens, request.max_output - request.num_output - 1)


class NgramDrafter:
    """Proposes the continuation of the most recent earlier place where the text ended as now."""

    def __init__(self, speculation: Speculation) -> None:
        self.speculation = speculation

    def __call__(self, schedule: Schedule) -> None:
        s = self.speculation
        for part in schedule.parts:
            request = part.request
            num_tokens = num_allowed(request, s.num_speculative_tokens) if part.chooses else 0
            if num_tokens > 0:
                if request.drafter_notes is None:
                    request.drafter_notes = NgramIndex(s.min_ngram_size, s.max_ngram_size)
                place = request.drafter_notes.find(request.token_ids)
                request.draft_ids = continuation(request.token_ids, place, num_tokens)


class NgramIndex:
    """Where each n-gram of a growing text has ended last. A new token costs one entry a size."""

    def __init__(self, min_size: int, max_size: int) -> None:
        self.sizes = range(max_size, min_size - 1, -1)
        self.end_by_ngram: dict[tuple[int, ...], int] = {}
        self.num_read = 0  # n-grams that end in `token_ids[:num_read]` are in the dict

    def find(self, token_ids: Sequence[int]) -> int | None:
        """Where the longest possible end of the text has ended before, None if no end ever has.

        `token_ids` is the text of the last call, and what has been added to it.
        """
        length = len(token_ids)
        for end in range(self.num_read + 1, length):  # not the newest: it would find itself
            for size in self.sizes:
                if size <= end:
                    self.end_by_ngram[tuple(token_ids[end - size : end])] = end
        self.num_read = max(self.num_read, length - 1)
        for size in self.sizes:
            if size < length:
                place = self.end_by_ngram.get(tuple(token_ids[length - size :]))
                if place is not None:
                    return place
        return None


def continuation(token_ids: Sequence[int], place: int | None, num_tokens: int) -> list[int]:
    """The tokens from `place` on; where the text ends, the copy goes on with its own beginning."""
    if place is None:
        return []
    period = len(token_ids) - place
    return [token_ids[place + i % period] for i in range(num_tokens)]
