"""Ten thousand requests of every kind through engines with more and less room: each ends once, and
nothing is left.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from ernie.model import ErnieModel
from ernie.models import TINY
from fastdeploy.config import EngineConfig
from fastdeploy.engine.loading import make_engine
from fastdeploy.engine.request import Order
from fastdeploy.engine.scheduler import Schedule
from fastdeploy.engine.thinking import ThinkTags
from fastdeploy.sampling import SamplingParams

VOCAB = TINY["tiny-dense"].vocab_size
LIKELY = 4  # the tokens below it
TAGS = ThinkTags(start=0, end=1, closing=(1,))
PRIORITIES = (0, 0, 0, -1, 1)
SALTS = (None, None, "a", "b")
LITTLE_ROOM = {"block_size": 2, "num_gpu_blocks_override": 33}  # one text's, and a block
STOP_STRING = [3, 2]  # as tokens, of every fifth request


class RandomRunner:
    """Random logits in place of a network, peaked on few tokens, so that drafts come true."""

    def __init__(self) -> None:
        self.generator = torch.Generator().manual_seed(0)
        self.most_tokens = 0

    def run(self, schedule: Schedule) -> Tensor:
        self.most_tokens = max(self.most_tokens, schedule.num_tokens)
        rows = sum(part.num_logits for part in schedule.parts)
        logits_RV = torch.randn(rows, VOCAB, generator=self.generator)
        logits_RV[:, :LIKELY] += 6.0
        return logits_RV


def some_request(rng: random.Random, number: int) -> tuple[list[int], SamplingParams]:
    """A prompt that often begins like others, and settings of every kind."""
    family = rng.randrange(5)
    prompt = [(family + 3 * i) % VOCAB for i in range(rng.choice((1, 2, 8, 17)))]
    prompt += [rng.randrange(VOCAB) for _ in range(rng.randrange(12))]
    settings = rng.choice(
        (
            {"temperature": 0},
            {"n": 2},
            {"top_p": 0.8},
            {"stop_token_ids": [2], "min_tokens": 3},
            {"frequency_penalty": 0.5},
            {"logprobs": 1},
            {"prompt_logprobs": 0},
            {"reasoning_max_tokens": rng.randrange(1, 4)},
            {"reasoning_max_tokens": 2, "response_max_tokens": 4, "n": 2},
        )
    )
    if "reasoning_max_tokens" in settings:
        prompt.append(TAGS.start)
    return prompt, SamplingParams(max_tokens=rng.choice((3, 4, 5, 24)), seed=number, **settings)


def thought_size(answer: Sequence[int]) -> int:
    """Tokens within thoughts, of which the prompt has begun the first."""
    size, is_open = 0, True
    for token in answer:
        if token == TAGS.end:
            is_open = False
        elif is_open:
            size += 1
        elif token == TAGS.start:
            is_open = True
    return size


@pytest.mark.parametrize(
    ("num_requests", "options"),
    [
        (4000, {"block_size": 4, "num_gpu_blocks_override": 32}),
        (3000, LITTLE_ROOM | {"enable_prefix_caching": False}),
        (3000, LITTLE_ROOM | {"early_stop_config": {"window_size": 8, "threshold": 0.1}}),
    ],
    ids=["some room", "little room and nothing cached", "little room and early stops"],
)
def test_every_request_ends_once_and_no_block_is_left(
    num_requests: int, options: dict[str, Any]
) -> None:
    drafts = {"method": "ngram", "num_speculative_tokens": 4}
    options = options | {"max_num_seqs": 12, "max_num_batched_tokens": 48, "enable_logprob": True}
    config = EngineConfig(model="random", max_model_len=64, speculative_config=drafts, **options)
    config = config.resolved(max_positions=64, device_type="cpu")
    engine = make_engine(ErnieModel(TINY["tiny-dense"]), config, think_tags=TAGS)
    engine.runner = runner = RandomRunner()
    rng, steps, num_outputs = random.Random(0), 0, 0
    answers: dict[str, list[int]] = {}
    budgets: dict[str, int] = {}
    ends: dict[str, str] = {}  # why each request has ended
    while len(answers) < num_requests or engine.has_work:
        while len(answers) < num_requests and len(engine.requests) < rng.randrange(30):
            prompt, params = some_request(rng, len(answers))
            place = Order(priority=rng.choice(PRIORITIES), cache_salt=rng.choice(SALTS))
            for index in range(params.n):
                name = str(len(answers))
                engine.add(name, prompt, params, replace(place, sample_index=index))
                answers[name] = []
                if params.reasoning_max_tokens is not None:
                    budgets[name] = params.reasoning_max_tokens
        for output in engine.step():
            name, num_outputs = output.request_id, num_outputs + 1
            if ends.get(name) == "stop string":
                continue  # an earlier token of the same step has ended it
            assert name not in ends, f"{name} goes on after its end by {ends[name]}"
            answers[name].append(output.token)
            if output.finish_reason is not None:
                ends[name] = output.finish_reason
            elif int(name) % 5 == 0 and answers[name][-2:] == STOP_STRING:
                engine.abort(name)
                ends[name] = "stop string"
        steps += 1
        if steps % 20 == 0 and engine.requests:
            name = rng.choice(list(engine.requests))
            engine.abort(name)
            ends[name] = "abort"
        if steps % 25 == 0:
            engine.scheduler.check()
    assert ends.keys() == answers.keys()
    ways = {"stop", "length", "stop string", "abort"}
    ways |= {"repetition"} if "early_stop_config" in options else set()
    assert set(ends.values()) == ways
    sizes = {name: thought_size(answers[name]) for name in budgets}
    over = {name: sizes[name] for name, budget in budgets.items() if sizes[name] > budget}
    assert not over, f"thoughts longer than their budget: {over}"
    num_used_up = sum(sizes[name] == budget for name, budget in budgets.items())
    assert num_used_up > len(budgets) / 4, f"{num_used_up} of {len(budgets)} budgets are used up"
    stats = engine.stats()
    assert stats.num_free_blocks == stats.num_blocks and not engine.blocks.num_in_use, f"{stats}"
    assert stats.num_generated_tokens == num_outputs
    assert stats.num_preemptions > num_requests / 50, f"{stats}"
    assert (stats.num_hit_tokens > num_requests) == config.enable_prefix_caching, f"{stats}"
    assert runner.most_tokens <= 48
    assert stats.num_accepted_tokens > num_requests / 20, f"{stats}"
