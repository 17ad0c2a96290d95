"""Spans of requests and texts, gathered in memory."""

from __future__ import annotations

import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

pytest.importorskip("opentelemetry.sdk", reason="needs the extra otel")

from helpers_gate import Gated
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from ernie.settings import ConfigError
from fastdeploy.config import ServerConfig
from fastdeploy.server import tracing

PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


@pytest.fixture
def memory(monkeypatch) -> InMemorySpanExporter:
    exporter = InMemorySpanExporter()
    monkeypatch.setattr(tracing, "exporter_of", lambda config: exporter)
    return exporter


def spans_of(gated: Gated, memory: InMemorySpanExporter) -> dict[str, object]:
    gated.observer.tracing.provider.force_flush()
    return {span.name: span for span in memory.get_finished_spans()}


def test_a_request_has_a_span_and_its_text_has_three_within(memory) -> None:
    gated = Gated(traces_enable=True, service_name="mine")
    headers = {"traceparent": PARENT, "x-request-id": "job-1"}
    assert gated.client.post("/v1/text", headers=headers).status_code == 200
    assert gated.client.get("/health").status_code == 200
    spans = spans_of(gated, memory)
    assert set(spans) == {"POST /v1/text", "queue", "prefill", "decode"}
    root = spans.pop("POST /v1/text")
    assert root.parent.span_id == 0xB7AD6B7169203331 and root.kind.name == "SERVER"
    assert root.context.trace_id == 0x0AF7651916CD43DD8448EB211C80319C
    assert root.resource.attributes["service.name"] == "mine"
    assert root.attributes["fastdeploy.request_id"] == "job-1"
    assert root.attributes["http.response.status_code"] == 200
    assert [event.name for event in root.events] == ["first_chunk", "last_chunk"]
    for name, seconds in (("queue", 1), ("prefill", 2), ("decode", 4)):
        span = spans[name]
        assert span.parent.span_id == root.context.span_id, name
        assert (span.end_time - span.start_time) / 1e9 == pytest.approx(seconds, abs=1e-4), name
    assert spans["queue"].end_time == spans["prefill"].start_time
    assert spans["prefill"].attributes["gen_ai.usage.input_tokens"] == 20
    assert spans["decode"].attributes["gen_ai.usage.output_tokens"] == 5


def test_a_parent_that_is_not_recorded_records_nothing(memory) -> None:
    gated = Gated(traces_enable=True)
    headers = {"traceparent": PARENT[:-2] + "00"}
    assert gated.client.post("/v1/text", headers=headers).status_code == 200
    assert spans_of(gated, memory) == {}


@pytest.mark.parametrize("parent", ["", "00-xyz", "00-" + "0" * 32 + "-" + "0" * 16 + "-01", "é"])
def test_a_traceparent_that_is_none_begins_a_new_trace(memory, parent: str) -> None:
    gated = Gated(traces_enable=True)
    gated.client.post("/v1/text", headers={"traceparent": parent.encode()})
    assert spans_of(gated, memory)["POST /v1/text"].parent is None


def test_failures_are_marked(memory) -> None:
    gated = Gated(traces_enable=True)
    gated.client.post("/v1/broken")
    gated.client.post("/nothing")
    spans = spans_of(gated, memory)
    assert spans["POST /v1/broken"].status.status_code.name == "ERROR"
    assert "secret" not in spans["POST /v1/broken"].to_json()
    assert spans["POST"].attributes["http.response.status_code"] == 404
    assert spans["POST"].status.status_code.name == "UNSET"


def test_without_traces_the_library_is_not_imported() -> None:
    code = "import sys, fastdeploy.server.gate; sys.exit('opentelemetry.sdk' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_spans_reach_a_collector() -> None:
    seen = []

    class Collector(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            seen.append((self.path, self.headers["x-a"], self.headers["x-b"], body))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Collector) as collector:
        threading.Thread(target=collector.serve_forever, daemon=True).start()
        gated = Gated(
            traces_enable=True,
            traces_exporter="otlp",
            exporter_otlp_endpoint=f"http://127.0.0.1:{collector.server_port}/v1/traces",
            exporter_otlp_headers="x-a=1, x-b=2=3",
        )
        gated.client.post("/v1/text")
        gated.observer.tracing.provider.shutdown()
        collector.shutdown()
    ((path, a, b, body),) = seen
    assert (path, a, b) == ("/v1/traces", "1", "2=3") and b"prefill" in body


def test_what_is_wrong_with_the_settings_is_said_at_the_start(monkeypatch) -> None:
    settings = {"traces_enable": True, "traces_exporter": "otlp"}
    settings |= {"exporter_otlp_endpoint": "http://127.0.0.1:9", "exporter_otlp_headers": "x"}
    with pytest.raises(ConfigError, match="NAME=VALUE"):
        tracing.Tracing.of(ServerConfig(**settings))
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace", None)
    with pytest.raises(ConfigError, match=r"pip install 'ernie-open\[otel\]'"):
        tracing.Tracing.of(ServerConfig(traces_enable=True))
