"""Writes checkpoints, one at a time: while the training waits, or from a copy while it goes on.

    step 8 ends -> tensors are copied to host memory -> step 9 ...
                        +-> a thread writes checkpoint-8.partial, flushes it, renames it

The copy has memory of its own, as much as a checkpoint has bytes, kept from the first save on
(page-locked where the tensors are on a GPU). A save that falls due while another is being written
waits for it. What goes wrong in the thread is raised by the next `settle`. A process that is killed
leaves at most a `.partial`.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from erniekit import checkpoint, snapshot

log = logging.getLogger("erniekit")

Tensors = dict[str, Tensor]


class Saver:
    """`write(folder, tensors)` makes the files; `saved(folder)` is called, by the thread that calls
    `save` and `settle`, when a checkpoint is whole.
    """

    def __init__(
        self,
        output: Path,
        write: Callable[[Path, Tensors], None],
        saved: Callable[[Path], None],
        *,
        is_async: bool,
    ) -> None:
        self.output, self.write, self.saved, self.is_async = output, write, saved, is_async
        self._copies: Tensors = {}
        self._in_flight: Future[Path] | None = None

    def save(self, step: int, tensors: Tensors, state: dict[str, Any]) -> None:
        """Write, or begin to write, `checkpoint-<step>`. Raises what `checkpoint.save` does."""
        self._wait_for_the_last()
        if not self.is_async:
            self.saved(self._written(step, tensors, state))
            return
        start = time.monotonic()
        copies = self._copied(tensors)
        log.info(
            "checkpoint-%d: %.3f GiB copied in %.3f s, written while training goes on",
            step, snapshot.num_bytes(copies) / 2**30, time.monotonic() - start,
        )  # fmt: skip
        future: Future[Path] = Future()
        self._in_flight = future

        def work() -> None:
            try:
                future.set_result(self._written(step, copies, state))
            except BaseException as error:  # raised again by `settle`
                future.set_exception(error)

        # A daemon: a second Ctrl-C ends the process in the middle of a write, which harms nothing.
        threading.Thread(target=work, daemon=True, name="erniekit-saver").start()

    def settle(self, *, wait: bool = False) -> None:
        """Take note of a save that has ended since, or (`wait`) once it has; raises its error."""
        if self._in_flight is not None and (wait or self._in_flight.done()):
            ended, self._in_flight = self._in_flight, None
            self.saved(ended.result())

    def __enter__(self) -> Saver:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Wait for a save in flight; beside another error its own is only told."""
        if kind is None:
            self.settle(wait=True)
        elif issubclass(kind, Exception):
            try:
                self.settle(wait=True)
            except Exception as error:
                log.warning("the checkpoint that was being written failed: %s", error)

    def _wait_for_the_last(self) -> None:
        start, waits = time.monotonic(), self._in_flight is not None
        self.settle(wait=True)
        if waits and time.monotonic() - start > 0.1:
            log.info(
                "waited %.1f s for the last checkpoint to be written; save less often, or to a "
                "faster disk",
                time.monotonic() - start,
            )

    def _written(self, step: int, tensors: Tensors, state: dict[str, Any]) -> Path:
        size = snapshot.num_bytes(tensors)
        return checkpoint.save(self.output, step, lambda f: self.write(f, tensors), state, size)

    def _copied(self, tensors: Mapping[str, Tensor]) -> Tensors:
        """The tensors as they are now, in host memory that the next copy uses again."""
        copies = self._copies
        for name in copies.keys() - tensors.keys():
            del copies[name]
        for name, tensor in tensors.items():
            copy = copies.get(name)
            if copy is None or (copy.shape, copy.dtype) != (tensor.shape, tensor.dtype):
                copies.pop(name, None)  # not both at once
                pinned = tensor.is_cuda
                copies[name] = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=pinned)
            copies[name].copy_(tensor.detach(), non_blocking=True)
        if any(tensor.is_cuda for tensor in tensors.values()):
            torch.cuda.synchronize()
        return {name: copies[name] for name in tensors}
