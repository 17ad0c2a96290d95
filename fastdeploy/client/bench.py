"""`fastdeploy bench serve | latency | throughput`: how fast is it?

`serve` asks a running server, `latency` and `throughput` run the engine in this process. Names and
percentiles are those of FastDeploy's benchmark_serving:

    ttft   request sent -> first token             itl    between two events of a stream
    tpot   mean time of a token after the first    e2el   request sent -> last token
    s_*    the same as the server sees it (its own metrics; without the way there and the queue)
    s_decode   tokens/s after the first            input_len, s_input_len   cached, all of it
"""

from __future__ import annotations

import asyncio
import json
import math
import random
import re
import sys
import time
from collections.abc import Sequence
from contextlib import aclosing
from dataclasses import asdict, dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any

from ernie.settings import ConfigError, check_bounds, option
from fastdeploy.client.command import read
from fastdeploy.client.http import Client, ServerError
from fastdeploy.client.loads import (
    Lengths,
    Talk,
    Turn,
    file_talks,
    random_talks,
    shipped_text,
    text_talks,
)

USAGE = """usage: fastdeploy bench KIND ...

kinds:
  serve        a load on a running server: times to the first token, between tokens, to the end
  latency      one batch on the engine in this process: seconds from start to end
  throughput   many requests on the engine in this process: tokens a second
"""
DEFAULT_LENGTHS = {"random": (200, 1024), "text": (220, 195)}  # words, tokens
TICK_S = 0.01


@dataclass(frozen=True, kw_only=True, slots=True)
class ServeBench:
    """A load on a server."""

    base_url: str = option("http://127.0.0.1:8000", "Address of the server.")
    api_key: str | None = option(None, "Key; none: FD_API_KEY of the environment.")
    model: str | None = option(None, "Name in requests; none: the first that the server lists.")
    backend: str = option(
        "openai-chat", "Chat or plain completions.", choices=("openai-chat", "openai")
    )
    dataset_name: str = option(
        "random",
        "random: words without meaning; sharegpt: conversations of a file; text: passages of prose "
        "with the spread of lengths that conversations have.",
        choices=("random", "sharegpt", "text"),
    )
    dataset_path: str | None = option(
        None, "File of conversations, or of text; text without one: the manual of Python."
    )
    num_prompts: int = option(100, "Conversations to have.", least=1)
    num_turns: int = option(
        1, "Turns of a conversation at most; each brings all before it along.", least=1
    )
    random_input_len: int | None = option(None, "Words of a message, or their mean.")
    random_output_len: int | None = option(None, "Tokens of an answer, or their mean.")
    random_range_ratio: float = option(0.0, "random: lengths vary by this share below the given.")
    request_rate: float = option(math.inf, "Conversations started a second, at random intervals.")
    max_concurrency: int | None = option(None, "Conversations at the same time at most.")
    num_warmups: int = option(1, "Requests before the clock starts.")
    ignore_eos: bool = option(True, "Let every answer have its full length.")
    hyperparameter_path: str | None = option(None, "YAML file whose keys every request gets.")
    percentile_metrics: str = option("ttft,tpot,itl,e2el", "Times to give percentiles of.")
    metric_percentiles: str = option("80,95,99,99.9", "The percentiles.")
    seed: int = option(0, "Origin of what is drawn.")
    save_result: str | None = option(None, "JSON file for the result and every request.")

    def __post_init__(self) -> None:
        check_bounds(self)
        percentiles_of(self.metric_percentiles)
        if not self.request_rate > 0:
            raise ConfigError(f"request_rate={self.request_rate}; it takes more than 0, or inf")
        if unknown := set(self.metrics) - {"ttft", "tpot", "itl", "e2el"}:
            raise ConfigError(
                f"percentile_metrics has {sorted(unknown)[0]!r}; it takes ttft, tpot, itl, e2el"
            )

    @property
    def metrics(self) -> list[str]:
        return [name.strip() for name in self.percentile_metrics.split(",")]

    @property
    def percentiles(self) -> list[float]:
        return percentiles_of(self.metric_percentiles)

    def talks(self, count: int, seed: int) -> list[Talk]:
        """Raises ConfigError."""
        if self.dataset_name == "sharegpt":
            if self.dataset_path is None:
                raise ConfigError("dataset_name=sharegpt needs the file: give dataset_path")
            path = Path(self.dataset_path)
            return file_talks(path, count, self.num_turns, self.random_output_len, seed)
        input_len, output_len = DEFAULT_LENGTHS[self.dataset_name]
        lengths = Lengths(
            input=self.random_input_len or input_len,
            output=self.random_output_len or output_len,
            range_ratio=self.random_range_ratio,
        )
        if self.dataset_name == "random":
            return random_talks(count, self.num_turns, lengths, seed)
        text = shipped_text() if self.dataset_path is None else _text_of(Path(self.dataset_path))
        return text_talks(text, count, self.num_turns, lengths, seed)


