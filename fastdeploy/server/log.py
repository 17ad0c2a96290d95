"""The log's lines: text or JSON, with the id of the request that they are about.

No prompt and no answer is ever logged. What a client could have chosen (a path, a name in an error)
is escaped where it would end a line or turn the reader's terminal over.
"""

from __future__ import annotations

import json
import logging
import re
import sys
import uuid
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

_WELL_FORMED = re.compile(rb"[A-Za-z0-9][A-Za-z0-9._:-]{0,127}")


@dataclass(frozen=True, slots=True)
class Origin:
    """The HTTP request that something is done for, and its span where there are traces."""

    request_id: str
    span: Any = None


ORIGIN: ContextVar[Origin | None] = ContextVar("origin", default=None)


def request_id_of(given: bytes) -> str:
    """A client's `x-request-id` if it is well formed, else a new one."""
    return given.decode() if _WELL_FORMED.fullmatch(given) else uuid.uuid4().hex


def set_up(level: str, form: str) -> None:
    """Send the log to standard error, `form` being text or json."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines() if form == "json" else TextLines())
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)


def escaped(text: str) -> str:
    """`text` on one line, with characters that do not print written as escapes."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


class TextLines(logging.Formatter):
    """`2026-01-31 12:00:00,000 I [request id] message`, and a traceback indented below it."""

    def format(self, record: logging.LogRecord) -> str:
        request_id = _request_id(record)
        head = f"{self.formatTime(record)} {record.levelname[0]} "
        lines = [head + (f"[{request_id}] " if request_id else "") + escaped(record.getMessage())]
        if record.exc_info:
            trace = self.formatException(record.exc_info).split("\n")
            lines += [f"  | {escaped(line)}" for line in trace]
        return "\n".join(lines)


class JsonLines(logging.Formatter):
    """An object for each entry: time, level, logger, message; request_id and exception if any."""

    def format(self, record: logging.LogRecord) -> str:
        entry = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if request_id := _request_id(record):
            entry["request_id"] = request_id
        if record.exc_info:
            entry["exception"] = self.formatException(record.exc_info)
        return json.dumps(entry)


def _request_id(record: logging.LogRecord) -> str | None:
    origin = getattr(record, "origin", None) or ORIGIN.get()
    return origin.request_id if origin else None
