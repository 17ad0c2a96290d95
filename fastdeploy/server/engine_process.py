"""The engine's process: loads the model, obeys the API process, steps, and says what came of it.

    main thread       messages, then a step, and so on; all that touches the engine
    reader            takes messages off the link; its end is the end of this process
    heart             a Beat twice a second, whatever the main thread is doing
    one per adapter   reads its files while the engine goes on

Started by `server.supervisor`. It ignores Ctrl-C and SIGTERM, which are for the API process, and
ends when that is gone: by the end of the link, and on Linux by a signal of the kernel as well.
SIGUSR1 writes the stacks of all threads to stderr.
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import json
import logging
import os
import queue
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from fastdeploy.config import EngineConfig
from fastdeploy.errors import RequestError
from fastdeploy.server.link import (
    Abort,
    Add,
    Beat,
    Command,
    Done,
    EngineEnd,
    Outputs,
    Problem,
    Ready,
    Refused,
    Rejected,
    Start,
    ToEngine,
)
from fastdeploy.server.log import set_up

if TYPE_CHECKING:
    from fastdeploy.engine.adapters import Slices
    from fastdeploy.engine.core import Engine
    from fastdeploy.engine.loading import Loaded

log = logging.getLogger("fastdeploy")

BEAT_S = 0.5
GRACE_S = 2.0  # from the end of the link to the end of a process that is inside a step
PR_SET_PDEATHSIG = 1
# Methods of the engine that the API process may call, with arguments and results that are plain.
# `load_adapter` is a command beside them: a thread reads the files first.
COMMANDS = frozenset(
    {
        "pause",
        "resume",
        "sleep",
        "wake_up",
        "reset_prefix_cache",
        "update_weights",
        "unload_adapter",
    }
)


class EngineProcess:
    """The engine and its link. `run` is the main thread's; `inbox` gets what it has to do."""

    def __init__(self, link: EngineEnd) -> None:
        self.link = link
        self.inbox: queue.SimpleQueue[ToEngine | partial[None] | None] = queue.SimpleQueue()
        self.loaded: Loaded | None = None
        self.step_began: float | None = None  # None between steps
        self.link_ended, self.ended = threading.Event(), threading.Event()

    @property
    def engine(self) -> Engine:
        assert self.loaded is not None, "the model is not loaded"
        return self.loaded.engine

    def run(self) -> int:
        """The whole life; returns the exit status."""
        for work in (self._read, self._beat):
            threading.Thread(target=work, name=work.__name__, daemon=True).start()
        try:
            start = self.inbox.get()
            if start is None:
                return 0
            assert isinstance(start, Start), f"{type(start).__name__} came before Start"
            if not self._load(start):
                return 2
            while self._obey():
                if self.engine.has_work:
                    self._step()
            return 0
        except (BrokenPipeError, ConnectionResetError):
            return 0  # the API process has gone
        except Exception:
            # Nothing can be trusted after this: the API process starts another one.
            log.exception("the engine has failed")
            return 1
        finally:
            self.ended.set()

    def _load(self, start: Start) -> bool:
        from fastdeploy.engine.loading import load

        try:
            loaded = load(EngineConfig(**json.loads(start.config)))
            engine = loaded.engine
            for name, folder in start.adapters.items():
                _load_adapter(engine, name, folder, may_fail=start.is_restart)
        except ValueError as error:
            if type(error) is ValueError:
                raise  # what a user can cause has a class of its own
            self.link.send(Refused(str(error)))
            return False
        if start.paused:
            engine.pause("keep")
        self.loaded = loaded
        thinks = engine.think_tags is not None
        num_blocks, eos_ids = len(engine.blocks.blocks), sorted(engine.eos_ids)
        names = list(engine.adapters.by_name)
        self.link.send(
            Ready(engine.vocab_size, num_blocks, thinks, eos_ids, loaded.defaults, names)
        )
        self._say_beat()
        return True

    def _step(self) -> None:
        self.step_began = time.monotonic()
        outputs = self.engine.step()
        self.step_began = None
        self.link.send(Outputs(outputs, self.engine.stats()))

    def _obey(self) -> bool:
        """Do what the inbox says, waiting for something to do; False when the link has ended."""
        has_changed = False
        while True:
            try:
                message = self.inbox.get(block=not (self.engine.has_work or has_changed))
            except queue.Empty:
                if has_changed:  # the API process is not to wait for figures of a rest
                    self._say_beat()
                    has_changed = False
                    continue
                return True
            if message is None:
                return False
            has_changed |= not isinstance(message, Add)
            self._do(message)

    def _do(self, message: ToEngine | partial[None]) -> None:
        match message:
            case Add():
                self._add(message)
            case Abort():
                for request_id in message.ids:
                    self.engine.abort(request_id)
            case Command(name="load_adapter"):
                work = partial(self._read_adapter, message)
                threading.Thread(target=work, name="adapter", daemon=True).start()
            case Command(name=name) if name in COMMANDS:
                self._answer(message, getattr(self.engine, name))
            case Command():
                raise AssertionError(f"{message.name!r} is not one of the commands")
            case partial():
                message()
            case _:
                raise AssertionError(f"{type(message).__name__} came twice")

    def _add(self, add: Add) -> None:
        engine = self.engine
        try:
            adapter = None if add.adapter is None else engine.adapters.get(add.adapter)
            pictures, ids = add.pictures, add.prompt_ids
            prompt = ids if pictures is None else pictures.inputs(ids)
            for index, request_id in enumerate(add.ids):
                order = replace(add.order, sample_index=index)
                engine.add(request_id, prompt, add.params, order, adapter)
        except RequestError as error:
            for request_id in add.ids:
                engine.abort(request_id)
            self.link.send(Rejected(add.ids, Problem.of(error)))

    def _answer(self, command: Command, do: Callable[..., Any]) -> None:
        """Call what a command names; errors of the user go back, others end the process."""
        value, problem = None, None
        try:
            value = do(**command.arguments)
        except (ValueError, OSError) as error:
            if type(error) is ValueError:
                raise
            problem = _problem(error)
        self._say_beat()  # figures first: whoever gets the answer may look at them
        self.link.send(Done(command.number, value, problem))

    def _read_adapter(self, command: Command) -> None:
        """A thread: read the files, then have the main thread offer the adapter."""
        adapters = self.engine.adapters
        offer: partial[None]
        try:
            adapters.check_name(command.arguments["name"])
            adapter = adapters.read(command.arguments["folder"])
        except Exception as error:  # for the main thread, which says it or dies of it
            offer = partial(_raise, error)
        else:
            offer = partial(_offer, self.engine, adapter)
        self.inbox.put(partial(self._answer, command, offer))

    def _read(self) -> None:
        while (message := self.link.receive()) is not None:
            self.inbox.put(message)
        self.inbox.put(None)
        self.link_ended.set()

    def _beat(self) -> None:
        with contextlib.suppress(OSError):  # the reader sees the end of the link as well
            while not self.ended.wait(BEAT_S):
                self._say_beat()

    def _say_beat(self) -> None:
        began = self.step_began
        step_s = 0.0 if began is None else time.monotonic() - began
        self.link.send(Beat(step_s, self.loaded.engine.stats() if self.loaded else None))


