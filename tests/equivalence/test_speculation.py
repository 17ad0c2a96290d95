"""Drafts change how fast a text grows, and nothing else: every report of the engine is the one
without speculation, token by token, drawn or greedy, however good or bad the drafts are.

The drafts come from the truth with errors put in, so that every number of them is accepted
somewhere; those of the MTP block are compared with the same block computed over the whole text.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from helpers_ranks import EVEN, two_ranks

from ernie.attention import packed_causal
from ernie.model import ErnieModel
from ernie.models import TINY
from ernie.settings import ConfigError
from fastdeploy.config import EngineConfig
from fastdeploy.engine.core import Engine
from fastdeploy.engine.loading import make_engine
from fastdeploy.engine.ranks import Ranks
from fastdeploy.engine.request import Order, TokenOutput
from fastdeploy.engine.speculative import NgramIndex, continuation, num_allowed
from fastdeploy.engine.thinking import ThinkTags
from fastdeploy.sampling import SamplingParams

MAX_LEN = 96
NGRAM = {"method": "ngram", "num_speculative_tokens": 4}
MTP = {"method": "mtp", "num_speculative_tokens": 3}
SHARED = [(7 * i + 3) % 97 for i in range(24)]
PROMPTS = ([5], SHARED, [*SHARED[:16], 90, 91], [8] * 8, [*SHARED, 11, 12], SHARED[:17])


@cache
def tiny(name: str, vocab_size: int | None = None) -> ErnieModel:
    config = replace((TINY | EVEN)[name], num_nextn_predict_layers=1)
    if vocab_size is not None:
        config = replace(config, vocab_size=vocab_size)
    model = ErnieModel(config, dtype=torch.float32)
    model.init_weights(seed=1, std=0.3)
    return model


def engine_for(
    model: ErnieModel,
    ranks: Ranks | None = None,
    tags: ThinkTags | None = None,
    **settings: Any,
) -> Engine:
    options = {"model": "tiny", "max_model_len": MAX_LEN, "block_size": 8, "enable_logprob": True}
    config = EngineConfig(**options | {"num_gpu_blocks_override": 80} | settings)
    config = config.resolved(max_positions=MAX_LEN, device_type="cpu")
    return make_engine(model, config, think_tags=tags, ranks=ranks)


class Truth:
    """Drafts what the request will say, with an error at every `every`-th token of the text."""

    def __init__(self, engine: Engine, answers: dict[str, list[int]], every: int) -> None:
        self.engine, self.answers, self.every = engine, answers, every

    def __call__(self, schedule: Any) -> None:
        for part in schedule.parts:
            request = part.request
            count = num_allowed(request, 5) if part.chooses else 0
            if count > 0:
                start = request.num_output
                said = self.answers[request.id][start : start + count]
                request.draft_ids = [
                    (token + 1) % self.engine.vocab_size if i % self.every == 0 else token
                    for i, token in enumerate(said, start)
                ]


def run(
    engine: Engine,
    params: Sequence[SamplingParams],
    name: str = "",
    prompts: Sequence[list[int]] = PROMPTS,
) -> list[TokenOutput]:
    """Every report, request by request."""
    for i, (prompt, one) in enumerate(zip(prompts, params)):
        engine.add(f"{i}{name}", prompt, one, Order(seed=7))
    outputs = []
    while engine.has_work:
        outputs += engine.step()
        engine.scheduler.check()
    stats = engine.stats()
    assert stats.num_free_blocks == stats.num_blocks, f"blocks are held by nobody: {stats}"
    return sorted(outputs, key=lambda output: output.request_id)


def said(outputs: Sequence[TokenOutput]) -> dict[str, list[int]]:
    answers: dict[str, list[int]] = {}
    for output in outputs:
        answers.setdefault(output.request_id, []).append(output.token)
    return answers


def content(output: TokenOutput) -> tuple:
    return output.request_id, output.token, output.finish_reason


PARAMS = {
    "greedy": {"temperature": 0},
    "drawn": {"temperature": 1.0},
    "nucleus": {"temperature": 1.3, "top_p": 0.8, "min_p": 0.01},
    "top_k": {"temperature": 2.0, "top_k": 7},
    "penalties": {
        "temperature": 1.0,
        "presence_penalty": 1.0,
        "frequency_penalty": 0.7,
        "repetition_penalty": 1.3,
    },
    "greedy with penalties": {
        "temperature": 0,
        "frequency_penalty": 2.0,
        "repetition_penalty": 2.0,
    },
    "bans and biases": {
        "temperature": 1.0,
        "logit_bias": {3: 4.0, 9: -100.0},
        "bad_words_token_ids": [1, 2, 5],
    },
    "stops": {"temperature": 1.0, "stop_token_ids": list(range(0, 199, 9))},
    "late stops": {"temperature": 1.0, "stop_token_ids": list(range(0, 199, 5)), "min_tokens": 8},
    "logprobs": {"temperature": 0.8, "logprobs": 3, "prompt_logprobs": 1},
}
SETTINGS = {
    "plain": {},
    "chunks of 8": {"max_num_batched_tokens": 8, "max_num_seqs": 4},
    "blocks of 1": {"block_size": 1, "num_gpu_blocks_override": 400},
    "little room": {"block_size": 4, "num_gpu_blocks_override": 27},
}


@pytest.mark.parametrize("every", [1, 3, 7, 1000])
@pytest.mark.parametrize("kind", PARAMS)
def test_reports_are_those_without_speculation(kind: str, every: int) -> None:
    model = tiny("tiny-dense")
    params = [SamplingParams(max_tokens=9 + 5 * i, **PARAMS[kind]) for i in range(len(PROMPTS))]
    expected = run(engine_for(model), params)
    engine = engine_for(model, speculative_config=NGRAM)
    engine.drafter = Truth(engine, said(expected), every)
    outputs = run(engine, params)
    assert [content(output) for output in outputs] == [content(output) for output in expected]
    for output, wanted in zip(outputs, expected):
        assert (output.logprobs is None) == (wanted.logprobs is None)
        for token, value in (wanted.logprobs or {}).items():
            assert output.logprobs[token].rank == value.rank
            assert output.logprobs[token].logprob == pytest.approx(value.logprob, abs=1e-4)
        assert (output.prompt_logprobs is None) == (wanted.prompt_logprobs is None)
    stats = engine.stats()
    assert stats.num_draft_tokens > 0
    accepted = stats.num_accepted_tokens / stats.num_draft_tokens
    assert accepted == 0 if every == 1 else accepted > 0.2, f"{stats}"
    if every == 1000 and "stop_token_ids" not in PARAMS[kind]:
        steps = 5 + 1  # all but the last text's steps draft 5
        assert stats.mean_acceptance_length > steps - 2, f"{stats}"


@pytest.mark.parametrize("every", [2, 5])
@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("name", ["tiny-dense", "tiny-moe"])
def test_seeded_draws_do_not_depend_on_schedule_and_drafts(
    name: str, setting: str, every: int
) -> None:
    model = tiny(name)
    params = [SamplingParams(max_tokens=30, **PARAMS["penalties"]) for _ in PROMPTS]
    expected = run(engine_for(model), params)
    engine = engine_for(model, speculative_config=NGRAM, **SETTINGS[setting])
    engine.drafter = Truth(engine, said(expected), every)
    assert said(run(engine, params)) == said(expected)
    assert engine.stats().num_accepted_tokens > 0
    assert setting != "little room" or engine.stats().num_preemptions > 0


# Of a small vocabulary, so that n-grams come again and the MTP block is right now and then.
START, END, NUM_IDS = 18, 19, 24
SENTENCE = (20, 21, END, 22, 20)  # what a budget forces
THOUGHTS = [*([t % 18 for t in prompt] + [START] for prompt in PROMPTS), [5, 6, 7]]
BUDGET, ANSWER = {"reasoning_max_tokens": 5}, {"response_max_tokens": 10}
SOON, LATE = ({"early_stop_config": {"window_size": n, "threshold": 0.25}} for n in (4, 2))
# What is set for the engine and for the requests, and by what texts must be ended.
WATCHED = {
    "budget": ({}, BUDGET, {"length"}),
    "budget of 1": ({}, {"reasoning_max_tokens": 1}, {"length"}),
    "answer": ({}, ANSWER, {"length"}),
    "budget and answer": ({}, BUDGET | ANSWER, {"length"}),
    "early stop": (SOON, {}, {"repetition"}),
    "early stop after min_tokens": (LATE, {"min_tokens": 18}, {"repetition"}),
    "budget and early stop": (LATE, BUDGET | {"min_tokens": 12}, {"repetition"}),
}
DRAFTERS = ("right", "right but for some", "of the text without bounds", "n-gram", "MTP")


@pytest.mark.parametrize("closing", [(END,), SENTENCE], ids=["tag", "sentence"])
@pytest.mark.parametrize("temperature", [0, 0.7])
@pytest.mark.parametrize("kind", WATCHED)
def test_budgets_and_early_stops_are_those_without_speculation(
    kind: str, temperature: float, closing: tuple[int, ...]
) -> None:
    model, (settings, bounds, reasons) = tiny("tiny-dense", NUM_IDS), WATCHED[kind]
    settings = settings | {"tags": ThinkTags(START, END, closing)}
    free = SamplingParams(max_tokens=40, temperature=temperature, ignore_eos=True)
    params = [replace(free, **bounds) for _ in THOUGHTS]
    expected = run(engine_for(model, **settings), params, prompts=THOUGHTS)
    unbounded = run(engine_for(model), [free] * len(THOUGHTS), prompts=THOUGHTS)
    assert {one.finish_reason for one in expected} - {None} >= reasons
    if "reasoning_max_tokens" in bounds:
        budget, num_closing = bounds["reasoning_max_tokens"], len(closing)
        forced = [
            text[budget : budget + num_closing] == [*closing] for text in said(expected).values()
        ]
        assert forced.count(True) >= 2, "few thoughts are as long as their budget"
    for drafter in DRAFTERS:
        drafts = MTP if drafter == "MTP" else NGRAM | {"min_ngram_size": 1}
        engine = engine_for(model, **settings, speculative_config=drafts)
        if drafter not in ("n-gram", "MTP"):
            truth = said(unbounded if "without" in drafter else expected)
            engine.drafter = Truth(engine, truth, every=3 if "some" in drafter else 1000)
        outputs = run(engine, params, prompts=THOUGHTS)
        assert [content(one) for one in outputs] == [content(one) for one in expected], drafter
        stats = engine.stats()
        least = len(expected) / 4 if "right" in drafter else 0
        assert stats.num_accepted_tokens > least, f"{drafter}: {stats}"


def test_the_sampled_distribution_is_unchanged() -> None:
    """Short texts over many seeds, counted with drafts and without: a chi-square test of
    homogeneity.
    """
    model, num_texts = tiny("tiny-dense", vocab_size=6), 3000
    params = SamplingParams(temperature=4.0, max_tokens=4, frequency_penalty=0.3)

    def texts(offset: int, drafts: dict | None) -> Counter:
        engine = engine_for(
            model, max_num_seqs=64, num_gpu_blocks_override=200, speculative_config=drafts
        )
        for i in range(num_texts):  # other seeds than the other side's: nothing is coupled
            engine.add(str(i), [0, 3, 1, 4, 5, 2, 2, 0], params, Order(seed=offset + i))
        outputs = []
        while engine.has_work:
            outputs += engine.step()
        if drafts is not None:
            assert engine.stats().num_accepted_tokens > num_texts / 5, engine.stats()
        return Counter(tuple(tokens[1:]) for tokens in said(outputs).values())

    plain = texts(10**6, None)
    for drafts in (NGRAM | {"min_ngram_size": 1}, MTP):
        ours = texts(0, drafts)
        cells = [c for c in {*ours, *plain} if ours[c] + plain[c] >= 10]
        chi_square = sum((ours[c] - plain[c]) ** 2 / (ours[c] + plain[c]) for c in cells)
        # The mean of chi-square is its degrees of freedom, its variance twice that.
        limit = len(cells) + 4 * (2 * len(cells)) ** 0.5
        assert len(cells) > 20
        assert chi_square < limit, f"{drafts['method']}: {chi_square:.1f} in {len(cells)} cells"


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("name", ["tiny-dense", "tiny-moe"])
def test_mtp_drafts_are_those_of_the_whole_text(name: str, setting: str) -> None:
    check_mtp_drafts(tiny(name), tiny(name), setting)


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Ranks, ErnieModel]]:
    with two_ranks(tiny("even-moe"), tmp_path_factory.mktemp("even")) as found:
        yield found


@pytest.mark.ranks
@pytest.mark.parametrize("setting", SETTINGS)
def test_mtp_drafts_of_two_ranks_are_those_of_the_whole_text(
    setting: str, shared: tuple[Ranks, ErnieModel]
) -> None:
    ranks, part = shared
    check_mtp_drafts(tiny("even-moe"), part, setting, ranks)


def check_mtp_drafts(
    model: ErnieModel, part: ErnieModel, setting: str, ranks: Ranks | None = None
) -> None:
    """Compared after every step, then replaced by the truth with errors: so the block's layer of
    the cache is checked after accepted and refused drafts, chunks, preemptions and hits.

    The engine runs `part`: `model` itself, or its slice of rank 0.
    """
    params = [SamplingParams(max_tokens=24, temperature=0, ignore_eos=True) for _ in PROMPTS]
    answers = said(run(engine_for(model), params))
    engine = engine_for(part, ranks, speculative_config=MTP, **SETTINGS[setting])
    mtp, lengths = engine.drafter, Counter()
    truth = Truth(engine, {f"{i}{n}": a for i, a in answers.items() for n in "ab"}, every=4)

    def drafter(schedule: Any) -> None:
        mtp(schedule)
        for part in schedule.parts:
            drafts = part.request.draft_ids
            expected = plain_drafts(model, part.request.token_ids, len(drafts))
            assert drafts == expected, f"{part.request.id} at {part.request.num_output}"
            lengths[len(drafts)] += 1
        truth(schedule)

    engine.drafter = drafter
    for name_of_round in "ab":  # the second round finds what the first has left
        run(engine, params, name_of_round)
    stats = engine.stats()
    assert stats.num_accepted_tokens > 0 and lengths[3] > 20, f"{stats} {lengths}"
    assert setting == "little room" or stats.num_hit_tokens > 60, f"{stats}"
    assert setting != "little room" or stats.num_preemptions > 0, f"{stats}"


@torch.no_grad()
def plain_drafts(model: ErnieModel, token_ids: list[int], count: int) -> list[int]:
    """What the MTP block drafts after `token_ids`, each time computed from the first token on."""
    known, drafts = torch.tensor(token_ids), []
    length = len(known) - 1
    whole = packed_causal(torch.tensor([0, length], dtype=torch.int32))
    hidden_TD = model.hidden(known[:-1], torch.arange(length), whole)
    successors = token_ids[1:]
    for _ in range(count):
        bounds = torch.tensor([0, len(successors)], dtype=torch.int32)
        out_TD = model.hidden_after_next(
            torch.tensor(successors),
            hidden_TD,
            torch.arange(len(successors)),
            packed_causal(bounds),
        )
        drafts.append(int(model.head(out_TD[-1:]).argmax()))
        hidden_TD = torch.cat((hidden_TD, out_TD[-1:]))
        successors = [*successors, drafts[-1]]
    return drafts


def test_a_prefix_hit_needs_the_token_after_the_block_under_mtp() -> None:
    """What the MTP block stores for the last token of a block depends on the next token."""
    for drafts, num_hits in ((None, 16), (MTP, 8)):
        engine = engine_for(tiny("tiny-dense"), speculative_config=drafts)
        for i, prompt in enumerate((SHARED[:20], [*SHARED[:16], 90, 91])):
            engine.add(str(i), prompt, SamplingParams(max_tokens=1))
            engine.step()
        assert engine.stats().num_hit_tokens == num_hits, f"{drafts}: {engine.stats()}"


def test_drafts_take_only_what_is_left() -> None:
    """A step is full of certain tokens, or the cache is: nothing is drafted, and nobody loses."""
    model = tiny("tiny-dense")
    params = [SamplingParams(max_tokens=20, temperature=0, ignore_eos=True) for _ in PROMPTS]
    tight = {"block_size": 4, "num_gpu_blocks_override": 27}
    plain, drafting = engine_for(model, **tight), engine_for(model, **tight)
    expected = run(plain, params)
    drafting.drafter = Truth(drafting, said(expected), every=1)  # all refused: the same steps
    assert said(run(drafting, params)) == said(expected)
    assert drafting.stats().num_draft_tokens > 0
    for figure in ("num_steps", "num_preemptions"):
        ours, theirs = getattr(drafting.stats(), figure), getattr(plain.stats(), figure)
        assert ours == theirs > 0, f"{figure}: {ours} with drafts, {theirs} without"


def test_ngram_index_finds_the_latest_earlier_place_of_the_longest_end() -> None:
    generator = torch.Generator().manual_seed(0)
    text = torch.randint(0, 4, (150,), generator=generator).tolist()
    index, text_so_far = NgramIndex(2, 4), []
    for i, token in enumerate(text):
        text_so_far.append(token)
        if i % 3 == 0:  # several tokens may come at once
            assert index.find(text_so_far) == latest_place(text_so_far, range(4, 1, -1)), i


def latest_place(text: list[int], sizes: range) -> int | None:
    for size in sizes:
        for end in range(len(text) - 1, size - 1, -1):
            if text[end - size : end] == text[-size:] and size < len(text):
                return end
    return None


def test_a_copy_that_reaches_the_end_of_the_text_goes_on_in_a_circle() -> None:
    assert continuation([1, 2, 3, 1, 2], 2, 5) == [3, 1, 2, 3, 1]
    assert continuation([9, 8, 8], 2, 3) == [8, 8, 8]
    assert continuation([1, 2], None, 3) == []


def test_what_cannot_be_drafted_is_refused_in_a_sentence() -> None:
    without = ErnieModel(TINY["tiny-dense"], dtype=torch.float32)
    with pytest.raises(ConfigError, match="the model has 0 MTP blocks"):
        engine_for(without, speculative_config=MTP)
    for wrong, message in (
        ({"method": "suffix"}, "method='suffix'"),
        ({"method": "ngram", "num_speculative_tokens": 6}, "it takes 1 to 5"),
        ({"method": "mtp", "mtp_strategy": "with_ngram"}, "mtp_strategy='with_ngram'"),
        ({"method": "ngram", "max_ngram_size": 1}, "min_ngram_size <= max_ngram_size"),
        ({"method": "ngram", "ngram_size": 1}, "unknown key 'ngram_size'"),
    ):
        with pytest.raises(ConfigError, match=message):
            engine_for(without, speculative_config=wrong)
