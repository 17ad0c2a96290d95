"""Answers of the model to prompts of the evaluation data, beside the answers given there.

A prompt is a dialogue without its last answer (of a pair: the chosen one); where a dialogue calls
tools, also what stands before each trained call. Answers are greedy
(`ernie.generate`), so that they differ only where the model does, and nothing random is used up:
training goes on as if none had been given.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice, pairwise
from typing import Any

from ernie.chat import ChatError, stop_ids
from ernie.chat.calls import CALL, END_CALL, Call, calls_in, written
from ernie.chat.messages import checked_message
from ernie.generate import generate
from ernie.model import ErnieModel
from erniekit.data.dialogue import Dialogue, Encoder
from erniekit.data.loader import Stream
from erniekit.data.sources import DataError
from erniekit.evaluate import in_eval_mode
from erniekit.report.scores import call_scores, scores


@dataclass(frozen=True)
class Prompt:
    where: str  # file and line
    messages: list[dict[str, Any]]
    token_ids: list[int]
    reference: str
    calls: tuple[Call, ...] | None = None  # of the reference; None where there are no tools


def prompts(stream: Stream, count: int) -> list[Prompt]:
    """The prompts of `count` records spread evenly over a split, of all of them for -1.

    Of each stretch of records the first that can be used is taken; a stretch without one gives no
    prompt. (What cannot be used is told where the data is evaluated.)
    """
    size = stream.epoch_size
    count = size if count < 0 else min(count, size)
    bounds = [i * size // count for i in range(count + 1)] if count else [0]
    found = []
    for start, end in pairwise(bounds):
        for source, index in islice(stream.mix.draws(start), end - start):
            if of_record := _prompts(stream, source, index):
                found += of_record
                break
    return found


def _prompts(stream: Stream, source: int, index: int) -> list[Prompt]:
    records, encoder = stream.sources[source], stream.encoder
    try:
        dialogue = encoder.dialogue(records[index], stream.kinds[source])
        places = [
            i
            for i, message in enumerate(dialogue.messages[:-1])
            if message.get("tool_calls") and message.get("label", 1)
        ]
        asked = [
            _prompt(encoder, dialogue, i, records.where(index))
            for i in (*places, len(dialogue.messages) - 1)
        ]
    except (DataError, ChatError):
        return []
    return [prompt for prompt in asked if len(prompt.token_ids) <= encoder.max_tokens]


def _prompt(encoder: Encoder, dialogue: Dialogue, i: int, where: str) -> Prompt:
    """What stands before message `i`, which is an answer."""
    extra = {"tools": dialogue.tools} if dialogue.tools else {}
    encoded = encoder.template.encode(encoder.tokenizer, dialogue.messages[:i], **extra)
    reads = encoder.template.reads
    shown = [
        {"role": m["role"], "content": _shown(checked_message(f"messages[{n}]", m, reads))}
        for n, m in enumerate(dialogue.messages[:i])
    ]
    reference = _shown(checked_message(f"messages[{i}]", dialogue.messages[i]))
    # Calls between other tags than the usual ones could not be found in the model's answer.
    has_calls = dialogue.tools and CALL in encoder.template.tags
    calls = calls_in(reference) if has_calls else None
    return Prompt(where, shown, encoded.token_ids, reference, calls)


def _shown(message: dict[str, Any]) -> str:
    """The content of a checked message, and its calls as models write them."""
    calls = [f"{CALL}\n{text}\n{END_CALL}" for text in written(message.get("tool_calls", []))]
    content = message["content"]
    return "\n".join([str(content)] * bool(content) + calls)


@in_eval_mode
def answers(
    model: ErnieModel, asked: Sequence[Prompt], max_tokens: int, step: int
) -> list[dict[str, Any]]:
    """A record for each prompt: step, where, messages, reference, answer, num_tokens, is_cut (it
    reached `max_tokens`) and the scores against the reference, of its calls too where the dialogue
    has tools.
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
                **({} if prompt.calls is None else call_scores(calls_in(text), prompt.calls)),
            }
        )
    return records
