"""Messages between the two processes: what is sent arrives, what is not a message is refused."""

from __future__ import annotations

import asyncio
import socket
import struct
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastdeploy import SamplingParams
from fastdeploy.engine.request import Order, TokenOutput
from fastdeploy.errors import RequestError
from fastdeploy.outputs import Logprob, RequestMetrics, Stats
from fastdeploy.server.engine_process import EngineProcess
from fastdeploy.server.link import (
    MAX_FRAME_BYTES,
    Abort,
    Add,
    Beat,
    Command,
    Done,
    EngineEnd,
    LinkError,
    Message,
    Outputs,
    Problem,
    Ready,
    Refused,
    Rejected,
    ServerEnd,
    Start,
    frame,
    length_of,
)

STATS = Stats(*range(len(Stats.__dataclass_fields__)))
PARAMS = SamplingParams(
    temperature=0, stop=["a"], logit_bias={5: -1.5}, stop_token_ids=[2], logits_processors_args={}
)
LOGPROBS = {7: Logprob(-0.5, 1, "x"), 9: Logprob(float("-inf"), 2)}
OUTPUT = TokenOutput(
    "1", 7, -0.5, LOGPROBS, None, RequestMetrics(1.0, 2.0), 3, [None, LOGPROBS]
)  # fmt: skip
ORDER = Order(2**59 - 1, 0, -1, '["key", null]', [[1], [2, 3]])
TO_ENGINE: list[Message] = [
    Start('{"model": "x"}', {"a": "/b"}, True, True),
    Add(["1", "2"], [5, 6], PARAMS, ORDER, "a"),
    Abort(["1"]),
    Command(3, "sleep", {"level": 2}),
]
FROM_ENGINE: list[Message] = [
    Ready(10, 20, True, [2], {"temperature": 0.5}, ["a"]),
    Refused("no"),
    Outputs([OUTPUT, OUTPUT], STATS),
    Rejected(["1"], Problem("no", "prompt", 404)),
    Done(3, None, None),
    Done(4, {"x": [1]}, Problem("no", None, 409)),
    Beat(0.5, STATS),
]


def test_every_message_to_the_engine_arrives_as_it_was() -> None:
    ours, theirs = socket.socketpair()
    with ours:
        ours.sendall(b"".join(map(frame, TO_ENGINE)))
    end = EngineEnd(theirs)
    assert [end.receive() for _ in TO_ENGINE] == TO_ENGINE
    assert end.receive() is None, "the other side is gone"
    theirs.close()


def pushed(pieces: list[bytes]) -> list[Any]:
    async def push() -> list[Any]:
        got: list[Any] = []
        end = ServerEnd(got.append)
        for piece in pieces:
            end.data_received(piece)
        return got

    return asyncio.run(push())


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 400), max_size=40))
def test_messages_from_the_engine_arrive_however_they_are_cut(lengths: list[int]) -> None:
    data, pieces = b"".join(map(frame, FROM_ENGINE)), []
    for length in lengths:
        pieces.append(data[:length])
        data = data[length:]
    assert pushed([*pieces, data]) == FROM_ENGINE


@pytest.mark.parametrize("content", [b"", b"\xc1", b"\x91\xa3Sty", frame(TO_ENGINE[2])[4:]])
def test_what_is_no_message_of_this_direction_is_refused(content: bytes) -> None:
    with pytest.raises(msgspec.DecodeError):
        pushed([struct.pack("<I", len(content)) + content])


def test_a_frame_that_is_too_long_is_refused_before_it_is_read() -> None:
    with pytest.raises(LinkError, match="is announced"):
        length_of(struct.pack("<I", MAX_FRAME_BYTES + 1))


def test_a_side_that_goes_without_having_read_has_gone() -> None:
    """Linux tells the other side of a reset then, and not of an end."""
    ours, theirs = socket.socketpair()
    engine = EngineEnd(theirs)
    engine.send(Beat(0.0, None))
    ours.close()
    assert engine.receive() is None
    ours, theirs = socket.socketpair()
    process = EngineProcess(EngineEnd(theirs))
    process.link.send(Beat(0.0, None))
    ours.close()
    assert process.run() == 0


def test_an_integer_beyond_64_bits_is_the_users() -> None:
    add = Add(["1"], [5], SamplingParams(), Order(10**30), None)
    with pytest.raises(RequestError, match="more than 64 bits"):
        frame(add)


def test_a_method_that_is_no_command_is_not_called() -> None:
    end, _ = socket.socketpair()
    with end, pytest.raises(AssertionError, match="'stats' is not one of the commands"):
        EngineProcess(EngineEnd(end))._do(Command(1, "stats", {}))
