"""The engine: requests in, tokens out, one step at a time.

One thread owns an engine and calls `step()` for as long as there is work; nothing here waits, and
nothing here knows of text, HTTP or processes.
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ernie.model import ErnieModel
from ernie.settings import ConfigError
from fastdeploy.config import EngineConfig
from fastdeploy.engine.batch import BatchBuilder
from fastdeploy.engine.blocks import BlockManager
from fastdeploy.engine.cache import KVCache, block_bytes, free_bytes
from fastdeploy.engine.graphs import cuda_recorder
from fastdeploy.engine.request import Request, Status, TokenOutput, check_prompt
from fastdeploy.engine.runner import Runner
from fastdeploy.engine.sampler import Choice, Sampler
from fastdeploy.engine.scheduler import Scheduler
from fastdeploy.errors import RequestError
from fastdeploy.sampling import SamplingParams


@dataclass(slots=True)
class Stats:
    """Figures of an engine at one moment, for metrics and the log line."""

    num_running: int
    num_waiting: int
    num_preemptions: int
    num_blocks: int
    num_free_blocks: int
    num_cached_blocks: int
    num_prompt_tokens: int  # of requests admitted so far
    num_hit_tokens: int  # of these, found in the prefix cache
    num_generated_tokens: int
    num_steps: int


class Engine:
    """A model with its cache. `config` must be resolved (see `EngineConfig.resolved`)."""

    def __init__(
        self, model: ErnieModel, config: EngineConfig, eos_ids: Iterable[int] = ()
    ) -> None:
        assert config.max_num_batched_tokens is not None, "the config is not resolved"
        self.config = config
        self.vocab_size = model.config.vocab_size
        self.eos_ids = frozenset(eos_ids)
        num_blocks = num_cache_blocks(model, config)
        cache = KVCache.allocate(
            model.config, num_blocks, config.block_size, model.activation_dtype, model.device
        )
        builder = BatchBuilder(
            max_num_seqs=config.max_num_seqs,
            max_num_batched_tokens=config.max_num_batched_tokens,
            max_blocks=-(-config.max_model_len // config.block_size),
            block_size=config.block_size,
            device=model.device,
        )
        self.runner = Runner(model.eval(), cache, builder)
        if config.use_cudagraph:
            self.runner.record_decoding(cuda_recorder())
        self.sampler = Sampler(self.vocab_size)
        self.blocks = BlockManager(
            num_blocks, config.block_size, caching=config.enable_prefix_caching
        )
        self.scheduler = Scheduler(
            self.blocks,
            max_num_seqs=config.max_num_seqs,
            max_num_batched_tokens=config.max_num_batched_tokens,
            chunked_prefill=config.enable_chunked_prefill,
        )
        self.requests: dict[str, Request] = {}
        self.seeds = random.Random(config.seed)
        self.num_generated = self.num_steps = 0

    def add(
        self,
        request_id: str,
        prompt_ids: Sequence[int],
        params: SamplingParams,
        *,
        seed: int | None = None,
        sample_index: int = 0,
        banned_ids: Iterable[int] = (),
    ) -> None:
        """Queue one sample of a request. Raises RequestError for what cannot be served.

        `seed` stands in for a missing `params.seed`; samples of one request share it.
        """
        if request_id in self.requests:
            raise RequestError(f"there is a request {request_id!r} already; choose another id")
        self.check(prompt_ids, params)
        if params.seed is not None:
            seed = params.seed
        request = Request(
            request_id,
            prompt_ids,
            params,
            seed=self.new_seed() if seed is None else seed,
            max_model_len=self.config.max_model_len,
            eos_ids=self.eos_ids,
            banned_ids=frozenset(banned_ids) | frozenset(params.bad_words_token_ids or ()),
            sample_index=sample_index,
        )
        self.requests[request_id] = request
        self.scheduler.add(request)

    def check(self, prompt_ids: Sequence[int], params: SamplingParams) -> None:
        """Raise RequestError if the engine cannot serve this prompt with these settings."""
        params.validate()
        check_prompt(prompt_ids, self.vocab_size, self.config.max_model_len, params.min_tokens)
        for name in ("stop_token_ids", "bad_words_token_ids", "logit_bias"):
            for token in getattr(params, name) or ():
                if token >= self.vocab_size:
                    raise RequestError(
                        f"{name} has token {token}; the vocabulary ends at {self.vocab_size - 1}",
                        param=name,
                    )
        for name in ("logprobs", "prompt_logprobs"):
            wanted = getattr(params, name)
            if wanted is None:
                continue
            if not self.config.enable_logprob:
                raise RequestError(
                    f"{name} is not enabled; start with enable_logprob (--enable-logprob)",
                    param=name,
                )
            most = self.config.max_logprobs
            if most >= 0 and (wanted > most or wanted < 0):
                raise RequestError(f"{name}={wanted} is more than max_logprobs={most}", param=name)

    def new_seed(self) -> int:
        """A seed for a request that names none; the sequence depends on the engine's own seed."""
        return self.seeds.getrandbits(59)

    def abort(self, request_id: str) -> None:
        """Forget a request and free what it holds; nothing happens if it has ended already."""
        request = self.requests.pop(request_id, None)
        if request is not None:
            self.scheduler.finish(request)

    @property
    def has_work(self) -> bool:
        return bool(self.requests)

    def step(self) -> list[TokenOutput]:
        """Compute one batch and return what became known in it."""
        schedule = self.scheduler.schedule()
        logits_RV = self.runner.run(schedule)
        choices = self.sampler(logits_RV, schedule.parts)
        grown = self.scheduler.update(schedule, [choice.token for choice in choices])
        return self._report(grown, choices)

    def stats(self) -> Stats:
        blocks, scheduler = self.blocks, self.scheduler
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
        )

    def _report(self, grown: Sequence[Request], choices: Sequence[Choice]) -> list[TokenOutput]:
        now, outputs = time.monotonic(), []
        self.num_steps += 1
        self.num_generated += len(grown)
        for request, choice in zip(grown, choices):
            first = request.num_output == 1
            if first:
                request.metrics.first_token_time = now
            if request.status is Status.FINISHED:
                request.metrics.finished_time = now
                del self.requests[request.id]
            scores = request.params.prompt_logprobs is not None
            outputs.append(
                TokenOutput(
                    request_id=request.id,
                    token=choice.token,
                    logprobs=choice.logprobs,
                    finish_reason=request.finish_reason(),
                    metrics=request.metrics,
                    num_cached=request.num_cached,
                    prompt_logprobs=(request.prompt_logprobs or [None])
                    if first and scores
                    else None,
                )
            )
        return outputs


def num_cache_blocks(model: ErnieModel, config: EngineConfig) -> int:
    """Blocks of the pool: as many as memory allows, but not more than all seats can ever fill.

    Raises ConfigError when they do not hold a single text of max_model_len.
    """
    per_text = -(-config.max_model_len // config.block_size)
    size = block_bytes(model.config, config.block_size, model.activation_dtype)
    if config.num_gpu_blocks_override is not None:
        num_blocks = config.num_gpu_blocks_override
        advice = f"use num_gpu_blocks_override={per_text} or more, or a smaller max_model_len"
    else:
        memory = int(free_bytes(model.device) * config.gpu_memory_utilization)
        num_blocks = min(memory // size, config.max_num_seqs * per_text)
        advice = f"free memory ({per_text * size / 2**30:.2f} GiB needed) or lower max_model_len"
    if num_blocks < per_text:
        raise ConfigError(
            f"the cache has {num_blocks} blocks of {config.block_size} tokens, too few for one "
            f"text of max_model_len={config.max_model_len}; {advice}"
        )
    return num_blocks