def percentiles_of(text: str) -> list[float]:
    """Raises ConfigError for what is no list of them."""
    try:
        found = [float(p) for p in text.split(",")]
    except ValueError:
        found = [math.nan]
    if not all(0 <= p <= 100 for p in found):
        raise ConfigError(
            f"metric_percentiles={text!r}; it takes numbers from 0 to 100, separated by commas"
        )
    return found


@dataclass(slots=True)
class Timing:
    """One request as the client saw it; times in seconds."""

    start: float
    ttft: float = math.nan
    e2el: float = math.nan
    itl: list[float] = field(default_factory=list)
    num_prompt: int = 0
    num_cached: int = 0
    num_new: int = 0
    error: str | None = None

    @property
    def tpot(self) -> float:
        return (self.e2el - self.ttft) / (self.num_new - 1) if self.num_new > 1 else math.nan


class Load:
    """Talks on their way through a server."""

    def __init__(self, client: Client, bench: ServeBench, model: str) -> None:
        self.client, self.bench, self.model = client, bench, model
        self.extra = {"ignore_eos": True} if bench.ignore_eos else {}
        if bench.hyperparameter_path is not None:
            from ernie.settings import read_yaml

            self.extra |= read_yaml(bench.hyperparameter_path)
        self.timings: list[Timing] = []

    async def run(self, talks: Sequence[Talk]) -> None:
        """All of them, each started when it is due and there is room."""
        room = asyncio.Semaphore(self.bench.max_concurrency or len(talks))

        async def one(talk: Talk) -> None:
            async with room:
                await self.talk(talk)

        start = time.perf_counter()
        dues = arrivals(self.bench.request_rate, len(talks), self.bench.seed)
        async with asyncio.TaskGroup() as group:
            for talk, due in zip(talks, dues):
                await asyncio.sleep(max(0.0, start + due - time.perf_counter()))
                group.create_task(one(talk))

    async def talk(self, talk: Talk) -> None:
        """Turn by turn, until one fails."""
        history: list[dict[str, str]] = []
        for turn in talk:
            history.append({"role": "user", "content": turn.text})
            timing, text = await self.ask(history, turn)
            self.timings.append(timing)
            if timing.error is not None:
                return
            history.append({"role": "assistant", "content": text})

    async def ask(self, history: list[dict[str, str]], turn: Turn) -> tuple[Timing, str]:
        is_chat = self.bench.backend == "openai-chat"
        asked = {"messages": history} if is_chat else {"prompt": _as_text(history)}
        options = {"include_usage": True}
        body = {"model": self.model, "max_tokens": turn.num_new, "stream": True, **asked}
        body |= {"stream_options": options, **self.extra}
        path = "/v1/chat/completions" if is_chat else "/v1/completions"
        texts: list[str] = []
        timing = Timing(time.perf_counter())
        try:
            async with aclosing(self.client.stream(path, body)) as events:
                before = math.nan
                async for arrived, event in events:
                    if text := _text_in(event):
                        if math.isnan(before):
                            timing.ttft = arrived - timing.start
                        else:
                            timing.itl.append(arrived - before)
                        before = arrived
                        texts.append(text)
                    if usage := event.get("usage"):
                        _take_usage(timing, usage)
                timing.e2el = before - timing.start
        except ServerError as error:
            timing.error = f"{error.status}: {error}"
        return timing, "".join(texts)


def arrivals(rate: float, count: int, seed: int) -> list[float]:
    """Seconds after the start at which `count` callers come who know nothing of each other, `rate`
    of them a second: a Poisson process.
    """
    drawn = random.Random(seed)
    return list(accumulate((drawn.expovariate(rate) for _ in range(count - 1)), initial=0.0))


def _as_text(history: list[dict[str, str]]) -> str:
    return "\n".join(message["content"] for message in history)


def _text_in(event: dict[str, Any]) -> str:
    if not event.get("choices"):
        return ""
    choice = event["choices"][0]
    delta = choice.get("delta", choice)
    return (delta.get("reasoning_content") or "") + (delta.get("content", delta.get("text")) or "")


def _take_usage(timing: Timing, usage: dict[str, Any]) -> None:
    timing.num_prompt, timing.num_new = usage["prompt_tokens"], usage["completion_tokens"]
    timing.num_cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens", 0)


