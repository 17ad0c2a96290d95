"""SamplingParams: one table of what is accepted and what is refused, with the field at fault."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from fastdeploy import GuidedDecodingParams, SamplingParams
from fastdeploy.errors import RequestError
from fastdeploy.sampling import MAX_SEED, filled, recommended

NAN, INF = float("nan"), float("inf")

REFUSED: list[tuple[str, Any]] = [
    *[("n", v) for v in (0, -1, 1.5, True, "2", 129, None)],
    *[("presence_penalty", v) for v in (-2.1, 2.1, NAN, INF, "1", True)],
    *[("frequency_penalty", v) for v in (-2.1, 2.1, NAN)],
    *[("repetition_penalty", v) for v in (0, -1, NAN, INF)],
    *[("temperature", v) for v in (-0.1, NAN, INF, "hot", True)],
    *[("top_p", v) for v in (-0.1, 1.1, NAN)],
    *[("top_k", v) for v in (-2, 1.5, True, None)],
    *[("min_p", v) for v in (-0.1, 1.1, NAN, None)],
    *[("seed", v) for v in (-1, MAX_SEED + 1, 1.5, True)],
    *[("max_tokens", v) for v in (0, -1, 1.5, True)],
    *[("min_tokens", v) for v in (-1, 1.5, None)],
    *[("logprobs", v) for v in (-2, 21, 1.0)],
    *[("prompt_logprobs", v) for v in (-2, 21)],
    *[("stop", v) for v in ("", [""], ["a", 1], ["a"] * 33, ["x" * 1025], 5)],
    *[("stop_token_ids", v) for v in ([-1], [1.5], ["1"], [True], [np.True_], [np.float32(1)], 5)],
    *[("bad_words", v) for v in ([""], [1])],
    *[("bad_words_token_ids", v) for v in ([-1], ["a"])],
    *[("logit_bias", v) for v in ({-1: 0}, {1: 101}, {1: NAN}, {"a": 1}, {5.7: 1}, [1])],
    *[("seed", v) for v in (np.float32(1), np.True_, np.int64(-1))],
    *[("temperature", v) for v in (np.float32(-1), np.float64(NAN), np.True_)],
    ("logits_processors_args", {"thinking_budget": 5}),
    *[("best_of", v) for v in (0, 129, 1.5, True)],
    *[("reasoning_max_tokens", v) for v in (0, -1, 1.5, "9")],
]
ACCEPTED: list[tuple[str, Any]] = [
    *[("n", v) for v in (1, 128)],
    *[("presence_penalty", v) for v in (-2, 0, 2, None)],
    *[("repetition_penalty", v) for v in (0.1, 5, None)],
    *[("temperature", v) for v in (0, 1e-9, 1e9, None)],
    *[("top_p", v) for v in (0, 1, 0.5, None)],
    *[("top_k", v) for v in (-1, 0, 1, 10**6)],
    *[("seed", v) for v in (0, MAX_SEED, None)],
    *[("best_of", v) for v in (1, 128, None)],
    *[("reasoning_max_tokens", v) for v in (1, 10**6, None)],
    *[("max_tokens", v) for v in (1, 2**31, None)],
    *[("min_tokens", v) for v in (0, 1, 9)],
    *[("logprobs", v) for v in (-1, 0, 20, None)],
    *[("stop", v) for v in ("x", ["x", "yy"], [], None)],
    *[("logit_bias", v) for v in ({}, {3: -100}, {3: 100.0}, {np.int64(3): 1}, None)],
    *[("stop_token_ids", v) for v in ([3], [np.int64(3)], [np.uint8(3), 4], [], None)],
    ("bad_words_token_ids", [np.int32(3)]),
    *[("seed", v) for v in (np.int64(3), np.uint8(3))],
    *[("temperature", v) for v in (np.float32(0.5), np.float64(0.5), np.int64(1))],
]


@pytest.mark.parametrize(("name", "value"), REFUSED, ids=repr)
def test_a_value_out_of_range_is_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(RequestError) as caught:
        SamplingParams(**{name: value})
    assert caught.value.param == name
    assert name in str(caught.value)


@pytest.mark.parametrize(("name", "value"), ACCEPTED, ids=repr)
def test_a_value_in_range_is_kept(name: str, value: Any) -> None:
    kept = getattr(SamplingParams(**{name: value}), name)
    assert kept == ([value] if name == "stop" and isinstance(value, str) else value)
    assert not isinstance(kept, list | dict) or {type(one) for one in kept} <= {int, str}
    assert type(kept) in (int, float, list, dict, type(None)), "none of another library"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"min_tokens": 5, "max_tokens": 4}, "min_tokens=5 is more than max_tokens=4"),
        ({"best_of": 2, "n": 3}, "best_of=2 is less than n=3"),
        ({"reasoning_max_tokens": 5, "max_tokens": 4}, "reasoning_max_tokens=5 is more than max_"),
        (
            {"logit_bias": {1: 1}, "logits_processors_args": {"logit_bias": {"2": 3}}},
            "logit_bias is given twice",
        ),
    ],
)
def test_settings_that_contradict_each_other(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message) as caught:
        SamplingParams(**settings)
    assert caught.value.param == next(iter(settings))


def test_logit_bias_of_processor_arguments_is_converted_or_a_type_error() -> None:
    params = SamplingParams(logits_processors_args={"logit_bias": {"3": "1.5"}})
    assert params.logit_bias == {3: 1.5}
    assert filled(params, {"top_p": 0.5}).logit_bias == {3: 1.5}, "a copy is no second time"
    none = SamplingParams(logit_bias={1: 1}, logits_processors_args={"logit_bias": {}})
    assert none.logit_bias == {1: 1}
    with pytest.raises(TypeError):
        SamplingParams(logits_processors_args={"logit_bias": {"x": 1}})
    for no_token in (5.7, True, -1):
        with pytest.raises(RequestError, match="which is not a token id"):
            SamplingParams(logits_processors_args={"logit_bias": {no_token: 1}})


def test_guided_decoding_takes_one_field_of_the_right_type() -> None:
    with pytest.raises(RequestError, match="2 were given"):
        GuidedDecodingParams(regex="a", choice=["b"])
    for wrong in (
        {"regex": 5},
        {"choice": []},
        {"choice": ["a", 1]},
        {"json": [1]},
        {"json": {1j: 2}},
    ):
        with pytest.raises(RequestError, match=f"{next(iter(wrong))}") as caught:
            GuidedDecodingParams(**wrong)
        assert caught.value.param == "guided_decoding"
    schema = GuidedDecodingParams(json={"type": "object"})
    assert (schema.kind, schema.text) == ("json", '{"type": "object"}')


def test_recommended_settings_fill_only_what_is_missing() -> None:
    defaults = recommended({"temperature": 0.8, "top_p": 0.7, "eos_token_id": 2, "do_sample": True})
    assert defaults == {"temperature": 0.8, "top_p": 0.7}
    params = filled(SamplingParams(top_p=0.5), defaults)
    assert (params.temperature, params.top_p) == (0.8, 0.5)
    with pytest.raises(RequestError, match="temperature=-1"):
        recommended({"temperature": -1})
