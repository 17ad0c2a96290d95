"""A progress bar with the time that is left, on stderr where that is a terminal.

    [########------------]  400/1000 | loss 2.1034 | 812 ms | 8:07 left

Log lines of the project go above it.
"""

from __future__ import annotations

import logging
import sys
import time
from typing import Any, TextIO

_WIDTH = 20
_CLEAR = "\r\x1b[K"


def duration(seconds: float) -> str:
    """1:02:03, or 2:03 below an hour."""
    minutes, s = divmod(round(max(seconds, 0)), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours}:{m:02d}:{s:02d}" if hours else f"{m}:{s:02d}"


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
        filled = "#" * (_WIDTH * step // total)
        left = (now - self.begun) / max(step - self.first, 1) * (total - step)
        text = (
            f"[{filled:-<{_WIDTH}}] {step:{len(str(total))}d}/{total} | loss {record['loss']:.4f} "
            f"| {record['seconds'] * 1000:,.0f} ms | {duration(left)} left"
        )
        self._show(_CLEAR + text)

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
