"""Rollouts against the plain generator, and against themselves in other company."""

from __future__ import annotations

import dataclasses

import pytest
import torch

import ernie
from ernie.fused import fuse, shallow_copy
from ernie.generate import choose as choose_one
from ernie.generate import generate
from ernie.models import TINY
from ernie.rollout import Sampling, choose, rollout


def model_of(name: str) -> ernie.ErnieModel:
    config = dataclasses.replace(TINY[name], vocab_size=97)
    model = ernie.ErnieModel(config, dtype=torch.float32)
    model.init_weights(seed=3, std=0.2)
    return model


PROMPTS = [[5, 9, 3], list(range(1, 33)), [7], list(range(40, 61))]  # 32 fills its blocks


@pytest.mark.parametrize("name", ["tiny-dense", "tiny-moe"])
@pytest.mark.parametrize("form", ["plain", "fused"])
def test_greedy_answers_and_log_probs_are_those_of_the_plain_generator(name, form) -> None:
    model = model_of(name)
    used = fuse(shallow_copy(model)) if form == "fused" else model
    found = rollout(used, PROMPTS, [[0, 1]] * 4, Sampling(40, temperature=0), stop_ids=[11])
    for prompt, (first, second) in zip(PROMPTS, found):
        ids = list(generate(model, prompt, max_tokens=40, stop_ids=[11]))
        assert first.token_ids == ids == second.token_ids
        assert first.is_cut == (ids[-1] != 11)
        logits = model.logits([*prompt, *ids])[len(prompt) - 1 : -1].log_softmax(-1)
        wanted = logits.gather(-1, torch.tensor(ids)[:, None])[:, 0]
        worst = (torch.tensor(first.log_probs) - wanted).abs().max()
        assert worst < 1e-4, worst


def test_an_answer_is_the_same_whatever_stands_beside_it() -> None:
    model = fuse(model_of("tiny-dense"))
    sampling = Sampling(30, temperature=1.1, top_p=0.95)
    seeds = [[10 * p + s for s in range(4)] for p in range(4)]
    together = rollout(model, PROMPTS, seeds, sampling, stop_ids=[11])
    waves = rollout(model, PROMPTS, seeds, sampling, stop_ids=[11], max_seqs=4)
    assert waves == together
    assert len({tuple(a.token_ids) for group in together for a in group}) == 16
    for p, prompt in enumerate(PROMPTS):
        for s, seed in enumerate(seeds[p]):
            [[alone]] = rollout(model, [prompt], [[seed]], sampling, stop_ids=[11])
            assert alone == together[p][s]


@pytest.mark.parametrize(
    "sampling", [Sampling(1, 0.7), Sampling(1, 1.3, top_p=0.6), Sampling(1, 1.0, 0.9, top_k=5)]
)
def test_draws_have_the_probabilities_that_were_asked_for(sampling: Sampling) -> None:
    logits_V = torch.randn(24, generator=torch.Generator().manual_seed(1)) * 2
    probs_V, order_V = (logits_V / sampling.temperature).softmax(-1).sort(descending=True)
    if sampling.top_k:
        probs_V[sampling.top_k :] = 0
    probs_V[(probs_V / probs_V.sum()).cumsum(0) - probs_V / probs_V.sum() >= sampling.top_p] = 0
    wanted_V = torch.zeros(24).scatter(0, order_V, probs_V / probs_V.sum())
    uniform_R = (torch.arange(20000, dtype=torch.float64) + 0.5) / 20000
    tokens_R, log_probs_R = choose(logits_V.expand(20000, -1), uniform_R, sampling)
    shares_V = torch.bincount(tokens_R, minlength=24) / 20000
    assert (shares_V - wanted_V).abs().max() < 1e-3
    own_R = logits_V.log_softmax(-1)[tokens_R]  # not those of the draw
    assert (log_probs_R - own_R).abs().max() < 1e-5


@pytest.mark.parametrize("top_k", [0, 5])
def test_the_likeliest_token_is_never_outside(top_k: int) -> None:
    logits_RV = torch.randn(4, 3000, generator=torch.Generator().manual_seed(1))
    uniform_R = torch.tensor([0.0, 0.3, 0.6, 0.99], dtype=torch.float64)
    best_R = logits_RV.argmax(-1)
    tokens_R, _ = choose(logits_RV, uniform_R, Sampling(1, top_p=0.0, top_k=top_k))
    assert torch.equal(tokens_R, best_R)
    one = choose_one(logits_RV[0], 1.0, 0.0, torch.Generator().manual_seed(2))
    assert one == int(best_R[0])


def test_top_p_sorts_the_vocabulary_where_the_likeliest_are_not_enough() -> None:
    logits_RV = torch.zeros(2, 5000)
    uniform_R = torch.tensor([0.0, 0.99], dtype=torch.float64)
    tokens_R, _ = choose(logits_RV, uniform_R, Sampling(1, top_p=0.9))
    assert tokens_R[0] == 0 and tokens_R[1] == int(0.99 * 4500)
