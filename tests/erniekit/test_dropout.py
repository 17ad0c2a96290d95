"""Dropout against plain torch with the same masks, and the same masks again wherever it matters."""

from __future__ import annotations

import dataclasses
from itertools import pairwise
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import ernie
from ernie import attention, kernels
from ernie.attention import packed_causal, shared_prompt
from ernie.model import ErnieModel
from ernie.models import TINY
from erniekit import checkpoint, lora, lora_files
from erniekit.cli import main
from erniekit.config import run_from
from erniekit.dropout import Dropout, add_dropout, factors
from erniekit.lora import LoRA, LoRALinear, add_lora
from erniekit.recompute import recompute
from erniekit.seeds import seed_of
from tests.erniekit.conftest import preferences, write_lines
from tests.erniekit.test_run import records
from tests.helpers import hf_dense, saved

SETTINGS = {
    "model_name_or_path": "tiny", "hidden_dropout_prob": 0.3, "attention_probs_dropout_prob": 0.4,
    "seed": 5,
}  # fmt: skip
LORA = {"lora_dropout": 0.25, "fine_tuning": "LoRA"}
BOUNDS = [0, 7, 8, 21]
IDS = torch.arange(21) * 5 % 61
POSITIONS = torch.cat([torch.arange(b - a) for a, b in pairwise(BOUNDS)])
STEP, BATCH = 3, 1


def model_of(name: str, *, has_pairs: bool = False) -> ErnieModel:
    model = ErnieModel(dataclasses.replace(TINY[name], vocab_size=61), dtype=torch.float32)
    model.init_weights(seed=2, std=0.2)
    if has_pairs:
        add_lora(model, LoRA(3, 6.0), seed=1)
        for _, pair, _ in lora.pairs(model):
            pair.lora_B.data.normal_(std=0.2, generator=torch.Generator().manual_seed(3))
    return model


def dropout_of(model: ErnieModel, **more: object) -> Dropout:
    return add_dropout(model, run_from({**SETTINGS, **more}))


def loss_of(model: ErnieModel) -> Tensor:
    attend = packed_causal(torch.tensor(BOUNDS, dtype=torch.int32))
    hidden = model.hidden(IDS, POSITIONS, attend)
    return (hidden * torch.arange(hidden.numel()).view_as(hidden).sin()).sum()


def gradients(model: ErnieModel, loss: Tensor) -> dict[str, Tensor]:
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    found = torch.autograd.grad(loss, list(trained.values()), allow_unused=True)
    return {n: g for n, g in zip(trained, found, strict=True) if g is not None}


# --- the same by formulas ---


def mask(like: Tensor, rate: float, *place: int) -> Tensor:
    return factors(like, rate, seed_of(SETTINGS["seed"], STEP, BATCH, *place))


def plain_loss(model: ErnieModel, rise: float) -> Tensor:
    """Every layer written out, with masks that are drawn apart and multiplied in."""
    layers, x = model.model.layers, model.model.embed_tokens(IDS)
    rotary = model.rotary(POSITIONS)
    for number, block in enumerate(layers):
        depth = rise * number / len(layers)
        hidden, weights = 0.3 * depth, 0.4 * depth
        attn, normed = block.self_attn, block.input_layernorm(x)
        q, k, v = (
            proj(normed).unflatten(-1, (-1, attn.head_dim))
            for proj in (attn.q_proj, attn.k_proj, attn.v_proj)
        )
        q, k = kernels.rotate(q, *rotary), kernels.rotate(k, *rotary)
        out = []
        for part, (a, b) in enumerate(pairwise(BOUNDS)):
            group = q.shape[1] // k.shape[1]
            scores = torch.einsum("qhd,nhd->hqn", q[a:b], k[a:b].repeat_interleave(group, 1))
            late = torch.ones(b - a, b - a).triu(1).bool()
            p = (scores * attn.head_dim**-0.5).masked_fill(late, -torch.inf).softmax(-1)
            if weights:
                p = p * mask(p, weights, number, 2, part)
            out.append(torch.einsum("hqn,nhd->qhd", p, v[a:b].repeat_interleave(group, 1)))
        added = attn.o_proj(torch.cat(out).flatten(-2))
        x = x + (added * mask(added, hidden, number, 0) if hidden else added)
        normed = block.post_attention_layernorm(x)
        added = block.mlp(normed)
        added = added[0] if isinstance(added, tuple) else added
        x = x + (added * mask(added, hidden, number, 1) if hidden else added)
    return (x * torch.arange(x.numel()).view_as(x).sin()).sum()


