"""Thoughts: between which tokens they stand, and the budget that closes them.

A model that thinks writes its thoughts between two tags, of which the first is usually the end of
the prompt. Once `reasoning_max_tokens` of thought have been generated, the closing tokens are
forced, whatever the logits say, and the model goes on with its answer. Imports no torch.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

from ernie.settings import ConfigError
from ernie.tokenizer import Tokenizer

START, END = "<think>", "</think>"


@dataclass(frozen=True, slots=True)
class ThinkTags:
    """The tags of a model as token ids, and what is forced when a budget is used up."""

    start: int
    end: int
    closing: tuple[int, ...]  # ends with, begins with or just is the closing tag

    @classmethod
    def of(cls, tokenizer: Tokenizer | None, stop_sentence: str | None) -> ThinkTags | None:
        """None for a model without such tags. Raises ConfigError for a sentence that closes
        nothing.
        """
        ids = [tokenizer.id_of(tag) if tokenizer else None for tag in (START, END)]
        start, end = ids
        if tokenizer is None or start is None or end is None:
            if stop_sentence is not None:
                raise ConfigError(
                    f"think_stop_sentence is given, but the tokenizer has no {START} and {END}; "
                    "leave it out"
                )
            return None
        closing = tuple(tokenizer.encode(stop_sentence or END, allow_special=True))
        if closing.count(end) != 1:
            raise ConfigError(
                f"think_stop_sentence={stop_sentence!r} does not close the thought; it must have "
                f"{END} in it, once"
            )
        return cls(start, end, closing)

    def leave_open(self, token_ids: Sequence[int]) -> bool:
        """Whether a text ends within a thought."""
        tags = (self.start, self.end)
        return next((t for t in reversed(token_ids) if t in tags), self.end) == self.start


class Thinking:
    """Follows the tokens of one request and says which ones its budget forces.

    All thoughts of an answer share the budget (None: there is none). A forced token must become the
    next one. What is forced depends on the tokens alone, not on how many of them come at once.
    """

    def __init__(self, tags: ThinkTags, budget: int | None, prompt_ids: Sequence[int]) -> None:
        self.tags, self.budget = tags, budget
        self.num_seen = len(prompt_ids)
        self.num_used = 0  # generated tokens within thoughts
        self.num_answered = 0  # and outside of them
        self.queue: tuple[int, ...] = ()  # forced tokens that are not there yet
        self.is_open = tags.leave_open(prompt_ids)
        assert budget is None or budget > 0, "it is looked at when a token has come"

    def forced(self, token_ids: Sequence[int], draft_ids: Sequence[int] = ()) -> list[int | None]:
        """The token that has to follow `token_ids`, then those that have to follow each of the
        drafts, None where any may. The list ends where a draft is not the token that is forced.
        """
        self.follow(token_ids)
        ahead = copy.copy(self)
        tokens = [ahead._next]
        for draft in draft_ids:
            if tokens[-1] not in (None, draft):
                break
            ahead._see(draft)
            tokens.append(ahead._next)
        return tokens

    def follow(self, token_ids: Sequence[int]) -> None:
        """Take note of the tokens that are new since the last call."""
        for token in token_ids[self.num_seen :]:
            self._see(token)
        self.num_seen = len(token_ids)

    def _see(self, token: int) -> None:
        if self.queue:
            forced, *rest = self.queue
            assert token == forced, f"token {token} came where {forced} was forced"
            self.queue = tuple(rest)
        if token == self.tags.end:
            self.is_open = False
        elif self.is_open:
            self.num_used += 1
        elif token == self.tags.start:
            self.is_open = True
        else:
            self.num_answered += 1
        is_used_up = self.budget is not None and self.num_used >= self.budget
        if self.is_open and is_used_up and not self.queue:
            self.queue = self.tags.closing

    @property
    def _next(self) -> int | None:
        return self.queue[0] if self.queue else None
