"""A request: one text that grows, token by token, until something ends it.

    known tokens      prompt, then what was generated      num_known
    computed tokens   those whose keys and values are in the cache      num_computed
    drafts            guesses of what follows the known tokens, to be verified by the next step

There are no phases. Reading a prompt, going on after a preemption and generating are the same
thing: computed tokens chase known tokens, and when they have caught up, a new token becomes known.

What a user calls a request with `n` samples is n requests here; they find each other's prompt in
the prefix cache. Imports no torch.
"""

from __future__ import annotations

import enum
import math
import time
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fastdeploy.config import EarlyStop, EngineConfig
from fastdeploy.engine.blocks import Table, root_of
from fastdeploy.engine.thinking import Thinking, ThinkTags
from fastdeploy.errors import RequestError
from fastdeploy.outputs import RequestMetrics, TokenLogprobs
from fastdeploy.sampling import SamplingParams

if TYPE_CHECKING:
    from ernie.adapters import Adapter
    from fastdeploy.engine.adjustments import Notes
    from fastdeploy.engine.constraint import Constraint
    from fastdeploy.engine.vision import Layout


class Status(enum.Enum):
    WAITING = "waiting"  # in the queue, without blocks; also after a preemption
    RUNNING = "running"
    FINISHED = "finished"


@dataclass(frozen=True, slots=True)
class End:
    """How an answer ends by its form, or for want of a token that it may go on with."""

    num_tokens: int
    reason: str  # complete or error
    error: str | None = None


@dataclass(frozen=True, slots=True)
class Order:
    """How one sample of a prompt is to be served, beside what its settings say."""

    seed: int | None = None  # where `params.seed` is missing; samples of one prompt share it
    sample_index: int = 0
    priority: int = 0  # lower runs first
    cache_salt: str | None = None  # texts share cached blocks only with those of the same one
    banned: Collection[Sequence[int]] = ()  # none of these sequences of tokens is generated


PLAIN = Order()


