"""Where pictures come from: a good path on loopback, and traps that no request may reach."""

from __future__ import annotations

import base64
import os
import socket
import ssl
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from ernie.vision import sources
from ernie.vision.sources import MediaError, Sources

LOOPBACK = ("127.0.0.0/8", "::1/128")
PUBLIC = "93.184.216.34"
GETADDRINFO = socket.getaddrinfo


@contextmanager
def server(answer: Callable[[str, socket.socket], object]) -> Iterator[tuple[int, list[str]]]:
    """A server on loopback that hands each request's text to `answer`; its port and requests."""
    requests: list[str] = []
    listener = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            threading.Thread(target=one, args=(connection,), daemon=True).start()

    def one(connection: socket.socket) -> None:
        with connection:
            connection.settimeout(5)
            try:
                request = connection.recv(65536).decode("latin-1")
                requests.append(request)
                answer(request, connection)
            except OSError:
                pass

    threading.Thread(target=serve, daemon=True).start()
    try:
        yield listener.getsockname()[1], requests
    finally:
        listener.close()


def reply(body: bytes = b"pixels", status: str = "200 OK", **headers: object):
    lines = [f"HTTP/1.1 {status}", *(f"{k.replace('_', '-')}: {v}" for k, v in headers.items())]
    if "Content_Length" not in headers and "Transfer_Encoding" not in headers:
        lines.append(f"Content-Length: {len(body)}")
    data = "\r\n".join([*lines, "", ""]).encode() + body
    return lambda request, connection: connection.sendall(data)


def resolve_to(monkeypatch, *addresses: str) -> list[str]:
    """Every name resolves to `addresses`, one list after the other; returns the names asked for."""
    asked: list[str] = []

    def getaddrinfo(host, port, *arguments, **options):
        asked.append(host)
        entry = addresses[min(len(asked), len(addresses)) - 1]
        return [
            found for a in entry.split() for found in GETADDRINFO(a, port, *arguments, **options)
        ]

    monkeypatch.setattr(sources.socket, "getaddrinfo", getaddrinfo)
    return asked


def test_a_picture_is_fetched_and_asked_for_by_its_name() -> None:
    with server(reply()) as (port, requests):
        url = f"http://127.0.0.1:{port}/a%20b.png?x=1&y=2#part"
        assert Sources(networks=LOOPBACK).read(url, "image") == b"pixels"
    head = requests[0].split("\r\n")
    assert head[0] == "GET /a%20b.png?x=1&y=2 HTTP/1.1" and f"Host: 127.0.0.1:{port}" in head


def test_a_redirect_is_followed_where_it_is_allowed() -> None:
    with (
        server(reply()) as (port, requests),
        server(reply(b"", "302 Found", Location=f"http://127.0.0.1:{port}/there")) as (first, _),
    ):
        url = f"http://127.0.0.1:{first}/here"
        assert Sources(networks=LOOPBACK).read(url, "image") == b"pixels"
    assert requests[0].startswith("GET /there ")


def test_chunked_and_unlengthed_bodies_are_read() -> None:
    chunked = reply(b"3\r\nabc\r\n4\r\ndefg\r\n0\r\n\r\n", Transfer_Encoding="chunked")
    with server(chunked) as (port, _):
        url = f"http://127.0.0.1:{port}/"
        assert Sources(networks=LOOPBACK).read(url, "image") == b"abcdefg"
    with server(lambda _, c: c.sendall(b"HTTP/1.0 200 OK\r\n\r\nall of it")) as (port, _):
        url = f"http://127.0.0.1:{port}/"
        assert Sources(networks=LOOPBACK).read(url, "image") == b"all of it"


# Spellings of this machine, of private networks and of addresses that lead there.
TRAPS = [
    "127.0.0.1",
    "127.1",
    "2130706433",
    "0x7f000001",
    "0x7f.0.0.1",
    "0177.0.0.1",
    "0.0.0.0",
    "0",
    "localhost",
    "LOCALHOST.",
    "[::1]",
    "[::]",
    "[::ffff:127.0.0.1]",
    "[::ffff:7f00:1]",
    "[0:0:0:0:0:ffff:127.0.0.1]",
    "[::127.0.0.1]",
    "[64:ff9b::127.0.0.1]",
    "[2002:7f00:1::]",
]


@pytest.mark.parametrize("host", TRAPS)
def test_no_spelling_of_this_machine_is_reached(host) -> None:
    with server(reply()) as (port, requests):
        with pytest.raises(MediaError) as caught:
            Sources(timeout_s=5).read(f"http://{host}:{port}/secret", "image")
        time.sleep(0.02)
        assert not requests, f"{host} reached the server"
    assert "127.0.0.1" not in str(caught.value) or "127.0.0.1" in host


