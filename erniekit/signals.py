"""SIGTERM and Ctrl-C while a run trains: it is asked to finish its step and save."""

from __future__ import annotations

import logging
import signal
from types import FrameType

log = logging.getLogger("erniekit")

# Exit status of a run that was asked to stop.
STOPPED = {signal.SIGTERM: 0, signal.SIGINT: 130}


class CaughtSignals:
    """While active, the first signal is noted (`caught`); a second Ctrl-C stops at once."""

    def __init__(self) -> None:
        self.caught = False
        self.exit_status = 0

    def __enter__(self) -> CaughtSignals:
        self.before = {s: signal.signal(s, self._note) for s in STOPPED}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _: FrameType | None) -> None:
        self.caught = True
        self.exit_status = STOPPED[signal.Signals(number)]
        log.warning("stopping after this step (%s)", signal.Signals(number).name)
        signal.signal(number, self.before[signal.Signals(number)])
