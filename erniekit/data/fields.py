"""Fields of records that must be text, read and checked, and how a fault shows a wrong value."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from erniekit.data.sources import DataError


def text_of(record: Mapping[str, Any], key: str) -> str:
    """The text of a field; raises DataError for anything else, and for blanks alone."""
    value = record.get(key)
    if not isinstance(value, str) or not value.strip():
        raise DataError(f"{key} is {_shown(value)}; expected text", at=key)
    return value


def texts_of(record: Mapping[str, Any], key: str) -> list[str]:
    """The texts of a field, which may be one alone; raises DataError as `text_of`."""
    value = record.get(key)
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not texts:
        raise DataError(f"{key} is {_shown(value)}; expected a list of texts", at=key)
    for i, text in enumerate(texts):
        if not isinstance(text, str) or not text.strip():
            raise DataError(f"{key}[{i}] is {_shown(text)}; expected text", at=f"{key}[{i}]")
    return texts


def is_blank(content: Any) -> bool:
    """Whether the content of a message, text or parts, is there and says and shows nothing."""
    if isinstance(content, list):
        return all(
            isinstance(part, Mapping) and part.get("type") == "text" and is_blank(part.get("text"))
            for part in content
        )
    return isinstance(content, str) and not content.strip()


def short(value: Any) -> str:
    """A value as it is written, or the beginning of it."""
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:37]}..."


_KINDS = {dict: "an object", list: "a list", str: "a string", bool: "true or false"}


def kind_of(value: Any) -> str:
    """What a value of a record is, as JSON calls it."""
    if value is None:
        return "null"
    return _KINDS.get(type(value), "a number")


def _shown(value: Any) -> str:
    if value is None:
        return "missing"
    return "empty" if value in ("", []) or isinstance(value, str) else kind_of(value)