@pytest.mark.parametrize(
    "address",
    [
        "10.0.0.1",
        "172.16.5.5",
        "192.168.1.1",
        "169.254.169.254",
        "100.64.0.1",
        "192.0.0.8",
        "198.18.0.1",
        "224.0.0.1",
        "239.255.255.250",
        "240.0.0.1",
        "255.255.255.255",
        "fe80::1",
        "fc00::1",
        "fd00:ec2::254",
        "fec0::1",
        "ff02::1",
        "::ffff:169.254.169.254",
        "64:ff9b::a9fe:a9fe",
        "2002:a9fe:a9fe::",
        "2001:0:7f00:1::",
        "::ffff:10.0.0.1",
        "::a00:1",
    ],
)
def test_addresses_that_are_not_public_are_never_connected_to(monkeypatch, address) -> None:
    def connect(*_: object) -> None:
        raise AssertionError(f"{address} was connected to")

    monkeypatch.setattr(sources.socket.socket, "connect", connect)
    resolve_to(monkeypatch, address)
    with pytest.raises(MediaError, match="no public address"):
        Sources().read("http://pictures.example/x.png", "image")
    resolve_to(monkeypatch, f"{PUBLIC} {address}")  # one bad among good ones is enough
    with pytest.raises(MediaError, match="no public address"):
        Sources().read("http://pictures.example/x.png", "image")


def test_public_addresses_are_connected_to_as_checked(monkeypatch) -> None:
    """The name is resolved once; what a second answer would say changes nothing."""
    asked = resolve_to(monkeypatch, PUBLIC, "127.0.0.1")
    connected = []

    def connect(self, target):
        connected.append(target[0])
        raise ConnectionRefusedError

    monkeypatch.setattr(sources.socket.socket, "connect", connect)
    with pytest.raises(MediaError, match="no connection"):
        Sources().read("http://rebinding.example/x.png", "image")
    assert (asked, connected) == (["rebinding.example"], [PUBLIC])
    resolve_to(monkeypatch, "64:ff9b::5db8:d822")  # the same address behind NAT64
    with pytest.raises(MediaError, match="no connection"):
        Sources().read("http://pictures.example/x.png", "image")
    assert connected[1:] == ["64:ff9b::5db8:d822"]


@pytest.mark.parametrize(
    "location",
    [
        "http://127.0.0.1:{port}/secret",
        "//127.0.0.1:{port}/secret",
        "http://[::ffff:127.0.0.1]:{port}/secret",
        "file:///etc/passwd",
        "ftp://127.0.0.1/x",
        "gopher://127.0.0.1:{port}/x",
        "/x\\@127.0.0.1:{port}",
        "",
    ],
)
def test_redirects_lead_to_no_trap(monkeypatch, location) -> None:
    """The first hop is on 127.0.0.2, which is allowed here; the second may not leave it."""
    with server(reply()) as (port, requests):
        listener = socket.create_server(("127.0.0.2", 0))
        target = location.format(port=port)
        data = f"HTTP/1.1 302 Found\r\nLocation: {target}\r\nContent-Length: 0\r\n\r\n".encode()

        def serve() -> None:
            for _ in range(5):
                try:
                    connection, _ = listener.accept()
                except OSError:
                    return
                with connection:
                    connection.recv(65536)
                    connection.sendall(data)

        threading.Thread(target=serve, daemon=True).start()
        allowed = Sources(networks=("127.0.0.2/32",), timeout_s=5)
        with pytest.raises(MediaError):
            allowed.read(f"http://127.0.0.2:{listener.getsockname()[1]}/", "image")
        listener.close()
        assert not requests, f"a redirect to {target!r} reached the trap"


@pytest.mark.parametrize(
    "url",
    [
        "http://user:secret@127.0.0.1:{port}/",
        "http://example.com@127.0.0.1:{port}/",
        "http://127.0.0.1:{port}\\@example.com/",
        "http://example.com\\@127.0.0.1:{port}/",
        "http://127.0.0.1:{port}\t/",
        "http://127.0.0.1\n:{port}/",
        "http://127.0.0.1:{port}/\r\nX-Evil: 1",
        "http://127.0.0.1:{port}/ with spaces",
        "http://127.0.0.1:99999/",
        "http://[127.0.0.1:{port}/",
        "http://①②⑦.0.0.1:{port}/",
        "http://127.0.0.1%00:{port}/",
        "http:///x",
        "http://:{port}/",
        "HTTP:127.0.0.1:{port}/",
        "ftp://127.0.0.1:{port}/",
        "gopher://127.0.0.1:{port}/_GET",
        "dict://127.0.0.1:{port}/",
        "jar:http://127.0.0.1:{port}/!/",
        "javascript:alert(1)",
    ],
)
def test_urls_that_could_be_read_in_two_ways_are_refused(url) -> None:
    with server(reply()) as (port, requests):
        with pytest.raises(MediaError) as caught:
            Sources(networks=LOOPBACK, timeout_s=5).read(url.format(port=port), "image")
        time.sleep(0.02)
        assert not requests
    assert "secret" not in str(caught.value) and "\n" not in str(caught.value)


