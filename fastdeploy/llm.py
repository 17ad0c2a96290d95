"""`LLM`: a model in this process, for programs that generate many texts or try one out.

    llm = LLM("path/of/a/model", max_model_len=2048)
    for out in llm.generate(["Once upon a time"], SamplingParams(max_tokens=32)):
        print(out.outputs.text)

All prompts of a call are worked on together. The engine runs in the calling thread; child processes
exist only with tensor_parallel_size above 1. Other calls may be made while a stream is open, but an
`LLM` is not to be used from two threads at once.
"""

from __future__ import annotations

import contextlib
import itertools
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ernie.adapters import Adapter
from ernie.chat import ChatTemplate
from ernie.chat.messages import pictures_of
from ernie.checkpoint.hub import resolve
from ernie.model import ErnieModel
from ernie.vision.prompt import Processor
from fastdeploy.config import EngineConfig
from fastdeploy.engine.core import Engine
from fastdeploy.engine.language import Language, template_of
from fastdeploy.engine.loading import load
from fastdeploy.engine.prompt import banned_sequences, chat_inputs, chat_prompt, picture_prompt
from fastdeploy.engine.request import PLAIN, Order, RequestMetrics, TokenOutput
from fastdeploy.engine.text import Sample
from fastdeploy.engine.vision import Prompt as EnginePrompt
from fastdeploy.engine.vision import token_ids_of
from fastdeploy.engine.weights import Source
from fastdeploy.errors import RequestError
from fastdeploy.flags import read_config
from fastdeploy.outputs import CompletionOutput, Completions, RequestOutput, best, numbered
from fastdeploy.sampling import SamplingParams, filled, plain_id
from fastdeploy.vectors import shaped

Prompt = str | Sequence[int] | Mapping[str, Any]
# Two names for pictures, of two servers that people come from.
PICTURE_KEYS = ("multimodal_data", "multi_modal_data")
TEXT_KEYS = ("prompt", "prompt_token_ids")
PROMPT_KEYS = frozenset({"cache_salt", *TEXT_KEYS, *PICTURE_KEYS})


@dataclass(slots=True)
class _Item:
    """One prompt of a call, and how it is to be served."""

    text: str | None
    prompt: EnginePrompt
    order: Order = PLAIN
    adapter: Adapter | None = None

    @property
    def token_ids(self) -> list[int]:
        return list(token_ids_of(self.prompt))


