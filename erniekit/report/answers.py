"""Answers of the model to prompts of the evaluation data, beside the answers given there.

A prompt is a dialogue without its last answer (of a pair: the chosen one); where a dialogue calls
tools, also what stands before each trained call. Where records have pictures, a prompt has those
that stand in it. Answers are greedy (`ernie.generate`), so that they differ only where the model
does, and nothing random is used up: training goes on as if none had been given.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice, pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from ernie.chat import ChatError, stop_ids
from ernie.chat.calls import CALL, END_CALL, Call, calls_in, written
from ernie.chat.messages import checked_message
from ernie.generate import generate
from ernie.model import ErnieModel
from erniekit.data.dialogue import Dialogue, Encoder
from erniekit.data.sources import DataError
from erniekit.data.stream import Stream
from erniekit.evaluate import in_eval_mode
from erniekit.report.scores import call_scores, scores
from erniekit.report.thumbnails import thumbnails

if TYPE_CHECKING:
    from ernie.vision.processor import Picture


@dataclass(frozen=True)
class Prompt:
    where: str  # file and line
    messages: list[dict[str, Any]]  # as they are shown: a picture is <image> or <video> in a text
    token_ids: list[int]
    reference: str
    calls: tuple[Call, ...] | None = None  # of the reference; None where there are no tools
    pictures: tuple[Picture, ...] = ()  # in order of appearance

    @property
    def pixels(self) -> dict[str, Any]:
        """Its pictures as `generate` takes them."""
        if not self.pictures:
            return {}
        rows = np.concatenate([picture.rows for picture in self.pictures])
        return {"pixel_values": rows, "grid_thw": np.array([p.grid for p in self.pictures])}


def prompts(stream: Stream, count: int) -> Iterator[Prompt]:
    """The prompts of `count` records spread evenly over a split, of all of them for -1, one after
    the other, so that the pictures of one alone are held.

    Of each stretch of records the first that can be used is taken; a stretch without one gives no
    prompt. (What cannot be used is told where the data is evaluated.)
    """
    size = stream.epoch_size
    count = size if count < 0 else min(count, size)
    bounds = [i * size // count for i in range(count + 1)] if count else [0]
    for start, end in pairwise(bounds):
        for source, index in islice(stream.mix.draws(start), end - start):
            if of_record := _prompts(stream, source, index):
                yield from of_record
                break


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
    before = dialogue.messages[:i]
    extra = {"tools": dialogue.tools} if dialogue.tools else {}
    sizes = encoder.reader.sizes(before) if encoder.reader else ()
    encoded = encoder.template.encode(encoder.tokenizer, before, sizes, **extra)
    reads = encoder.template.reads
    shown = [
        {"role": m["role"], "content": _shown(checked_message(f"messages[{n}]", m, reads))}
        for n, m in enumerate(before)
    ]
    reference = _shown(checked_message(f"messages[{i}]", dialogue.messages[i]))
    # Calls between other tags than the usual ones could not be found in the model's answer.
    has_calls = dialogue.tools and CALL in encoder.template.tags
    calls = calls_in(reference) if has_calls else None
    pictures: tuple[Picture, ...] = ()
    if encoder.reader:
        pictures = encoder.reader.media_of(encoded.token_ids, encoded, before).pictures
    return Prompt(where, shown, encoded.token_ids, reference, calls, pictures)


def _shown(message: dict[str, Any]) -> str:
    """The content of a checked message with its pictures as their places, and its calls as models
    write them.
    """
    calls = [f"{CALL}\n{text}\n{END_CALL}" for text in written(message.get("tool_calls", []))]
    content = message["content"]
    if isinstance(content, list):
        content = "".join(part.get("text", f"<{part['type']}>") for part in content)
    return "\n".join([str(content)] * bool(content) + calls)


@in_eval_mode
def answers(
    model: ErnieModel, asked: Iterable[Prompt], max_tokens: int, step: int
) -> list[dict[str, Any]]:
    """A record for each prompt: step, where, messages, its pictures where there are any (see
    `thumbnails`), reference, answer, num_tokens, is_cut (it reached `max_tokens`) and the scores
    against the reference, of its calls too where the dialogue has tools.
    """
    assert model.tokenizer is not None
    stops = stop_ids(model.tokenizer)
    vision = model.config.vision_config
    records = []
    for prompt in asked:
        ids = list(
            generate(
                model,
                prompt.token_ids,
                max_tokens=max_tokens,
                stop_ids=sorted(stops),
                **prompt.pixels,
            )
        )
        text = model.tokenizer.decode([i for i in ids if i not in stops])
        records.append(
            {
                "step": step,
                "where": prompt.where,
                "messages": prompt.messages,
                **(thumbnails(prompt.pictures, vision.spatial_merge_size) if vision else {}),
                "reference": prompt.reference,
                "answer": text.strip(),
                "num_tokens": len(ids),
                "is_cut": ids[-1] not in stops,
                **scores(text, prompt.reference),
                **({} if prompt.calls is None else call_scores(calls_in(text), prompt.calls)),
            }
        )
    return records
