"""The sockets of the server: bound before anything is read, served until a signal, then drained.

    bind -> read the tokenizer -> accept, and start the engine -> serve -> drain -> stop the engine

A stop takes no new requests, gives those in work `timeout_graceful_shutdown` seconds, ends what is
left with an error and then the engine. A second signal ends at once. Exit status: 0 after a signal,
1 when the engine could not be kept alive.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import resource
import signal
import socket
import sys
from functools import partial
from types import FrameType

import uvicorn

from ernie.settings import ConfigError
from fastdeploy.config import EngineConfig, ServerConfig
from fastdeploy.server.app import Service, create_app
from fastdeploy.server.connection import MAX_HEADER_BYTES, Connection
from fastdeploy.server.log import set_up
from fastdeploy.server.supervisor import State, spawn

SPARE_FILES = 128  # beside one for each request: refusals under way, logs, libraries
FLUSH_S = 5  # what ended answers get to reach their clients at a stop


def serve(engine_config: EngineConfig, server_config: ServerConfig) -> int:
    """Serve until SIGINT or SIGTERM; returns the exit status.

    Raises ConfigError, also for what the engine finds wrong with the model, and the errors of
    reading a tokenizer.
    """
    set_up(server_config.log_level, server_config.log_format)
    _make_room_for(server_config.max_concurrency)
    with _bound_socket(server_config) as listener:
        child = partial(spawn, server_config.log_level, server_config.log_format)
        app = create_app(engine_config, server_config, child)
        settings = uvicorn.Config(
            app,
            http=Connection,
            h11_max_incomplete_event_size=MAX_HEADER_BYTES,
            log_config=None,
            log_level="warning",
            access_log=False,
            timeout_graceful_shutdown=server_config.timeout_graceful_shutdown + FLUSH_S,
        )
        server = _Server(settings, app.state.service, listener)
        signal.signal(signal.SIGTERM, lambda *_: None)  # uvicorn raises it again at its end
        with contextlib.suppress(KeyboardInterrupt):
            server.run(sockets=[listener])
    supervisor = server.service.engine.supervisor
    if supervisor.refusal is not None:
        raise ConfigError(supervisor.refusal)
    return 1 if server.has_failed else 0


class _Server(uvicorn.Server):
    """Says where it listens once the engine is there, and ends when there will be none."""

    def __init__(self, config: uvicorn.Config, service: Service, listener: socket.socket) -> None:
        super().__init__(config)
        self.service = service
        self.address = _address(listener)
        self.has_failed = self.has_greeted = False

    async def on_tick(self, counter: int) -> bool:
        state = self.service.engine.supervisor.state
        if state is State.FAILED:
            self.has_failed = self.should_exit = True
        if state is State.SERVING and not self.has_greeted:
            self.has_greeted = True
            sys.stdout.write(_greeting(self.service, self.address))
            sys.stdout.flush()
        return await super().on_tick(counter)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        engine = self.service.engine
        engine.draining = True
        patience_s = 0 if self.has_failed else self.service.config.timeout_graceful_shutdown
        loop = asyncio.get_running_loop()
        late = loop.call_later(patience_s, engine.end_answers, "the server is stopping")
        await super().shutdown(sockets)
        late.cancel()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self.force_exit = self.should_exit  # the second signal
        super().handle_exit(sig, frame)


def _make_room_for(num_connections: int) -> None:
    """Let this process open as many files. Raises ConfigError where the system says no."""
    needed = num_connections + SPARE_FILES
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < needed:
        raise ConfigError(
            f"max_concurrency={num_connections} takes {needed} open files, the limit is {hard}; "
            f"raise it (ulimit -n), or use max_concurrency={max(1, hard - SPARE_FILES)} or less"
        )
    if soft != resource.RLIM_INFINITY and soft < needed:
        resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))


def _bound_socket(config: ServerConfig) -> socket.socket:
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    listener = None
    try:
        listener = socket.socket(family, socket.SOCK_STREAM)  # refused where there is no IPv6
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((config.host, config.port))
    except OSError as error:
        if listener is not None:
            listener.close()
        raise ConfigError(
            f"cannot listen on {config.host} port {config.port}: {os.strerror(error.errno or 0)}; "
            "choose another --port or --host"
        ) from None
    return listener


def _address(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}/v1"


def _greeting(service: Service, address: str) -> str:
    blocks = service.engine.stats().num_blocks * service.loaded.config.block_size
    key = ' -H "Authorization: Bearer $FD_API_KEY"' if service.config.has_key else ""
    body = '{"messages": [{"role": "user", "content": "Hello"}]}'
    return (
        f"{service.name} is served at {address} (cache of {blocks} tokens); try:\n"
        f"  curl {address}/chat/completions{key} -H 'Content-Type: application/json' -d '{body}'\n"
    )
