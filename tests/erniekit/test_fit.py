"""What `recompute_granularity: auto` computes again, and an optimizer whose state is elsewhere."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from pathlib import Path

import pytest
import torch

import ernie
from ernie.kernels.cpu import products
from ernie.models import TINY
from ernie.settings import ConfigError
from erniekit import losses, optim
from erniekit.build import trained_parameters
from erniekit.cli import main
from erniekit.config import Run, read_run, resolved, run_from
from erniekit.config.model import TOWER, parts_again
from erniekit.faults import _advice
from erniekit.fit import _words, fitted
from erniekit.lora import LoRA, add_lora
from erniekit.optim import OPTIMIZERS, treatments
from erniekit.plan import GIB, Degrees, again_flops, plan
from erniekit.recompute import recompute
from tests.erniekit.test_resume import curve
from tests.erniekit.test_starts import short
from tests.helpers_train_ranks import state_elsewhere

RELEASED = "baidu/ERNIE-4.5-0.3B-PT"
AUTO = {"recompute": True, "recompute_granularity": "auto"}
DENSE, MOE = (
    dataclasses.replace(TINY[name], num_hidden_layers=3, num_nextn_predict_layers=0)
    for name in ("tiny-dense", "tiny-moe")
)


def planned(device: str = "cpu", **settings: object) -> Run:
    return resolved(run_from({"model_name_or_path": RELEASED} | settings), device)


def peak(run: Run) -> int:
    return plan(run, "cpu").peak


@pytest.mark.parametrize(
    "settings",
    [
        {"fine_tuning": "LoRA", "max_seq_len": 1024},
        {"fine_tuning": "Full", "max_seq_len": 8192},
        # At the peak, in the backward pass of a low layer, what is above it is freed anyway.
        {"fine_tuning": "Full", "model_name_or_path": "baidu/ERNIE-4.5-21B-A3B-PT"},
    ],
)
def test_no_more_is_computed_again_than_has_to_be(settings) -> None:
    nothing = peak(planned(**settings))
    everything = peak(planned(**settings, recompute=True))
    assert everything < nothing
    done_again = []
    for share in (1.01, 0.9, 0.5, 0.1, -0.1):
        limit = everything + share * (nothing - everything)
        run = fitted(planned(**settings, **AUTO, plan_memory_gib=limit / GIB), "cpu", Degrees())
        enough = max(int(limit), everything)
        assert peak(run) <= enough
        done_again.append(plan(run, "cpu").flops_per_step)
        chosen = [f"{part}:{where}" for where, part in parts_again(run.chosen_layers).items()]
        for word in chosen:  # one part less, and it would not fit
            less = word.replace("full:", "mlp:") if word.startswith("full:") else None
            fewer = [other for other in chosen if other != word] + ([less] if less else [])
            assert (
                peak(dataclasses.replace(run, chosen_layers=tuple(fewer or ["mlp:999"]))) > enough
            )
    assert done_again[0] == plan(planned(**settings), "cpu").flops_per_step
    assert done_again == sorted(done_again)


def test_which_part_comes_first_depends_on_the_rows() -> None:
    """Attention's operations grow with a row, what it keeps does not."""
    first = {}
    for row in (256, 8192):
        settings = {"fine_tuning": "LoRA", "max_seq_len": row}
        limit = peak(planned(**settings)) - 1
        run = fitted(planned(**settings, **AUTO, plan_memory_gib=limit / GIB), "cpu", Degrees())
        (word,) = run.chosen_layers
        first[row] = word
    assert first == {256: "full_attn:0", 8192: "mlp:0"}


def test_layers_that_shall_keep_their_activations_do() -> None:
    settings = {"fine_tuning": "LoRA", "no_recompute_layers": [0, 5], "plan_memory_gib": 0.1}
    run = fitted(planned(**settings, **AUTO), "cpu", Degrees())
    assert parts_again(run.chosen_layers).keys() == {*range(1, 17)} - {5}  # 17 frees nothing


def test_a_tower_is_one_of_the_parts() -> None:
    model = {"model_name_or_path": "baidu/ERNIE-4.5-VL-28B-A3B-PT", "plan_memory_gib": 1}
    settings = (
        model | AUTO | {"stage": "VL-SFT", "fine_tuning": "Full", "freeze_config": "freeze_lm"}
    )
    run = fitted(planned(**settings), "cpu", Degrees())
    assert parts_again(run.chosen_layers)[TOWER] == "full"
    frozen = planned(**settings | {"freeze_config": "freeze_vision"})
    assert TOWER not in parts_again(fitted(frozen, "cpu", Degrees()).chosen_layers)
    by_hand = settings | {"recompute_granularity": "full", "recompute_layers": "full:tower"}
    for more, why in (
        ({"freeze_config": "freeze_vision"}, "freeze_vision does not train it"),
        ({"stage": "SFT"}, "stage=SFT reads no pictures"),
        ({"fine_tuning": "LoRA"}, "LoRA does not train it"),
    ):
        with pytest.raises(ConfigError, match=f"recompute_layers=full:tower: {why}"):
            plan(planned(**by_hand | more), "cpu")


