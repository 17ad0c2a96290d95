"""The bytes of a picture or clip that a message names: data, http and https URLs, files of one
folder.

A message is written by a stranger, so what its URLs reach is bounded. A host is resolved once,
every address it has must be public, and the connection goes to an address that was checked: nothing
resolves the name again. Each redirect is a new URL and is checked like the first. Names, decimal
and hexadecimal spellings, IPv6 and IPv4 inside IPv6 all meet the same check, which looks at the
address the socket will use and never at text. Bytes, redirects and the time of a whole fetch are
limited.

Refused with `MediaError`: everything else, in a sentence that tells the reader of a log what to
change and a stranger nothing about the network behind the server.
"""

from __future__ import annotations

import base64
import binascii
import io
import os
import re
import socket
import ssl
import stat
import threading
import time
from dataclasses import dataclass
from http.client import HTTPException, HTTPResponse
from ipaddress import IPv4Address, IPv6Address, IPv6Network, ip_address, ip_network
from pathlib import Path
from typing import Any
from urllib.parse import SplitResult, unquote, unquote_to_bytes, urljoin, urlsplit

_CHUNK = 1 << 16
_REDIRECTS = (301, 302, 303, 307, 308)
_NAT64 = IPv6Network("64:ff9b::/96")
# Python's own lists differ from version to version; these hold protocols (Teredo, 6to4, NAT64 of a
# private network) and documentation, and no pictures.
_NOT_PUBLIC = tuple(
    map(
        ip_network,
        (
            *("192.0.0.0/24", "192.0.2.0/24", "192.88.99.0/24", "198.51.100.0/24"),
            *("203.0.113.0/24", "64:ff9b:1::/48", "100::/64", "2001::/23", "2001:db8::/32"),
            *("2002::/16", "3fff::/20", "5f00::/16"),
        ),
    )
)
# No character that two readers of a URL could take differently.
_URL = re.compile(r"[!-~]+")
_HOST = re.compile(r"[A-Za-z0-9._~-]+|\[[0-9A-Fa-f:.]+\]")
_MEDIA = {"image": "max_image_bytes", "video": "max_video_bytes"}


class MediaError(ValueError):
    """A picture or clip that may not be had, cannot be had or cannot be read."""


