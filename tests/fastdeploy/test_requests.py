"""What a request may ask of the engine beyond its text: salts, priorities, choices, budgets."""

from __future__ import annotations

import pytest

from fastdeploy import LLM, SamplingParams
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
