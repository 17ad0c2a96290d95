"""Tokens under an adapter are those of the merged model, whatever else is in the batch.

The base and two adapters are served side by side by one engine, in batches that mix them; the
reference is the plain generator on the base and on two models with the adapters merged in.
"""

from __future__ import annotations

import copy
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))

import helpers_lora
from helpers_ranks import EVEN, two_ranks

from ernie.adapters import ActiveAdapters
from ernie.attention import packed_causal
from ernie.fused import fuse, shallow_copy
from ernie.generate import generate
from ernie.kernels import reference
from ernie.model import ErnieModel
from ernie.models import TINY
from ernie.quant.scheme import SCHEMES
from ernie.settings import ConfigError
from erniekit import lora_files
from erniekit.lora import LoRA
from fastdeploy.config import EngineConfig
from fastdeploy.engine.core import Engine
from fastdeploy.engine.loading import make_engine
from fastdeploy.engine.ranks import Ranks
from fastdeploy.sampling import SamplingParams

NUM_NEW, MAX_LEN = 16, 96
SHARED = [(7 * i + 3) % 97 for i in range(33)]
PROMPTS = ([5], [*SHARED, 11, 12], SHARED[:16], [(5 * i) % 89 for i in range(40)])
PAIRS = {"wide": LoRA(5, 12.0), "stable": LoRA(2, 6.0, is_rank_stabilised=True)}
MODELS = ("base", *PAIRS)
Shared = tuple[Ranks, ErnieModel]  # ranks, and the slice of rank 0


@cache
def answers(name: str) -> tuple[ErnieModel, dict[str, ErnieModel], dict[str, list[list[int]]]]:
    """The base, the wrapped models by adapter, and the expected tokens of everyone."""
    base = ErnieModel((TINY | EVEN)[name], dtype=torch.float32)
    base.init_weights(seed=1, std=0.3)
    wrapped = {a: helpers_lora.trained(base, p, i) for i, (a, p) in enumerate(PAIRS.items(), 7)}
    plain = {"base": base, **{a: helpers_lora.merged(w) for a, w in wrapped.items()}}
    tokens = {
        who: [list(generate(model, p, max_tokens=NUM_NEW)) for p in PROMPTS]
        for who, model in plain.items()
    }
    return base, wrapped, tokens


def engine_for(name: str, path: Path, shared: Shared | None = None, **settings: Any) -> Engine:
    """With `shared`, over rank 0's part of the model and the parts of the others."""
    base, wrapped, _ = answers(name)
    ranks, part = shared or (None, fuse(shallow_copy(base)))
    config = EngineConfig(model=name, max_model_len=MAX_LEN, enable_lora=True, **settings)
    config = config.resolved(max_positions=MAX_LEN, device_type="cpu")
    engine = make_engine(part, config, ranks=ranks)
    for adapter, model in wrapped.items():
        folder = path / adapter
        if not folder.exists():
            helpers_lora.save(model, PAIRS[adapter], folder)
        engine.load_adapter(adapter, engine.adapters.read(folder))
    return engine


def run(engine: Engine, *, staggered: bool = False) -> dict[str, list[list[int]]]:
    """Greedy answers of everyone to every prompt, neighbours in the batch being of all kinds."""
    params = SamplingParams(temperature=0, max_tokens=NUM_NEW, ignore_eos=True)
    tokens: dict[str, list[list[int]]] = {who: [[] for _ in PROMPTS] for who in MODELS}
    waiting = [(who, i) for i in range(len(PROMPTS)) for who in MODELS]
    while waiting or engine.has_work:
        for who, i in waiting[:1] if staggered else waiting:
            adapter = None if who == "base" else engine.adapters.get(who)
            engine.add(f"{who} {i}", PROMPTS[i], params, adapter=adapter)
        waiting = waiting[1:] if staggered else []
        for output in engine.step():
            who, i = output.request_id.split()
            tokens[who][int(i)].append(output.token)
        engine.scheduler.check()
    return tokens


