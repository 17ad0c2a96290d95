"""What the API process and the engine's process say to each other, and the socket between them.

    API process                               engine's process (`server.engine_process`)
    Start, Add, Abort, Command  ----------->  obeyed in this order
    Ready | Refused             <-----------  once, when the model is loaded or cannot be
    Outputs, Rejected, Done     <-----------  what became of requests and commands
    Beat                        <-----------  twice a second, and when the engine comes to rest

A frame is its length (4 bytes, little-endian) and one message in msgpack. Messages are plain data,
checked against their types on arrival; nothing is pickled. A frame longer than MAX_FRAME_BYTES is
refused before it is read.
"""

from __future__ import annotations

import asyncio
import socket
import struct
import threading
from collections.abc import Callable
from typing import Any

import msgspec

from fastdeploy.engine.request import Order, TokenOutput
from fastdeploy.errors import RequestError
from fastdeploy.outputs import Stats
from fastdeploy.sampling import SamplingParams
from fastdeploy.server.pictures import PromptPictures

MAX_FRAME_BYTES = 2**30  # prompt_logprobs of a long prompt are the longest: some 100 MiB
_LENGTH = struct.Struct("<I")


class Message(msgspec.Struct, tag=True, array_like=True):
    """Base of all messages; on the wire an array that begins with the name of its class."""


# --- to the engine ---


class Start(Message):
    """Comes first: load the model. `config` is an EngineConfig in JSON."""

    config: str
    adapters: dict[str, str]  # name -> folder
    paused: bool
    is_restart: bool = False  # a process before this one had the adapters: what is gone is left out


class Add(Message):
    """All samples of one prompt; sample i has the id `ids[i]`, and else the same order. See
    `Engine.add`.
    """

    ids: list[str]
    prompt_ids: list[int]
    params: SamplingParams
    order: Order
    adapter: str | None
    pictures: PromptPictures | None = None


class Abort(Message):
    ids: list[str]


class Command(Message):
    """Do one of `engine_process.COMMANDS`; `Done` answers with the same number."""

    number: int
    name: str
    arguments: dict[str, Any]


# --- from the engine ---


class Ready(Message):
    """The engine can work. What the API process has to know of it."""

    vocab_size: int
    num_blocks: int
    thinks: bool
    eos_ids: list[int]
    defaults: dict[str, float]  # sampling settings that the model's folder recommends
    adapters: list[str]  # names of those that are loaded


class Refused(Message):
    """The model cannot be loaded, by a mistake of the user; the process ends."""

    message: str


class Outputs(Message):
    """The news of one step."""

    outputs: list[TokenOutput]
    stats: Stats


class Problem(Message):
    """A RequestError."""

    message: str
    param: str | None
    status: int

    @classmethod
    def of(cls, error: Exception) -> Problem:
        return cls(str(error), getattr(error, "param", None), getattr(error, "status", 400))

    def error(self) -> RequestError:
        return RequestError(self.message, param=self.param, status=self.status)


class Rejected(Message):
    """A request that the engine would not take."""

    ids: list[str]
    problem: Problem


class Done(Message):
    number: int
    value: Any
    problem: Problem | None


class Beat(Message):
    """A sign of life. `step_s`: how long the present step has been going on, 0 between steps."""

    step_s: float
    stats: Stats | None  # None while the model is loading


ToEngine = Start | Add | Abort | Command
FromEngine = Ready | Refused | Outputs | Rejected | Done | Beat

_encoder = msgspec.msgpack.Encoder()
_to_engine: msgspec.msgpack.Decoder[Any] = msgspec.msgpack.Decoder(ToEngine)
_from_engine: msgspec.msgpack.Decoder[Any] = msgspec.msgpack.Decoder(FromEngine)


class LinkError(RuntimeError):
    """The other side sent what it never should, or nothing where something had to come."""


def frame(message: Message) -> bytes:
    """Raises RequestError for an integer beyond 64 bits, which only a user can have written."""
    try:
        content = _encoder.encode(message)
    except OverflowError:
        raise RequestError("the request has an integer of more than 64 bits") from None
    if len(content) > MAX_FRAME_BYTES:
        raise LinkError(f"a {type(message).__name__} of {len(content)} bytes is too long to send")
    return _LENGTH.pack(len(content)) + content


def length_of(head: bytes | bytearray) -> int:
    """Bytes of the frame that begins so. Raises LinkError."""
    (length,) = _LENGTH.unpack_from(head)
    if length > MAX_FRAME_BYTES:
        raise LinkError(f"a frame of {length} bytes is announced; at most {MAX_FRAME_BYTES} come")
    return length


class EngineEnd:
    """The engine's end of the link, for its threads: any may send, one receives."""

    def __init__(self, end: socket.socket) -> None:
        self.socket = end
        self.file = end.makefile("rb")
        self.lock = threading.Lock()

    def send(self, message: FromEngine) -> None:
        data = frame(message)
        with self.lock:
            self.socket.sendall(data)

    def receive(self) -> ToEngine | None:
        """The next message, waiting for it; None when the other side is gone."""
        try:
            head = self.file.read(_LENGTH.size)
            if len(head) < _LENGTH.size:
                return None
            length = length_of(head)
            content = self.file.read(length)
        except ConnectionResetError:  # it went without reading all that was sent to it
            return None
        return _to_engine.decode(content) if len(content) == length else None


class ServerEnd(asyncio.Protocol):
    """The API process's end, on the event loop: `receive` gets every message, in order.

    `closed` is done when the link is, whoever closed it.
    """

    def __init__(self, receive: Callable[[FromEngine], None]) -> None:
        self.receive = receive
        self.buffer = bytearray()
        self.transport: asyncio.WriteTransport | None = None
        self.closed: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: Any) -> None:
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        buffer, at = self.buffer, 0
        buffer += data
        while len(buffer) - at >= _LENGTH.size:
            length = length_of(buffer[at : at + _LENGTH.size])
            end = at + _LENGTH.size + length
            if len(buffer) < end:
                break
            message = _from_engine.decode(memoryview(buffer)[at + _LENGTH.size : end])
            at = end
            self.receive(message)
        del buffer[:at]

    def connection_lost(self, error: Exception | None) -> None:
        if not self.closed.done():
            self.closed.set_result(None)

    def send(self, data: bytes) -> None:
        """Queue a frame; nothing happens to one that is sent after the end."""
        if self.transport is not None and not self.transport.is_closing():
            self.transport.write(data)

    def close(self) -> None:
        """Have the engine end in order; what was not sent yet is dropped."""
        if self.transport is not None:
            self.transport.abort()
