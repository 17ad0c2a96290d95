"""The engine behind the server: requests in, pieces of answers out.

    submit() --Add--> [engine's process: step()] --Outputs--> _deliver() -> Answer.queue -> pieces()

Everything here lives on the event loop of the API process; `link` carries the messages and
`supervisor` keeps the engine's process alive. When that is lost, every open answer ends with
EngineStopped, and so do new ones until there is another.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Collection, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import msgspec

from ernie.chat import ChatError
from ernie.settings import ConfigError
from fastdeploy.engine.language import Language
from fastdeploy.engine.prompt import banned_sequences
from fastdeploy.engine.request import PLAIN, Order, TokenOutput, check_params, check_prompt
from fastdeploy.engine.text import Sample
from fastdeploy.errors import RequestError
from fastdeploy.outputs import CompletionOutput, RequestMetrics, Stats, TokenLogprobs
from fastdeploy.sampling import SamplingParams
from fastdeploy.server.link import (
    Abort,
    Add,
    Beat,
    Command,
    Done,
    FromEngine,
    Outputs,
    Ready,
    Rejected,
    Start,
)
from fastdeploy.server.log import ORIGIN, Origin
from fastdeploy.server.pictures import PromptPictures
from fastdeploy.server.supervisor import Child, State, Supervisor, spawn

log = logging.getLogger("fastdeploy")

SECONDS_BETWEEN_LINES = 5.0
MAX_SAMPLES_PER_REQUEST = 1024  # prompts times samples of each
MAX_UNREAD_BYTES = 2**20  # of a stream that its client is too slow to read, the newest step apart


NO_STATS = Stats(**dict.fromkeys(Stats.__dataclass_fields__, 0))  # before the first beat


class EngineStopped(RequestError):
    """There is no engine at the moment: it is loading, was lost, or the server stops."""

    def __init__(self, reason: str) -> None:
        super().__init__(f"{reason}; send the request again later", status=503)


@dataclass(slots=True)
class Piece:
    """News of one sample: choice i is sample `i % num_samples` of prompt `i // num_samples`."""

    choice: int
    completion: CompletionOutput
    num_cached: int
    prompt_logprobs: list[TokenLogprobs | None] | None
    vector: list[float] | None = None  # of a prompt that is pooled
    error: str | None = None  # why the sample has ended, where the request is to blame

    @property
    def num_bytes(self) -> int:
        """About what an event of it takes; the scores of the prompt are never streamed."""
        logprobs = self.completion.logprobs
        num_scores = sum(map(len, logprobs)) if logprobs else 0
        return 256 + len(self.completion.text) + 128 * num_scores


@dataclass(frozen=True, slots=True)
class Ended:
    """One sample that has ended, for the metrics."""

    timing: RequestMetrics
    num_prompt: int
    num_output: int
    finish_reason: str
    max_tokens: int | None
    num_cached: int  # tokens of the prompt that were found in the cache
    origin: Origin | None  # the HTTP request it belonged to


class Answer:
    """One HTTP request in the engine: all its samples, and what they have to say.

    Whoever got it from `submit` must `close` it, whatever happens.
    """

    def __init__(
        self,
        engine: ServerEngine,
        prompts: Sequence[Sequence[int]],
        num_samples: int,
        pictures: PromptPictures | None = None,
    ) -> None:
        self.engine = engine
        self.prompts = prompts
        self.num_samples = num_samples  # of each prompt
        self.num_picture_tokens = pictures.num_tokens() if pictures is not None else {}
        self.num_choices = len(prompts) * num_samples
        self.samples: dict[str, tuple[int, Sample]] = {}  # open ones, by the engine's request id
        self.queue: deque[Piece | RequestError] = deque()  # not yet read; an error is the last
        self.waiter: asyncio.Future[None] | None = None  # done when there is something to read
        self.arrival = time.monotonic()
        self.num_unread_bytes = 0  # of pieces in the queue, see MAX_UNREAD_BYTES
        self.num_newest_bytes = 0  # of pieces that the newest step has brought
        self.is_streamed = False  # each piece goes to its client, who may be slow
        self.given_up = asyncio.Event()  # its client does not read
        self.origin = ORIGIN.get()
        self.id, self.owner = "", ""  # as clients call it, and whose it is

    async def pieces(self) -> AsyncIterator[Piece]:
        """Every piece of every choice; ends when all choices have ended.

        Raises EngineStopped, and RequestError for a request that cannot be served to its end, or
        that was given up.
        """
        num_open = self.num_choices  # not len(samples): some may have ended before we listen
        while num_open:
            while not self.queue:
                if self.given_up.is_set():
                    raise RequestError(
                        f"the client has left more than {MAX_UNREAD_BYTES} bytes of the answer "
                        "unread; read a stream as it comes"
                    )
                self.waiter = asyncio.get_running_loop().create_future()
                await self.waiter
                self.waiter = None
            piece = self.queue.popleft()
            if isinstance(piece, RequestError):
                raise piece
            if piece.error is not None:
                raise RequestError(piece.error)
            self.num_unread_bytes -= piece.num_bytes
            num_open -= piece.completion.finish_reason is not None
            yield piece

    def begin_step(self) -> None:
        """News of another step are about to be put. A stream that leaves too much unread of the
        steps before the newest is given up, and whoever sends it is told.
        """
        num_bytes = self.num_unread_bytes - self.num_newest_bytes
        self.num_newest_bytes = 0
        has_run = self.waiter is None or not self.waiter.done()  # whoever reads, since it was woken
        if self.is_streamed and has_run and num_bytes > MAX_UNREAD_BYTES:
            self.given_up.set()
            self.close()

    def put(self, piece: Piece) -> None:
        """Add news."""
        self.num_unread_bytes += piece.num_bytes
        self.num_newest_bytes += piece.num_bytes
        self._append(piece)

    def fail(self, error: RequestError) -> None:
        """End it with an error."""
        self._append(error)
        self.close()

    def _append(self, news: Piece | RequestError) -> None:
        self.queue.append(news)
        if self.waiter is not None and not self.waiter.done():
            self.waiter.set_result(None)

    def abort(self) -> None:
        """End every open sample here and now; whoever listens gets the reason "abort"."""
        self.engine.abort(self)

    def close(self) -> None:
        """Abort what has not ended; the client has got everything, or has gone."""
        self.engine.forget(self)


class ServerEngine:
    def __init__(
        self,
        language: Language,
        *,
        max_concurrency: int,
        on_end: Callable[[Ended], None],
        adapters: dict[str, str] | None = None,
        step_timeout_s: float = 120,
        spawn: Callable[[], Child] = spawn,
    ) -> None:
        """`adapters` maps the names of those to load at the start to their folders."""
        self.language, self.config = language, language.config
        self.max_concurrency = max_concurrency
        self.on_end = on_end
        # Loaded ones: a new process gets them as well, and says which it could still load.
        self.adapters = adapters or {}
        self.answers: set[Answer] = set()
        self.answer_by_id: dict[str, Answer] = {}
        self.num_submitted = 0
        self.commands: dict[int, asyncio.Future[Any]] = {}  # not yet answered
        self.num_commands = 0
        self.paused = False  # nothing is submitted; set before the engine is told
        self.asleep = False
        self.draining = False  # the server is about to stop
        self.ready: Ready | None = None
        self.latest_stats = NO_STATS
        self.seeds = random.Random(self.config.seed)
        self.supervisor = Supervisor(
            self._start_message,
            self._receive,
            self._lose,
            step_timeout_s=step_timeout_s,
            spawn=spawn,
        )
        self.supervising: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Start the engine's process; call it on the event loop that will do all the rest."""
        self.supervising = asyncio.create_task(self.supervisor.run())

    async def stop(self) -> None:
        """End the process, after the step it is in."""
        assert self.supervising is not None, "it was not started"
        self.supervising.cancel()
        await asyncio.gather(self.supervising, return_exceptions=True)
        await self.supervisor.stop()

    @property
    def is_alive(self) -> bool:
        return self.supervisor.state is State.SERVING

    @property
    def state(self) -> str:
        """Why it does not serve, empty if it does."""
        return "the server is stopping" if self.draining else self.supervisor.reason

    @property
    def defaults(self) -> dict[str, float]:
        """Sampling settings that the model's folder recommends. Raises EngineStopped."""
        if self.ready is None:
            raise EngineStopped(self.state)
        return self.ready.defaults

    def stats(self) -> Stats:
        return self.latest_stats

    def num_waiting(self) -> int:
        """Texts that wait, with those of which the engine has said nothing yet: as long as none
        waits there, they take the places that are left.
        """
        stats = self.latest_stats
        places = stats.num_running if stats.num_waiting else self.config.max_num_seqs
        return max(len(self.answer_by_id) - places, 0)

    def submit(
        self,
        prompts: Sequence[Sequence[int]],
        params: SamplingParams,
        order: Order = PLAIN,
        *,
        adapter: str | None = None,
        shown: Collection[int] = (),
        pictures: PromptPictures | None = None,
    ) -> Answer:
        """Queue every sample of every prompt; special tokens in `shown` are part of its text.
        `pictures` are those of the only prompt.

        Raises RequestError, having queued nothing.
        """
        self._check(prompts, params)
        banned = [list(ids) for ids in banned_sequences(self.language.tokenizer, params)]
        answer = Answer(self, prompts, params.num_samples, pictures)
        adds = []
        for i, prompt_ids in enumerate(prompts):
            ids = [str(self.num_submitted + 1 + j) for j in range(params.num_samples)]
            self.num_submitted += len(ids)
            for index, request_id in enumerate(ids):
                choice = i * params.num_samples + index
                sample = Sample(choice, params, self.language.tokenizer, shown)
                answer.samples[request_id] = choice, sample
            seed = params.seed if params.seed is not None else self.seeds.getrandbits(59)
            own = replace(order, seed=seed, banned=banned)
            adds.append(Add(ids, list(prompt_ids), params, own, adapter, pictures))
        self.supervisor.send(*adds)
        self.answers.add(answer)
        self.answer_by_id.update(dict.fromkeys(answer.samples, answer))
        return answer

    def _check(self, prompts: Sequence[Sequence[int]], params: SamplingParams) -> None:
        if self.ready is None or not self.is_alive or self.draining:
            raise EngineStopped(self.state)
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
        size, longest = self.ready.vocab_size, self.config.max_model_len
        check_params(params, size, self.config, thinks=self.ready.thinks)
        for prompt_ids in prompts:
            check_prompt(prompt_ids, size, longest, params.min_tokens)

    async def command(self, name: str, /, **arguments: Any) -> Any:
        """Have the engine's process do one of `engine_process.COMMANDS`, or load an adapter,
        between two steps.

        Raises RequestError for what the user did wrong in it; any other error ends the process.
        """
        if not self.is_alive:
            raise EngineStopped(self.state)
        self.num_commands += 1
        number = self.num_commands
        done = self.commands[number] = asyncio.get_running_loop().create_future()
        try:
            self.supervisor.send(Command(number, name, arguments))
            return await done
        finally:
            del self.commands[number]

    def forget(self, answer: Answer) -> None:
        if answer.samples:
            for request_id in answer.samples:
                del self.answer_by_id[request_id]
            self.supervisor.send(Abort(list(answer.samples)))
            answer.samples.clear()
        self.answers.discard(answer)

    def end_answers(self, reason: str) -> None:
        """End every open answer with an error."""
        for answer in list(self.answers):
            answer.fail(EngineStopped(reason))

    def abort(self, answer: Answer) -> None:
        """Report an abort of each open sample to its listener, and have the engine forget it."""
        ids = list(answer.samples)
        self.supervisor.send(Abort(ids))
        for request_id in ids:
            metrics = RequestMetrics(arrival_time=time.monotonic())
            self._deliver([TokenOutput(request_id, None, None, None, "abort", metrics, 0)])

    async def load_adapter(self, name: str, folder: Path) -> None:
        """Read an adapter while the engine works, and offer it from its next step on.

        Raises RequestError.
        """
        try:
            self.language.check_training(folder, f"the adapter {name!r}")
        except (ConfigError, ChatError) as error:
            raise RequestError(str(error)) from None
        await self.command("load_adapter", name=name, folder=str(folder))
        self.adapters[name] = str(folder)

    async def unload_adapter(self, name: str) -> None:
        """See `Engine.unload_adapter`."""
        await self.command("unload_adapter", name=name)
        self.adapters.pop(name, None)

    def _start_message(self) -> Start:
        config = msgspec.json.encode(asdict(self.config)).decode()
        return Start(config, self.adapters, self.paused, self.supervisor.was_ready)

    def _receive(self, message: FromEngine) -> None:
        match message:
            case Outputs():
                self.latest_stats = message.stats
                for answer in list(self.answers):
                    answer.begin_step()
                self._deliver(message.outputs)
            case Beat():
                self.latest_stats = message.stats or self.latest_stats
            case Done():
                self._finish(message)
            case Rejected():
                self._reject(message)
            case Ready():
                self.ready = message
                self.adapters = {name: self.adapters[name] for name in message.adapters}

    def _finish(self, done: Done) -> None:
        waiting = self.commands.get(done.number)
        if waiting is None or waiting.done():
            return  # whoever asked has gone
        if done.problem is None:
            waiting.set_result(done.value)
        else:
            waiting.set_exception(done.problem.error())

    def _reject(self, rejected: Rejected) -> None:
        answer = self.answer_by_id.get(rejected.ids[0])
        if answer is not None:
            answer.fail(rejected.problem.error())

    def _lose(self) -> None:
        """The process is gone, with all that it was doing."""
        self.ready, self.asleep = None, False
        self.end_answers("the engine was lost in the middle of the answer")
        for waiting in self.commands.values():
            if not waiting.done():
                waiting.set_exception(EngineStopped("the engine was lost"))

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
                self.supervisor.has_served = True
                del answer.samples[output.request_id], self.answer_by_id[output.request_id]
                if sample.stopped_by_text:
                    self.supervisor.send(Abort([output.request_id]))
                output.metrics.arrival_time = answer.arrival
                self._report_end(answer, choice, sample, output, completion)
            answer.put(
                Piece(choice, completion, output.num_cached, scores, output.vector, output.error)
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
            num_cached=output.num_cached,
            origin=answer.origin,
        )
        self.on_end(ended)


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
