"""The life of the engine's process, seen from the API process: started, watched, started again.

    LOADING --Ready--> SERVING --death or hang--> LOADING ... --too often--> FAILED
       |                  |
       +------ stop ------+--> STOPPED

A death shows at once, as the end of the link. A hang is silence (no message for SILENCE_S: the
process is stopped or starved) or a step that goes on for longer than `step_timeout_s`; then the
process is asked for the stacks of its threads, on stderr, and killed.

A process that dies within YOUNG_S of being ready, before it has finished a request, is a bad
start; after MAX_BAD_STARTS of them in a row nobody tries again. The first load of all gets one try.
"""

from __future__ import annotations

import asyncio
import enum
import logging
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from fastdeploy.server.link import (
    Beat,
    FromEngine,
    Message,
    Ready,
    Refused,
    ServerEnd,
    Start,
    frame,
)

log = logging.getLogger("fastdeploy")

TICK_S = 0.25
SILENCE_S = 8.0  # a working process beats twice a second
LOADING_SILENCE_S = 120.0  # libraries that are mapped from a slow disk stop all threads
DUMP_S = 0.5  # what a process gets to write its stacks
GRACE_S = 3.0  # what a process gets to end once its link is closed
YOUNG_S = 60.0
MAX_BAD_STARTS = 5
MAX_PAUSE_S = 8.0  # between two bad starts


class State(enum.Enum):
    LOADING = "loading"
    SERVING = "serving"
    FAILED = "failed"
    STOPPED = "stopped"


class Process(Protocol):
    """What is used of a subprocess.Popen."""

    pid: int

    def poll(self) -> int | None: ...
    def kill(self) -> None: ...
    def send_signal(self, sig: int) -> None: ...


@dataclass(frozen=True, slots=True)
class Child:
    process: Process
    end: socket.socket  # ours, of the link


def spawn(log_level: str = "info", log_format: str = "text") -> Child:
    """The engine's process, which waits for Start; it logs as this one does."""
    ours, theirs = socket.socketpair()
    with theirs:
        number = theirs.fileno()
        # -P: the folder we were started in is searched only if this process searches it.
        module = [sys.executable, "-P", "-m", "fastdeploy.server.engine_process"]
        process = subprocess.Popen(
            [*module, str(number), str(os.getpid()), log_level, log_format],
            stdin=subprocess.DEVNULL,
            stdout=sys.stderr.fileno(),
            pass_fds=[number],
            env=os.environ | {"PYTHONPATH": os.pathsep.join(p or os.getcwd() for p in sys.path)},
            start_new_session=True,  # Ctrl-C is for this process
        )
    return Child(process, ours)


