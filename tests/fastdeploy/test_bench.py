"""The load generator: its figures against formulas and against a server with known times."""

from __future__ import annotations

import asyncio
import json
import math
import random
import statistics
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))

from helpers_page import Upstream, running
from helpers_server import Server

from ernie.settings import ConfigError
from fastdeploy import cli
from fastdeploy.client import bench as benches
from fastdeploy.client.bench import (
    Load,
    ServeBench,
    Timing,
    arrivals,
    percentile,
    strain_warning,
    summary,
)
from fastdeploy.client.http import Client, ServerError
from fastdeploy.client.loads import Lengths, file_talks, num_words, random_talks, text_talks


def test_percentiles_are_numpys() -> None:
    drawn = random.Random(0)
    for count in (1, 2, 3, 10, 101):
        values = sorted(drawn.gauss(0, 1) for _ in range(count))
        for p in (0, 12.5, 50, 80, 99, 99.99, 100):
            assert math.isclose(percentile(values, p), float(np.percentile(values, p)))


def test_figures_follow_their_definitions() -> None:
    timings = [
        Timing(0.0, ttft=0.1, e2el=1.1, itl=[0.5, 0.5], num_prompt=7, num_cached=4, num_new=3),
        Timing(0.0, ttft=0.3, e2el=0.3, num_prompt=5, num_new=1),
        Timing(0.0, error="503: down"),
    ]
    found = summary(timings, 2.0, ["ttft", "tpot", "itl", "e2el"], [50.0])
    expected = {
        "completed": 2, "failed": 1, "total_input_tokens": 12, "total_output_tokens": 4,
        "request_throughput": 1, "output_throughput": 2, "total_token_throughput": 8,
        "mean_ttft_ms": 200, "std_ttft_ms": 100, "p50_ttft_ms": 200, "mean_tpot_ms": 500,
        "mean_itl_ms": 500, "mean_e2el_ms": 700, "mean_s_decode": 2, "mean_input_len": 2,
        "mean_s_input_len": 6, "mean_output_len": 2,
    }  # fmt: skip
    assert {name: round(found[name], 9) for name in expected} == expected


def test_tokens_that_came_all_at_once_have_no_rate() -> None:
    """An answer and its end in one event, or two events in one piece of the network."""
    found = summary([Timing(0.0, ttft=0.3, e2el=0.3, num_new=2)], 1.0, ["tpot"], [50.0])
    assert found["mean_tpot_ms"] == 0 and "mean_s_decode" not in found


def test_times_of_a_server_with_known_ones_are_found() -> None:
    upstream = Upstream()
    upstream.script = [0.2, {"content": "a"}, 0.1, {"content": "b"}, 0.1, {"content": "c"}]

    async def run() -> Timing:
        client = Client(url)
        load = Load(client, ServeBench(num_prompts=1), "m")
        await load.run(random_talks(1, 1, Lengths(input=5, output=9), seed=0))
        await client.close()
        return load.timings[0]

    with running(upstream.app()) as url:
        timing = asyncio.run(run())
    assert timing.error is None
    assert (
        timing.ttft >= 0.2
        and len(timing.itl) == 2
        and timing.e2el >= 0.4
        and min(timing.itl) > 0.05
    )
    assert math.isclose(timing.e2el, timing.ttft + sum(timing.itl))
    body = upstream.bodies[0]
    assert (body["max_tokens"], body["ignore_eos"], body["stream"]) == (9, True, True)
    assert num_words(body["messages"][0]["content"]) == 5


def test_turns_bring_their_conversation_along() -> None:
    upstream = Upstream()
    upstream.script = [{"content": "An "}, {"content": "answer."}]

    async def run() -> None:
        client = Client(url)
        load = Load(client, ServeBench(num_turns=3, max_concurrency=1), "m")
        await load.run(random_talks(1, 3, Lengths(input=4, output=4), seed=0))
        await client.close()

    with running(upstream.app()) as url:
        asyncio.run(run())
    histories = [body["messages"] for body in upstream.bodies]
    assert [len(history) for history in histories] == [1, 3, 5]
    assert histories[2][:3] == histories[1]
    assert histories[1][1] == {"role": "assistant", "content": "An answer."}


