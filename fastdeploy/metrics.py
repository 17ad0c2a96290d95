"""What Prometheus reads at /metrics, under FastDeploy's names.

Figures of the engine are read when somebody asks (`EngineFigures`); what happens to a request is
recorded when it ends. No metric has a label that a client could choose. FastDeploy's figures of
caches outside of the GPU, of requests that are preempted at the moment and of transfers between
machines have no counterpart here and are left out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from fastdeploy.config import EngineConfig
from fastdeploy.outputs import Stats

if TYPE_CHECKING:
    from fastdeploy.server.engine import Ended

SECONDS = (0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 60, 120, 300, 900)
TOKENS = (1, 4, 16, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768, 65536, 131072)
RATIOS = (0.05, 0.1, 0.25, 0.5, 0.75, 1, 1.5, 2, 5, 10, 50)

_HISTOGRAMS = {
    "time_to_first_token_seconds": ("From arrival to the first token.", SECONDS),
    "time_per_output_token_seconds": ("Mean time of a token after the first.", SECONDS),
    "e2e_request_latency_seconds": ("From arrival to the end.", SECONDS),
    "request_inference_time_seconds": ("From admission to the end.", SECONDS),
    "request_queue_time_seconds": ("From arrival to admission.", SECONDS),
    "request_prefill_time_seconds": ("From admission to the first token.", SECONDS),
    "request_decode_time_seconds": ("From the first token to the end.", SECONDS),
    "request_prompt_tokens": ("Tokens of the prompt.", TOKENS),
    "request_generation_tokens": ("Tokens of the answer.", TOKENS),
    "request_params_max_tokens": ("max_tokens of requests that set it.", TOKENS),
    "request_token_ratio": ("Tokens of the answer for each one of the prompt.", RATIOS),
}


class EngineFigures(Collector):
    def __init__(
        self, stats: Callable[[], Stats], config: EngineConfig, *, has_vision: bool
    ) -> None:
        self.stats, self.config, self.has_vision = stats, config, has_vision

    def collect(self) -> Iterator[Metric]:
        s, most = self.stats(), self.config.max_num_seqs
        in_use = s.num_blocks - s.num_free_blocks
        blocks = max(s.num_blocks, 1)
        in_engine = s.num_running + s.num_waiting
        hits = s.num_hit_tokens / max(s.num_prompt_tokens, 1)
        for name, text, value in (
            ("num_requests_running", "Texts that are worked on.", s.num_running),
            ("num_requests_waiting", "Texts in the queue.", s.num_waiting),
            ("num_requests_enqueued", "Texts that run or wait.", in_engine),
            ("batch_size", "Texts of the step.", s.num_running),
            ("max_batch_size", "Texts of a step at most.", most),
            ("available_batch_size", "Texts that could join.", most - s.num_running),
            ("max_gpu_block_num", "Blocks of the cache.", s.num_blocks),
            ("free_gpu_block_num", "Blocks that nobody uses.", s.num_free_blocks),
            ("available_gpu_block_num", "Blocks that can be taken.", s.num_free_blocks),
            ("available_gpu_resource", "Share of blocks nobody uses.", s.num_free_blocks / blocks),
            ("gpu_cache_usage_perc", "Share of blocks in use, 0 to 1.", in_use / blocks),
            ("prefix_cache_token_num", "Prompt tokens found in the cache.", s.num_hit_tokens),
            ("prefix_gpu_cache_token_num", "As prefix_cache_token_num.", s.num_hit_tokens),
            ("hit_token_rate", "Share of prompt tokens found in the cache.", hits),
            ("gpu_hit_token_rate", "As hit_token_rate: there is one cache.", hits),
        ):
            yield GaugeMetricFamily(f"fastdeploy:{name}", text, value)
        if self.config.speculative_config is not None:
            yield from _speculation(s)
        if self.has_vision:
            yield from _pictures(s)
        for name, text, value in (
            ("request_preempted", "Preemptions.", s.num_preemptions),
            ("prompt_tokens", "Tokens of admitted prompts.", s.num_prompt_tokens),
            ("generation_tokens", "Tokens generated.", s.num_generated_tokens),
            ("guided_unfinished", "Texts cut before their form ended.", s.num_unfinished_forms),
        ):
            yield CounterMetricFamily(f"fastdeploy:{name}", text, value)


def _speculation(s: Stats) -> Iterator[Metric]:
    rate = s.num_accepted_tokens / max(s.num_draft_tokens, 1)
    # A step that verifies k drafts of a text gives it k + 1 tokens at most.
    most = s.num_draft_tokens + s.num_drafts
    efficiency = (s.num_accepted_tokens + s.num_drafts) / max(most, 1)
    for name, text, value in (
        ("draft_acceptance_rate", "Share of draft tokens that were accepted.", rate),
        (
            "efficiency",
            "Tokens gained in steps with drafts, as a share of the most possible.",
            efficiency,
        ),
    ):
        yield GaugeMetricFamily(f"fastdeploy:spec_decode_{name}", text, value)
    for name, text, value in (
        ("num_draft_tokens", "Draft tokens that were verified.", s.num_draft_tokens),
        ("num_accepted_tokens", "Draft tokens that were accepted.", s.num_accepted_tokens),
        ("num_emitted_tokens", "Tokens generated, drafted or not.", s.num_generated_tokens),
    ):
        yield CounterMetricFamily(f"fastdeploy:spec_decode_{name}", text, value)


def _pictures(s: Stats) -> Iterator[Metric]:
    """Of the cache of what vision tower and resampler made, under vLLM's names."""
    queries = s.num_picture_hits + s.num_pictures_computed
    yield GaugeMetricFamily(
        "fastdeploy:mm_cache_bytes", "Bytes of the pictures kept in memory.", s.num_picture_bytes
    )
    for name, text, value in (
        ("queries", "Pictures of prompts that had to be known to the model.", queries),
        (
            "hits",
            "Pictures of prompts that were found in the memory for pictures.",
            s.num_picture_hits,
        ),
    ):
        yield CounterMetricFamily(f"fastdeploy:mm_cache_{name}", text, value)


