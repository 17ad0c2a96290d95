"""Ten thousand requests of every kind through one engine: each ends once, and nothing is left."""

from __future__ import annotations

import random
from collections import Counter

import torch
from torch import Tensor

from ernie.model import ErnieModel
from ernie.models import TINY
from fastdeploy.config import EngineConfig
from fastdeploy.engine.core import Engine
from fastdeploy.engine.scheduler import Schedule
from fastdeploy.sampling import SamplingParams

NUM_REQUESTS = 10_000
VOCAB = TINY["tiny-dense"].vocab_size


class RandomRunner:
    """Random logits in place of a network, peaked on few tokens, so that drafts come true."""

    def __init__(self) -> None:
        self.generator = torch.Generator().manual_seed(0)
        self.most_tokens = 0

    def run(self, schedule: Schedule) -> Tensor:
        self.most_tokens = max(self.most_tokens, schedule.num_tokens)
        rows = sum(part.num_logits for part in schedule.parts)
        logits_RV = torch.randn(rows, VOCAB, generator=self.generator)
        logits_RV[:, :4] += 6.0
        return logits_RV


def some_request(rng: random.Random, number: int) -> tuple[list[int], SamplingParams]:
    """A prompt that often begins like others, and settings of every kind."""
    family = rng.randrange(5)
    prompt = [(family + 3 * i) % VOCAB for i in range(rng.choice((1, 2, 8, 17)))]
    prompt += [rng.randrange(VOCAB) for _ in range(rng.randrange(12))]
    settings = rng.choice(
        (
            {"temperature": 0},
            {},
            {"top_p": 0.8},
            {"stop_token_ids": [2], "min_tokens": 3},
            {"frequency_penalty": 0.5},
            {"logprobs": 1},
            {"prompt_logprobs": 0},
        )
    )
    return prompt, SamplingParams(max_tokens=rng.choice((3, 4, 5, 24)), seed=number, **settings)


def test_every_request_ends_once_and_no_block_is_left() -> None:
    drafts = {"method": "ngram", "num_speculative_tokens": 4}
    settings = {"block_size": 4, "num_gpu_blocks_override": 32, "max_model_len": 64}
    settings |= {"max_num_seqs": 12, "max_num_batched_tokens": 48, "enable_logprob": True}
    config = EngineConfig(model="random", speculative_config=drafts, **settings)
    config = config.resolved(max_positions=64, device_type="cpu")
    engine = Engine(ErnieModel(TINY["tiny-dense"]), config)
    engine.runner = runner = RandomRunner()
    rng, added, aborted, steps = random.Random(0), 0, set(), 0
    ends, lengths = Counter(), Counter()
    while added < NUM_REQUESTS or engine.has_work:
        while added < NUM_REQUESTS and len(engine.requests) < rng.randrange(30):
            engine.add(str(added), *some_request(rng, added))
            added += 1
        for output in engine.step():
            lengths[output.request_id] += 1
            if output.finish_reason is not None:
                ends[output.request_id] += 1
        steps += 1
        if steps % 20 == 0 and engine.requests:
            victim = rng.choice(list(engine.requests))
            engine.abort(victim)
            aborted.add(victim)
        if steps % 25 == 0:
            engine.scheduler.check()
    stats = engine.stats()
    assert set(ends.values()) == {1} and not aborted & set(ends)
    assert len(ends) + len(aborted) == NUM_REQUESTS
    assert stats.num_free_blocks == stats.num_blocks and not engine.blocks.num_in_use, f"{stats}"
    assert stats.num_generated_tokens == sum(lengths.values())
    assert stats.num_preemptions > 100 and stats.num_hit_tokens > 1000, f"{stats}"
    assert runner.most_tokens <= 48
    assert stats.num_accepted_tokens > 500, f"{stats}"
