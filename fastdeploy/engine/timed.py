"""Jobs in a thread, each with a limit of time: for calls that nothing can interrupt.

    jobs      a  b  c  d          b takes too long
    thread    a--b----------...   is left to end by itself
    another         c--d          goes on with the rest

What is left behind goes on using what it was given: nobody else may touch that any more. Jobs have
to let go of Python's lock, or nobody is there to see the time run out.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Generic, TypeVar

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Job(Generic[T]):
    do: Callable[[], T]
    limit_s: float


@dataclass(frozen=True, slots=True)
class Result(Generic[T]):
    value: T
    seconds: float


class TimedThread:
    """One thread at a time; it is started by the first job."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.pool: ThreadPoolExecutor | None = None

    def begin(self, jobs: Sequence[Job[T]]) -> Running[T]:
        return Running(self, jobs)

    def submit(self, work: Callable[[int, int], None], run: int, first: int) -> Future[None]:
        if self.pool is None:
            self.pool = ThreadPoolExecutor(1, thread_name_prefix=self.name)
        return self.pool.submit(work, run, first)

    def leave(self) -> None:
        """Whatever the thread is in, the next work gets another one."""
        if self.pool is not None:
            self.pool.shutdown(wait=False)
        self.pool = None


class Running(Generic[T]):
    """Jobs at work, one after the other."""

    def __init__(self, thread: TimedThread, jobs: Sequence[Job[T]]) -> None:
        self.thread, self.jobs = thread, jobs
        self.results: list[Result[T] | None] = [None] * len(jobs)
        self.lock = threading.Lock()
        self.run = self.at = 0  # how often the rest was begun, and the job at work
        self.began = time.monotonic()
        self.working = thread.submit(self._work, 0, 0)

    def wait(self) -> list[Result[T] | None]:
        """The result of each job, None for one that was left behind. Raises what a job raised."""
        while True:
            try:
                self.working.result(self._remaining_s())
                return self.results
            except TimeoutError:
                if self.working.done():  # a job's own error, or all have just ended
                    self.working.result()
                    return self.results
            with self.lock:
                if self.at == len(self.jobs) or self._remaining_s() > 0:
                    continue
                self.run, self.at, self.began = self.run + 1, self.at + 1, time.monotonic()
            self.thread.leave()
            self.working = self.thread.submit(self._work, self.run, self.at)

    def _remaining_s(self) -> float:
        at = self.at  # the thread may move on meanwhile
        if at == len(self.jobs):
            return 1.0
        return max(0.0, self.began + self.jobs[at].limit_s - time.monotonic())

    def _work(self, run: int, first: int) -> None:
        for at in range(first, len(self.jobs)):
            began = time.monotonic()
            value = self.jobs[at].do()
            with self.lock:
                if self.run != run:
                    return  # left behind
                now = time.monotonic()
                self.results[at] = Result(value, now - began)
                self.at, self.began = at + 1, now
