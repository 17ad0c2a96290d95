"""OpenTelemetry spans, if they are switched on: the HTTP request, and queue, prefill and decode of
each text within it.

The library (extra `otel`) is imported only then. A client's `traceparent` is continued. Spans hold
sizes, times and the request's id, never what was said.
"""

from __future__ import annotations

import time
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from starlette.types import Scope

from ernie.settings import ConfigError
from fastdeploy.config import ServerConfig

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SpanExporter

    from fastdeploy.server.engine import Ended

SPANS_AT_ONCE = 64
DELAY_MS = 500


class Tracing:
    """Only POST requests have spans: what is asked every second says nothing."""

    def __init__(self, provider: TracerProvider) -> None:
        from opentelemetry import trace
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        self.provider, self.trace = provider, trace
        self.tracer = provider.get_tracer("fastdeploy")
        self.propagator = TraceContextTextMapPropagator()

    @classmethod
    def of(cls, config: ServerConfig) -> Tracing | None:
        """As the settings say; None where traces are off. Raises ConfigError."""
        if not config.traces_enable:
            return None
        try:
            from opentelemetry.sdk.resources import Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor

            exporter = exporter_of(config)
        except ModuleNotFoundError as error:
            raise ConfigError(
                f"traces_enable needs {error.name}; pip install 'ernie-open[otel]'"
            ) from None
        provider = TracerProvider(resource=Resource({"service.name": config.service_name}))
        provider.add_span_processor(
            BatchSpanProcessor(
                exporter, schedule_delay_millis=DELAY_MS, max_export_batch_size=SPANS_AT_ONCE
            )
        )
        return cls(provider)

    def start(self, scope: Scope, request_id: str) -> Any:
        """The span of a request, None where it has none."""
        if scope["method"] != "POST":
            return None
        names = ("traceparent", "tracestate")
        headers = {k.decode("latin1"): v.decode("latin1") for k, v in scope["headers"]}
        parent = self.propagator.extract({n: headers[n] for n in names if n in headers})
        return self.tracer.start_span(
            "POST",
            context=parent,
            kind=self.trace.SpanKind.SERVER,
            attributes={"http.request.method": "POST", "fastdeploy.request_id": request_id},
        )

    def sent(self, span: Any, *, first: bool, last: bool) -> None:
        """A piece of the answer has left. The names of the events are FastDeploy's."""
        if span is None:
            return
        if first:
            span.add_event("first_chunk")
        if last:
            span.add_event("last_chunk")

    def end(self, span: Any, scope: Scope, status: int) -> None:
        if span is None:
            return
        route = getattr(scope.get("route"), "path", None)
        if route is not None:
            span.update_name(f"POST {route}")
            span.set_attribute("http.route", route)
        span.set_attribute("http.response.status_code", status)
        if status >= 500:
            span.set_status(self.trace.StatusCode.ERROR)
        span.end()

    def end_text(self, ended: Ended) -> None:
        """The spans of a text, made when it has ended from the times it went through."""
        span = ended.origin.span if ended.origin else None
        if span is None:
            return
        context = self.trace.set_span_in_context(span)
        epoch_ns = time.time_ns() - time.monotonic_ns()
        times = ended.timing
        moments = (
            ("queue", times.arrival_time),
            ("prefill", times.inference_start_time),
            ("decode", times.first_token_time),
            ("", times.finished_time),
        )
        attributes: dict[str, dict[str, Any]] = {
            "queue": {},
            "prefill": {
                "gen_ai.usage.input_tokens": ended.num_prompt,
                "fastdeploy.cached_tokens": ended.num_cached,
            },
            "decode": {
                "gen_ai.usage.output_tokens": ended.num_output,
                "gen_ai.response.finish_reasons": [ended.finish_reason],
            },
        }
        for (name, start), (_, end) in pairwise(moments):
            if start is not None and end is not None:
                one = self.tracer.start_span(
                    name,
                    context=context,
                    start_time=epoch_ns + int(start * 1e9),
                    attributes=attributes[name],
                )
                one.end(epoch_ns + int(end * 1e9))


def exporter_of(config: ServerConfig) -> SpanExporter:
    """Raises ModuleNotFoundError, and ConfigError for headers that are none."""
    if config.traces_exporter == "console":
        from opentelemetry.sdk.trace.export import ConsoleSpanExporter

        return ConsoleSpanExporter()
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter

    headers = {}
    for entry in filter(None, (config.exporter_otlp_headers or "").split(",")):
        name, equals, value = entry.partition("=")
        if not equals or not name.strip():
            raise ConfigError("exporter_otlp_headers takes NAME=VALUE, separated by commas")
        headers[name.strip()] = value.strip()
    return OTLPSpanExporter(endpoint=config.exporter_otlp_endpoint, headers=headers)