def test_arrivals_are_a_poisson_process_of_the_rate() -> None:
    times = arrivals(4.0, 20_001, seed=0)
    gaps = np.diff(times)
    assert times[0] == 0 and math.isclose(gaps.mean(), 0.25, rel_tol=0.03), gaps.mean()
    assert math.isclose(gaps.std(), 0.25, rel_tol=0.03), gaps.std()
    assert math.isclose((gaps > 0.25).mean(), math.exp(-1), rel_tol=0.03)
    assert arrivals(math.inf, 3, seed=0) == [0, 0, 0]


def test_texts_have_the_spread_of_conversations() -> None:
    text = " ".join(f"word{i}" for i in range(20_000))
    talks = text_talks(text, 2000, 1, Lengths(input=200, output=150), seed=0)
    lengths = [num_words(talk[0].text) for talk in talks]
    mean = statistics.mean(lengths)
    assert 180 < mean < 220, f"mean {mean}"
    assert max(lengths) > 4 * statistics.median(lengths)
    assert all(talk[0].text in text for talk in talks)
    assert talks == text_talks(text, 2000, 1, Lengths(input=200, output=150), seed=0)
    assert num_words("今天 is fine.") == 4


def test_files_of_three_forms_are_read(tmp_path: Path) -> None:
    sharegpt = [{"from": "human", "value": "Q1"}, {"from": "gpt", "value": "one two three"}]
    sharegpt += [{"from": "human", "value": "Q2"}, {"from": "gpt", "value": "four"}]
    openai = [{"role": "system", "content": "S"}, {"role": "user", "content": "Q3"}]
    openai += [{"role": "assistant", "content": "five six"}]
    entries = [
        {"conversations": sharegpt},
        {"messages": openai},
        {"instruction": "Q4", "input": "more", "output": "seven"},
        {"conversations": []},
    ]
    path = tmp_path / "talks.json"
    path.write_text(json.dumps(entries))
    talks = file_talks(path, 4, 2, None, seed=0)
    asked = sorted([(turn.text, turn.num_new) for turn in talk] for talk in talks[:3])
    assert asked == [[("Q1", 3), ("Q2", 1)], [("Q3", 2)], [("Q4\nmore", 1)]]
    assert talks[3] == talks[0]
    path.write_text("[]")
    with pytest.raises(ConfigError, match="has no conversation"):
        file_talks(path, 1, 1, None, seed=0)


def test_a_busy_client_says_so() -> None:
    assert strain_warning({"client_busy": 0.1, "client_lag_p99_ms": 1.0}) is None
    assert "95% busy" in str(strain_warning({"client_busy": 0.95, "client_lag_p99_ms": 1.0}))
    assert "50 ms late" in str(strain_warning({"client_busy": 0.1, "client_lag_p99_ms": 50.0}))


def test_a_run_on_the_real_server(server: Server, tmp_path: Path, capsys) -> None:
    saved = tmp_path / "result.json"
    flags = ["--base-url", server.url, "--num-prompts", "12", "--max-concurrency", "4"]
    flags += ["--random-input-len", "8", "--random-output-len", "10", "--num-turns", "2"]
    assert cli.main(["bench", "serve", *flags, "--save-result", str(saved)]) == 0
    found = json.loads(saved.read_text())
    assert (found["completed"], found["failed"], found["total_output_tokens"]) == (24, 0, 240)
    assert found["settings"]["random_output_len"] == 10
    assert found["p99_ttft_ms"] >= found["median_ttft_ms"] > 0
    assert found["mean_s_ttft_ms"] < found["mean_ttft_ms"]
    assert found["mean_s_e2el_ms"] < found["mean_e2el_ms"] * 1.05
    assert found["mean_input_len"] > 0, "second turns hit the prefix cache"
    shown = capsys.readouterr().out
    assert "ttft ms" in shown
    rows, _, legend = shown.partition("\np99: ")
    explained = {line.split()[0] for line in legend.splitlines()[1:]}
    assert explained == {"ttft", "tpot", "itl", "e2el", "s_decode"} | {
        line.split()[0] for line in rows.splitlines() if line.startswith(("s_", "in", "output_"))
    }


