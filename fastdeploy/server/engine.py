"""The engine behind the server: the only place that knows that it runs in a thread of this process.

The engine's thread takes commands from an inbox and steps for as long as there is work; what it
reports goes to the event loop, once a step. Everything else in `server` lives on the event loop.

    submit() -> inbox -> [thread: engine.step()] -> _deliver() -> Answer.queue -> pieces()
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import logging
import queue
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from ernie.adapters import Adapter
from ernie.checkpoint.folder import CheckpointError
from ernie.settings import ConfigError
from fastdeploy.engine.core import Stats
from fastdeploy.engine.loading import Loaded
from fastdeploy.engine.prompt import banned_sequences
from fastdeploy.engine.request import TokenOutput
from fastdeploy.engine.text import Sample
from fastdeploy.errors import RequestError
from fastdeploy.outputs import CompletionOutput, RequestMetrics, TokenLogprobs
from fastdeploy.sampling import SamplingParams

log = logging.getLogger("fastdeploy")

SECONDS_BETWEEN_LINES = 5.0
USER_ERRORS = (RequestError, CheckpointError, ConfigError)
MAX_SAMPLES_PER_REQUEST = 1024  # prompts times samples of each


class EngineStopped(RequestError):
    """The engine's thread has ended, by an error of ours or because the server stops."""

    def __init__(self) -> None:
        super().__init__("the engine has stopped; restart the server", status=503)


@dataclass(slots=True)
class Piece:
    """News of one sample: choice i is sample `i % num_samples` of prompt `i // num_samples`."""

    choice: int
    completion: CompletionOutput
    num_cached: int
    prompt_logprobs: list[TokenLogprobs | None] | None
    error: str | None = None  # why the sample has ended, where the request is to blame


@dataclass(frozen=True, slots=True)
class Ended:
    """One sample that has ended, for the metrics."""

    timing: RequestMetrics
    num_prompt: int
    num_output: int
    finish_reason: str
    max_tokens: int | None


class Answer:
    """One HTTP request in the engine: all its samples, and what they have to say.

    Whoever got it from `submit` must `close` it, whatever happens.
    """

    def __init__(
        self, engine: ServerEngine, prompts: Sequence[Sequence[int]], num_samples: int
    ) -> None:
        self.engine = engine
        self.prompts = prompts
        self.num_samples = num_samples  # of each prompt
        self.num_choices = len(prompts) * num_samples
        self.samples: dict[str, tuple[int, Sample]] = {}  # open ones, by the engine's request id
        self.queue: asyncio.Queue[Piece | None] = asyncio.Queue()  # None: the engine has stopped

    async def pieces(self) -> AsyncIterator[Piece]:
        """Every piece of every choice; ends when all choices have ended.

        Pieces that pile up while the client is slow are bounded by max_tokens of the samples.
        Raises EngineStopped, and RequestError for a request that cannot be served to its end.
        """
        num_open = self.num_choices  # not len(samples): some may have ended before we listen
        while num_open:
            piece = await self.queue.get()
            if piece is None:
                raise EngineStopped
            if piece.error is not None:
                raise RequestError(piece.error)
            num_open -= piece.completion.finish_reason is not None
            yield piece

    def close(self) -> None:
        """Abort what has not ended; the client has got everything, or has gone."""
        self.engine.forget(self)


