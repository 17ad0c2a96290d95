"""What a request may ask of the engine beyond its text: salts, priorities, choices, budgets."""

from __future__ import annotations

import dataclasses
import itertools
import math
import random

import helpers_tokenizer
import pytest
import torch

from ernie import Tokenizer
from ernie.model import ErnieModel
from ernie.models import TINY
from fastdeploy import LLM, SamplingParams
from fastdeploy.engine.thinking import Thinking, ThinkTags
from fastdeploy.errors import RequestError

GREEDY = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
PROMPT = "Hello! The quick brown fox"


def test_prompts_of_different_salts_share_no_blocks(llm: LLM) -> None:
    ids = [(11 * i + 1) % 500 for i in range(40)]
    prompts = [{"prompt": ids}, *({"prompt": ids, "cache_salt": s} for s in ("a", "b"))]
    answers = [llm.generate(prompt, GREEDY)[0] for prompt in prompts * 2]
    assert [answer.num_cached_tokens for answer in answers] == [0, 0, 0, 32, 32, 32]
    assert len({tuple(answer.outputs.token_ids) for answer in answers}) == 1


def test_a_misspelt_salt_is_refused(llm: LLM) -> None:
    for prompt, message in (
        ({"prompt": "x", "cache_slat": "a"}, "the key 'cache_slat'"),
        ({"prompt": "x", "cache_salt": ""}, "cache_salt=''; it takes a text"),
        ({"prompt": "x", "cache_salt": 5}, "cache_salt=5; it takes a text"),
    ):
        with pytest.raises(RequestError, match=message):
            llm.generate(prompt, GREEDY)


def test_a_lower_priority_number_is_answered_first(folder) -> None:
    llm = LLM(str(folder), dtype="float32", max_model_len=64, max_num_seqs=1)
    finished = []
    for pieces in llm.generate(["a", "b", "c"], GREEDY, stream=True, priority=[1, 0, -1]):
        finished += [i for i, piece in enumerate(pieces) if piece and piece.finished]
    assert finished == [2, 1, 0]
    with pytest.raises(RequestError, match="2 priorities for 1 prompts"):
        llm.generate("a", GREEDY, priority=[1, 2])
    with pytest.raises(RequestError, match=r"priority=0\.5 is not an integer"):
        llm.generate("a", GREEDY, priority=0.5)


def test_the_best_are_those_with_the_highest_mean_logprob(llm: LLM, folder) -> None:
    settings = {"seed": 4, "max_tokens": 16, "stop": ["e", "o"], "temperature": 1.5}
    (every,) = llm.generate(PROMPT, SamplingParams(n=6, logprobs=0, **settings))
    means = []
    for one in every.outputs:
        values = [entry[token].logprob for token, entry in zip(one.token_ids, one.logprobs)]
        means.append(sum(values) / len(values))
    order = sorted(range(6), key=lambda i: -means[i])
    assert len({len(one.token_ids) for one in every.outputs}) > 1 and order[:2] != [0, 1]
    plain = LLM(str(folder), dtype="float32", max_model_len=128)  # logprobs are not enabled
    (best,) = plain.generate(PROMPT, SamplingParams(n=2, best_of=6, **settings))
    assert [one.text for one in best.outputs] == [every.outputs[i].text for i in order[:2]]
    assert [one.index for one in best.outputs] == [0, 1]
    for one, i in zip(best.outputs, order):
        assert one.mean_logprob == pytest.approx(means[i], abs=1e-5) and one.logprobs is None
    with pytest.raises(RequestError, match="best_of=6 with n=2 cannot be streamed"):
        plain.generate(PROMPT, SamplingParams(n=2, best_of=6), stream=True)


def test_a_bad_word_of_several_tokens_is_never_said(llm: LLM) -> None:
    free = llm.generate(PROMPT, GREEDY)[0].outputs[0]
    ids, encode = free.token_ids, llm.tokenizer.encode
    spans = [ids[i:j] for i, j in itertools.combinations(range(len(ids) + 1), 2) if j - i in (2, 3)]
    words = [llm.tokenizer.decode(span) for span in spans]
    found = [(span, word) for span, word in zip(spans, words) if encode(word) == span]
    assert found, "no part of the answer is cut by the tokenizer as the model has said it"
    for span, word in found:
        params = dataclasses.replace(GREEDY, bad_words=[word])
        said = llm.generate(PROMPT, params)[0].outputs[0].token_ids
        at = next(i for i in range(len(ids)) if ids[i : i + len(span)] == span) + len(span) - 1
        assert said[:at] == ids[:at], f"{word!r} was banned before its last token"
        runs = [said[i : i + len(span)] for i in range(len(said))]
        assert span not in runs, f"{word!r} was said"