class Supervisor:
    """Keeps an engine's process alive; all of it happens on one event loop.

    `receive` gets the engine's messages but beats, `lost` is called when a process is gone, and
    `start` tells a new one what to load.
    """

    def __init__(
        self,
        start: Callable[[], Start],
        receive: Callable[[FromEngine], None],
        lost: Callable[[], None],
        *,
        step_timeout_s: float,
        spawn: Callable[[], Child] = spawn,
    ) -> None:
        self.start_message, self.receive, self.lost = start, receive, lost
        self.step_timeout_s, self.spawn = step_timeout_s, spawn
        self.state = State.LOADING
        self.reason = "the engine is loading the model"  # why it does not serve
        self.refusal: str | None = None  # what a user has to set right, if that is why it failed
        self.num_restarts = 0
        self.has_served = False  # the present process has finished a request
        self.was_ready = False  # some process has been
        self.child: Child | None = None
        self.link: ServerEnd | None = None
        self.silent_ticks = 0
        self.step_s = 0.0
        self.ready_at: float | None = None

    async def run(self) -> None:
        """Start the process, and again whenever it is lost, until it fails or this is cancelled."""
        num_bad = 0
        while True:
            self.ready_at, self.has_served, self.refusal = None, False, None
            reason = await self._live()
            age_s = 0.0 if self.ready_at is None else time.monotonic() - self.ready_at
            num_bad = 0 if self.has_served or age_s > YOUNG_S else num_bad + 1
            if not self.was_ready or num_bad >= MAX_BAD_STARTS:
                self._fail(reason, num_bad)
                return
            self.num_restarts += 1
            self.reason = f"the engine is being started again, because {reason}"
            log.error(
                "%s; starting it again (weights that were updated in place are the folder's again)",
                reason,
            )
            await asyncio.sleep(min(2.0 ** (num_bad - 2), MAX_PAUSE_S) if num_bad > 1 else 0)

    def send(self, *messages: Message) -> None:
        """Send all or nothing. Raises RequestError for what cannot be sent."""
        data = b"".join(map(frame, messages))
        if self.link is not None:
            self.link.send(data)

    async def stop(self) -> None:
        """End the process in order, by force after GRACE_S."""
        self._enter(State.STOPPED, "the server is stopping")
        if self.link is not None:
            self.link.close()
        await self._buried(GRACE_S)

    async def _live(self) -> str:
        """One process from its start to its end; returns why it ended, for a sentence."""
        self.child = self.spawn()
        self.silent_ticks, self.step_s = 0, 0.0
        loop = asyncio.get_running_loop()
        _, self.link = await loop.create_unix_connection(
            lambda: ServerEnd(self._take), sock=self.child.end
        )
        try:
            self.link.send(frame(self.start_message()))
            hang = await self._hang()
            if hang is not None:
                await self._kill_with_stacks(hang)
        finally:
            self.link.close()
            if self.state is State.SERVING:
                self._enter(State.LOADING, "the engine is being started again")
            self.lost()
        status = await self._buried(GRACE_S)
        return hang or f"the engine {_fate(status)}"

    async def _hang(self) -> str | None:
        """Wait for the end of the link, which is None, or for a hang, which is described."""
        assert self.link is not None
        while True:
            done, _ = await asyncio.wait({self.link.closed}, timeout=TICK_S)
            if done:
                return None
            # Ticks and not a clock: while this process itself is stopped, no tick is counted.
            self.silent_ticks += 1
            is_loading = self.state is not State.SERVING
            patience_s = LOADING_SILENCE_S if is_loading else SILENCE_S
            if self.silent_ticks * TICK_S > patience_s:
                return f"the engine was silent for {patience_s:.0f} s"
            if self.step_s > self.step_timeout_s:
                return f"a step of the engine took more than {self.step_timeout_s:.0f} s"

    async def _kill_with_stacks(self, reason: str) -> None:
        assert self.child is not None
        log.error("%s: the stacks of its threads follow if it can still write them", reason)
        self._enter(State.LOADING, reason)
        self.child.process.send_signal(signal.SIGUSR1)
        await asyncio.sleep(DUMP_S)
        self.child.process.kill()

    async def _buried(self, patience_s: float) -> int | None:
        """The exit status of the process, which is killed when it takes longer than this."""
        if self.child is None:
            return None
        process, until = self.child.process, time.monotonic() + patience_s
        while (status := process.poll()) is None:
            if time.monotonic() > until:
                process.kill()
            await asyncio.sleep(0.01)
        return status

    def _take(self, message: FromEngine) -> None:
        self.silent_ticks = 0
        if isinstance(message, Beat):
            self.step_s = message.step_s
        elif isinstance(message, Ready):
            self.ready_at, self.was_ready = time.monotonic(), True
        elif isinstance(message, Refused):
            self.refusal = message.message
        self.receive(message)
        if isinstance(message, Ready):
            self._enter(State.SERVING, "")

    def _fail(self, reason: str, num_bad: int) -> None:
        if self.refusal is None:
            often = f" {num_bad} times in a row" if num_bad > 1 else " while it was starting"
            reason = f"{reason}{often}; giving up"
            log.error("%s", reason)
        self._enter(State.FAILED, self.refusal or reason)

    def _enter(self, state: State, reason: str) -> None:
        self.state, self.reason = state, reason


def _fate(status: int | None) -> str:
    if status is not None and status < 0:
        return f"was ended by {signal.Signals(-status).name}"
    return f"exited with status {status}"