@dataclass(frozen=True, kw_only=True)
class Sources:
    """What the URLs of messages may reach.

    folder: where `file:` URLs and plain paths lead to; None refuses them all.
    networks: networks that may be reached although they are not public, such as "10.1.0.0/16".
    hosts: the only names that http(s) URLs may have; None for any.
    timeout_s: seconds for a whole fetch: name, connection, redirects and body.
    """

    folder: Path | None = None
    networks: tuple[str, ...] = ()
    hosts: frozenset[str] | None = None
    allows_http: bool = True  # False leaves data URLs and the folder
    max_image_bytes: int = 32 << 20
    max_video_bytes: int = 256 << 20
    max_redirects: int = 3
    timeout_s: float = 20.0

    def read(self, url: str, kind: str) -> bytes:
        """The bytes that `url` names; `kind` is "image" or "video". Raises MediaError."""
        limit = getattr(self, _MEDIA[kind])
        scheme = url.partition(":")[0].lower() if ":" in url[:16] else ""
        if scheme == "data":
            return _data_bytes(url, limit)
        if scheme in ("http", "https"):
            if not self.allows_http:
                raise MediaError(f"{_shown(url)} may not be fetched here; send a data: URL")
            return self._fetched(url, limit)
        if scheme in ("", "file"):
            return self._file_bytes(url, limit)
        raise MediaError(
            f"{_shown(url)} has a scheme that is not read; use https:, http:, data: or file:"
        )

    def _fetched(self, url: str, limit: int) -> bytes:
        deadline = time.monotonic() + self.timeout_s
        first = url
        try:
            for _ in range(self.max_redirects + 1):
                answer = self._get(url, deadline, limit)
                if isinstance(answer, bytes):
                    return answer
                if urlsplit(url).scheme == "https" and not answer.lower().startswith("https:"):
                    raise MediaError(f"{_shown(first)} redirects from https to something else")
                url = answer
        except TimeoutError:
            raise MediaError(f"{_shown(first)} took longer than {self.timeout_s:g} s") from None
        except (OSError, HTTPException, ValueError) as error:
            if isinstance(error, MediaError):
                raise
            raise MediaError(f"{_shown(first)} cannot be fetched: {_told(error)}") from None
        raise MediaError(f"{_shown(first)} redirects more than {self.max_redirects} times")

    def _get(self, url: str, deadline: float, limit: int) -> bytes | str:
        """The body of one answer, or the URL that it redirects to."""
        parts = _parsed(url)
        host = parts.hostname or ""
        if self.hosts is not None and host not in self.hosts:
            raise MediaError(f"{_shown(url)}: pictures are not taken from this host")
        port = parts.port or (443 if parts.scheme == "https" else 80)
        with self._connected(host, port, deadline, _shown(url)) as plain:
            connection = _secured(plain, host, deadline) if parts.scheme == "https" else plain
            with connection:
                _send(connection, parts, deadline)
                reply: Any = _Timed(connection, deadline)
                response = HTTPResponse(reply, method="GET")
                response.begin()
                if response.status in _REDIRECTS:
                    return urljoin(url, response.headers.get("Location") or "about:blank")
                return _body(response, limit, _shown(url))

    def _connected(self, host: str, port: int, deadline: float, shown: str) -> socket.socket:
        """A connection to one of the addresses of `host`, all of which were checked."""
        addresses = _resolved(host, port, deadline)
        for *_, target in addresses:
            if not self._may_reach(str(target[0])):
                raise MediaError(f"{shown}: the host has no public address; use one that has")
        failure: OSError = OSError("the host has no address")
        for family, kind, protocol, _, target in addresses:
            connection = socket.socket(family, kind, protocol)
            try:
                connection.settimeout(_left(deadline))
                connection.connect(target)
                return connection
            except OSError as error:
                connection.close()
                failure = error
        raise failure

    def _may_reach(self, text: str) -> bool:
        address = ip_address(text.partition("%")[0])
        inner = _inner_address(address)
        networks = [ip_network(network) for network in self.networks]
        allowed = any(address in network for network in networks)
        return allowed or _is_public(inner or address)

    def _file_bytes(self, url: str, limit: int) -> bytes:
        shown = _shown(url)
        if self.folder is None:
            raise MediaError(f"{shown} is a file, and files are not read here; send a data: URL")
        name = url
        if url[:5].lower() == "file:":
            parts, _ = _split(url, "file:///path")
            if parts.netloc not in ("", "localhost"):
                raise MediaError(f"{shown} names a file of another machine; use file:///path")
            name = unquote(parts.path)
        # One sentence for what is missing, outside, or no file: a stranger learns nothing of paths.
        refusal = MediaError(f"{shown} is not a readable file of the allowed folder")
        try:
            root = self.folder.resolve(strict=True)
            path = (root / name).resolve(strict=True)
            if not path.is_relative_to(root) or not path.is_file():
                raise refusal
            with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb") as file:
                if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                    raise refusal
                data = file.read(limit + 1)
        except (OSError, RuntimeError):  # RuntimeError: links that go round
            raise refusal from None
        except ValueError as error:  # a NUL in the name
            raise (error if isinstance(error, MediaError) else refusal) from None
        if len(data) > limit:
            raise MediaError(f"{shown} has more than {limit} bytes, which is the limit")
        return data


def _data_bytes(url: str, limit: int) -> bytes:
    head, comma, body = url.partition(",")
    if not comma:
        raise MediaError("a data: URL has no comma; expected data:image/png;base64,...")
    too_long = MediaError(f"a data: URL has more than {limit} bytes, which is the limit")
    if len(body) > limit * 4 + 16:  # whatever its encoding
        raise too_long
    data = unquote_to_bytes(body) if "%" in body else body.encode("utf-8", "replace")
    if head.lower().endswith(";base64"):
        data = b"".join(data.split())
        if len(data) * 3 // 4 > limit + 2:
            raise too_long
        try:
            data = base64.b64decode(data, validate=True)
        except binascii.Error as error:
            raise MediaError(f"a data: URL is not base64: {error}") from None
    if len(data) > limit:
        raise too_long
    return data


def _split(url: str, example: str) -> tuple[SplitResult, int | None]:
    """The parts of a URL, and its port; raises MediaError, which names a right one."""
    try:
        parts = urlsplit(url)
        return parts, parts.port
    except ValueError:
        raise MediaError(f"{_shown(url)} is not a URL; use {example}") from None