@pytest.mark.parametrize("threshold", [1e-9, 0.999999])
def test_a_text_that_repeats_itself_is_ended(folder, threshold: float) -> None:
    config = {"window_size": 5, "threshold": threshold}
    llm = LLM(str(folder), dtype="float32", max_model_len=64, early_stop_config=config)
    out = llm.generate(PROMPT, SamplingParams(temperature=0, max_tokens=9, ignore_eos=True))[0]
    ended = ("stop", "repetition", 5) if threshold < 0.5 else ("length", None, 9)
    one = out.outputs[0]
    assert (one.finish_reason, one.stop_reason, len(one.token_ids)) == ended
    assert one.text == llm.tokenizer.decode(one.token_ids, skip_special=True)


def test_tokens_of_an_interrupted_step_count_once_for_an_early_stop(folder) -> None:
    config = {"window_size": 5, "threshold": 1e-9}
    llm = LLM(str(folder), dtype="float32", max_model_len=64, early_stop_config=config)

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    stream = llm.generate(PROMPT, GREEDY, stream=True)
    (first,) = next(stream)
    with pytest.MonkeyPatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(llm.engine, "pooler", interrupted)
        llm.generate("a", GREEDY)
    for (piece,) in stream:
        first.add(piece)
    assert (len(first.outputs.token_ids), first.outputs.stop_reason) == (5, "repetition")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"early_stop_config": "{"}, "early_stop_config is not JSON"),
        ({"early_stop_config": "[1]"}, "early_stop_config is a list"),
        ({"early_stop_config": {"window": 5}}, "did you mean 'window_size'"),
        ({"early_stop_config": {"window_size": 0}}, "window_size=0 is too small"),
        ({"early_stop_config": {"threshold": 1.0}}, r"threshold=1\.0 is not"),
        ({"early_stop_config": {"strategy": "luck"}}, "strategy='luck' is not known"),
        (
            {"enable_early_stop": True, "early_stop_config": '{"enable_early_stop": false}'},
            "leave out one of the two",
        ),
        ({"think_stop_sentence": "</think>"}, "the tokenizer has no <think>"),
    ],
)
def test_a_wrong_option_is_refused_in_a_sentence(folder, options, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LLM(str(folder), max_model_len=64, **options)


# --- thoughts ---


def thinker(path, **options) -> LLM:
    """A random model whose tokenizer has the tags."""
    folder = path / "thinker"
    helpers_tokenizer.sentencepiece_folder(folder, thinking=True)
    tokenizer = Tokenizer.from_folder(folder)
    config = dataclasses.replace(TINY["tiny-dense"], vocab_size=tokenizer.vocab_size)
    model = ErnieModel(config, dtype=torch.float32)
    model.init_weights(seed=3, std=0.3)
    model.tokenizer = tokenizer
    settings = {"max_model_len": 64, "block_size": 8, "enable_logprob": True}
    return LLM(model, **settings, **options)


@pytest.fixture(scope="module")
def mind(tmp_path_factory: pytest.TempPathFactory) -> LLM:
    return thinker(tmp_path_factory.mktemp("a"))


def tags_of(llm: LLM) -> tuple[int, int]:
    return llm.tokenizer.id_of("<think>"), llm.tokenizer.id_of("</think>")


def answer(llm: LLM, ids: list[int], **settings: object) -> list[int]:
    params = SamplingParams(**({"temperature": 0, "ignore_eos": True, "max_tokens": 20} | settings))
    return llm.generate(ids, params)[0].outputs[0].token_ids


@pytest.mark.parametrize("budget", [1, 7, 20])
@pytest.mark.parametrize("temperature", [0, 1.0])
def test_a_thought_is_closed_when_its_budget_is_used_up(
    mind: LLM, budget: int, temperature: float
) -> None:
    start, end = tags_of(mind)
    prompt = [5, 6, start, 9]
    settings = {"temperature": temperature, "seed": 8}
    free = answer(mind, prompt, **settings)
    assert end not in free
    held = answer(mind, prompt, reasoning_max_tokens=budget, **settings)
    assert len(held) == 20, "closing tokens count as all others"
    assert held[: budget + 1] == [*free[:budget], end][:20]
    if temperature == 0 and budget < 20:
        rest = answer(mind, [*prompt, *held[: budget + 1]], max_tokens=19 - budget)
        assert held[budget + 1 :] == rest, "the answer is not that of the closed thought"


def test_forced_tokens_have_their_true_logprobs(mind: LLM) -> None:
    start, end = tags_of(mind)
    params = SamplingParams(
        temperature=0, ignore_eos=True, max_tokens=6, reasoning_max_tokens=3, logprobs=0
    )
    (out,) = mind.generate([5, start], params)
    ids = [5, start, *out.outputs[0].token_ids]
    assert ids[5] == end
    wanted = mind.engine.runner.model.logits(ids[:5])[-1].log_softmax(-1)[end].item()
    assert out.outputs[0].logprobs[3][end].logprob == pytest.approx(wanted, abs=1e-4)
    assert wanted < math.log(0.5), "the model would have said it by itself"


def test_a_prompt_whose_thought_is_closed_leaves_the_answer_alone(mind: LLM) -> None:
    start, end = tags_of(mind)
    for prompt in ([5, 6], [start, 9, end, 6]):
        assert answer(mind, prompt, reasoning_max_tokens=2) == answer(mind, prompt)


@pytest.mark.parametrize(("thoughts", "most"), [(3, 5), (7, 1), (30, 2)])
def test_the_answer_after_the_thoughts_has_a_bound_of_its_own(
    mind: LLM, thoughts: int, most: int
) -> None:
    start, _ = tags_of(mind)
    settings = {"temperature": 0, "reasoning_max_tokens": thoughts, "max_tokens": 40}
    free = answer(mind, [5, 6, start, 9], **settings)
    held = answer(mind, [5, 6, start, 9], response_max_tokens=most, **settings)
    assert held == free[: thoughts + 1 + most], "thoughts, their tag, the answer"
    assert (
        answer(mind, [5, 6], response_max_tokens=most, max_tokens=40)
        == (answer(mind, [5, 6], max_tokens=40)[:most])
    )


def test_a_budget_outlives_a_preemption(tmp_path) -> None:
    sentence = "so</think>then"
    roomy = thinker(tmp_path / "roomy", think_stop_sentence=sentence)
    tight = thinker(
        tmp_path / "tight", think_stop_sentence=sentence, num_gpu_blocks_override=8, max_num_seqs=4
    )
    start, _ = tags_of(roomy)
    prompts = [[i, start] for i in range(10, 14)]
    params = SamplingParams(temperature=0, ignore_eos=True, max_tokens=40, reasoning_max_tokens=16)
    expected = [roomy.generate(prompt, params)[0].outputs[0].token_ids for prompt in prompts]
    got = [out.outputs[0].token_ids for out in tight.generate(prompts, params)]
    assert tight.engine.stats().num_preemptions > 0
    assert got == expected
    closing = roomy.tokenizer.encode(sentence, allow_special=True)
    assert len(closing) > 3 and got[0][16 : 16 + len(closing)] == closing


def test_thoughts_share_the_budget_and_a_repeated_tag_uses_it() -> None:
    thinking = Thinking(ThinkTags(1, 2, (8, 2)), 3, [1, 5, 2])
    text = [1, 5, 2]
    forced = []
    for token in (7, 1, 5, 1, 2, 1, 5, None, None, 7, 1, None, None):
        (must,) = thinking.forced(text)
        forced.append(must)
        assert (token is None) == (must is not None), forced
        text.append(must if token is None else token)
    assert [f for f in forced if f is not None] == [8, 2, 8, 2]


def test_what_is_forced_does_not_depend_on_how_many_tokens_come_at_once() -> None:
    """Drafts of every number, right and wrong, before any of them is known."""
    tags, rng, num_forced = ThinkTags(1, 2, (8, 2, 9)), random.Random(0), 0
    for budget in range(1, 9):
        text, alone = [1, 5], Thinking(tags, budget, [1, 5])
        must = []  # after each token
        for _ in range(60):
            must += alone.forced(text)
            text.append(rng.choice((1, 2, 5, 5, 5, 8)) if must[-1] is None else must[-1])
        num_forced += len(must) - must.count(None)
        together, known = Thinking(tags, budget, [1, 5]), 2
        while known + 5 < len(text):
            drafts = text[known : known + rng.randrange(6)]
            expected = must[known - 2 :][: len(drafts) + 1]
            assert together.forced(text[:known], drafts) == expected
            wrong = [i for i, token in enumerate(expected[:-1]) if token is not None]
            if wrong:
                drafts[wrong[0]] += 20
                assert together.forced(text[:known], drafts) == expected[: wrong[0] + 1]
            known += rng.randrange(1, 6)
    assert num_forced > 40, num_forced


def test_a_budget_needs_tags_and_a_sentence_needs_the_closing_one(llm: LLM, tmp_path) -> None:
    with pytest.raises(RequestError, match="this model has no tags around its thoughts"):
        llm.generate("x", SamplingParams(reasoning_max_tokens=5))
    with pytest.raises(ValueError, match="does not close the thought"):
        thinker(tmp_path, think_stop_sentence="enough")