def _text_of(path: Path) -> str:
    try:
        return path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read as text: {error}") from None


# --- the client's own strain ---


class Strain:
    """How busy this process was: a client that is the bottleneck measures itself."""

    def __init__(self) -> None:
        self.lags: list[float] = []
        self.start, self.cpu = time.perf_counter(), time.process_time()

    async def watch(self) -> None:
        while True:
            due = time.perf_counter() + TICK_S
            await asyncio.sleep(TICK_S)
            self.lags.append(time.perf_counter() - due)

    def found(self) -> dict[str, float]:
        busy = (time.process_time() - self.cpu) / (time.perf_counter() - self.start)
        lags = sorted(self.lags) or [0.0]
        return {"client_busy": busy, "client_lag_p99_ms": 1000 * percentile(lags, 99)}


def strain_warning(found: dict[str, float]) -> str | None:
    busy, lag = found["client_busy"], found["client_lag_p99_ms"]
    if busy < 0.7 and lag < 20:
        return None
    return (
        f"the client was {busy:.0%} busy and up to {lag:.0f} ms late (99 %): times include its own "
        "delays, and the server may be faster; use fewer requests at once, or another machine"
    )


# --- figures ---


def percentile(ordered: Sequence[float], p: float) -> float:
    """Linear between the two nearest of the ordered values."""
    place = (len(ordered) - 1) * p / 100
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def summary(
    timings: Sequence[Timing], duration_s: float, metrics: list[str], percentiles: list[float]
) -> dict[str, Any]:
    """Figures of a run under the names of FastDeploy's result files; times in ms."""
    good = [t for t in timings if t.error is None]
    new, prompt = sum(t.num_new for t in good), sum(t.num_prompt for t in good)
    result: dict[str, Any] = {
        "duration": duration_s,
        "completed": len(good),
        "failed": len(timings) - len(good),
        "total_input_tokens": prompt,
        "total_output_tokens": new,
        "request_throughput": len(good) / duration_s,
        "output_throughput": new / duration_s,
        "total_token_throughput": (new + prompt) / duration_s,
    }
    for name in metrics:
        values = [x for t in good for x in (t.itl if name == "itl" else [getattr(t, name)])]
        result |= _spread(f"{name}_ms", [1000 * value for value in values], percentiles)
    result |= _spread("s_decode", [1 / t.tpot for t in good if t.tpot > 0], percentiles)
    for name, attribute in (
        ("input_len", "num_cached"),
        ("s_input_len", "num_prompt"),
        ("output_len", "num_new"),
    ):
        result |= _spread(name, [float(getattr(t, attribute)) for t in good], percentiles)
    return result


def _spread(name: str, values: list[float], percentiles: list[float]) -> dict[str, float]:
    """Nothing for no values; requests of one token have no time between tokens."""
    ordered = sorted(value for value in values if not math.isnan(value))
    if not ordered:
        return {}
    mean = sum(ordered) / len(ordered)
    spread = math.sqrt(sum((value - mean) ** 2 for value in ordered) / len(ordered))
    found = {f"mean_{name}": mean, f"median_{name}": percentile(ordered, 50), f"std_{name}": spread}
    return found | {f"p{p:g}_{name}": percentile(ordered, p) for p in percentiles}


SERVER_TIMES = {
    "s_queue": "request_queue_time_seconds",
    "s_ttft": "request_prefill_time_seconds",
    "s_itl": "time_per_output_token_seconds",
    "s_e2el": "request_inference_time_seconds",
}


async def server_sums(client: Client) -> dict[str, float]:
    """Sums and counts of the server's histograms; empty for a server without them."""
    try:
        text = (await client.get("/metrics")).decode()
    except ServerError:
        return {}
    pattern = r"^fastdeploy:(\w+_(?:sum|count))(?:{[^}]*})? (\S+)$"
    return {name: float(value) for name, value in re.findall(pattern, text, re.MULTILINE)}


def server_means(before: dict[str, float], after: dict[str, float]) -> dict[str, float]:
    """Means in ms of what the server measured in between."""
    means = {}
    for short, name in SERVER_TIMES.items():
        count = after.get(f"{name}_count", 0) - before.get(f"{name}_count", 0)
        if count > 0:
            spent = after[f"{name}_sum"] - before.get(f"{name}_sum", 0)
            means[f"mean_{short}_ms"] = 1000 * spent / count
    return means