def _parsed(url: str) -> SplitResult:
    """The parts of an http(s) URL; refuses what another parser could read in another way."""
    parts, port = _split(url, "https://host/path")
    if parts.scheme not in ("http", "https"):
        raise MediaError(f"{_shown(url)} leads to something other than http and https")
    host = parts.netloc.rpartition(":")[0] if port is not None else parts.netloc.rstrip(":")
    if "@" in parts.netloc:
        raise MediaError(f"{_shown(url)} holds a user name; leave it out")
    if not _URL.fullmatch(url) or "\\" in url or not _HOST.fullmatch(host):
        raise MediaError(
            f"{_shown(url)} holds characters that a URL may not; write them as %.. or xn--"
        )
    return parts


def _is_public(address: IPv4Address | IPv6Address) -> bool:
    special = address.is_multicast or address.is_reserved or address.is_unspecified
    local = address.is_loopback or address.is_link_local or address.is_private
    site = isinstance(address, IPv6Address) and address.is_site_local
    listed = any(address in network for network in _NOT_PUBLIC)
    return address.is_global and not (special or local or site or listed)


def _inner_address(address: IPv4Address | IPv6Address) -> IPv4Address | None:
    """The IPv4 address that an IPv6 one leads to, mapped or by NAT64."""
    if isinstance(address, IPv4Address):
        return None
    return IPv4Address(int(address) & 0xFFFFFFFF) if address in _NAT64 else address.ipv4_mapped


def _resolved(host: str, port: int, deadline: float) -> list[tuple[Any, ...]]:
    """`getaddrinfo`, which has no time limit of its own, in a thread that may be left behind."""
    found: list[Any] = []

    def resolve() -> None:
        try:
            found.append(socket.getaddrinfo(host, port, type=socket.SOCK_STREAM))
        except (OSError, UnicodeError) as error:
            found.append(error)

    thread = threading.Thread(target=resolve, daemon=True)
    thread.start()
    thread.join(_left(deadline))
    if not found:
        raise TimeoutError
    if isinstance(found[0], Exception):
        raise OSError("the name of the host is not known")
    return found[0]


def _secured(connection: socket.socket, host: str, deadline: float) -> ssl.SSLSocket:
    connection.settimeout(_left(deadline))
    return ssl.create_default_context().wrap_socket(connection, server_hostname=host)


def _send(connection: socket.socket, parts: SplitResult, deadline: float) -> None:
    target = (parts.path or "/") + ("?" + parts.query if parts.query else "")
    lines = (
        f"GET {target} HTTP/1.1",
        f"Host: {parts.netloc}",
        "User-Agent: ernie-open",
        "Accept: image/*, video/*, */*;q=0.5",
        "Accept-Encoding: identity",
        "Connection: close",
    )
    connection.settimeout(_left(deadline))
    connection.sendall("".join(line + "\r\n" for line in (*lines, "")).encode("ascii"))


def _body(response: HTTPResponse, limit: int, shown: str) -> bytes:
    if response.status != 200:
        raise MediaError(f"{shown} answered {response.status}; expected 200")
    if (response.headers.get("Content-Encoding") or "identity") != "identity":
        raise MediaError(f"{shown} answered with compressed content, which was not asked for")
    data = bytearray()
    while piece := response.read(min(_CHUNK, limit + 1 - len(data))):
        data += piece
        if len(data) > limit or (response.length or 0) > limit:
            raise MediaError(f"{shown} has more than {limit} bytes, which is the limit")
    if response.length:
        raise MediaError(f"{shown} ended {response.length} bytes before its Content-Length")
    return bytes(data)


class _Timed(io.RawIOBase):
    """What HTTPResponse reads from: every read waits no longer than the deadline of the fetch."""

    def __init__(self, connection: socket.socket, deadline: float):
        self._connection = connection
        self._deadline = deadline

    def makefile(self, mode: str) -> io.BufferedReader:
        return io.BufferedReader(self)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        self._connection.settimeout(_left(self._deadline))
        return self._connection.recv_into(buffer)


def _left(deadline: float) -> float:
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError
    return left


def _told(error: Exception) -> str:
    """Why a fetch failed, without addresses and without text that the other side wrote."""
    if isinstance(error, ssl.SSLError):
        return "its certificate is not valid or TLS failed"
    if isinstance(error, HTTPException):
        return "the answer is not HTTP or ends too early"
    return "there is no connection to the host"


def _shown(url: str) -> str:
    """A URL for an error: scheme and host, for the rest may be secret or very long."""
    if ":" not in url[:16] or url[:5].lower() == "file:":
        return f"the path {url[-60:]!r}"
    return repr("/".join(re.split(r"[/\\?#]", url[:120])[:3]).rpartition("@")[2])
