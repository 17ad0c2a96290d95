"""Answers of the model to prompts of the evaluation data, beside the answers given there.

A prompt is a dialogue without its last answer (of a pair: the chosen one). Answers are greedy
(`ernie.generate`), so that they differ only where the model does, and nothing random is used up:
training goes on as if none had been given.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice, pairwise
from typing import Any

from ernie.chat import ChatError, stop_ids
from ernie.generate import generate
from ernie.model import ErnieModel
from erniekit.data.loader import Stream
from erniekit.data.sources import DataError
from erniekit.evaluate import in_eval_mode
from erniekit.report.scores import scores


@dataclass(frozen=True)
class Prompt:
    where: str  # file and line
    messages: list[dict[str, Any]]
    token_ids: list[int]
    reference: str


def prompts(stream: Stream, count: int) -> list[Prompt]:
    """`count` prompts spread evenly over the records of a split, all of them for -1.

    Of each stretch of records the first that can be used is taken; a stretch without one gives no
    prompt. (What cannot be used is told where the data is evaluated.)
    """
    size = stream.epoch_size
    count = size if count < 0 else min(count, size)
    bounds = [i * size // count for i in range(count + 1)] if count else [0]
    found = []
    for start, end in pairwise(bounds):
        for source, index in islice(stream.mix.draws(start), end - start):
            prompt = _prompt(stream, source, index)
            if prompt is not None:
                found.append(prompt)
                break
    return found


def _prompt(stream: Stream, source: int, index: int) -> Prompt | None:
    records, encoder = stream.sources[source], stream.encoder
    try:
        dialogue = encoder.dialogue(records[index], stream.kinds[source])
        *messages, answer = dialogue.messages
        extra = {"tools": dialogue.tools} if dialogue.tools else {}
        encoded = encoder.template.encode(encoder.tokenizer, messages, **extra)
    except (DataError, ChatError):
        return None
    if len(encoded.token_ids) > encoder.max_tokens:
        return None
    shown = [{"role": m["role"], "content": str(m.get("content") or "")} for m in messages]
    return Prompt(records.where(index), shown, encoded.token_ids, str(answer.get("content") or ""))


@in_eval_mode
def answers(
    model: ErnieModel, asked: Sequence[Prompt], max_tokens: int, step: int
) -> list[dict[str, Any]]:
    """A record for each prompt: step, where, messages, reference, answer, num_tokens, is_cut (it
    reached `max_tokens`) and the scores against the reference.
    """
    assert model.tokenizer is not None
    stops = stop_ids(model.tokenizer)
    records = []
    for prompt in asked:
        ids = list(generate(model, prompt.token_ids, max_tokens=max_tokens, stop_ids=sorted(stops)))
        text = model.tokenizer.decode([i for i in ids if i not in stops])
        records.append(
            {
                "step": step,
                "where": prompt.where,
                "messages": prompt.messages,
                "reference": prompt.reference,
                "answer": text.strip(),
                "num_tokens": len(ids),
                "is_cut": ids[-1] not in stops,
                **scores(text, prompt.reference),
            }
        )
    return records
