"""Signs of life between ranks: each writes one a second into the store that torchrun keeps.

An exchange that fails does not say who failed; the signs do. A rank that was silent for longer than
the run's patience ends the others even where they are waiting in an exchange that would never
return. Keys are `alive/<rank>`: a count, the rank's step and where it is; and `left/<rank>`: why it
went.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import sys
import threading
import time

import torch.distributed as dist

log = logging.getLogger("erniekit")

PULSE_S = 1.0
LOST_PULSES = 4  # without a sign for so many pulses a rank is named as missing
EXIT_CODE = 1
WAITS = "an exchange"


class Watch:
    """A thread that shows that rank `rank` of `size` lives, and that sees whether the others do.

    `patience_s` is how long one may be silent; `way_on` is told where it was longer. The thread
    ends with the `with` block.
    """

    def __init__(
        self,
        store: dist.Store,
        rank: int,
        size: int,
        patience_s: float,
        way_on: str = "the same command",
    ) -> None:
        self.rank, self.size, self.patience_s = rank, size, patience_s
        self.way_on, self.step = way_on, 0
        # A connection of its own, as others wait in theirs; unknown to torch's stubs.
        self._store: dist.Store = store.clone()  # type: ignore[attr-defined]
        self._seen: dict[int, tuple[bytes, float]] = {}  # sign of a rank, and when it was new
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._count = 0
        self._thread = threading.Thread(target=self._watch, daemon=True, name="erniekit-watch")

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._stop.set()
        if self._thread.ident is not None and self._thread is not threading.current_thread():
            self._thread.join()

    def leave(self, why: str) -> None:
        """Tell the others, who will find their connections closed, why this rank goes."""
        with contextlib.suppress(RuntimeError), self._lock:
            self._store.set(f"left/{self.rank}", why[:500])

    def missing(self) -> str:
        """After an exchange has failed: which rank is to blame, in words. Takes some pulses."""
        until = time.monotonic() + LOST_PULSES * PULSE_S + 1
        gone: dict[int, str] = {}
        while time.monotonic() < until and not gone:
            time.sleep(PULSE_S / 4)
            gone = self._left() or self._silent(LOST_PULSES * PULSE_S)
        if not gone:
            gone = self._behind()
        if not gone:
            return f"an exchange of rank {self.rank} failed in step {self.step}, and all are alive"
        return ", ".join(f"rank {rank} {what}" for rank, what in sorted(gone.items()))

    def _watch(self) -> None:
        last_look = time.monotonic()
        while not self._stop.wait(PULSE_S):
            try:
                self._show()
                # Each rank looks at all others: rarer, where there are many of them.
                if time.monotonic() - last_look > self.size / 64:
                    self._look()
                    last_look = time.monotonic()
            except RuntimeError:  # the store went with its process; torchrun ends us
                return
            if silent := self._silent(self.patience_s):
                told = ", ".join(f"rank {r} {what}" for r, what in sorted(silent.items()))
                self.leave(f"stopped because {told}")
                log.error(
                    "rank %d: %s; all ranks stop, and %s goes on", self.rank, told, self.way_on
                )
                logging.shutdown()
                os._exit(EXIT_CODE)

    def _show(self) -> None:
        self._count += 1
        with self._lock:
            self._store.set(f"alive/{self.rank}", f"{self._count} {self.step} {_place()}")

    def _look(self) -> None:
        now = time.monotonic()
        for rank in range(self.size):
            if rank == self.rank:
                continue
            with self._lock:
                key = f"alive/{rank}"
                sign = self._store.get(key) if self._store.check([key]) else b"0 0 -"
            if rank not in self._seen or self._seen[rank][0] != sign:
                self._seen[rank] = (sign, now)

    def _silent(self, limit_s: float) -> dict[int, str]:
        now, told = time.monotonic(), "has been silent for {:.0f} s (it was at step {})"
        return {
            rank: told.format(now - since, sign.split()[1].decode())
            for rank, (sign, since) in list(self._seen.items())
            if now - since > limit_s
        }

    def _behind(self) -> dict[int, str]:
        """The ranks that are in no exchange while this one was; else those at an earlier step."""
        signs = {r: sign.decode().split(" ", 2) for r, (sign, _) in list(self._seen.items())}
        busy = {
            rank: f"is still at step {step}, in {place}"
            for rank, (_, step, place) in signs.items()
            if place != WAITS
        }
        slowest = min((int(step) for _, step, _ in signs.values()), default=self.step)
        return busy or {
            rank: f"is still at step {step}"
            for rank, (_, step, _) in signs.items()
            if int(step) == slowest < self.step
        }

    def _left(self) -> dict[int, str]:
        """Why each rank went that has gone of its own accord, and not because of another."""
        found = {}
        with contextlib.suppress(RuntimeError), self._lock:
            for rank in range(self.size):
                key = f"left/{rank}"
                if rank != self.rank and self._store.check([key]):
                    found[rank] = self._store.get(key).decode()
        return {r: why for r, why in found.items() if not why.startswith("stopped because")}


def _place() -> str:
    """Where the main thread is: the innermost function outside of torch, or `WAITS`.

    Nothing is collected meanwhile: a finalizer would let that thread run on while CPython (3.11)
    reads its frames.
    """
    collects = gc.isenabled()
    gc.disable()
    try:
        return _innermost()
    finally:
        if collects:
            gc.enable()


def _innermost() -> str:
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    while frame is not None:
        path = frame.f_code.co_filename.replace(os.sep, "/")
        if "torch/distributed" in path or "erniekit/parallel" in path:
            return WAITS
        if "/torch/" not in path:
            return f"{frame.f_code.co_name} ({path.rpartition('/')[2]}:{frame.f_lineno})"
        frame = frame.f_back
    return WAITS
