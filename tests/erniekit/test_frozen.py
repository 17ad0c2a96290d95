"""Frozen weights in few bits: products are those of the values they stand for, memory is what is
said, and runs with every form of adapter go on where they were, bit for bit."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

import ernie
from ernie import kernels
from ernie.kernels import reference
from ernie.kernels.weights import QuantTensor, quantized_bytes
from ernie.model import ErnieModel
from ernie.models import TINY
from erniekit import lora, lora_files, merge_check
from erniekit.build import build_model, freezer
from erniekit.cli import main
from erniekit.config import Run, resolved, run_from
from erniekit.lora import Pair, add_lora, pairs
from erniekit.lora_files import put_in
from erniekit.plan import sizes_of

FORMATS = ("int8", "int4", "nf4", "nf4_double")
COMPUTE = ("wint8", "wint4/8", "nf4")


def quantised(weight: Tensor, form: str) -> QuantTensor:
    if form.startswith("nf4"):
        return kernels.quantize_nf4(weight, double=form.endswith("double"))
    return kernels.quantize(weight, int(form[3:]))


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("width", [64, 97, 200])
def test_products_are_those_of_the_values(form: str, width: int) -> None:
    torch.manual_seed(0)
    weight = quantised(torch.randn(35, width), form)
    assert weight.num_bytes == quantized_bytes((35, width), form)
    for implementation in (kernels, reference):
        x = torch.randn(9, width, requires_grad=True)
        bias = torch.randn(35, requires_grad=True)
        upstream = torch.randn(9, 35)
        found, wanted = (
            (out := implementation.linear(x, w, bias),
             *torch.autograd.grad(out, (x, bias), upstream))
            for w in (weight, weight.dequantized())
        )  # fmt: skip
        for a, b in zip(found, wanted):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
        with torch.no_grad():  # one matrix of the same values in another order of sums
            torch.testing.assert_close(implementation.linear(x, weight, bias), found[0])
            units = implementation.linear(torch.eye(width), weight)
        assert torch.equal(units.T, weight.dequantized()), "a value is not what it stands for"


@pytest.mark.parametrize("form", FORMATS)
def test_grouped_products_are_those_of_the_values(form: str) -> None:
    torch.manual_seed(0)
    weight = quantised(torch.randn(4, 10, 70), form)
    for counts in ([3, 0, 2, 4], [0, 0, 0, 0]):
        x = torch.randn(sum(counts), 70, requires_grad=True)
        upstream = torch.randn(sum(counts), 10)
        for implementation in (kernels, reference):
            found, wanted = (
                (out := implementation.grouped_linear(x, w, torch.tensor(counts)),
                 *torch.autograd.grad(out, x, upstream))
                for w in (weight, weight.dequantized())
            )  # fmt: skip
            for a, b in zip(found, wanted):
                torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def test_nf4_keeps_quantiles_and_their_opposites_apart() -> None:
    levels = torch.tensor(kernels.weights.NF4_LEVELS)
    exact = torch.cat([levels, levels * 0.5]).repeat(2, 4) * 3
    assert torch.equal(kernels.quantize_nf4(exact[:, :64]).dequantized(), _nearest(exact[:, :64]))
    torch.manual_seed(0)
    weight = torch.randn(50, 300)
    single, double = (kernels.quantize_nf4(weight, double=d).dequantized() for d in (False, True))
    assert torch.equal(single, _nearest(weight))
    errors = [float((found - weight).square().mean()) for found in (single, double)]
    assert errors[0] != errors[1] < 1.02 * errors[0], f"squared errors {errors}"
    weight[:, 64:128] *= 1e-3
    assert kernels.quantize_nf4(weight, double=True).dequantized()[:, 64:128].any()
    assert torch.equal(kernels.quantize_nf4(torch.zeros(2, 5)).dequantized(), torch.zeros(2, 5))


def _nearest(weight: Tensor) -> Tensor:
    """nf4 by looking at every level."""
    levels, out = torch.tensor(kernels.weights.NF4_LEVELS), torch.empty_like(weight)
    for first in range(0, weight.shape[1], 64):
        group = weight[:, first : first + 64]
        most = group.abs().amax(1, keepdim=True)
        best = ((group / most)[..., None] - levels).abs().argmin(-1)
        out[:, first : first + 64] = levels[best] * most
    return out


# --- models and runs ---


def run_of(tiny, name: str, **settings: object) -> Run:
    values = {"model_name_or_path": str(tiny(name)), "lora_rank": 3, **settings}
    return resolved(run_from(values), "cpu")


@pytest.mark.parametrize("compute", COMPUTE)
@pytest.mark.parametrize("name", ["tiny-dense", "tiny-moe"])
def test_a_model_in_few_bits_is_the_model_of_the_values(name: str, compute: str, tiny) -> None:
    run = run_of(tiny, name, compute_type=compute, recompute=True)
    model = build_model(run, "cpu")
    plain = ernie.load(tiny(name), dtype=torch.bfloat16)
    freeze = freezer(run)
    exact = ErnieModel(plain.config, dtype=torch.float32)
    exact.load_state_dict({n: p.float() for n, p in plain.state_dict().items()})
    for weight_name, weight in lora.projections(exact):
        kind = "experts" if ".experts." in weight_name else "dense"
        weight.data = freeze(weight.detach(), kind).dequantized()
    want = exact.logits(range(20))
    gap = float((model.logits(range(20)) - want).abs().max())
    off = float((plain.logits(range(20)) - want).abs().max())
    assert gap < 1e-4 < off, f"off by {gap:.1e}; rounding the weights moves logits by {off:.1e}"
    assert all(isinstance(weight, QuantTensor) for _, _, weight in pairs(model))


@pytest.mark.parametrize("compute", [*COMPUTE, "double"])
@pytest.mark.parametrize("use_dora", [False, True])
def test_planned_bytes_are_those_of_the_model(compute: str, use_dora: bool, tiny) -> None:
    more = {"compute_type": "nf4", "qlora_weight_double_quant": True}
    more = more if compute == "double" else {"compute_type": compute}
    run = run_of(tiny, "tiny-moe", use_dora=use_dora, **more)
    model = build_model(run, "cpu")
    tensors = [*model.parameters(), *model.buffers()]
    held = sum(t.numel() * t.element_size() for t in tensors)
    held += sum(weight.num_bytes for _, _, weight in pairs(model))
    found = sizes_of(model.config, run, "cpu").weights.total()
    assert abs(found - held) < 100, f"{found} bytes were planned, {held} are held"


@pytest.mark.parametrize("compute", COMPUTE)
def test_pissa_takes_its_part_out_before_the_rest_is_rounded(compute: str, tiny) -> None:
    """So that what is lost is smaller than without an adapter (Source: the paper's QPiSSA)."""
    plain = ernie.load(tiny("tiny-moe"), dtype=torch.float32)
    weights = {name: p.detach() for name, p in lora.projections(plain)}
    errors = {}
    for pissa in (False, True):
        run = run_of(tiny, "tiny-moe", compute_type=compute, pissa=pissa, lora_rank=8)
        model = build_model(run, "cpu")
        errors[pissa] = sum(
            (w.dequantized() + pair.scale * pair.lora_B @ pair.lora_A - weights[n]).square().sum()
            for n, pair, w in pairs(model)
        ).item()  # fmt: skip
    assert errors[True] < 0.9 * errors[False], f"squared errors: {errors}"


FORMS = {
    "LoRA": {},
    "DoRA": {"use_dora": "true"},
    "PiSSA": {"pissa": "true"},
    "DoRA on nf4": {"use_dora": "true", "compute_type": "nf4"},
    "PiSSA on wint4/8": {"pissa": "true", "compute_type": "wint4/8", "rslora": "true"},
    "experts on wint8": {"compute_type": "wint8", "lora_target_modules": "experts,q_proj"},
}


def words(tiny, data: Path, out: Path, name: str = "tiny-moe", **settings: object) -> list[str]:
    values = {
        "model_name_or_path": tiny(name), "train_dataset_path": data / "train.jsonl",
        "fine_tuning": "LoRA", "output_dir": out, "max_seq_len": 64, "learning_rate": 1e-2,
        "max_steps": 4, "save_strategy": "no", "lora_rank": 3, "device": "cpu",
    }  # fmt: skip
    return [f"{key}={value}" for key, value in {**values, **settings}.items()]


def adapter_of(folder: Path, model: ErnieModel) -> dict[str, Tensor]:
    return lora_files.read_adapter(folder, model.config, "base")[1]


@pytest.mark.parametrize("form", FORMS)
def test_a_resumed_run_is_the_unbroken_one(form: str, tiny, data: Path, tmp_path: Path) -> None:
    settings, model = FORMS[form], ernie.load(tiny("tiny-moe"), dtype=torch.float32)
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert main(["train", *words(tiny, data, whole, **settings)]) == 0
    for more in ({"stop_after_step": 2}, {}):
        assert main(["train", *words(tiny, data, broken, **settings, **more)]) == 0
    wanted, found = adapter_of(whole, model), adapter_of(broken, model)
    assert wanted.keys() == found.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    records = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    losses = [record["loss"] for record in records if "loss" in record]
    assert losses[-1] < losses[0], f"{losses}"
    # What was trained starts another run and is exported; the merge is checked on the way.
    again = {"lora_path": whole, "max_steps": 1, "learning_rate": 0, **settings}
    assert main(["train", *words(tiny, data, tmp_path / "again", **again)]) == 0
    for name, tensor in adapter_of(tmp_path / "again", model).items():
        assert torch.equal(tensor, wanted[name]), f"{name} did not start from lora_path"
    assert main(["export", *words(tiny, data, whole)]) == 0
    put_in(model, whole, tiny("tiny-moe"))
    merged = ernie.load(whole / "export", dtype=None).logits(range(20))
    gap = float((merged - model.logits(range(20))).abs().max())
    assert gap < 1e-3, f"the export is off by {gap:.1e}"


def test_evaluation_is_of_the_weights_that_were_trained_beside(tiny, data, tmp_path: Path) -> None:
    held = {"eval_dataset_path": data / "eval.jsonl", "evaluation_strategy": "steps"}
    held |= {"eval_steps": 4, "compute_type": "nf4", "num_answers": 0}
    assert main(["train", *words(tiny, data, tmp_path, **held)]) == 0
    last = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])["eval_loss"]
    assert main(["eval", *words(tiny, data, tmp_path, **held)]) == 0
    found = json.loads((tmp_path / "eval_results.json").read_text())["eval_loss"]
    assert found == pytest.approx(last, abs=1e-6)


