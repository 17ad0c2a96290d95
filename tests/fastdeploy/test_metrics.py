"""What /metrics and the log say, and what they never say."""

from __future__ import annotations

import json
import logging
import sys

import pytest
from helpers_gate import ORIGINAL, Gated, make_ended, make_stats
from prometheus_client.parser import text_string_to_metric_families

from fastdeploy.metrics import Metrics
from fastdeploy.server.log import ORIGIN, JsonLines, Origin, TextLines, escaped


def samples(metrics: Metrics) -> dict[tuple, float]:
    """Values by name and sorted label values."""
    families = text_string_to_metric_families(metrics.text().decode())
    return {(s.name, *sorted(s.labels.values())): s.value for f in families for s in f.samples}


def test_a_text_that_ended_is_in_every_histogram() -> None:
    metrics = Metrics(ORIGINAL)
    metrics.end(make_ended())
    metrics.end(make_ended(num_cached=0, num_output=1, max_tokens=None))
    values = samples(metrics)
    for name, total, count in (
        ("time_to_first_token_seconds", 6, 2),
        ("time_per_output_token_seconds", 1, 1),
        ("e2e_request_latency_seconds", 14, 2),
        ("request_inference_time_seconds", 12, 2),
        ("request_queue_time_seconds", 2, 2),
        ("request_prefill_time_seconds", 4, 2),
        ("request_decode_time_seconds", 8, 2),
        ("request_prompt_tokens", 40, 2),
        ("request_generation_tokens", 6, 2),
        ("request_token_ratio", 0.3, 2),
        ("request_params_max_tokens", 9, 1),
    ):
        assert values["fastdeploy:" + name + "_sum",] == pytest.approx(total), name
        assert values["fastdeploy:" + name + "_count",] == count, name
    assert values["fastdeploy:request_success_total", "stop"] == 2
    assert values["fastdeploy:hit_req_rate",] == 0.5


def test_the_engines_figures_are_read_when_asked_for() -> None:
    metrics = Metrics(ORIGINAL)
    figures = {"num_blocks": 10, "num_free_blocks": 4, "num_running": 3, "num_waiting": 2}
    now = make_stats(**figures, num_prompt_tokens=100, num_hit_tokens=25, num_preemptions=7)
    metrics.watch(lambda: now)
    values = samples(metrics)
    for name, expected in {
        "num_requests_running": 3,
        "num_requests_waiting": 2,
        "num_requests_enqueued": 5,
        "available_batch_size": ORIGINAL.max_num_seqs - 3,
        "gpu_cache_usage_perc": 0.6,
        "available_gpu_resource": 0.4,
        "hit_token_rate": 0.25,
        "request_preempted_total": 7,
    }.items():
        assert values["fastdeploy:" + name,] == pytest.approx(expected), name
    assert "fastdeploy:mm_cache_hits_total" not in {name for name, *_ in values}
    reading = Metrics(ORIGINAL, has_vision=True)
    figures = {"num_picture_hits": 5, "num_pictures_computed": 2, "num_picture_bytes": 4096}
    reading.watch(lambda: make_stats(**figures))
    values = samples(reading)
    assert values["fastdeploy:mm_cache_queries_total",] == 7
    assert values["fastdeploy:mm_cache_hits_total",] == 5
    assert values["fastdeploy:mm_cache_bytes",] == 4096
    nothing = Metrics(ORIGINAL)
    nothing.watch(make_stats)  # before the engine has said anything
    assert samples(nothing)["fastdeploy:gpu_cache_usage_perc",] == 0


def test_http_requests_are_counted_by_route_and_never_by_path() -> None:
    gated = Gated(api_key=["k"])
    key = {"authorization": "Bearer k"}
    for number in range(50):
        gated.client.get(f"/v1/echo/{number}", headers=key)
        gated.client.get(f"/missing/{number}", headers=key)
        gated.client.get(f"/v1/echo/{number}")
        gated.client.request(f"BREW{number}", "/v1/echo/x", headers=key)
    assert gated.client.post("/v1/broken", headers=key).status_code == 500
    values = samples(gated.metrics)
    counts = {k[1:]: n for k, n in values.items() if k[0] == "http_requests_total"}
    expected = {
        ("GET", "/v1/echo/{name}", "200"): 50,
        ("GET", "none", "404"): 50,
        ("GET", "none", "401"): 50,
        ("OTHER", "/v1/echo/{name}", "405"): 50,
        ("POST", "/v1/broken", "500"): 1,
    }
    assert counts == {tuple(sorted(labels)): n for labels, n in expected.items()}
    assert values["http_request_duration_seconds_count", "/v1/echo/{name}", "GET"] == 50
    assert len(values) < 500


HOSTILE = "a\nINFO forged\r\x1b[2Jb\u202egnp.exe\u2028\x00\ud800 fine: é 你好"


def record(message: str, *args: object, exc_info=None, **extra: object) -> logging.LogRecord:
    made = logging.LogRecord("fastdeploy", logging.WARNING, "", 0, message, args, exc_info)
    made.__dict__.update(extra)
    return made


def test_what_clients_chose_cannot_end_a_line_or_steer_a_terminal() -> None:
    line = TextLines().format(record("a name: %s", HOSTILE))
    assert line.isprintable(), line
    assert "\\x1b[2J" in line and "\\u202e" in line and "\\ud800" in line and "é 你好" in line
    assert escaped("plain 你好") == "plain 你好"
    entry = json.loads(JsonLines().format(record("a name: %s", HOSTILE)))
    assert entry["message"] == f"a name: {HOSTILE}" and entry["level"] == "warning"


def test_a_traceback_stays_below_its_line() -> None:
    try:
        raise ArithmeticError(HOSTILE)
    except ArithmeticError:
        failed = record("it failed", exc_info=sys.exc_info())
    first, *rest = TextLines().format(failed).split("\n")
    assert first.endswith("W it failed") and rest
    assert all(line.startswith("  | ") and line.isprintable() for line in rest), rest
    assert "ArithmeticError" in json.loads(JsonLines().format(failed))["exception"]


def test_a_line_names_the_request_it_is_about() -> None:
    token = ORIGIN.set(Origin("job-1"))
    try:
        assert "W [job-1] hello" in TextLines().format(record("hello"))
        assert json.loads(JsonLines().format(record("x")))["request_id"] == "job-1"
        other = record("x", origin=Origin("job-2"))
        assert json.loads(JsonLines().format(other))["request_id"] == "job-2"
    finally:
        ORIGIN.reset(token)
    assert "request_id" not in json.loads(JsonLines().format(record("x")))


@pytest.mark.parametrize("on", [True, False])
def test_lines_for_requests_are_written_only_if_asked_for(caplog, on: bool) -> None:
    gated = Gated(enable_log_requests=on, access_log=on)
    with caplog.at_level(logging.DEBUG, "fastdeploy"):
        gated.client.post("/v1/text?secret=1", headers={"x-request-id": "job-3"})
    lines = [TextLines().format(one) for one in caplog.records]
    if not on:
        assert lines == []
        return
    text, http = lines
    assert text.endswith(
        "I [job-3] 20 prompt tokens (16 cached) | 5 generated | stop | "
        "started 1.000 s, first token 3.000 s, ended 7.000 s"
    )
    assert "POST /v1/text 200" in http and "secret" not in http
