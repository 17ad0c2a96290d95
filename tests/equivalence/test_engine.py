"""At temperature 0 the engine must give the plain generator's tokens, whatever its settings.

One table of settings, and one test that runs every row on a dense and on a MoE model. Whatever the
engine learns to do (a cache, a schedule, a draft, a kernel), it gets a row here.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from helpers_ranks import EVEN, two_ranks

from ernie import kernels
from ernie.attention import packed_causal
from ernie.fused import fuse, shallow_copy
from ernie.generate import generate
from ernie.kernels.cpu import products
from ernie.model import ErnieModel
from ernie.models import TINY
from ernie.quant.scheme import SCHEMES, read_scheme
from fastdeploy.config import EngineConfig
from fastdeploy.engine.core import Engine
from fastdeploy.engine.loading import choose_kernels, make_engine, served
from fastdeploy.engine.ranks import Ranks
from fastdeploy.engine.request import Order
from fastdeploy.outputs import Stats
from fastdeploy.sampling import SamplingParams

NUM_NEW = 24
MAX_LEN = 96
# Lengths around the borders of blocks and chunks; four of them begin alike.
SHARED = [(7 * i + 3) % 97 for i in range(33)]
PROMPTS = (
    [5],
    SHARED[:16],
    [*SHARED, 11, 12],
    [*SHARED, 13],
    SHARED[:32],
    [90 - i for i in range(15)],
    [(5 * i) % 89 for i in range(64)],
    [8, 8, 8, 8, 8, 8, 8, 8],
)


@dataclass(frozen=True)
class Row:
    name: str
    settings: dict[str, Any] = field(default_factory=dict)
    rounds: int = 1  # how often the prompts are run, one round after the other
    staggered: bool = False  # a prompt arrives in every step instead of all before the first
    hits: bool | None = None  # whether tokens must (not) have come from the prefix cache
    preempts: bool = False  # whether requests must have been preempted
    priorities: bool = False  # later prompts come before earlier ones, in twos
    rests: bool = False  # the engine sleeps every few steps, with requests in work


ENOUGH = {"num_gpu_blocks_override": 200, "block_size": 8, "max_num_seqs": 8}
ROWS = [
    Row("as it comes", {}),
    Row("one at a time", {**ENOUGH, "max_num_seqs": 1}),
    Row("chunks of 1", {**ENOUGH, "max_num_seqs": 1, "max_num_batched_tokens": 1}),
    Row("chunks of 8", {**ENOUGH, "max_num_batched_tokens": 8}),
    Row("chunks of 13", {**ENOUGH, "max_num_batched_tokens": 13}),
    Row("whole prompts", {**ENOUGH, "enable_chunked_prefill": False}),
    Row("blocks of 1", {"block_size": 1, "num_gpu_blocks_override": 900}),
    Row("blocks of 3", {"block_size": 3, "num_gpu_blocks_override": 300}),
    Row("blocks of 64", {"block_size": 64, "num_gpu_blocks_override": 16}),
    Row("arriving in turn", {**ENOUGH, "max_num_batched_tokens": 16}, staggered=True),
    Row("no prefix cache", {**ENOUGH, "enable_prefix_caching": False}, rounds=2, hits=False),
    Row("second round hits", ENOUGH, rounds=2, hits=True),
    Row("hits in chunks", {**ENOUGH, "max_num_batched_tokens": 9}, rounds=2, hits=True),
    Row("evictions", {**ENOUGH, "num_gpu_blocks_override": 26, "max_num_seqs": 2}, 3, hits=True),
    Row("preempted", {**ENOUGH, "num_gpu_blocks_override": 14}, preempts=True),
    Row(
        "preempted, nothing cached",
        {**ENOUGH, "num_gpu_blocks_override": 14, "enable_prefix_caching": False},
        preempts=True,
        hits=False,
    ),
    Row(
        "preempted in small chunks",
        {"block_size": 3, "num_gpu_blocks_override": 34, "max_num_batched_tokens": 10},
        rounds=2,
        preempts=True,
    ),
    Row(
        "preempted by priority",
        {**ENOUGH, "num_gpu_blocks_override": 14},
        staggered=True,
        preempts=True,
        priorities=True,
    ),
    Row("asleep now and then", ENOUGH, rounds=2, preempts=True, rests=True),
]
DRAFTS = {
    "n-gram": {"method": "ngram", "num_speculative_tokens": 4, "min_ngram_size": 1},
    "MTP": {"method": "mtp", "num_speculative_tokens": 3},
}
WITH_DRAFTS = (
    "as it comes",
    "chunks of 8",
    "blocks of 3",
    "arriving in turn",
    "second round hits",
    "preempted",
    "preempted in small chunks",
)


def varied(names: Sequence[str], key: str, values: Mapping[str, object]) -> list[Row]:
    """The rows of these names once more for each value of a setting, by its name."""
    return [
        replace(row, name=f"{row.name}, {name}", settings=row.settings | {key: value})
        for name, value in values.items()
        for row in ROWS
        if row.name in names
    ]


ROWS += varied(WITH_DRAFTS, "speculative_config", DRAFTS)
# The oracle's cache is rounded alike, so nothing is left to differ.
NARROW = ("chunks of 8", "second round hits", "preempted in small chunks")
ROWS += varied(NARROW, "kv_cache_dtype", {d: d for d in ("bfloat16", "float16", "int8")})

# The oracle's weights are the same integers, so again nothing is left to differ.
QUANTISED = (
    "as it comes",
    "chunks of 8",
    "blocks of 3",
    "second round hits",
    "preempted in small chunks",
    "chunks of 8, n-gram",
    "preempted in small chunks, n-gram",
    "second round hits, MTP",
    "preempted in small chunks, int8",
)
ROWS += varied(QUANTISED, "quantization", {scheme: scheme for scheme in SCHEMES})

# The processes are started once for all of these.
NAMES_OF_TWO_RANKS = (
    "as it comes",
    "as it comes, n-gram",
    "chunks of 8",
    "arriving in turn",
    "hits in chunks",
    "preempted in small chunks",
    "as it comes, MTP",
    "second round hits, MTP",
    "preempted in small chunks, MTP",
)
EVEN_TEXT = ("even-dense", "even-moe")


@cache
def random_model(name: str) -> ErnieModel:
    """A model whose logits are far apart."""
    model = ErnieModel(
        replace((TINY | EVEN)[name], num_nextn_predict_layers=1), dtype=torch.float32
    )
    model.init_weights(seed=1, std=0.3)
    return model


@cache
def quantized_model(name: str, quantization: str | None) -> ErnieModel:
    """`random_model(name)`, with weights of integers if wanted."""
    model = random_model(name)
    if quantization is None:
        return model
    return fuse(shallow_copy(model), read_scheme(quantization, has_experts=model.config.is_moe))


@cache
def expected_answers(
    name: str, cache_dtype: str = "float32", quantization: str | None = None
) -> list[list[int]]:
    """The plain generator's answers."""
    model = quantized_model(name, quantization)
    settings = {"max_tokens": NUM_NEW, "cache_dtype": getattr(torch, cache_dtype)}
    return [list(generate(model, p, **settings)) for p in PROMPTS]