def test_preferences_are_learnt_beside_few_bits(tiny, tmp_path: Path) -> None:
    """The reference is the model in few bits: before the first step no reward is other than 0."""
    from tests.erniekit.conftest import preferences, write_lines

    pairs_file = write_lines(tmp_path / "pairs.jsonl", preferences(12))
    settings = {"stage": "DPO", "compute_type": "nf4", "eval_dataset_path": pairs_file}
    settings |= {"train_dataset_path": pairs_file, "evaluation_strategy": "steps", "max_steps": 1}
    settings |= {"num_answers": 0, "max_seq_len": 128}
    assert main(["train", *words(tiny, tmp_path, tmp_path / "out", **settings)]) == 0
    first = json.loads((tmp_path / "out" / "metrics.jsonl").read_text().splitlines()[0])
    assert abs(first["eval_rewards_margin"]) < 1e-5, f"{first}"


# --- the check of merges ---


@pytest.fixture
def trained(tiny, data: Path, tmp_path: Path):
    def make(name: str) -> tuple[Path, list[str]]:
        base = tmp_path / "bfloat16"
        ernie.save(ernie.load(tiny(name), dtype=torch.bfloat16), base)
        out = tmp_path / "out"
        settings = words(tiny, data, out, name, model_name_or_path=base, max_steps=2)
        assert main(["train", *settings]) == 0
        return out, settings

    return make