class LLM:
    """`model` is a folder, a name on the hub, or an `ErnieModel` in memory.

    Every field of `EngineConfig` is an argument. Raises ConfigError for wrong ones.
    """

    def __init__(self, model: str | ErnieModel, **options: Any) -> None:
        in_memory = model if isinstance(model, ErnieModel) else None
        self.folder = None if in_memory is not None else str(model)
        name = self.folder or "in memory"
        (config,) = read_config([EngineConfig], {"model": name, **options}, "LLM(...)")
        loaded = load(config, in_memory)
        self.engine, self.config = loaded.engine, loaded.config
        self.tokenizer, self.template = loaded.tokenizer, loaded.template
        self.defaults = loaded.defaults
        self.processor = self._processor()
        self.mail = _Mail(self.engine)

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool = True,
        stream: bool = False,
        *,
        priority: int | Sequence[int] = 0,
        lora: str | Sequence[str | None] | None = None,
    ) -> list[RequestOutput] | Iterator[list[RequestOutput | None]]:
        """Continue each prompt: a text, a list of token ids, `{"prompt": either}`, or a list of
        these. A dict may have a `cache_salt`, a text: cached blocks are shared only among prompts
        of the same salt. It may have pictures, as `multimodal_data` (or `multi_modal_data`):
        `{"image": [...], "video": [...]}`, each a path, bytes or an opened picture; the prompt is
        then written as a chat template writes it (`Processor.prompt_inputs`). Prompts of a lower
        `priority` (one number, or one for each) run first.
        `lora` is the name of a loaded adapter (or one for each), None the model as it is.

        Returns one output for each prompt, in order. With `stream` an iterator: each item is a list
        as long as the prompts, None where nothing is new, else an output that holds what is new.
        Raises RequestError (a ValueError) before anything is computed.
        """
        listed = [self._item(prompt) for prompt in _as_list(prompts)]
        return self._run(listed, sampling_params, priority, lora, use_tqdm, stream)

    def load_lora(self, name: str, folder: str) -> None:
        """Read the adapter in `folder` (PEFT's format); `lora=name` then asks for it.

        May be called between two items of a stream. Needs `enable_lora`. Raises ConfigError,
        CheckpointError or RequestError, and then nothing has changed.
        """
        self.engine.adapters.check_name(name)
        if self.tokenizer is not None:
            language = Language(self.config, self.tokenizer, self.template)
            language.check_training(folder, f"the adapter {name!r}")
        self.engine.load_adapter(name, self.engine.adapters.read(folder))

    def unload_lora(self, name: str) -> None:
        """Take an adapter away from new prompts; texts that are being written finish with it."""
        self.engine.unload_adapter(name)

    def chat(
        self,
        messages: Sequence[Any],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool = True,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        chat_template: str | None = None,
        tools: Any = None,
        stream: bool = False,
        *,
        priority: int | Sequence[int] = 0,
        lora: str | Sequence[str | None] | None = None,
    ) -> list[RequestOutput] | Iterator[list[RequestOutput | None]]:
        """Answer one conversation (a list of messages) or several (a list of those); see
        `generate`. Parts of messages may be pictures: `docs/vision.md`.
        """
        template = self.template
        if chat_template is not None and self.tokenizer is not None:
            template = template_of(chat_template, self.tokenizer)
        conversations = [messages] if messages and isinstance(messages[0], Mapping) else messages
        tools = [tools] if isinstance(tools, Mapping) else tools
        options = chat_template_kwargs or {}
        listed = [
            _Item(None, self._chat_prompt(template, turns, tools, options))
            for turns in conversations
        ]
        return self._run(listed, sampling_params, priority, lora, use_tqdm, stream)

    def embed(
        self,
        prompts: Prompt | Sequence[Prompt],
        *,
        pooling: str = "mean",
        normalize: bool = True,
        dimensions: int | None = None,
        lora: str | Sequence[str | None] | None = None,
    ) -> list[list[float]]:
        """A vector for each prompt: its hidden states after the final norm, averaged ("mean") or
        the "last" one, cut to its first `dimensions` numbers and then scaled to length 1. See
        `fastdeploy.vectors` for what these are worth.
        """
        if pooling is None:
            raise RequestError("pooling=None; use mean or last", param="pooling")
        params = SamplingParams(pooling=pooling)
        items = [self._item(prompt) for prompt in _as_list(prompts)]
        for item, name in zip(items, _loras_of(lora, len(items))):
            item.adapter = None if name is None else self.engine.adapters.get(name)
            self.engine.check(item.prompt, params)
        vectors = _Call(self, items, [params] * len(items)).vectors()
        return [shaped(vector, dimensions, normalize) for vector in vectors]

    def pause(self, mode: str = "abort") -> None:
        """See `Engine.pause`. Open streams end with the reason "abort"; those that are kept must
        not be read before `resume`.
        """
        self.engine.pause(mode)

    def resume(self) -> None:
        self.engine.resume()

    def sleep(self, level: int = 1) -> None:
        """See `Engine.sleep`."""
        self.engine.sleep(level)

    def wake_up(self) -> None:
        """See `Engine.wake_up`; freed weights are read again from the model's folder."""
        self.engine.wake_up(self.folder)

    def reset_prefix_cache(self) -> None:
        self.engine.reset_prefix_cache()

    def update_weights(self, source: Source) -> None:
        """See `Engine.update_weights`: a folder, or published names and tensors."""
        self.engine.update_weights(source)

    def _item(self, prompt: Prompt) -> _Item:
        salt = data = None
        if isinstance(prompt, Mapping):
            given = [prompt[key] for key in TEXT_KEYS if prompt.get(key) is not None]
            if not given:
                raise RequestError(
                    f"a prompt has {sorted(prompt)}; it needs the key 'prompt', a text or token ids"
                )
            if unknown := sorted(set(prompt) - PROMPT_KEYS):
                raise RequestError(f"a prompt has the key {unknown[0]!r}; leave it out")
            salt = prompt.get("cache_salt")
            if salt is not None and not (isinstance(salt, str) and salt):
                raise RequestError(f"cache_salt={salt!r}; it takes a text", param="cache_salt")
            if len(given) > 1:
                raise RequestError(f"a prompt has both {' and '.join(TEXT_KEYS)}; leave out one")
            if all(prompt.get(key) for key in PICTURE_KEYS):
                raise RequestError(f"a prompt has both {' and '.join(PICTURE_KEYS)}; leave out one")
            data = next((prompt[key] for key in PICTURE_KEYS if prompt.get(key)), None)
            prompt = given[0]
        if not isinstance(prompt, str | list | tuple):
            raise TypeError(f"a prompt is a text, token ids or a dict, not {type(prompt).__name__}")
        order = Order(cache_salt=salt)
        text = prompt if isinstance(prompt, str) else None
        prompt = prompt if isinstance(prompt, str) else [plain_id(token) for token in prompt]
        if data is not None:
            inputs = picture_prompt(self.processor, self.tokenizer, prompt, data)
            return _Item(text, inputs, order)
        if not isinstance(prompt, str):
            return _Item(None, prompt, order)
        if self.tokenizer is None:
            raise RequestError("the model has no tokenizer; give the prompt as token ids")
        return _Item(prompt, self.tokenizer.encode(prompt), order)

    def _chat_prompt(
        self, template: ChatTemplate | None, messages: Any, tools: Any, options: Mapping[str, Any]
    ) -> EnginePrompt:
        if self.processor is not None and pictures_of(messages):
            return chat_inputs(self.processor, template, self.tokenizer, messages, tools, options)
        return chat_prompt(template, self.tokenizer, messages, tools, options)

    def _processor(self) -> Processor | None:
        """What reads pictures, None for a model of text."""
        if self.engine.pictures is None:
            return None
        folder = resolve(self.folder) if self.folder else self.config.tokenizer
        return Processor.from_folder(folder) if folder else Processor()

    def _run(
        self,
        items: list[_Item],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None,
        priority: int | Sequence[int],
        lora: str | Sequence[str | None] | None,
        use_tqdm: bool,
        stream: bool,
    ) -> list[RequestOutput] | Iterator[list[RequestOutput | None]]:
        given = _params_of(sampling_params, len(items), stream)
        params = [filled(one, self.defaults) for one in given]
        names = _loras_of(lora, len(items))
        priorities = _priorities_of(priority, len(items))
        for item, one, number, name in zip(items, params, priorities, names):
            item.order = replace(item.order, priority=number)
            item.adapter = None if name is None else self.engine.adapters.get(name)
            self.engine.check(item.prompt, one)
            if one.pooling is not None:
                raise RequestError("pooling makes no text; use LLM.embed", param="pooling")
            if one.guided_decoding is not None and self.engine.grammars is not None:
                self.engine.grammars.begin(one.guided_decoding).result()  # refuses it if it has to
            if one.stop and self.tokenizer is None:
                raise RequestError("stop needs a tokenizer, and the model has none", param="stop")
        call = _Call(self, items, params)
        if stream:
            return call.pieces()
        pieces_by_prompt: list[list[RequestOutput]] = [[] for _ in items]
        for pieces in call.pieces(show_progress=use_tqdm and sys.stderr.isatty()):
            for collected, piece in zip(pieces_by_prompt, pieces):
                if piece is not None:
                    collected.append(piece)
        whole = [RequestOutput.joined(collected) for collected in pieces_by_prompt]
        for output, one in zip(whole, params):
            if one.num_samples > one.n:
                output.outputs = Completions(numbered(best(output.outputs, one.n)))
        return whole