def test_failures_are_counted_and_named(server: Server, capsys) -> None:
    flags = ["--base-url", server.url, "--num-prompts", "3", "--random-input-len", "900"]
    assert cli.main(["bench", "serve", *flags, "--num-warmups", "0"]) == 1
    said = capsys.readouterr()
    assert "0 requests" in said.out and "3 failed" in said.out and "failed: 400" in said.err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--dataset-name", "sharegpt"], "needs the file"),
        (["--request-rate", "0"], "request_rate=0.0"),
        (["--num-prompts", "0"], "num_prompts=0"),
        (["--percentile-metrics", "ttft,foo"], "'foo'"),
        (["--metric-percentiles", "50,p99"], "metric_percentiles='50,p99'"),
        (["--metric-percentiles", "101"], "from 0 to 100"),
        (["--metric-percentiles", "nan"], "from 0 to 100"),
        (["--base-url", "localhost:8000"], "is no address"),
        (["--base-url", "http://127.0.0.1:1"], "no server answers"),
        (["--random-range-ratio", "1"], "random_range_ratio=1.0"),
    ],
)
def test_what_cannot_be_run_is_said_in_a_sentence(capsys, flags: list[str], message: str) -> None:
    assert cli.main(["bench", "serve", *flags]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1, error


@pytest.mark.parametrize("kind", ["latency", "throughput"])
def test_the_engine_alone_is_timed(folder: Path, tmp_path: Path, kind: str) -> None:
    output = tmp_path / "out.json"
    flags = ["--model", str(folder), "--dtype", "float32", "--max-model-len", "64"]
    flags += ["--input-len", "8", "--output-len", "4", "--output-json", str(output)]
    flags += ["--num-iters", "3"] if kind == "latency" else ["--num-prompts", "6"]
    assert cli.main(["bench", kind, *flags]) == 0
    found = json.loads(output.read_text())
    if kind == "latency":
        assert 0 < found["p10_latency_s"] <= found["p90_latency_s"]
    else:
        ratio = found["tokens_per_second"] / found["output_tokens_per_second"]
        assert math.isclose(ratio, (8 + 4) / 4)


def test_connections_are_kept_and_stale_ones_replaced() -> None:
    upstream = Upstream()

    async def ask(client: Client) -> list[Any]:
        return [event async for event in client.stream("/v1/chat/completions", {"a": "é"})]

    async def run() -> None:
        client = Client(url + "/v1/")
        await ask(client)
        (kept,) = client.idle
        await ask(client)
        assert client.idle == [kept], "the connection was not used again"
        kept.writer.close()
        await kept.writer.wait_closed()
        assert len(await ask(client)) == 2
        upstream.refusal = (429, "busy")
        with pytest.raises(ServerError, match="busy") as caught:
            await ask(client)
        assert (caught.value.status, caught.value.retry_after_s) == (429, 3.0)
        upstream.refusal, upstream.script = None, [{"content": "x"}, "break"]
        with pytest.raises(ServerError, match="in the middle"):
            await ask(client)
        await client.close()

    with running(upstream.app()) as url:
        asyncio.run(run())
    assert upstream.bodies[0] == {"a": "é"}


def test_bench_without_a_kind_shows_the_kinds(capsys) -> None:
    assert benches.main([]) == 0 and "throughput" in capsys.readouterr().out
    assert benches.main(["nothing"]) == 2 and "throughput" in capsys.readouterr().err
