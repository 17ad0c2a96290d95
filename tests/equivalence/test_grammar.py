"""Forms of answers against slow twins: each token is the likeliest of those that an independent
reference allows, tried one by one; and the answer is the same in pieces, after preemptions, with
drafts, and in any company.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import regex
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

import helpers_tokenizer

import ernie
from ernie.attention import packed_causal
from ernie.model import ErnieModel
from ernie.models import TINY
from fastdeploy import LLM, GuidedDecodingParams, SamplingParams
from fastdeploy.engine.speculative import num_allowed

pytest.importorskip("llguidance")

MAX_LEN = 160
PROMPT = "Hello! The quick brown fox"
CHOICES = ["yes", "yes, sir", "no", "not today", "语言"]
PATTERN = r"(the|a) [a-z]{2,12}( [0-9]+){0,3}\."
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 3, "maximum": 140},
        "tags": {"type": "array", "items": {"enum": ["red", "green"]}, "maxItems": 3},
    },
    "required": ["name", "tags"],
    "additionalProperties": False,
}
FORMS: dict[str, dict[str, Any]] = {
    "choice": {"choice": CHOICES},
    "regex": {"regex": PATTERN},
    "json": {"json": SCHEMA},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = helpers_tokenizer.sentencepiece_folder(tmp_path_factory.mktemp("models") / "tiny")
    size = ernie.Tokenizer.from_folder(path).vocab_size
    config = dataclasses.replace(
        TINY["tiny-dense"], vocab_size=size + 7, num_nextn_predict_layers=1
    )
    model = ErnieModel(config, dtype=torch.float32)
    model.init_weights(seed=5, std=0.3)
    ernie.save(model, path)
    return path


def served(folder: Path, **options: Any) -> LLM:
    own = {"dtype": "float32", "max_model_len": MAX_LEN, "block_size": 8, "enable_logprob": True}
    return LLM(str(folder), **own | options)


@pytest.fixture(scope="module")
def llm(folder: Path) -> LLM:
    return served(folder)


def held(form: str, **options: Any) -> SamplingParams:
    guided = GuidedDecodingParams(**FORMS[form])
    return SamplingParams(**{"max_tokens": 80, "guided_decoding": guided} | options)


# Whether bytes can be the beginning of an answer, and whether they are a whole one.
Judge = Callable[[bytes], tuple[bool, bool]]


def of_choice(text: bytes) -> tuple[bool, bool]:
    whole = [choice.encode() for choice in CHOICES]
    return any(choice.startswith(text) for choice in whole), text in whole


def of_regex(text: bytes) -> tuple[bool, bool]:
    begun = regex.fullmatch(PATTERN.encode(), text, partial=True)
    return begun is not None, begun is not None and not begun.partial


def slow_greedy(
    model: ErnieModel, prompt_ids: list[int], judge: Judge, ends: frozenset[int]
) -> list[int]:
    """Every token of the vocabulary is tried; the whole text is computed anew for each one."""
    tokenizer, ids = model.tokenizer, list(prompt_ids)
    text = b""
    while True:
        row = torch.tensor(ids)
        attend = packed_causal(torch.tensor([0, len(ids)], dtype=torch.int32))
        with torch.inference_mode():
            hidden = model.hidden(row, torch.arange(len(ids)), attend)
            logits = model.head(hidden[-1:])[0]
        for token in logits.argsort(descending=True, stable=True).tolist():
            own = tokenizer.join_bytes([token])
            name = tokenizer.token_of(token)
            if token in ends and judge(text)[1]:
                return ids[len(prompt_ids) :]
            if own and name not in tokenizer.control_tokens and judge(text + own)[0]:
                ids.append(token)
                text += own
                break
        else:
            return ids[len(prompt_ids) :]


@pytest.mark.parametrize(("form", "judge"), [("choice", of_choice), ("regex", of_regex)])
@pytest.mark.parametrize("prompt", [PROMPT, "a", "User: no"])
def test_greedy_answers_are_those_of_the_slow_reference(
    llm: LLM, folder: Path, form: str, judge: Judge, prompt: str
) -> None:
    model = ernie.load(folder, dtype=torch.float32)
    ends = llm.engine.eos_ids
    expected = slow_greedy(model, model.tokenizer.encode(prompt), judge, ends)
    (one,) = llm.generate(prompt, held(form, temperature=0))[0].outputs
    answer = [token for token in one.token_ids if token not in ends]
    assert answer == expected, (one.text, llm.tokenizer.decode(expected))
    assert judge(one.text.encode())[1] and one.finish_reason == "stop"


ROWS = [
    (form, seed, options)
    for form in FORMS
    for seed, options in enumerate(
        (
            {"temperature": 0},
            {"temperature": 1.0},
            {"temperature": 1.5, "top_p": 0.9, "top_k": 40, "min_p": 0.001},
            {"temperature": 1.0, "repetition_penalty": 1.3, "frequency_penalty": 0.5},
            {"temperature": 1.0, "logprobs": 2, "min_tokens": 6},
            {"temperature": 1.0, "ignore_eos": True, "stop": ["e", "2"]},
        )
    )
]
PROMPTS = [PROMPT] * len(ROWS)


def answers(llm: LLM, *, alone: bool = False) -> list[tuple]:
    params = [held(form, seed=seed, **options) for form, seed, options in ROWS]
    if alone:
        outputs = [llm.generate(PROMPT, one)[0] for one in params]
    else:
        outputs = llm.generate(PROMPTS, params)
    return [(o.outputs.token_ids, o.outputs.text, o.outputs.finish_reason) for o in outputs]


@pytest.fixture(scope="module")
def expected(llm: LLM) -> list[tuple]:
    return answers(llm, alone=True)


def test_rows_are_worth_comparing(expected: list[tuple]) -> None:
    assert all(reason in ("stop", "length") for _, _, reason in expected)
    assert len({text for _, text, _ in expected}) > len(ROWS) / 2
    for (form, _, options), (_, text, reason) in zip(ROWS, expected):
        if form == "json" and reason == "stop" and "stop" not in options:
            assert SCHEMA["required"] == [k for k in json.loads(text) if k != "age"], text


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"max_num_batched_tokens": 8, "max_num_seqs": 4},
        {"enable_prefix_caching": False, "max_num_seqs": 3},
        {"num_gpu_blocks_override": 21, "max_num_seqs": 8},
        {
            "speculative_config": {
                "method": "ngram",
                "num_speculative_tokens": 4,
                "min_ngram_size": 1,
            }
        },
        {"speculative_config": {"method": "mtp", "num_speculative_tokens": 3}},
    ],
    ids=str,
)
def test_answers_are_the_same_however_they_are_computed(
    folder: Path, expected: list[tuple], options: dict[str, Any]
) -> None:
    llm = served(folder, **options)
    assert answers(llm) == expected
    stats = llm.engine.stats()
    assert stats.num_preemptions > 0 or "num_gpu_blocks_override" not in options
    assert stats.num_draft_tokens > 0 or "speculative_config" not in options


class Truth:
    """Drafts the answers that are known, with an error at every `every`-th token."""

    def __init__(self, answers: Iterator[list[int]], every: int) -> None:
        self.answers, self.every = answers, every
        self.answer_by_id: dict[str, list[int]] = {}

    def __call__(self, schedule: Any) -> None:
        for part in schedule.parts:
            request = part.request
            count = num_allowed(request, 5) if part.chooses else 0
            if request.id not in self.answer_by_id:
                self.answer_by_id[request.id] = next(self.answers)
            start = request.num_output
            truth = self.answer_by_id[request.id][start : start + max(count, 0)]
            request.draft_ids = [
                (token + 1) % 600 if i % self.every == self.every - 1 else token
                for i, token in enumerate(truth, start)
            ]


@pytest.mark.parametrize("every", [2, 3, 7, 1000])
def test_accepted_and_rejected_drafts_leave_the_form_where_it_belongs(
    folder: Path, expected: list[tuple], every: int
) -> None:
    ngram = {"method": "ngram", "num_speculative_tokens": 5}
    llm = served(folder, max_num_seqs=1, speculative_config=ngram)
    llm.engine.drafter = Truth(iter([ids for ids, _, _ in expected]), every)
    assert answers(llm, alone=True) == expected
    stats = llm.engine.stats()
    assert 0 < stats.num_accepted_tokens <= stats.num_draft_tokens
    # Where the last draft ends the text no further token follows it, and it counts as that one.
    num_refused = stats.num_draft_tokens - stats.num_accepted_tokens
    assert num_refused <= len(ROWS) or every < 1000


def test_a_form_behind_a_budget_begins_where_it_does_without_drafts(tmp_path: Path) -> None:
    """What closes the thought is no part of the form, and drafts reach across all three."""
    path = helpers_tokenizer.sentencepiece_folder(tmp_path / "thinker", thinking=True)
    tokenizer = ernie.Tokenizer.from_folder(path)
    config = dataclasses.replace(TINY["tiny-dense"], vocab_size=tokenizer.vocab_size)
    model = ErnieModel(config, dtype=torch.float32)
    model.init_weights(seed=3, std=0.3)
    ernie.save(model, path)
    prompt = [*tokenizer.encode("Hello!"), tokenizer.id_of("<think>")]
    params = [held(form, seed=7, **o, reasoning_max_tokens=4) for form, _, o in ROWS]
    ngram = {"method": "ngram", "num_speculative_tokens": 5}
    texts: list[list[int]] = []
    for every in (None, 2, 3, 7, 1000):
        drafts = {} if every is None else {"speculative_config": ngram}
        llm = served(path, max_num_seqs=1, think_stop_sentence="so\n</think>\n\n", **drafts)
        if every is not None:
            llm.engine.drafter = Truth(iter(texts), every)
        outputs = [llm.generate(prompt, one)[0].outputs for one in params]
        found = [one.token_ids for one in outputs]
        texts = texts or found
        assert found == texts, f"with an error at every {every}"
        stats = llm.engine.stats()
        assert every is None or stats.num_accepted_tokens > 50, f"{stats}"
    closing = tokenizer.encode("so\n</think>\n\n", allow_special=True)
    assert sum(text[4 : 4 + len(closing)] == closing for text in texts) > len(ROWS) / 2