class _Mail:
    """What comes out of the engine, by the call that it is for: other calls may be made while a
    stream is open. A request's id begins with its call's number.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.numbers = itertools.count()
        self.waiting: dict[str, list[TokenOutput]] = {}  # by call

    def open(self) -> str:
        """The number of a new call."""
        number = str(next(self.numbers))
        self.waiting[number] = []
        return number

    def of(self, number: str) -> list[TokenOutput]:
        """What has come for an open call while others were read, else what the next step gives."""
        if not self.waiting[number]:
            for output in self.engine.step():
                call = output.request_id.partition("-")[0]
                if call in self.waiting:
                    self.waiting[call].append(output)
        found, self.waiting[number] = self.waiting[number], []
        return found

    def close(self, number: str) -> None:
        del self.waiting[number]


class _Call:
    """One call of `generate` or `embed`: its samples in the engine, and what comes out."""

    def __init__(self, llm: LLM, items: list[_Item], params: list[SamplingParams]) -> None:
        self.llm, self.items, self.params = llm, items, params
        self.samples: dict[str, tuple[int, Sample]] = {}
        self.num_open = [one.num_samples for one in params]

    def pieces(self, show_progress: bool = False) -> Iterator[list[RequestOutput | None]]:
        try:
            with self._open() as number:
                while self.samples:
                    pieces: list[RequestOutput | None] = [None] * len(self.items)
                    for output in self.llm.mail.of(number):
                        self._take(output, pieces)
                    if show_progress:
                        self._show_progress()
                    if any(piece is not None for piece in pieces):
                        yield pieces
        finally:
            if show_progress:
                sys.stderr.write("\r\033[K")

    def vectors(self) -> list[list[float]]:
        """One for each prompt, in order."""
        found: dict[int, list[float]] = {}
        with self._open() as number:
            while self.samples:
                for output in self.llm.mail.of(number):
                    if output.vector is not None:
                        position, _ = self.samples.pop(output.request_id)
                        found[position] = output.vector
        return [found[position] for position in range(len(self.items))]

    @contextlib.contextmanager
    def _open(self) -> Iterator[str]:
        """The call's number in the mail, with its samples in the engine; what is left of them
        is ended when the caller stops listening, or an error comes out of the engine.
        """
        engine, mail = self.llm.engine, self.llm.mail
        number = mail.open()
        try:
            for position in range(len(self.items)):
                self._add(f"{number}-{position}", position)
            yield number
        finally:
            mail.close(number)
            for request_id in self.samples:
                engine.abort(request_id)

    def _add(self, request_id: str, position: int) -> None:
        engine, tokenizer = self.llm.engine, self.llm.tokenizer
        params, item = self.params[position], self.items[position]
        seed = engine.new_seed()
        banned = banned_sequences(tokenizer, params)
        for index in range(params.num_samples):
            name = f"{request_id}-{index}"
            order = replace(item.order, seed=seed, sample_index=index, banned=banned)
            engine.add(name, item.prompt, params, order, item.adapter)
            self.samples[name] = (position, Sample(index, params, tokenizer))

    def _take(self, output: TokenOutput, pieces: list[RequestOutput | None]) -> None:
        if output.request_id not in self.samples:
            return  # a stop string ended it at an earlier token of the same step
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
        places = (i for i, one in enumerate(piece.outputs) if one.index == completion.index)
        place = next(places, None)
        if place is None:
            piece.outputs.append(completion)
        else:  # its earlier tokens, of this step or of those that another call has run
            piece.outputs[place] = CompletionOutput.joined([piece.outputs[place], completion])
        piece.finished = self.num_open[position] == 0
        if output.error is not None:
            piece.error_code, piece.error_msg = 400, output.error
        if output.prompt_logprobs is not None:
            piece.prompt_logprobs = sample.readable_prompt(output.prompt_logprobs)

    def _piece(self, position: int, metrics: RequestMetrics, num_cached: int) -> RequestOutput:
        item = self.items[position]
        return RequestOutput(
            request_id=str(position),
            prompt=item.text,
            prompt_token_ids=item.token_ids,
            outputs=Completions(),
            metrics=metrics,
            num_cached_tokens=num_cached,
        )

    def _show_progress(self) -> None:
        stats = self.llm.engine.stats()
        done = sum(count == 0 for count in self.num_open)
        sys.stderr.write(
            f"\r{done}/{len(self.items)} prompts | {stats.num_running} running | "
            f"{stats.num_generated_tokens} tokens\033[K"
        )


def _as_list(prompts: Any) -> Iterable[Prompt]:
    """Several prompts; one is recognised by its type, a list of integers being one."""
    if isinstance(prompts, (str, Mapping)):
        return [prompts]
    if not isinstance(prompts, Sequence):
        raise TypeError(f"prompts is a {type(prompts).__name__}; give a text, token ids, or a list")
    if prompts and all(isinstance(plain_id(token), int) for token in prompts):
        return [prompts]
    return prompts


def _for_each(given: Any, num_prompts: int, what: str, param: str) -> list[Any]:
    """One value for all prompts, or a list with one for each, as such a list."""
    is_list = isinstance(given, Sequence) and not isinstance(given, (str, bytes))
    values = list(given) if is_list else [given] * num_prompts
    if len(values) != num_prompts:
        raise RequestError(
            f"{len(values)} {what} for {num_prompts} prompts; give one, or one for each",
            param=param,
        )
    return values


def _params_of(given: Any, num_prompts: int, stream: bool) -> list[SamplingParams]:
    given = SamplingParams() if given is None else given
    listed = _for_each(given, num_prompts, "sampling_params", "sampling_params")
    for params in listed:
        if not isinstance(params, SamplingParams):
            raise TypeError(
                f"sampling_params takes a SamplingParams, or a list with one for each prompt, not "
                f"{type(params).__name__}"
            )
        if stream and params.prompt_logprobs is not None:
            raise RequestError("prompt_logprobs cannot be streamed; leave out one of the two")
        if stream and params.num_samples > params.n:
            raise RequestError(
                f"best_of={params.best_of} with n={params.n} cannot be streamed: which samples are "
                "the best is known at the end; leave out stream or best_of",
                param="best_of",
            )
    return listed


def _loras_of(given: Any, num_prompts: int) -> list[str | None]:
    names = _for_each(given, num_prompts, "names of adapters", "lora")
    for name in names:
        if name is not None and not isinstance(name, str):
            raise RequestError(f"lora={name!r} is not the name of an adapter", param="lora")
    return names


def _priorities_of(given: Any, num_prompts: int) -> list[int]:
    numbers = _for_each(given, num_prompts, "priorities", "priority")
    for number in numbers:
        if isinstance(number, bool) or not isinstance(number, int):
            raise RequestError(
                f"priority={number!r} is not an integer; lower ones run first", param="priority"
            )
    return numbers