def _load_adapter(engine: Engine, name: str, folder: str, *, may_fail: bool) -> None:
    try:
        engine.adapters.check_name(name)
        engine.load_adapter(name, engine.adapters.read(folder))
    except (ValueError, OSError) as error:
        if not may_fail or type(error) is ValueError:
            raise
        log.error("the adapter %r is left out, as it cannot be loaded again: %s", name, error)


def _offer(engine: Engine, adapter: Slices, *, name: str, folder: str) -> None:
    engine.load_adapter(name, adapter)


def _raise(error: Exception, **_: str) -> None:
    raise error


def _problem(error: Exception) -> Problem:
    """An error of a command in the user's words; a path of ours is none of them."""
    if isinstance(error, OSError):
        return Problem(f"the files cannot be read: {error.strerror}", None, 400)
    return Problem.of(error)


def main(number: int, parent: int, log_level: str, log_format: str) -> int:
    """Serve the link whose socket has this file number, for as long as `parent` lives."""
    for name in (signal.SIGINT, signal.SIGTERM):
        signal.signal(name, signal.SIG_IGN)  # also of the ranks, which inherit it
    faulthandler.register(signal.SIGUSR1)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        return 1  # gone already
    set_up(log_level, log_format)
    os.set_inheritable(number, False)  # or a child of ours would hold the link open
    process = EngineProcess(EngineEnd(socket.socket(fileno=number)))
    threading.Thread(target=_end_late, args=(process,), daemon=True).start()
    return process.run()


def _end_late(process: EngineProcess) -> None:
    """A thread: ends the process soon after its link, in whatever it is."""
    process.link_ended.wait()
    time.sleep(GRACE_S)
    os._exit(1)


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:]))
