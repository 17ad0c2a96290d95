"""What the answers of both endpoints share: collecting pieces, usage, OpenAI's form of errors."""

from __future__ import annotations

import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from ernie.tokenizer import Tokenizer
from fastdeploy.errors import RequestError
from fastdeploy.outputs import CompletionOutput, Logprob, TokenLogprobs, best
from fastdeploy.server.engine import Answer, Piece
from fastdeploy.server.message import Reading
from fastdeploy.server.protocol import Common

_KIND_BY_STATUS = {
    401: ("authentication_error", "invalid_api_key"),
    403: ("permission_error", "forbidden"),
    404: ("invalid_request_error", "not_found"),
    413: ("invalid_request_error", "request_too_large"),
    429: ("rate_limit_error", "rate_limit_exceeded"),
    500: ("server_error", "internal_error"),
    503: ("server_error", "unavailable"),
    504: ("server_error", "timeout"),
}


MAX_MESSAGE = 400


def error_body(message: str, status: int, param: str | None = None) -> dict[str, Any]:
    """`{"error": {message, type, param, code}}`; a message that quotes a long value is cut."""
    if len(message) > MAX_MESSAGE:
        message = message[:MAX_MESSAGE] + " ..."
    kind, code = _KIND_BY_STATUS.get(status, ("invalid_request_error", "invalid_value"))
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


@dataclass(frozen=True, slots=True)
class Context:
    """What an answer needs besides the pieces."""

    model: str  # as it is called in answers
    tokenizer: Tokenizer
    num_top: int  # likeliest tokens to list with each token
    n: int  # choices for each prompt
    on_divergence: Callable[[], None]  # a stream was not what its whole answer is
    reading: Reading = field(default_factory=Reading)


