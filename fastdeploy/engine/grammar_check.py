"""Tries grammars in a process of its own, before the engine meets them.

Compiling what a stranger sends may take more time and memory than any limit of the library allows
for, or bring the process down. So the server asks a child process, which holds the tokenizer and
nothing else, and which forks for each grammar a grandchild that may use a second of CPU time and
256 MiB of memory more than it was born with:

    server  --{"regex": ...}-->  child  --fork-->  grandchild: compiles, or dies of it
            <--{"error": ...}--         <--pipe--

What passes here is compiled again in the engine, in a thread, where it cannot fail in ways that
have not been seen. Grammars in GBNF come back in Lark's form: translating them is work in Python,
which would keep the engine's steps waiting. The child ends when its input does.
"""

from __future__ import annotations

import dataclasses
import json
import os
import resource
import select
import signal
import sys
from typing import Any

from ernie.tokenizer import Tokenizer
from fastdeploy.engine.grammar import PREFIX, Grammars, lark_of
from fastdeploy.errors import RequestError
from fastdeploy.sampling import GuidedDecodingParams

CPU_S = 1
MEMORY_MIB = 256
WALL_S = 10.0  # for a grandchild that waits for a processor


def main() -> int:
    """Answer each line of stdin, a JSON object of `GuidedDecodingParams`, with a line:
    {"error": text or null, "grammar": text or null}. The first line of all is {}, when it is ready.
    """
    options = json.loads(sys.argv[1])
    grammars = Grammars(Tokenizer.from_folder(options.pop("folder")), **options)
    grammars.compile(GuidedDecodingParams(regex="a"))  # builds what all of them share
    _say({})
    for line in sys.stdin:
        _say(tried(grammars, json.loads(line)))
    return 0


def _say(answer: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(answer) + "\n")
    sys.stdout.flush()


def tried(grammars: Grammars, fields: dict[str, Any]) -> dict[str, Any]:
    """The verdict of a forked process on one grammar."""
    reading, writing = os.pipe()
    process = os.fork()
    if process == 0:
        _compile_and_exit(grammars, fields, writing)
    os.close(writing)
    answer = _read(reading, WALL_S)
    os.close(reading)
    if not answer:
        os.kill(process, signal.SIGKILL)
    _, status = os.waitpid(process, 0)
    return json.loads(answer) if answer else {"error": _death(status), "grammar": None}


def _compile_and_exit(grammars: Grammars, fields: dict[str, Any], writing: int) -> None:
    """In the forked process: no way leads out of here but its end."""
    status = 1
    try:
        _limit()
        answer = json.dumps(_compiled(grammars, fields)).encode()
        while answer:
            answer = answer[os.write(writing, answer) :]
        status = 0
    finally:
        os._exit(status)


def _limit() -> None:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_S, CPU_S + 1))
    with open("/proc/self/statm") as statm:
        size = int(statm.read().split()[0]) * resource.getpagesize()
    most = size + MEMORY_MIB * 2**20
    resource.setrlimit(resource.RLIMIT_AS, (most, most))


def _compiled(grammars: Grammars, fields: dict[str, Any]) -> dict[str, Any]:
    guided = GuidedDecodingParams(**fields)
    try:
        grammars.check_size(guided)
        grammar = lark_of(guided.text) if guided.kind == "grammar" else None
        if grammar is not None:
            guided = dataclasses.replace(guided, grammar=grammar)
        grammars.compile(guided)
    except RequestError as error:
        return {"error": str(error), "grammar": None}
    except MemoryError:
        return {"error": _too_much("memory", f"{MEMORY_MIB} MiB"), "grammar": None}
    return {"error": None, "grammar": grammar}


def _read(pipe: int, seconds: float) -> bytes:
    """All that comes until the other end is closed; nothing if that takes too long."""
    collected = b""
    while select.select([pipe], [], [], seconds)[0]:
        if not (chunk := os.read(pipe, 2**16)):
            return collected
        collected += chunk
    return b""


def _death(status: int) -> str:
    ended_by = os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0
    if ended_by in (signal.SIGXCPU, signal.SIGKILL):
        return _too_much("time", f"{CPU_S} s")
    if ended_by == signal.SIGABRT:  # how the library answers a refused allocation
        return _too_much("memory", f"{MEMORY_MIB} MiB")
    return f"{PREFIX}the grammar cannot be compiled; make it smaller or simpler"


def _too_much(what: str, most: str) -> str:
    return (
        f"{PREFIX}compiling takes more {what} than the {most} there are for it; make it "
        "smaller or simpler"
    )


if __name__ == "__main__":
    sys.exit(main())
