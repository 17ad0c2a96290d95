"""The engine: requests in, tokens out, one step at a time.

One thread owns an engine and calls `step()` for as long as there is work; nothing here waits, and
nothing here knows of text, HTTP or processes.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from ernie.adapters import Adapter
from ernie.model import ErnieModel
from fastdeploy.config import EngineConfig
from fastdeploy.engine.adapters import Adapters, Slices
from fastdeploy.engine.cache import KVCache
from fastdeploy.engine.constraint import Compiling, Masks
from fastdeploy.engine.grammar import Grammars, why_none
from fastdeploy.engine.pooler import Pooler
from fastdeploy.engine.request import (
    PLAIN,
    Order,
    Request,
    Status,
    TokenOutput,
    check_params,
    check_prompt,
)
from fastdeploy.engine.runner import Runner, on, record_steps
from fastdeploy.engine.sampler import Choice, Sampler
from fastdeploy.engine.scheduler import Scheduler
from fastdeploy.engine.speculative import Drafter
from fastdeploy.engine.thinking import ThinkTags
from fastdeploy.engine.vision import Layout, Prompt, token_ids_of
from fastdeploy.engine.weights import HostCopy, Source, read_weights, without_weights
from fastdeploy.errors import RequestError
from fastdeploy.outputs import Stats
from fastdeploy.sampling import SamplingParams

COMPILE_WAIT_S = 0.02  # for a grammar, when there is nothing else to do


class Engine:
    """A model with its cache. `config` must be resolved (see `EngineConfig.resolved`).

    Besides work there are two ways to rest, each a method: `pause` holds or ends what is running,
    `sleep` gives memory back. In a pause, or with nothing to do, `update_weights` changes the
    model. With ranks the model is this one's slice, and each of the others holds its own.
    """

    def __init__(
        self,
        config: EngineConfig,
        runner: Runner,
        scheduler: Scheduler,
        *,
        allocate: Callable[[int], KVCache],
        drafter: Drafter | None = None,
        eos_ids: Iterable[int] = (),
        think_tags: ThinkTags | None = None,
        rebuild: Callable[[ErnieModel], ErnieModel] = lambda model: model,
        reread: Callable[[str | Path], ErnieModel] | None = None,
        grammars: Grammars | None = None,
    ) -> None:
        """`loading.make_engine` makes the parts. `allocate` makes a cache of so many blocks. To
        update weights: `rebuild` makes the form of the model from a plain one, or with ranks
        `reread` makes this rank's slice from a folder. Without `grammars` no request can be held to
        a form.
        """
        model = runner.model
        self.config = config
        self.network, self.vocab_size = model.config, model.config.vocab_size
        self.eos_ids = frozenset(eos_ids)
        self.think_tags = think_tags
        self.early_stop = config.early_stop()
        self.rebuild, self.reread, self.allocate = rebuild, reread, allocate
        self.device, self.dtype = model.device, model.model.embed_tokens.weight.dtype
        self.runner, self.ranks, self.pictures = runner, runner.ranks, runner.pictures
        self.scheduler, self.blocks, self.drafter = scheduler, scheduler.blocks, drafter
        self.requests: dict[str, Request] = {}
        self.adapters = Adapters(model, config, self.requests, self.ranks)
        self.sampler, self.pooler = Sampler(self.vocab_size), Pooler(runner)
        self.grammars, self.masks = grammars, Masks(self.vocab_size)
        most_s = config.guided_decoding_max_stall_ms / 1000
        self.compiling = Compiling(grammars, think_tags, self.eos_ids, most_s)
        self.news: list[TokenOutput] = []  # what the next step reports before it computes anything
        self.is_stepping = False
        self.late_aborts: list[str] = []  # of requests, for the end of the step
        self.paused = self.asleep = False
        self.host_copy: HostCopy | None = None
        self.seeds = random.Random(config.seed)
        self.num_generated = self.num_steps = self.num_unfinished_forms = 0

    def add(
        self,
        request_id: str,
        prompt: Prompt,
        params: SamplingParams,
        order: Order = PLAIN,
        adapter: Adapter | None = None,
    ) -> None:
        """Queue one sample of a request. Raises RequestError for what cannot be served.

        `prompt` is token ids, or the `Inputs` of a prompt with pictures (`ernie.vision.prompt`).
        `adapter` is one of `self.adapters`, None for the model as it is; texts share cached blocks
        only with texts of the same one.
        """
        if request_id in self.requests:
            raise RequestError(f"there is a request {request_id!r} already; choose another id")
        layout = self.check(prompt, params)
        if adapter is not None:
            self.adapters.check_held(adapter)
        seed = order.seed if params.seed is None else params.seed
        order = replace(
            order,
            seed=self.new_seed() if seed is None else seed,
            banned=[*order.banned, *([token] for token in params.bad_words_token_ids or ())],
        )
        request = Request(
            request_id,
            token_ids_of(prompt),
            params,
            order,
            max_model_len=self.config.max_model_len,
            eos_ids=self.eos_ids,
            think_tags=self.think_tags,
            early_stop=self.early_stop,
            adapter=adapter,
            layout=layout,
        )
        self.requests[request_id] = request
        (self.compiling if params.guided_decoding is not None else self.scheduler).add(request)

    def check(self, prompt: Prompt, params: SamplingParams) -> Layout | None:
        """The layout of a prompt with pictures. Raises RequestError if the engine cannot serve this
        prompt with these settings.
        """
        self._refuse_while_resting()
        check_params(params, self.vocab_size, self.config, thinks=self.think_tags is not None)
        if params.guided_decoding is not None:
            if self.grammars is None:
                raise why_none(self.config)
            self.grammars.check_size(params.guided_decoding)
        prompt_ids = token_ids_of(prompt)
        check_prompt(prompt_ids, self.vocab_size, self.config.max_model_len, params.min_tokens)
        return Layout.of(prompt, self.network)

    def load_adapter(self, name: str, adapter: Slices) -> None:
        """Offer an adapter (see `Adapters.read`) under a name, from the next step on.

        Raises RequestError if the name is taken, or if there are max_loras in memory already:
        loaded, or unloaded and still in use.
        """
        self.adapters.add(name, adapter)

    def unload_adapter(self, name: str) -> None:
        """Offer an adapter no longer. Requests that have it finish with it, and then it is gone.

        Raises RequestError if there is none of that name.
        """
        self.adapters.remove(name)

    def new_seed(self) -> int:
        """A seed for a request that names none; the sequence depends on the engine's own seed."""
        return self.seeds.getrandbits(59)

    def abort(self, request_id: str) -> None:
        """Forget a request and free what it holds; nothing happens if it has ended already.

        Within a step it waits for the end of it: Python may close a stream that nobody holds any
        more at any time, also in the midst of the engine's work.
        """
        if self.is_stepping:
            self.late_aborts.append(request_id)
            return
        request = self.requests.pop(request_id, None)
        if request is not None and not self.compiling.forget(request):
            self.scheduler.finish(request)
        self.news = [output for output in self.news if output.request_id != request_id]

    @property
    def has_work(self) -> bool:
        """Whether `step` has something to do or to say."""
        return bool(self.news or (self.requests and not self.paused and not self.asleep))

    @property
    def is_alive(self) -> bool:
        """False once a rank is lost, even before a step has met with it."""
        return self.ranks is None or self.ranks.are_alive

    def step(self) -> list[TokenOutput]:
        """Compute one batch and return what became known in it. Raises RequestError while the
        engine rests.

        After any other error nothing is cached any more, and open requests are computed again.
        """
        self.is_stepping = True
        try:
            return self._step()
        finally:
            self.is_stepping = False
            late, self.late_aborts = self.late_aborts, []
            for request_id in late:
                self.abort(request_id)

    def _step(self) -> list[TokenOutput]:
        if not self.news:
            self._refuse_while_resting()
            self._queue_compiled()
        if self.news or not self.scheduler.has_work:
            return self._told()
        try:
            return self._compute()
        except BaseException:  # Ctrl-C too
            self._start_over()  # blocks have names, and nobody knows what was written to them
            raise

    def _compute(self) -> list[TokenOutput]:
        """One batch, from the decision to the reports."""
        schedule = self.scheduler.schedule()
        masks = self.masks.begin(schedule.parts)
        logits_RV = self.runner.run(schedule)
        with on(self.device):
            choices = self.sampler(logits_RV, schedule.parts, masks)
        tokens = [[choice.token for choice in some] for some in choices]
        pooled = self.pooler(schedule.parts)
        grown = self.scheduler.update(schedule, tokens)
        # The tokens are known now and are told in any case: by the next step if this one fails.
        self.news = self._report(grown, choices) + self._report_pooled(pooled)
        if self.drafter is not None:
            with on(self.device):
                self.drafter(schedule)
        if self.adapters.leaving:
            self.adapters.let_go()
        return self._told()

    def _told(self) -> list[TokenOutput]:
        outputs, self.news = self.news, []
        return outputs

    def _queue_compiled(self) -> None:
        if not self.compiling.futures:
            return
        for request, error in self.compiling.ready(
            wait_s=0 if self.scheduler.has_work else COMPILE_WAIT_S
        ):
            if error is None:
                self.scheduler.add(request)
            else:
                del self.requests[request.id]
                self.news.append(self._without_token(request, "error", error))

    def _without_token(
        self, request: Request, reason: str, error: str | None = None
    ) -> TokenOutput:
        metrics, num_cached = request.metrics, request.num_cached
        return TokenOutput(request.id, None, None, None, reason, metrics, num_cached, error=error)

    def pause(self, mode: str = "abort") -> None:
        """Refuse new requests until `resume`. Those there are: "abort" ends them, "keep" holds
        them.
        """
        if mode not in ("abort", "keep"):
            raise RequestError(f"mode={mode!r} is not known; use abort or keep", param="mode")
        self.paused = True
        for request in list(self.requests.values()) if mode == "abort" else ():
            self.abort(request.id)
            self.news.append(self._without_token(request, "abort"))

    def resume(self) -> None:
        """Go on after `pause`."""
        self.paused = False

    def reset_prefix_cache(self) -> None:
        """Forget the cached texts: nothing that was computed before is found again."""
        self.blocks.forget()

    def sleep(self, level: int = 1) -> None:
        """Free the memory of the cache until `wake_up`, and that of the weights.

        Level 1 keeps the weights in the host's memory, which on a CPU is where they are anyway.
        Level 2 drops them: they come back from a folder. Held requests are computed again.
        """
        if level not in (1, 2):
            raise RequestError(f"level={level!r} is not known; use 1 or 2", param="level")
        self._refuse_while_running("sleep")
        self._start_over()
        self.runner.graphs = None
        self.runner.cache = self.allocate(0)
        if self.ranks:
            self.ranks.call("sleep", level=level)
        if level == 2:
            self.runner.model, self.host_copy = without_weights(self.runner.model), None
        elif self.device.type != "cpu" and self.has_weights and self.host_copy is None:
            self.host_copy = HostCopy(self.runner.model)
        self.asleep = True
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def wake_up(self, source: Source | None = None) -> None:
        """End `sleep`. Weights that were freed, and not given anew by `update_weights`, are read
        from `source`.
        """
        if not self.asleep:
            return
        if not self.has_weights:
            if source is None:
                raise RequestError("the weights are freed; give them back by update_weights first")
            self.update_weights(source)
        if self.host_copy is not None:
            self.host_copy.restore()
            self.host_copy = None
        if self.ranks:
            self.ranks.call("wake_up")
        self.runner.cache = self.allocate(len(self.blocks.blocks))
        self.asleep = False
        record_steps(self.runner, self.config)

    @property
    def has_weights(self) -> bool:
        """False after `sleep(level=2)`, until they are given back."""
        return self.runner.model.device.type != "meta"

    def update_weights(self, source: Source) -> None:
        """Go on with other weights, which `read_weights` describes; the engine must be paused or
        have nothing to do. Held requests are computed again with the new weights.

        Raises RequestError or CheckpointError, with everything as it was.
        """
        self._refuse_while_running("update_weights")
        self.runner.model = self._new_model(source).eval()
        self.host_copy = None
        self._start_over()
        if not self.asleep:
            record_steps(self.runner, self.config)

    def _new_model(self, source: Source) -> ErnieModel:
        """The form in which it runs here; the other ranks have theirs then."""
        if self.ranks is None:
            plain = read_weights(source, self.runner.model.config, self.dtype, self.device)
            return self.rebuild(plain)
        if isinstance(source, Mapping):
            raise RequestError(
                f"update_weights with tensors and tensor_parallel_size={self.ranks.size} is not "
                "available, as every process reads its slice; give a folder",
                status=409,
            )
        assert self.reread is not None, "ranks read folders"
        model = self.reread(source)
        self.ranks.call("update_weights", is_long=True, folder=str(source))
        return model

    def _start_over(self) -> None:
        """Have every open request computed anew, and nothing found in the caches."""
        self.scheduler.preempt_all()
        self.blocks.forget()
        if self.pictures is not None:
            self.pictures.forget()

    def _refuse_while_running(self, what: str) -> None:
        if self.requests and not self.paused and not self.asleep:
            raise RequestError(
                f"{what} with {len(self.requests)} requests in work; pause first", status=409
            )

    def _refuse_while_resting(self) -> None:
        if self.asleep:
            raise RequestError("the engine sleeps; wake it up first", status=503)
        if self.paused:
            raise RequestError("the engine is paused; resume it first", status=503)

    def stats(self) -> Stats:
        blocks, scheduler, pictures = self.blocks, self.scheduler, self.pictures
        return Stats(
            num_running=len(scheduler.running),
            num_waiting=len(scheduler.waiting),
            num_preemptions=scheduler.num_preemptions,
            num_blocks=len(blocks.blocks),
            num_free_blocks=blocks.num_free,
            num_cached_blocks=len(blocks.block_by_key),
            num_prompt_tokens=scheduler.num_prompt_tokens,
            num_hit_tokens=scheduler.num_hit_tokens,
            num_generated_tokens=self.num_generated,
            num_steps=self.num_steps,
            num_drafts=scheduler.num_drafts,
            num_draft_tokens=scheduler.num_draft_tokens,
            num_accepted_tokens=scheduler.num_accepted_tokens,
            num_unfinished_forms=self.num_unfinished_forms,
            num_pictures_computed=pictures.num_computed if pictures else 0,
            num_picture_hits=pictures.num_hits if pictures else 0,
            num_picture_bytes=pictures.num_bytes if pictures else 0,
        )

    def _report(
        self, grown: Sequence[tuple[Request, int]], choices: Sequence[Sequence[Choice]]
    ) -> list[TokenOutput]:
        """A report for each token that became known: the first ones of a request's choices."""
        now, outputs = time.monotonic(), []
        self.num_steps += 1
        for (request, num_taken), some in zip(grown, choices):
            self.num_generated += num_taken
            first = request.num_output == num_taken
            if first:
                request.metrics.first_token_time = now
            if request.status is Status.FINISHED:
                request.metrics.finished_time = now
                del self.requests[request.id]
            reports = [
                TokenOutput(
                    request_id=request.id,
                    token=choice.token,
                    logprob=choice.logprob,
                    logprobs=choice.logprobs,
                    finish_reason=None,
                    metrics=request.metrics,
                    num_cached=request.num_cached,
                )
                for choice in some[:num_taken]
            ]
            reason = reports[-1].finish_reason = request.finish_reason()
            if reason == "error" and request.end is not None:
                reports[-1].error = request.end.error
            elif reason == "length" and request.constraint is not None:
                self.num_unfinished_forms += not request.constraint.is_complete
            if first and request.params.prompt_logprobs is not None:
                reports[0].prompt_logprobs = request.prompt_logprobs or [None]
            outputs += reports
        return outputs

    def _report_pooled(self, pooled: Sequence[tuple[Request, list[float]]]) -> list[TokenOutput]:
        """A report for each request that has become a vector; it has ended with that."""
        now, outputs = time.monotonic(), []
        for request, vector in pooled:
            metrics = request.metrics
            metrics.first_token_time = metrics.finished_time = now
            del self.requests[request.id]
            outputs.append(
                TokenOutput(
                    request.id, None, None, None, "stop", metrics, request.num_cached, vector=vector
                )
            )
        return outputs
