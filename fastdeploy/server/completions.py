"""`/v1/completions`: text or token ids continued, OpenAI's older form."""

from __future__ import annotations

from typing import Any

from ernie.tokenizer import Tokenizer

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

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.begun: set[int] = set()  # choices of a stream whose echo has been sent
        self.offsets = [0] * len(self.completions)  # characters of each choice described so far

    def delta(self, piece: Piece) -> dict[str, Any] | None:
        completion, index = piece.completion, piece.choice
        text, entries = completion.text, completion.logprobs
        if self.body.echo and index not in self.begun:
            self.begun.add(index)
            text, entries = self._echoed(index, completion)
        elif not self.has_news(completion):
            return None
        return self._choice(index, text, entries, completion)

    def choice(self, completion: CompletionOutput) -> dict[str, Any]:
        text, entries = completion.text, completion.logprobs
        if self.body.echo:
            text, entries = self._echoed(completion.index, completion)
        return self._choice(completion.index, text, entries, completion)

    def _choice(
        self,
        index: int,
        text: str,
        entries: list[TokenLogprobs | None] | list[TokenLogprobs] | None,
        completion: CompletionOutput,
    ) -> dict[str, Any]:
        return {
            "index": index,
            "text": text,
            "logprobs": None if entries is None else self._logprobs(index, list(entries)),
            "finish_reason": completion.finish_reason,
            **self.extras(index, completion),
        }

    def _echoed(
        self, index: int, completion: CompletionOutput
    ) -> tuple[str, list[TokenLogprobs | None] | None]:
        """Text and log-probabilities with those of the prompt in front."""
        prompt = self.context.tokenizer.decode(self.answer.prompts[index // self.context.n])
        if completion.logprobs is None:
            return prompt + completion.text, None
        return prompt + completion.text, [*self.prompt_logprobs[index], *completion.logprobs]

    def _logprobs(self, index: int, entries: list[TokenLogprobs | None]) -> dict[str, Any]:
        prompt = self.answer.prompts[index // self.context.n]
        texts, values, tops, offsets = [], [], [], []
        for entry in entries:
            if entry is None:  # only the first token of an echoed prompt has none
                texts.append(self.context.tokenizer.decode(prompt[:1]))
                values.append(None)
                tops.append(None)
            else:
                own = next(iter(entry.values()))
                texts.append(own.decoded_token)
                values.append(own.logprob)
                best = likeliest(entry, self.context.num_top)
                tops.append({value.decoded_token: value.logprob for _, value in best})
            offsets.append(self.offsets[index])
            self.offsets[index] += len(texts[-1] or "")
        return {
            "tokens": texts,
            "token_logprobs": values,
            "top_logprobs": tops,
            "text_offset": offsets,
        }