@pytest.mark.parametrize("name", ["tiny-dense", "tiny-moe"])
def test_a_wrong_merge_is_refused(name: str, trained, monkeypatch, capsys) -> None:
    out, settings = trained(name)
    capsys.readouterr()
    assert main(["export", *settings]) == 0
    told = capsys.readouterr().out
    assert "within the rounding of bfloat16" in told, told
    right = Pair.merge_into

    def off_by_a_little(pair: Pair, out: Tensor, weight: Tensor) -> None:
        right(pair, out, weight)
        if out.dim() == (3 if TINY[name].is_moe else 2):
            out[..., -1, :] *= 1.02

    monkeypatch.setattr(Pair, "merge_into", off_by_a_little)
    assert main(["export", *settings]) == 2
    assert "the merge in" in (message := capsys.readouterr().err), message
    assert not list((out / "export").glob("*.safetensors"))


def test_samples_are_of_every_adapted_weight(tiny) -> None:
    model = ernie.load(tiny("tiny-moe"), dtype=torch.float32)
    plain = copy.deepcopy(model)
    add_lora(model, lora.LoRA(2, 4.0), seed=0)
    parameters = dict(plain.named_parameters())
    found = merge_check.samples(model)
    assert len(found) == len(list(pairs(model)))
    for sample in found:  # B is zero: the columns are the base's
        assert torch.equal(sample.values, parameters[sample.name][..., sample.columns].mT)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"fine_tuning": "Full", "compute_type": "wint8"}, "use fine_tuning: LoRA"),
        ({"fine_tuning": "Full", "use_dora": "true"}, "use fine_tuning: LoRA"),
        ({"use_dora": "true", "pissa": "true"}, "give one of them"),
        ({"qlora_weight_double_quant": "true"}, "is of compute_type: nf4"),
        ({"compute_type": "nf4", "sharding": "stage3"}, "use stage1"),
        ({"compute_type": "wint2"}, "compute_type='wint2'"),
        ({"pissa": "true", "lora_rank": 9}, "lora_rank=9 is more than the 8 singular values"),
        ({"lora_target_modules": "qkv_proj"}, "matches no projection"),
        ({"target_modules": "qkv_proj"}, "matches no projection"),
    ],
)
def test_what_cannot_go_together_is_refused(
    settings, message, tiny, data, tmp_path, capsys
) -> None:
    assert main(["train", *words(tiny, data, tmp_path / "out", **settings)]) == 2
    assert message in capsys.readouterr().err