@pytest.mark.parametrize("name", ["tiny-dense", "tiny-moe"])
@pytest.mark.parametrize(("warmup", "rise"), [(0, 1.0), (5, 0.6)])
def test_loss_and_gradients_are_those_of_the_masks(name: str, warmup: int, rise: float) -> None:
    model = model_of(name)
    without = loss_of(model).detach()
    expected = plain_loss(model, rise)
    wanted = gradients(model, expected)
    dropout = dropout_of(model, dropout_warmup_steps=warmup)
    with dropout.during(STEP, BATCH):
        loss = loss_of(model)
        found = gradients(model, loss)
    gap, effect = (float((loss - other).detach().abs()) for other in (expected, without))
    assert gap < 1e-5 * abs(expected.item()), f"off by {gap:.1e}"
    assert effect > 1e-3 * abs(expected.item())
    assert found.keys() == wanted.keys()
    for key, gradient in wanted.items():
        worst = float((found[key] - gradient).abs().max() / gradient.abs().max().clamp(min=1e-9))
        assert worst < 1e-4, f"{key} is off by {worst:.1e}"
    assert torch.equal(loss_of(model), without), "dropped outside of a training pass"


@pytest.mark.parametrize("granularity", ["full", "full_attn", "mlp"])
@pytest.mark.parametrize("has_pairs", [False, True])
def test_what_is_computed_again_is_dropped_again(granularity: str, has_pairs: bool) -> None:
    sides = []
    for chosen in (None, granularity):
        model = model_of("tiny-moe", has_pairs=has_pairs)
        dropout = dropout_of(model, **(LORA if has_pairs else {}))
        recompute(model, lambda part, chosen=chosen: chosen)
        with dropout.during(STEP, BATCH):
            loss = loss_of(model)
            sides.append({"loss": loss.detach()} | gradients(model, loss))
    for key, value in sides[0].items():
        assert torch.equal(sides[1][key], value), f"{key} differs"


def test_steps_batches_and_places_have_masks_of_their_own() -> None:
    x = torch.ones(400, 500)
    first = factors(x, 0.2, seed_of(1, 2))
    assert set(first.unique().tolist()) == {0.0, 1.25}
    assert abs(float((first == 0).float().mean()) - 0.2) < 0.005
    model = model_of("tiny-dense")
    dropout = dropout_of(model)
    losses = []
    for step, batch in ((0, 0), (0, 1), (1, 0), (0, 0)):
        with dropout.during(step, batch):
            losses.append(loss_of(model).item())
    assert losses[0] == losses[3] and len(set(losses)) == 3


def test_adapters_drop_as_those_of_peft(tmp_path: Path) -> None:
    """PEFT's dropout modules are given our masks."""
    theirs = hf_dense()
    ours = ernie.load(saved(theirs, tmp_path / "base"), dtype=torch.float32)
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    config = peft.LoraConfig(r=3, lora_alpha=6, target_modules=targets, lora_dropout=0.25)
    wrapped = peft.get_peft_model(theirs, config)
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.2)
    wrapped.save_pretrained(tmp_path / "adapter")
    form, tensors = lora_files.read_adapter(tmp_path / "adapter", ours.config, "base")
    add_lora(ours, form, seed=0)
    lora_files.load_adapter(ours, tensors, "the file")
    dropout = dropout_of(ours, **LORA, hidden_dropout_prob=0, attention_probs_dropout_prob=0)

    class Same(nn.Module):
        def __init__(self, *place: int) -> None:
            super().__init__()
            self.place = place

        def forward(self, x: Tensor) -> Tensor:
            return x * mask(x[0], 0.25, *self.place)

    by_layer: dict[int, list[str]] = {}
    for name, module in ours.named_modules():
        if isinstance(module, LoRALinear):
            by_layer.setdefault(int(name.split(".")[2]), []).append(name)
    for layer, names in by_layer.items():
        for place, name in enumerate(names):
            module = wrapped.get_submodule(f"base_model.model.{name}")
            module.lora_dropout["default"] = Same(layer, 3, place)
    ids = torch.arange(20) * 7 % 199
    wanted = wrapped.train()(ids[None], use_cache=False).logits[0]
    read = ErnieModel.logits.__wrapped__
    plain = read(ours, ids)
    with dropout.during(STEP, BATCH):
        found = read(ours, ids)
    assert (found - wanted).abs().max() < 1e-4
    assert (found - plain).abs().max() > 0.1, "nothing was dropped"


def test_weights_in_parts_are_those_of_attention(monkeypatch) -> None:
    """With nothing dropped, the slow way of attention is the fast one, for pairs too."""
    generator = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(21, heads, 16, generator=generator) for heads in (4, 2, 2))
    monkeypatch.setattr(attention, "_MOST_WEIGHTS", 200)
    numbers = []

    def keep(weights_Hqn: Tensor, number: int) -> Tensor:
        numbers.append(number)
        return weights_Hqn

    pairs = shared_prompt(torch.tensor([[0, 9, 13, 21]]))
    for attend in (packed_causal(torch.tensor(BOUNDS, dtype=torch.int32)), pairs):
        gap = (attend(q, k, v, layer=0, drop=keep) - attend(q, k, v, layer=0)).abs().max()
        assert gap < 1e-5, f"off by {gap:.1e}"
    assert len(numbers) > 5 and numbers[:3] == [0, 1, 2]


# --- through the command ---


