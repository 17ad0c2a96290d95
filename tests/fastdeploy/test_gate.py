"""Who is let in and how much is taken on, at routes that stand in for the server's own."""

from __future__ import annotations

import asyncio
import re

import httpx
import pytest
from helpers_gate import Gated, make_stats

from fastdeploy.errors import RequestError
from fastdeploy.sampling import SamplingParams
from fastdeploy.server import gate, limits
from fastdeploy.server.gate import WRONG_KEYS_PER_MINUTE, WrongKeys, is_safe_host
from fastdeploy.server.limits import FIRST_GUESS_S, LONGEST_S, Pace

ECHO = "/v1/echo/x"


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def bearer(key: str, scheme: str = "Bearer") -> dict[str, str]:
    return {"authorization": f"{scheme} {key}"}


def test_one_of_several_keys_is_wanted_and_names_the_tenant(tmp_path) -> None:
    (tmp_path / "keys").write_text("from-a-file\n")
    client = Gated(api_key=["one", "two"], api_key_file=str(tmp_path / "keys")).client
    tenants = set()
    for key in ("one", "two", "from-a-file"):
        for scheme in ("Bearer", "bearer"):
            answer = client.post(ECHO, headers=bearer(key, scheme))
            assert answer.status_code == 200, key
            tenants.add(answer.json()["tenant"])
    assert len(tenants) == 3 and not any(key in t for t in tenants for key in ("one", "two"))
    for headers in ({}, bearer("on"), bearer("one "), bearer("one,two"), bearer("one", "Basic")):
        answer = client.post(ECHO, headers=headers)
        assert answer.status_code == 401, headers
        assert answer.headers["www-authenticate"] == "Bearer"
        assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
    assert client.get("/health").status_code == 200
    for path in ("/health/", "//health", "/HEALTH", "/health/../v1/echo/x", "/nothing"):
        assert client.get(path).status_code == 401, path


@pytest.mark.parametrize("name", ["api_key", "API_KEY", "access_token", "token"])
def test_a_key_in_the_address_is_refused_even_beside_a_header(name: str) -> None:
    client = Gated(api_key=["k"]).client
    for headers in ({}, bearer("k")):
        answer = client.get(f"{ECHO}?{name}=k", headers=headers)
        assert answer.status_code == 401 and "ends in logs" in answer.text
    assert client.get(f"{ECHO}?other=k", headers=bearer("k")).status_code == 200


def test_guesses_at_keys_are_slowed_down(monkeypatch) -> None:
    clock = Clock()
    monkeypatch.setattr(gate, "WrongKeys", lambda: WrongKeys(clock))
    client = Gated(api_key=["right"]).client
    codes = [client.get(ECHO, headers=bearer(f"guess{i}")).status_code for i in range(100)]
    assert codes == [401] * WRONG_KEYS_PER_MINUTE + [429] * (100 - WRONG_KEYS_PER_MINUTE)
    refused = client.get(ECHO, headers=bearer("right"))
    assert refused.status_code == 429, "the right key would stand out among the guesses"
    clock.now += int(refused.headers["retry-after"])
    assert client.get(ECHO, headers=bearer("right")).status_code == 200
    assert client.get(ECHO, headers=bearer("wrong")).status_code == 401
    assert client.get(ECHO, headers=bearer("wrong")).status_code == 429
    assert client.get("/health").status_code == 200


def test_addresses_are_counted_apart_and_forgotten_in_time(monkeypatch) -> None:
    monkeypatch.setattr(gate, "MAX_ADDRESSES", 3)
    clock = Clock()
    wrong = WrongKeys(clock)
    for address in ["2001:db8:0:1::1"] * 20 + ["2001:db8:0:1::2"] * 20:
        wrong.count(address)
    assert wrong.wait_s("2001:db8:0:1:ffff::3") > 0 == wrong.wait_s("2001:db8:0:2::1")
    for number in range(3):
        wrong.count(f"10.0.0.{number}")
    assert len(wrong.levels) == 3 and wrong.wait_s("2001:db8:0:1::1") == 0
    for _ in range(1000):
        wrong.count("10.0.0.9")
    clock.now += 1000 * 60 / WRONG_KEYS_PER_MINUTE
    assert wrong.wait_s("10.0.0.9") == 0