class ServerEngine:
    def __init__(
        self, loaded: Loaded, *, max_concurrency: int, on_end: Callable[[Ended], None]
    ) -> None:
        self.loaded = loaded
        self.max_concurrency = max_concurrency
        self.on_end = on_end
        self.inbox: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self.answers: set[Answer] = set()
        self.answer_by_id: dict[str, Answer] = {}
        self.loading = asyncio.Lock()  # one adapter at a time, so that memory holds one too many
        self.num_submitted = 0
        self.commands: set[concurrent.futures.Future[None]] = set()  # not yet obeyed
        self.paused = False  # nothing is submitted; set before the engine is told
        self.failed = False
        self.thread = threading.Thread(target=self._work, name="engine", daemon=True)
        self.loop: asyncio.AbstractEventLoop | None = None

    def start(self) -> None:
        """Begin to work; call it on the event loop that will do all the rest."""
        self.loop = asyncio.get_running_loop()
        self.thread.start()

    def stop(self) -> None:
        """End the thread, after the step it is in."""
        self.inbox.put(None)
        self.thread.join()

    @property
    def is_alive(self) -> bool:
        return self.thread.is_alive() and not self.failed and self.loaded.engine.is_alive

    def stats(self) -> Stats:
        return self.loaded.engine.stats()

    def submit(
        self,
        prompts: Sequence[Sequence[int]],
        params: SamplingParams,
        *,
        priority: int = 0,
        cache_salt: str | None = None,
        adapter: Adapter | None = None,
    ) -> Answer:
        """Queue every sample of every prompt. Raises RequestError, having queued nothing."""
        engine = self.loaded.engine
        if not self.is_alive:
            raise EngineStopped
        if self.paused:
            raise RequestError("the engine is paused; try again later", status=503)
        if len(self.answers) >= self.max_concurrency:
            raise RequestError(
                f"{len(self.answers)} requests are in work already, as many as max_concurrency "
                "allows; try again later",
                status=429,
            )
        if len(prompts) * params.num_samples > MAX_SAMPLES_PER_REQUEST:
            raise RequestError(
                f"{len(prompts)} prompts with {params.num_samples} samples each are more than "
                f"{MAX_SAMPLES_PER_REQUEST} texts; send them in several requests",
                param="n",
            )
        for prompt_ids in prompts:
            engine.check(prompt_ids, params)
        banned = banned_sequences(self.loaded.tokenizer, params)
        answer = Answer(self, prompts, params.num_samples)
        options = {
            "banned": banned,
            "priority": priority,
            "cache_salt": cache_salt,
            "adapter": adapter,
        }
        self.answers.add(answer)
        for i, prompt_ids in enumerate(prompts):
            seed = engine.new_seed()
            for index in range(params.num_samples):
                self.num_submitted += 1
                request_id = str(self.num_submitted)
                choice = i * params.num_samples + index
                answer.samples[request_id] = choice, Sample(choice, params, self.loaded.tokenizer)
                self.answer_by_id[request_id] = answer
                add = partial(engine.add, request_id, prompt_ids, params, seed=seed)
                self.inbox.put(partial(add, sample_index=index, **options))
        return answer

    async def command(self, do: Callable[[], None]) -> None:
        """Have the engine's thread do something between two steps; what the user did wrong in it
        is raised here, anything else ends the thread.
        """
        if not self.is_alive:
            raise EngineStopped
        done: concurrent.futures.Future[None] = concurrent.futures.Future()
        self.commands.add(done)

        def obey() -> None:
            if not done.set_running_or_notify_cancel():
                return
            try:
                do()
            except Exception as error:
                done.set_exception(error)
                if not isinstance(error, USER_ERRORS):
                    raise
            else:
                done.set_result(None)

        self.inbox.put(obey)
        try:
            await asyncio.wrap_future(done)
        except (CheckpointError, ConfigError) as error:
            raise RequestError(str(error)) from None
        finally:
            self.commands.discard(done)

    def forget(self, answer: Answer) -> None:
        for request_id in answer.samples:
            del self.answer_by_id[request_id]
            self.inbox.put(partial(self.loaded.engine.abort, request_id))
        answer.samples.clear()
        self.answers.discard(answer)

    async def load_adapter(self, name: str, folder: Path) -> None:
        """Read an adapter while the engine works, and offer it from its next step on.

        Raises RequestError and what reading raises.
        """
        engine = self.loaded.engine
        async with self.loading:
            engine.adapters.check_name(name)
            adapter = await asyncio.to_thread(engine.adapters.read, folder)
            await self.command(partial(engine.load_adapter, name, adapter))

    async def unload_adapter(self, name: str) -> None:
        """See `Engine.unload_adapter`."""
        await self.command(partial(self.loaded.engine.unload_adapter, name))

    def _deliver(self, outputs: list[TokenOutput]) -> None:
        for output in outputs:
            answer = self.answer_by_id.get(output.request_id)
            if answer is None:
                continue  # forgotten while the step was running
            choice, sample = answer.samples[output.request_id]
            completion = sample.push(output)
            scores = output.prompt_logprobs
            if scores is not None:
                scores = sample.readable_prompt(scores)
            if sample.finished:
                del answer.samples[output.request_id], self.answer_by_id[output.request_id]
                if sample.stopped_by_text:
                    self.inbox.put(partial(self.loaded.engine.abort, output.request_id))
                self._report_end(answer, choice, sample, output, completion)
            answer.queue.put_nowait(
                Piece(choice, completion, output.num_cached, scores, output.error)
            )

    def _report_end(
        self,
        answer: Answer,
        choice: int,
        sample: Sample,
        output: TokenOutput,
        completion: CompletionOutput,
    ) -> None:
        output.metrics.finished_time = output.metrics.finished_time or time.monotonic()
        ended = Ended(
            timing=output.metrics,
            num_prompt=len(answer.prompts[choice // answer.num_samples]),
            num_output=sample.num_tokens,
            finish_reason=completion.finish_reason or "abort",
            max_tokens=sample.params.max_tokens,
        )
        self.on_end(ended)

    def _fail(self) -> None:
        self.failed = True
        for answer in self.answers:
            answer.queue.put_nowait(None)
        for command in self.commands:
            if not command.done():
                command.set_exception(EngineStopped())

    def _work(self) -> None:
        """The engine's thread: commands, then a step, and so on."""
        assert self.loop is not None
        try:
            while self._obey():
                if self.loaded.engine.has_work:
                    outputs = self.loaded.engine.step()
                    self.loop.call_soon_threadsafe(self._deliver, outputs)
        except Exception:
            # Nothing can be trusted after this: say so in the log, to every client and in /health.
            log.exception("the engine has failed")
            self.loop.call_soon_threadsafe(self._fail)

    def _obey(self) -> bool:
        """Do what the inbox says, waiting for something to do; False when it says stop."""
        while True:
            try:
                command = self.inbox.get(block=not self.loaded.engine.has_work)
            except queue.Empty:
                return True
            if command is None:
                return False
            command()


async def log_progress(engine: ServerEngine) -> None:
    """One line every few seconds while something is going on; prompts are never logged."""
    before, at = engine.stats(), time.monotonic()
    while True:
        await asyncio.sleep(SECONDS_BETWEEN_LINES)
        now, time_s = engine.stats(), time.monotonic()
        if now.num_steps > before.num_steps:
            seconds = time_s - at
            prompt = now.num_prompt_tokens - before.num_prompt_tokens
            hits = now.num_hit_tokens - before.num_hit_tokens
            log.info(
                "%d running | %d waiting | prompt %.0f tok/s, %.0f %% cached | "
                "generated %.1f tok/s | cache %.0f %% in use | %d preempted",
                now.num_running,
                now.num_waiting,
                prompt / seconds,
                100 * hits / max(prompt, 1),
                (now.num_generated_tokens - before.num_generated_tokens) / seconds,
                100 * (1 - now.num_free_blocks / now.num_blocks),
                now.num_preemptions - before.num_preemptions,
            )
        before, at = now, time_s