class Request:
    """State of one request in the engine. The scheduler owns it; the sampler keeps its notes."""

    def __init__(
        self,
        request_id: str,
        prompt_ids: Sequence[int],
        params: SamplingParams,
        order: Order,
        *,
        max_model_len: int,
        eos_ids: Iterable[int] = (),
        think_tags: ThinkTags | None = None,
        early_stop: EarlyStop | None = None,
        adapter: Adapter | None = None,
        layout: Layout | None = None,
    ) -> None:
        assert order.seed is not None, "`Engine.add` chooses one"
        self.id = request_id
        self.params = params
        # Draws depend on it and on the position, on nothing else.
        self.seed = (order.seed, order.sample_index)
        self.token_ids = list(prompt_ids)
        self.num_prompt = len(self.token_ids)
        self.layout = layout  # of a prompt with pictures
        self._key_ids = self.token_ids if layout is None else list(layout.key_ids)
        self.num_computed = 0
        self.draft_ids: list[int] = []
        self.drafter_notes: Any = None
        self.status = Status.WAITING
        self.priority = order.priority
        self.arrival = 0  # number in the order of arrival; the scheduler gives it
        self.table = Table()
        self.adapter = adapter  # also once it is unloaded: a text is finished as it was begun
        self.cache_salt = order.cache_salt
        self.cache_root = root_of(order.cache_salt, adapter.serial if adapter else 0)
        self.seat = -1  # while running: the row that is this request's in tensors of the runner
        self.metrics = RequestMetrics(arrival_time=time.monotonic())
        self.num_cached = 0  # prompt tokens that were in the cache when it was first admitted
        self.num_preemptions = 0
        self.prompt_logprobs: list[TokenLogprobs | None] = []
        self.sampler_notes: Notes | None = None  # made with the first token, if `is_adjusted`
        self.pooled_sum: Any = None  # of hidden states so far, for a mean
        # Sequences that may not be generated: single tokens, and those of several.
        self.banned_ids = frozenset(ids[0] for ids in order.banned if len(ids) == 1)
        self.banned_runs = tuple(tuple(ids) for ids in order.banned if len(ids) > 1)
        self.thinking = (
            Thinking(think_tags, params.reasoning_max_tokens, self.token_ids)
            if think_tags is not None
            and (params.reasoning_max_tokens or params.response_max_tokens) is not None
            else None
        )
        self.constraint: Constraint | None = None  # given before it is queued, if it has a form
        self.end: End | None = None  # once it is known
        self.early_stop = early_stop
        self.last_unsure = 0  # number of the newest token of which the model was not sure
        self.repeats_at: int | None = None  # generated tokens, and the text ends
        stops = frozenset(params.stop_token_ids or ())
        self.stop_ids = stops if params.ignore_eos else stops | frozenset(eos_ids)
        self.is_adjusted = self._is_adjusted()
        room = max_model_len - self.num_prompt
        bounds = [params.max_tokens]
        if think_tags is None:
            bounds.append(params.response_max_tokens)
        self.max_output = min([room, *(bound for bound in bounds if bound is not None)])

    def _is_adjusted(self) -> bool:
        """Whether logits are changed before a token is chosen: see `engine.adjustments`."""
        p = self.params
        repeats = p.repetition_penalty not in (None, 1)
        must_go_on = p.min_tokens > 1 and self.stop_ids
        banned = self.banned_ids or self.banned_runs
        penalised = p.presence_penalty or p.frequency_penalty or repeats
        return bool(penalised or p.logit_bias or banned or must_go_on)

    @property
    def num_known(self) -> int:
        return len(self.token_ids)

    @property
    def key_ids(self) -> list[int]:
        """What blocks are found by: `token_ids`, with the names of pictures for their tokens."""
        self._key_ids += self.token_ids[len(self._key_ids) :]
        return self._key_ids

    @property
    def num_output(self) -> int:
        return len(self.token_ids) - self.num_prompt

    @property
    def num_to_score(self) -> int:
        """Prompt tokens whose log-probability is still wanted. The first one has none."""
        if self.params.prompt_logprobs is None:
            return 0
        return self.num_prompt - max(1, len(self.prompt_logprobs))

    @property
    def max_len(self) -> int:
        """Tokens of the text at most, prompt and answer together."""
        return self.num_prompt + self.max_output

    def may_stop(self, num_drafts: int = 0) -> bool:
        """Whether the next token, or the one after so many drafts, may be one that ends the
        text.
        """
        return self.num_output + num_drafts + 1 >= self.params.min_tokens

    @property
    def wants_logprob(self) -> bool:
        """Whether somebody wants to know how likely each chosen token was."""
        params = self.params
        is_ranked = params.num_samples > params.n
        return params.logprobs is not None or is_ranked or self.early_stop is not None

    def forced_ids(self, draft_ids: Sequence[int]) -> list[int | None]:
        """The tokens that have to follow the known ones and each of the drafts, None where any may:
        see `Thinking.forced`.
        """
        if self.thinking is None:
            return [None] * (len(draft_ids) + 1)
        return self.thinking.forced(self.token_ids, draft_ids)

    def watch(self, logprobs: Sequence[float | None]) -> None:
        """Take note of how likely the tokens were that are going to be known, for early stops. They
        may be watched again, where the step that chose them has failed.
        """
        early_stop = self.early_stop
        assert early_stop is not None, "nobody wants to know"
        for num_output, logprob in enumerate(logprobs, self.num_output + 1):
            assert logprob is not None, "see `wants_logprob`"
            if logprob <= math.log(early_stop.threshold):
                self.last_unsure = num_output
            is_over = num_output - self.last_unsure >= early_stop.window_size
            if is_over and num_output >= self.params.min_tokens:
                self.repeats_at = num_output
                return

    def finish_reason(self) -> str | None:
        """Why the text ends after its newest token, None when it goes on."""
        end = self.end
        over = end.reason if end is not None and end.num_tokens == self.num_output else None
        if over == "error":
            return over
        if self.num_output >= self.params.min_tokens:
            if self.token_ids[-1] in self.stop_ids:
                return "stop"
            if self.num_output == self.repeats_at:
                return "repetition"
        too_long = self.num_output >= self.max_output or self._has_answered()
        return over or ("length" if too_long else None)

    def _has_answered(self) -> bool:
        """Whether what follows the thoughts is as long as it may be."""
        most = self.params.response_max_tokens
        if most is None or self.thinking is None:
            return False
        self.thinking.follow(self.token_ids)
        return self.thinking.num_answered >= most