@pytest.mark.parametrize(
    ("host", "safe"),
    [
        ("127.0.0.1:8000", True),
        ("[::1]:8000", True),
        ("192.168.1.7", True),
        ("localhost:8000", True),
        ("chat.localhost", True),
        ("fastdeploy:8000", True),
        ("", True),
        ("api.example.com", True),
        ("api.example.com.:443", True),
        ("evil.example", False),
        ("127.0.0.1.evil.example", False),
        ("localhost.evil.example:8000", False),
        ("api.example.com.evil.example", False),
        ("user@evil.example", False),
        ("[::1", False),
        ("1.2.3", False),
    ],
)
def test_names_that_a_stranger_could_point_here_are_not_safe(host: str, safe: bool) -> None:
    assert is_safe_host(host, ["api.example.com"]) == safe


def test_without_keys_other_pages_are_kept_out() -> None:
    client = Gated(allowed_hosts=["api.example.com"], allowed_origins=["https://ok.example"]).client
    cases = [
        ({}, 200),
        ({"host": "evil.example:8000"}, 403),
        ({"host": "api.example.com"}, 200),
        ({"host": "127.0.0.1:8000", "origin": "http://127.0.0.1:8000"}, 200),
        ({"host": "127.0.0.1:8000", "origin": "http://127.0.0.1:9000"}, 403),
        ({"origin": "https://evil.example"}, 403),
        ({"origin": "null"}, 403),
        ({"origin": "https://ok.example"}, 200),
    ]
    for headers, status in cases:
        assert client.post(ECHO, headers=headers).status_code == status, headers
    answer = client.post(ECHO, headers={"origin": "https://ok.example"})
    assert answer.headers["access-control-allow-origin"] == "https://ok.example"


def test_with_keys_names_do_not_matter_and_preflights_need_none() -> None:
    client = Gated(api_key=["k"], allowed_origins=["https://ok.example"]).client
    headers = bearer("k") | {"host": "any.example", "origin": "https://any.example"}
    assert client.post(ECHO, headers=headers).status_code == 200
    for origin, status in (("https://ok.example", 200), ("https://evil.example", 400)):
        asked = {"origin": origin, "access-control-request-method": "POST"}
        asked["access-control-request-headers"] = "authorization,content-type"
        assert client.options(ECHO, headers=asked).status_code == status
    closed = Gated(api_key=["k"]).client
    answer = closed.post(ECHO, headers=bearer("k") | {"origin": "https://ok.example"})
    assert "access-control-allow-origin" not in answer.headers
    asked = {"origin": "https://ok.example", "access-control-request-method": "POST"}
    assert closed.options(ECHO, headers=asked).status_code == 401


def test_every_answer_has_an_id_and_headers_for_browsers() -> None:
    gated = Gated(api_key=["k"])
    for path, status in ((ECHO, 200), ("/nothing", 404), ("/v1/slow?token=1", 401)):
        answer = gated.client.get(path, headers=bearer("k") | {"x-request-id": "job-7:a.b_c"})
        assert (answer.status_code, answer.headers["x-request-id"]) == (status, "job-7:a.b_c")
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert "default-src 'none'" in answer.headers["content-security-policy"]
    for bad in ("", "a b", "x" * 129, "<script>", "-rf", "a\tb"):
        answer = gated.client.get("/health", headers={"x-request-id": bad})
        assert re.fullmatch("[0-9a-f]{32}", answer.headers["x-request-id"]), bad


