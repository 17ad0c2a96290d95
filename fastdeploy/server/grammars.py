"""Whether a form that a client asks for can be compiled: asked of another process, remembered.

The process (see `fastdeploy.engine.grammar_check`) is started by the first request that needs it.
Verdicts are kept, those that refuse too, so that the same form is tried once.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import os
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from fastdeploy.engine.grammar import PREFIX, Grammars
from fastdeploy.errors import RequestError
from fastdeploy.sampling import GuidedDecodingParams

MAX_VERDICTS = 256  # and characters of the texts in them:
MAX_CHARACTERS = 16 * 2**20
MAX_WAITING = 32
REPLY_S = 30.0
MAX_LINE_BYTES = 2**26


class GrammarCheck:
    """Use from one event loop. `make` gives what the engine compiles, and with what limits; it is
    called at the first need, when the engine is there, and raises RequestError if it compiles none.
    """

    def __init__(self, make: Callable[[], Grammars]) -> None:
        self.make = make
        self.grammars: Grammars | None = None
        self.process: asyncio.subprocess.Process | None = None
        self.turn = asyncio.Lock()
        self.num_waiting = 0
        self.verdicts: OrderedDict[tuple[str, str], dict[str, Any]] = OrderedDict()
        self.num_characters = 0  # in the verdicts

    async def checked(self, guided: GuidedDecodingParams, field: str) -> GuidedDecodingParams:
        """The form as the engine shall get it. Raises RequestError naming the field of the request
        that it came in.
        """
        self.grammars = self.grammars or self.make()
        with told_of(field):
            self.grammars.check_size(guided)
            verdict = await self._verdict(guided)
            if verdict["error"] is not None:
                raise RequestError(verdict["error"])
        if verdict["grammar"] is not None:
            return dataclasses.replace(guided, grammar=verdict["grammar"])
        return guided

    async def close(self) -> None:
        """End the process, if there is one."""
        process, self.process = self.process, None
        if process is not None:
            if process.returncode is None:
                process.kill()
            await process.wait()

    async def _verdict(self, guided: GuidedDecodingParams) -> dict[str, Any]:
        key = guided.kind, guided.text
        if key not in self.verdicts:
            if self.num_waiting >= MAX_WAITING:
                raise RequestError("too many grammars are being compiled; try again", status=429)
            self.num_waiting += 1
            try:
                async with self.turn:
                    if key not in self.verdicts:
                        self._keep(key, await self._ask(guided))
            finally:
                self.num_waiting -= 1
        self.verdicts.move_to_end(key)
        return self.verdicts[key]

    def _keep(self, key: tuple[str, str], verdict: dict[str, Any]) -> None:
        self.verdicts[key] = verdict
        self.num_characters += _num_characters(key, verdict)
        while len(self.verdicts) > MAX_VERDICTS or (
            self.num_characters > MAX_CHARACTERS and len(self.verdicts) > 1
        ):
            self.num_characters -= _num_characters(*self.verdicts.popitem(last=False))

    async def _ask(self, guided: GuidedDecodingParams) -> dict[str, Any]:
        try:
            if self.process is None or self.process.returncode is not None:
                self.process = await self._started()
                await self._reply(self.process)
            assert self.process.stdin is not None, "it is a pipe"
            self.process.stdin.write(json.dumps(dataclasses.asdict(guided)).encode() + b"\n")
            return await self._reply(self.process)
        except BaseException:  # also a client that has gone: the reply would be taken for the next
            await self.close()
            raise

    async def _reply(self, process: asyncio.subprocess.Process) -> dict[str, Any]:
        assert process.stdout is not None, "it is a pipe"
        try:
            line = await asyncio.wait_for(process.stdout.readline(), REPLY_S)
        except TimeoutError:
            line = b""
        if not line:
            raise RequestError("the grammar could not be checked; try again later", status=503)
        return json.loads(line)

    async def _started(self) -> asyncio.subprocess.Process:
        assert self.grammars is not None, "checked before"
        options = {
            "folder": str(self.grammars.tokenizer.files[0].parent),
            "vocab_size": self.grammars.vocab_size,
            "eos_ids": self.grammars.eos_ids,
            "max_bytes": self.grammars.max_bytes,
            "any_whitespace": self.grammars.any_whitespace,
        }
        path = os.pathsep.join(p or os.getcwd() for p in sys.path)
        return await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "fastdeploy.engine.grammar_check", json.dumps(options)),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            env=os.environ | {"PYTHONPATH": path},
            limit=MAX_LINE_BYTES,
        )


@contextmanager
def told_of(field: str) -> Iterator[None]:
    """Have errors about a form name the field of the request that it came in."""
    try:
        yield
    except RequestError as error:
        if error.param not in (None, "guided_decoding"):
            raise
        message = f"{field}: {str(error).removeprefix(PREFIX)}"
        raise RequestError(message, param=field, status=error.status) from None


def _num_characters(key: tuple[str, str], verdict: dict[str, Any]) -> int:
    return len(key[1]) + len(verdict["grammar"] or "")