@dataclass(slots=True)
class TokenOutput:
    """News of one request: the token that became known in a step, or (`token` None) its vector or
    its abort.
    """

    request_id: str
    token: int | None
    logprob: float | None  # of the token in the raw logits, where somebody wanted to know
    logprobs: TokenLogprobs | None  # as the user asked for them
    finish_reason: str | None  # stop, repetition, complete, length, error or abort
    metrics: RequestMetrics
    num_cached: int
    prompt_logprobs: list[TokenLogprobs | None] | None = None  # with the first token, if wanted
    vector: list[float] | None = None  # the whole answer to a request for pooling
    error: str | None = None  # what went wrong, when it ended by an error; the token is void


def check_prompt(
    prompt_ids: Sequence[int], vocab_size: int, max_model_len: int, min_tokens: int
) -> None:
    """Refuse a prompt that is empty, has ids outside the vocabulary or leaves no room for an
    answer.
    """
    if not prompt_ids:
        raise RequestError("the prompt is empty; it takes at least one token", param="prompt")
    for token in prompt_ids:
        if isinstance(token, bool) or not isinstance(token, int) or not 0 <= token < vocab_size:
            raise RequestError(
                f"the prompt has {token!r}, which is not a token id below {vocab_size}",
                param="prompt",
            )
    longest = max_model_len - max(1, min_tokens)
    if len(prompt_ids) > longest:
        raise RequestError(
            f"the prompt has {len(prompt_ids)} tokens; max_model_len={max_model_len} leaves room "
            f"for {max(longest, 0)} and an answer of {max(1, min_tokens)}; shorten it or raise "
            "max_model_len",
            param="prompt",
        )


def check_params(
    params: SamplingParams, vocab_size: int, config: EngineConfig, *, thinks: bool
) -> None:
    """Refuse settings that are out of range, or that this engine cannot honour."""
    params.validate()
    for name in ("stop_token_ids", "bad_words_token_ids", "logit_bias"):
        for token in getattr(params, name) or ():
            if token >= vocab_size:
                raise RequestError(
                    f"{name} has token {token}; the vocabulary ends at {vocab_size - 1}",
                    param=name,
                )
    if params.reasoning_max_tokens is not None and not thinks:
        raise RequestError(
            "reasoning_max_tokens is given, but this model has no tags around its thoughts; "
            "use max_tokens, which bounds the whole answer",
            param="reasoning_max_tokens",
        )
    most = params.response_max_tokens
    if most is not None and params.min_tokens > most and not thinks:
        raise RequestError(
            f"min_tokens={params.min_tokens} is more than response_max_tokens={most}, and this "
            "model has no thoughts that would count too",
            param="min_tokens",
        )
    for name in ("logprobs", "prompt_logprobs"):
        wanted = getattr(params, name)
        if wanted is None:
            continue
        if not config.enable_logprob:
            raise RequestError(
                f"{name} is not enabled; start with enable_logprob (--enable-logprob)", param=name
            )
        most = config.max_logprobs
        if most >= 0 and (wanted > most or wanted < 0):
            raise RequestError(f"{name}={wanted} is more than max_logprobs={most}", param=name)
