"""A progress bar with the time that is left, on stderr where that is a terminal.

    [########------------]  400/1000 | loss 2.1034 | 812 ms | moe max/mean 1.34 | 8:07 left

Its numbers are parts of the step's line, as many as the terminal has room for: it never wraps. Log
lines of the project go above it.
"""

from __future__ import annotations

import logging
import os
import sys
import time
from typing import Any, TextIO

from erniekit import metrics

# Parts of the line, of which the first is the last that a narrow terminal does without.
_SHOWN = ("loss", "left", "skipped", "reward", "moe", "right", "margin", "vision", "time")
_WIDTH = 20  # of the drawn bar, which has the room that the numbers leave
_LEAST_WIDTH = 5
_USUAL_COLUMNS = 80
_CLEAR = "\r\x1b[K"


def duration(seconds: float) -> str:
    """1:02:03, or 2:03 below an hour."""
    minutes, s = divmod(round(max(seconds, 0)), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours}:{m:02d}:{s:02d}" if hours else f"{m}:{s:02d}"


def fitted(step: int, total: int, parts: dict[str, str], room: int) -> str:
    """The text of a bar in at most `room` columns, with those of `parts` that fit in them."""
    head = f"{step:{len(str(total))}d}/{total}"
    kept, left = set(), room - len(head)
    for name in (name for name in _SHOWN if name in parts):
        size = len(f" | {parts[name]}")
        if size > left:
            break
        kept.add(name)
        left -= size
    text = " | ".join([head, *(part for name, part in parts.items() if name in kept)])
    width = min(left - len("[] "), _WIDTH)
    filled = "#" * (width * step // total)
    drawn = f"[{filled:-<{width}}] " if width >= _LEAST_WIDTH else ""
    return (drawn + text)[: max(room, 0)]


def _columns(out: TextIO) -> int:
    """Of the terminal, which may change its size; the usual ones where it does not tell."""
    try:
        return os.get_terminal_size(out.fileno()).columns or _USUAL_COLUMNS
    except OSError:  # no terminal
        return _USUAL_COLUMNS


class Bar:
    """The bar of a run that begins after `step` of `num_steps` steps.

    While it is open, every handler of the "erniekit" logger first clears its line.
    """

    def __init__(self, step: int, num_steps: int, out: TextIO | None = None) -> None:
        self.first, self.num_steps, self.out = step, num_steps, out or sys.stderr
        self.begun: float | None = None  # when the first step began
        self.handlers = list(logging.getLogger("erniekit").handlers)
        for handler in self.handlers:
            handler.addFilter(self._make_room)

    def update(self, record: dict[str, Any]) -> None:
        """Show a step. Time left is that of all steps so far, evaluations and saves included."""
        step, total, now = record["step"], self.num_steps, time.monotonic()
        self.begun = now - record["seconds"] if self.begun is None else self.begun
        left = (now - self.begun) / max(step - self.first, 1) * (total - step)
        parts = metrics.told(record, is_short=True) | {"left": f"{duration(left)} left"}
        self._show(_CLEAR + fitted(step, total, parts, _columns(self.out) - 1))

    def close(self) -> None:
        self._show(_CLEAR)
        for handler in self.handlers:
            handler.removeFilter(self._make_room)

    def _make_room(self, _: logging.LogRecord) -> bool:
        self._show(_CLEAR)
        return True

    def _show(self, text: str) -> None:
        self.out.write(text)
        self.out.flush()
