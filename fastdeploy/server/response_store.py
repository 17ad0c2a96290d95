"""Responses that clients may come back to: what is kept, how much of it, and for whom.

In memory, gone with the process. Each key has its own shelf, bounded in number, bytes and age; the
oldest make room, never one that is still being written. What belongs to another key does not exist.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections import Counter, OrderedDict
from collections.abc import AsyncIterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

from fastdeploy.errors import RequestError
from fastdeploy.server.engine import Answer

MAX_RESPONSES, MAX_BYTES, MAX_AGE_S = 1000, 64 * 2**20, 24 * 3600.0  # of each key

Item = dict[str, Any]


class Job:
    """A response that is written in the background: its events so far, and who waits for more."""

    def __init__(self, answer: Answer, place: ExitStack) -> None:
        """`place` is that of its key, and held while it is written."""
        self.answer, self.place = answer, place
        self.events: list[dict[str, Any]] = []
        self.is_done = False
        self.changed = asyncio.Event()  # one for each change: set, and replaced by the next
        self.task: asyncio.Task[None] | None = None

    def start(self, events: AsyncIterator[dict[str, Any]]) -> None:
        self.task = asyncio.create_task(self._run(events))

    async def follow(self, after: int = -1) -> AsyncIterator[dict[str, Any]]:
        """Events with a sequence number above `after`, as they come, to the last one."""
        position = after + 1
        while True:
            changed = self.changed
            while position < len(self.events):  # which may grow while one is being sent
                position += 1
                yield self.events[position - 1]
            if self.is_done:
                return
            await changed.wait()

    async def finished(self) -> None:
        async for _ in self.follow(len(self.events)):
            pass

    async def _run(self, events: AsyncIterator[dict[str, Any]]) -> None:
        try:
            async for event in events:
                self.events.append(event)
                self._wake()
        finally:
            self.answer.close()
            self.place.close()
            self.is_done = True
            self._wake()

    def _wake(self) -> None:
        self.changed.set()
        self.changed = asyncio.Event()


@dataclass(slots=True)
class Stored:
    response: dict[str, Any]  # as it stands now
    input: list[Item]  # all that the model was given, the conversation before included
    job: Job | None = None
    is_deleted: bool = False  # while it was still being written
    at: float = field(default_factory=time.monotonic)

    @property
    def has_ended(self) -> bool:
        return self.response["status"] not in ("queued", "in_progress")

    @property
    def conversation(self) -> list[Item]:
        """What a response that follows this one is given."""
        return [*self.input, *self.response["output"]]


class Shelf:
    """The responses of one key, and how many bytes of JSON they take, with the events of those
    that were written in the background and have ended.

    Responses that follow each other share items, the same objects: these count once, and for as
    long as one of them is here.
    """

    def __init__(self) -> None:
        self.responses: OrderedDict[str, Stored] = OrderedDict()
        self.held: dict[str, list[Any]] = {}  # by response, what it was counted with
        self.num_holders: Counter[int] = Counter()  # by id of such a thing
        self.size_by_thing: dict[int, int] = {}
        self.num_bytes = 0

    def put(self, stored: Stored) -> None:
        name = stored.response["id"]
        things: list[Any] = [stored.response | {"output": []}, *stored.conversation]
        if stored.job is not None and stored.has_ended:
            things.append(tuple(stored.job.events))
        for thing in things:
            self.num_holders[id(thing)] += 1
            if id(thing) not in self.size_by_thing:
                self.size_by_thing[id(thing)] = size = len(json.dumps(thing))
                self.num_bytes += size
        self._release(name)
        self.held[name], self.responses[name] = things, stored

    def remove(self, name: str) -> None:
        self._release(name)
        del self.responses[name]

    def _release(self, name: str) -> None:
        for thing in self.held.pop(name, ()):
            self.num_holders[id(thing)] -= 1
            if not self.num_holders[id(thing)]:
                del self.num_holders[id(thing)]
                self.num_bytes -= self.size_by_thing.pop(id(thing))


class ResponseStore:
    def __init__(self) -> None:
        self.shelves: dict[str, Shelf] = {}  # by key

    def put(self, owner: str, stored: Stored) -> None:
        """Keep a response as it now stands."""
        if stored.is_deleted:
            return
        shelf = self.shelves.setdefault(owner, Shelf())
        shelf.put(stored)
        self._make_room(shelf)

    def get(self, owner: str, response_id: str, param: str | None = None) -> Stored:
        """Raises RequestError, 404, also for a response of another key."""
        shelf = self.shelves.get(owner, Shelf())
        stored = shelf.responses.get(response_id)
        if stored is None or stored.at < time.monotonic() - MAX_AGE_S:
            raise RequestError(
                f"there is no response {response_id[:64]!r}; it was not stored, or not kept so "
                "long",
                param=param,
                status=404,
            )
        return stored

    def remove(self, owner: str, response_id: str) -> None:
        stored = self.get(owner, response_id)
        stored.is_deleted = True
        if stored.job is not None:
            stored.job.answer.abort()
        self.shelves[owner].remove(response_id)

    def _make_room(self, shelf: Shelf) -> None:
        """Forget old responses, and the oldest ones that have ended while there is too much."""
        expired = time.monotonic() - MAX_AGE_S
        for name, stored in list(shelf.responses.items()):
            fits = len(shelf.responses) <= MAX_RESPONSES and shelf.num_bytes <= MAX_BYTES
            if fits and stored.at >= expired:
                return
            if stored.has_ended:
                shelf.remove(name)