# Of logits that are some units apart: products with integer weights round activations to 8 bits,
# where a last bit of a sum, which depends on how many rows there are, may decide.
TIE = 0.03


@torch.no_grad()
def gap_of(name: str, kind: str, prompt: list[int], one: list[int], other: list[int]) -> float:
    """By how much the logits of the first two tokens differ that two answers do not share."""
    at = first_difference(one, other)
    ids = torch.tensor([*prompt, *one[:at]])
    bounds = torch.tensor([0, len(ids)], dtype=torch.int32)
    model = quantized_model(name, kind)
    hidden_TD = model.hidden(ids, torch.arange(len(ids)), packed_causal(bounds))
    logits_V = model.head(hidden_TD[-1:])[0]
    return abs(float(logits_V[one[at]] - logits_V[other[at]]))


def run(engine: Engine, prompts: Sequence[list[int]], row: Row) -> list[list[int]]:
    """Greedy answers to the prompts, with the books checked after every step."""
    params = SamplingParams(temperature=0, max_tokens=NUM_NEW, ignore_eos=True)
    answers: dict[str, list[int]] = {str(i): [] for i in range(len(prompts))}
    waiting = [(str(i), prompt) for i, prompt in enumerate(prompts)]
    while waiting or engine.has_work:
        for request_id, prompt in waiting[:1] if row.staggered else waiting:
            order = Order(priority=-(int(request_id) // 2) if row.priorities else 0)
            engine.add(request_id, prompt, params, order)
        waiting = waiting[1:] if row.staggered else []
        for output in engine.step():
            answers[output.request_id].append(output.token)
        engine.scheduler.check()
        if row.rests and engine.num_steps % 5 == 0:
            engine.pause("keep")
            engine.sleep()
            engine.wake_up()
            engine.resume()
    return list(answers.values())


def check(row: Row, name: str, ranks: Ranks | None = None, part: ErnieModel | None = None) -> None:
    """Run a row; with `ranks`, over rank 0's `part` of the model and the parts of the others."""
    model, settings = random_model(name), row.settings
    expected = expected_answers(
        name, settings.get("kv_cache_dtype", "float32"), settings.get("quantization")
    )
    config = EngineConfig(model=name, max_model_len=MAX_LEN, **row.settings)
    config = config.resolved(max_positions=MAX_LEN, device_type="cpu")
    engine = make_engine(part or served(shallow_copy(model), config), config, ranks=ranks)
    for _ in range(row.rounds):
        answers = run(engine, PROMPTS, row)
        for i, (answer, wanted) in enumerate(zip(answers, expected)):
            if answer == wanted:
                continue
            told = f"prompt {i} differs at {first_difference(answer, wanted)}"
            kind = settings.get("quantization")
            assert kind is not None, told
            gap = gap_of(name, kind, PROMPTS[i], answer, wanted)
            assert gap < TIE, f"{told}, by {gap:.3f}"
    stats = engine.stats()
    assert stats.num_free_blocks == stats.num_blocks, f"blocks are held by nobody: {stats}"
    assert row.hits is None or (stats.num_hit_tokens > 0) == row.hits, f"{stats}"
    assert (stats.num_preemptions > 0) == row.preempts, f"{stats}"
    assert (stats.num_draft_tokens > 0) == ("speculative_config" in row.settings), f"{stats}"


@pytest.mark.parametrize("name", ["tiny-dense", "tiny-moe"])
@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_greedy_tokens_equal_the_plain_generator(row: Row, name: str) -> None:
    check(row, name)


@pytest.fixture(scope="module", params=EVEN_TEXT)
def shared(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[str, Ranks, ErnieModel]]:
    """The name of a model, two processes that share it, and the slice of this one."""
    with two_ranks(random_model(request.param), tmp_path_factory.mktemp("even")) as found:
        yield request.param, *found


@pytest.mark.ranks
@pytest.mark.parametrize(
    "row", [r for r in ROWS if r.name in NAMES_OF_TWO_RANKS], ids=lambda r: r.name
)
def test_two_ranks_give_the_plain_generators_tokens(
    row: Row, shared: tuple[str, Ranks, ErnieModel]
) -> None:
    check(row, *shared)


@pytest.mark.parametrize(
    ("name", "quantization"),
    [
        *((name, None) for name in ("tiny-dense", "tiny-moe", *EVEN_TEXT)),
        *((name, scheme) for name in ("tiny-dense", "tiny-moe") for scheme in SCHEMES),
    ],
)
def test_answers_differ_enough_for_the_table_to_mean_something(
    name: str, quantization: str | None
) -> None:
    expected = expected_answers(name, quantization=quantization)
    if quantization is not None:
        same = [a == b for a, b in zip(expected, expected_answers(name))]
        assert not all(same), "quantisation is not felt"
    assert len({tuple(answer) for answer in expected}) == len(PROMPTS)
    assert min(len(set(answer)) for answer in expected) > 5, "an answer runs in circles"


INVARIANT = {
    "as it comes": {},
    "wint8": {"quantization": "wint8"},
    "wint4": {"quantization": "wint4"},
    "int8 cache": {"kv_cache_dtype": "int8"},
    "n-gram": {"speculative_config": DRAFTS["n-gram"]},
    "wint4, int8 cache, n-gram": {
        "quantization": "wint4",
        "kv_cache_dtype": "int8",
        "speculative_config": DRAFTS["n-gram"],
    },
}
SAMPLED = {
    "greedy": {"temperature": 0},
    "drawn": {"temperature": 0.8, "top_p": 0.95, "frequency_penalty": 0.1, "seed": 5},
}
COMPANY = {
    "all at once": {},
    "chunks of 13": {"max_num_batched_tokens": 13, "block_size": 16},
    "little room": {"block_size": 3, "num_gpu_blocks_override": 34},
}


@pytest.fixture
def invariant_mode(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Ends with the test. As on a processor where the mode matters: there torch multiplies many
    rows, and not as one.
    """
    monkeypatch.setattr(products, "MANY_ROWS", dict.fromkeys(products.MANY_ROWS, 4))
    yield
    kernels.batch_invariant(False)


@pytest.mark.parametrize("sampled", SAMPLED)
@pytest.mark.parametrize("kind", INVARIANT)
@pytest.mark.parametrize("name", ["tiny-dense", "tiny-moe"])
def test_batch_invariant_texts_are_the_same_bits_alone_and_beside_others(
    name: str, kind: str, sampled: str, invariant_mode: None
) -> None:
    own, drafts = INVARIANT[kind], "speculative_config" in INVARIANT[kind]
    # Nobody beside a text, nothing in the cache before it, no drafts.
    alone = {"max_num_seqs": 1, "enable_prefix_caching": False, "speculative_config": None}
    expected, _ = texts(name, sampled, own | alone)
    for company, settings in COMPANY.items():
        found, stats = texts(name, sampled, own | settings)
        for i, (text, wanted) in enumerate(zip(found, expected)):
            assert text == wanted, f"{company}: text {i} at {first_difference(text, wanted)}"
        assert (stats.num_draft_tokens > 0) == drafts, f"{company}: {stats}"
        assert (stats.num_preemptions > 0) == (company == "little room"), f"{company}: {stats}"


def texts(name: str, sampled: str, settings: dict[str, Any]) -> tuple[list[list[tuple]], Stats]:
    """Tokens with their log-probabilities, for each prompt."""
    options = ENOUGH | {"max_model_len": MAX_LEN, "batch_invariant": True, "enable_logprob": True}
    config = EngineConfig(model=name, **options | settings)
    config = config.resolved(max_positions=MAX_LEN, device_type="cpu")
    choose_kernels(config, torch.device("cpu"))
    engine = make_engine(served(shallow_copy(random_model(name)), config), config)
    params = SamplingParams(max_tokens=NUM_NEW, ignore_eos=True, logprobs=3, **SAMPLED[sampled])
    found: list[list[tuple]] = [[] for _ in PROMPTS]
    for i, prompt in enumerate(PROMPTS):
        engine.add(str(i), prompt, params)
    while engine.has_work:
        for output in engine.step():
            found[int(output.request_id)].append((output.token, output.logprobs))
    return found, engine.stats()


def test_samples_of_one_prompt_share_its_blocks() -> None:
    model = random_model("tiny-dense")
    settings = {"block_size": 8, "num_gpu_blocks_override": 40, "max_model_len": 96}
    config = EngineConfig(model="tiny", **settings).resolved(max_positions=96, device_type="cpu")
    engine = make_engine(model, config)
    for i in range(4):
        params = SamplingParams(max_tokens=2, n=4, seed=3)
        engine.add(f"{i}", PROMPTS[6], params, Order(sample_index=i))
    engine.step()
    stats = engine.stats()
    # 64 tokens: seven full blocks are found by the other three, each adds the eighth and one more.
    assert stats.num_hit_tokens == 3 * 56, f"{stats}"
    assert stats.num_blocks - stats.num_free_blocks == 7 + 4, f"{stats}"


def first_difference(a: Sequence[int], b: Sequence[int]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))
