"""What the engine hands back: `RequestOutput` with its completions, log-probabilities and timings;
and `Stats`, its own figures.

Imports no torch.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any


@dataclass(slots=True)
class Logprob:
    """Natural logarithm of a token's probability, its rank (1 = likeliest) and its own text."""

    logprob: float
    rank: int
    decoded_token: str | None = None


TokenLogprobs = dict[int, Logprob]  # by token id: the token itself first, then the likeliest ones


@dataclass(slots=True)
class CompletionOutput:
    """One sample of an answer. `finish_reason` is None while it grows, else stop, length, abort, or
    error (see `RequestOutput.error_msg`).

    `text` ends before the stop string or the token that ended it, unless
    `include_stop_str_in_output`; `token_ids` holds every token that was generated.
    `stop_reason` is the stop string or stop token id that ended it, "repetition" after an early
    stop, None for an end-of-text token. `cumulative_logprob` is the sum over its tokens, in the raw
    logits, where it had to be known (`logprobs`, `best_of`, early stops).
    """

    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] | None = None
    finish_reason: str | None = None
    stop_reason: str | int | None = None
    cumulative_logprob: float | None = None

    @property
    def mean_logprob(self) -> float:
        """Log-probability of a token on average; what no token was generated for is the worst."""
        if not self.token_ids:
            return -math.inf
        assert self.cumulative_logprob is not None, "nobody asked for log-probabilities"
        return self.cumulative_logprob / len(self.token_ids)

    @classmethod
    def joined(cls, pieces: Sequence[CompletionOutput]) -> CompletionOutput:
        """The consecutive pieces of one sample as one."""
        sums = [p.cumulative_logprob for p in pieces if p.cumulative_logprob is not None]
        logprobs = [piece.logprobs for piece in pieces if piece.logprobs is not None]
        return cls(
            index=pieces[0].index,
            text="".join(piece.text for piece in pieces),
            token_ids=list(chain.from_iterable(piece.token_ids for piece in pieces)),
            logprobs=list(chain.from_iterable(logprobs)) if logprobs else None,
            finish_reason=pieces[-1].finish_reason,
            stop_reason=pieces[-1].stop_reason,
            cumulative_logprob=sum(sums) if sums else None,
        )


def best(samples: Sequence[CompletionOutput], n: int) -> list[CompletionOutput]:
    """The `n` samples whose tokens are likeliest on average, the best first."""
    return sorted(samples, key=lambda sample: -sample.mean_logprob)[:n]


def numbered(samples: Sequence[CompletionOutput]) -> list[CompletionOutput]:
    return [dataclasses.replace(sample, index=i) for i, sample in enumerate(samples)]


class Completions(list[CompletionOutput]):
    """The samples of a request, a list; fields of the first one also read directly: `.text`."""

    def __getattr__(self, name: str) -> Any:
        if name in CompletionOutput.__dataclass_fields__ and self:
            return getattr(self[0], name)
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")


@dataclass(slots=True)
class RequestMetrics:
    """When things happened to the first sample, in seconds of the monotonic clock."""

    arrival_time: float
    inference_start_time: float | None = None
    first_token_time: float | None = None
    finished_time: float | None = None

    @property
    def time_in_queue(self) -> float | None:
        """Seconds before it was admitted; FastDeploy's outputs have it too."""
        started = self.inference_start_time
        return None if started is None else started - self.arrival_time


@dataclass(slots=True)
class RequestOutput:
    """The answer to one prompt, whole or (when streaming) what is new since the last piece."""

    request_id: str
    prompt: str | None
    prompt_token_ids: Sequence[int]
    outputs: Completions
    finished: bool = False
    metrics: RequestMetrics | None = None
    num_cached_tokens: int = 0
    prompt_logprobs: list[TokenLogprobs | None] | None = None
    error_code: int = 200
    error_msg: str | None = None

    @classmethod
    def joined(cls, pieces: Sequence[RequestOutput]) -> RequestOutput:
        """The consecutive pieces of one request as one."""
        first, last = pieces[0], pieces[-1]
        by_index: dict[int, list[CompletionOutput]] = {}
        for completion in chain.from_iterable(piece.outputs for piece in pieces):
            by_index.setdefault(completion.index, []).append(completion)
        outputs = Completions(CompletionOutput.joined(by_index[i]) for i in sorted(by_index))
        scores = next((p.prompt_logprobs for p in pieces if p.prompt_logprobs is not None), None)
        failed = next((piece for piece in pieces if piece.error_msg is not None), first)
        return dataclasses.replace(
            first,
            outputs=outputs,
            error_code=failed.error_code,
            error_msg=failed.error_msg,
            finished=last.finished,
            metrics=last.metrics,
            prompt_logprobs=scores,
        )

    def add(self, later: RequestOutput) -> None:
        """Merge a later piece of the same request into this one."""
        whole = RequestOutput.joined([self, later])
        for name in self.__dataclass_fields__:
            setattr(self, name, getattr(whole, name))

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> RequestOutput:
        """The output of which these are the `to_dict`, even if they were JSON in between.

        Raises ValueError for keys that are missing or not known.
        """
        try:
            given = dict(values)
            if "outputs" in given:
                given["outputs"] = Completions(map(_completion_of, given["outputs"]))
            if given.get("metrics") is not None:
                given["metrics"] = RequestMetrics(**given["metrics"])
            given["prompt_logprobs"] = _logprobs_of(given.get("prompt_logprobs"))
            return cls(**given)
        except (AttributeError, TypeError, ValueError) as error:
            raise ValueError(f"this is no RequestOutput as to_dict writes it: {error}") from None


def _completion_of(values: Mapping[str, Any]) -> CompletionOutput:
    return CompletionOutput(**{**values, "logprobs": _logprobs_of(values.get("logprobs"))})


def _logprobs_of(entries: Sequence[Any] | None) -> list[Any] | None:
    """JSON has made texts of the token ids."""
    if entries is None:
        return None
    return [
        entry and {int(token): Logprob(**value) for token, value in entry.items()}
        for entry in entries
    ]


@dataclass(slots=True)
class Stats:
    """Figures of an engine at one moment, for metrics and the log line."""

    num_running: int
    num_waiting: int
    num_preemptions: int
    num_blocks: int
    num_free_blocks: int
    num_cached_blocks: int
    num_prompt_tokens: int  # of requests admitted so far
    num_hit_tokens: int  # of these, found in the prefix cache
    num_generated_tokens: int
    num_steps: int
    num_drafts: int  # how often drafts of a request were verified
    num_draft_tokens: int  # tokens of these drafts
    num_accepted_tokens: int  # of these, became known
    num_unfinished_forms: int  # texts held to a form that ended, by length, before it did
    num_pictures_computed: int  # of prompts, that went through the vision tower
    num_picture_hits: int  # whose rows were found in the cache of pictures
    num_picture_bytes: int  # of the rows in it

    @property
    def mean_acceptance_length(self) -> float:
        """Tokens that a request gained in a step that verified drafts for it, on average."""
        return 1 + self.num_accepted_tokens / max(self.num_drafts, 1)