def test_a_model_from_the_hub_that_is_none_of_the_family_is_planned_and_trained(
    tiny, data: Path, tmp_path: Path, monkeypatch
) -> None:
    """From what was fetched, whatever its name says."""
    name = "someone/ERNIE-4.5-21B-A3B-PT"
    folder = tmp_path / "hub" / f"models--{name.replace('/', '--')}"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("0" * 40)
    shutil.copytree(tiny("tiny-dense"), folder / "snapshots" / ("0" * 40))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    output = tmp_path / "out"
    assert main(short(name, data, output, **AUTO)) == 0
    assert (output / "adapter_model.safetensors").is_file()
    assert json.loads((output / "plan_error.json").read_text())["planned_peak_gib"] < 1


@pytest.mark.parametrize("config", [DENSE, MOE], ids=["dense", "moe"])
@pytest.mark.parametrize("fine_tuning", ["Full", "LoRA"])
@pytest.mark.parametrize("granularity", ["full", "full_attn", "mlp"])
def test_operations_done_again_are_those_planned(
    config, fine_tuning, granularity, monkeypatch
) -> None:
    """Forward products that the backward pass does; those of adapters are not planned."""
    tokens, counted = 64, []
    product = products._product

    def counting(x_NI, weight, *rest):
        counted.append(2 * x_NI.numel() * weight.shape[-2])
        return product(x_NI, weight, *rest)

    run = planned(recompute=True, recompute_granularity=granularity, fine_tuning=fine_tuning)
    model = ernie.ErnieModel(config, dtype=torch.float32)
    model.init_weights(seed=0)
    adapters = 0
    if run.is_lora:
        add_lora(model, LoRA(rank=1, alpha=1), seed=0)
        adapters = 0.15
    recompute(model, run.recomputed)
    ids_T, positions_T = torch.arange(tokens) % 199, torch.arange(tokens)
    attend = losses.packed_causal(torch.tensor([0, tokens], dtype=torch.int32))
    total = model.hidden(ids_T, positions_T, attend).sum()
    monkeypatch.setattr(products, "_product", counting)
    total.backward()
    unseen = 4 * config.q_size * (run.data.max_seq_len // 2) * (granularity != "mlp")
    layers = range(config.num_hidden_layers)
    formula = sum(again_flops(config, run, n) - unseen for n in layers)
    if granularity != "full_attn":  # routers have products of their own
        routers = [
            2 * config.hidden_size * config.moe_num_experts
            for n in layers
            if config.is_moe_layer(n)
        ]
        formula -= sum(routers)
    assert sum(counted) / tokens == pytest.approx(formula, rel=0.01 + adapters)


def test_layers_are_said_in_words_and_read_again() -> None:
    parts = {0: "mlp", 1: "mlp", 3: "mlp", 4: "full", 5: "full_attn", 7: "full", TOWER: "full"}
    words = tuple(_words(parts))
    assert words == ("mlp:0-1", "mlp:3", "full:4", "full_attn:5", "full:7", "full:tower")
    assert parts_again(words) == parts


def test_two_halves_are_a_whole() -> None:
    assert parts_again(("full_attn:0-2", "mlp:1-3", "full:3")) == {
        0: "full_attn", 1: "full", 2: "full", 3: "full"
    }  # fmt: skip


@pytest.mark.parametrize(
    "word", ["mlp", "half:3", "mlp:tower", "full:-1", "full:1-2-3", "mlp:5-2", "mlp:0-99999999"]
)
def test_other_words_are_refused(word: str, capsys) -> None:
    assert main(["train", f"recompute_layers={word}"]) == 2
    assert f"recompute_layers={word} is not known; give full, " in capsys.readouterr().err


def test_a_run_that_computes_again_is_the_same_run(
    tiny, data: Path, tmp_path: Path, capsys
) -> None:
    """To the bit, also where it goes on with another choice, which is made anew at each start."""
    model, curves = tiny("tiny-dense"), {}
    again = AUTO | {"plan_memory_gib": 0.001}
    for name, first, second in (("kept", {}, {}), ("changed", {}, again), ("again", again, {})):
        output = tmp_path / name
        assert main(short(model, data, output, fine_tuning="Full", stop_after_step=2, **first)) == 0
        assert main(short(model, data, output, fine_tuning="Full", **second)) == 0
        told = capsys.readouterr()
        assert "settings differ" not in told.out + told.err
        assert ("warning: nothing more can be computed again" in told.out) == (name != "kept")
        assert ("computed again: full:0-" in told.out) == (name != "kept")
        assert "chosen_layers" not in (output / "run.yaml").read_text()
        curves[name] = [row[1] for row in curve(output)]
    assert len(curves["kept"]) == 4
    assert curves["kept"] == curves["changed"] == curves["again"]


def test_a_run_that_is_not_planned_to_fit_says_so(
    tiny, data: Path, tmp_path: Path, capsys, monkeypatch
) -> None:
    told = "GiB are planned, and a rank has 0.10; `erniekit plan` says what takes less"
    for memory, is_told in ((100 << 30, False), (GIB // 10, True)):
        monkeypatch.setattr("erniekit.fit.memory_bytes", lambda memory=memory: memory)
        assert main(short(tiny("tiny-dense"), data, tmp_path / str(memory))) == 0
        assert (told in capsys.readouterr().out) == is_told


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"recompute_layers": "mlp:0-99"}, "recompute_layers=99 is not a layer of the model"),
        ({"no_recompute_layers": "99"}, "no_recompute_layers=99 is not a layer of the model"),
        ({"recompute_layers": "full:tower"}, "recompute_layers=full:tower: the model has none"),
        (
            {"recompute_layers": "mlp:0", "no_recompute_layers": "0"},
            "layer 0 is in recompute_layers",
        ),
        (AUTO | {"recompute_layers": "mlp:0"}, "give one of them"),
    ],
)
def test_layers_that_mean_nothing_are_refused(
    settings, told: str, tiny, data: Path, tmp_path: Path, capsys
) -> None:
    words = short(tiny("tiny-dense"), data, tmp_path, **{"recompute": True} | settings)
    for verb in ("train", "plan"):
        assert main([verb, *words[1:]]) == 2
        assert told in capsys.readouterr().err


