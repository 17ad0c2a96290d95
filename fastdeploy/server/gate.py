"""Who is let in: keys, guesses at keys, and what other web pages may do.

    Observe -> CORS -> Gate -> Deadline -> the routes

With keys, every route but the open ones wants one, as a bearer token or (Anthropic's clients) in
the header `x-api-key`, and nowhere else. Without keys the server trusts who can reach it, and so
has to tell its users from web pages that use their browsers: a page's origin must be the server's
own or an allowed one, and the name the server is called by must be one that no page's owner can
have pointed here (DNS rebinding).
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import math
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from urllib.parse import parse_qsl, urlsplit

from fastapi import FastAPI
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from fastdeploy.config import ServerConfig
from fastdeploy.errors import RequestError
from fastdeploy.server.limits import Deadline, Limits
from fastdeploy.server.messages_events import error_at
from fastdeploy.server.observe import Observe, Observer
from fastdeploy.server.reply import error_body

WRONG_KEYS_PER_MINUTE = 30  # of one address
MAX_ADDRESSES = 4096  # that are remembered for a wrong key
ENDINGS = ("/cancel", "/abort_requests")  # of paths: what ends work is never refused a place
IN_QUERY = frozenset({"api_key", "api-key", "apikey", "access_token", "authorization", "token"})


def guard(
    app: FastAPI,
    config: ServerConfig,
    limits: Limits,
    observer: Observer,
    open_paths: frozenset[str],
) -> None:
    """Put everything that stands before the routes around them."""
    if config.timeout:
        app.add_middleware(Deadline, seconds=config.timeout)
    digests = [hashlib.sha256(key.encode()).digest() for key in config.all_keys()]
    app.add_middleware(Gate, digests=digests, config=config, limits=limits, open_paths=open_paths)
    if config.allowed_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=config.allowed_origins,
            allow_methods=["GET", "POST", "DELETE"],
            allow_headers=["*"],
            expose_headers=["x-request-id", "retry-after"],
        )
    app.add_middleware(Observe, observer=observer)  # what is added last is outermost


class WrongKeys:
    """Wrong keys by address: each adds one to a level that sinks by the allowed rate.

    An IPv6 address counts as its /64, which is what one customer gets. The addresses that were
    quiet for longest are forgotten first.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock = clock
        self.levels: OrderedDict[str, tuple[float, float]] = OrderedDict()  # level, and when

    def wait_s(self, address: str) -> float:
        """Seconds until the address may try again; 0: now."""
        excess = self._level(_network(address)) - (WRONG_KEYS_PER_MINUTE - 1)
        return max(excess, 0) * 60 / WRONG_KEYS_PER_MINUTE

    def count(self, address: str) -> None:
        network = _network(address)
        self.levels[network] = self._level(network) + 1, self.clock()
        self.levels.move_to_end(network)
        if len(self.levels) > MAX_ADDRESSES:
            self.levels.popitem(last=False)

    def _level(self, network: str) -> float:
        level, at = self.levels.get(network, (0.0, 0.0))
        return max(level - (self.clock() - at) * WRONG_KEYS_PER_MINUTE / 60, 0)


class Gate:
    """Lets a request in or answers it, before any route has seen it.

    `request.state.tenant` tells the routes whose key it was: the hex digest of it, None where there
    are no keys.
    """

    def __init__(
        self,
        app: ASGIApp,
        digests: Sequence[bytes],  # of the keys
        config: ServerConfig,
        limits: Limits,
        open_paths: frozenset[str],
    ) -> None:
        self.app, self.limits, self.open_paths = app, limits, open_paths
        self.digests = digests
        self.hosts = frozenset(name.lower() for name in config.allowed_hosts or ())
        self.origins = frozenset(config.allowed_origins or ())
        self.wrong_keys = WrongKeys()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        try:
            tenant = self._tenant(scope)
            scope.setdefault("state", {})["tenant"] = tenant
            takes_on = scope["method"] == "POST" and not scope["path"].endswith(ENDINGS)
            with ExitStack() as place:  # which a route may take along, see `Job`
                place.enter_context(self.limits.place_of(tenant if takes_on else None))
                scope["state"]["place"] = place
                await self.app(scope, receive, send)
        except RequestError as error:  # the routes' own are answered further in
            headers = {}
            if error.status == 401:
                headers["www-authenticate"] = "Bearer"
            if error.status == 429:
                wait_s = self.wrong_keys.wait_s(_address(scope)) or self.limits.retry_after_s()
                headers["retry-after"] = str(math.ceil(wait_s))
            body = error_at(scope["path"], error_body(str(error), error.status))
            await JSONResponse(body, error.status, headers=headers)(scope, receive, send)

    def _tenant(self, scope: Scope) -> str | None:
        """The key's digest. Raises RequestError for whoever is not let in."""
        headers = dict(scope["headers"])
        if not self.digests:
            self._check_page(headers)
            return None
        if scope["path"] in self.open_paths:
            return None
        address = _address(scope)
        if self.wrong_keys.wait_s(address):
            # Before any comparison: the right key among many guesses must not stand out.
            raise RequestError("too many wrong keys from this address; wait", status=429)
        if any(k.lower() in IN_QUERY for k, _ in parse_qsl(scope["query_string"].decode("latin1"))):
            raise RequestError(
                "a key in the address ends in logs; send `Authorization: Bearer KEY`", status=401
            )
        named = headers.get(b"authorization", b"bearer " + headers.get(b"x-api-key", b""))
        scheme, _, key = named.partition(b" ")
        digest = hashlib.sha256(key).digest()
        # All keys are compared, so that the time does not tell which one was near.
        matches = sum(hmac.compare_digest(digest, known) for known in self.digests)
        if not matches or scheme.lower() != b"bearer":
            if key:
                self.wrong_keys.count(address)
            raise RequestError(
                "the key is missing or wrong; send `Authorization: Bearer KEY`", status=401
            )
        return digest.hex()

    def _check_page(self, headers: dict[bytes, bytes]) -> None:
        host = headers.get(b"host", b"").decode("latin1").lower()
        if not is_safe_host(host, self.hosts):
            raise RequestError(
                "the server is not known by this name; use its address or localhost, or start it "
                "with --allowed-hosts NAME",
                status=403,
            )
        origin = headers.get(b"origin", b"").decode("latin1").lower()
        own = origin.partition("://")[2] == host
        if origin and not own and not self.origins & {origin, "*"}:
            raise RequestError(
                "pages of this origin may not call the server; start it with --allowed-origins "
                "ORIGIN",
                status=403,
            )


def is_safe_host(host: str, allowed: Sequence[str] | frozenset[str] = ()) -> bool:
    """Whether a `Host` header (lower case) is a name that no stranger can point at this machine:
    an address, localhost, any name without a dot, or one that is allowed.
    """
    try:
        name = urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return False
    name = name.removesuffix(".")
    if name in allowed or "." not in name.removesuffix(".localhost"):
        return True
    return _is_address(name)


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def _address(scope: Scope) -> str:
    client = scope.get("client")
    return client[0] if client else ""


def _network(address: str) -> str:
    if ":" in address and _is_address(address):
        return str(ipaddress.ip_network((address, 64), strict=False))
    return address