def test_hosts_can_be_listed() -> None:
    with server(reply()) as (port, requests):
        listed = Sources(networks=LOOPBACK, hosts=frozenset({"pictures.example"}))
        with pytest.raises(MediaError, match="not taken from this host"):
            listed.read(f"http://127.0.0.1:{port}/", "image")
        with pytest.raises(MediaError, match="may not be fetched here"):
            Sources(networks=LOOPBACK, allows_http=False).read(f"http://127.0.0.1:{port}/", "image")
        assert not requests


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (reply(status="404 Not Found"), "answered 404"),
        (reply(b"x" * 5000), "more than 1000 bytes"),
        (reply(b"x", Content_Length=10**12), "more than 1000 bytes"),
        (reply(b"400\r\n" + b"x" * 1024 + b"\r\n", Transfer_Encoding="chunked"), "more than 1000"),
        (reply(b"x", Content_Length=50), "ended 49 bytes before"),
        (reply(b"4\r\nab", Transfer_Encoding="chunked"), "ends too early"),
        (reply(Content_Encoding="gzip"), "compressed"),
        (lambda _, c: c.sendall(b"SSH-2.0-OpenSSH\r\n"), "not HTTP"),
        (lambda _, c: c.sendall(b"HTTP/1.1 200 OK\r\nX: " + b"y" * 70_000), "not HTTP"),
        (lambda _, c: None, "not HTTP or ends too early"),
    ],
)
def test_answers_beyond_limits_are_refused(answer, message) -> None:
    with server(answer) as (port, _), pytest.raises(MediaError, match=message):
        limited = Sources(networks=LOOPBACK, max_image_bytes=1000, timeout_s=5)
        limited.read(f"http://127.0.0.1:{port}/", "image")


def test_too_many_redirects_are_refused() -> None:
    with server(reply(b"", "301 Moved", Location="/again")) as (port, requests):
        with pytest.raises(MediaError, match="more than 3 times"):
            Sources(networks=LOOPBACK).read(f"http://127.0.0.1:{port}/", "image")
        assert len(requests) == 4


def drip(piece: bytes, head: bytes = b"HTTP/1.1 200 OK\r\nContent-Length: 9999\r\n\r\n"):
    def answer(_: str, connection: socket.socket) -> None:
        connection.sendall(head)
        for _ in range(200):
            time.sleep(0.02)
            connection.sendall(piece)

    return answer


@pytest.mark.parametrize(
    "answer",
    [
        drip(b"x"),  # a body, byte by byte: no single wait is long
        drip(b"X-A: b\r\n", b"HTTP/1.1 200 OK\r\n"),
        drip(b"HTTP/1.1 100 Continue\r\n\r\n", b""),
        lambda _, c: time.sleep(3),
    ],
)
def test_slow_servers_are_left_at_the_deadline(answer) -> None:
    with server(answer) as (port, _), pytest.raises(MediaError, match=r"longer than 0\.3 s"):
        Sources(networks=LOOPBACK, timeout_s=0.3).read(f"http://127.0.0.1:{port}/", "image")


def test_a_resolver_that_hangs_is_left_at_the_deadline(monkeypatch) -> None:
    release = threading.Event()
    monkeypatch.setattr(sources.socket, "getaddrinfo", lambda *_, **__: release.wait(30))
    with pytest.raises(MediaError, match=r"longer than 0\.1 s"):
        Sources(timeout_s=0.1).read("http://slow.example/", "image")
    release.set()


