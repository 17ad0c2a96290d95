"""From the engine's tokens to the user's text: streaming decode, stop strings, pieces of output.

Whoever waits for a request holds a `Sample` for each of its samples and feeds it what the engine
reports. The engine itself never sees text. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from ernie.tokenizer import Detokenizer, Tokenizer
from fastdeploy.engine.request import TokenOutput
from fastdeploy.outputs import CompletionOutput, TokenLogprobs
from fastdeploy.sampling import SamplingParams


class StopStrings:
    """Cuts a growing text at the first place where one of some strings is complete.

    Text that could be the beginning of one is held back until it is clear that it is not. What
    comes out does not depend on how the text was cut into pieces: the string that is *complete*
    first wins, and of several that end at the same character the longest.
    """

    def __init__(self, strings: Sequence[str], *, include: bool = False) -> None:
        self.strings = strings
        self.include = include
        self.held = ""
        self.matched: str | None = None

    def push(self, text: str) -> str:
        """The text that is safe to show now that `text` has arrived; sets `matched` on a stop."""
        assert self.matched is None, "text after a stop string"
        if not self.strings:
            return text
        text = self.held + text
        ends = [(at + len(s), at, s) for s in self.strings if (at := text.find(s)) >= 0]
        if ends:
            end, start, self.matched = min(ends)
            self.held = ""
            return text[: end if self.include else start]
        num_held = max((_overlap(text, s) for s in self.strings), default=0)
        self.held = text[len(text) - num_held :]
        return text[: len(text) - num_held]

    def flush(self) -> str:
        """What was held back, once no more text comes."""
        text, self.held = self.held, ""
        return text


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` with which `stop` begins."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0


class Sample:
    """The user's view of one sample: `push` turns each report of the engine into a piece of output.

    Special tokens are not part of the text, but for those in `shown`; one that is a stop string as
    it stands is matched like text.
    When a piece ends with a stop string the engine does not know: `stopped_by_text` is set and the
    caller has to abort the engine's request.
    """

    def __init__(
        self,
        index: int,
        params: SamplingParams,
        tokenizer: Tokenizer | None,
        shown: Collection[int] = (),
    ) -> None:
        self.index = index
        self.params = params
        self.tokenizer = tokenizer
        self.stop_ids = _special_stops(params, tokenizer).difference(shown)
        self.detokenizer = (
            Detokenizer(tokenizer, shown=self.stop_ids.union(shown)) if tokenizer else None
        )
        self.stops = StopStrings(params.stop or (), include=params.include_stop_str_in_output)
        self.num_tokens = 0
        self.finished = False
        self.stopped_by_text = False

    def push(self, output: TokenOutput) -> CompletionOutput:
        """What is new. After the last piece `finished` is set and nothing more may be pushed."""
        assert not self.finished, "a report after the end"
        piece = CompletionOutput(self.index, finish_reason=output.finish_reason)
        self.finished = output.finish_reason is not None
        if output.token is None:
            piece.text = self._rest()
            return piece
        self.num_tokens += 1
        piece.token_ids.append(output.token)
        piece.cumulative_logprob = output.logprob
        if output.logprobs is not None:
            piece.logprobs = [self._readable(output.logprobs)]
        ended_by_token = output.finish_reason == "stop"
        if ended_by_token and output.token in (self.params.stop_token_ids or ()):
            piece.stop_reason = output.token
        if output.finish_reason == "repetition":
            piece.finish_reason, piece.stop_reason = "stop", "repetition"
        if output.finish_reason == "complete":  # its form left nothing but the end
            piece.finish_reason = "stop"
        if output.token in self.stop_ids:
            hidden = self.num_tokens < self.params.min_tokens
        else:
            hidden = ended_by_token and not self.params.include_stop_str_in_output
        hidden |= output.error is not None
        piece.text = self._text([] if hidden else [output.token])
        if self.stops.matched is not None:
            self.finished = True
            self.stopped_by_text = output.finish_reason is None
            piece.finish_reason, piece.stop_reason = "stop", self.stops.matched
        elif self.finished:
            piece.text += self._rest()
            if self.stops.matched is not None:
                piece.finish_reason, piece.stop_reason = "stop", self.stops.matched
        return piece

    def _text(self, token_ids: list[int]) -> str:
        if self.detokenizer is None or not token_ids:
            return ""
        text = self.detokenizer.push(token_ids)
        # Before min_tokens a stop string does not count, not even as the beginning of a later one.
        return text if self.num_tokens < self.params.min_tokens else self.stops.push(text)

    def _rest(self) -> str:
        """What detokenizer and stop strings still hold back at the end."""
        if self.detokenizer is None:
            return ""
        text = self.stops.push(self.detokenizer.flush())
        return text if self.stops.matched else text + self.stops.flush()

    def readable_prompt(self, entries: list[TokenLogprobs | None]) -> list[TokenLogprobs | None]:
        """Log-probabilities of the prompt, with the text of each token."""
        return [None if entry is None else self._readable(entry) for entry in entries]

    def _readable(self, logprobs: TokenLogprobs) -> TokenLogprobs:
        if self.tokenizer is not None:
            for token, entry in logprobs.items():
                entry.decoded_token = self.tokenizer.decode([token])
        return logprobs


def _special_stops(params: SamplingParams, tokenizer: Tokenizer | None) -> frozenset[int]:
    """The special tokens that are stop strings as they stand."""
    if tokenizer is None:
        return frozenset()
    return tokenizer.special_ids.intersection(map(tokenizer.id_of, params.stop or ()))