# What the rows of the table are, for who reads one for the first time.
LEGEND = {
    "ttft": "time to first token: from the request to the first text of its answer",
    "tpot": "time per output token: of an answer after its first, on average",
    "itl": "inter-token latency: between two events of a stream with text",
    "e2el": "end-to-end latency: from the request to the last text of its answer",
    "s_decode": "tokens a second of an answer after its first",
    "input_len": "tokens of a prompt that were found in the cache",
    "s_input_len": "all tokens of a prompt",
    "output_len": "tokens of an answer",
    "s_queue": "mean wait for a place, as the server measured it",
    "s_ttft": "mean from that place to the first token, as the server measured it",
    "s_itl": "mean of a token after the first, as the server measured it",
    "s_e2el": "mean from that place to the last token, as the server measured it",
}
COLUMNS = "p99: 99 % of the values are at most this; median: half of them; std: how far they spread"


def table(result: dict[str, Any], metrics: list[str], percentiles: list[float]) -> str:
    """The figures for a reader, and what they are."""
    lines = [
        f"{result['completed']} requests in {result['duration']:.2f} s, {result['failed']} failed",
        f"{'requests a second':<28}{result['request_throughput']:>12.2f}",
        f"{'output tokens a second':<28}{result['output_throughput']:>12.1f}",
        f"{'all tokens a second':<28}{result['total_token_throughput']:>12.1f}",
        "",
    ]
    columns = ["mean", "median", "std", *(f"p{p:g}" for p in percentiles)]
    lines.append(" " * 16 + "".join(f"{column:>10}" for column in columns))
    names = [(f"{name} ms", f"{name}_ms") for name in metrics]
    names += [(n, n) for n in ("s_decode", "input_len", "s_input_len", "output_len")]
    for label, key in names:
        if f"mean_{key}" in result:
            values = "".join(f"{result[f'{column}_{key}']:>10.2f}" for column in columns)
            lines.append(f"{label:<16}{values}")
    for short in SERVER_TIMES:
        if f"mean_{short}_ms" in result:
            lines.append(f"{short + ' ms':<16}{result[f'mean_{short}_ms']:>10.2f}")
    shown = [name for name in LEGEND if {f"mean_{name}", f"mean_{name}_ms"} & result.keys()]
    if shown:
        lines += ["", COLUMNS, *(f"{name:<16}{LEGEND[name]}" for name in shown)]
    return "\n".join(lines) + "\n"


# --- the commands ---


async def measure(bench: ServeBench) -> dict[str, Any]:
    """One run of `bench serve`; its figures, and each request under `requests`.

    Raises ConfigError, and ServerError when the server cannot be asked at all.
    """
    talks = bench.talks(bench.num_prompts, bench.seed)
    client = Client(bench.base_url, bench.api_key)
    try:
        model = bench.model or await client.model()
        warmup = Load(client, bench, model)
        for talk in bench.talks(bench.num_warmups, bench.seed + 1):
            await warmup.talk(talk[:1])
        before = await server_sums(client)
        load, strain = Load(client, bench, model), Strain()
        watching = asyncio.create_task(strain.watch())
        start = time.perf_counter()
        await load.run(talks)
        duration_s = time.perf_counter() - start
        found = strain.found()
        watching.cancel()
        after = await server_sums(client)
    finally:
        await client.close()
    result = summary(load.timings, duration_s, bench.metrics, bench.percentiles)
    result |= server_means(before, after) | found
    result["errors"] = sorted({t.error for t in load.timings if t.error is not None})
    result["requests"] = [asdict(t) | {"start": t.start - start} for t in load.timings]
    return result


def serve(argv: Sequence[str]) -> int:
    (bench,) = read(argv, [ServeBench], "fastdeploy bench serve", __doc__.splitlines()[0])
    result = asyncio.run(measure(bench))
    sys.stdout.write(table(result, bench.metrics, bench.percentiles))
    for error in result["errors"][:5]:
        sys.stderr.write(f"failed: {error}\n")
    if warning := strain_warning(result):
        sys.stderr.write(f"warning: {warning}\n")
    if bench.save_result is not None:
        settings = {key: value for key, value in asdict(bench).items() if key != "api_key"}
        settings["request_rate"] = str(bench.request_rate)  # JSON has no infinity
        text = json.dumps({"settings": settings, **result}, indent=1, allow_nan=True)
        Path(bench.save_result).write_text(text.replace("NaN", "null") + "\n", "utf-8")
    return 1 if result["failed"] else 0


def main(argv: Sequence[str]) -> int:
    kind = argv[0] if argv else "--help"
    if kind == "serve":
        return serve(argv[1:])
    if kind in ("latency", "throughput"):
        from fastdeploy.client.offline import main as offline

        return offline(argv)
    asked = kind in ("--help", "-h", "help")
    (sys.stdout if asked else sys.stderr).write(USAGE)
    return 0 if asked else 2