async def both(gated: Gated, *requests: tuple[str, str]) -> list[int]:
    """Statuses of requests (path, key), the first of which is still in work when others come."""
    transport = httpx.ASGITransport(gated.app, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
        (path, key), *others = requests
        first = asyncio.create_task(client.post(path, headers=bearer(key)))
        await asyncio.sleep(0.05)
        codes = [(await client.post(p, headers=bearer(k))).status_code for p, k in others]
        gated.release.set()
        return [(await first).status_code, *codes]


def test_a_key_has_its_share_and_no_more() -> None:
    gated = Gated(api_key=["a", "b"], max_concurrency_per_key=1)
    codes = asyncio.run(both(gated, ("/v1/slow", "a"), (ECHO, "a"), (ECHO, "b"), (ECHO, "a")))
    assert codes == [200, 429, 200, 429]
    assert gated.client.post(ECHO, headers=bearer("a")).status_code == 200
    gated.client.post("/v1/broken", headers=bearer("a"))
    assert gated.limits.num_by_key == {}, "a place was kept by a request that is over"


def test_a_request_that_takes_too_long_is_ended() -> None:
    answer = Gated(timeout=0.05).client.post("/v1/slow")
    assert answer.status_code == 504 and "timeout=0.05" in answer.json()["error"]["message"]
    gated = Gated(timeout=0.5)  # the stream has to begin before
    stream = gated.client.post("/v1/stream")
    assert stream.status_code == 200
    first, last = stream.text.strip().split("\n\n")
    assert first == "data: one" and '"code": "timeout"' in last
    messages = Gated(timeout=0.5).client.post("/v1/messages/stream")
    last = messages.text.strip().split("\n\n")[-1]
    assert last.startswith('event: error\ndata: {"type": "error", "error": ')
    assert gated.client.post(ECHO).status_code == 200


def test_the_queue_has_an_end_and_a_length_in_seconds(monkeypatch) -> None:
    clock = Clock()
    monkeypatch.setattr(limits, "Pace", lambda: Pace(clock))
    gated = Gated(max_num_waiting=10, max_waiting_time=3)
    assert gated.limits.retry_after_s() == FIRST_GUESS_S
    gated.stats = make_stats(num_waiting=9)
    gated.limits.admit()  # nobody knows yet how long that takes
    for _ in range(21):  # two texts a second
        gated.limits.pace.count()
        clock.now += 0.5
    assert gated.limits.pace.per_second() == pytest.approx(2, rel=0.1)
    assert gated.limits.retry_after_s() == 5
    with pytest.raises(RequestError, match=r"the queue takes [45] s, more than max_waiting_time=3"):
        gated.limits.admit()
    gated.stats = make_stats(num_waiting=5)
    gated.limits.admit()
    gated.stats = make_stats(num_waiting=10)
    with pytest.raises(RequestError, match="10 texts are waiting, as many as max_num_waiting") as e:
        gated.limits.admit()
    assert e.value.status == 429
    gated.stats = make_stats(num_waiting=10**6)
    assert gated.limits.retry_after_s() == LONGEST_S
    clock.now += 61
    assert gated.limits.pace.per_second() is None


@pytest.mark.parametrize(
    ("prompts", "params", "asked"),
    [
        ([[1] * 10], {"max_tokens": 50}, 50),
        ([[1] * 10], {"max_tokens": 50, "n": 2}, 100),
        ([[1] * 10], {"max_tokens": 50, "n": 2, "best_of": 3}, 150),
        ([[1] * 10, [1] * 10], {"max_tokens": 60}, 120),
        ([[1] * 10], {"max_tokens": None}, 90),
        ([[1] * 95], {"max_tokens": 50, "n": 7}, 35),
        ([[1] * 95], {"pooling": "mean"}, 1),
    ],
)
def test_the_quota_counts_every_text_of_a_request(prompts, params, asked) -> None:
    exact = Gated(max_tokens_per_request=asked)
    exact.limits.check_tokens(prompts, SamplingParams(**params), max_model_len=100)
    if asked > 1:
        tight = Gated(max_tokens_per_request=asked - 1)
        with pytest.raises(RequestError, match=f"asks for {asked} tokens") as caught:
            tight.limits.check_tokens(prompts, SamplingParams(**params), max_model_len=100)
        assert caught.value.param == "max_tokens"
