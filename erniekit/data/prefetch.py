"""Batches prepared ahead of the training by a background thread."""

from __future__ import annotations

import queue
import threading
from collections.abc import Generator, Iterable
from typing import Any

from erniekit.data.batch import Batch


def prefetched(batches: Iterable[Batch], depth: int) -> Generator[Batch, None, None]:
    """The same batches, prepared ahead by a background thread; errors are raised where they are
    met.
    """
    if not depth:
        yield from batches
        return
    done, stop = object(), threading.Event()
    ready: queue.Queue[Any] = queue.Queue(maxsize=depth)

    def put(item: Any) -> bool:
        while not stop.is_set():
            try:
                ready.put(item, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def work() -> None:
        try:
            for batch in batches:
                if not put((batch, None)):
                    return
            put((done, None))
        except Exception as error:  # raised again by the consumer
            put((done, error))

    thread = threading.Thread(target=work, daemon=True, name="erniekit-data")
    thread.start()
    try:
        while True:
            item, error = ready.get()
            if error is not None:
                raise error
            if item is done:
                return
            yield item
    finally:
        stop.set()
        thread.join()