class Reply(ABC):
    """One answer, sent whole or as a stream of events."""

    id_prefix: str
    object: str
    chunk_object: str

    def __init__(self, body: Common, answer: Answer, context: Context) -> None:
        self.body, self.answer, self.context = body, answer, context
        self.head = {
            "id": answer.id,
            "object": self.chunk_object if body.stream else self.object,
            "created": int(time.time()),
            "model": context.model,
        }
        self.began = time.monotonic()
        self.error: RequestError | None = None  # that has ended the events
        self.num_generated = [0] * answer.num_choices  # tokens of each sample
        self.num_cached = [0] * len(answer.prompts)
        self.prompt_logprobs: dict[int, list[TokenLogprobs | None]] = {}  # by prompt
        self.described: dict[int, list[Any]] = {}  # the same as its choices have it

    async def whole(self) -> dict[str, Any]:
        pieces: list[list[CompletionOutput]] = [[] for _ in self.num_generated]
        async for piece in self.answer.pieces():
            self._take(piece)
            pieces[piece.choice].append(piece.completion)
        completions = self._best([CompletionOutput.joined(collected) for collected in pieces])
        choices = [self.choice(i, completion) for i, completion in enumerate(completions)]
        return {**self.head, "choices": choices, "usage": self.usage()}

    def _best(self, samples: list[CompletionOutput]) -> list[CompletionOutput]:
        """The `n` best of the samples of each prompt; each keeps its own index."""
        num_samples, n = self.answer.num_samples, self.context.n
        if num_samples == n:
            return samples
        firsts = range(0, len(samples), num_samples)
        return [one for first in firsts for one in best(samples[first : first + num_samples], n)]

    async def events(self) -> AsyncIterator[dict[str, Any]]:
        options = self.body.stream_options
        with_usage = options is not None and options.include_usage
        running_usage = with_usage and options is not None and options.continuous_usage_stats
        empty_usage = {"usage": None} if with_usage else {}
        try:
            for choice in self.first_choices():
                yield {**self.head, "choices": [choice], **empty_usage}
            size = self.body.max_streaming_response_tokens or 1
            pieces = self.answer.pieces()
            async for piece in pieces if size == 1 else _grouped(pieces, size):
                self._take(piece)
                delta = self.delta(piece)
                if delta is not None:
                    delta["arrival_time"] = round(time.monotonic() - self.began, 6)
                    usage = {"usage": self.usage()} if running_usage else empty_usage
                    yield {**self.head, "choices": [delta], **usage}
        except RequestError as error:  # headers may be sent already
            self.error = error
            yield error_body(str(error), error.status, error.param)
            return
        if with_usage:
            yield {**self.head, "choices": [], "usage": self.usage()}

    @abstractmethod
    def choice(self, index: int, completion: CompletionOutput) -> dict[str, Any]:
        """A finished choice of a whole answer; `completion.index` is the number of the sample."""

    @abstractmethod
    def delta(self, piece: Piece) -> dict[str, Any] | None:
        """The choice of an event; None where there is nothing to show yet."""

    def first_choices(self) -> list[dict[str, Any]]:
        """Choices of events that precede everything."""
        return []

    def usage(self) -> dict[str, Any]:
        prompt = sum(len(ids) for ids in self.answer.prompts)
        generated = sum(self.num_generated)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": generated,
            "total_tokens": prompt + generated,
            "prompt_tokens_details": {
                "cached_tokens": sum(self.num_cached),
                **self.answer.num_picture_tokens,
            },
        }

    def prompt_tokens(self, choice: int) -> dict[str, Any]:
        """Where `return_token_ids` asks for them: the ids of a choice's prompt, and what they
        spell, control tokens included. A stream has them in the first event of the choice.
        """
        prompt = self.answer.prompts[choice // self.context.n]
        return self._tokens("prompt", prompt)

    def answer_tokens(self, completion: CompletionOutput) -> dict[str, Any]:
        """The same of an answer, or of what is new in it."""
        return self._tokens("completion", completion.token_ids)

    def _tokens(self, of: str, ids: Sequence[int]) -> dict[str, Any]:
        if not self.body.return_token_ids:
            return {}
        spelled = self.context.tokenizer.decode(ids)
        return {f"{of}_token_ids": list(ids), f"{of}_tokens": spelled}

    def scores(self, choice: int) -> dict[str, Any]:
        count, prompt = self.body.prompt_logprobs, choice // self.context.n
        if count is None:
            return {}
        if prompt not in self.prompt_logprobs:  # aborted before its first token
            return {"prompt_logprobs": None}
        if prompt not in self.described:
            self.described[prompt] = [
                entry and {token: asdict(value) for token, value in narrowed(entry, count).items()}
                for entry in self.prompt_logprobs[prompt]
            ]
        return {"prompt_logprobs": self.described[prompt]}

    def name_of(self, token: int, text: str | None) -> str:
        """How log-probabilities call a token."""
        if self.body.include_logprobs_decode_token is False:
            return f"token_id:{token}"
        return text or ""

    def has_news(self, completion: CompletionOutput) -> bool:
        return bool(
            completion.text
            or completion.logprobs
            or completion.finish_reason
            or self.body.return_token_ids
        )

    def _take(self, piece: Piece) -> None:
        self.num_generated[piece.choice] += len(piece.completion.token_ids)
        prompt, sample = divmod(piece.choice, self.answer.num_samples)
        if sample == 0:  # later samples hit the blocks of the first
            self.num_cached[prompt] = piece.num_cached
        if piece.prompt_logprobs is not None:
            self.prompt_logprobs[prompt] = piece.prompt_logprobs


async def _grouped(pieces: AsyncIterator[Piece], size: int) -> AsyncIterator[Piece]:
    """The pieces, those of a choice joined until they have `size` tokens."""
    held: dict[int, list[Piece]] = {}
    async for piece in pieces:
        group = held.setdefault(piece.choice, [])
        group.append(piece)
        num_tokens = sum(len(one.completion.token_ids) for one in group)
        if num_tokens >= size or piece.completion.finish_reason is not None:
            yield _joined(held.pop(piece.choice))


def _joined(pieces: list[Piece]) -> Piece:
    """The consecutive pieces of one choice as one; the first has what is said of the prompt."""
    completion = CompletionOutput.joined([piece.completion for piece in pieces])
    return replace(pieces[-1], completion=completion, prompt_logprobs=pieces[0].prompt_logprobs)


def given_id(prefix: str, request_id: str | None) -> str:
    """The id of an answer: the one its request has chosen, or a new one; `prefix-` stands once."""
    name = uuid.uuid4().hex if request_id is None else request_id.removeprefix(f"{prefix}-")
    return f"{prefix}-{name}"


def likeliest(entry: TokenLogprobs, count: int) -> list[tuple[int, Logprob]]:
    """The `count` likeliest tokens of an entry (-1: all), likeliest first."""
    ranked = sorted(entry.items(), key=lambda item: -item[1].logprob)
    return ranked if count == -1 else ranked[:count]


def larger(count: int | None, other: int | None) -> int | None:
    """The larger number of likeliest tokens: -1 is all, None is no log-probabilities at all."""
    given = [one for one in (count, other) if one is not None]
    return -1 if -1 in given else max(given, default=None)


def narrowed(entry: TokenLogprobs, count: int) -> TokenLogprobs:
    """An entry of more as one that was asked for with `count`: the token itself, and so many of the
    likeliest.
    """
    own = next(iter(entry))
    kept = (item for item in entry.items() if item[0] == own or item[1].rank <= count)
    return entry if count == -1 else dict(kept)
