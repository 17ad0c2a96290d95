"""The templates of the ERNIE 4.5 family, for folders that bring none of their own.

    ERNIE 4.5             <|begin_of_sentence|>{system}\\n
                          User: {question}\\n
                          Assistant: {answer}<|end_of_sentence|>

    ERNIE 4.5 Thinking    <|im_start|>system\\n{settings, tools}<|im_end|>\\n\\n
                          <|im_start|>user\\n{question}<|im_end|>\\n\\n
                          <|im_start|>assistant\\n<think>\\n{thought}\\n</think>\\n\\n
                          <response>\\n{answer}\\n</response>\\n<|im_end|>\\n\\n

    ERNIE 4.5 VL          <|begin_of_sentence|>{system}\\n
                          User: {text, and in its place}Picture 1:<|IMAGE_START|>..<|IMAGE_END|>
                          \\nAssistant: {thought}{answer}<|end_of_sentence|>

(Line breaks are those spelled `\\n`.) Source: the published template of the LLMs; for Thinking, the
data pipeline of PaddleFormers; for VL, transformers' and the data pipelines of ERNIE and
PaddleFormers.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import count
from typing import Any

from ernie.chat.calls import written
from ernie.chat.messages import ChatError, Dialogue, Segment, written_differently
from ernie.chat.sandbox import LEADING_THOUGHT

PLACES = {
    "image": ("Picture {}:<|IMAGE_START|>", "<|image@placeholder|>", "<|IMAGE_END|>"),
    "video": ("Video {}:<|VIDEO_START|>", "<|video@placeholder|>", "<|VIDEO_END|>"),
}


def _own(text: str) -> Segment:
    return Segment(text, is_trusted=True)


def _answer(is_trained: bool, *parts: Segment) -> list[Segment]:
    return [
        Segment(part.text, part.is_trusted, starts_answer=i == 0, is_trained=is_trained)
        for i, part in enumerate(parts)
    ]


def _refuse_options(dialogue: Dialogue, template: str, thinks: bool) -> None:
    for key, value in dialogue.options.items():
        if key != "enable_thinking":
            raise ChatError(f"the {template} template has no option {key!r}")
        if bool(value) != thinks:
            does = "always thinks" if thinks else "cannot think"
            raise ChatError(
                f"enable_thinking={value!r}: a model with the {template} template {does}"
            )


def llm_segments(dialogue: Dialogue) -> list[Segment]:
    """0.3B, 21B-A3B, 300B-A47B. Source: their published chat template."""
    _refuse_options(dialogue, "ERNIE 4.5", thinks=False)
    if dialogue.tools:
        raise ChatError(
            "the ERNIE 4.5 template has no place for tools; use a Thinking model, or put a "
            "chat_template.jinja that has one into the model's folder"
        )
    segments = [_own("<|begin_of_sentence|>")]
    for i, message in enumerate(dialogue.messages):
        role, content = message["role"], Segment(message["content"])
        unwritable = {"tool_calls", "reasoning_content"} & message.keys()
        if role == "tool" or unwritable:
            raise ChatError(
                f"messages[{i}] holds {', '.join(sorted(unwritable)) or 'the result of a tool'}, "
                "for which the ERNIE 4.5 template has no place; use a Thinking model"
            )
        if role == "system":
            segments += [content, _own("\n")]
        elif role == "user":
            segments += [_own("User: "), content, _own("\n")]
        else:
            end = _own("<|end_of_sentence|>")
            segments += [_own("Assistant: "), *_answer(i in dialogue.trained, content, end)]
    if dialogue.add_generation_prompt:
        segments.append(_own("Assistant: "))
    return segments


def thinking_segments(dialogue: Dialogue) -> list[Segment]:
    """21B-A3B-Thinking. Thoughts are written in the answers after the last user message, and
    dropped before.

    Source: the template of PaddleFormers' data pipeline.
    """
    _refuse_options(dialogue, "ERNIE 4.5 Thinking", thinks=True)
    messages = dialogue.messages
    users = [i for i, message in enumerate(messages) if message["role"] == "user"]
    last_user = users[-1] if users else -1
    has_system = messages[0]["role"] == "system"
    segments = _thinking_head(messages[0]["content"] if has_system else "", dialogue.tools)
    for i, message in enumerate(map(_with_thought_apart, messages)):
        if i == 0 and has_system:
            continue
        role, content = message["role"], Segment(message["content"])
        end = _own("<|im_end|>")
        if role == "system":
            raise ChatError(
                f"messages[{i}] is of the system; this template has it only at the start"
            )
        if role == "user":
            segments += [_own("<|im_start|>user\n"), content, end, _own("\n\n")]
        elif role == "tool":
            opening = _own("<|im_start|>user\n<tool_response>\n")
            segments += [opening, content, _own("\n</tool_response>"), end, _own("\n\n")]
        else:
            is_trained = i in dialogue.trained
            if is_trained and i < last_user:
                raise ChatError(written_differently(i))
            thought = _thought(message) if i > last_user else []
            segments.append(_own("<|im_start|>assistant\n" + "<think>\n" * bool(thought)))
            segments += _answer(is_trained, *thought, *_response(message), end)
            segments.append(_own("\n\n"))
    if dialogue.add_generation_prompt:
        segments.append(_own("<|im_start|>assistant\n<think>\n"))
    return segments


def _thinking_head(system: str, tools: Sequence[Mapping[str, Any]]) -> list[Segment]:
    segments = [_own("<|im_start|>system\n")]
    if system:
        opening, closing = _own("<system_setting>\n"), _own("\n</system_setting>\n\n")
        segments += [opening, Segment(system), closing]
    segments.append(_own("<global_setting>\nthink_mode=True\n</global_setting>"))
    if tools:
        listed = ", ".join(json.dumps(tool, ensure_ascii=False) for tool in tools)
        segments += [_own("\n\n<tool_list>\n["), Segment(listed), _own("]\n</tool_list>")]
    return [*segments, _own("<|im_end|>\n\n")]


def _with_thought_apart(message: dict[str, Any]) -> dict[str, Any]:
    """An answer may carry its thought in front of the content, between `<think>` and `</think>`."""
    if message["role"] != "assistant" or "reasoning_content" in message:
        return message
    thought = LEADING_THOUGHT.fullmatch(message["content"])
    if not thought:
        return message
    _, inner, _, rest = thought.groups()
    return message | {"reasoning_content": inner.strip("\n"), "content": rest.lstrip("\n")}


def _thought(message: Mapping[str, Any]) -> list[Segment]:
    """What the model writes after `<think>\\n`; an answer without a thought has an empty one."""
    return [Segment(message.get("reasoning_content", "")), _own("\n</think>\n\n")]


def _response(message: Mapping[str, Any]) -> list[Segment]:
    calls = message.get("tool_calls", [])
    segments = []
    if message["content"] or not calls:
        segments += [_own("<response>\n"), Segment(message["content"]), _own("\n</response>\n")]
    return [*segments, *_calls(message)]


def _calls(message: Mapping[str, Any]) -> list[Segment]:
    segments = []
    for call in written(message.get("tool_calls", [])):
        segments += [_own("<tool_call>\n"), Segment(call), _own("\n</tool_call>\n")]
    return segments


def vl_segments(dialogue: Dialogue) -> list[Segment]:
    """VL-28B-A3B, VL-424B-A47B. A prompt ends with an empty thought, or with an open one for
    `enable_thinking`. Answers before the last user message are written without either.

    Source: the template of transformers' conversion of the published models.
    """
    thinks = dialogue.options.get("enable_thinking", None)
    for key in dialogue.options.keys() - {"enable_thinking"}:
        raise ChatError(f"the ERNIE 4.5 VL template has no option {key!r}")
    if dialogue.tools:
        raise ChatError("the ERNIE 4.5 VL template has no place for tools; use the Thinking model")

    def opening(answer: Mapping[str, Any]) -> tuple[str, list[Segment]]:
        thought = answer.get("reasoning_content", "")
        if thought and thinks is False:
            raise ChatError("an answer holds a thought, and enable_thinking is false")
        if not (thought or thinks):
            return "<think>\n\n</think>\n\n", []
        return "<think>", [_own("\n"), Segment(thought), _own("\n</think>\n")]

    return _vl_segments(dialogue, opening, "ERNIE 4.5 VL")


def vl_thinking_segments(dialogue: Dialogue) -> list[Segment]:
    """VL-28B-A3B-Thinking, which always thinks and calls tools.

    Source: ERNIE's and PaddleFormers' data pipelines.
    """
    _refuse_options(dialogue, "ERNIE 4.5 VL Thinking", thinks=True)

    def opening(answer: Mapping[str, Any]) -> tuple[str, list[Segment]]:
        return "\n<think>\n", _thought(answer)

    return _vl_segments(dialogue, opening, "ERNIE 4.5 VL Thinking")


def _vl_segments(
    dialogue: Dialogue,
    opening: Callable[[Mapping[str, Any]], tuple[str, list[Segment]]],
    name: str,
) -> list[Segment]:
    """`opening` of an answer: what the prompt ends with, and the thought that the model writes."""
    messages = [_with_thought_apart(message) for message in dialogue.messages]
    users = [i for i, message in enumerate(messages) if message["role"] == "user"]
    last_user = users[-1] if users else -1
    segments = [_own("<|begin_of_sentence|>")]
    if dialogue.tools:
        listed = ", ".join(json.dumps(tool, ensure_ascii=False) for tool in dialogue.tools)
        segments += [_own("\n<tool_list>\n["), Segment(listed), _own("]\n</tool_list>\n")]
    numbers = {"image": count(1), "video": count(1)}
    for i, message in enumerate(messages):
        role, content = message["role"], message["content"]
        if (message.get("tool_calls") or role == "tool") and name == "ERNIE 4.5 VL":
            raise ChatError(f"messages[{i}] is about tools, for which {name} has no place")
        if role == "system":
            segments += [Segment(content), _own("\n")]
        elif role == "user":
            segments += [_own("User: "), *_items(content, numbers)]
        elif role == "tool":
            segments += [_own("User: \n<tool_output>\n"), *_items(content, numbers)]
            segments.append(_own("\n</tool_output>\n"))
        else:
            is_trained = i in dialogue.trained
            if is_trained and i < last_user:
                raise ChatError(written_differently(i))
            asked, thought = opening(message) if i > last_user else ("", [])
            segments.append(_own("\nAssistant: " + asked))
            answer = [*thought, Segment(content), *_calls(message), _own("<|end_of_sentence|>")]
            segments += _answer(is_trained, *answer)
    if dialogue.add_generation_prompt:
        segments.append(_own("\nAssistant: " + opening({})[0]))
    return segments


def _items(
    content: str | list[dict[str, Any]], numbers: Mapping[str, Iterator[int]]
) -> list[Segment]:
    if isinstance(content, str):
        return [Segment(content)]
    segments = []
    for part in content:
        if part["type"] == "text":
            segments.append(Segment(part["text"]))
            continue
        kind = part["type"]
        before, place, after = PLACES[kind]
        opening = _own(before.format(next(numbers[kind])))
        segments += [opening, Segment(place, is_trusted=True, picture=kind), _own(after)]
    return segments
