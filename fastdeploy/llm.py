"""`LLM`: a model in this process, for programs that generate many texts or try one out.

    llm = LLM("path/of/a/model", max_model_len=2048)
    for out in llm.generate(["Once upon a time"], SamplingParams(max_tokens=32)):
        print(out.outputs.text)

All prompts of a call are worked on together. The engine runs in the calling thread; child processes
exist only with tensor_parallel_size above 1. An `LLM` is not to be used from two threads at once.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from ernie.model import ErnieModel
from fastdeploy.config import EngineConfig, read_config
from fastdeploy.engine.loading import load, template_of
from fastdeploy.engine.prompt import banned_ids, chat_prompt
from fastdeploy.engine.request import RequestMetrics, TokenOutput
from fastdeploy.engine.text import Sample
from fastdeploy.errors import RequestError
from fastdeploy.outputs import Completions, RequestOutput
from fastdeploy.sampling import SamplingParams, filled

Prompt = str | Sequence[int] | Mapping[str, Any]


class LLM:
    """`model` is a folder, a name on the hub, or an `ErnieModel` in memory.

    Every field of `EngineConfig` is an argument. Raises ConfigError for wrong ones.
    """

    def __init__(self, model: str | ErnieModel, **options: Any) -> None:
        in_memory = model if isinstance(model, ErnieModel) else None
        name = "in memory" if in_memory is not None else str(model)
        (config,) = read_config([EngineConfig], {"model": name, **options}, "LLM(...)")
        loaded = load(config, in_memory)
        self.engine, self.config = loaded.engine, loaded.config
        self.tokenizer, self.template = loaded.tokenizer, loaded.template
        self.defaults = loaded.defaults
        self.ids = itertools.count()

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool = True,
        stream: bool = False,
    ) -> list[RequestOutput] | Iterator[list[RequestOutput | None]]:
        """Continue each prompt: a text, a list of token ids, `{"prompt": either}`, or a list of
        these.

        Returns one output for each prompt, in order. With `stream` an iterator: each item is a list
        as long as the prompts, None where nothing is new, else an output that holds what is new.
        Raises RequestError (a ValueError) before anything is computed.
        """
        listed = [self._prompt(prompt) for prompt in _as_list(prompts)]
        return self._run(listed, sampling_params, use_tqdm, stream)

    def chat(
        self,
        messages: Sequence[Any],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool = True,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        chat_template: str | None = None,
        tools: Any = None,
        stream: bool = False,
    ) -> list[RequestOutput] | Iterator[list[RequestOutput | None]]:
        """Answer one conversation (a list of messages) or several (a list of those); see
        `generate`.
        """
        template = self.template
        if chat_template is not None and self.tokenizer is not None:
            template = template_of(chat_template, self.tokenizer)
        conversations = [messages] if messages and isinstance(messages[0], Mapping) else messages
        tools = [tools] if isinstance(tools, Mapping) else tools
        options = chat_template_kwargs or {}
        listed: list[tuple[str | None, list[int]]] = [
            (None, chat_prompt(template, self.tokenizer, turns, tools, options))
            for turns in conversations
        ]
        return self._run(listed, sampling_params, use_tqdm, stream)

    def _prompt(self, prompt: Prompt) -> tuple[str | None, list[int]]:
        if isinstance(prompt, Mapping):
            if prompt.get("multimodal_data"):
                raise RequestError("multimodal_data is given, but this model reads text only")
            if "prompt" not in prompt and "prompt_token_ids" not in prompt:
                raise RequestError(f"a prompt has {sorted(prompt)}; it needs the key 'prompt'")
            prompt = prompt.get("prompt", prompt.get("prompt_token_ids"))
        if isinstance(prompt, str):
            if self.tokenizer is None:
                raise RequestError("the model has no tokenizer; give the prompt as token ids")
            return prompt, self.tokenizer.encode(prompt)
        if not isinstance(prompt, list | tuple):
            raise TypeError(f"a prompt is a text, token ids or a dict, not {type(prompt).__name__}")
        return None, list(prompt)

    def _run(
        self,
        prompts: list[tuple[str | None, list[int]]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None,
        use_tqdm: bool,
        stream: bool,
    ) -> list[RequestOutput] | Iterator[list[RequestOutput | None]]:
        given = _params_of(sampling_params, len(prompts), stream)
        params = [filled(one, self.defaults) for one in given]
        for (_, ids), one in zip(prompts, params):
            self.engine.check(ids, one)
            if one.stop and self.tokenizer is None:
                raise RequestError("stop needs a tokenizer, and the model has none", param="stop")
        call = _Call(self, prompts, params)
        if stream:
            return call.pieces()
        pieces_by_prompt: list[list[RequestOutput]] = [[] for _ in prompts]
        for pieces in call.pieces(show_progress=use_tqdm and sys.stderr.isatty()):
            for collected, piece in zip(pieces_by_prompt, pieces):
                if piece is not None:
                    collected.append(piece)
        return [RequestOutput.joined(collected) for collected in pieces_by_prompt]


class _Call:
    """One call of `generate`: its samples in the engine, and the pieces that come out."""

    def __init__(
        self, llm: LLM, prompts: list[tuple[str | None, list[int]]], params: list[SamplingParams]
    ) -> None:
        self.llm, self.prompts, self.params = llm, prompts, params
        self.samples: dict[str, tuple[int, Sample]] = {}
        self.num_open = [one.n for one in params]

    def pieces(self, show_progress: bool = False) -> Iterator[list[RequestOutput | None]]:
        engine = self.llm.engine
        number = next(self.llm.ids)
        try:
            for position in range(len(self.prompts)):
                self._add(f"{number}-{position}", position)
            while self.samples:
                pieces: list[RequestOutput | None] = [None] * len(self.prompts)
                for output in engine.step():
                    self._take(output, pieces)
                if show_progress:
                    self._show_progress()
                if any(piece is not None for piece in pieces):
                    yield pieces
        finally:  # also when the caller stops listening, or an error comes out of the engine
            for request_id in self.samples:
                engine.abort(request_id)
            if show_progress:
                sys.stderr.write("\r\033[K")

    def _add(self, request_id: str, position: int) -> None:
        engine, tokenizer = self.llm.engine, self.llm.tokenizer
        params, prompt_ids = self.params[position], self.prompts[position][1]
        seed = engine.new_seed()
        for index in range(params.n):
            name = f"{request_id}-{index}"
            engine.add(
                name,
                prompt_ids,
                params,
                seed=seed,
                sample_index=index,
                banned_ids=banned_ids(tokenizer, params),
            )
            self.samples[name] = (position, Sample(index, params, tokenizer))

    def _take(self, output: TokenOutput, pieces: list[RequestOutput | None]) -> None:
        position, sample = self.samples[output.request_id]
        completion = sample.push(output)
        if sample.finished:
            del self.samples[output.request_id]
            self.num_open[position] -= 1
            if sample.stopped_by_text:
                self.llm.engine.abort(output.request_id)
        piece = pieces[position]
        if piece is None:
            piece = pieces[position] = self._piece(position, output.metrics, output.num_cached)
        piece.outputs.append(completion)
        piece.finished = self.num_open[position] == 0
        if output.prompt_logprobs is not None:
            piece.prompt_logprobs = sample.readable_prompt(output.prompt_logprobs)

    def _piece(self, position: int, metrics: RequestMetrics, num_cached: int) -> RequestOutput:
        text, ids = self.prompts[position]
        request_id = str(position)
        return RequestOutput(
            request_id, text, ids, Completions(), metrics=metrics, num_cached_tokens=num_cached
        )

    def _show_progress(self) -> None:
        stats = self.llm.engine.stats()
        done = sum(count == 0 for count in self.num_open)
        sys.stderr.write(
            f"\r{done}/{len(self.prompts)} prompts | {stats.num_running} running | "
            f"{stats.num_generated_tokens} tokens\033[K"
        )


def _as_list(prompts: Any) -> Iterable[Prompt]:
    """Several prompts; one is recognised by its type, a list of integers being one."""
    if isinstance(prompts, (str, Mapping)):
        return [prompts]
    if not isinstance(prompts, Sequence):
        raise TypeError(f"prompts is a {type(prompts).__name__}; give a text, token ids, or a list")
    if prompts and all(isinstance(token, int) for token in prompts):
        return [prompts]
    return prompts


def _params_of(given: Any, num_prompts: int, stream: bool) -> list[SamplingParams]:
    if given is None or isinstance(given, SamplingParams):
        given = [given or SamplingParams()] * num_prompts
    if len(given) != num_prompts:
        raise RequestError(
            f"{len(given)} sampling_params for {num_prompts} prompts; give one, or one for each"
        )
    for params in given:
        if stream and params.prompt_logprobs is not None:
            raise RequestError("prompt_logprobs cannot be streamed; leave out one of the two")
    return list(given)