@pytest.fixture(scope="module")
def certificate(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tls")
    command = "openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=localhost"
    names = ["-addext", "subjectAltName=DNS:localhost", "-keyout", "key", "-out", "cert"]
    done = subprocess.run([*command.split(), *names], cwd=folder, capture_output=True)
    if done.returncode:
        pytest.skip("openssl is not installed")
    return folder


def test_https_checks_the_certificate_of_the_name(certificate, monkeypatch) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate / "cert", certificate / "key")
    listener = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        while True:
            try:
                connection, _ = listener.accept()
                with context.wrap_socket(connection, server_side=True) as secured:
                    secured.recv(65536)
                    secured.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\npixels")
            except ssl.SSLError:
                continue
            except OSError:
                return

    threading.Thread(target=serve, daemon=True).start()
    port = listener.getsockname()[1]
    allowed = Sources(networks=LOOPBACK, timeout_s=5)
    with pytest.raises(MediaError, match="certificate"):
        allowed.read(f"https://localhost:{port}/", "image")
    original = ssl.create_default_context

    def trusting() -> ssl.SSLContext:
        return original(cafile=str(certificate / "cert"))

    monkeypatch.setattr(sources.ssl, "create_default_context", trusting)
    assert allowed.read(f"https://localhost:{port}/", "image") == b"pixels"
    with pytest.raises(MediaError, match="certificate"):
        allowed.read(f"https://127.0.0.1:{port}/", "image")
    listener.close()


def test_files_are_read_below_the_folder_alone(tmp_path) -> None:
    folder = tmp_path / "allowed"
    (folder / "sub").mkdir(parents=True)
    (folder / "sub" / "a b.png").write_bytes(b"inside")
    secret = tmp_path / "secret.png"
    secret.write_bytes(b"outside")
    (folder / "link.png").symlink_to(secret)
    (folder / "loop").symlink_to(folder / "loop")
    os.mkfifo(folder / "pipe")
    allowed = Sources(folder=folder)
    for good in ("sub/a b.png", str(folder / "sub/a b.png"), f"file://{folder}/sub/a%20b.png"):
        assert allowed.read(good, "image") == b"inside"
    for bad in (
        "../secret.png",
        str(secret),
        f"file://{secret}",
        f"file://{folder}/../secret.png",
        f"file://{folder}/%2e%2e/secret.png",
        "link.png",
        "loop",
        "pipe",
        "sub",
        "",
        "missing.png",
        "a\0b",
        "/etc/passwd",
        "/proc/self/environ",
        "/dev/zero",
    ):
        with pytest.raises(MediaError, match="not a readable file of the allowed folder"):
            allowed.read(bad, "image")
    with pytest.raises(MediaError, match="another machine"):
        allowed.read("file://elsewhere/share/x.png", "image")
    with pytest.raises(MediaError, match="more than 3 bytes"):
        Sources(folder=folder, max_image_bytes=3).read("sub/a b.png", "image")
    for url in (str(secret), f"file://{secret}"):
        with pytest.raises(MediaError, match="files are not read here"):
            Sources().read(url, "image")


def test_data_urls_are_decoded_strictly() -> None:
    data = bytes(range(256))
    text = base64.b64encode(data).decode()
    read = Sources(max_image_bytes=256, max_video_bytes=300).read
    assert read(f"data:image/png;base64,{text}", "image") == data
    assert read(f"DATA:image/png;BASE64,{text[:20]}\n {text[20:]}", "image") == data
    assert read(f"data:;base64,{text.replace('+', '%2B')}", "image") == data
    assert read("data:text/plain,a%00b", "image") == b"a\0b"
    longer = base64.b64encode(data + b"x").decode()
    assert read(f"data:video/mp4;base64,{longer}", "video") == data + b"x"
    for url, message in (
        (f"data:image/png;base64,{longer}", "more than 256 bytes"),
        ("data:image/png;base64," + "A" * 10_000, "more than 256 bytes"),
        ("data:image/png;base64,A!!!", "not base64"),
        ("data:image/png;base64,AAA", "not base64"),
        ("data:image/png;base64", "no comma"),
    ):
        with pytest.raises(MediaError, match=message) as caught:
            read(url, "image")
        assert len(str(caught.value)) < 200


ODD = st.sampled_from([*"/\\:@?#[]%.0x \t\n\0é①", "//", "127.0.0.1", "localhost", "://", "%00"])


@given(
    st.sampled_from(["http:", "https://", "file:", "data:", "", "x:"]), st.lists(ODD | st.text())
)
@example("file:", ["//", "["])
@settings(deadline=None, max_examples=120)
def test_whatever_stands_for_a_url_is_refused_in_a_sentence(scheme, pieces) -> None:
    def unknown(*_: object, **__: object) -> None:
        raise socket.gaierror(8, "unknown")

    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as folder:
        patch.setattr(sources.socket, "getaddrinfo", unknown)
        try:
            data = Sources(folder=Path(folder)).read(scheme + "".join(pieces), "image")
        except MediaError as error:
            assert len(str(error)) < 400 and "\n" not in str(error) and "\0" not in str(error)
        else:
            assert scheme == "data:" and data is not None
