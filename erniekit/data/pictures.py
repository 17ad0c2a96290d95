"""Records of a model that reads pictures, to dialogues: of every format, with those pictures.

    published  {"text_info": [{"text", "tag": "mask" or "no_mask"}, ...], "order"?, "is_system"?,
                "image_info"?: [{"image_url", "matched_text_index"}, ...], "video_info"?: [same],
                "system"?, "tools"?}
    query      {"query", "response", "images"?, "videos"?, "history"?: [[query, response], ...],
                "system"?}
    any other  as in `erniekit.data.dialogue`, with "images"? and "videos"?

The first two are of type `erniekit`, told apart by their keys. A picture of the published format
stands before the text of its index; `order`, a list of [type, index], says it outright. `<image>`
and `<video>` in a question, of any format, are the places of `images` and `videos`; those without a
place stand in front, and a place without one is a fault. Messages may have the parts of
`ernie.vision.prompt` instead.

A picture is a URL, a path (from the folder of the data file, else from the working folder), or
base64; a clip may be a list of frames. A file that is not there is refused here, one that cannot be
read by `erniekit.data.multimodal`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest
from pathlib import Path
from typing import Any

from ernie.chat.messages import MEDIA
from erniekit.data.dialogue import (
    Dialogue,
    Written,
    checked_dialogue,
    first_is_system,
    history_of,
    written,
)
from erniekit.data.fields import kind_of
from erniekit.data.sources import DataError, Source

FOLDER = "media_folder"  # key of a record: where its relative paths start
KINDS = ("image", "video")
READS = frozenset(KINDS)
_TAG = re.compile(r"<(image|video)>")
_BASE64 = re.compile(r"[A-Za-z0-9+/\s]{64,}={0,2}\s*")
_SCHEME = re.compile(r"(https?|data|file):", re.IGNORECASE)


class Beside:
    """A source whose records find their pictures beside its file."""

    def __init__(self, source: Source) -> None:
        self._source = source

    def __getattr__(self, name: str) -> Any:
        return getattr(self._source, name)

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> Any:
        record = self._source[index]
        if not isinstance(record, dict):
            return record
        return {FOLDER: str(self._source.path.parent), **record}


def read_pictured(record: Any, kind: str) -> Dialogue:
    """The dialogue in a record, pictures not read yet; raises DataError for one that cannot be
    used, or whose pictures are not there.
    """
    if not isinstance(record, dict):
        raise DataError(f"{kind_of(record)}; expected an object")
    places = Places(Path(record.get(FOLDER, ".")))
    found = _written(record, kind, places)
    messages = _tagged(found.messages, record, places)
    return checked_dialogue(record, replace(found, messages=messages), READS)


@dataclass(frozen=True)
class Places:
    """Where the pictures of a record are."""

    folder: Path

    def part(self, kind: str, value: Any, at: str) -> dict[str, Any]:
        """The part of a message for a picture that stands at `at` of a record."""
        if isinstance(value, list) and kind == "video":
            return {"type": kind, kind: [self.source(v, f"{at}[{i}]") for i, v in enumerate(value)]}
        return {"type": kind, kind: self.source(value, at)}

    def source(self, value: Any, at: str) -> str:
        """A URL, an absolute path, or base64 as a data URL; raises DataError."""
        if isinstance(value, Mapping):
            value = value.get("url", value.get("path"))
        if not isinstance(value, str) or not value.strip():
            raise DataError(f"{at} is {value!r:.40}; expected a URL or a path", at=at)
        if _SCHEME.match(value):
            return value
        for folder in (self.folder, Path()):
            path = folder / value
            if len(value) < 1024 and path.is_file():
                return str(path.resolve())
        if _BASE64.fullmatch(value):
            return f"data:;base64,{value}"
        raise DataError(f"{at}: there is no file {value!r:.200}; give a path or a URL", at=at)


def _written(record: Mapping[str, Any], kind: str, places: Places) -> Written:
    if kind == "erniekit" and "text_info" in record:
        return _from_text_info(record, places)
    if kind == "erniekit" and "query" in record:
        return _from_query(record)
    found = written(record, kind)
    messages = [
        {**m, "content": _located(m["content"], places, f"{at}.content")}
        if isinstance(m, Mapping) and isinstance(m.get("content"), list)
        else m
        for m, at in zip(found.messages, found.places)
    ]
    return replace(found, messages=messages)


def _from_text_info(record: Mapping[str, Any], places: Places) -> Written:
    messages: list[dict[str, Any]] = []
    where: list[str] = []
    parts: list[dict[str, Any]] = []  # of the question that is being read
    asked = ""  # where the last of them stands

    def put(at: str, role: str, content: Any, **more: Any) -> None:
        messages.append({"role": role, "content": content, **more})
        where.append(at)

    items = _items_of(record)
    if first_is_system(record) and items and items[0][0] == "text":
        _, entry, at = items.pop(0)
        put(at, "system", entry["text"])
    for kind, entry, at in items:
        if kind != "text":
            key = "image_url" if "image_url" in entry else f"{kind}_url"
            parts.append(places.part(kind, entry.get(key), f"{at}.{key}"))
            asked = at
        elif entry.get("tool_response") is not None:
            result = entry["tool_response"]
            text = result if isinstance(result, str) else json.dumps(result, ensure_ascii=False)
            put(at, "tool", [*parts, {"type": "text", "text": text}])
            parts = []
        elif entry["tag"] == "mask":
            parts.append({"type": "text", "text": entry["text"]})
            asked = at
        else:
            if parts:
                put(asked, "user", parts)
                parts = []
            calls = entry.get("tool_calls")
            put(at, "assistant", entry["text"], **({"tool_calls": calls} if calls else {}))
    if parts:
        raise DataError(
            f"{items[-1][2]} is a question without an answer; expected a last text with the tag "
            "no_mask",
            at=items[-1][2],
        )
    return Written(messages, where, record.get("tools"))


def _items_of(record: Mapping[str, Any]) -> list[tuple[str, dict[str, Any], str]]:
    """(kind, entry, where) of texts and pictures of the published format in their order."""
    entries: dict[str, list[Any]] = {}
    for kind in ("text", *KINDS):
        found = record.get(f"{kind}_info") or []
        if not isinstance(found, list) or not all(isinstance(entry, dict) for entry in found):
            raise DataError(f"{kind}_info is not a list of objects", at=f"{kind}_info")
        entries[kind] = found
    for i, entry in enumerate(entries["text"]):
        at = f"text_info[{i}]"
        if entry.get("tag") not in ("mask", "no_mask"):
            raise DataError(f"{at}.tag is {entry.get('tag')!r}; expected mask or no_mask", at=at)
        if not isinstance(entry.get("text"), str) and "tool_response" not in entry:
            raise DataError(f"{at}.text is {entry.get('text')!r:.40}; expected text", at=at)
    if record.get("order") is not None:
        sequence = _given_order(record["order"], entries)
    else:
        sequence = _order_by_index(entries)
    return [(kind, entries[kind][i], f"{kind}_info[{i}]") for kind, i in sequence]


def _order_by_index(entries: Mapping[str, Sequence[Any]]) -> list[tuple[str, int]]:
    """Each picture before the text that it is matched with."""
    num_texts = len(entries["text"])
    before: dict[int, list[tuple[str, int]]] = {}
    for kind in KINDS:
        for i, entry in enumerate(entries[kind]):
            index, at = entry.get("matched_text_index", 0), f"{kind}_info[{i}].matched_text_index"
            if type(index) is not int or not 0 <= index < num_texts:
                raise DataError(
                    f"{at} is {index!r:.40}; expected a number from 0 to {num_texts - 1}", at=at
                )
            before.setdefault(index, []).append((kind, i))
    if (
        entries["image"]
        and entries["video"]
        and any(len({k for k, _ in b}) > 1 for b in before.values())
    ):
        raise DataError(
            "images and videos stand before one text; expected order to tell which first"
        )
    return [item for i in range(num_texts) for item in (*before.get(i, ()), ("text", i))]


def _given_order(order: Any, entries: Mapping[str, Sequence[Any]]) -> list[tuple[str, int]]:
    """`[[type, index], ...]`, or `{"type": [...], "index": [...]}`; names each entry once."""
    if isinstance(order, Mapping):
        kinds, indices = order.get("type"), order.get("index")
        is_table = isinstance(kinds, list) and isinstance(indices, list)
        order = list(zip_longest(kinds or (), indices or ())) if is_table else None
    wanted = sorted((kind, i) for kind, found in entries.items() for i in range(len(found)))
    try:
        given = [(str(kind), int(i)) for kind, i in order]
    except (TypeError, ValueError):
        given = []
    if sorted(given) != wanted:
        raise DataError(
            f"order does not name each of the {len(wanted)} texts, images and videos once; "
            'expected [["image", 0], ["text", 0], ...]',
            at="order",
        )
    return given


def _from_query(record: Mapping[str, Any]) -> Written:
    earlier = history_of(record)
    messages = [
        *earlier.messages,
        {"role": "user", "content": record["query"]},
        {"role": "assistant", "content": record.get("response")},
    ]
    return Written(messages, [*earlier.places, "query", "response"], record.get("tools"))


def _located(content: list[Any], places: Places, at: str) -> list[Any]:
    """The parts of a message with sources that can be read from anywhere."""
    parts = []
    for i, part in enumerate(content):
        kind = part.get("type") if isinstance(part, Mapping) else None
        if not isinstance(kind, str) or kind not in MEDIA:
            parts.append(part)
            continue
        source, here = part.get(kind), f"{at}[{i}].{kind}"
        if isinstance(source, Mapping):
            source = {**source, "url": places.source(source, here)}
            parts.append({"type": kind, kind: source})
        else:
            parts.append(places.part(MEDIA[kind], source, here))
    return parts


def _tagged(messages: list[Any], record: Mapping[str, Any], places: Places) -> list[Any]:
    """Messages with the pictures of `images` and `videos` in the places of their tags; those that
    have none stand in front of the first question. Raises DataError for a place without a picture.
    """
    waiting: dict[str, list[dict[str, Any]]] = {}
    for kind in KINDS:
        found = record.get(f"{kind}s") or []
        found = found if isinstance(found, list) else [found]
        waiting[kind] = [places.part(kind, v, f"{kind}s[{i}]") for i, v in enumerate(found)]
    has_pictures = any(waiting.values())
    asked = [part for message in messages for part in _asked(message)]
    tags = [tag for part in asked for tag in _TAG.findall(_text(part))]
    front: list[dict[str, Any]] = []
    for kind in KINDS:
        missing = len(waiting[kind]) - tags.count(kind)
        if missing < 0:
            raise DataError(
                f"{tags.count(kind)} places <{kind}> and {len(waiting[kind])} {kind}s; "
                "expected a picture for each place",
                at=f"{kind}s",
            )
        front += waiting[kind][:missing]
        waiting[kind] = waiting[kind][missing:]
    if not has_pictures:
        return messages
    result = []
    for message in messages:
        if parts := _asked(message):
            content = [*front, *_placed(parts, waiting)]
            message, front = {**message, "content": content}, []
        result.append(message)
    return result


def _asked(message: Any) -> list[Any]:
    """The parts of a question; none of any other message."""
    if not isinstance(message, Mapping) or message.get("role") != "user":
        return []
    content = message.get("content")
    if isinstance(content, str):
        return [{"type": "text", "text": content}]
    return content if isinstance(content, list) else []


def _text(part: Any) -> str:
    """That of a part of text; the empty string of any other."""
    text = part.get("text") if isinstance(part, Mapping) and part.get("type") == "text" else ""
    return text if isinstance(text, str) else ""


def _placed(parts: list[Any], waiting: Mapping[str, list[dict[str, Any]]]) -> Iterator[Any]:
    """The parts, and a picture for each tag in their texts."""
    for part in parts:
        if not (text := _text(part)):
            yield part
            continue
        for i, piece in enumerate(_TAG.split(text)):
            if i % 2:
                yield waiting[piece].pop(0)
            elif piece:
                yield {"type": "text", "text": piece}