def words(tiny, data: Path, output: Path, **more: object) -> list[str]:
    values = {
        "model_name_or_path": tiny("tiny-moe"),
        "train_dataset_path": data / "train.jsonl",
        "eval_dataset_path": data / "eval.jsonl",
        "max_seq_len": 96,
        "max_steps": 6,
        "save_steps": 2,
        "gradient_accumulation_steps": 2,
        "num_answers": 0,
        "evaluation_strategy": "steps",
        "eval_steps": 3,
        "learning_rate": 1e-3,
        "hidden_dropout_prob": 0.3,
        "attention_probs_dropout_prob": 0.2,
        "dropout_warmup_steps": 4,
        "output_dir": output,
        **more,
    }
    return [f"{key}={value}" for key, value in values.items()]


@pytest.mark.parametrize("more", [{"fine_tuning": "Full", "recompute": True}, LORA])
def test_stopped_and_resumed_drops_what_the_unbroken_run_drops(
    more, tiny, data: Path, tmp_path: Path
) -> None:
    unbroken, broken = tmp_path / "unbroken", tmp_path / "broken"
    assert main(["train", *words(tiny, data, unbroken, **more)]) == 0
    again = ["train", *words(tiny, data, broken, **more)]
    assert main([*again, "stop_after_step=3"]) == 0
    assert [step for step, _ in checkpoint.checkpoints(broken)] == [2, 3]
    assert main(again) == 0
    for kept in ("loss", "eval_loss", "grad_norm"):
        curves = [[r[kept] for r in records(output) if kept in r] for output in (broken, unbroken)]
        assert curves[0] == curves[1]
    file = "adapter_model.safetensors" if more is LORA else "model.safetensors"
    ours, theirs = load_file(broken / file), load_file(unbroken / file)
    assert all(torch.equal(ours[key], tensor) for key, tensor in theirs.items())


def test_evaluation_drops_nothing_and_training_does(tiny, data: Path, tmp_path: Path) -> None:
    more = {"max_steps": 3, "dropout_warmup_steps": 0, "save_strategy": "no"}
    off = {"hidden_dropout_prob": 0, "attention_probs_dropout_prob": 0}
    found = []
    for name, extra in (("on", {}), ("off", off), ("adapter", {**off, "lora_dropout": 0.5})):
        assert main(["train", *words(tiny, data, tmp_path / name, **more, **extra)]) == 0
        found.append(records(tmp_path / name))
    on, plain, adapter = found
    assert on[0]["eval_loss"] == plain[0]["eval_loss"]
    assert on[1]["loss"] != plain[1]["loss"]
    assert adapter[1]["loss"] == plain[1]["loss"], "B is 0 before the first step"
    assert adapter[2]["loss"] != plain[2]["loss"]


def test_preferences_are_asked_about_without_dropout(tiny, tmp_path: Path) -> None:
    """The reference's log-probabilities, and the first evaluation, are those of a plain run."""
    write_lines(tmp_path / "train.jsonl", preferences(12))
    write_lines(tmp_path / "eval.jsonl", preferences(4, salt="about "))
    told = []
    for rate in (0, 0.4):
        output = tmp_path / f"out{rate}"
        more = {
            "stage": "DPO", "max_seq_len": 256, "hidden_dropout_prob": rate, "max_steps": 2,
            "attention_probs_dropout_prob": rate, "dropout_warmup_steps": 0, "save_strategy": "no",
        }  # fmt: skip
        assert main(["train", *words(tiny, tmp_path, output, **more)]) == 0
        lines = (output / "reference_log_probs.jsonl").read_text().splitlines()
        told.append((sorted(lines), records(output)))
    (plain, before), (dropped, after) = told
    assert plain == dropped and len(plain) > 1
    assert before[0]["eval_loss"] == after[0]["eval_loss"]
    assert before[1]["rewards_margin"] == pytest.approx(0, abs=1e-6)
    assert abs(after[1]["rewards_margin"]) > 1e-4, "the policy's answers were not dropped from"


@pytest.mark.parametrize(
    ("more", "told"),
    [
        ({"hidden_dropout_prob": 1}, "hidden_dropout_prob=1 is too large"),
        ({"lora_dropout": -0.1}, "lora_dropout=-0.1 is too small"),
        ({"dropout_warmup_steps": -1}, "dropout_warmup_steps=-1 is too small"),
        ({"lora_dropout": 0.1, "use_dora": True}, "cannot go with use_dora"),
        ({"lora_dropout": 0.1, "fine_tuning": "Full"}, "beside adapters; use fine_tuning: LoRA"),
        ({"moe_dropout_prob": 0.1}, "moe_dropout_prob=0.1 is not available yet"),
    ],
)
def test_rates_that_make_no_sense_are_refused(more, told, tiny, data, tmp_path, capsys) -> None:
    assert main(["train", *words(tiny, data, tmp_path / "out", **more)]) == 2
    assert told in capsys.readouterr().err


def test_a_warm_up_of_nothing_is_told() -> None:
    values = {"model_name_or_path": "x", "dropout_warmup_steps": 100}
    assert run_from(values).without_effect == ("dropout_warmup_steps",)
    assert run_from(values | {"hidden_dropout_prob": 0.1}).without_effect == ()