@pytest.mark.parametrize(
    "settings", [{"recompute": True, "recompute_layers": "mlp:0"}, {"max_seq_len": 8192}]
)
def test_what_takes_less_can_be_given_as_it_is_told(settings) -> None:
    given = {"model_name_or_path": RELEASED, "fine_tuning": "Full"} | settings
    told = _advice(run_from(given), "cpu")
    changes = re.findall(r"((?:\S+=\S*(?: |$))+)\(", told)
    assert len(changes) == 3, told
    words = [f"{key}={value}" for key, value in given.items()]
    for change in changes:
        assert read_run([*words, *change.split()]).flat() != run_from(given).flat()


@pytest.mark.parametrize("name", ["adamw", "adamw_8bit", "muon"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_state_that_visits_for_its_update_is_the_same(name, dtype) -> None:
    """An optimizer that copies its state for each update and back does what one does that works
    on it in place: here between two places of one memory.
    """
    states = []
    for is_offloaded in (False, True):
        run = planned(fine_tuning="Full", optim=name, offload_optim=True, ema_decay=0.9)
        model = ernie.ErnieModel(DENSE, dtype=dtype)
        model.init_weights(seed=0)
        trained = trained_parameters(model)
        rates = treatments(trained, run.optimisation, num_layers=3)
        generator = torch.Generator().manual_seed(1)
        with state_elsewhere(is_offloaded):
            optimizer = OPTIMIZERS[name](trained, rates, run.optimisation, seed=0)
            assert optimizer.is_offloaded == is_offloaded
            for _ in range(3):
                gradients = {
                    name: torch.randn(p.shape, generator=generator).to(dtype)
                    for name, p in trained.items()
                }
                optimizer.step(gradients, 1e-2, 1.0)
            states.append(optimizer.tensors() | {n: p.detach() for n, p in trained.items()})
    moved = [name for name, tensor in states[0].items() if tensor.float().abs().max() > 0]
    assert len(moved) > len(trained)
    for key, tensor in states[0].items():
        assert torch.equal(states[1][key], tensor), key


def test_what_is_offloaded_is_planned_in_the_host() -> None:
    settings = {"model_name_or_path": RELEASED, "fine_tuning": "Full"}
    there, away = (
        plan(resolved(run_from(settings | {"offload_optim": off}), "cuda"), "cuda")
        for off in (False, True)
    )
    assert there.parts["optimizer"] == 12 * there.num_trained and not there.offloaded_bytes
    assert 12 * there.num_trained <= away.offloaded_bytes < 2 * 12 * there.num_trained
    assert away.parts["optimizer"] == 0
    on_cpu = resolved(run_from(settings | {"offload_optim": True}), "cpu")
    assert plan(on_cpu, "cpu").offloaded_bytes == 0


@pytest.mark.gpu
def test_state_in_pinned_memory_is_the_same() -> None:
    states, at_rest = [], []
    for is_offloaded in (False, True):
        run = planned("cuda", fine_tuning="Full", offload_optim=is_offloaded)
        parameter = torch.nn.Parameter(torch.ones(1 << 20, device="cuda", dtype=torch.bfloat16))
        rates = {"w": optim.Treatment(1.0, 0.1)}
        optimizer = OPTIMIZERS["adamw"]({"w": parameter}, rates, run.optimisation, seed=0)
        for step in range(3):
            gradient = torch.full_like(parameter.data, 0.5 + step)
            optimizer.step({"w": gradient}, 1e-2, 1.0)
        state = optimizer.tensors()
        assert all(t.is_pinned() == is_offloaded for t in state.values())
        states.append([t.cpu() for t in (*state.values(), parameter.detach())])
        at_rest.append(torch.cuda.memory_allocated())
        del optimizer, state, parameter
    assert all(map(torch.equal, *states))
    assert at_rest[1] == at_rest[0] - (12 << 20)
