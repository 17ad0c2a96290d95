"""Where in a line of JSON a value stands, so that an editor can jump to it."""

from __future__ import annotations

import json
import re
from json.decoder import scanstring  # type: ignore[attr-defined]

_STEP = re.compile(r"[^.\[\]]+")
_BLANK = re.compile(r"[ \t\n\r]*")
_decode = json.JSONDecoder().raw_decode


def column_of(text: str, path: str) -> int | None:
    """The first character, from 1, of the value at a path such as `messages[2].content` in JSON
    text; of the value around it where the path ends earlier; None without a path or JSON.
    """
    if not path:
        return None
    at = _BLANK.match(text).end()  # type: ignore[union-attr]
    try:
        for step in _STEP.findall(path):
            inner = _start_of(text, at, step)
            if inner is None:
                break
            at = inner
    except (ValueError, RecursionError, IndexError):
        return None
    return at + 1


def _start_of(text: str, at: int, step: str) -> int | None:
    """Where the value of a key (of an object) or a number (of an array) starts; None for none."""
    kind, count, found = text[at], 0, None
    if kind not in "{[":
        return None
    at = _skipped(text, at + 1)
    while text[at] not in "}]":
        name = str(count)
        if kind == "{":
            name, at = scanstring(text, at + 1)
            at = _skipped(text, _skipped(text, at) + 1)
        if name == step:
            found = at
        _, at = _decode(text, at)
        at = _skipped(text, at)
        if text[at] == ",":
            at = _skipped(text, at + 1)
        count += 1
    return found


def _skipped(text: str, at: int) -> int:
    return _BLANK.match(text, at).end()  # type: ignore[union-attr]
