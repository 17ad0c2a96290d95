"""The chat template of a model folder: where it lies, and how its text becomes segments."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from ernie.chat.messages import ChatError, Dialogue, Segment, written_differently
from ernie.chat.sandbox import JinjaTemplate, StandIns
from ernie.json_files import read_object
from ernie.tokenizer import MORE_TEMPLATES, Tokenizer

# How templates write the place of a picture. The first are those of the original processor, the
# others tokens.
PLACES = {
    "<|image@placeholder|>": "image",
    "<|video@placeholder|>": "video",
    "<|IMAGE_PLACEHOLDER|>": "image",
    "<|VIDEO_PLACEHOLDER|>": "video",
}
_PLACE = re.compile("|".join(map(re.escape, PLACES)))


def read_by(source: str) -> frozenset[str]:
    """The kinds of pictures for which a template has a place."""
    return frozenset(kind for place, kind in PLACES.items() if place in source)


def folder_sources(folder: Path) -> tuple[dict[str, str], str]:
    """Templates by name ("default", "tool_use") and where they were found."""
    path = folder / "chat_template.jinja"
    if path.is_file():
        others = sorted((folder / MORE_TEMPLATES).glob("*.jinja"))
        more = {other.stem: other.read_text("utf-8") for other in others}
        return {**more, "default": path.read_text("utf-8")}, str(path)
    value = None
    for name in ("chat_template.json", "tokenizer_config.json"):
        path = folder / name
        where = f"the chat_template of {path}"
        if value := read_object(path, ChatError).get("chat_template"):
            break
    if not value:
        return {}, where
    if isinstance(value, str):
        return {"default": value}, where
    if isinstance(value, list) and all(isinstance(entry, dict) for entry in value):
        sources = {entry.get("name"): entry.get("template") for entry in value}
        if isinstance(sources.get("default"), str):
            return sources, where
    raise ChatError(f"{where} is neither a string nor a list of named ones with a 'default'")


class JinjaSegments:
    """Renders with a folder's template; finds the answers by rendering what stands before them."""

    def __init__(
        self,
        sources: Mapping[str, str],
        where: str,
        tokenizer: Tokenizer,
        stop_ids: Collection[int],
    ):
        self._templates = {
            name: JinjaTemplate(source, where, tokenizer.names) for name, source in sources.items()
        }
        written = "\n".join(sources.values())
        self._reads = read_by(written)
        self._part_types = {
            kind: f"{kind}_url" if f"{kind}_url" in written else kind for kind in self._reads
        }
        self._thinks = any("<think>" in source for source in sources.values())
        self._constants = tokenizer.names.keys()
        self._control_tokens = tokenizer.control_tokens
        ends = map(tokenizer.token_of, stop_ids)
        self._ends = [token for token in ends if token is not None]

    def __call__(self, dialogue: Dialogue) -> list[Segment]:
        name = "tool_use" if dialogue.tools and "tool_use" in self._templates else "default"
        template = self._templates[name]
        if dialogue.tools and name == "default" and "tools" not in template.variables:
            raise ChatError("the chat template has no place for tools; leave them out")
        self._check_options(template.variables, dialogue.options)
        given = (dialogue.messages, dialogue.tools, dialogue.options)
        stand_ins = StandIns(self._control_tokens, given)
        messages = [stand_ins.hide_message(self._spelled(m)) for m in dialogue.messages]
        tools, options = stand_ins.hide(dialogue.tools), stand_ins.hide(dialogue.options)

        def text(num_messages: int, prompt: bool) -> str:
            return template.text(
                {
                    **options,
                    "messages": messages[:num_messages],
                    "tools": tools or None,
                    "add_generation_prompt": prompt,
                }
            )

        whole = text(len(messages), dialogue.add_generation_prompt)
        starts: set[int] = set()
        trained: list[tuple[int, int]] = []
        for i, message in enumerate(messages):
            if message["role"] != "assistant" or (i == 0 and i not in dialogue.trained):
                continue
            before = text(i, True)
            if whole.startswith(before):
                starts.add(len(before))
            if i in dialogue.trained:
                trained.append(self._trained_span(i, before, text(i + 1, False), whole))
        return _split(whole, starts, trained, stand_ins, bool(self._reads))

    def _spelled(self, message: dict[str, Any]) -> dict[str, Any]:
        """A message whose pictures have the type that the template looks for."""
        if not isinstance(message["content"], list):
            return message
        parts = [
            part | {"type": self._part_types.get(part["type"], part["type"])}
            for part in message["content"]
        ]
        return message | {"content": parts}

    def _check_options(self, variables: frozenset[str], options: Mapping[str, Any]) -> None:
        """Refuse those that the template does not read, but for asking it to do what it does."""
        taken = {"messages", "tools", "add_generation_prompt", *self._constants}
        for key, value in options.items():
            if key in taken:
                raise ChatError(f"{key!r} cannot be set as an option of the chat template")
            if key in variables or (key == "enable_thinking" and bool(value) == self._thinks):
                continue
            if key == "enable_thinking":
                does = "always thinks" if self._thinks else "cannot think"
                raise ChatError(
                    f"enable_thinking={value!r}: with this chat template a model {does}"
                )
            raise ChatError(f"the chat template has no option {key!r}; leave it out")

    def _trained_span(self, i: int, before: str, through: str, whole: str) -> tuple[int, int]:
        """From the end of the generation prompt to the end of the stop token after the answer."""
        if not whole.startswith(through):
            raise ChatError(written_differently(i))
        if not through.startswith(before):
            raise ChatError(
                f"the template does not write messages[{i}] as a continuation of its generation "
                f"prompt, which ends {before[-40:]!r}; what is trained would never be asked for"
            )
        ends = [through.rfind(end, len(before)) + len(end) for end in self._ends if end in through]
        end = max(ends, default=0)
        if end <= len(before):
            raise ChatError(
                f"the template ends messages[{i}] with {through[-40:]!r} and none of the stop "
                f"tokens {sorted(self._ends)}; a model trained on it would not learn to stop"
            )
        return len(before), end


def _split(
    text: str,
    starts: set[int],
    trained: Sequence[tuple[int, int]],
    stand_ins: StandIns,
    has_places: bool,
) -> list[Segment]:
    """Cut rendered text wherever a property of segments changes."""
    hidden = [i for i, c in enumerate(text) if c in stand_ins.characters]
    places = [match.span() for match in _PLACE.finditer(text)] if has_places else []
    borders = {0, len(text), *starts, *hidden, *(i + 1 for i in hidden)}
    borders.update(*trained, *places)
    segments = []
    for start, end in pairwise(sorted(borders)):
        piece = text[start:end]
        segments.append(
            Segment(
                stand_ins.show(piece),
                is_trusted=piece[0] not in stand_ins.characters,
                starts_answer=start in starts,
                is_trained=any(a <= start < b for a, b in trained),
                picture=PLACES.get(piece, "") if has_places else "",
            )
        )
    return segments