class Metrics:
    """The registry of one server: its own, so that two servers in a process do not meet.

    `has_vision`: its model reads pictures.
    """

    def __init__(self, config: EngineConfig, *, has_vision: bool = False) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "fastdeploy:requests_number", "Requests received.", registry=self.registry
        )
        self.stream_divergence = Counter(
            "fastdeploy:stream_divergence",
            "Streamed choices that say something else than their text read once more.",
            registry=self.registry,
        )
        self.successes = Counter(
            "fastdeploy:request_success", "Texts that ended.", ["reason"], registry=self.registry
        )
        self.hit_rate = Gauge(
            "fastdeploy:hit_req_rate",
            "Share of texts whose prompt was found in the cache, in part or whole.",
            registry=self.registry,
        )
        self.num_ended = self.num_hits = 0
        self.http_requests = Counter(
            "http_requests",
            "HTTP requests answered, 499 for those whose client went.",
            ["method", "handler", "status"],
            registry=self.registry,
        )
        self.http_seconds = Histogram(
            "http_request_duration_seconds",
            "From the request's headers to the end of its answer.",
            ["method", "handler"],
            buckets=SECONDS,
            registry=self.registry,
        )
        self.histograms = {
            name: Histogram(f"fastdeploy:{name}", text, buckets=buckets, registry=self.registry)
            for name, (text, buckets) in _HISTOGRAMS.items()
        }
        facts = {
            "block_size": str(config.block_size),
            "max_model_len": str(config.max_model_len),
            "enable_prefix_caching": str(config.enable_prefix_caching),
        }
        Gauge(
            "fastdeploy:cache_config_info", "Settings.", list(facts), registry=self.registry
        ).labels(**facts).set(1)
        self.config, self.has_vision = config, has_vision

    def watch(self, stats: Callable[[], Stats]) -> None:
        """Read the engine's figures through `stats` from now on."""
        figures = EngineFigures(stats, self.config, has_vision=self.has_vision)
        self.registry.register(figures)

    def text(self) -> bytes:
        return generate_latest(self.registry)

    def http(self, method: str, handler: str, status: int, seconds: float) -> None:
        """Record an HTTP request; `handler` is the pattern of its route, never its path."""
        self.http_requests.labels(method, handler, str(status)).inc()
        self.http_seconds.labels(method, handler).observe(seconds)

    def end(self, ended: Ended) -> None:
        """Record a text that has ended; one that was aborted early has no timings."""
        timing = ended.timing
        self.successes.labels(reason=ended.finish_reason).inc()
        self.num_ended += 1
        self.num_hits += ended.num_cached > 0
        self.hit_rate.set(self.num_hits / self.num_ended)
        if timing.first_token_time is None and ended.finish_reason == "abort":
            return
        arrival, end = timing.arrival_time, timing.finished_time
        started, first = timing.inference_start_time, timing.first_token_time
        assert end is not None and started is not None and first is not None, "ended, not begun"
        values = {
            "time_to_first_token_seconds": first - arrival,
            "e2e_request_latency_seconds": end - arrival,
            "request_inference_time_seconds": end - started,
            "request_queue_time_seconds": started - arrival,
            "request_prefill_time_seconds": first - started,
            "request_decode_time_seconds": end - first,
            "request_prompt_tokens": ended.num_prompt,
            "request_generation_tokens": ended.num_output,
            "request_token_ratio": ended.num_output / ended.num_prompt,
        }
        if ended.num_output > 1:
            values["time_per_output_token_seconds"] = (end - first) / (ended.num_output - 1)
        if ended.max_tokens is not None:
            values["request_params_max_tokens"] = ended.max_tokens
        for name, value in values.items():
            self.histograms[name].observe(value)