@dataclass(frozen=True)
class Row:
    name: str
    settings: dict[str, Any] = field(default_factory=dict)
    rounds: int = 1
    staggered: bool = False
    preempts: bool = False


ENOUGH = {"num_gpu_blocks_override": 300, "block_size": 8, "max_num_seqs": 12}
ROWS = [
    Row("all at once", ENOUGH),
    Row("one at a time", {**ENOUGH, "max_num_seqs": 1}),
    Row("chunks of 13", {**ENOUGH, "max_num_batched_tokens": 13}, rounds=2),
    Row("arriving in turn", {**ENOUGH, "max_num_batched_tokens": 16}, staggered=True),
    Row("second round hits", ENOUGH, rounds=2),
    Row("preempted", {**ENOUGH, "num_gpu_blocks_override": 14}, preempts=True),
]
OF_RANKS = ("all at once", "chunks of 13", "arriving in turn")


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_tokens_equal_the_merged_models(row: Row, name: str, tmp_path: Path) -> None:
    check(row, name, tmp_path)


@pytest.fixture(scope="module", params=["even-dense", "even-moe"])
def shared(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[str, Shared]]:
    """The name of a model, with two processes that share it."""
    with two_ranks(answers(request.param)[0], tmp_path_factory.mktemp("even")) as found:
        yield request.param, found


@pytest.mark.ranks
@pytest.mark.parametrize("row", [r for r in ROWS if r.name in OF_RANKS], ids=lambda row: row.name)
def test_two_ranks_give_the_merged_models_tokens(
    row: Row, shared: tuple[str, Shared], tmp_path: Path
) -> None:
    check(row, shared[0], tmp_path, shared[1])


def check(row: Row, name: str, tmp_path: Path, shared: Shared | None = None) -> None:
    engine, expected = engine_for(name, tmp_path, shared, **row.settings), answers(name)[2]
    for _ in range(row.rounds):
        assert run(engine, staggered=row.staggered) == expected
    stats = engine.stats()
    assert (stats.num_hit_tokens > 0) or row.rounds == 1, f"{stats}"
    assert (stats.num_preemptions > 0) == row.preempts, f"{stats}"


@pytest.mark.parametrize("name", [*TINY, "even-dense", "even-moe"])
def test_the_adapters_of_the_table_change_every_answer(name: str) -> None:
    tokens = answers(name)[2]
    for i in range(len(PROMPTS)):
        assert len({tuple(tokens[who][i]) for who in MODELS}) == len(MODELS)


@pytest.mark.parametrize("name", TINY)
def test_rows_of_nobody_do_not_notice_adapters_beside_them(name: str, tmp_path: Path) -> None:
    engine, ids, rows = engine_for(name, tmp_path, **ENOUGH), torch.arange(8) * 3, [1, 2, 6]
    groups = ((engine.adapters.get("wide"), torch.tensor(rows)),)
    plain, changed = (hidden(engine.runner.model, ids, a) for a in (None, ActiveAdapters(groups)))
    difference_T = (changed - plain).abs().amax(-1) / plain.abs().max()
    others = [row for row in range(8) if row not in rows]
    assert float(difference_T[others].max()) < 1e-6, f"{difference_T}"
    assert float(difference_T[rows].min()) > 0.01, f"{difference_T}"


@pytest.mark.parametrize("scheme", ["wint8", "wint4"])
@pytest.mark.parametrize("name", TINY)
def test_an_adapter_on_integer_weights_is_added_unrounded(
    name: str, scheme: str, tmp_path: Path
) -> None:
    engine = engine_for(name, tmp_path, **ENOUGH)
    base, wrapped, _ = answers(name)
    ids, adapter = torch.arange(20) * 3, engine.adapters.get("wide")
    groups = ((adapter, torch.arange(20)),)
    quantised = fuse(shallow_copy(base), SCHEMES[scheme])
    plain, changed = (hidden(quantised, ids, a) for a in (None, ActiveAdapters(groups)))
    twin = copy.deepcopy(wrapped["wide"])
    for parameter_name, parameter in twin.named_parameters():
        bits = SCHEMES[scheme].experts if ".experts." in parameter_name else SCHEMES[scheme].dense
        if (
            "_proj" in parameter_name
            and "lora" not in parameter_name
            and "mtp" not in parameter_name
        ):
            parameter.data = reference.quantize(parameter.data, bits).dequantized()
    exact = hidden(helpers_lora.merged(twin), ids)
    error = float((changed - exact).abs().median() / (changed - plain).abs().median())
    assert error < 0.05, f"the error is {error:.1%} of what the adapter changes"


