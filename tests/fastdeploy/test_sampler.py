"""The sampler against formulas: distributions, penalties, bans, log-probabilities, seeds."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from ernie.kernels import reference
from ernie.kernels.cpu import sampling
from fastdeploy.config import EarlyStop
from fastdeploy.engine.request import Order, Request
from fastdeploy.engine.sampler import Sampler, uniform
from fastdeploy.engine.scheduler import ScheduledRequest
from fastdeploy.sampling import SamplingParams

VOCAB = 300
NUM_DRAWS = 20_000


def request(prompt: list[int] | None = None, output: list[int] | None = None, **params: Any):
    order = Order(seed=params.pop("draw_seed", 1), banned=params.pop("banned", ()))
    extra = {name: params.pop(name) for name in ("eos_ids", "early_stop") if name in params}
    params = SamplingParams(**params)
    one = Request("r", prompt or [1], params, order, max_model_len=10_000, **extra)
    one.token_ids += output or []
    return one


def part(one: Request) -> ScheduledRequest:
    known = one.num_known
    return ScheduledRequest(one, known - 1, 1, new_blocks=[], num_logits=1, chooses=True)


def sample(logits_RV: Tensor, requests: list[Request]) -> list[int]:
    choices = Sampler(logits_RV.shape[-1])(logits_RV.clone(), [part(one) for one in requests])
    return [choice.token for (choice,) in choices]


def some_logits(seed: int = 0, rows: int = 1, scale: float = 2.0) -> Tensor:
    return torch.randn(rows, VOCAB, generator=torch.Generator().manual_seed(seed)) * scale


def kept_by_definition(
    logits_V: Tensor, temperature: float, min_p: float, top_k: int, top_p: float
) -> Tensor:
    """The distribution, written down token by token."""
    weights = {i: math.exp(value / temperature) for i, value in enumerate(logits_V.tolist())}
    best = max(weights.values())
    weights = {i: w for i, w in weights.items() if w >= min_p * best}
    order = sorted(weights, key=lambda i: -weights[i])
    order = order[:top_k] if top_k > 0 else order
    total, mass, kept = sum(weights[i] for i in order), 0.0, {}
    for i in order:
        if mass >= top_p * total:
            break
        kept[i] = weights[i]
        mass += weights[i]
    probs = torch.zeros(len(logits_V), dtype=torch.float64)
    for i, weight in kept.items():
        probs[i] = weight / mass
    return probs


@pytest.mark.parametrize("draw", [reference.draw, sampling.draw], ids=["reference", "cpu"])
@pytest.mark.parametrize(
    ("temperature", "min_p", "top_k", "top_p"),
    [
        (1.0, 0.0, 0, 1.0),
        (0.6, 0.0, 0, 1.0),
        (1.0, 0.05, 0, 1.0),
        (1.0, 0.0, 5, 1.0),
        (1.0, 0.0, 0, 0.6),
        (1.3, 0.0, 20, 0.7),
        (0.9, 0.02, 50, 0.9),
        (3.0, 0.0, 0, 0.98),  # more tokens than the first and the second candidates hold
    ],
)
def test_draws_follow_the_distribution(
    temperature: float,
    min_p: float,
    top_k: int,
    top_p: float,
    draw: Callable,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sampling, "NUM_CANDIDATES", 12)
    logits_V = some_logits()[0]
    expected_V = kept_by_definition(logits_V, temperature, min_p, top_k, top_p)

    def column(value: float, dtype: torch.dtype = torch.float64) -> Tensor:
        return torch.full((NUM_DRAWS,), value, dtype=dtype)

    uniforms = (torch.arange(NUM_DRAWS, dtype=torch.float64) + 0.5) / NUM_DRAWS
    tokens = draw(
        logits_V.expand(NUM_DRAWS, -1),
        column(temperature),
        column(min_p),
        column(top_k, torch.int64),
        column(top_p),
        uniforms,
    )
    counts_V = torch.bincount(tokens, minlength=VOCAB).double()
    assert set(counts_V.nonzero()[:, 0].tolist()) <= set(expected_V.nonzero()[:, 0].tolist())
    # Evenly spaced uniforms hit every interval to within one draw at either end.
    error = (counts_V - expected_V * NUM_DRAWS).abs().max()
    assert error <= 2, f"a count is off by {error:.2f} of {NUM_DRAWS}"


def test_uniforms_are_uniform_and_differ_by_seed_sample_and_position() -> None:
    values = torch.tensor(
        [uniform((s, i), p) for s in range(20) for i in range(5) for p in range(50)]
    )
    counts = torch.histc(values, bins=20, min=0, max=1)
    chi_square = ((counts - 250) ** 2 / 250).sum().item()
    assert chi_square < 43.8, f"{chi_square:.1f} with 19 degrees of freedom"  # p = 0.001
    assert len(values.unique()) > 4990


def test_greedy_takes_the_smallest_of_equal_tokens() -> None:
    logits = torch.zeros(1, VOCAB)
    logits[0, [7, 9, 200]] = 3.0
    for settings in ({"temperature": 0}, {"top_k": 1}, {"top_p": 0.0}):
        assert sample(logits, [request(**settings)]) == [7]


def test_extreme_temperatures_stay_in_range() -> None:
    logits = some_logits(scale=50.0)
    assert sample(logits, [request(temperature=1e-300)]) == [int(logits.argmax())]
    hot = {sample(logits, [request(temperature=1e9, draw_seed=i)])[0] for i in range(50)}
    assert len(hot) > 30 and max(hot) < VOCAB


def test_a_seeded_choice_does_not_depend_on_its_neighbours() -> None:
    logits = some_logits(rows=6)
    alone = [sample(logits[i : i + 1], [request(draw_seed=i, top_p=0.9)])[0] for i in range(6)]
    others = [{"temperature": 0}, {"top_k": 3}, {"min_p": 0.1}, {}, {"temperature": 2.0}]
    for i in range(6):
        requests = [request(draw_seed=50 + j, **others[j % 5]) for j in range(6)]
        requests[i] = request(draw_seed=i, top_p=0.9)
        assert sample(logits, requests)[i] == alone[i], f"row {i}"


def test_a_choice_depends_on_the_position_not_on_how_often_it_was_asked() -> None:
    logits = some_logits()
    once = [sample(logits, [request(output=[3] * n)])[0] for n in range(30)]
    again = [sample(logits, [request(output=[3] * n)])[0] for n in range(30)]
    assert once == again and len(set(once)) > 10


def test_penalties_equal_their_formulas() -> None:
    prompt, output = [4, 4, 5], [6, 6, 6, 5, 7]
    one = request(
        prompt,
        output,
        temperature=0,
        presence_penalty=0.5,
        frequency_penalty=0.25,
        repetition_penalty=1.5,
        logit_bias={8: 2.0},
        banned=[(9,), (6, 5, 7, 10), (7, 11), (5, 12), (4, 4, 5, 6, 6, 6, 5, 7, 13)],
    )
    logits = some_logits(seed=4)
    adjusted = logits.clone()
    Sampler(VOCAB)(adjusted, [part(one)])
    expected = logits[0].clone()
    for token in range(VOCAB):
        value, count = logits[0, token].item(), output.count(token)
        if token in prompt + output:
            value = value / 1.5 if value > 0 else value * 1.5
        value -= 0.25 * count + 0.5 * (count > 0)
        value += 2.0 if token == 8 else 0.0
        # Of the runs, 6 5 7 and 7 have just been generated; 5 has not, and 4 4 5 is the prompt's.
        expected[token] = -math.inf if token in (9, 10, 11) else value
    torch.testing.assert_close(adjusted[0], expected)


def test_penalties_follow_the_tokens_as_they_come() -> None:
    logits = torch.zeros(1, VOCAB)
    logits[0, :4] = torch.tensor([1.0, 0.9, 0.8, 0.7])
    one = request([9], temperature=0, presence_penalty=2.0)
    for expected in (0, 1, 2, 3):
        assert sample(logits, [one]) == [expected]
        one.token_ids.append(expected)


def test_what_ends_the_text_is_banned_before_min_tokens() -> None:
    logits = torch.zeros(1, VOCAB)
    logits[0, 2], logits[0, 5], logits[0, 6] = 3.0, 2.0, 1.0
    settings = {"temperature": 0, "min_tokens": 3, "stop_token_ids": [5], "eos_ids": [2]}
    assert sample(logits, [request(output=[9], **settings)]) == [6]
    assert sample(logits, [request(output=[9, 9], **settings)]) == [2]
    settings["ignore_eos"] = True
    assert sample(logits, [request(output=[9], **settings)]) == [2]


@pytest.mark.parametrize("temperature", [0, 1])
def test_an_answer_that_may_go_on_with_no_token_ends_as_an_error(temperature: float) -> None:
    everything = [(token,) for token in range(VOCAB)]
    never = {"temperature": temperature, "max_tokens": 9}
    stuck = request(**never, banned=everything)
    early = request(**never, eos_ids=range(VOCAB), min_tokens=2)
    free = request(**never)
    most = request(**never, banned=everything[1:])  # token 0 is not nothing
    requests = [free, stuck, most, early]
    tokens = sample(some_logits(rows=4), requests)
    for one, token in zip(requests, tokens):
        one.token_ids.append(token)
    assert [one.finish_reason() for one in requests] == [None, "error", None, "error"]
    assert tokens[2] == 0
    assert "no token is left" in stuck.end.error


@pytest.mark.parametrize(
    ("banned_after", "draft_ids", "tokens", "num_tokens"),
    [
        (7, [7, 7], [7, 0], 2),  # nothing may follow the first draft
        (7, [0, 7], [7], None),  # the draft is not accepted, nor what stands behind it
        (9, [9, 7], [7], None),
        (9, [7, 7], [7, 7, 7], None),
        (7, [7, 0], [7, 0, 7], 2),  # what is void agrees with a draft
    ],
)
def test_drafts_without_a_token_behind_them_end_what_accepts_them(
    banned_after: int, draft_ids: list[int], tokens: list[int], num_tokens: int | None
) -> None:
    logits = torch.zeros(3, VOCAB)
    logits[:, 7] = 5.0
    one = request(temperature=0, banned=[(banned_after, token) for token in range(VOCAB)])
    row = ScheduledRequest(one, 0, 3, [], num_logits=3, chooses=True, draft_ids=draft_ids)
    (choices,) = Sampler(VOCAB)(logits, [row])
    assert [choice.token for choice in choices] == tokens
    assert (one.end.num_tokens if one.end else None) == num_tokens


@pytest.mark.parametrize("num_top", [0, 3, -1])
def test_logprobs_are_those_of_the_raw_logits(num_top: int) -> None:
    logits = some_logits(rows=2)
    settings = {"temperature": 0.5, "top_k": 4, "presence_penalty": 1.0}
    plain, described = request(**settings), request(**settings, logprobs=num_top)
    (first,), (second,) = Sampler(VOCAB)(logits.clone(), [part(plain), part(described)])
    assert first.logprobs is None
    entry = second.logprobs
    expected_V = logits[1].double().log_softmax(-1)
    order = expected_V.argsort(descending=True).tolist()
    wanted = {second.token, *order[: VOCAB if num_top < 0 else num_top]}
    assert set(entry) == wanted and next(iter(entry)) == second.token
    for token, value in entry.items():
        assert value.logprob == pytest.approx(expected_V[token].item(), abs=1e-5)
        assert value.rank == order.index(token) + 1


def test_temperature_scaled_logprobs() -> None:
    logits = some_logits()
    one = request(temperature=0.5, logprobs=0, temp_scaled_logprobs=True)
    choice = Sampler(VOCAB)(logits.clone(), [part(one)])[0][0]
    expected = (logits[0] / 0.5).log_softmax(-1)[choice.token].item()
    assert choice.logprobs[choice.token].logprob == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize(
    ("top_p", "temperature"), [(0.5, 1.0), (0.9, 0.5), (1.0, 1.0), (0.0, 1.0), (None, 1.0)]
)
def test_top_p_normalized_logprobs_add_up_within_the_nucleus(
    top_p: float | None, temperature: float
) -> None:
    logits = some_logits(seed=2)
    settings = {"temp_scaled_logprobs": True, "top_p_normalized_logprobs": True, "logprobs": -1}
    one = request(temperature=temperature, top_p=top_p, **settings)
    ((choice,),) = Sampler(VOCAB)(logits.clone(), [part(one)])
    entry = choice.logprobs
    share = 1.0 if top_p is None else max(top_p, 1e-9)
    expected_V = kept_by_definition(logits[0], temperature, 0.0, 0, share)
    for token, value in entry.items():
        wanted = math.log(expected_V[token]) if expected_V[token] else -9999.0
        assert value.logprob == pytest.approx(wanted, abs=1e-4), token
    assert len(entry) == VOCAB


def test_a_text_ends_when_the_model_was_sure_of_so_many_tokens_in_a_row() -> None:
    one = request(early_stop=EarlyStop(window_size=3, threshold=0.9), temperature=0, min_tokens=0)
    sure, unsure = torch.zeros(1, VOCAB), some_logits(scale=0.1)
    sure[0, 7] = 20.0
    reasons = []
    for logits in (sure, sure, unsure, sure, sure, sure):
        one.token_ids += sample(logits, [one])
        reasons.append(one.finish_reason())
    assert reasons == [None] * 5 + ["repetition"]


def test_the_logprob_of_a_choice_is_known_to_those_who_need_it() -> None:
    logits = some_logits(rows=3)
    requests = [request(), request(best_of=2), request(early_stop=EarlyStop())]
    choices = [some[0] for some in Sampler(VOCAB)(logits.clone(), [part(r) for r in requests])]
    assert choices[0].logprob is None
    for row, choice in enumerate(choices[1:], 1):
        expected = logits[row].log_softmax(-1)[choice.token].item()
        assert choice.logprob == pytest.approx(expected, abs=1e-5) and choice.logprobs is None
