"""FP8 in full training: what is rounded, what is not, and what that does to a run."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

import ernie
from ernie import kernels
from ernie.layers import Linear
from ernie.model import Block
from ernie.moe.experts import Experts
from erniekit.build import build_model
from erniekit.cli import main
from erniekit.config import Run, resolved, run_from
from erniekit.plan import plan


def rounded(x: Tensor) -> Tensor:
    """x in e4m3 with a scale for each row, by the definition of the format: four significant bits,
    and steps of 2**-9 below 2**-6. In float64, where all of this is exact."""
    most = x.detach().float().abs().amax(-1, keepdim=True)
    scaled = (x.detach().float() * (torch.full_like(most, 448.0) / most)).double()
    _, exponent = torch.frexp(scaled)
    step = torch.exp2(exponent.clamp(min=-5).double() - 4)
    return (scaled / step).round() * step * (most / 448.0).double()


@pytest.mark.parametrize("quant", [False, True])
def test_what_each_product_multiplies(quant: bool) -> None:
    torch.manual_seed(0)
    x, w, b = torch.randn(11, 24), torch.randn(40, 24), torch.randn(40)
    for values in (x, w, b):
        values.requires_grad_()
    out = kernels.fp8_linear(x, w, b, quant_input_grad=quant)
    upstream = torch.randn(11, 40)
    found = torch.autograd.grad(out, (x, w, b), upstream)
    grad = upstream.double()
    rows = rounded(upstream) @ rounded(w.T).T if quant else grad @ w.double()
    wanted = rounded(x) @ rounded(w).T + b, rows, grad.T @ x.double(), grad.sum(0)
    for ours, theirs in zip((out, *found), wanted):
        torch.testing.assert_close(ours.double(), theirs.double(), atol=2e-4, rtol=1e-5)
    exact = (x @ w.T + b).detach()
    assert 1e-3 < float((out.detach() - exact).norm() / exact.norm()) < 0.05


def test_experts_multiply_like_dense_weights_one_by_one() -> None:
    torch.manual_seed(0)
    counts = torch.tensor([4, 0, 7])
    x, w = torch.randn(11, 24, requires_grad=True), torch.randn(3, 40, 24, requires_grad=True)
    together = kernels.fp8_grouped_linear(x, w, counts, quant_input_grad=True)
    groups = zip(x.split(counts.tolist()), w.unbind())
    alone = torch.cat([kernels.fp8_linear(r, m, quant_input_grad=True) for r, m in groups])
    upstream = torch.randn_like(alone)
    torch.testing.assert_close(together, alone)
    for ours, theirs in zip(*(torch.autograd.grad(o, (x, w), upstream) for o in (together, alone))):
        torch.testing.assert_close(ours, theirs)


# --- models and runs ---


def run_of(tiny, name: str, **settings: object) -> Run:
    values = {"model_name_or_path": str(tiny(name)), "fine_tuning": "Full", **settings}
    return resolved(run_from(values), "cpu")


@pytest.mark.parametrize("name", ["tiny-dense", "tiny-moe", "tiny-vl"])
def test_blocks_multiply_in_fp8_and_nothing_else_does(name: str, tiny) -> None:
    model = build_model(run_of(tiny, name, compute_type="fp8"), "cpu")
    plain = (kernels.linear, kernels.grouped_linear)
    short = {n for n, m in model.named_modules() if getattr(m, "product", plain[0]) not in plain}
    inside = {
        f"{path}.{n}"
        for path, block in model.named_modules()
        if isinstance(block, Block)
        for n, m in block.named_modules()
        if isinstance(m, (Linear, Experts))
    }
    assert short == inside
    assert all(n.startswith(("model.layers.", "model.mtp.")) for n in short)
    assert not any("gate." in n.replace("gate_proj", "") for n in short), "routers are float32"


def of_rounded(product: Callable[..., Tensor], x: Tensor, w: Tensor, *rest: Tensor) -> Tensor:
    return product(rounded(x).float(), rounded(w).float(), *rest)


@pytest.mark.parametrize("name", ["tiny-dense", "tiny-moe"])
def test_a_model_in_fp8_is_the_model_of_rounded_values(name: str, tiny) -> None:
    """By hooks on a plain model, which round what its products read."""
    model = build_model(run_of(tiny, name, compute_type="fp8"), "cpu")
    ids = range(20)
    exact = ernie.load(tiny(name), dtype=torch.float32)
    plain = exact.logits(ids)
    for module in exact.modules():
        if isinstance(module, Block):
            for child in module.modules():
                if isinstance(child, (Linear, Experts)):
                    child.product = partial(of_rounded, child.product)
    want = exact.logits(ids)
    gap = float((model.logits(ids) - want).abs().max())
    off = float((plain - want).abs().max())
    assert gap < off / 20, f"off by {gap:.1e}; rounding moves logits by {off:.1e}"


def settings(tiny, data: Path, out: Path, name: str = "tiny-moe", **more: object) -> list[str]:
    values = {
        "model_name_or_path": tiny(name), "train_dataset_path": data / "train.jsonl",
        "output_dir": out, "fine_tuning": "Full", "max_steps": 12, "max_seq_len": 64,
        "learning_rate": 3e-3, "compute_type": "fp8", "quant_input_grad": "true",
        "save_steps": 6, "logging_steps": 1, **more,
    }  # fmt: skip
    return [f"{key}={value}" for key, value in values.items()]


def losses(out: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (out / "metrics.jsonl").read_text().splitlines()]


def test_a_run_learns_as_it_does_without_rounding(tiny, data, tmp_path: Path) -> None:
    assert main(["train", *settings(tiny, data, tmp_path / "fp8")]) == 0
    plain = settings(tiny, data, tmp_path / "bf16", compute_type="bf16", quant_input_grad="false")
    assert main(["train", *plain]) == 0
    short, full = losses(tmp_path / "fp8"), losses(tmp_path / "bf16")
    assert short != full
    fallen = full[0] - full[-1]
    assert fallen > 1, f"nothing was learnt: {full}"
    worst = max(abs(a - b) for a, b in zip(short, full, strict=True))
    assert worst < 0.05 * fallen, f"{short} against {full}"


def test_a_run_goes_on_bit_for_bit(tiny, data, tmp_path: Path) -> None:
    for recompute in ("false", "true"):
        out = tmp_path / recompute
        assert main(["train", *settings(tiny, data, out, recompute=recompute)]) == 0
        assert main(["resume", "--verify", str(out)]) == 0
    assert losses(tmp_path / "false") == losses(tmp_path / "true")


def test_the_plan_knows_what_is_rounded(tiny) -> None:
    peaks = {
        kind: plan(run_of(tiny, "tiny-moe", compute_type=kind, max_seq_len=4096), "cpu").peak
        for kind in ("bf16", "fp8")
    }
    assert peaks["fp8"] > peaks["bf16"]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"fine_tuning": "LoRA"}, "use fine_tuning: Full"),
        ({"compute_type": "bf16"}, "quant_input_grad is of compute_type: fp8"),
        ({"quant_weight_grad": "true"}, "quant_weight_grad=true is not available yet"),
    ],
)
def test_what_cannot_go_together_is_refused(more, message, tiny, data, tmp_path, capsys) -> None:
    assert main(["train", *settings(tiny, data, tmp_path / "out", **more)]) == 2
    assert message in capsys.readouterr().err