def hidden(model: ErnieModel, ids: Tensor, adapters: ActiveAdapters | None = None) -> Tensor:
    """Of tokens that stand alone."""
    attend = packed_causal(torch.arange(len(ids) + 1, dtype=torch.int32))
    with torch.inference_mode():
        return model.hidden(ids, torch.zeros_like(ids), attend, adapters=adapters)


# --- other forms ---


def answers_beside(name: str, folder: Path) -> list[list[int]]:
    """Greedy answers of the base with the adapter of a folder, unmerged."""
    config = EngineConfig(model=name, max_model_len=MAX_LEN, enable_lora=True, **ENOUGH)
    config = config.resolved(max_positions=MAX_LEN, device_type="cpu")
    engine = make_engine(fuse(shallow_copy(answers(name)[0])), config)
    engine.load_adapter("one", engine.adapters.read(folder))
    params = SamplingParams(temperature=0, max_tokens=NUM_NEW, ignore_eos=True)
    tokens: list[list[int]] = [[] for _ in PROMPTS]
    for i, prompt in enumerate(PROMPTS):
        engine.add(str(i), prompt, params, adapter=engine.adapters.get("one"))
    while engine.has_work:
        for output in engine.step():
            tokens[int(output.request_id)].append(output.token)
    return tokens


FORMS = {
    "experts": LoRA(3, 9.0, targets=("experts",)),
    "one stack and attention": LoRA(3, 9.0, targets=("experts.gate_up_proj", "q_proj")),
    "shared experts": LoRA(3, 9.0, targets=("shared_experts.down_proj",)),
    "PiSSA": LoRA(3, 9.0, is_principal=True, targets=("experts", "q_proj", "o_proj")),
}


@pytest.mark.parametrize("as_peft", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_tokens_of_other_forms_equal_the_merged_models(
    form: str, as_peft: bool, tmp_path: Path
) -> None:
    """As training leaves them, and as `export_format: peft` writes them."""
    base = answers("tiny-moe")[0]
    wrapped = helpers_lora.trained(base, FORMS[form], 3)
    merged = helpers_lora.merged(wrapped)
    expected = [list(generate(merged, prompt, max_tokens=NUM_NEW)) for prompt in PROMPTS]
    assert expected != answers("tiny-moe")[2]["base"]
    folder = helpers_lora.save(wrapped, FORMS[form], tmp_path / "own")
    if as_peft:
        lora, tensors = lora_files.read_adapter(folder, base.config, "base")
        if form == "shared experts":
            with pytest.raises(ConfigError, match="which PEFT takes for pairs of the routed"):
                lora_files.peft_form(base, lora, tensors, "a base", "here")
            return
        text, files = lora_files.peft_form(base, lora, tensors, "a base", "here")
        folder = helpers_lora.write(tmp_path / "peft", files, json.loads(text))
    elif FORMS[form].is_principal:
        with pytest.raises(ConfigError, match=r"stands beside another base .*merge it into its"):
            answers_beside("tiny-moe", folder)
        return
    assert answers_beside("tiny-moe", folder) == expected


def test_dora_is_refused_with_what_to_do(tmp_path: Path) -> None:
    form = LoRA(3, 9.0, has_magnitude=True)
    wrapped = helpers_lora.trained(answers("tiny-dense")[0], form, 3)
    folder = helpers_lora.save(wrapped, form, tmp_path / "own")
    with pytest.raises(ConfigError, match=r"use_dora=true .*merge it .*erniekit export"):
        answers_beside("tiny-dense", folder)
