"""`/v1/completions`: text or token ids continued, OpenAI's older form."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ernie.tokenizer import Detokenizer, Tokenizer
from fastdeploy.errors import RequestError
from fastdeploy.outputs import CompletionOutput, TokenLogprobs
from fastdeploy.server.engine import Piece
from fastdeploy.server.protocol import CompletionRequest
from fastdeploy.server.reply import Reply, likeliest


def completion_prompts(body: CompletionRequest, tokenizer: Tokenizer) -> list[list[int]]:
    """The prompts of a completion request: a text, token ids, or a list of either."""
    prompt = body.prompt if body.prompt_token_ids is None else body.prompt_token_ids
    if prompt is None or prompt == []:
        raise RequestError("prompt is missing; send a text or token ids", param="prompt")
    if isinstance(prompt, str):
        return [tokenizer.encode(prompt)]
    if isinstance(prompt[0], int):
        return [list(prompt)]
    return [tokenizer.encode(one) if isinstance(one, str) else list(one) for one in prompt]


class CompletionReply(Reply):
    id_prefix = "cmpl"
    object = "text_completion"
    chunk_object = "text_completion"

    body: CompletionRequest

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.begun: set[int] = set()  # choices of a stream that have an event
        self.lengths = [Length(self.context.tokenizer) for _ in self.num_generated]

    def delta(self, piece: Piece) -> dict[str, Any] | None:
        begins = piece.choice not in self.begun
        if not (begins and self.body.echo) and not self.has_news(piece.completion):
            return None
        self.begun.add(piece.choice)
        return self._choice(piece.choice, piece.completion, begins=begins)

    def choice(self, index: int, completion: CompletionOutput) -> dict[str, Any]:
        return self._choice(index, completion, begins=True)

    def _choice(self, index: int, completion: CompletionOutput, *, begins: bool) -> dict[str, Any]:
        """`begins`: it is the whole choice, or the first event of it."""
        number, echo = index // self.context.n, begins and bool(self.body.echo)
        prompt = self.answer.prompts[number] if echo else []
        logprobs = None
        if completion.logprobs is not None:
            logprobs = Described(self.lengths[index], self.name_of)
            for token, entry in zip(prompt, self.prompt_logprobs[number] if echo else ()):
                text = self.context.tokenizer.decode([token])
                logprobs.add(token, text, entry, self.context.num_top)
            if echo:
                self.lengths[index].end()
            for entry in completion.logprobs:
                token, own = next(iter(entry.items()))
                logprobs.add(token, own.decoded_token or "", entry, self.context.num_top)
        return {
            "index": index,
            "text": (self.context.tokenizer.decode(prompt) if echo else "") + completion.text,
            "logprobs": logprobs and logprobs.columns,
            "finish_reason": completion.finish_reason,
            "stop_reason": completion.stop_reason,
            **(self.prompt_tokens(index) if begins else {}),
            **self.answer_tokens(completion),
            **self.scores(index),
        }


class Length:
    """Characters of a text so far; one that several tokens spell counts when the last has come."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.detokenizer = Detokenizer(tokenizer, skip_special=False)
        self.num = 0

    def add(self, token: int) -> None:
        self.num += len(self.detokenizer.push([token]))

    def end(self) -> None:
        """What follows spells no more of what has not been completed."""
        self.num += len(self.detokenizer.flush())


class Described:
    """Log-probabilities in OpenAI's older form: four columns with an entry for each token."""

    def __init__(self, length: Length, name_of: Callable[[int, str | None], str]) -> None:
        """`length` is that of the text before, and grows."""
        self.length = length
        self.name_of = name_of
        self.columns: dict[str, list[Any]] = {
            "tokens": [],
            "token_logprobs": [],
            "top_logprobs": [],
            "text_offset": [],
        }

    def add(self, token: int, text: str, entry: TokenLogprobs | None, num_top: int) -> None:
        """One token; `entry` is None for the first one of an echoed prompt."""
        own = None if entry is None else next(iter(entry.values())).logprob
        top = None if entry is None else self._top(entry, num_top)
        name = self.name_of(token, text)
        for column, value in zip(self.columns.values(), (name, own, top, self.length.num)):
            column.append(value)
        self.length.add(token)

    def _top(self, entry: TokenLogprobs, num_top: int) -> dict[str, float]:
        """The likeliest tokens and the token itself by name; of equal ones the likeliest counts."""
        own = next(iter(entry.items()))
        top: dict[str, float] = {}
        for token, value in (*likeliest(entry, num_top), own):
            top.setdefault(self.name_of(token, value.decoded_token), value.logprob)
        return top
